"""Whether a training step fits into memory, told before the first one is tried."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adapters.protocol import DiffusionModel
from .dataset import Batch
from .embedding import Embedding
from .objective import batch_loss

# Of what the forward pass keeps, for gradients on their way back: those of one block at a time.
MARGIN = 1.2


def make_room(model: DiffusionModel, words: Sequence[Embedding], batches: Sequence[Batch], rows: int) -> None:
    """Lets ``model`` recompute activations if a step of ``rows`` rows of the largest batch would not fit else."""
    batch = max(batches, key=lambda batch: batch.latents[0].numel())
    row = replace(
        batch,
        latents=batch.latents[:1],
        masks=None,
        prompts=batch.prompts[:1],
        noise=batch.noise[:1],
        quantiles=batch.quantiles[:1],
    )
    try:
        fits = kept_bytes(lambda: batch_loss(model, words, row), model.weights()) * rows * MARGIN < model.free_memory()
    except torch.OutOfMemoryError:
        fits = False
    if not fits:
        model.recompute()


def kept_bytes(run: Callable[[], Any], weights: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``run``; ``weights`` are there anyway."""
    known = {0, *map(_address, weights)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (address := _address(tensor)) not in known:
            kept[address] = tensor.untyped_storage().nbytes()
        # Held, or another would come to lie in its place and not be counted; detached, or it would hold the graph
        # that holds it, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()  # noqa: F841 - holds what was saved
    return sum(kept.values())


def _address(tensor: Tensor) -> int:
    """Of the storage; 0 for tensors that have none of their own, as quantised ones."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) else 0
