"""Everything that training carries from one step to the next. Saved and loaded, it resumes bit for bit."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .agreement import Agreement
from .config import TrainConfig, saved_names
from .embedding import Embedding
from .evaluation import Difference, Evaluation, gain
from .image_tokens import TrainedTokens
from .optimizers import learning_rate


@dataclass(frozen=True)
class Progress:
    """How far a run is, and the best it has found. "Fixed loss" is the loss on fixed noise."""

    loss: float
    """Loss on the random batch of the last step, noisy; before the first step the fixed loss."""
    best: Embedding
    """The averaged vectors to keep."""
    evaluations: tuple[Evaluation, ...]
    """Of the averaged vectors, the first one before the first step."""
    began: int
    """The step after which the embedding learns: until then only the per-image tokens do. 0: there are none."""
    step: int = 0
    best_step: int = 0
    flat: int = 0
    """How many of the last evaluations in a row showed no progress."""
    agreement: float = 0.0
    """Of the gradients at the start (see ``agreement.Agreement``)."""
    skipped: int = 0
    """Steps that were not taken, because the loss or the gradient of their batch was not a number."""

    @property
    def initial_loss(self) -> float:
        return self.evaluations[0].loss

    @property
    def evaluated_step(self) -> int:
        return self.evaluations[-1].step

    @property
    def best_evaluation(self) -> Evaluation:
        return next(evaluation for evaluation in reversed(self.evaluations) if evaluation.step == self.best_step)

    @property
    def best_loss(self) -> float:
        return self.best_evaluation.loss

    @property
    def gain(self) -> Difference:
        """How far the kept vectors lower the fixed loss below the initializer's."""
        return gain(self.evaluations, self.best_evaluation)


NUMBERS = ("loss", "step", "best_step", "began", "flat", "agreement", "skipped")


@dataclass
class TrainState:
    """What ``train`` changes. Random numbers are drawn again from the seed, so none are kept."""

    tokens: TrainedTokens
    optimizer: Optimizer
    ema: TrainedTokens
    """The averaged vectors of ``tokens``."""
    agreement: Agreement
    progress: Progress

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts only; valid until the next step."""
        return {
            "progress": {name: getattr(self.progress, name) for name in NUMBERS},
            "evaluations": [vars(evaluation) for evaluation in self.progress.evaluations],
            "best": self.progress.best.vectors,
            "tokens": [embedding.vectors for embedding in self.tokens.trained],
            "ema": [embedding.vectors for embedding in self.ema.trained],
            "optimizer": self.optimizer.state_dict(),
            "agreement": self.agreement.state_dict(),
        }

    @torch.no_grad()
    def resume(self, saved: dict[str, Any]) -> None:
        """Continues from ``saved``, a ``to_dict`` of the same model, pictures and settings."""
        for tokens, kept in ((self.tokens, saved["tokens"]), (self.ema, saved["ema"])):
            for embedding, vectors in zip(tokens.trained, kept, strict=True):
                for key, tensor in embedding.vectors.items():
                    tensor.copy_(vectors[key])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.agreement.load_state_dict(saved["agreement"])
        best = Embedding(self.progress.best.trigger, saved["best"], self.progress.best.metadata)
        evaluations = tuple(Evaluation(**evaluation) for evaluation in saved["evaluations"])
        self.progress = Progress(best=best, evaluations=evaluations, **saved["progress"])

    def begin(self) -> None:
        """The concept begins, beside the per-image tokens at their mean, in which there is less chance.

        What the optimizer knows of the concept's gradients is forgotten: it stood still.
        """
        for vectors in self.tokens.concept.parameters():
            self.optimizer.state.pop(vectors, None)
        for token, mean in zip(self.tokens.per_image, self.ema.per_image, strict=True):
            token.take_over(mean)

    def is_same_model(self, saved: dict[str, Any]) -> bool:
        """Whether ``saved`` is of this model: the same encoders, and at the start the same loss on fixed noise."""
        ours = [_shapes(embedding.vectors) for embedding in self.tokens.trained]
        if ours != [_shapes(vectors) for vectors in saved["tokens"]]:
            return False
        if self.tokens.beside:  # they may have learned already, which changes the loss
            return True
        initial_loss = saved["evaluations"][0]["learned"].mean().item()
        return math.isclose(initial_loss, self.progress.initial_loss, rel_tol=1e-3)


def _shapes(vectors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in vectors.items()}


PARTIAL = ".partial"  # a state that is being written
# In front of a state: its version, which counts changes of what is in it, and the SHA-256 of the rest.
HEADER = b"textual inversion state 1\n"


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers, texts, lists and dicts; the old file stays whole until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(PARTIAL)
    data = io.BytesIO()
    torch.save(content, data)
    try:
        partial.write_bytes(HEADER + hashlib.sha256(data.getbuffer()).digest() + data.getbuffer())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # of a disk that was full


def load_state(path: Path) -> dict[str, Any] | None:
    """What ``save_state`` wrote; None where a single bit of it has changed, or another version wrote it."""
    data = path.read_bytes()
    begin = len(HEADER) + hashlib.sha256().digest_size
    if not data.startswith(HEADER) or hashlib.sha256(data[begin:]).digest() != data[len(HEADER) : begin]:
        return None
    return torch.load(io.BytesIO(data[begin:]), weights_only=True)


RECIPE = 12  # counts changes of training that make an older unfinished run another run


def saved_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a run by the names they have on disk, which no later version changes."""
    names, settings = saved_names(TrainConfig), asdict(config) | {"learning_rate": learning_rate(config)}
    return {name: settings[ours] for ours, name in names.items()}


def fingerprint(config: TrainConfig, texts: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """The same for the same settings, model's name, captions, pictures, masks and start, in every process.

    The number of steps counts only where the learning rate depends on it: otherwise a run that has reached it goes
    on where it is raised. How many concepts share a pass changes nothing but how sums are rounded.
    """
    settings = saved_settings(config)
    del settings["concepts_at_once"]
    if config.schedule != "cosine":
        del settings["steps"]
    digest = hashlib.sha256(json.dumps([RECIPE, settings, list(texts)]).encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
