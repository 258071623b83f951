"""The optimizers that update the vectors. ``OPTIMIZERS`` lists them; to add one, add a row and its name in config.py.

The first parameter group is the concept's vectors. The training loop sets ``lr`` in every group before each step,
``agreement`` (see ``agreement.Agreement``) in the first and ``shared_update_weight`` in the others. A parameter may
have no gradient. The ``state_dict`` must load with ``weights_only=True``, so that an unfinished run can be resumed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .config import OptimizerName, TrainConfig
from .errors import UserError
from .image_tokens import TrainedTokens


@dataclass(frozen=True)
class OptimizerSpec:
    """One choice of the setting ``optimizer``."""

    make: Callable[[TrainedTokens, TrainConfig, float], torch.optim.Optimizer]
    """Makes the optimizer of all trained vectors, with this learning rate."""
    learning_rate: float
    """Used where the setting ``learning_rate`` is 0."""
    keeps_length: bool
    """Whether the vectors keep the length they start with. If so, the averaged vectors are rescaled to it."""
    ignores: tuple[str, ...] = ()
    """Settings without effect."""


def learning_rate(config: TrainConfig) -> float:
    """The highest learning rate of the run."""
    return config.learning_rate or OPTIMIZERS[config.optimizer].learning_rate


def check_settings(config: TrainConfig) -> None:
    """Raises UserError for a setting that was changed although the chosen optimizer ignores it."""
    defaults = {item.name: item.default for item in fields(TrainConfig)}
    for name in OPTIMIZERS[config.optimizer].ignores:
        if getattr(config, name) != defaults[name]:
            raise UserError(
                f"{name} has no effect with optimizer {config.optimizer}: set it back to {defaults[name]}, "
                "or choose another optimizer."
            )


def make_optimizer(tokens: TrainedTokens, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` asks for. Raises UserError as ``check_settings`` does."""
    check_settings(config)
    return OPTIMIZERS[config.optimizer].make(tokens, config, learning_rate(config))


def _groups(tokens: TrainedTokens) -> list[dict]:
    """Parameter groups: the concept's vectors, then the per-image tokens of each text encoder."""
    by_encoder = zip(*(embedding.parameters() for embedding in tokens.per_image), strict=True)
    return [{"params": list(vectors)} for vectors in (tokens.concept.parameters(), *by_encoder)]


def _sphere(tokens: TrainedTokens, config: TrainConfig, rate: float) -> torch.optim.Optimizer:
    if any((vectors.norm(dim=1) == 0).any() for vectors in tokens.concept.parameters()):
        raise UserError(
            "A vector of the embedding to train further is zero, which sphere cannot rotate: choose optimizer adamw, "
            "or another embedding."
        )
    concept, *per_image = _groups(tokens)
    concept["anchor_strength"] = config.editability
    return Sphere([concept, *per_image], rate, config.momentum)


def _adamw(tokens: TrainedTokens, config: TrainConfig, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(tokens), rate, (config.momentum, 0.999), weight_decay=config.weight_decay)


OPTIMIZERS: dict[OptimizerName, OptimizerSpec] = {
    "sphere": OptimizerSpec(_sphere, learning_rate=0.35, keeps_length=True, ignores=("weight_decay",)),
    "adamw": OptimizerSpec(_adamw, learning_rate=0.005, keeps_length=False, ignores=("editability",)),
}


class Sphere(torch.optim.Optimizer):
    """Rotates vectors and keeps their length: Riemannian descent with normalised gradients.

    The length of a token's vector is how loud it is in a prompt, and AdamW lets it grow to many
    times that of a word; the direction is what it means (Directional Textual Inversion, ICLR 2026).

    Args:
        params: matrices (vectors, width), or groups of them with their own options.
        lr: radians that one step rotates a vector by, where the gradients agree.
        momentum: EMA decay of the gradient.
        anchor_strength: pulls each vector back to where it started, with this share of the length of
            what the gradients agree on; so masks, batch size, noise and the scale of the loss do not change
            its effect. How much that is of the whole gradient is the square root of the option ``agreement``.
        shared_update_weight: adds this many times the mean update of the group to each of its
            matrices, also to one without a gradient, so what they have in common is learned faster than
            their differences.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        anchor_strength: float = 0.0,
        shared_update_weight: float = 0.0,
    ):
        defaults = {"lr": lr, "momentum": momentum}
        defaults |= {"anchor_strength": anchor_strength, "shared_update_weight": shared_update_weight}
        defaults |= {"agreement": 1.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise NotImplementedError("Sphere takes no closure")
        for group in self.param_groups:
            with_gradient = [vectors for vectors in group["params"] if vectors.grad is not None]
            updates = {vectors: self._update(vectors, vectors.grad, group) for vectors in with_gradient}
            if group["shared_update_weight"] and updates:
                shared = group["shared_update_weight"] * sum(updates.values()) / len(updates)
                updates = {vectors: updates.get(vectors, 0) + shared for vectors in group["params"]}
            if group["lr"] == 0:  # not even rounded
                continue
            for vectors, update in updates.items():
                length, direction = _polar(vectors)
                rotated = direction + group["lr"] * _tangent(update, direction)
                vectors.copy_(length * rotated / rotated.norm(dim=1, keepdim=True))

    def _update(self, vectors: Tensor, gradient: Tensor, group: dict) -> Tensor:
        """The direction of the update, tangent to the sphere; its length is 1 if the gradients agree."""
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
        root_mean_square = math.sqrt(state["square"] / unbiased)
        if root_mean_square == 0:
            return torch.zeros_like(vectors)
        update = -_tangent(state["mean"], direction) / unbiased / root_mean_square
        if group["anchor_strength"]:
            pull = group["anchor_strength"] * math.sqrt(group["agreement"])
            update += pull * _tangent(state["start"], direction)
        return update


def _polar(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (vectors, 1) and directions (vectors, width) of the rows."""
    length = vectors.norm(dim=1, keepdim=True)
    return length, vectors / length


def _tangent(vectors: Tensor, direction: Tensor) -> Tensor:
    """The part of each row at right angles to its ``direction``, unit rows."""
    return vectors - (vectors * direction).sum(1, keepdim=True) * direction
