"""What was learned: a few lines of text for people, and the embedding with its metadata."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F

from . import __version__
from .adapters.protocol import TrainableModel
from .agreement import in_words
from .config import TrainConfig
from .dataset import MOST_NAMED, Dataset
from .embedding import Embedding
from .evaluation import CERTAIN
from .optimizers import OPTIMIZERS, learning_rate
from .pictures import LeftOut
from .prompts import place_trigger
from .state import Progress
from .training import Step, earliest_end

# Prompts that training does not use, to see what the embedding does to the words beside it.
UNSEEN = ("{} on the beach", "{} in the snow at night", "a red {} wearing a hat", "a drawing of {} and a dog")
GOOD = 0.9  # of the outputs for those prompts stay as they are with the initializer
LENGTH_WARNING = 3.0  # times the length of a word's vector: longer vectors drown other words
MOST_STEPS = 100_000
VERY_SMALL, VERY_LARGE = 0.1, 2.5  # times the usual learning rate: it decides what comes out


def learned_embedding(step: Step, config: TrainConfig, base_model: str) -> Embedding:
    """The best vectors so far, with everything known about them as metadata. ``base_model`` is a file name."""
    return described(step.best, step.best_step, config, base_model)


def described(vectors: Embedding, step: int, config: TrainConfig, base_model: str) -> Embedding:
    """The vectors of a step, with everything known about them as metadata."""
    metadata = {
        "base_model": base_model,
        "steps": str(step),
        "seed": str(config.seed),
        "settings": json.dumps(asdict(config) | {"learning_rate": learning_rate(config)}),
        "version": __version__,
    }
    return Embedding(vectors.trigger, vectors.vectors, metadata)


def report(
    model: TrainableModel,
    dataset: Dataset,
    config: TrainConfig,
    start: Embedding,
    last: Step,
    origin: str,
    ended: str = "",
    left_out: Sequence[LeftOut] = (),
) -> str:
    """Text for people about ``last.best``, trained from ``start``.

    ``origin`` is what people call ``start``; ``ended`` says what ended training, where the caller knows;
    ``left_out`` are files beside the pictures that were not used.
    """
    learned, progress = last.best, last.progress
    pictures = config.batch_size * config.accumulation
    steps = f"{last.number} steps of {pictures} picture{'s' if pictures > 1 else ''}"
    unaffected = 1 - drift(model, start, learned)
    lines = [
        f"{config.trigger}: {learned.describe()}, learned from {pictures_used(dataset)}, initialized from {origin}.",
        *_left_out(left_out),
        f"{steps}. {ended or how_it_ended(progress, config)}",
        what_was_learned(progress, origin),
        f"Good for prompts: {unaffected:.0%} unaffected by the word ({GOOD:.0%} and more is good).",
    ]
    if last.number > 1:  # of one gradient nothing is known
        agreement = progress.agreement
        lines.append(f"The pictures agree on what to learn: {in_words(agreement)} ({agreement:.2f}).")
    if rate := unusual_rate(config):
        lines.append(rate)
    if progress.skipped:
        lines.append(
            f"Skipped {progress.skipped} steps: their numbers overflowed in the model's precision. "
            "A bf16 or fp32 model has no such limit."
        )
    lines += [line for key in learned.vectors if (line := about_vectors(key, model, config, start, last, origin))]
    if advice := what_to_try(progress, config, unaffected):
        lines.append(f"Try next: {advice}")
    return "\n".join(lines)


def pictures_used(dataset: Dataset) -> str:
    """How many pictures there are, and what belongs to them: ``5 pictures (3 with captions, all with masks)``."""
    pictures = len(dataset.latents)
    shares = {"captions": dataset.captions, "masks": len(dataset.masks)}
    found = [
        f"{'all' if count == pictures else count or 'none'} with {what}"
        for what, count in shares.items()
        if count or what == "captions"
    ]
    if dataset.scaled_down:
        scaled = "all" if dataset.scaled_down == pictures else dataset.scaled_down
        found.append(f"{scaled} scaled down to the model's {dataset.native_size} x {dataset.native_size}")
    return f"{pictures} picture{'s' if pictures > 1 else ''} ({', '.join(found)})"


def _left_out(files: Sequence[LeftOut]) -> list[str]:
    lines = [f"Left out {name}: {reason}." for name, reason in files[:MOST_NAMED]]
    return lines + ([f"Left out {len(files) - MOST_NAMED} more files."] if len(files) > MOST_NAMED else [])


def how_it_ended(progress: Progress, config: TrainConfig, waits: bool = False) -> str:
    """What ended a run that nobody stopped, and whether more steps would help.

    ``waits``: with more steps the same run goes on from here.
    """
    if progress.step < config.steps:
        return "Ended by itself: the last steps brought nothing measurable, and more would hardly help."
    if waits and progress.step > progress.began:
        return "Ended at the upper bound, still improving: raise steps and run again to go on."
    return f"Ended at the upper bound. {more_steps(progress, config)}"


def more_steps(progress: Progress, config: TrainConfig) -> str:
    """Whether more steps would have helped a run that ended here."""
    if progress.step <= progress.began > 0:
        return "It ended before the word began to learn: more steps would help."
    if _too_early(progress, config):
        return "It was too early to tell whether more steps would help."
    if progress.flat == 0:
        return "It was still improving: more steps would help."
    return "The last steps brought nothing measurable: more would hardly help."


def _too_early(progress: Progress, config: TrainConfig) -> bool:
    """Where training may end by itself there is enough to tell."""
    endless = replace(config, steps=MOST_STEPS, patience=max(1, config.patience))
    return progress.step < earliest_end(progress, endless)


def what_was_learned(progress: Progress, origin: str) -> str:
    """How much better the pictures are explained by the embedding than by the initializer, or that it is not known."""
    gain, loss = progress.gain, progress.best_evaluation.loss
    share, error = _share(progress)
    numbers = f"loss on fixed noise {loss + gain.mean:.4f} and {loss:.4f}"
    if gain.certain:
        return f"Learned: {in_short(progress, origin)} ({numbers}). Kept: step {progress.best_step}."
    return (
        f"Nothing was measurably learned: the word explains the pictures no better than {origin} does, beyond chance "
        f"({share:.1%} ± {error:.1%}; {numbers}). Kept: step {progress.best_step}."
    )


def in_short(progress: Progress, origin: str) -> str:
    """The same in a few words."""
    share, error = _share(progress)
    if progress.gain.certain:
        return f"explains the pictures {share:.1%} (± {error:.1%}) better than {origin}"
    return "nothing was measurably learned"


def _share(progress: Progress) -> tuple[float, float]:
    """The share of the initializer's loss that the embedding removes, and how far it may be off."""
    gain, loss = progress.gain, progress.best_evaluation.loss
    share, error = (value / (loss + gain.mean) for value in (gain.mean, CERTAIN * gain.error))
    return share, error


