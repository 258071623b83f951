"""What was learned: a few lines of text for people, and the embedding with its metadata."""

import json
from dataclasses import asdict

import torch
import torch.nn.functional as F

from . import __version__
from .adapters.protocol import TrainableModel
from .agreement import in_words
from .config import TrainConfig
from .dataset import Dataset
from .embedding import Embedding
from .evaluation import CERTAIN
from .optimizers import OPTIMIZERS, learning_rate
from .prompts import place_trigger
from .state import Progress
from .training import Step, finished, still_improving

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
    learned, progress = last.best, last.progress
    pictures = config.batch_size * config.accumulation
    lines = [
        f"{config.trigger}: {learned.describe()}, learned from {len(dataset.latents)} pictures, "
        f"initialized from {origin}.",
        f"{last.number} steps of {pictures} pictures. {ended or why_it_ended(progress, config)}",
        what_was_learned(progress, origin),
        f"Gradients at the start: {in_words(progress.agreement)} (agreement of two batches {progress.agreement:.2f}).",
        f"Similarity of unseen prompts to those with {origin}: {1 - drift(model, start, learned):.0%}.",
    ]
    if progress.skipped:
        lines.append(
            f"Skipped {progress.skipped} steps: their numbers overflowed in the model's precision. "
            "A bf16 or fp32 model has no such limit."
        )
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


def why_it_ended(progress: Progress, config: TrainConfig) -> str:
    if finished(progress, config):
        return "Ended: no measurable progress."
    if still_improving(progress, config):
        return "Ended at the upper bound, still improving: raise steps and run again to go on."
    return "Ended at the upper bound."


def what_was_learned(progress: Progress, origin: str) -> str:
    """How much better the pictures are explained by the embedding than by the initializer, or that it is not known."""
    gain, loss = progress.gain, progress.best_evaluation.loss
    share, error = (value / (loss + gain.mean) for value in (gain.mean, CERTAIN * gain.error))
    beside = f"Loss on fixed noise: {loss + gain.mean:.4f} with {origin}, {loss:.4f} with the vectors of step "
    beside += f"{progress.best_step}, which were kept: {share:.1%} (± {error:.1%}) lower."
    if gain.certain:
        return beside
    return f"Nothing was measurably learned. {beside} That may be chance."


@torch.no_grad()
def drift(model: TrainableModel, start: Embedding, learned: Embedding) -> float:
    """How far ``learned`` moves the outputs of the text encoders away from those with ``start``: mean of 1 - cosine.

    Both have the same number of vectors, so every other token has the same place in the prompt.
    """
    prompts = [place_trigger(text, learned.trigger) for text in UNSEEN]
    before, after = (model.text_outputs(prompts, embedding) for embedding in (start, learned))
    cosines = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(before, after, strict=True)]
    return 1 - torch.stack(cosines).mean().item()
