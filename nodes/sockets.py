"""Socket types, and widgets made from the settings' own fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import comfy.samplers
from comfy_api.latest import io

from ..textual_inversion.config import PreviewConfig, TrainConfig, field_help, saved_names

CATEGORY = "textual inversion"
Config = TypeVar("Config", TrainConfig, PreviewConfig)

EmbeddingSocket = io.Custom("TI_EMBEDDING")
SettingsSocket = io.Custom("TI_TRAINING_SETTINGS")
LossMapSocket = io.Custom("LOSS_MAP")  # core's Plot Loss Graph takes it

_FIELDS = {item.name: item for config in (TrainConfig, PreviewConfig) for item in dataclasses.fields(config)}
_HELP = field_help(TrainConfig) | field_help(PreviewConfig)
_COMFYUIS_CHOICES = {
    "preview_sampler": comfy.samplers.KSampler.SAMPLERS,
    "preview_scheduler": comfy.samplers.KSampler.SCHEDULERS,
}
_SAVED_NAMES = saved_names(TrainConfig) | saved_names(PreviewConfig)

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
FOLDED_FIELDS = {"editability", "size", "seed", "gradient_checkpointing"}  # behind "Show advanced inputs"
# Optional: older API graphs lack them. In the order in which they came, since workflows save values by their place.
ADDED_LATER = ("preview_negative", "preview_sampler", "preview_scheduler", "concepts_at_once")
RARE_FIELDS = (*(name for name in _FIELDS if name not in (*MAIN_FIELDS, *ADDED_LATER)), *ADDED_LATER)


def widget(name: str) -> io.Input:
    """The input of the setting ``name``: its default, limits and tooltip are the field's own.

    Its id is the name that saved workflows have for it; people see ``name``.
    """
    item, input_id = _FIELDS[name], _SAVED_NAMES[name]
    common: dict[str, Any] = {"default": item.default, "tooltip": _HELP[name]}
    if name in ADDED_LATER:
        common["optional"] = True
    if name in FOLDED_FIELDS:
        common["advanced"] = True
    if input_id != name:
        common["display_name"] = name
    if choices := _COMFYUIS_CHOICES.get(name) or get_args(item.type):
        return io.Combo.Input(input_id, options=list(choices), **common)
    if item.type is bool:
        return io.Boolean.Input(input_id, **common)
    if item.type is str:
        return io.String.Input(input_id, multiline=name in ("template", "preview_prompt"), **common)
    common |= {key: item.metadata[key] for key in ("min", "max", "step")}
    if item.type is float:
        return io.Float.Input(input_id, round=item.metadata["step"], **common)
    # The front end would otherwise give a field named "seed" a widget that changes it after every run.
    return io.Int.Input(input_id, control_after_generate=False, **common)


def config_of(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from the values of widgets, by their ids; values that are no fields of it are left out.

    Raises UserError as ``check_limits`` does.
    """
    ids = saved_names(kind)
    return kind(**{name: values[input_id] for name, input_id in ids.items() if input_id in values})
