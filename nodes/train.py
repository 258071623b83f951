import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..textual_inversion import PreviewConfig, TrainConfig, UserError
from ..textual_inversion.adapters.comfyui import ComfyModel
from ..textual_inversion.dataset import check_pictures
from ..textual_inversion.library import Concept, by_concept, check_triggers
from ..textual_inversion.optimizers import check_settings
from ..textual_inversion.prompts import check_characters
from ..textual_inversion.state import fingerprint
from .concept_run import Request
from .files import LONGEST_ID, base_model, connected, workflow_id
from .live import LiveRuns
from .load_images import LEFT_OUT
from .sockets import CATEGORY, MAIN_FIELDS, EmbeddingSocket, LossMapSocket, SettingsSocket, config_of, widget
from .state_file import StateFile
from .training_run import run_training

IN_A_LIST = re.compile(r"['\"].*['\"]|[\d., ]*|None.*", re.DOTALL)  # what stands between the brackets of one as text
MOST_BRACKETS = 50  # inside one another: each is a level of recursion in ComfyUI, and more weight
WEIGHT = re.compile(r":([^:()]*)\)")
MOST_WEIGHT = 10_000  # half precision overflows soon after
LOAD_IMAGE = ("LoadImage", "LoadImageOutput")  # ComfyUI's, whose masks are inverted


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
                    display_name="embedding",
                    is_output_list=True,
                    tooltip="Connect to Save Embedding or Apply Embedding. One for each trigger word.",
                ),
                LossMapSocket.Output(
                    display_name="loss",
                    is_output_list=True,
                    tooltip="Loss before the first step, then of each step. Connect to Plot Loss Graph.",
                ),
                io.Image.Output(
                    display_name="previews",
                    is_output_list=True,
                    tooltip="All preview pictures as a batch; the last one shows the result.",
                ),
                io.String.Output(
                    display_name="report", is_output_list=True, tooltip="What was learned, in a few lines."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, images, masks=None, captions=None, settings=None, resume=None, **widgets
    ) -> io.NodeOutput:
        triggers = widgets.pop("trigger")
        single = {"model": model, "clip": clip, "vae": vae, "settings": settings, "resume": resume, **widgets}
        _check_single({name: value for name, value in single.items() if value is not None})
        values = {name: value[0] for name, value in widgets.items()} | (settings or [{}])[0] | {"trigger": triggers[0]}
        config, preview = config_of(TrainConfig, values), config_of(PreviewConfig, values)
        check_triggers(list(dict.fromkeys(triggers)))  # refused now, not after training
        _check_texts({name: value for name, value in values.items() if isinstance(value, str)})
        check_settings(config)
        pictures, masks, captions = _single(images), _single(masks or []), captions or []
        _check_no_list_as_text(captions)
        _check_texts({f"Caption {n}": text for n, text in enumerate(captions, 1) if isinstance(text, str)})
        _check_mask_of_load_image(masks, connected(cls.hidden.prompt, cls.hidden.unique_id, "masks"))
        concepts = by_concept(triggers, pictures, masks, captions, config.kind)
        if len(concepts) == 1:  # of several, those without a fault learn
            check_pictures(pictures, masks, captions)
        continued = resume[0] if resume else None
        if continued and len(concepts) > 1:
            raise UserError("An embedding to resume belongs to one trigger word: connect a single one to 'trigger'.")
        base = base_model(cls.hidden.prompt, cls.hidden.unique_id)
        request = Request(config, preview, continued, base, LEFT_OUT.get(images[0], ()))
        workflow, node = workflow_id(cls.hidden.extra_pnginfo), cls.hidden.unique_id[:LONGEST_ID]
        # ComfyUI's inference tensors cannot be trained on.
        with LiveRuns(workflow, node, [concept.trigger for concept in concepts]) as lives, torch.inference_mode(False):
            sampling = preview.preview_sampler, preview.preview_scheduler
            comfy_model = ComfyModel(model[0], clip[0], vae[0], config.gradient_checkpointing, *sampling)
            results = run_training(
                comfy_model, concepts, request, lives, _state_files(workflow, node, concepts, request)
            )
        text = "\n".join(result.summary for result in results) if len(concepts) > 1 else results[0].report
        shown = {"text": [text], "textual_inversion": [live.record.to_dict() for live in lives]}
        return io.NodeOutput(
            [result.embedding for result in results],
            [{"loss": result.losses} for result in results],
            [torch.cat(result.pictures) for result in results],
            [result.report for result in results],
            ui=shown,
        )


