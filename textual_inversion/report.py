"""What was learned: a few lines of text for people, and the embedding with its metadata."""

import json
from dataclasses import asdict

import torch
import torch.nn.functional as F

from . import __version__
from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import Dataset
from .embedding import Embedding
from .optimizers import OPTIMIZERS, learning_rate
from .prompts import place_trigger
from .training import Step

# Prompts that training does not use, to see what the embedding does to the words beside it.
UNSEEN = ("{} on the beach", "{} in the snow at night", "a red {} wearing a hat", "a drawing of {} and a dog")
LENGTH_WARNING = 3.0  # times the length of a word's vector: longer vectors drown other words


def learned_embedding(step: Step, config: TrainConfig, base_model: str) -> Embedding:
    """The best vectors so far, with everything known about them as metadata. ``base_model`` is a file name."""
    metadata = {
        "base_model": base_model,
        "steps": str(step.best_step),
        "seed": str(config.seed),
        "settings": json.dumps(asdict(config) | {"learning_rate": learning_rate(config)}),
        "version": __version__,
    }
    return Embedding(step.best.trigger, step.best.vectors, metadata)


def report(
    model: TrainableModel,
    dataset: Dataset,
    config: TrainConfig,
    start: Embedding,
    last: Step,
    origin: str,
    ended: str = "",
) -> str:
    """Text for people about ``last.best``, trained from ``start``.

    ``origin`` is what people call ``start``; ``ended`` says why training ended before its last step,
    where the caller knows.
    """
    learned, initial_loss = last.best, last.progress.initial_loss
    if last.number < config.steps and not ended:
        ended = f"Stopped early: no improvement in {config.patience} evaluations."
    lines = [
        f"{config.trigger}: {learned.describe()}, learned from {len(dataset.latents)} pictures, "
        f"initialized from {origin}.",
        f"{last.number} steps of {config.batch_size * config.accumulation} pictures. {ended}",
        f"Loss on fixed noise: {initial_loss:.4f} before training, {last.best_loss:.4f} at step {last.best_step}, "
        f"which was kept: {1 - last.best_loss / initial_loss:.0%} lower than with {origin}.",
        f"Similarity of unseen prompts to those with {origin}: {1 - drift(model, start, learned):.0%}.",
    ]
    for key, vocabulary in model.vocabularies().items():
        vectors = learned.vectors[key]
        if last.best_step and torch.equal(vectors, start.vectors[key]):
            lines.append(f"{key} has no influence on this model's pictures: its vectors are still those of {origin}.")
            continue
        usual = vocabulary.word_length()
        length = vectors.norm(dim=1).mean().item()
        (nearest,) = vocabulary.nearest(vectors.mean(0, keepdim=True), 5)
        near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in nearest)
        lines.append(f"{key}: vector length {length:.2f}, words usually have {usual:.2f}; nearest words: {near}.")
        if length > LENGTH_WARNING * usual and not OPTIMIZERS[config.optimizer].keeps_length:
            lines.append("Vectors this long drown the other words of a prompt: use optimizer sphere.")
    return "\n".join(lines)


@torch.no_grad()
def drift(model: TrainableModel, start: Embedding, learned: Embedding) -> float:
    """How far ``learned`` moves the outputs of the text encoders away from those with ``start``: mean of 1 - cosine.

    Both have the same number of vectors, so every other token has the same place in the prompt.
    """
    prompts = [place_trigger(text, learned.trigger) for text in UNSEEN]
    before, after = (model.text_outputs(prompts, embedding) for embedding in (start, learned))
    cosines = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(before, after, strict=True)]
    return 1 - torch.stack(cosines).mean().item()
