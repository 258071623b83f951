"""Several processes that learn together, started by torchrun, ``accelerate launch`` or a cluster's own launcher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TrainingError

if TYPE_CHECKING:
    from .dataset import Batch


@dataclass(frozen=True)
class Processes:
    """This process among those that compute the same steps, each with its part of every batch.

    All draw the same random numbers and add up the same sums, so that all have the same vectors, take the same
    decisions and end at the same step.
    """

    rank: int = 0
    count: int = 1

    def rows_of(self, batch: "Batch") -> "Batch | None":
        """The rows of a batch that this process computes; None where there are too few for all processes."""
        if self.count == 1:
            return batch
        rows = range(len(batch.prompts))[self.rank :: self.count]
        return batch.rows(list(rows)) if rows else None

    def add(self, losses: list[float], parameters: Sequence[Sequence[Tensor]]) -> list[float]:
        """The sums over all processes of ``losses``, and of the gradients of ``parameters``, which they get.

        A parameter without a gradient in any process has none afterwards: for an optimizer that is not a zero.
        """
        if self.count == 1:
            return losses
        flat = [vectors for part in parameters for vectors in part]
        found = torch.tensor([float(vectors.grad is not None) for vectors in flat])
        gradients = [torch.zeros_like(vectors) if vectors.grad is None else vectors.grad for vectors in flat]
        sums = self.sum(torch.cat([torch.tensor(losses), found, *(gradient.flatten().cpu() for gradient in gradients)]))
        totals, counts, rest = sums.split([len(losses), len(found), len(sums) - len(losses) - len(found)])
        parts = rest.split([vectors.numel() for vectors in flat])
        for vectors, count, part in zip(flat, counts.tolist(), parts, strict=True):
            vectors.grad = part.view_as(vectors).to(vectors) if count else None
        return totals.tolist()

    def any(self, wanted: bool) -> bool:
        """Whether one of the processes wants something, such as to end."""
        return bool(self.sum(torch.tensor([float(wanted)])).item())

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU.

        Raises TrainingError where another process has ended.
        """
        if self.count == 1:
            return numbers
        try:
            dist.all_reduce(numbers)
        except RuntimeError as error:
            raise TrainingError("Another process of this run has ended, so this one ends too.") from error
        return numbers


ALONE = Processes()
