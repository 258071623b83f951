"""The training loop of one concept."""

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from .adapters.protocol import TrainableModel
from .agreement import Agreement
from .config import TrainConfig
from .dataset import Batch, Dataset, fixed_batches, training_batches, without_concept
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped
from .evaluation import Difference, Evaluator, fairest, flat, handing_over, well_known
from .gradients import Share, compute_gradients
from .image_tokens import SHARED_UPDATE_WEIGHT, TrainedTokens, new_image_tokens
from .initializer import SearchProgress, start_at_words, unseen
from .memory import enable_checkpointing_if_needed, out_of_memory_explained
from .objective import batch_loss
from .optimizers import OPTIMIZERS, learning_rate, make_optimizer
from .processes import ALONE, Processes
from .prompts import has_trigger
from .state import Progress, TrainState

# The default schedule, in steps and shares (docs/method.md).
DECAY_STEPS = 30  # the rate falls as 1 / sqrt(1 + steps / DECAY_STEPS)
AGREEMENT_POWER = 0.25  # and is multiplied by this power of the gradients' agreement
# The embedding would take in what the per-image tokens have yet to learn. So these start at words, and at first learn
# alone, from what shows the concept least; beside the embedding they go on.
HEAD_START = 60  # steps, divided by the root of the agreement
LEAST_HEAD_START = 120  # gradients also agree where the words fit badly and much is left to learn
HEAD_START_OF_STYLES = 30  # after more, the tokens know the style too: of its colours high noise levels show enough
HEAD_START_SHARE = 1 / 4  # of all steps, where they are few
RISE_OF_STYLES = 10  # steps after the head start in which the rate of a style rises, or the first ones may jump
IMAGE_TOKEN_RATE = 0.3  # of the learning rate
STEPS_WITH_WORDS = 160  # a shorter run would be over before they are found
WORD_BLOCKS = range(8, 10)  # of fixed batches, about 16 rows each: few evaluations have so many
AVERAGED_SHARE = 1 / 3  # of the run, its end

# Everything stands still for the first steps, in which it is measured how far gradients agree.
MEASURED_STEPS = 10
MEASURED_SHARE = 1 / 20  # of all steps, where they are few

# Steps after the head start before which training may not end by itself: where all gradients agree, otherwise divided
# by the root of the agreement; and where the evaluations are too noisy to tell whether there is progress.
STEPS_TO_TELL = 100
LEAST_AGREEMENT_TO_TELL = 0.04  # so 500 steps at most
MOST_STEPS_TO_TELL = 700
LEAST_AGREEMENT = 0.02  # lower estimates are mostly chance

MOST_SKIPPED = 8  # batches in a row whose loss or gradient is not a number


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


@dataclass(frozen=True)
class Choice:
    """Vectors of an earlier step that somebody chose, whatever their loss is."""

    step: int
    vectors: Embedding


Reply = float | bool | Choice | None  # what a `Learner` is sent
Learner = Generator[Share | Step, Reply, None]
"""One concept that learns (see ``learn``)."""
Item = TypeVar("Item")


