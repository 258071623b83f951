"""``python -m textual_inversion train``: one word or a library of words, in one process or in many."""

import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tqdm import tqdm

from . import formats
from .adapters.protocol import TrainableModel
from .concept_folders import concepts_inside, load_concepts
from .config import TrainConfig
from .console import print_files, say, target
from .dataset import Dataset
from .embedding import Embedding
from .errors import TrainingStopped, UserError, listed
from .formats import FormatName
from .initializer import with_initializer
from .library import Concept, by_concept, learn_together, linked, unknown_words
from .optimizers import check_settings
from .processes import ALONE, Processes
from .prompts import check_trigger, usable_trigger
from .report import learned_embedding, more_steps, report
from .state import fingerprint
from .training import Reply, Step, check_prompts, earliest_end, next_of
from .unfinished import Entry, Unfinished, UnfinishedFiles
from .vocabulary import initial_embedding

if TYPE_CHECKING:
    from .adapters.diffusers_pipeline import DiffusersModel

# Of all families. Pictures are read before the model, and kept at less than four times this a side: the largest
# take 268 MB each.
LARGEST_NATIVE_SIZE = 1024
SAVE_EVERY = 10  # steps between writes of what is needed to go on
INTERRUPTED = "Interrupted at step {}."
Existing = Literal["skip", "replace"]


# What is asked for ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What the command line says."""

    load: "Callable[[], DiffusersModel]"
    base_model: str
    """File name of the model, for the metadata."""
    images: Path
    settings: TrainConfig
    output: Path | None
    format: FormatName
    existing: Existing


@dataclass(eq=False)
class Planned:
    """A concept of the pictures, before the model is there."""

    concept: Concept
    config: TrainConfig
    name: str
    """Of its file."""
    fingerprint: str
    saved: Entry | None = None
    is_done: bool = False

    def forget_pictures(self) -> None:
        """A library is large, and what is learned needs latents only."""
        self.concept = replace(self.concept, images=[], masks=[])


@dataclass(frozen=True)
class Plan:
    """What is to be learned, and where it goes."""

    is_library: bool
    folder: Path
    words: list[Planned]
    files: UnfinishedFiles

    @property
    def waiting(self) -> list[Planned]:
        return [word for word in self.words if not word.is_done]


def make_plan(order: Order, together: Processes, tell: Callable[[str], None]) -> Plan:
    """Reads the pictures, and looks for what has been learned of them. Raises UserError."""
    library, settings = bool(concepts_inside(order.images)), order.settings
    if library:
        if settings.trigger != TrainConfig.trigger:
            raise UserError("The words of a library are the names of its folders: leave out --trigger, or rename them.")
        label = usable_trigger(order.images.resolve().name)
        folder, run_name = order.output or Path(f"{label}-embeddings"), f"{label}-library"
        if order.images.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"{folder} is in the library, where folders are concepts: choose another --output.")
    else:
        check_trigger(settings.trigger)
        folder, run_name = target(order.output, settings.trigger)
        if order.existing != "skip":
            raise UserError("--existing is for a library: the file of a single word is never replaced.")
    enough = settings.size or LARGEST_NATIVE_SIZE
    (images, masks, captions, left_out), triggers = load_concepts(order.images, 0, enough=enough)
    for file in left_out:
        tell(f"Left out {file.name}: {file.reason}.")
    concepts = by_concept(triggers if library else [settings.trigger], images, masks, captions, settings.kind)
    if unknown := unknown_words([concept.trigger for concept in concepts], captions):
        tell(f"Captions name {listed(unknown)}, which no concept is called: that is read as ordinary text.")
    words = []
    for concept in concepts:
        config = replace(settings, trigger=concept.trigger)
        texts = [order.base_model, *concept.captions, *concept.beside]
        known_by = fingerprint(config, texts, [*concept.images, *concept.masks])
        words.append(Planned(concept, config, formats.file_name(concept.trigger) if library else run_name, known_by))
    if len({tuple(prints) for prints in together.gather([word.fingerprint for word in words])}) > 1:
        raise UserError(f"The processes see different pictures in {order.images}: put them where all can read them.")
    fingerprints = {word.concept.trigger: word.fingerprint for word in words}
    files = UnfinishedFiles(folder, run_name, together.rank, fingerprints)
    _look_for_earlier(words, folder, files, order.existing if library else None, together, tell)
    if library:
        _check_in_front([word.name for word in words if not word.is_done], folder, order.format, together)
    return Plan(library, folder, words, files)


