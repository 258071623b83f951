"""The only training loop."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import Batch, Dataset, fixed_batches, training_batches
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped
from .image_tokens import TrainedTokens, new_image_tokens
from .memory import enable_checkpointing_if_needed
from .objective import batch_loss, mean_loss
from .optimizers import OPTIMIZERS, learning_rate, make_optimizer
from .state import Progress, TrainState

# Improvements of the fixed loss by less than this share are ignored: held-out pictures do not show them.
IMPROVEMENT = 0.01


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. The first one is the state before training, or the resumed state."""

    progress: Progress
    learning_rate: float
    fixed_loss: float | None
    """Loss on fixed noise, comparable between steps; None where it was not evaluated."""
    state: TrainState
    """Everything needed to resume here. Unlike the rest it changes with the next step."""

    @property
    def number(self) -> int:
        return self.progress.step

    @property
    def loss(self) -> float:
        return self.progress.loss

    @property
    def best(self) -> Embedding:
        return self.progress.best

    @property
    def best_step(self) -> int:
        return self.progress.best_step

    @property
    def best_loss(self) -> float:
        return self.progress.best_loss


def train(
    model: TrainableModel,
    embedding: Embedding,
    dataset: Dataset,
    config: TrainConfig,
    saved: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Learns v* = argmin E ||eps - eps_theta(z_t, t, c_theta(y))||^2 (arXiv 2208.01618, equation 2).

    Yields after every optimizer step and changes ``embedding`` (see ``Embedding.trainable``) in
    place; the model is not changed. The caller decides what to show, what to keep and when to stop.
    By itself the loop ends after ``config.steps``, or after ``config.patience`` evaluations without
    an improvement.

    ``saved`` is the ``TrainState.to_dict`` of an earlier run with the same pictures and settings:
    training resumes there, on a CPU bit for bit. The state of another model is ignored; the number
    of the first step is then 0.

    Raises:
        UserError: a prompt of the dataset has no room for the vectors, or the optimizer ignores a changed setting.
        TrainingError: no gradient reached the vectors, the very first loss is not finite, or memory ran out.
        TrainingStopped: loss or gradient became NaN, or memory ran out, later; the last step's ``best`` is good.
    """
    generator = torch.Generator().manual_seed(config.seed)
    batches = training_batches(dataset, config, generator)
    fixed = fixed_batches(dataset, config)
    image_tokens = new_image_tokens(model.vocabularies(), dataset.image_triggers, embedding, config.per_image_tokens)
    tokens = TrainedTokens(embedding, image_tokens)
    _check_prompts(model, tokens, dataset)
    optimizer = make_optimizer(tokens, config)
    enable_checkpointing_if_needed(model, tokens.embeddings, fixed, config.batch_size)

    state = _initial_state(model, tokens, optimizer, fixed)
    fixed_loss = state.progress.initial_loss
    if saved and state.is_same_model(saved):
        state.resume(saved)
        for _ in range(state.progress.step * config.accumulation):  # the random numbers of the steps already done
            next(batches)
        fixed_loss = _evaluate_if_due(model, state, fixed, config)
    yield Step(state.progress, 0.0, fixed_loss, state)

    while state.progress.step < config.steps and not _out_of_patience(state.progress, config):
        number = state.progress.step + 1
        drawn = list(islice(batches, config.accumulation))
        loss = _compute_gradients(model, tokens, drawn, number)
        _check_gradients(model, tokens, drawn[0], loss, number)
        rate = learning_rate(config) * learning_rate_factor(number - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # No interruption point before the progress is set: a saved state must be consistent.
        optimizer.step()
        optimizer.zero_grad()
        # At first a plain mean, so that the start does not outweigh the steps.
        decay = min(config.averaging, 1 - 1 / number)
        update_ema(state.ema, tokens, decay, OPTIMIZERS[config.optimizer].keeps_length)
        state.progress = replace(state.progress, step=number, loss=loss)
        fixed_loss = _evaluate_if_due(model, state, fixed, config)
        yield Step(state.progress, rate, fixed_loss, state)


def _initial_state(
    model: TrainableModel, tokens: TrainedTokens, optimizer: torch.optim.Optimizer, fixed: Sequence[Batch]
) -> TrainState:
    ema = tokens.snapshot()
    loss = mean_loss(model, tokens.embeddings, fixed)
    if not math.isfinite(loss):
        raise TrainingError(
            "The loss is not a number before the first step: this model or VAE overflows in its "
            "precision. Try a bf16 or fp32 model, or a VAE that works in fp16."
        )
    return TrainState(tokens, optimizer, ema, Progress(loss, loss, ema.concept.snapshot(), loss, loss))


def _evaluate_if_due(
    model: TrainableModel, state: TrainState, fixed: Sequence[Batch], config: TrainConfig
) -> float | None:
    """The loss of the averaged vectors on fixed noise, where it is due and not known yet."""
    progress = state.progress
    due = progress.step % config.evaluate_every == 0 or progress.step == config.steps
    if not due or progress.evaluated_step == progress.step:
        return None
    loss = mean_loss(model, state.ema.embeddings, fixed)
    changes: dict[str, Any] = {"evaluated_step": progress.step}
    if loss < progress.best_loss:
        changes |= {"best": state.ema.concept.snapshot(), "best_step": progress.step, "best_loss": loss}
    if loss < progress.last_improved_loss * (1 - IMPROVEMENT):
        changes |= {"last_improved_loss": loss, "last_improved_step": progress.step}
    state.progress = replace(progress, **changes)
    return loss


def _out_of_patience(progress: Progress, config: TrainConfig) -> bool:
    evaluations_without_improvement = (progress.step - progress.last_improved_step) // config.evaluate_every
    return config.patience > 0 and evaluations_without_improvement >= config.patience


@torch.no_grad()
def update_ema(ema: TrainedTokens, tokens: TrainedTokens, decay: float, keep_length: bool) -> None:
    """Moves the averaged vectors towards the present ones.

    The mean of several directions is shorter than each; ``keep_length`` makes it as long as the vectors.
    """
    for averaged, embedding in zip(ema.embeddings, tokens.embeddings, strict=True):
        for key, vectors in embedding.vectors.items():
            mean = averaged.vectors[key]
            now = vectors.detach().to(mean)
            mean.lerp_(now, 1 - decay)
            if keep_length:
                mean.mul_(now.norm(dim=1, keepdim=True) / mean.norm(dim=1, keepdim=True))


def learning_rate_factor(done: int, config: TrainConfig) -> float:
    """Factor on the learning rate after ``done`` steps: linear warm-up, then cosine decay to 0, or constant."""
    if done < config.warmup_steps:
        return (done + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (done - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _compute_gradients(model: TrainableModel, tokens: TrainedTokens, batches: Sequence[Batch], number: int) -> float:
    """The mean loss of ``batches``; its gradient is in the vectors. On out-of-memory, retry once with checkpointing."""
    try:
        return _accumulate(model, tokens, batches)
    except torch.OutOfMemoryError:
        can_retry = model.enable_gradient_checkpointing()
    if can_retry:
        with suppress(torch.OutOfMemoryError):
            return _accumulate(model, tokens, batches)
    message = (
        f"Out of memory at step {number} even with gradient checkpointing. Reduce size, or reduce batch_size "
        "and raise accumulation (Textual Inversion Settings)."
    )
    raise TrainingStopped(message) if number > 1 else TrainingError(message)


def _accumulate(model: TrainableModel, tokens: TrainedTokens, batches: Sequence[Batch]) -> float:
    for vectors in tokens.parameters():
        vectors.grad = None
    return sum(_backward(model, tokens, batch, len(batches)) for batch in batches)


def _backward(model: TrainableModel, tokens: TrainedTokens, batch: Batch, parts: int) -> float:
    """Adds the gradient of one of ``parts`` batches and returns its share of the loss.

    The gradient of a mean over many latents underflows in fp16 models. Scaled by the number of
    latents, it passes through them as the gradient of a sum.
    """
    scale = batch.latents[0].numel()
    loss = batch_loss(model, tokens.embeddings, batch) / parts
    if not loss.requires_grad:  # cut off completely: _check_gradients tells the user
        return loss.item()
    parameters = tokens.parameters()
    gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    for vectors, gradient in zip(parameters, gradients, strict=True):
        # A per-image token that the batch does not name has no gradient of its own.
        if gradient is not None and gradient.any():
            vectors.grad = gradient / scale + (0 if vectors.grad is None else vectors.grad)
    return loss.item()


def _check_prompts(model: TrainableModel, tokens: TrainedTokens, dataset: Dataset) -> None:
    per_image = {embedding.trigger: embedding for embedding in tokens.per_image}
    for prompts, trigger in zip(dataset.prompts, dataset.image_triggers, strict=True):
        model.check_prompts(prompts, tokens.concept, *([per_image[trigger]] if trigger else []))


def _check_gradients(model: TrainableModel, tokens: TrainedTokens, batch: Batch, loss: float, number: int) -> None:
    gradients = {key: vectors.grad for key, vectors in tokens.concept.vectors.items()}
    missing = [key for key, gradient in gradients.items() if gradient is None or not gradient.any()]
    # A model may ignore one of its encoders. If the loss depends on it, its missing gradient was cut off.
    if number == 1 and missing and (len(missing) == len(gradients) or _loss_depends_on(missing, model, tokens, batch)):
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
def _loss_depends_on(keys: Sequence[str], model: TrainableModel, tokens: TrainedTokens, batch: Batch) -> bool:
    """Whether the loss changes if the concept's vectors of these text encoders are negated."""
    concept = tokens.concept
    negated = {key: -vectors if key in keys else vectors for key, vectors in concept.vectors.items()}
    other = replace(tokens, concept=replace(concept, vectors=negated))
    loss, loss_with_negated = (batch_loss(model, some.embeddings, batch).item() for some in (tokens, other))
    return not math.isclose(loss, loss_with_negated, rel_tol=1e-6)
