"""Socket types, and widgets made from the settings' own fields."""

import dataclasses
from typing import get_args

from comfy_api.latest import io

from ..textual_inversion.config import PreviewConfig, TrainConfig, field_help

CATEGORY = "textual inversion"

EmbeddingSocket = io.Custom("TI_EMBEDDING")
SettingsSocket = io.Custom("TI_TRAINING_SETTINGS")
LossMapSocket = io.Custom("LOSS_MAP")  # core's Plot Loss Graph takes it

_FIELDS = {item.name: item for config in (TrainConfig, PreviewConfig) for item in dataclasses.fields(config)}
_HELP = field_help(TrainConfig) | field_help(PreviewConfig)

MAIN_FIELDS = (
    "trigger",
    "initializer",
    "kind",
    "template",
    "vectors",
    "steps",
    "editability",
    "batch_size",
    "size",
    "seed",
    "gradient_checkpointing",
    "preview_prompt",
    "preview_every",
)
RARE_FIELDS = tuple(name for name in _FIELDS if name not in MAIN_FIELDS)


def widget(name: str, **options) -> io.Input:
    """The input of the setting ``name``: its default, limits and tooltip are the field's own."""
    item = _FIELDS[name]
    common = {"default": item.default, "tooltip": _HELP[name], **options}
    if choices := get_args(item.type):
        return io.Combo.Input(name, options=list(choices), **common)
    if item.type is bool:
        return io.Boolean.Input(name, **common)
    if item.type is str:
        return io.String.Input(name, multiline=name in ("template", "preview_prompt"), **common)
    limits = {key: item.metadata[key] for key in ("min", "max", "step")}
    if item.type is float:
        return io.Float.Input(name, round=limits["step"], **limits, **common)
    # The front end would otherwise give a field named "seed" a widget that changes it after every run.
    return io.Int.Input(name, control_after_generate=False, **limits, **common)
