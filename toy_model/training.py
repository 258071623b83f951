"""What the training of both networks shares: processes of one thread each, Muon, a moving average, a clock.

On few cores several processes of one thread are faster than one process of many. On a GPU one process is enough.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def run(worker: Callable[..., None], args: Any, processes: int) -> None:
    """Call worker(args) in every process; they share one process group."""
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        if processes == 1:
            _start(0, worker, args, processes, store)
        else:
            mp.spawn(_start, (worker, args, processes, store), nprocs=processes)


def _start(rank: int, worker: Callable[..., None], args: Any, processes: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    worker(args)
    dist.destroy_process_group()


def shared(model: nn.Module) -> nn.Module:
    """The model, whose gradients are the mean of all processes'."""
    return DistributedDataParallel(model) if dist.get_world_size() > 1 else model


class Replay:
    """A training step of many small kernels that a GPU repeats without being told each; on a CPU it is just called.

    What a recording repeats is fixed, learning rates too: so it is recorded anew when one has changed by a fifth.
    """

    def __init__(self, step: Callable[[], Any], optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
        self.step, self.on_gpu = step, device.type == "cuda"
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.rates: list[float] = []
        self.recording: torch.cuda.CUDAGraph | None = None
        for group in self.groups:
            group["capturable"] = self.on_gpu

    def __call__(self) -> None:
        if not self.on_gpu:
            self.step()
            return
        rates = [group["lr"] for group in self.groups]
        if self.recording is None or any(
            abs(now / then - 1) > 0.2 for now, then in zip(rates, self.rates, strict=True)
        ):
            self.rates, self.recording = rates, self.recorded()
        self.recording.replay()

    def recorded(self) -> torch.cuda.CUDAGraph:
        side, recording = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what PyTorch makes in a first step must be there
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(recording):
            self.step()
        return recording


class Muon(torch.optim.Muon):
    """PyTorch's, which takes matrices only: kernels are lent to it as such. Steps are as long as Adam's."""

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        self.weights, self.matrices = weights, [nn.Parameter(as_matrix(weight.detach())) for weight in weights]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            assert weight.data_ptr() == matrix.data_ptr(), "a kernel whose channels are not last was copied"
        super().__init__(self.matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: None = None) -> None:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            assert weight.grad is not None
            matrix.grad = as_matrix(weight.grad)
        super().step()


def as_matrix(weight: Tensor) -> Tensor:
    """A row an output channel; the same memory where channels are last in it."""
    return weight.movedim(1, -1).flatten(1)


def moving_average(model: nn.Module, longest: float) -> AveragedModel:
    """Of the weights, over ever more steps; the share of the past grows to ``longest``."""
    steps = count(1)

    @torch.no_grad()
    def update(means: Tensors, weights: Tensors, _steps: Tensor | int) -> None:  # reading theirs waits for a GPU
        step = next(steps)
        past = min(longest, (step + 1) / (step + 21))
        torch._foreach_lerp_(means, weights, 1 - past)

    return AveragedModel(model, multi_avg_fn=update)


class Clock:
    """How far a training of fixed length is; the processes agree on it once a step."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.start, self.progress = minutes, time.time(), 0.0
        self.parent = os.getppid()

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    def tick(self) -> None:
        """Agree on the progress: the mean of what each process thinks."""
        if os.getppid() != self.parent:
            raise SystemExit("the process that started this one is gone")
        progress = torch.tensor(self.seconds / (60 * self.minutes))
        dist.all_reduce(progress)
        self.progress = progress.item() / dist.get_world_size()
