"""How the vectors move."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import TrainConfig
from .embedding import Embedding

# How much further throw-away words turn together than each alone (docs/method.md).
TOGETHER = 2.0


def make_optimizer(embedding: Embedding, contexts: Sequence[Embedding], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for the vectors of the word and of the throw-away words."""
    words = [embedding, *contexts]
    if config.optimizer == "adamw":
        betas, decay = (config.momentum, 0.999), config.weight_decay
        parameters = [vectors for word in words for vectors in word.parameters()]
        return torch.optim.AdamW(parameters, config.learning_rate, betas, weight_decay=decay)
    groups: list[dict] = [{"params": list(embedding.parameters()), "pull": config.editability}]
    if contexts:  # those of one text encoder together
        by_encoder = zip(*(context.parameters() for context in contexts), strict=True)
        groups += [{"params": list(vectors), "together": TOGETHER} for vectors in by_encoder]
    return Sphere(groups, config.learning_rate, config.momentum)


class Sphere(torch.optim.Optimizer):
    """Turns vectors and keeps their length: Riemannian descent with normalised gradients.

    The length of a token's vector is how loud it is in a prompt, and AdamW lets it grow to many
    times that of a word; the direction is what it means (Directional Textual Inversion, ICLR 2026).
    ``pull`` draws towards where the vectors started, with this share of the running gradient's
    length, so that masks, batch size and the loss's scale do not change what it does. ``together``
    adds this many times the mean turn of a group to each of its matrices, also to one without a
    gradient: what all have in common is learned faster than what sets each apart.

    Args:
        params: matrices (vectors, width), or groups of them with their own ``pull`` and ``together``.
        lr: radians that a step turns a vector by, where the gradients agree.
        momentum: share of the past in the running mean of the gradient.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, pull: float = 0.0, together: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "pull": pull, "together": together})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise NotImplementedError("Sphere takes no closure")
        for group in self.param_groups:
            moved = [vectors for vectors in group["params"] if vectors.grad is not None]
            turns = {vectors: self._turn(vectors, vectors.grad, group) for vectors in moved}
            if group["together"] and turns:
                common = group["together"] * sum(turns.values()) / len(turns)
                turns = {vectors: turns.get(vectors, 0) + common for vectors in group["params"]}
            for vectors, turn in turns.items():
                length, direction = _polar(vectors)
                turned = direction + group["lr"] * _tangent(turn, direction)
                vectors.copy_(length * turned / turned.norm(dim=1, keepdim=True))

    def _turn(self, vectors: Tensor, gradient: Tensor, group: dict) -> Tensor:
        """Where the vectors are to go, a tangent: of length 1 where the gradients agree."""
        state, momentum = self.state[vectors], group["momentum"]
        _, direction = _polar(vectors)
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
            return torch.zeros_like(vectors)
        turn = -_tangent(state["mean"], direction) / unbiased / size
        if group["pull"]:
            turn += group["pull"] * _tangent(state["start"], direction)
        return turn


def _polar(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (vectors, 1) and directions (vectors, width) of the rows."""
    length = vectors.norm(dim=1, keepdim=True)
    return length, vectors / length


def _tangent(vectors: Tensor, direction: Tensor) -> Tensor:
    """The part of each row at right angles to its ``direction``, unit rows."""
    return vectors - (vectors * direction).sum(1, keepdim=True) * direction