def _look_for_earlier(
    words: Sequence[Planned],
    folder: Path,
    files: UnfinishedFiles,
    existing: Existing | None,
    together: Processes,
    tell: Callable[[str], None],
) -> None:
    """Marks what is there already, and finds what an unfinished run has left. A machine may see only its own files."""
    earlier = Unfinished.merged(together.gather(files.read()), files.fingerprints)
    if together.rank == 0:
        files.sweep()
    seen = together.gather([word.name for word in words if existing and formats.is_written(folder, word.name)])
    there = {name for names in seen for name in names}
    for word in words:
        trigger = word.concept.trigger
        is_new = earlier.done.get(trigger) == word.fingerprint  # of this very run
        word.is_done = word.name in there and (existing == "skip" or is_new)
        word.saved = earlier.concepts.get(trigger)
        if word.is_done and word.saved and not word.saved["ended"]:  # of a run before the one that wrote its file
            word.saved = None
        if word.saved and word.saved["fingerprint"] != word.fingerprint:
            word.saved = None
            if not word.is_done:
                changed = "settings, pictures, captions or the model changed since its unfinished run"
                tell(f"{trigger} starts over: {changed}.")
    if done := [word.concept.trigger for word in words if word.is_done]:
        tell(f"Already in {folder}: {listed(done)}. To learn them again: --existing replace.")


def _check_in_front(names: Sequence[str], folder: Path, format: FormatName, together: Processes) -> None:
    """Raises UserError where an old file in another format would be taken instead of the new one."""
    order = (*formats.STOCK_SUFFIXES, ".png")
    before = order[: order.index(formats.FORMATS[format].suffix)]
    found = [path.name for name in names if (path := formats.find(folder, name)) and path.suffix in before]
    if old := sorted({name for part in together.gather(found) for name in part}):
        raise UserError(
            f"Programs would go on using what is in {folder} already, {listed(old)}, instead of the new files in the "
            f"format {format}: delete or move the old ones, or choose another --format or --output."
        )


# What is learned --------------------------------------------------------------------------------


@dataclass(eq=False)
class Word:
    """One concept while it learns, and what has become of it. A ``library.ConceptRun``."""

    planned: Planned
    concept: Concept
    dataset: Dataset
    config: TrainConfig
    search: Callable[["Word"], TrainConfig]
    searching: Callable[[int, int], None]
    model: TrainableModel
    saved: dict[str, Any] | None = None
    start: Embedding | None = None
    last: Step | None = None
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    problem: str = ""
    """What ended it, where that was an error or a signal."""
    is_closed: bool = False
    """Whether its file is written, or it has failed."""

    def begin(self, resume: bool) -> tuple[Embedding, TrainConfig]:
        self.began, entry = time.perf_counter(), self.planned.saved
        if resume and entry:
            self.seconds = entry["seconds"]
            self.config = replace(self.planned.config, initializer=entry["initializer"])
        else:
            self.seconds, self.config = 0.0, self.search(self)
        vocabularies, config = self.model.vocabularies(), self.config
        self.start = initial_embedding(vocabularies, config.trigger, config.initializer, config.vectors)
        return self.start, config

    def entry(self, ended: bool) -> Entry | None:
        """What is needed to go on after its last step."""
        if self.last is None or not self.last.number:
            return self.planned.saved
        return {
            "fingerprint": self.planned.fingerprint,
            "initializer": self.config.initializer,
            "seconds": self.seconds + time.perf_counter() - self.began,
            "ended": ended,
            "training": self.last.state.to_dict(),
        }


