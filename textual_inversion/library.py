"""Many concepts in one run. They share the passes through the network, and otherwise learn as in runs of their own."""

import logging
import re
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from .adapters.protocol import DiffusionModel, TrainableModel
from .config import TrainConfig
from .dataset import Dataset, check_captions, make_dataset
from .devices import is_out_of_memory
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped, UserError
from .formats import file_name
from .gradients import Share, compute_gradients
from .initializer import SearchProgress
from .memory import out_of_memory_explained, step_bytes
from .processes import ALONE, Processes
from .prompts import caption_prompt, check_trigger, has_trigger
from .training import Learner, Reply, Step, learn, next_of

MOST_AT_ONCE = 8
_BRACKETED = re.compile(r"<[^<>\s]+>")  # what people call a trigger word in captions

logger = logging.getLogger(__name__)


# What is to be learned --------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """One of the things that a run learns."""

    trigger: str
    images: list[Tensor]  # (1, H, W, 3 or 4) each
    masks: list[Tensor]  # (1, H, W) each, or none
    captions: list[str]  # one for each picture, one for all, or none
    beside: tuple[str, ...] = ()
    """Trigger words of other concepts that its captions name."""

    def dataset(self, model: DiffusionModel, config: TrainConfig) -> Dataset:
        return make_dataset(model.encode_images, self.images, self.masks, self.captions, config, model.native_size)


def by_concept(
    triggers: Sequence[str], images: Sequence[Tensor], masks: Sequence[Tensor], captions: Sequence[str], kind: str
) -> list[Concept]:
    """The concepts of pictures that belong to ``triggers``, one for each picture or one for all.

    A picture also teaches the other concepts that its caption names; its mask is for its own.
    Raises UserError where the numbers of pictures and triggers differ, or two words are too much alike.
    """
    words = list(dict.fromkeys(triggers))
    check_triggers(words)
    check_captions(captions)
    if len(words) == 1:
        return [Concept(words[0], list(images), list(masks), list(captions))]
    if len(captions) == 1:
        captions = list(captions) * len(images)
    given = {"trigger words": triggers, "masks": masks or images, "captions": captions or images}  # none are all right
    for what, values in given.items():
        if len(values) != len(images):
            raise UserError(
                f"There are {len(values)} {what} for {len(images)} pictures of several concepts: connect "
                "one for each picture, as Load Images gives them."
            )
    texts = list(captions) or [""] * len(images)
    # The caption of a picture as others read it: with the word of its own concept in place.
    whole = [caption_prompt(text, own, kind) if text.strip() else "" for text, own in zip(texts, triggers, strict=True)]
    return [_concept(word, words, triggers, images, masks, texts, whole) for word in words]


def _concept(
    word: str,
    words: Sequence[str],
    triggers: Sequence[str],
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    texts: Sequence[str],
    whole: Sequence[str],
) -> Concept:
    own = [number for number, trigger in enumerate(triggers) if trigger == word]
    named = [n for n, text in enumerate(whole) if triggers[n] != word and text and has_trigger(text, word)]
    kept_masks = []
    if masks:
        kept_masks = [masks[n] for n in own] + [masks[n].new_ones(masks[n].shape) for n in named]
    captions = [texts[n] for n in own] + [whole[n] for n in named]
    said = [whole[n] for n in own + named]
    beside = tuple(other for other in words if other != word and any(has_trigger(text, other) for text in said if text))
    return Concept(word, [images[n] for n in own + named], kept_masks, captions, beside)


def check_triggers(words: Sequence[str]) -> None:
    """Raises UserError for a word that is no trigger word, and for two that a prompt or a folder would mix up."""
    known: dict[str, str] = {}
    for word in words:
        check_trigger(word)
        for form in (word.casefold(), file_name(word).casefold()):
            other = known.setdefault(form, word)
            if other != word:
                raise UserError(
                    f"The concepts {other!r} and {word!r} would have the same word or the same file: rename one."
                )


def unknown_words(words: Sequence[str], captions: Sequence[str]) -> list[str]:
    """What captions name like a trigger word, ``<dog>``, although no concept is called so."""
    known = {word.casefold() for word in words}
    found = dict.fromkeys(name for caption in captions for name in _BRACKETED.findall(caption))
    return [name for name in found if name.casefold() not in known]


def linked(concepts: Sequence[Concept]) -> list[list[int]]:
    """The numbers of the concepts in groups: those that captions name together learn at the same time.

    What captions name beside these concepts links nothing.
    """
    numbers = {concept.trigger: number for number, concept in enumerate(concepts)}
    groups = [{number} for number in range(len(concepts))]
    for number, concept in enumerate(concepts):
        for other in concept.beside:
            if other not in numbers:  # it cannot be learned, or has been: see ``known`` of ``learn_together``
                continue
            one, two = groups[number], groups[numbers[other]]
            if one is not two:
                one |= two
                for member in two:
                    groups[member] = one
    return [sorted(group) for group in {id(group): group for group in groups}.values()]


# How it is learned ------------------------------------------------------------------------------


class ConceptRun(Protocol):
    """One concept of a run, for ``learn_together``."""

    concept: Concept
    dataset: Dataset

    @property
    def saved(self) -> dict[str, Any] | None:
        """The ``TrainState.to_dict`` of an unfinished run with the same pictures and settings."""
        ...

    def begin(self, resume: bool) -> tuple[Embedding, TrainConfig]:
        """The initial vectors, and the settings with the initializer that they come from; it may have to be searched.

        ``resume``: it is that of the ``saved`` run.
        """
        ...

    @property
    def searching(self) -> SearchProgress:
        """Told how far the search for words of the per-image tokens is."""
        ...


