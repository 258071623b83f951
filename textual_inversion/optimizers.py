"""How the vectors move."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import TrainConfig
from .embedding import Embedding


def make_optimizer(embedding: Embedding, contexts: Sequence[Embedding], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for the vectors of the word and of the throw-away words."""
    word = list(embedding.parameters())
    others = [vectors for context in contexts for vectors in context.parameters()]
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW([*word, *others], config.learning_rate, betas, weight_decay=config.weight_decay)
    groups = [{"params": word, "pull": config.editability}, {"params": others, "pull": 0.0}]
    return Sphere([group for group in groups if group["params"]], config.learning_rate, config.momentum)


class Sphere(torch.optim.Optimizer):
    """Turns vectors and keeps their length: Riemannian descent with normalised gradients.

    The length of a token's vector is how loud it is in a prompt, and AdamW lets it grow to many
    times that of a word; the direction is what it means (Directional Textual Inversion, ICLR 2026).
    ``pull`` draws towards where the vectors started, with this share of the running gradient's
    length, so that masks, batch size and the loss's scale do not change what it does.

    Args:
        params: matrices (vectors, width), or groups of them with their own ``pull``.
        lr: radians that a step turns a vector by, where the gradients agree.
        momentum: share of the past in the running mean of the gradient.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, pull: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "pull": pull})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise NotImplementedError("Sphere takes no closure")
        for group in self.param_groups:
            for vectors in group["params"]:
                if vectors.grad is not None:
                    self._turn(vectors, vectors.grad, group)

    def _turn(self, vectors: Tensor, gradient: Tensor, group: dict) -> None:
        state, momentum = self.state[vectors], group["momentum"]
        length = vectors.norm(dim=1, keepdim=True)  # (vectors, 1)
        direction = vectors / length
        if not state:
            state.update(step=0, start=direction.clone(), mean=torch.zeros_like(vectors), square=0.0)
        state["step"] += 1
        gradient = _tangent(gradient, direction)
        state["mean"].lerp_(gradient, 1 - momentum)
        # The mean square length is Adam's second moment, one number for the matrix.
        state["square"] += (1 - momentum) * (gradient.square().sum(1).mean().item() - state["square"])
        unbiased = 1 - momentum ** state["step"]
        size = math.sqrt(state["square"] / unbiased)
        if size == 0:
            return
        descent = -_tangent(state["mean"], direction) / unbiased / size
        if group["pull"]:
            descent += group["pull"] * _tangent(state["start"], direction)
        turned = direction + group["lr"] * descent
        vectors.copy_(length * turned / turned.norm(dim=1, keepdim=True))


def _tangent(vectors: Tensor, direction: Tensor) -> Tensor:
    """The part of each row at right angles to its ``direction``, unit rows."""
    return vectors - (vectors * direction).sum(1, keepdim=True) * direction