class Row(NamedTuple):
    """What a table says of a concept."""

    word: str
    before: str
    after: str
    pictures: str
    seconds: str
    file: str


HEAD = Row("word", "loss before", "after", "pictures seen", "seconds", "file")


def table(rows: Sequence[Row]) -> str:
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(len(HEAD))]
    left = (0, len(HEAD) - 1)
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (HEAD, *rows)
    )


class Interrupted(Exception):
    """A signal has ended the run, and everything is saved."""


class Run:
    """What one process learns: all concepts of a plan with its rows of each batch, or some concepts alone."""

    def __init__(self, order: Order, plan: Plan, together: Processes, stop: "StopSignals") -> None:
        self.order, self.plan, self.together, self.stop = order, plan, together, stop
        groups = linked([word.concept for word in plan.waiting])
        self.splits_batches = len(groups) < together.count
        self.processes = together if self.splits_batches else ALONE
        mine = groups if self.splits_batches else groups[together.rank :: together.count]
        self.planned = [plan.waiting[number] for number in sorted(number for group in mine for number in group)]
        for word in plan.words:
            if word not in self.planned:
                word.forget_pictures()
        self.writes = self.processes.rank == 0
        self.words: list[Word] = []
        self.rows: dict[str, Row] = {}
        self.failed = False
        self.rounds = 0
        self.kept: dict[str, Entry] = {}
        """Ended concepts beside which others go on."""

    # Before training --------------------------------------------------------------------------

    def learn(self, model: "DiffusersModel", bar: "Bar") -> None:
        """Raises Interrupted, where nothing is lost, and in a library nothing about single concepts."""
        datasets = [self._dataset(model, planned) for planned in self.planned]
        with model.training() as trainable:
            for planned, dataset in zip(self.planned, datasets, strict=True):
                if dataset is not None:
                    self._add(trainable, planned, dataset, bar)
            known = self._known(trainable)
            self._follow(trainable, known, bar)
            if not self.plan.is_library:
                self._report(trainable)

    def _dataset(self, model: "DiffusersModel", planned: Planned) -> Dataset | None:
        try:
            return planned.concept.dataset(model, planned.config)
        except UserError as error:
            self._refuse(planned, error)
            return None
        finally:
            planned.forget_pictures()

    def _add(self, model: TrainableModel, planned: Planned, dataset: Dataset, bar: "Bar") -> None:
        config = planned.config
        try:
            start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)
            check_prompts(model, start, dataset, config)
        except UserError as error:
            self._refuse(planned, error)
            return
        if self.writes and not self.words:
            check_writable(start, self.plan.folder, planned.name, self.order.format)
        if self.plan.is_library:
            problems = self.processes.gather(self._name_problem(planned, start))  # one may see other files
            if problem := next(filter(None, problems), ""):
                self._refuse(planned, UserError(problem))
                return
        saved = planned.saved["training"] if planned.saved else None

        def searching(done: int, total: int) -> None:
            self._check_stop()
            bar.show_search(config, done, total)

        self.words.append(Word(planned, planned.concept, dataset, config, self._search, searching, model, saved))

    def _name_problem(self, planned: Planned, start: Embedding) -> str:
        """Why its files cannot have their names; empty where they can."""
        suffix, words = formats.FORMATS[self.order.format].suffix, self.plan.words
        before = words.index(planned)
        try:
            paths = formats.paths_of(start, self.plan.folder / f"{planned.name}{suffix}", self.order.format)
            ends = [path.name.removeprefix(planned.name) for path in paths]
            # Folders whose words have the same first file are left out already.
            for other in words if len(paths) > 1 else []:
                theirs = {f"{other.name}{end}".casefold() for end in ends}
                shared = [path.name for path in paths if path.name.casefold() in theirs]
                if shared and other is not planned and (other.is_done or words.index(other) < before):
                    word = other.concept.trigger
                    return f"{shared[0]} would also be a file of {word}: rename one of the two folders."
            formats.check_pair(paths)
        except UserError as error:
            return str(error)
        return ""

    def _refuse(self, planned: Planned, error: Exception) -> None:
        """Of a library the others go on."""
        if not self.plan.is_library:
            raise error
        self.failed = True
        if self.writes:
            self.rows[planned.concept.trigger] = Row(planned.concept.trigger, "-", "-", "-", "-", str(error))

    def _known(self, model: TrainableModel) -> dict[str, Embedding]:
        """What captions name and was learned before: as it was beside them then, or else as it is in its file."""
        widths = {key: vocabulary.vectors.shape[1] for key, vocabulary in model.vocabularies().items()}
        here = {word.concept.trigger for word in self.words}
        planned = {planned.concept.trigger: planned for planned in self.plan.words}
        known: dict[str, Embedding] = {}
        for word in self.words:
            for trigger in set(word.concept.beside) - here - known.keys():
                if not planned[trigger].is_done:  # refused: its word is ordinary text
                    continue
                if entry := planned[trigger].saved:
                    self.kept[trigger] = entry
                    known[trigger] = Embedding(trigger, entry["training"]["ema"][0])
                elif path := formats.find(self.plan.folder, planned[trigger].name):
                    known[trigger] = formats.read_whole(path).renamed(trigger).for_encoders(widths)
                else:
                    raise UserError(f"{planned[trigger].name} is in {self.plan.folder} on another machine only.")
            beside = tuple(one for one in word.concept.beside if one in here or one in known)
            word.concept = replace(word.concept, beside=beside)
        return known

    def _search(self, word: Word) -> TrainConfig:
        config, beside = word.planned.config, word.concept.beside
        if config.initializer:
            return config
        quiet = self.together.rank > 0
        with tqdm(desc="looking for a word to start from", leave=not self.plan.is_library, disable=quiet) as bar:

            def show(done: int, total: int) -> None:
                self._check_stop()
                bar.total = total
                bar.update(done - bar.n)

            return with_initializer(word.model, word.dataset, config, show, beside, self.processes)

    def _check_stop(self) -> None:
        """Ends a search at a signal."""
        if self.processes.any(bool(self.stop.code)):
            raise Interrupted

    # Training ---------------------------------------------------------------------------------

    def _follow(self, model: TrainableModel, known: dict[str, Embedding], bar: "Bar") -> None:
        groups = linked([word.concept for word in self.words])
        self.mates = {self.words[n]: [self.words[m] for m in group] for group in groups for n in group}
        at_once = self.order.settings.concepts_at_once if len(self.words) > 1 else 1
        news = learn_together(model, self.words, at_once, self.processes, known, self._after_round)
        reply: Reply = None
        try:
            while (item := next_of(news, reply)) is not None:
                word, step = item
                reply = self._take(word, step, bar)
        except KeyboardInterrupt:  # the second one
            (word, *others) = self.words
            if others or word.last is None:
                raise
            word.problem = f"Interrupted in step {word.last.number + 1}."
        bar.close()
        self._close([word for word in self.words if not word.is_closed])

    def _take(self, word: Word, news: Step | Exception, bar: "Bar") -> Reply:
        """Notes what has happened, and returns True to end a single word."""
        if isinstance(news, Exception):
            if not self.plan.is_library and not isinstance(news, TrainingStopped):
                raise news
            word.problem = str(news)
            if not isinstance(news, TrainingStopped):
                word.last = None
            return None
        if word.last is None:
            if news.number:
                bar.tell(f"{word.concept.trigger} goes on after step {news.number}.")
            elif word.saved:
                bar.tell(f"{word.concept.trigger} starts over: the model changed since its unfinished run.")
            if self.plan.is_library:  # what a step takes is said once
                logging.getLogger(__package__).setLevel(logging.WARNING)
        elif news.number > word.last.number:
            bar.show(word, news)
        word.last = news
        if self.plan.is_library or not news.number or word.problem:
            return None
        if not self.processes.any(bool(self.stop.code)):
            return None
        self._save([word])
        word.problem = INTERRUPTED.format(news.number)
        return True

    def _after_round(self, learning: Sequence[Word]) -> None:
        """Everything is at rest: the only time at which the states of concepts belong together."""
        self.rounds += 1
        ended = [word for word in self.words if (word.last or word.problem) and not word.is_closed]
        ended = [word for word in ended if word not in learning]
        stopping = self.plan.is_library and self.processes.any(bool(self.stop.code))
        if (self.plan.is_library and (ended or stopping)) or (learning and self.rounds % SAVE_EVERY == 0):
            self._save(learning)  # what has ended too, until its file is there
        if self.plan.is_library:
            self._close(ended)
        if stopping:
            raise Interrupted

    def _save(self, learning: Sequence[Word]) -> None:
        if not self.writes:
            return
        content = Unfinished(dict(self.kept))
        if self.order.existing == "replace":
            new = [word for word in self.plan.words if word.is_done]
            new += [word.planned for word in self.words if word.is_closed and word.last]  # without errors
            content.done = {word.concept.trigger: word.fingerprint for word in new}
        for word in self.words:
            if all(mate.is_closed for mate in self.mates[word]):
                continue
            if entry := word.entry(ended=word not in learning):
                content.concepts[word.concept.trigger] = entry
        try:
            self.plan.files.write(content)
        except OSError as error:
            say(f"This run could not go on after a kill: {self.plan.files.own} cannot be written ({error.strerror}).")

    def _close(self, words: Sequence[Word]) -> None:
        """Writes what has been learned."""
        for word in words:
            word.is_closed = True
            self.failed = self.failed or bool(word.problem and self.plan.is_library)
            if not self.writes:
                continue
            files: list[Path] = []
            if word.last is not None:
                learned = learned_embedding(word.last, word.config, self.order.base_model)
                try:
                    files = self._keep(learned, word.planned.name)
                except UserError as error:  # of a library the others go on
                    if not self.plan.is_library:
                        raise
                    self.failed, word.last, word.problem = True, None, str(error)
                if not self.plan.is_library:
                    print_files(files, learned, self.order.format)
            self.rows[word.concept.trigger] = _row(word, files)

    def _keep(self, learned: Embedding, name: str) -> list[Path]:
        folder, format = self.plan.folder, self.order.format
        left = any(formats.is_empty(folder / f"{name}{suffix}") for suffix in formats.SUFFIXES)  # by a killed process
        left = left and not formats.is_written(folder, name)
        replaces = self.plan.is_library and (self.order.existing == "replace" or left)
        return keep(learned, folder, name, format, replaces)

    def _report(self, model: TrainableModel) -> None:
        (word,) = self.words
        assert word.last is not None
        assert word.start is not None
        ended = word.problem
        if ended == INTERRUPTED.format(word.last.number):
            ended += f" {more_steps(word.last.progress, word.config)} The same command goes on from here."
        if self.writes:
            say(report(model, word.dataset, word.config, word.start, word.last, repr(word.config.initializer), ended))


