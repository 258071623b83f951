"""One concept of a run of the Train node: shows what its training does, and never loses what was learned."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..textual_inversion import (
    Embedding,
    PreviewConfig,
    Step,
    TrainConfig,
    TrainingStopped,
    UserError,
    formats,
    initial_embedding,
)
from ..textual_inversion.adapters.protocol import DiffusionModel, TrainableModel
from ..textual_inversion.dataset import Dataset
from ..textual_inversion.devices import is_out_of_memory
from ..textual_inversion.initializer import with_initializer
from ..textual_inversion.library import Concept
from ..textual_inversion.memory import out_of_memory_explained
from ..textual_inversion.pictures import LeftOut
from ..textual_inversion.prompts import has_trigger, place_trigger, without_trigger
from ..textual_inversion.report import (
    described,
    how_it_ended,
    in_short,
    learned_embedding,
    more_steps,
    report,
)
from ..textual_inversion.training import Choice, Reply, check_prompts, earliest_end, finished, still_improving
from .files import embeddings_folder, output_folder, temporary_folder
from .live import LiveRun, thinned
from .state_file import StateFile

NO_PICTURE = torch.zeros(1, 64, 64, 3)  # the output of a run whose previews failed
MOST_PREVIEWS = 50  # that are drawn as often as asked for; then half as often, for they stay in memory
SAVE_EVERY = 10  # steps between writes of the state, which take a millisecond each


class NotBegun(UserError):
    """A concept was stopped while it waited."""


@dataclass(frozen=True)
class Request:
    """What the node was asked to do."""

    config: TrainConfig
    preview: PreviewConfig
    continued: Embedding | None
    """An embedding to train further."""
    base_model: str
    """File name of the model, for the metadata."""
    left_out: Sequence[LeftOut] = ()
    """Files beside the pictures that are not used."""


@dataclass(frozen=True)
class Result:
    embedding: Embedding
    report: str
    summary: str
    """One line."""
    losses: list[float]
    """Before the first step, then of each step."""
    pictures: list[Tensor]
    """Previews, (1, H, W, 3) each, the last one of ``embedding``."""


def starting_point(
    model: TrainableModel,
    dataset: Dataset,
    request: Request,
    initializer: str,
    beside: Sequence[str],
    live: LiveRun,
) -> tuple[Embedding, TrainConfig]:
    """The vectors to start from, and the config completed with their initializer and their number.

    ``initializer`` is that of a run to resume, or empty; ``beside`` are other concepts that captions name.
    """
    config, vocabularies = request.config, model.vocabularies()
    if request.continued is not None:
        widths = {key: vocabulary.vectors.shape[1] for key, vocabulary in vocabularies.items()}
        start = request.continued.renamed(config.trigger).for_encoders(widths)
        with out_of_memory_explained(0):
            model.check_compatible(dataset.latents[0], config.trigger, start)
        return start, replace(config, vectors=start.count)
    start = initial_embedding(vocabularies, config.trigger, config.initializer, config.vectors)
    with out_of_memory_explained(0):
        model.check_compatible(dataset.latents[0], config.trigger, start)
    check_prompts(model, start, dataset, config)  # before a search that takes its time
    if initializer:
        config = replace(config, initializer=initializer)
    elif not config.initializer:
        live.tell("searching", steps=config.steps)
        config = with_initializer(model, dataset, config, search_progress(live), beside)
    return initial_embedding(vocabularies, config.trigger, config.initializer, config.vectors), config


def search_progress(live: LiveRun) -> Callable[[int, int], None]:
    """Shows how far the search for an initializer is, in the panel and in ComfyUI's progress bar."""
    bars: list[comfy.utils.ProgressBar] = []

    def show(done: int, total: int) -> None:
        live.tell("searching", message=f"Looking for a word to start from: {done / total:.0%}.")
        bars[:] = bars or [comfy.utils.ProgressBar(total)]
        bars[0].update_absolute(done)  # raises ComfyUI's interrupt

    return show


