"""Several processes that learn together, started by torchrun, ``accelerate launch`` or a cluster's own launcher."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ProcessEnded

if TYPE_CHECKING:
    from .dataset import Batch

T = TypeVar("T")
# How long one waits for another that is alive: those that learn other concepts end at other times.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among those that compute the same steps, each with its part of every batch.

    All draw the same random numbers and add up the same sums, so that all have the same vectors, take the same
    decisions and end at the same step.
    """

    rank: int = 0
    count: int = 1

    def rows_of(self, batch: "Batch", before: int = 0) -> "Batch | None":
        """The rows of a batch that this process computes; None where there are too few for all processes.

        ``before`` rows of the same pass are dealt out already.
        """
        if self.count == 1:
            return batch
        rows = range(len(batch.prompts))[(self.rank - before) % self.count :: self.count]
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
        """The sum over all processes of a tensor on the CPU. Raises ProcessEnded."""
        if self.count > 1:
            _ask(lambda: dist.all_reduce(numbers))
        return numbers

    def least(self, number: int) -> int:
        """The smallest of the numbers of all processes. Raises ProcessEnded."""
        return min(self.gather(number))

    def gather(self, thing: T) -> list[T]:
        """What every process has, by rank. Raises ProcessEnded."""
        if self.count == 1:
            return [thing]
        things: list[Any] = [None] * self.count
        _ask(lambda: dist.all_gather_object(things, thing))
        return things


ALONE = Processes()


def _ask(others: Callable[[], Any]) -> None:
    try:
        others()
    except RuntimeError as error:
        raise ProcessEnded("Another process of this run has ended, so this one ends too.") from error


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes that one launcher has started, as its environment variables say: torchrun, ``accelerate launch``.

    They talk by gloo, also where they compute on cards: what they tell each other are a few kilobytes on the CPU.
    Raises ProcessEnded where they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    _ask(lambda: dist.init_process_group("gloo", timeout=LONGEST_WAIT))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends a process that has ``joined`` others, once everything is written.

    Not by way of Python's own end: now and then a process aborts there ("terminate called without an active
    exception", PyTorch 2.14), and the launcher takes a run that has done everything for one that failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def own_card(device: str) -> str:
    """``cuda:3`` of ``cuda`` for the fourth process that a launcher has started on this machine."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if device == "cuda" and number else device