def _row(word: Word, files: Sequence[Path]) -> Row:
    where = ", ".join(map(str, files))
    if word.last is None:
        return Row(word.concept.trigger, "-", "-", "-", "-", word.problem)
    progress = word.last.progress
    after = progress.best_loss
    return Row(
        word.concept.trigger,
        f"{after + progress.gain.mean:.4f}",
        f"{after:.4f}",
        str(progress.step * word.config.batch_size * word.config.accumulation),
        f"{word.seconds + time.perf_counter() - word.began:.0f}",
        f"{where} ({word.problem})" if word.problem else where,
    )


# The command ------------------------------------------------------------------------------------


def train_order(order: Order, together: Processes) -> int:
    """Does what the command line says, and returns the exit code."""
    speaks = together.rank == 0
    tell = say if speaks else _silent
    if not speaks:
        logging.getLogger(__package__).setLevel(logging.WARNING)
    check_settings(order.settings)
    plan = make_plan(order, together, tell)
    if not plan.waiting:
        return 0
    with ExitStack() as stack:
        stop = StopSignals(tell, again_ends=together.count == 1)
        run = Run(order, plan, together, stop)
        if speaks and together.count > 1:
            tell(_how_shared(run))
        model = order.load()
        stack.enter_context(stop)
        bar = stack.enter_context(Bar(run, tell))
        try:
            run.learn(model, bar)
        except Interrupted:
            bar.close()
            tell("Interrupted. Run the same command again to go on.")
    rows = {trigger: row for rows in together.gather(run.rows) for trigger, row in rows.items()}
    stopped, failed = max(together.gather(stop.code)), any(together.gather(run.failed))
    if plan.is_library and speaks and rows:
        print(table([rows[trigger] for trigger in (word.concept.trigger for word in plan.words) if trigger in rows]))
    if speaks and not stopped:
        plan.files.remove()
    return stopped or int(plan.is_library and failed)