def train(
    model: TrainableModel,
    embedding: Embedding,
    dataset: Dataset,
    config: TrainConfig,
    saved: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Generator[Step, bool | Choice | None, None]:
    """Learns v* = argmin E ||eps - eps_theta(z_t, t, c_theta(y))||^2 (arXiv 2208.01618, equation 2).

    Yields after every optimizer step and changes ``embedding`` (see ``Embedding.trainable``) in
    place; the model is not changed. The caller decides what to show, what to keep and when to stop:
    ``send(True)`` gives the last step, evaluated, so that nothing learned since the last evaluation is lost, and
    ``send(Choice(...))`` the last step with the chosen vectors as its best.
    By itself the loop ends when there is nothing more to learn (``finished``), or after ``config.steps``.

    ``saved`` is the ``TrainState.to_dict`` of an earlier run with the same pictures and settings:
    training resumes there, on a CPU bit for bit. The state of another model is ignored; the number
    of the first step is then 0. ``processes`` share the rows of every batch.

    Raises:
        UserError: a prompt of the dataset has no room for the vectors, or the optimizer ignores a changed setting.
        TrainingError: no gradient reached the vectors, the very first loss is not finite, or memory ran out.
        TrainingStopped: loss or gradient stayed NaN, or memory ran out, later; the last step's ``best`` is good.
    """
    learner = learn(model, embedding, dataset, config, saved, processes=processes)
    reply: Reply = None
    while (asked := next_of(learner, reply)) is not None:
        if isinstance(asked, Step):
            reply = yield asked
        else:
            with out_of_memory_explained(asked.number):
                (reply,) = compute_gradients(model, asked, processes=processes)


def next_of(generator: Generator[Item, Reply, None], reply: Reply) -> Item | None:
    """What ``generator`` yields after this reply; None when it has ended."""
    try:
        return generator.send(reply)
    except StopIteration:
        return None


def learn(
    model: TrainableModel,
    embedding: Embedding,
    dataset: Dataset,
    config: TrainConfig,
    saved: dict[str, Any] | None = None,
    average: Embedding | None = None,
    beside: Sequence[Embedding] = (),
    searching: SearchProgress = unseen,
    processes: Processes = ALONE,
) -> Learner:
    """One concept's part of training; the rest is as in ``train``.

    It yields a ``Share`` where it needs gradients and wants their loss sent back, so that several concepts can be
    computed in one pass (``library.learn_together``), and a ``Step`` after every optimizer step.

    ``average`` becomes the running mean of the embedding: whoever made it, a copy of ``embedding``, sees it change.
    ``beside`` are those of other concepts that the captions name. ``searching`` is told how far the search for words
    of the per-image tokens is.
    """
    generator = torch.Generator().manual_seed(config.seed)
    batches = training_batches(dataset, config, generator)
    tokens = _trained_tokens(model, embedding, dataset, config, beside)
    _check_prompts(model, tokens, dataset)
    optimizer = make_optimizer(tokens, config)
    evaluator = Evaluator(model, tokens, dataset, config, processes)
    with out_of_memory_explained(0):
        enable_checkpointing_if_needed(model, tokens.embeddings, evaluator.block(0), config.batch_size)
        state = _initial_state(tokens, average, optimizer, evaluator, config)
    if saved and state.is_same_model(saved):
        state.resume(saved)
        # The random numbers of the steps already done, and of those that were skipped.
        for _ in range((state.progress.step + state.progress.skipped) * config.accumulation):
            next(batches)
    fixed_loss = _evaluate_if_due(state, evaluator, config) if state.progress.step else state.progress.initial_loss
    stop = yield Step(state.progress, 0.0, fixed_loss, state)
    if tokens.per_image and config.steps >= STEPS_WITH_WORDS and not (state.progress.step or stop):
        fixed = itertools.chain(*(fixed_batches(dataset, config, block=number) for number in WORD_BLOCKS))
        rows = [without_concept(batch, config.kind) for batch in fixed]
        yield from start_at_words(model, tokens, rows, searching, processes)
        state.ema = replace(tokens.snapshot(), concept=state.ema.concept)

    share, unusable = Share(tokens), 0
    while not stop and state.progress.step < config.steps and not finished(state.progress, config):
        number = share.number = state.progress.step + 1
        share.batches = list(itertools.islice(batches, config.accumulation))
        if _measured_steps(config) < number <= state.progress.began:
            share.batches = [without_concept(batch, config.kind) for batch in share.batches]
        loss = yield share
        assert isinstance(loss, float)
        if not (math.isfinite(loss) and share.finite):
            unusable += 1
            _check_skipped(unusable, number)
            state.progress = replace(state.progress, skipped=state.progress.skipped + 1)
            continue
        unusable = 0
        if number == 1:
            _check_gradients(model, tokens, share.batches[0])
        _measure_agreement(state, config)
        rate = _set_rates(optimizer, state, config)
        # No interruption point before the progress is set: a saved state must be consistent.
        optimizer.step()
        optimizer.zero_grad()
        _update_averages(state, number, config)
        state.progress = replace(state.progress, step=number, loss=loss)
        with out_of_memory_explained(number):
            fixed_loss = _evaluate_if_due(state, evaluator, config)
        stop = yield Step(state.progress, rate, fixed_loss, state)

    if stop:
        known = state.progress.evaluated_step == state.progress.step
        with out_of_memory_explained(state.progress.step):
            if isinstance(stop, Choice):
                fixed_loss = _keep(stop, state, evaluator)
            else:
                fixed_loss = None if known else _evaluate(state, evaluator)
        yield Step(state.progress, 0.0, fixed_loss, state)


def finished(progress: Progress, config: TrainConfig) -> bool:
    """Whether there is nothing more to learn: no progress in ``patience`` evaluations and steps enough to see it."""
    return 0 < config.patience <= progress.flat and progress.step >= earliest_end(progress, config)


def still_improving(progress: Progress, config: TrainConfig) -> bool:
    """Whether training ended only because it reached ``steps``, and would go on with more: cosine has come to 0."""
    improving = config.patience > 0 and progress.flat == 0
    return improving and progress.step >= config.steps and config.schedule != "cosine"


def earliest_end(progress: Progress, config: TrainConfig) -> int:
    """The step after which training may end by itself, as far as it is known now: later while it is improving.

    Not before 700 steps after the head start while evaluations are too noisy to tell.
    """
    if config.patience == 0:
        return config.steps
    enough = STEPS_TO_TELL / math.sqrt(max(progress.agreement, LEAST_AGREEMENT_TO_TELL))
    if progress.flat and not well_known(progress.evaluations, progress.began):
        enough = max(enough, MOST_STEPS_TO_TELL)
    return min(config.steps, max(progress.step, progress.began + math.ceil(enough)))


def _initial_state(
    tokens: TrainedTokens,
    average: Embedding | None,
    optimizer: torch.optim.Optimizer,
    evaluator: Evaluator,
    config: TrainConfig,
) -> TrainState:
    ema = tokens.snapshot()
    if average is not None:
        ema = replace(ema, concept=average)
    first = evaluator.evaluate(0, ema, ())
    if not first.learned.isfinite().all():
        raise TrainingError(
            "The loss is not a number before the first step: this model or VAE overflows in its "
            "precision. Try a bf16 or fp32 model, or a VAE that works in fp16."
        )
    began = _head_start(1.0, config) if tokens.per_image else 0
    progress = Progress(first.loss, ema.concept.snapshot(), (first,), began)
    return TrainState(tokens, optimizer, ema, Agreement(), progress)


def _head_start(agreement: float, config: TrainConfig) -> int:
    """Steps in which only the per-image tokens learn."""
    long = max(LEAST_HEAD_START, HEAD_START / math.sqrt(max(agreement, LEAST_AGREEMENT)))
    return int(min(HEAD_START_OF_STYLES if config.kind == "style" else long, config.steps * HEAD_START_SHARE))


def _evaluate_if_due(state: TrainState, evaluator: Evaluator, config: TrainConfig) -> float | None:
    step, began = state.progress.step, state.progress.began
    apart = step - state.progress.evaluated_step
    due = step > began and apart >= evaluator.steps_apart(step)
    return _evaluate(state, evaluator) if apart and (due or step == began or step >= config.steps) else None


def _evaluate(state: TrainState, evaluator: Evaluator) -> float:
    """The fixed loss of the averaged vectors. Decides what is kept, and ends the head start of the per-image tokens."""
    progress, ema = state.progress, state.ema
    last = evaluator.evaluate(progress.step, ema, progress.evaluations)
    progress = replace(progress, evaluations=(*progress.evaluations, last))
    # A running mean gets better with every step, so the latest one is kept unless it is surely worse than the
    # one before or than the initializer, or has taken in what the per-image tokens knew.
    learning = progress.step > progress.began
    worse = Difference.of(last.learned, progress.best_evaluation.learned).certain
    worse = worse or (learning and handing_over(progress.evaluations, progress.began))
    useless = Difference.of(last.learned, fairest(progress.evaluations, last).initial).certain
    if not (worse or useless):
        progress = replace(progress, best=ema.concept.snapshot(), best_step=last.step)
    if learning:
        is_flat = worse or flat(progress.evaluations, progress.began)
        progress = replace(progress, flat=progress.flat + 1 if is_flat else 0)
    elif progress.step == progress.began:
        state.begin()
    state.progress = progress
    return last.loss


def _keep(choice: Choice, state: TrainState, evaluator: Evaluator) -> float:
    """Makes the chosen vectors the best ones, and returns their fixed loss beside the per-image tokens of now."""
    first, *later = state.progress.evaluations  # the first one stays: it tells whether the model is still the same
    others = (first, *(evaluation for evaluation in later if evaluation.step != choice.step))
    tokens = replace(state.ema, concept=choice.vectors)
    chosen = evaluator.evaluate(choice.step, tokens, others)
    state.progress = replace(state.progress, evaluations=(*others, chosen), best=choice.vectors, best_step=choice.step)
    return chosen.loss


def _measure_agreement(state: TrainState, config: TrainConfig) -> None:
    """Adds the concept's gradients, those of the head start left out: they are of edges or of high noise levels.

    How far the first ones agree, while it stands still, is what the run tells, and decides how long per-image tokens
    learn alone.
    """
    progress, concept = state.progress, state.tokens.concept
    if progress.step < MEASURED_STEPS or progress.step >= progress.began:
        state.agreement.add([vectors.grad for vectors in concept.parameters() if vectors.grad is not None])
    if progress.step < MEASURED_STEPS:
        state.progress = replace(progress, agreement=state.agreement.value)
    elif progress.step == MEASURED_STEPS < progress.began:
        state.progress = replace(progress, began=_head_start(progress.agreement, config))


def _measured_steps(config: TrainConfig) -> int:
    """Only the automatic schedule has them: cosine and constant rates are the chosen ones from the first step."""
    return int(min(MEASURED_STEPS, config.steps * MEASURED_SHARE)) if config.schedule == "automatic" else 0


def _set_rates(optimizer: torch.optim.Optimizer, state: TrainState, config: TrainConfig) -> float:
    """Sets the learning rates of the next step and returns the embedding's."""
    agreement, highest = max(state.agreement.value, LEAST_AGREEMENT), learning_rate(config)
    done, still = state.progress.step, _measured_steps(config)
    begins = max(still, state.progress.began)
    concept, *per_image = optimizer.param_groups
    concept["lr"] = 0.0
    if done >= begins:
        rises = config.kind == "style" and state.progress.began
        risen = min(1.0, (done - begins + 1) / RISE_OF_STYLES) if rises else 1.0
        concept["lr"] = highest * risen * learning_rate_factor(done, begins, agreement, config)
    concept["agreement"] = agreement
    # Where a batch shows few of many pictures, the tokens of the others follow those that it shows.
    pictures, shown = max(1, len(state.tokens.per_image)), config.batch_size * config.accumulation
    for group in per_image:
        factor = IMAGE_TOKEN_RATE * learning_rate_factor(done, still, 1.0, config)
        group["lr"] = highest * factor if done >= still else 0.0
        group["shared_update_weight"] = SHARED_UPDATE_WEIGHT * max(0.0, 1 - shown / pictures)
    return concept["lr"]


def _update_averages(state: TrainState, number: int, config: TrainConfig) -> None:
    """Moves every running mean; the embedding's begins where the embedding does."""
    keeps_length = OPTIMIZERS[config.optimizer].keeps_length
    parts = ((state.ema.concept, state.tokens.concept, max(1, number - state.progress.began)),)
    parts += tuple((mean, now, number) for mean, now in zip(state.ema.per_image, state.tokens.per_image, strict=True))
    for mean, now, steps in parts:
        weight = max(1 - config.averaging, 1 / (1 + AVERAGED_SHARE * (steps - 1)))
        update_ema(mean, now, 1 - weight, keeps_length)


@torch.no_grad()
def update_ema(ema: Embedding, embedding: Embedding, decay: float, keep_length: bool) -> None:
    """Moves the averaged vectors ``ema`` towards the present ones.

    The mean of several directions is shorter than each; ``keep_length`` makes it as long as the vectors.
    """
    for key, vectors in embedding.vectors.items():
        mean = ema.vectors[key]
        now = vectors.detach().to(mean)
        mean.lerp_(now, 1 - decay)
        if keep_length:
            mean.mul_(now.norm(dim=1, keepdim=True) / mean.norm(dim=1, keepdim=True))


def learning_rate_factor(done: int, began: int, agreement: float, config: TrainConfig) -> float:
    """Factor on the learning rate after ``done`` steps, for vectors that began to move after step ``began``.

    A linear warm-up, and cosine decay to 0 at the last step, or constant, or automatic: the square root of Ivgi et
    al. 2023 (DoG, arXiv 2302.12022), whose rate is a distance divided by sqrt(sum |g|^2), here with gradients of
    length 1 and a distance of about one radian.
    """
    warm_up = min(1.0, (done - began + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warm_up
    if config.schedule == "automatic":
        return warm_up * agreement**AGREEMENT_POWER / math.sqrt(1 + (done - began) / DECAY_STEPS)
    progress = max(0, done - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_prompts(model: TrainableModel, embedding: Embedding, dataset: Dataset, config: TrainConfig) -> None:
    """Raises UserError for a prompt of the dataset that has no room for the vectors of ``embedding``."""
    _check_prompts(model, _trained_tokens(model, embedding, dataset, config), dataset)


def _trained_tokens(
    model: TrainableModel,
    embedding: Embedding,
    dataset: Dataset,
    config: TrainConfig,
    beside: Sequence[Embedding] = (),
) -> TrainedTokens:
    image_tokens = new_image_tokens(model.vocabularies(), dataset.image_triggers, embedding, config.per_image_tokens)
    return TrainedTokens(embedding, image_tokens, tuple(beside))


def _check_prompts(model: TrainableModel, tokens: TrainedTokens, dataset: Dataset) -> None:
    images = tokens.per_image[:1]  # all of them take the same room, so the prompts of one stand for those of all
    checked = {
        prompt.replace(trigger, images[0].trigger) if trigger else prompt: images if trigger else ()
        for prompts, trigger in zip(dataset.prompts, dataset.image_triggers, strict=True)
        for prompt in prompts
    }
    for prompt, image in checked.items():
        beside = [other for other in tokens.beside if has_trigger(prompt, other.trigger)]
        model.check_prompts([prompt], tokens.concept, *image, *beside)


def _check_gradients(model: TrainableModel, tokens: TrainedTokens, batch: Batch) -> None:
    gradients = {key: vectors.grad for key, vectors in tokens.concept.vectors.items()}
    missing = [key for key, gradient in gradients.items() if gradient is None or not gradient.any()]
    # A model may ignore one of its encoders. If the loss depends on it, its missing gradient was cut off.
    if missing and (len(missing) == len(gradients) or _loss_depends_on(missing, model, tokens, batch)):
        raise TrainingError(
            f"No gradient reached the vectors of {' and '.join(missing)}: the attention in use, "
            f"{model.attention_backend}, cuts it off. Use PyTorch's attention "
            "(ComfyUI: start with --use-pytorch-cross-attention, no attention nodes before the MODEL)."
        )


def _check_skipped(in_a_row: int, number: int) -> None:
    if in_a_row == MOST_SKIPPED:
        message = (
            f"The loss became NaN at step {number}, and stayed so on {in_a_row} batches in a row: lower the learning "
            "rate, or use a bf16 or fp32 model."
        )
        raise TrainingStopped(message) if number > 1 else TrainingError(message)


@torch.no_grad()
def _loss_depends_on(keys: Sequence[str], model: TrainableModel, tokens: TrainedTokens, batch: Batch) -> bool:
    """Whether the loss changes if the concept's vectors of these text encoders are negated."""
    concept = tokens.concept
    negated = {key: -vectors if key in keys else vectors for key, vectors in concept.vectors.items()}
    other = replace(tokens, concept=replace(concept, vectors=negated))
    loss, loss_with_negated = (batch_loss(model, some.embeddings, batch).item() for some in (tokens, other))
    return not math.isclose(loss, loss_with_negated, rel_tol=1e-6)
