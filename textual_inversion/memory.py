"""Estimates the memory of a training step before the first one runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapters.protocol import TrainableModel
from .dataset import Batch
from .embedding import Embedding
from .objective import batch_loss

# On top of what the forward pass keeps: the gradients of one block at a time.
MARGIN = 1.2
NO_ADDRESS = 0


def enable_checkpointing_if_needed(
    model: TrainableModel, embeddings: Sequence[Embedding], batches: Sequence[Batch], batch_size: int
) -> None:
    """Turns gradient checkpointing on where ``batch_size`` rows of the largest shape need more memory than is free."""
    largest = max(batches, key=lambda batch: batch.latents[0].numel()).rows(slice(1))
    try:
        needed = kept_bytes(lambda: batch_loss(model, embeddings, largest), model.weights()) * batch_size * MARGIN
        enough = needed < model.free_memory()
    except torch.OutOfMemoryError:
        enough = False
    if not enough:
        model.enable_gradient_checkpointing()


def kept_bytes(run: Callable[[], Any], weights: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``run``, beside the ``weights``, which are loaded anyway."""
    known = {NO_ADDRESS, *map(_address, weights)}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if (address := _address(tensor)) not in known:
            kept[address] = tensor.untyped_storage().nbytes()
        # Keep a reference so that freed storage is not reused and missed; detach to avoid a reference cycle.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = run()  # noqa: F841 - keeps alive what was saved
    return sum(kept.values())


def _address(tensor: Tensor) -> int:
    """Address of the storage; ``NO_ADDRESS`` for tensors without one of their own, such as quantised ones."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) else NO_ADDRESS