def _silent(text: str) -> None:
    pass


def _how_shared(run: Run) -> str:
    if run.splits_batches:
        return f"{run.together.count} processes share the rows of every batch."
    return f"{run.together.count} processes share out {len(run.plan.waiting)} concepts."


class Bar:
    """The progress of all concepts of this process, in steps."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self._run, self._tell, self._planned = run, tell, {}
        self._bar: tqdm | None = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def tell(self, text: str) -> None:
        self._tell(text)

    def show(self, word: Word, step: Step) -> None:
        words, bar = self._run.words, self._open(word.config)
        self._planned[word.concept.trigger] = max(step.number, earliest_end(step.progress, word.config))
        bar.total = round(sum(self._planned.values()) / len(self._planned) * len(words))
        closed = f"{sum(word.is_closed for word in words)} of {len(words)} learned, " if len(words) > 1 else ""
        bar.set_description_str(f"{closed}{word.config.trigger}", refresh=False)
        bar.update()
        bar.set_postfix_str(f"fixed loss {step.best_loss:.4f} at step {step.best_step}")

    def show_search(self, config: TrainConfig, done: int, total: int) -> None:
        """How far the search for words of the per-image tokens is."""
        self._open(config).set_description_str(f"{config.trigger}, looking for words: {done / total:.0%}")

    def _open(self, config: TrainConfig) -> tqdm:
        if self._bar is None:
            quiet = self._run.together.rank > 0
            self._bar = tqdm(unit="step", desc=config.trigger, total=config.steps, disable=quiet)
        return self._bar


class StopSignals:
    """Ctrl-C and SIGTERM end training after the step that runs; the same once more ends the program.

    Not where several processes were started together: their launcher passes on what the terminal has sent already.
    """

    def __init__(self, tell: Callable[[str], None], again_ends: bool) -> None:
        self.code = 0
        """Exit code of a program that the signal ends; 0 while none came."""
        self._tell, self._again_ends = tell, again_ends

    def __enter__(self) -> "StopSignals":
        # One that is ignored, as Ctrl-C is in the background of a shell script, stays so.
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._stop) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.code:
            self._tell("Ending after this step.")
        self.code = 128 + number
        if self._again_ends:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_writable(start: Embedding, folder: Path, name: str, format: FormatName) -> None:
    """Writes the initial vectors in ``folder`` and removes them: a format or a folder that fails does so now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as temporary:
            formats.write_new(start, Path(temporary), name, format)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --output.") from error


def keep(embedding: Embedding, folder: Path, name: str, format: FormatName, replaces: bool = False) -> list[Path]:
    """Writes the result to ``folder``, or where that fails now to the next one that takes it."""
    folders = [folder, Path(), Path(gettempdir())]
    for number, place in enumerate(folders, 1):
        try:
            if replaces and number == 1:
                return formats.write(embedding, place / f"{name}{formats.FORMATS[format].suffix}", format)
            return formats.write_new(embedding, place, name, format)
        except OSError as error:
            say(f"{place.resolve()} cannot be written to ({error.strerror}).")
            if number == len(folders):
                raise
    raise AssertionError("the last folder returns or raises")
