"""Muon: momentum steps made orthogonal, which trains convolutions in far fewer steps than Adam."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About the nearest orthogonal matrix, by a quintic Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For kernels and matrices; steps are as long as Adam's, so its learning rates fit."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """The iteration takes longer than the step itself: every process does its share of the parameters."""
        for group in self.param_groups:
            changes = [torch.zeros_like(parameter) for parameter in group["params"]]
            for index in range(dist.get_rank(), len(changes), dist.get_world_size()):
                parameter = group["params"][index]
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                push = parameter.grad.lerp(velocity, group["momentum"]).flatten(1)
                length = 0.2 * max(push.shape) ** 0.5
                changes[index] = length * orthogonal(push).view_as(parameter)
            together = torch.cat([change.reshape(-1) for change in changes])
            dist.all_reduce(together)
            pieces = together.split([change.numel() for change in changes])
            for parameter, piece in zip(group["params"], pieces, strict=True):
                parameter.add_(piece.view_as(parameter), alpha=-group["lr"])
