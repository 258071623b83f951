"""Everything that training carries from one step to the next. Saved and loaded, it resumes bit for bit."""

import hashlib
import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import TrainConfig, saved_names
from .embedding import Embedding
from .image_tokens import TrainedTokens
from .optimizers import learning_rate


@dataclass(frozen=True)
class Progress:
    """How far a run is, and the best it has found. "Fixed loss" is the loss on fixed noise."""

    initial_loss: float
    """Fixed loss before the first step."""
    loss: float
    """Loss on the random batch of the last step, noisy; before the first step the fixed loss."""
    best: Embedding
    """The averaged vectors with the lowest fixed loss."""
    best_loss: float
    last_improved_loss: float
    """The fixed loss at the last evaluation that counted as an improvement."""
    step: int = 0
    best_step: int = 0
    last_improved_step: int = 0
    evaluated_step: int = 0


NUMBERS = tuple(item.name for item in fields(Progress) if item.name != "best")


@dataclass
class TrainState:
    """What ``train`` changes. Random numbers are drawn again from the seed, so none are kept."""

    tokens: TrainedTokens
    optimizer: Optimizer
    ema: TrainedTokens
    """The averaged vectors of ``tokens``."""
    progress: Progress

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts only; valid until the next step."""
        return {
            "progress": {name: getattr(self.progress, name) for name in NUMBERS},
            "best": self.progress.best.vectors,
            "tokens": [embedding.vectors for embedding in self.tokens.embeddings],
            "ema": [embedding.vectors for embedding in self.ema.embeddings],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def resume(self, saved: dict[str, Any]) -> None:
        """Continues from ``saved``, a ``to_dict`` of the same model, pictures and settings."""
        saved = _in_current_names(saved)
        for tokens, kept in ((self.tokens, saved["tokens"]), (self.ema, saved["ema"])):
            for embedding, vectors in zip(tokens.embeddings, kept, strict=True):
                for key, tensor in embedding.vectors.items():
                    tensor.copy_(vectors[key])
        self.optimizer.load_state_dict(saved["optimizer"])
        best = Embedding(self.progress.best.trigger, saved["best"], self.progress.best.metadata)
        self.progress = Progress(best=best, **saved["progress"])

    def is_same_model(self, saved: dict[str, Any]) -> bool:
        """Whether ``saved`` is of this model: on the same pictures and noise it started at the same loss."""
        initial_loss = _in_current_names(saved)["progress"]["initial_loss"]
        return math.isclose(initial_loss, self.progress.initial_loss, rel_tol=1e-3)


# What version 0.1.0 called the numbers and the options of Sphere.
_NAMES_0_1_0 = {
    "loss_before": "initial_loss",
    "loss": "loss",
    "best_loss": "best_loss",
    "mark": "last_improved_loss",
    "number": "step",
    "best_number": "best_step",
    "mark_number": "last_improved_step",
    "measured": "evaluated_step",
}
_OPTIONS_0_1_0 = {"pull": "anchor_strength", "together": "shared_update_weight"}


def _in_current_names(saved: dict[str, Any]) -> dict[str, Any]:
    """A ``to_dict`` of this version, from one of this version or of 0.1.0."""
    if "progress" in saved:
        return saved
    optimizer = saved["optimizer"]
    groups = [
        {_OPTIONS_0_1_0.get(name, name): value for name, value in group.items()} for group in optimizer["param_groups"]
    ]
    return {
        "progress": {ours: saved[theirs] for theirs, ours in _NAMES_0_1_0.items()},
        "best": saved["best"],
        "tokens": saved["words"],
        "ema": saved["average"],
        "optimizer": {**optimizer, "param_groups": groups},
    }


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers, texts, lists and dicts; the old file stays whole until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """What ``save_state`` wrote; None where it is damaged. Runs no code from the file."""
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        return None


def saved_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run by the names they have on disk, which no later version changes."""
    names, settings = saved_names(TrainConfig), asdict(config) | {"learning_rate": learning_rate(config)}
    return {name: settings[ours] for ours, name in names.items()}


def fingerprint(config: TrainConfig, texts: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """The same for the same settings, captions, pictures, masks and start, in every process and version."""
    digest = hashlib.sha256(json.dumps([saved_settings(config), list(texts)]).encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
