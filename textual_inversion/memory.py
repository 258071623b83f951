"""The memory of a training step: counted before the first one runs, and what to do when it runs out."""

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, noop_context_fn

from .adapters.protocol import TrainableModel
from .dataset import Batch
from .devices import is_out_of_memory
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped
from .objective import batch_loss

T = TypeVar("T")
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
logger = logging.getLogger(__name__)

# On top of what the forward pass keeps: the gradients of one block at a time.
MARGIN = 1.1
# The same for a part that is recomputed, on top of what it keeps then (dev/pretended_card.py: SD1, SDXL and Flux).
PART = 1.3


@contextmanager
def out_of_memory_explained(step: int) -> Iterator[None]:
    """Turns running out of memory at ``step`` into a sentence for the user.

    Raises:
        TrainingError: before or in the first step.
        TrainingStopped: later, when there is something to keep.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        when = f"at step {step}" if step else "before the first step"
        message = (
            f"Out of memory {when}, even with gradient checkpointing. Reduce size, or reduce batch_size and raise "
            "accumulation (Training Settings)."
        )
        raise (TrainingStopped if step > 1 else TrainingError)(message) from error


def with_checkpointing_if_out_of_memory(model: TrainableModel, run: Callable[[], T]) -> T:
    """``run()``; once more with everything checkpointed if memory ran out and that is not so already."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the try that failed
        if not checkpoint_everything(model):
            raise
    return run()


def checkpoint_everything(model: TrainableModel) -> bool:
    """Whether anything was left to checkpoint."""
    changed = False
    while model.enable_gradient_checkpointing():
        changed = True
    return changed


def enable_checkpointing_if_needed(
    model: TrainableModel, embeddings: Sequence[Embedding], batches: Sequence[Batch], batch_size: int
) -> None:
    """Checkpoints one part of the model after the other until a step of ``batch_size`` rows fits in what is free."""
    while (needed := step_bytes(model, embeddings, batches, batch_size)) > model.free_memory():
        if not model.enable_gradient_checkpointing():
            break
    weights = sum(weight.nbytes for weight in model.weights())
    logger.info(
        "Textual inversion: a batch of %d takes about %.1f GB beside the model's %.1f GB; %.1f GB are free.",
        batch_size,
        *(size / 2**30 for size in (needed, weights, model.free_memory())),
    )


def step_bytes(
    model: TrainableModel, embeddings: Sequence[Embedding], batches: Sequence[Batch], batch_size: int
) -> int:
    """What a step takes beside the weights, from forward passes of one row and of two.

    Some of it is there once, however many the rows: weights that were cast or dequantised.
    """
    largest = max(batches, key=lambda batch: batch.latents[0].numel()).rows(slice(1))
    prompts = list(dict.fromkeys(prompt for batch in batches for prompt in batch.prompts))

    def kept(rows: int) -> int:
        # Distinct prompts, as a batch has them: each goes through the text encoders on its own.
        batch = replace(largest.rows([0] * rows), prompts=[prompts[row % len(prompts)] for row in range(rows)])
        return kept_bytes(lambda: batch_loss(model, embeddings, batch), model.weights(), model.device)

    one = kept(1)
    more = (batch_size - 1) * (kept(2) - one) if batch_size > 1 else 0
    return int((one + more) * MARGIN)


def kept_bytes(run: Callable[[], Any], weights: Sequence[Tensor], device: torch.device | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of ``run``, beside the ``weights``, which are loaded anyway.

    With a ``device`` only what is there: text encoders may run on the CPU beside a card.
    Where parts are recomputed, the most that is there at once: with a part's own while it is recomputed. All is
    counted and not kept: ``run`` takes no more memory than inference.
    """
    kept = _Kept({storage._cdata for weight in weights for storage in _storages(weight)}, device)
    _counting.append(kept)
    try:
        with torch.enable_grad(), kept.counted():
            run()
    finally:
        _counting.remove(kept)
    return max(kept.most, kept.size)


def checkpointed(function: Callable[..., T], *args: Any, contexts: Contexts = noop_context_fn, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, recomputed in the backward pass. ``kept_bytes`` counts what is kept then.

    ``contexts`` makes those around the first run and the second. What is compiled needs none.
    """
    if not _counting or torch.compiler.is_compiling():
        contexts = noop_context_fn if torch.compiler.is_compiling() else contexts
        # Nodes that merge tokens draw random numbers: in the second run the same.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts, **kwargs)
    kept, part = _counting[-1], _Kept(_counting[-1].known, _counting[-1].device)
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            kept.count(value)
    with part.counted():
        out = function(*args, **kwargs)
    # The backward pass comes to it when what follows it is done.
    kept.most = max(kept.most, kept.size + int(PART * part.size))
    return out


class _Kept:
    """What autograd saves, counted instead."""

    def __init__(self, known: set[int], device: torch.device | None) -> None:
        self.known, self.device = known, device
        self.size = self.most = 0
        self._found: dict[int, StorageWeakRef] = {}

    def counted(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self.count, _restore)

    def count(self, tensor: Tensor) -> None:
        if self.device and tensor.device.type != self.device.type:
            return
        for storage in _storages(tensor):
            if storage._cdata not in self.known and storage._cdata not in self._found:
                # The weak reference keeps the number of the storage from being used again, not its memory.
                self._found[storage._cdata] = StorageWeakRef(storage)
                self.size += storage.nbytes()


_counting: list[_Kept] = []  # by kept_bytes, now


def _restore(_counted: None) -> Tensor:
    raise AssertionError("what was only counted has no backward pass")


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Of quantised tensors those of the numbers and the scales that they wrap."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()
