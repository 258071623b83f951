"""What was learned, in a few lines for people."""

import torch
import torch.nn.functional as F

from .adapters.protocol import DiffusionModel
from .config import TrainConfig
from .dataset import Dataset
from .embedding import Embedding
from .prompts import place_word
from .training import Step

# Prompts that training does not use, for what the word does to the words beside it.
UNSEEN = ("{} on the beach", "{} in the snow at night", "a red {} wearing a hat", "a drawing of {} and a dog")
LOUD = 3.0  # times the length of the vocabulary's words, from where a word drowns others


def report(
    model: DiffusionModel,
    dataset: Dataset,
    config: TrainConfig,
    start: Embedding,
    last: Step,
    origin: str,
    ended: str = "",
) -> str:
    """Text for people about ``last.best``, learned from ``start``. Call inside ``with model:``.

    ``origin`` is what people call ``start``; ``ended`` why training ended before its time, where
    the caller knows.
    """
    word, loss_before = last.best, last.state.loss_before
    if last.number < config.steps and not ended:
        ended = f"It ended by itself, since the loss falls no more ({config.patience} measurements)."
    lines = [
        f"{config.trigger}: {word.describe()}, learned from {len(dataset.latents)} pictures, starting at {origin}.",
        f"{last.number} steps of {config.batch_size * config.accumulation}. {ended}",
        f"Loss on fixed noise: {loss_before:.4f} before, {last.best_loss:.4f} at step {last.best_number}, "
        f"which is kept: {1 - last.best_loss / loss_before:.0%} less than with {origin}.",
        f"Unseen prompts read {1 - drift(model, start, word):.0%} like the same prompts with {origin}.",
    ]
    for key, vocabulary in model.vocabularies().items():
        vectors = word.vectors[key]
        if last.best_number and torch.equal(vectors, start.vectors[key]):
            lines.append(f"{key} changes nothing in this model's pictures: its vectors are those of {origin}.")
            continue
        usual = vocabulary.word_length()
        length = vectors.norm(dim=1).mean().item()
        near = ", ".join(f"{name} {cosine:.2f}" for name, cosine in vocabulary.nearest(vectors.mean(0), 5))
        lines.append(f"{key}: length {length:.2f}, words have {usual:.2f}; nearest: {near}.")
        if length > LOUD * usual and config.optimizer == "adamw":
            lines.append("That is loud enough to drown other words of a prompt: use optimizer sphere.")
    return "\n".join(lines)


@torch.no_grad()
def drift(model: DiffusionModel, start: Embedding, word: Embedding) -> float:
    """How far ``word`` turns the text encoders' outputs away from those with ``start``: 1 - cosine, mean.

    Both have the same number of vectors, so that every other token of a prompt has one place.
    """
    prompts = [place_word(text, word.trigger) for text in UNSEEN]
    with_start, with_word = (model.text_outputs(prompts, known) for known in (start, word))
    cosines = [F.cosine_similarity(*pair, dim=-1).mean() for pair in zip(with_start, with_word, strict=True)]
    return 1 - torch.stack(cosines).mean().item()
