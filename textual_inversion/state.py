"""All that training carries from one step to the next: saved and loaded, it goes on bit for bit."""

import hashlib
import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import TrainConfig
from .embedding import Embedding

NUMBERS = ("number", "loss", "best_number", "best_loss", "mark", "mark_number", "measured", "loss_before")


@dataclass
class TrainState:
    """What ``train`` changes. Its random numbers are drawn anew from the seed, so that none are kept."""

    words: list[Embedding]  # trainable: the word, then throw-away words
    optimizer: Optimizer
    average: list[Embedding]  # running mean of the words
    best: Embedding
    loss_before: float  # on fixed noise, before the first step
    number: int = 0  # steps done
    loss: float = math.nan  # of the last step's batch
    best_number: int = 0
    best_loss: float = math.inf
    mark: float = math.inf  # the last loss on fixed noise that was a step forward
    mark_number: int = 0
    measured: int = 0  # the step of the last measurement

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts only; valid until the next step."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "words": [word.vectors for word in self.words],
            "average": [word.vectors for word in self.average],
            "best": self.best.vectors,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> None:
        """Goes on from ``saved``, a ``to_dict`` of the same model, pictures and settings."""
        for words, kept in ((self.words, saved["words"]), (self.average, saved["average"])):
            for word, vectors in zip(words, kept, strict=True):
                for key, tensor in word.vectors.items():
                    tensor.copy_(vectors[key])
        self.best = Embedding(self.best.trigger, saved["best"], self.best.metadata)
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in NUMBERS:
            setattr(self, name, saved[name])

    def fits(self, saved: dict[str, Any]) -> bool:
        """Whether ``saved`` is of this model: on the same pictures and noise it had the same loss."""
        return math.isclose(saved["loss_before"], self.loss_before, rel_tol=1e-3)


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers, texts, lists and dicts; what was there stays whole until the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """What ``save_state`` wrote; None where it is damaged. Runs no code of the file's."""
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        return None


def fingerprint(config: TrainConfig, texts: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """The same for the same settings, captions, pictures, masks and start, in every process."""
    digest = hashlib.sha256(json.dumps([asdict(config), list(texts)]).encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
