"""How far gradients agree: measured from the gradients that training has anyway."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MEMORY = 50  # steps; the direction of the gradient turns while the embedding learns
CLEAR, NOISY = 0.2, 0.05  # at least


class Agreement:
    """Running mean of the cosine between the gradients of independent batches.

    1 where every batch says the same, 0 where chance decides. Cosines, since a few gradients are so long that with
    their lengths they alone would count. From a weighted mean of all unit gradients u_i so far, sum w_i = 1:
    |sum w_i u_i|^2 holds the products of all pairs, and sum w_i^2 of each with itself, which is taken out. Were all
    gradients of the same length, the noise scale of McCandlish et al. 2018 (arXiv 1812.06162), tr(Sigma) / |G|^2,
    would be batch size x (1 / agreement - 1).
    """

    def __init__(self) -> None:
        self.steps, self.mean = 0, torch.zeros(())  # (n,) after the first step
        self.weights = 1.0  # sum w_i^2

    def add(self, gradients: Sequence[Tensor]) -> None:
        """One step's gradients of all vectors that are learned."""
        unit = F.normalize(torch.cat([part.detach().flatten().float().cpu() for part in gradients]), dim=0)
        self.steps += 1
        weight = max(1 / self.steps, 1 / MEMORY)
        self.mean = self.mean + weight * (unit - self.mean)
        self.weights = (1 - weight) ** 2 * self.weights + weight**2 if self.steps > 1 else 1.0

    @property
    def value(self) -> float:
        """1 before the second step: nothing is known of noise yet. Never less than 1e-4."""
        if self.steps < 2:
            return 1.0
        pairs = self.mean.square().sum().item() - self.weights
        return min(1.0, max(1e-4, pairs / (1 - self.weights)))

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, saved: dict) -> None:
        vars(self).update(saved)


def in_words(agreement: float) -> str:
    return "clear" if agreement >= CLEAR else "noisy" if agreement >= NOISY else "very noisy"
