"""One run of the Train node: it consumes the training loop, shows it, and never loses what was learned."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..textual_inversion import (
    Embedding,
    PreviewConfig,
    Step,
    TrainConfig,
    TrainingStopped,
    __version__,
    formats,
    initial_embedding,
    train,
)
from ..textual_inversion.adapters.comfyui import ComfyModel
from ..textual_inversion.dataset import Dataset
from ..textual_inversion.initializer import with_initializer
from ..textual_inversion.prompts import place_word
from ..textual_inversion.report import report
from ..textual_inversion.state import load_state, save_state
from .files import embeddings_folder, states_folder, temporary_folder
from .live import LiveRun, thinned

SAVE_EVERY = 10  # steps between writes of the state: a millisecond each


@dataclass(frozen=True)
class StateFile:
    """Where an unfinished run waits for the same graph to be run again."""

    owner: str
    """Of which node of which workflow it is; without a workflow, of these settings and pictures alone."""
    fingerprint: str

    @classmethod
    def of(cls, workflow: str, node: str, fingerprint: str) -> "StateFile":
        owner = hashlib.sha256(f"{workflow} {node}".encode()).hexdigest() if workflow else fingerprint
        return cls(owner[:12], fingerprint[:32])

    def read(self) -> dict[str, Any] | None:
        """What was saved with the same settings and pictures, by whatever node."""
        return next(filter(None, map(load_state, states_folder().glob(f"*-{self.fingerprint}.state"))), None)

    def write(self, content: dict[str, Any]) -> None:
        save_state(states_folder() / f"{self.owner}-{self.fingerprint}.state", content)

    @property
    def has_others(self) -> bool:
        """Whether the node left a run with other settings or pictures unfinished."""
        return any(states_folder().glob(f"{self.owner}-*.state"))

    def remove(self) -> None:
        for pattern in (f"*-{self.fingerprint}.state", f"{self.owner}-*.state"):
            for path in states_folder().glob(pattern):
                path.unlink(missing_ok=True)


@dataclass
class TrainingRun:
    """Progress, pictures, and files that outlive an interrupt or a crash."""

    config: TrainConfig
    preview: PreviewConfig
    base_model: str
    live: LiveRun
    file: StateFile
    losses: list[float] = field(default_factory=list)
    fixed: list[tuple[int, float]] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    def learn(self, model: ComfyModel, dataset: Dataset, resume: Embedding | None) -> tuple[Embedding, str]:
        """The learned embedding and a report; ``losses`` and ``pictures`` are filled on the way."""
        started, saved = time.perf_counter(), self.file.read()
        with model:
            start = self._start(model, dataset, saved, resume)
            config = self.config
            embedding = start.trainable()
            steps = train(model, embedding, dataset, config, saved and saved["training"])
            step, ended = self._follow(steps, saved, model, embedding, dataset)
            learned = self._keep(step, formats.free_path(temporary_folder(), formats.file_name(config.trigger)))
            self.live.tell("finishing", message=ended or self.live.record.message)
            origin = repr(config.initializer) if resume is None else "the embedding given"
            text = report(model, dataset, config, start, step, origin, ended)
        if not model.supports_embedding_files:
            text += "\nComfyUI looks for no embedding:NAME with this text encoder: use Load and Apply Embedding."
        self._draw(model, learned, dataset, step.number)
        self.file.remove()
        return learned, f"{text}\n{time.perf_counter() - started:.0f} s, previews included."

    def _start(
        self, model: ComfyModel, dataset: Dataset, saved: dict[str, Any] | None, resume: Embedding | None
    ) -> Embedding:
        """The vectors to begin with; what they settle is put into ``config``."""
        known = model.vocabularies()
        if resume is not None:
            widths = {key: vocabulary.vectors.shape[1] for key, vocabulary in known.items()}
            start = resume.renamed(self.config.trigger).for_encoders(widths)
            self.config = replace(self.config, vectors=start.count)
            model.check_fit(dataset.latents[0], start.trigger, start)
            return start
        config = self.config
        neutral = initial_embedding(known, config.trigger, config.initializer, config.vectors)
        model.check_fit(dataset.latents[0], config.trigger, neutral)
        if saved:
            self.config = replace(config, initializer=saved["initializer"])
        elif not config.initializer:
            self.live.tell("searching", steps=config.steps)
            self.config = with_initializer(model, dataset, config)
        return initial_embedding(known, config.trigger, self.config.initializer, config.vectors)

    def _follow(
        self,
        steps: Iterator[Step],
        saved: dict[str, Any] | None,
        model: ComfyModel,
        embedding: Embedding,
        dataset: Dataset,
    ) -> tuple[Step, str]:
        """The last good step, and why it is the last where it was not the loop that ended."""
        progress = comfy.utils.ProgressBar(self.config.steps)
        step, seconds = next(steps), 0.0
        self._begin(step, saved)
        try:
            while True:
                if self._wants_picture(step):
                    with model.paused():
                        self._draw(model, embedding.snapshot(), dataset, step.number)
                self._show(step, seconds)
                if step.number and step.number % SAVE_EVERY == 0:
                    self._save(step)
                progress.update_absolute(step.number)  # it raises ComfyUI's interrupt
                if self.live.stop.is_set():
                    return step, f"Stopped by hand: the vectors of step {step.best_number} are kept."
                began = time.perf_counter()
                step = next(steps)
                took = time.perf_counter() - began
                seconds = 0.9 * seconds + 0.1 * took if seconds else took
                self.losses.append(step.loss)
                if step.fixed_loss is not None:
                    self.fixed.append((step.number, step.fixed_loss))
        except StopIteration:
            return step, ""
        except TrainingStopped as error:
            ended = f"{error} The vectors of step {step.best_number} are kept."
            logging.warning("Textual inversion: %s", ended)
            return step, ended
        except BaseException:  # ComfyUI's interrupt is no Exception
            if step.number > 0:
                self._save(step)
                name = f"{formats.file_name(self.config.trigger)}-partial"
                self._keep(step, formats.free_path(embeddings_folder(), name))
            raise

    def _begin(self, step: Step, saved: dict[str, Any] | None) -> None:
        """Takes up what a saved run had shown, and says from where training goes."""
        if saved and step.number:
            self.losses = [*saved["losses"], step.loss][: step.number + 1]
            self.fixed = [(number, loss) for number, loss in saved["fixed"]]
            if step.fixed_loss is not None:  # it was interrupted before it could measure
                self.fixed.append((step.number, step.fixed_loss))
            message = f"It went on from step {step.number} of a run that had not ended."
        else:
            self.losses, self.fixed = [step.loss], [(0, step.loss)]
            message = ""
            if saved or self.file.has_others:
                changed = "the model has" if saved else "settings or pictures have"
                message = f"It started anew, since {changed} changed after the run that had not ended."
        self.live.tell("learning", message=message, steps=self.config.steps)

    def _show(self, step: Step, seconds: float) -> None:
        rate = self.config.batch_size * self.config.accumulation / seconds if seconds else 0.0
        self.live.tell(
            "learning",
            step=step.number,
            learning_rate=step.learning_rate,
            rate=rate,
            seconds_left=(self.config.steps - step.number) * seconds if seconds else None,
            best=step.best_number,
            losses=thinned(self.losses),
            fixed=self.fixed,
        )

    def _save(self, step: Step) -> None:
        self.file.write(
            {
                "training": step.state.to_dict(),
                "initializer": self.config.initializer,
                "losses": self.losses,
                "fixed": self.fixed,
            }
        )

    def _wants_picture(self, step: Step) -> bool:
        asked = self.live.preview.is_set()
        self.live.preview.clear()
        return asked or bool(self.preview.preview_every and step.number % self.preview.preview_every == 0)

    def _draw(self, model: ComfyModel, embedding: Embedding, dataset: Dataset, number: int) -> None:
        """One preview picture of the vectors at step ``number``."""
        preview, shape = self.preview, dataset.latents[0].shape
        prompt = place_word(preview.preview_prompt, self.config.trigger)
        picture = model.generate(prompt, embedding, shape, self.config.seed, preview.preview_steps, preview.preview_cfg)
        self.pictures.append(picture)
        (file,) = ui.ImageSaveHelper.save_images(picture, "textual_inversion/preview", io.FolderType.temp, cls=None)
        shown = [*self.live.record.pictures, {"step": number, **file}]
        self.live.tell(self.live.record.state, pictures=shown)

    def _keep(self, step: Step, path: Path) -> Embedding:
        """The best vectors so far with all that is known about them, written to disk."""
        metadata = {
            "base_model": self.base_model,
            "steps": str(step.best_number),
            "seed": str(self.config.seed),
            "settings": json.dumps(asdict(self.config)),
            "version": __version__,
        }
        embedding = Embedding(step.best.trigger, step.best.vectors, metadata)
        formats.write(embedding, path)
        logging.info("Textual inversion: %s is in %s", self.config.trigger, path)
        return embedding
