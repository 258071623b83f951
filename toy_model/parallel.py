"""Train in several processes of one thread each: on few cores faster than one of many threads."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def run(worker: Callable[..., None], args: Any, processes: int) -> None:
    """Call worker(args) in every process; they share one process group."""
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        mp.spawn(_start, (worker, args, processes, store), nprocs=processes)


def _start(rank: int, worker: Callable[..., None], args: Any, processes: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    worker(args)
    dist.destroy_process_group()


class Clock:
    """How far a training of fixed length is; the processes agree on it once a step."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.start, self.progress = minutes, time.time(), 0.0
        self.parent = os.getppid()

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    def share_gradients(self, parameters: list[Tensor]) -> None:
        """Average the gradients, and the progress, over the processes."""
        if os.getppid() != self.parent:
            raise SystemExit("the process that started this one is gone")
        now = torch.tensor([self.seconds / (60 * self.minutes)])
        together = torch.cat([*(p.grad.reshape(-1) for p in parameters), now])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        pieces = together.split([*(p.numel() for p in parameters), 1])
        for parameter, piece in zip(parameters, pieces, strict=False):
            parameter.grad.copy_(piece.view_as(parameter.grad))
        self.progress = together[-1].item()