Run = TypeVar("Run", bound=ConceptRun)
News = tuple[Run, Step | Exception]


def learn_together(
    model: TrainableModel,
    runs: Sequence[Run],
    at_once: int = 0,
    processes: Processes = ALONE,
    known: Mapping[str, Embedding] | None = None,
    after_round: Callable[[list[Run]], None] = lambda learning: None,
) -> Generator[News[Run], Reply, None]:
    """Learns many concepts, ``at_once`` of them at a time: where one ends, the next begins.

    Yields each ``Step`` of each run, and takes what ``train`` takes. Each pass through the network holds the rows of
    as many concepts. 0: as many as memory has room for, at most 8; one after the other on a CPU. Where memory runs
    out, half as many. An error (UserError, TrainingError, TrainingStopped) of one concept is yielded in the place of
    its next step and ends only that one.

    ``known`` are the vectors of concepts that captions name and that have been learned before. ``after_round`` is
    called with the runs that go on whenever each of them has done its step: their last ``Step``s belong together.
    """
    waiting = iter(linked([run.concept for run in runs]))
    active: list[_Active[Run]] = []
    while True:
        while len(active) < max(1, at_once) and (numbers := next(waiting, None)) is not None:
            group, starts = [runs[number] for number in numbers], {}
            for run in group:
                one = _Active(run, _learner(model, run, group, starts, processes, known or {}))
                yield from one.advance(None)
                active += [one] if one.share else []
            if active and not at_once:
                at_once = processes.least(concepts_that_fit(model, active[0].share))
        if not active:
            return
        queue = list(active)
        while queue:
            chunk = queue[: max(1, at_once)]
            losses = _losses(model, chunk, processes)
            if losses is None:
                at_once = len(chunk) // 2
                logger.warning("Textual inversion: memory is short, so %d concepts learn at the same time.", at_once)
                continue
            queue = queue[len(chunk) :]
            for one, loss in zip(chunk, losses, strict=True):
                yield from one.advance(loss)
        active = [one for one in active if one.share]
        after_round([one.run for one in active])


@dataclass
class _Active(Generic[Run]):
    """A concept that learns now."""

    run: Run
    learner: Learner
    share: Share | None = None
    """What it needs next; None when it has ended."""

    def advance(self, reply: Reply | Exception) -> Generator[News[Run], Reply, None]:
        """Goes on with the loss of its share, or an error, to the next share or to the end."""
        self.share = None
        if isinstance(reply, Exception):
            yield self.run, reply
            return
        try:
            while isinstance(asked := next_of(self.learner, reply), Step):
                reply = yield self.run, asked
            self.share = asked
        except (UserError, TrainingError, TrainingStopped) as error:
            yield self.run, error


def _losses(
    model: TrainableModel, active: Sequence[_Active], processes: Processes
) -> Sequence[float | Exception] | None:
    """Computes the gradients of one pass; None where memory ran out and fewer concepts may do."""
    shares = [one.share for one in active if one.share]
    try:
        with out_of_memory_explained(shares[0].number) if len(shares) == 1 else nullcontext():
            return compute_gradients(model, *shares, processes=processes)
    except (TrainingError, TrainingStopped) as error:
        return [error] * len(shares)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the try that failed
        return None


def concepts_that_fit(model: TrainableModel, share: Share | None) -> int:
    """How many concepts like this one can learn at the same time. On a CPU a larger pass is not faster."""
    if share is None or model.device.type == "cpu":
        return 1
    batch = share.batches[0]
    one, two = (
        step_bytes(model, share.tokens.embeddings, [batch], concepts * len(batch.prompts)) for concepts in (1, 2)
    )
    more = (model.free_memory() - one) // max(1, two - one)
    return int(max(1, min(MOST_AT_ONCE, 1 + more)))


@dataclass
class _Start:
    embedding: Embedding
    config: TrainConfig
    average: Embedding
    """Of the embedding while it learns, for those that stand beside it."""

    @classmethod
    def of(cls, run: ConceptRun) -> "_Start | UserError | TrainingError":
        try:
            embedding, config = run.begin(resume=run.saved is not None)
        except (UserError, TrainingError) as error:
            return error
        return cls(embedding, config, embedding.snapshot())


def _learner(
    model: TrainableModel,
    run: ConceptRun,
    group: Sequence[ConceptRun],
    starts: dict[str, _Start | UserError | TrainingError],
    processes: Processes,
    known: Mapping[str, Embedding],
) -> Learner:
    """``learn`` for one of a group of concepts that learn at the same time; ``starts`` is theirs, empty at first."""
    if not starts:  # each is used beside the others, so all begin before one learns
        starts.update({member.concept.trigger: _Start.of(member) for member in group})
    start = starts[run.concept.trigger]
    if isinstance(start, Exception):
        raise start
    averages = {word: other.average for word, other in starts.items() if isinstance(other, _Start)}
    averages = {**known, **averages}  # one that cannot begin stays text in the captions of the others
    beside = [averages[word] for word in run.concept.beside if word in averages]

    def learner(saved: dict[str, Any] | None) -> Learner:
        embedding = start.embedding.trainable()
        return learn(
            model, embedding, run.dataset, start.config, saved, start.average, beside, run.searching, processes
        )

    learning = learner(run.saved)
    first = next_of(learning, None)
    if run.saved and isinstance(first, Step) and not first.number:
        # The saved run is of another model, for which another word may be the best.
        start.embedding, start.config = run.begin(resume=False)
        start.average.take_over(start.embedding)
        learning = learner(None)
        first = next_of(learning, None)
    assert first is not None
    reply: Reply = yield first
    while (asked := next_of(learning, reply)) is not None:
        reply = yield asked