def unusual_rate(config: TrainConfig) -> str:
    """The learning rate's part in the result, where somebody has chosen one far from the optimizer's own."""
    usual, chosen = learning_rate(replace(config, learning_rate=0.0)), learning_rate(config)
    if chosen <= VERY_SMALL * usual:
        return f"The learning rate {chosen:g} is very small (usual: {usual:g}): little can be learned in few steps."
    if chosen >= VERY_LARGE * usual:
        return f"The learning rate {chosen:g} is very large (usual: {usual:g}): pictures may turn to noise."
    return ""


def about_vectors(
    key: str, model: TrainableModel, config: TrainConfig, start: Embedding, last: Step, origin: str
) -> str:
    """The words nearest to the vectors of text encoder ``key``, and whether they drown others or have no influence."""
    vectors, vocabulary = last.best.vectors[key], model.vocabularies()[key]
    still = [encoder for encoder, rows in last.best.vectors.items() if torch.equal(rows, start.vectors[encoder])]
    if key in still and len(still) < len(start.vectors):  # at first all of them stand still
        return f"{key} has no influence on this model's pictures: its vectors are still those of {origin}."
    (nearest,) = vocabulary.nearest(vectors.mean(0, keepdim=True), 5)
    text = f"Nearest words of {key}: {', '.join(f'{word} {cosine:.2f}' for word, cosine in nearest)}."
    length, usual = vectors.norm(dim=1).mean().item(), vocabulary.word_length()
    if length > LENGTH_WARNING * usual and not OPTIMIZERS[config.optimizer].keeps_length:
        text += f" Its vectors are {length / usual:.0f} times as long as a word's and drown others: use sphere."
    return text


def what_to_try(progress: Progress, config: TrainConfig, unaffected: float) -> str:
    """The one change that is most likely to make the word better; empty where nothing asks for one."""
    if not progress.gain.certain and config.learning_rate and unusual_rate(config):
        return "learning_rate 0 (Settings), which chooses the usual one."
    if not progress.gain.certain and _too_early(progress, config):
        return "more steps, since this run was too short to tell."
    if not progress.gain.certain:
        return "captions with {} where the thing is named, another initializer, or pictures that have more in common."
    if unaffected < GOOD:
        return "fewer vectors, a higher editability, or captions: the word pushes other words of a prompt aside."
    return ""


@torch.no_grad()
def drift(model: TrainableModel, start: Embedding, learned: Embedding) -> float:
    """How far ``learned`` moves the outputs of the text encoders away from those with ``start``: mean of 1 - cosine.

    Both have the same number of vectors, so every other token has the same place in the prompt.
    """
    prompts = [place_trigger(text, learned.trigger) for text in UNSEEN]
    before, after = (model.text_outputs(prompts, embedding) for embedding in (start, learned))
    cosines = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(before, after, strict=True)]
    return 1 - torch.stack(cosines).mean().item()
