"""The gradients of a step: in little memory, and with a model in half precision."""

import math
from collections.abc import Sequence

import torch

from .adapters.protocol import TrainableModel
from .dataset import Batch
from .image_tokens import TrainedTokens
from .memory import with_checkpointing_if_out_of_memory
from .objective import batch_loss

MOST_HALVINGS = 16


class Gradients:
    """Computes the gradients of a model's loss by the trained vectors.

    The gradient of a mean over many latents underflows in fp16. Scaled by about the number of latents it passes
    through the network as that of a sum. Where that overflows the scale is halved, for good (Micikevicius et al.
    2018, arXiv 1710.03740, section 3.2). Scales are powers of two, so that the gradients do not depend on them.
    """

    def __init__(self, model: TrainableModel, tokens: TrainedTokens) -> None:
        self._model, self._tokens = model, tokens
        self._halvings = 0

    def compute(self, batches: Sequence[Batch]) -> float:
        """The mean loss of ``batches``; its gradient is in the vectors afterwards.

        Where memory runs out it is tried once more with gradient checkpointing. A loss or a gradient that is
        not a number stays so where no scale helps.
        """
        while True:
            loss = with_checkpointing_if_out_of_memory(self._model, lambda: self._accumulate(batches))
            if not math.isfinite(loss) or self.finite() or self._halvings == MOST_HALVINGS:
                return loss
            self._halvings += 1

    def finite(self) -> bool:
        gradients = [vectors.grad for vectors in self._tokens.parameters() if vectors.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def _accumulate(self, batches: Sequence[Batch]) -> float:
        for vectors in self._tokens.parameters():
            vectors.grad = None
        return sum(self._backward(batch, len(batches)) for batch in batches)

    def _backward(self, batch: Batch, parts: int) -> float:
        """Adds the gradient of one of ``parts`` batches and returns its share of the loss."""
        scale = 2.0 ** (round(math.log2(batch.latents[0].numel())) - self._halvings)
        loss = batch_loss(self._model, self._tokens.embeddings, batch) / parts
        if not loss.requires_grad:  # cut off completely: train() tells the user
            return loss.item()
        parameters = self._tokens.parameters()
        gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        for vectors, gradient in zip(parameters, gradients, strict=True):
            # A per-image token that the batch does not name has no gradient of its own.
            if gradient is not None and gradient.any():
                vectors.grad = gradient / scale + (0 if vectors.grad is None else vectors.grad)
        return loss.item()