def _state_files(workflow: str, node: str, concepts: Sequence[Concept], request: Request) -> list[StateFile]:
    """Where each concept's unfinished run is kept: the same for the same settings, pictures and captions."""
    given = list(request.continued.parameters()) if request.continued else []
    prints = [
        fingerprint(
            replace(request.config, trigger=concept.trigger),
            [request.base_model, *concept.captions, *concept.beside],
            [*concept.images, *concept.masks, *given],
        )
        for concept in concepts
    ]
    if len(concepts) == 1:
        return [StateFile.of(workflow, node, prints[0])]
    whole = hashlib.sha256("".join(prints).encode()).hexdigest()
    return [
        StateFile.of(workflow, node, own, concept.trigger, whole) for concept, own in zip(concepts, prints, strict=True)
    ]


def _check_single(inputs: Mapping[str, Sequence[Any]]) -> None:
    """Raises UserError for a list of several values where one is needed: ComfyUI hands every input as a list."""
    for name, values in inputs.items():
        if len(values) != 1:
            raise UserError(
                f"{len(values)} values are connected to {name!r}, but a run takes one: connect a single value, or "
                "queue the graph once for each of them."
            )


def _check_texts(texts: Mapping[str, str]) -> None:
    """Raises UserError for a text that ComfyUI's tokenizers cannot take, or read as weights that overflow."""
    for name, text in texts.items():
        check_characters(name, text)
        text = text.replace("\\(", "").replace("\\)", "")  # these brackets are text
        depths = accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in text)
        if (deepest := max(depths, default=0)) > MOST_BRACKETS:
            raise UserError(
                f"{name} has {deepest} brackets inside one another, more than {MOST_BRACKETS}: take some out."
            )
        for weight in WEIGHT.findall(text):
            if not abs(_number(weight)) <= MOST_WEIGHT:
                raise UserError(
                    f"{name} has {weight.strip()!r} at the end of a bracket, which ComfyUI takes for the weight of "
                    "what is in it: write brackets that are text as \\( and \\)."
                )


def _number(text: str) -> float:
    """What ComfyUI takes a text for; 0 where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0


def _check_no_list_as_text(captions: Sequence[Any]) -> None:
    """Raises UserError where ComfyUI has turned a list that came through the API into one text."""
    for caption in captions:
        is_list = isinstance(caption, str) and caption.startswith("[") and caption.endswith("]")
        if is_list and IN_A_LIST.fullmatch(caption[1:-1].strip()):
            raise UserError(
                "The captions are a list that has become one text: connect Load Images, or another node that gives a "
                "list of texts, one for each picture."
            )


def _check_mask_of_load_image(masks: Sequence[Tensor], source: Mapping[str, Any]) -> None:
    """Raises UserError where ``source``, the node that masks come from, is ComfyUI's Load Image and one is empty."""
    file = source.get("inputs", {}).get("image")
    if source.get("class_type") in LOAD_IMAGE and not all(mask.any() for mask in masks):
        raise UserError(
            f"Nothing is white in the mask of {file!r:.100}, so nothing would be learned: invert it, since Load Image "
            "makes white what is transparent (put Invert Mask in between), or connect no masks."
        )


def _single(batches: list[Tensor]) -> list[Tensor]:
    """Splits a list of batches into ordinary tensors with one picture or mask each, as ComfyUI has them by default."""
    # They are on the card with --gpu-only, and half precision with --fp16-intermediates.
    rows = (row for batch in batches for row in (batch if batch.ndim > 2 else batch[None]))
    return [row[None].to("cpu", torch.float32, copy=True) for row in rows]
