"""Where results go, and what they may be called."""

import re
from pathlib import Path

import folder_paths

from ..textual_inversion import UserError

_NAME = re.compile(r"[\w\-+ ]{1,100}")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)")


def embeddings_folder() -> Path:
    return Path(folder_paths.get_folder_paths("embeddings")[0])


def temporary_folder() -> Path:
    return Path(folder_paths.get_temp_directory()) / "textual_inversion"


def file_name(name: str) -> str:
    """A name that every system and ComfyUI's ``embedding:NAME`` take.

    Signs a trigger word may have but a file may not (``S*``, ``<cat>``) become ``_``.
    Raises UserError where nothing sensible is left.
    """
    if any(sign in name for sign in "/\\.:"):
        raise UserError(f"The name {name!r} must not contain slashes, dots or colons: give a plain name.")
    clean = re.sub(r"[^\w\-+]", "_", name).strip("_") or "embedding"
    if not _NAME.fullmatch(clean) or _RESERVED.fullmatch(clean):
        raise UserError(f"{name!r} cannot name a file: choose a short name of letters and digits.")
    return clean


def base_model(prompt: dict | None, node_id: str | None) -> str:
    """File name of the model a node trains on: the nearest loader upstream of its MODEL."""
    while prompt and node_id in prompt:
        inputs = prompt[node_id].get("inputs", {})
        for key in ("ckpt_name", "unet_name"):
            if isinstance(inputs.get(key), str):
                return inputs[key]
        link = inputs.get("model")
        node_id = link[0] if isinstance(link, list) else None
    return ""
