import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import comfy.utils
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui
from PIL import Image
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
from ..textual_inversion.dataset import Dataset, make_dataset
from ..textual_inversion.initializer import with_initializer
from ..textual_inversion.pictures import to_pillow
from ..textual_inversion.prompts import check_trigger, place_word
from ..textual_inversion.report import report
from .files import base_model, embeddings_folder, temporary_folder
from .sockets import CATEGORY, MAIN_FIELDS, EmbeddingSocket, LossMapSocket, SettingsSocket, widget


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_Train",
            display_name="Train Textual Inversion",
            category=CATEGORY,
            description="Teaches the loaded model a new word from a few pictures. The model itself does not change.",
            search_aliases=[
                "textual inversion",
                "train embedding",
                "learn concept",
                "teach",
                "personalize",
                "ti",
            ],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with any LoRAs applied to it."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("images", tooltip="3 to 5 pictures of the thing, style or face, as a list or batch."),
                *[widget(name) for name in MAIN_FIELDS],
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One a picture: white is learned, black is ignored. (Load Image's mask is the inverse.)",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="One a picture, or one for all: what is to be seen besides the new word, which stands "
                    "where {} or the trigger word is, else in front.",
                ),
                SettingsSocket.Input("settings", optional=True, tooltip="From Textual Inversion Settings."),
            ],
            outputs=[
                EmbeddingSocket.Output(display_name="embedding", tooltip="Connect to Save or Apply Embedding."),
                LossMapSocket.Output(
                    display_name="loss",
                    tooltip="Loss before the first step, then of each step: for Plot Loss Graph.",
                ),
                io.Image.Output(
                    display_name="previews", tooltip="The preview pictures as a batch, the last at the end."
                ),
                io.String.Output(display_name="report", tooltip="What was learned, in a few lines."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, vae, images, masks=None, captions=None, settings=None, **widgets) -> io.NodeOutput:
        values = {name: value[0] for name, value in widgets.items()} | (settings or [{}])[0]
        config, preview = _make(TrainConfig, values), _make(PreviewConfig, values)
        check_trigger(config.trigger)
        with torch.inference_mode(False):  # ComfyUI's inference tensors cannot be trained on
            ours = ComfyModel(model[0], clip[0], vae[0], config.gradient_checkpointing)
            dataset = make_dataset(ours.encode_images, _single(images), _single(masks or []), captions or [], config)
            run = _Run(config, preview, base_model(cls.hidden.prompt, cls.hidden.unique_id))
            embedding, text = run.learn(ours, dataset)
        pictures = torch.cat(run.pictures)
        shown = {"text": [text], **ui.PreviewImage(pictures, cls=cls).as_dict()}
        return io.NodeOutput(embedding, {"loss": run.losses}, pictures, text, ui=shown)


@dataclass
class _Run:
    """Consumes the training loop: progress, pictures, and files that outlive an interrupt."""

    config: TrainConfig
    preview: PreviewConfig
    base_model: str
    losses: list[float] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    def learn(self, model: ComfyModel, dataset: Dataset) -> tuple[Embedding, str]:
        """The learned embedding and a report; ``losses`` and ``pictures`` are filled on the way."""
        config, started = self.config, time.perf_counter()
        with model:
            neutral = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)
            model.check_fit(dataset.latents[0], config.trigger, neutral)
            config = self.config = with_initializer(model, dataset, config)
            start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)
            embedding = start.trainable()
            step, stopped = self._follow(train(model, embedding, dataset, config), model, embedding, dataset)
            learned = self._keep(step, formats.free_path(temporary_folder(), formats.file_name(config.trigger)))
            text = report(model, dataset, config, start, self.losses[0], step, stopped)
        self._draw(model, learned, dataset)
        return learned, f"{text}\n{time.perf_counter() - started:.0f} s, previews included."

    def _follow(
        self, steps: Iterator[Step], model: ComfyModel, embedding: Embedding, dataset: Dataset
    ) -> tuple[Step, str]:
        """The last good step, and why it is the last if training stopped by itself."""
        progress = comfy.utils.ProgressBar(self.config.steps)
        step = next(steps)
        try:
            while True:
                self.losses.append(step.loss)
                picture = None
                if self.preview.preview_every and step.number % self.preview.preview_every == 0:
                    with model.paused():
                        picture = self._draw(model, embedding.snapshot(), dataset)
                progress.update_absolute(step.number, self.config.steps, picture)
                throw_exception_if_processing_interrupted()
                step = next(steps)
        except StopIteration:
            return step, ""
        except TrainingStopped as error:
            stopped = f"{error} The vectors of step {step.best_number} are kept."
            logging.warning("Textual inversion: %s", stopped)
            return step, stopped
        except BaseException:  # ComfyUI's interrupt is no Exception
            if step.number > 0:
                name = f"{formats.file_name(self.config.trigger)}-partial"
                self._keep(step, formats.free_path(embeddings_folder(), name))
            raise

    def _draw(self, model: ComfyModel, embedding: Embedding, dataset: Dataset) -> tuple[str, Image.Image, int]:
        """One preview picture, in the form the progress bar takes."""
        preview, shape = self.preview, dataset.latents[0].shape
        prompt = place_word(preview.preview_prompt, self.config.trigger)
        picture = model.generate(prompt, embedding, shape, self.config.seed, preview.preview_steps, preview.preview_cfg)
        self.pictures.append(picture)
        return "JPEG", to_pillow(picture[0]), 512

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


def _make(config: type, values: dict):
    """A settings object from the values that are its fields."""
    return config(**{item.name: values[item.name] for item in fields(config) if item.name in values})


def _single(batches: list[Tensor]) -> list[Tensor]:
    """A list of batches as a list of ordinary tensors with one picture or mask each."""
    return [row[None].clone() for batch in batches for row in (batch if batch.ndim > 2 else batch[None])]
