import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..textual_inversion import PreviewConfig, TrainConfig, UserError
from ..textual_inversion.adapters.comfyui import ComfyModel
from ..textual_inversion.dataset import check_pictures, make_dataset
from ..textual_inversion.formats import file_name
from ..textual_inversion.optimizers import check_settings
from ..textual_inversion.prompts import check_trigger
from ..textual_inversion.state import fingerprint
from .files import base_model, workflow_id
from .live import LiveRun
from .sockets import CATEGORY, MAIN_FIELDS, EmbeddingSocket, LossMapSocket, SettingsSocket, config_of, widget
from .state_file import StateFile
from .training_run import Request, run_training

LIST_AS_TEXT = re.compile(r"\[\s*(['\"].*['\"]|[\d., ]*|None.*)\s*\]", re.DOTALL)


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
                "train an embedding",
                "learn",
                "learn concept",
                "teach",
                "personalize",
                "ti",
            ],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with any LoRAs already applied."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("images", tooltip="3 to 5 pictures of the object, style or face, as a list or batch."),
                *[widget(name) for name in MAIN_FIELDS],
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One per picture: white is learned, black is ignored. (Masks of Load Image are inverted.)",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="One per picture, or one for all: what else the picture shows. Write {} or the trigger "
                    "word where the new word belongs; otherwise it is put in front.",
                ),
                SettingsSocket.Input("settings", optional=True, tooltip="From Training Settings."),
                EmbeddingSocket.Input(
                    "resume",
                    optional=True,
                    tooltip="An embedding to train further. It replaces the initializer and the number of vectors.",
                ),
            ],
            outputs=[
                EmbeddingSocket.Output(
                    display_name="embedding", tooltip="Connect to Save Embedding or Apply Embedding."
                ),
                LossMapSocket.Output(
                    display_name="loss",
                    tooltip="Loss before the first step, then of each step. Connect to Plot Loss Graph.",
                ),
                io.Image.Output(
                    display_name="previews", tooltip="All preview pictures as a batch; the last one shows the result."
                ),
                io.String.Output(display_name="report", tooltip="What was learned, in a few lines."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, images, masks=None, captions=None, settings=None, resume=None, **widgets
    ) -> io.NodeOutput:
        single = {"model": model, "clip": clip, "vae": vae, "settings": settings, "resume": resume, **widgets}
        _check_single({name: value for name, value in single.items() if value is not None})
        values = {name: value[0] for name, value in widgets.items()} | (settings or [{}])[0]
        config, preview = config_of(TrainConfig, values), config_of(PreviewConfig, values)
        check_trigger(config.trigger)
        file_name(config.trigger)  # refused now, not after training
        check_settings(config)
        pictures, masks, captions = _single(images), _single(masks or []), captions or []
        _check_no_list_as_text(captions)
        check_pictures(pictures, masks, captions)
        continued = resume[0] if resume else None
        inputs = [*pictures, *masks, *(continued.parameters() if continued else ())]
        workflow, node = workflow_id(cls.hidden.extra_pnginfo), cls.hidden.unique_id
        base = base_model(cls.hidden.prompt, node)
        state_file = StateFile.of(workflow, node, fingerprint(config, [base, *captions], inputs))
        # ComfyUI's inference tensors cannot be trained on.
        with LiveRun(workflow, node) as live, torch.inference_mode(False):
            sampling = preview.preview_sampler, preview.preview_scheduler
            comfy_model = ComfyModel(model[0], clip[0], vae[0], config.gradient_checkpointing, *sampling)
            dataset = make_dataset(
                comfy_model.encode_images, pictures, masks, captions, config, comfy_model.native_size
            )
            request = Request(config, preview, continued, base)
            result = run_training(comfy_model, dataset, request, live, state_file)
        shown = {"text": [result.report], "textual_inversion": [live.record.to_dict()]}
        return io.NodeOutput(
            result.embedding, {"loss": result.losses}, torch.cat(result.pictures), result.report, ui=shown
        )


def _check_single(inputs: Mapping[str, Sequence[Any]]) -> None:
    """Raises UserError for a list of several values where one is needed: ComfyUI hands every input as a list."""
    for name, values in inputs.items():
        if len(values) != 1:
            raise UserError(
                f"{len(values)} values are connected to {name!r}, but a run takes one: connect a single value, or "
                "queue the graph once for each of them."
            )


def _check_no_list_as_text(captions: Sequence[Any]) -> None:
    """Raises UserError where ComfyUI has turned a list that came through the API into one text."""
    for caption in captions:
        if isinstance(caption, str) and LIST_AS_TEXT.fullmatch(caption):
            raise UserError(
                "The captions are a list that has become one text: connect Load Images, or another node that gives a "
                "list of texts, one for each picture."
            )


def _single(batches: list[Tensor]) -> list[Tensor]:
    """Splits a list of batches into ordinary tensors with one picture or mask each."""
    return [row[None].clone() for batch in batches for row in (batch if batch.ndim > 2 else batch[None])]
