"""The only training loop."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from .adapters.protocol import DiffusionModel
from .config import TrainConfig
from .dataset import Batch, Dataset, fixed_batches, training_batches
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped
from .memory import make_room
from .objective import batch_loss, mean_loss
from .optimizers import make_optimizer
from .state import TrainState
from .vocabulary import Vocabulary

# Share by which the loss on fixed noise must fall to count: less is beneath what held-out pictures show.
PROGRESS = 0.01


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. The first one is the state before: of step 0, or of a saved one."""

    number: int
    loss: float
    """Loss on the random batch of this step, noisy; of step 0 the loss on fixed noise."""
    learning_rate: float
    fixed_loss: float | None
    """Loss on fixed noise, comparable between steps; None where it was not measured."""
    best: Embedding
    """The vectors with the lowest fixed loss so far."""
    best_number: int
    best_loss: float
    state: TrainState
    """All that is needed to go on from here. It changes with the next step."""


def train(
    model: DiffusionModel,
    embedding: Embedding,
    dataset: Dataset,
    config: TrainConfig,
    saved: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Learns v* = argmin E ||eps - eps_theta(z_t, t, c_theta(y))||^2 (arXiv 2208.01618, equation 2).

    Yields after every optimizer step and changes ``embedding`` (see ``Embedding.trainable``) in
    place; the model stays as it is. The caller decides what to show, keep and when to stop; by
    itself it ends after ``config.steps``, or when ``config.patience`` measurements brought no progress.

    ``saved`` is the ``TrainState.to_dict`` of an earlier run with the same pictures and settings:
    training goes on from it, on a CPU bit for bit as if it had never ended. The state of another
    model is left alone; the first step's number tells.

    Raises:
        UserError: a prompt of the dataset has no room for the words.
        TrainingError: no gradient reached the vectors, the very first loss is not finite, or memory ran out.
        TrainingStopped: loss or gradient became NaN, or memory ran out, later; the last step's ``best`` is good.
    """
    generator = torch.Generator().manual_seed(config.seed)
    batches = training_batches(dataset, config, generator)
    fixed = fixed_batches(dataset, config)
    contexts = context_words(model.vocabularies(), dataset, embedding, config)
    words = [embedding, *contexts]
    _check_prompts(model, embedding, contexts, dataset)
    optimizer = make_optimizer(embedding, contexts, config)
    make_room(model, words, fixed, config.batch_size)

    average = [word.snapshot() for word in words]
    loss = mean_loss(model, words, fixed)
    if not math.isfinite(loss):
        raise TrainingError(
            "The loss is not a number before the first step: this model or VAE overflows in its "
            "precision. Try a bf16 or fp32 model, or a VAE that works in fp16."
        )
    best = average[0].snapshot()
    at = TrainState(words, optimizer, average, best, loss_before=loss, loss=loss, best_loss=loss, mark=loss)
    fixed_loss = loss
    if saved and at.fits(saved):
        at.load(saved)
        for _ in range(at.number * config.accumulation):  # the random numbers of the steps that are done
            next(batches)
        fixed_loss = _measure(model, at, fixed, config)
    yield Step(at.number, at.loss, 0.0, fixed_loss, at.best, at.best_number, at.best_loss, at)

    while at.number < config.steps and not (config.patience and _idle(at, config) >= config.patience):
        drawn = list(islice(batches, config.accumulation))
        loss = _gradients(model, words, drawn, at.number + 1)
        _check_gradients(model, words, drawn[0], loss, at.number + 1)
        learning_rate = config.learning_rate * learning_rate_factor(at.number, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # From here to the measurement nothing may stop it: the state stays one to go on from.
        optimizer.step()
        optimizer.zero_grad()
        at.number, at.loss = at.number + 1, loss
        follow(average, words, min(config.averaging, 1 - 1 / at.number), config.optimizer == "sphere")
        fixed_loss = _measure(model, at, fixed, config)
        yield Step(at.number, loss, learning_rate, fixed_loss, at.best, at.best_number, at.best_loss, at)


def _measure(model: DiffusionModel, at: TrainState, fixed: Sequence[Batch], config: TrainConfig) -> float | None:
    """The loss of the running mean on fixed noise, where it is due and not known yet."""
    due = at.number % config.evaluate_every == 0 or at.number == config.steps
    if not due or at.measured == at.number:
        return None
    loss = mean_loss(model, at.average, fixed)
    at.measured = at.number
    if loss < at.best_loss:
        at.best, at.best_number, at.best_loss = at.average[0].snapshot(), at.number, loss
    if loss < at.mark * (1 - PROGRESS):
        at.mark, at.mark_number = loss, at.number
    return loss


def _idle(at: TrainState, config: TrainConfig) -> int:
    """Measurements since the last one that was a step forward."""
    return (at.number - at.mark_number) // config.evaluate_every


def context_words(
    vocabularies: Mapping[str, Vocabulary], dataset: Dataset, embedding: Embedding, config: TrainConfig
) -> list[Embedding]:
    """Trainable throw-away words, one a picture without a caption.

    What a picture alone shows lowers the loss through its own word as well, so that the shared word
    need not explain it. They start at the mean of the vocabulary, as long as the word's vectors.
    """
    start = {}
    for key, vocabulary in vocabularies.items():
        length = embedding.vectors[key].detach().norm(dim=1).mean()
        mean = vocabulary.mean().to(length)
        start[key] = (length * mean / mean.norm()).expand(config.context_vectors, -1)
    return [Embedding(trigger, start).trainable() for trigger in dataset.contexts if trigger]


def follow(average: Sequence[Embedding], words: Sequence[Embedding], share: float, keep_length: bool) -> None:
    """Moves the running mean of the vectors, ``share`` of which is the past, after the words.

    The mean of directions is shorter than each; ``keep_length`` makes it as long as the vectors.
    """
    for mean, word in zip(average, words, strict=True):
        for key, vectors in word.vectors.items():
            now = vectors.detach().to(mean.vectors[key])
            mean.vectors[key].lerp_(now, 1 - share)
            if keep_length:
                mean.vectors[key].mul_(now.norm(dim=1, keepdim=True) / mean.vectors[key].norm(dim=1, keepdim=True))


def learning_rate_factor(done: int, config: TrainConfig) -> float:
    """Factor on the learning rate after ``done`` steps: linear warm-up, then cosine to 0 or constant."""
    if done < config.warmup_steps:
        return (done + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (done - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _gradients(model: DiffusionModel, words: Sequence[Embedding], batches: Sequence[Batch], number: int) -> float:
    """The mean loss of ``batches``; its gradient is in the vectors. What runs out of memory is tried again once."""
    for _ in range(2):
        for vectors in (vectors for word in words for vectors in word.parameters()):
            vectors.grad = None
        try:
            return sum(_backward(model, words, batch, len(batches)) for batch in batches)
        except torch.OutOfMemoryError:
            if not model.recompute():
                break
    message = (
        f"Out of memory at step {number}, though activations are recomputed: make size smaller, or batch_size, "
        "for which accumulation (Textual Inversion Settings) makes up."
    )
    raise TrainingStopped(message) if number > 1 else TrainingError(message)


def _backward(model: DiffusionModel, words: Sequence[Embedding], batch: Batch, parts: int) -> float:
    """Adds the gradient of one of ``parts`` batches and returns its share of the loss.

    The gradient of a mean over many latents underflows in fp16 models. Scaled by the number of
    latents, it passes through them as the gradient of a sum.
    """
    scale = batch.latents[0].numel()
    loss = batch_loss(model, words, batch) / parts
    if not loss.requires_grad:  # cut off altogether: _check_gradients tells the user
        return loss.item()
    parameters = [vectors for word in words for vectors in word.parameters()]
    for vectors, gradient in zip(
        parameters, torch.autograd.grad(loss * scale, parameters, allow_unused=True), strict=True
    ):
        # A throw-away word that the batch does not name stays where it is.
        if gradient is not None and gradient.any():
            vectors.grad = gradient / scale + (0 if vectors.grad is None else vectors.grad)
    return loss.item()


def _check_prompts(model: DiffusionModel, embedding: Embedding, contexts: list[Embedding], dataset: Dataset) -> None:
    by_trigger = {word.trigger: word for word in contexts}
    for prompts, context in zip(dataset.prompts, dataset.contexts, strict=True):
        model.check_prompts(prompts, embedding, *([by_trigger[context]] if context else []))


def _check_gradients(model: DiffusionModel, words: Sequence[Embedding], batch: Batch, loss: float, number: int) -> None:
    gradients = {key: vectors.grad for key, vectors in words[0].vectors.items()}
    missing = [key for key, gradient in gradients.items() if gradient is None or not gradient.any()]
    # A model may ignore one of its encoders. One that it heeds, but without a gradient, is cut off.
    if number == 1 and missing and (len(missing) == len(gradients) or _heeds(model, words, batch, missing)):
        raise TrainingError(
            f"No gradient reached the vectors of {' and '.join(missing)}: the attention in use, "
            f"{model.attention_backend}, cuts it off. Use PyTorch's attention "
            "(ComfyUI: start with --use-pytorch-cross-attention, no attention nodes before the MODEL)."
        )
    finite = all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    if not (math.isfinite(loss) and finite):
        message = f"The loss became NaN at step {number}: lower the learning rate."
        raise TrainingStopped(message) if number > 1 else TrainingError(message)


@torch.no_grad()
def _heeds(model: DiffusionModel, words: Sequence[Embedding], batch: Batch, keys: Sequence[str]) -> bool:
    """Whether the loss changes with the word's vectors of these encoders."""
    turned = {key: -vectors if key in keys else vectors for key, vectors in words[0].vectors.items()}
    other = batch_loss(model, [replace(words[0], vectors=turned), *words[1:]], batch).item()
    return not math.isclose(batch_loss(model, words, batch).item(), other, rel_tol=1e-6)
