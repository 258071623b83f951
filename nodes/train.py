import json
import logging
import time
from dataclasses import asdict, dataclass, field, fields

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
    train,
)
from ..textual_inversion.dataset import Dataset, make_dataset
from ..textual_inversion.prompts import check_trigger, place_word
from .files import base_model, embeddings_folder, file_name, temporary_folder
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
        from ..textual_inversion.adapters.comfyui import ComfyModel

        values = {name: value[0] for name, value in widgets.items()} | (settings or [{}])[0]
        config, preview = _make(TrainConfig, values), _make(PreviewConfig, values)
        check_trigger(config.trigger)
        with torch.inference_mode(False):  # ComfyUI's inference tensors cannot be trained on
            ours = ComfyModel(model[0], clip[0], vae[0], config.gradient_checkpointing)
            dataset = make_dataset(ours.encode_images, _single(images), _single(masks or []), captions or [], config)
            run = _Run(config, preview, base_model(cls.hidden.prompt, cls.hidden.unique_id))
            run.learn(ours, dataset)
        loss_map = {"loss": run.losses}
        pictures = torch.cat(run.pictures)
        shown = {"text": [run.report], **ui.PreviewImage(pictures, cls=cls).as_dict()}
        return io.NodeOutput(run.embedding, loss_map, pictures, run.report, ui=shown)


@dataclass
class _Run:
    """Consumes the training loop: progress, pictures, and files that outlive an interrupt."""

    config: TrainConfig
    preview: PreviewConfig
    base_model: str
    losses: list[float] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    embedding: Embedding | None = None
    report: str = ""

    def learn(self, model, dataset: Dataset) -> None:
        """Fills ``losses``, ``pictures``, ``embedding`` and ``report``."""
        config, shape, stopped, step = self.config, dataset.latents[0].shape, "", None
        progress, started = comfy.utils.ProgressBar(config.steps), time.perf_counter()
        prompts = [prompt for choices in dataset.prompts for prompt in choices]
        with model:
            embedding = model.initial_embedding(config.trigger, config.initializer, config.vectors).trainable()
            model.check_prompts(prompts, embedding)
            model.check_fit(dataset.latents[0], prompts[0], embedding)
            try:
                for step in train(model, embedding, dataset, config):
                    self.losses.append(step.fixed_loss if step.loss is None else step.loss)
                    shown = None
                    if self.preview.preview_every and step.number % self.preview.preview_every == 0:
                        with model.paused():
                            shown = self._draw(model, embedding.snapshot(), shape)
                    progress.update_absolute(step.number, config.steps, shown)
                    throw_exception_if_processing_interrupted()
            except TrainingStopped as error:
                stopped = f" {error} The vectors of step {step.best_number} are kept."
                logging.warning("Textual inversion: %s", stopped.strip())
            except BaseException:  # ComfyUI's interrupt is no Exception
                if step is not None and step.number > 0:
                    self._keep(step, formats.free_path(embeddings_folder(), f"{self._file}-partial"))
                raise
        self._keep(step, formats.free_path(temporary_folder(), self._file))
        self._draw(model, self.embedding, shape)
        self.report = self._describe(step, len(dataset.latents), time.perf_counter() - started) + stopped

    @property
    def _file(self) -> str:
        return file_name(self.config.trigger)

    def _draw(self, model, embedding: Embedding, shape):
        """One preview picture, in the form the progress bar takes."""
        config, preview = self.config, self.preview
        prompt = place_word(preview.preview_prompt, config.trigger)
        picture = model.generate(prompt, embedding, shape, config.seed, preview.preview_steps, preview.preview_cfg)
        self.pictures.append(picture)
        return "JPEG", Image.fromarray((picture[0] * 255).round().byte().numpy()), 512

    def _keep(self, step: Step, path) -> None:
        """Takes the best vectors so far and writes them to disk."""
        metadata = {
            "base_model": self.base_model,
            "steps": str(step.best_number),
            "seed": str(self.config.seed),
            "settings": json.dumps(asdict(self.config)),
            "version": __version__,
        }
        self.embedding = Embedding(step.best.trigger, step.best.vectors, metadata)
        formats.write(self.embedding, path)
        logging.info("Textual inversion: %s is in %s", self.config.trigger, path)

    def _describe(self, step: Step, pictures: int, seconds: float) -> str:
        config = self.config
        return (
            f"{config.trigger}: {self.embedding.describe()}, learned from {pictures} pictures.\n"
            f"{step.number} steps of {config.batch_size * config.accumulation} in {seconds:.0f} s, previews included.\n"
            f"Loss on fixed noise: {self.losses[0]:.4f} before, {step.best_loss:.4f} at step {step.best_number}, "
            "which is kept."
        )


def _make(config: type, values: dict):
    """A settings object from the values that are its fields."""
    return config(**{item.name: values[item.name] for item in fields(config) if item.name in values})


def _single(batches: list[Tensor]) -> list[Tensor]:
    """A list of batches as a list of ordinary tensors with one picture or mask each."""
    return [row[None].clone() for batch in batches for row in (batch if batch.ndim > 2 else batch[None])]