def preview_interval(every: int, drawn: int) -> int:
    """Steps between previews: twice as many after each ``MOST_PREVIEWS``, so that a run has a few hundred at most."""
    return every * 2 ** (drawn // MOST_PREVIEWS)


@dataclass
class Notes:
    """What went wrong beside training: it never ends a run, and is told in the panel and the report, each once."""

    live: LiveRun
    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)
            logging.warning("Textual inversion: %s", text)
            self.live.tell(self.live.record.state, message=" ".join(self.texts))

    @contextmanager
    def side_job(self, failed: str) -> Iterator[None]:
        """An error inside is a note that begins with ``failed``. ComfyUI's interrupt, no Exception, goes through."""
        try:
            yield
        except Exception as error:
            self.add(f"{failed}: {reason(error)}")


def reason(error: Exception) -> str:
    """The cause in one line, as the user can act on it."""
    if is_out_of_memory(error):
        return "out of memory."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}."
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass
class TrainingRun:
    """Progress, previews, and files that outlive an interrupt or a crash. A ``library.ConceptRun``."""

    concept: Concept
    dataset: Dataset
    request: Request
    """Its config has the trigger word of the concept."""
    live: LiveRun
    state_file: StateFile
    one_of_several: bool
    show_progress: Callable[[], None]
    """Moves ComfyUI's progress bar, and raises its interrupt."""
    supports_embedding_files: bool = True
    """Whether ComfyUI without this pack takes ``embedding:NAME``."""
    losses: list[float] = field(default_factory=list)
    fixed: list[tuple[int, float]] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    without: list[Tensor] = field(default_factory=list)
    """Where only the negative prompt has the word: the preview of each prompt without it."""
    seconds: float = 0.0
    """Average time of one step."""
    preview_failed: bool = False
    unfinished: dict[str, Any] | None = None
    """What ``save`` wrote in an earlier run."""
    last: Step | None = None
    result: Result | None = None
    error: Exception | None = None
    stopped: str = ""
    """Why it ends before the loop does."""
    taken: float = 0.0
    """Seconds since it began."""
    begun: str = ""
    """Where it began, unless at the initializer as usual."""

    def __post_init__(self) -> None:
        self.config, self.notes = self.request.config, Notes(self.live)
        self._began = self._since = time.perf_counter()
        self._ending = False

    def read_state(self) -> None:
        """Finds the unfinished run of the same settings and pictures."""
        with self.notes.side_job("The unfinished run of before cannot be read"):
            self.unfinished = self.state_file.read()
        found = self.unfinished
        done = found and found.get("done") and found["training"]["progress"]["step"] >= self.config.steps
        if done and not self.one_of_several:  # it waits for more steps
            self.state_file.remove()
            self.unfinished = None

    # Training -----------------------------------------------------------------------------------

    @property
    def saved(self) -> dict[str, Any] | None:
        return self.unfinished["training"] if self.unfinished else None

    def use(self, model: TrainableModel) -> None:
        self.model = model

    def begin(self, resume: bool) -> tuple[Embedding, TrainConfig]:
        """The initial vectors, and the settings with their initializer (see ``library.ConceptRun``)."""
        if self.one_of_several and self.live.stop.is_set():
            raise NotBegun("Stopped before it began.")
        self._began = time.perf_counter()
        if self.one_of_several:
            self.live.tell("encoding")
        initializer = self.unfinished["initializer"] if resume and self.unfinished else ""
        self.start, self.config = starting_point(
            self.model, self.dataset, self.request, initializer, self.concept.beside, self.live
        )
        self.check_preview(self.start)
        return self.start, self.config

    def take(self, news: Step | Exception) -> Reply:
        """Shows and keeps a step; the answer is what ``train`` takes."""
        if isinstance(news, Exception):
            self.failed(news)
            return None
        is_first, self.last = self.last is None, news
        if self._ending:
            self.note_fixed_loss(news)
            self.finish(self.stopped)
            return None
        if is_first:
            self.begin_curves(news)
        else:
            self.record(news, time.perf_counter() - self._since)
        self.show(news)  # raises ComfyUI's interrupt
        was_stopped = self.unfinished.get("stopped", "") if is_first and self.unfinished and news.number else ""
        if was_stopped:
            self._ending, self.stopped = True, was_stopped
            return Choice(news.best_step, news.best)
        if self.is_last(news) or self.live.stop.is_set():
            self.live.close()
            if news.number and self.live.stop.is_set():  # one loss alone is no curve for Plot Loss Graph
                return self.stop(news)
        if self.is_last(news):
            self.finish("")
        self._since = time.perf_counter()
        return None

    def is_last(self, step: Step) -> bool:
        """Whether training ends by itself after this step."""
        return step.number >= self.config.steps or finished(step.progress, self.config)

    def stop(self, step: Step) -> bool | Choice:
        """Ends training by hand, perhaps with the vectors of a preview picture."""
        self._ending = True
        if self.live.chosen is not None:
            self.stopped = f"Stopped by hand to keep what the preview of step {self.live.chosen} shows."
            return Choice(self.live.chosen, self.live.pictured[self.live.chosen])
        self.stopped = f"Stopped by hand. {more_steps(step.progress, self.config)}"
        return True

    def failed(self, error: Exception) -> None:
        """Keeps what there is: where training broke off later, the best vectors are good."""
        self.live.close()
        if isinstance(error, TrainingStopped) and self.last is not None:
            ended = f"{error} Kept the vectors of step {self.last.best_step}."
            if self.live.chosen is not None:
                ended += f" Choose the preview of step {self.live.chosen} again to save its embedding."
            logging.warning("Textual inversion: %s", ended)
            self.finish(ended)
            return
        self.error = error
        self.rescue()
        if self.one_of_several:
            self.live.end("cancelled" if isinstance(error, NotBegun) else "failed", message=str(error))

    def finish(self, ended: str) -> None:
        """Writes and shows the result."""
        last = self.last
        assert last is not None
        if ended and ended == self.stopped:
            self.live.tell("learning", best=last.best_step)
        name = formats.file_name(self.config.trigger)
        learned = self.write(last, name, [temporary_folder(), embeddings_folder(), output_folder()])
        ended = ended or how_it_ended(last.progress, self.config, still_improving(last.progress, self.config))
        self.live.tell("finishing", message=" ".join(filter(None, [self.live.record.message, ended])))
        origin = "the given embedding" if self.request.continued else repr(self.config.initializer)
        left_out = () if self.one_of_several else self.request.left_out
        text = f"{self.config.trigger}: step {last.best_step}. {ended}"
        with self.notes.side_job("No report"):
            text = report(self.model, self.dataset, self.config, self.start, last, origin, ended, left_out)
        if not self.supports_embedding_files:
            text += "\nembedding:NAME does not work with this text encoder: use Load Embedding and Apply Embedding."
        self.save(last)
        with self.model.paused() as model:
            self.draw(model, learned, last.number)
        self.taken = time.perf_counter() - self._began
        text = "\n".join([text, *self.notes.texts, f"{self.taken:.0f} s, previews included."])
        summary = f"{self.config.trigger}: {in_short(last.progress, origin)}, {last.number} steps, {self.taken:.0f} s."
        pictures = self.pictures[-1:] if self.one_of_several else self.pictures  # those of hundreds would fill memory
        self.result = Result(learned, text, summary, self.losses, pictures or [NO_PICTURE])
        self.pictures = pictures
        if self.one_of_several:
            self.live.end("done")

    def begin_curves(self, first: Step) -> None:
        """Takes over the curves of a saved run, and tells where training starts."""
        saved = self.unfinished
        if saved and first.number:
            self.losses = [*saved["losses"], first.loss][: first.number + 1]
            self.fixed = [(number, loss) for number, loss in saved["fixed"]]
            self.note_fixed_loss(first)  # where the saved run was interrupted before its evaluation
            self.begun = f"Resumed the unfinished run at step {first.number}."
        else:
            self.losses, self.fixed = [first.loss], [(0, first.loss)]
            if saved or self.state_file.has_others:
                changed = "the model" if saved else "settings, pictures, the model or the node pack"
                kept = "" if saved else ", which is kept"
                self.begun = f"Started over: {changed} changed since the unfinished run{kept}."
        self.live.tell("learning", message=self.message(), steps=self.config.steps)

    def message(self, now: str = "") -> str:
        """What the panel says in words: everything notable of the run, and what it does ``now``."""
        return " ".join(filter(None, [*self.notes.texts, self.begun, now]))

    def searching(self, done: int, total: int) -> None:
        """Shows in the panel how far the search for words of the per-image tokens is."""
        now = f"Looking for words for what else the pictures show: {done / total:.0%}." if done < total else ""
        self.live.tell("learning", message=self.message(now))
        self.show_progress()

    def check_preview(self, start: Embedding) -> None:
        """Says now what would be wrong with every preview."""
        preview, trigger = self.request.preview, self.config.trigger
        prompts = [place_trigger(text, trigger) for text in (*preview.prompts, preview.preview_negative)]
        prompts = [text for text in prompts if has_trigger(text, trigger)]
        if not prompts:
            self.notes.add(
                f"Previews do not show the word: write {{}} or {self.config.trigger!r} into the preview prompt."
            )
            return
        with self.notes.side_job("Previews will not show the word as it is"):
            self.model.check_prompts(prompts, start)

    def record(self, step: Step, seconds: float) -> None:
        if step.number > 1:  # before the first, per-image tokens look for their words
            self.seconds = 0.9 * self.seconds + 0.1 * seconds if self.seconds else seconds
        self.losses.append(step.loss)
        self.note_fixed_loss(step)

    def note_fixed_loss(self, step: Step) -> None:
        if step.fixed_loss is not None:
            self.fixed.append((step.number, step.fixed_loss))

    def show(self, step: Step) -> None:
        """A preview and the saved state where they are due, the panel, and ComfyUI's progress bar."""
        if self.take_preview_request() or self.preview_is_due(step):
            with self.model.paused() as model:
                self.draw(model, step.state.tokens.concept.snapshot(), step.number)
        self.send_progress(step)
        if step.number and step.number % SAVE_EVERY == 0:
            self.save(step)
        self.show_progress()

    @property
    def position(self) -> tuple[int, int]:
        """The step it is at, and the one at which it may end, as far as it is known; 0 and 0 before it begins."""
        if self.last is None:
            return 0, 0
        step, planned = self.last.number, earliest_end(self.last.progress, self.config)
        return step, step if self.result else min(self.config.steps, max(step + 1, planned))

    def send_progress(self, step: Step) -> None:
        """Sends everything about the run to the panel."""
        planned = earliest_end(step.progress, self.config)
        self.live.tell(
            "learning",
            step=step.number,
            learning_rate=step.learning_rate,
            rate=self.config.batch_size * self.config.accumulation / self.seconds if self.seconds else 0.0,
            planned=planned,
            seconds_left=(planned - step.number) * self.seconds if self.seconds and step.progress.agreement else None,
            trend="tokens" if step.number < step.progress.began else "flat" if step.progress.flat else "improving",
            flat=step.progress.flat,
            best=step.best_step,
            losses=thinned(self.losses),
            fixed=self.fixed,
        )

    def take_preview_request(self) -> bool:
        """Whether the button *Preview now* was pressed since the last call."""
        pressed = self.live.preview.is_set()
        self.live.preview.clear()
        return pressed

    def preview_is_due(self, step: Step) -> bool:
        every = preview_interval(self.request.preview.preview_every, len(self.pictures))
        wanted = every > 0 and step.number % every == 0 and not self.preview_failed
        return wanted and not self.is_last(step)  # that is drawn as the result anyway

    def draw(self, model: DiffusionModel, embedding: Embedding, number: int) -> None:
        """One preview of the vectors at step ``number``, with a picture for each prompt beside one another.

        Where only the negative prompt has the word, a picture without it stands on the left of each.
        After one that failed only the last is tried.
        """
        preview, trigger = self.request.preview, self.config.trigger
        negative = place_trigger(preview.preview_negative, trigger)
        sampling = self.dataset.latents[0].shape, self.config.seed, preview.preview_steps, preview.preview_cfg
        is_result = self.live.record.state == "finishing"
        self.preview_failed = True
        if not is_result:
            self.live.tell("drawing")
        with self.notes.side_job("No preview"):
            prompts = [place_trigger(text, trigger) for text in preview.prompts]
            pictures = [model.generate(prompt, embedding, *sampling, negative) for prompt in prompts]
            if has_trigger(negative, trigger) and not any(has_trigger(prompt, trigger) for prompt in prompts):
                other = without_trigger(negative, trigger)
                self.without = self.without or [model.generate(prompt, None, *sampling, other) for prompt in prompts]
                pictures = [picture for pair in zip(self.without, pictures, strict=True) for picture in pair]
            self.pictures.append(torch.cat(pictures, dim=2))
            self.preview_failed = False
            if len(self.pictures) == MOST_PREVIEWS and preview.preview_every:
                self.notes.add(f"Previews stay in memory, so after {MOST_PREVIEWS} of them fewer are drawn.")
        if not self.preview_failed:
            self.live.pictured[number] = described(embedding, number, self.config, self.request.base_model)
            with self.notes.side_job("The preview cannot be shown"):
                self.show_picture(self.pictures[-1], number, is_result)

    def show_picture(self, picture: Tensor, number: int, is_result: bool) -> None:
        (file,) = ui.ImageSaveHelper.save_images(picture, "textual_inversion/preview", io.FolderType.temp, cls=None)
        shape = {"aspect": picture.shape[2] / picture.shape[1], "result": is_result}
        self.live.tell(self.live.record.state, pictures=[*self.live.record.pictures, {"step": number, **shape, **file}])

    def save(self, step: Step, told: str = "", done: bool = False) -> None:
        """Writes what is needed to resume; ``told`` is what the panel says once it is written.

        ``done``: the run has given its result, and goes on only with more steps.
        """
        with self.notes.side_job("This run cannot be resumed, since its state cannot be saved"):
            self.state_file.write(
                {
                    "training": step.state.to_dict(),
                    "initializer": self.config.initializer,
                    "stopped": self.stopped,
                    "done": done,
                    "losses": self.losses,
                    "fixed": self.fixed,
                }
            )
            if told:
                self.notes.add(told)

    def rescue(self) -> None:
        """Keeps the best vectors and the state of a run that was cancelled or failed."""
        last = self.last
        if last is None:
            return
        if last.best_step > 0:
            name = f"{formats.file_name(self.config.trigger)}-partial"
            self.write(last, name, [embeddings_folder(), output_folder()], "What was learned so far is in {path}.")
        if last.number > 0:
            self.save(last, "Queue the workflow again to go on.")

    def write(self, step: Step, name: str, folders: Sequence[Path], told: str = "") -> Embedding:
        """The best vectors so far, written to the first of the ``folders`` that takes them.

        ``told`` is what the panel says of the file.
        """
        embedding = learned_embedding(step, self.config, self.request.base_model)
        failed = []
        for folder in folders:
            try:
                (path,) = formats.write_new(embedding, folder, name)
            except Exception as error:  # a full disk, missing rights, a folder that is a file ...
                failed.append(f"{folder} cannot be written to: {reason(error)}")
                continue
            if failed:
                self.notes.add(f"{failed[0]} The embedding is in {path}.")
            elif told:
                self.notes.add(told.format(path=path.name))
            logging.info("Textual inversion: %s is in %s", self.config.trigger, path)
            return embedding
        self.notes.add(f"{' '.join(failed)} The embedding is in no file: connect Save Embedding, or queue again.")
        return embedding
