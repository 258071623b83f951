"""The folders and file names that the nodes use."""

import os
from pathlib import Path
from typing import Any

import folder_paths

from ..textual_inversion import UserError
from ..textual_inversion.formats import FORMATS


def embeddings_folder() -> Path:
    return Path(folder_paths.get_folder_paths("embeddings")[0])


def embedding_files() -> list[str]:
    """Names of the readable files in the embeddings folders. ComfyUI's own list has only what ComfyUI reads."""
    names = set(folder_paths.get_filename_list("embeddings"))
    for folder in map(Path, folder_paths.get_folder_paths("embeddings")):
        for format in FORMATS.values():
            if not format.stock_reads_it:
                names |= {file.relative_to(folder).as_posix() for file in folder.rglob(f"*{format.suffix}")}
    return sorted(names)


def embedding_file(name: str) -> Path:
    """The path of a file in an embeddings folder. Raises UserError if it, or the target of a link, is outside."""
    for folder in map(Path, folder_paths.get_folder_paths("embeddings")):
        path = folder / name
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                is_link = Path(os.path.normpath(path)).is_relative_to(folder)
                outside = "is a link outside" if is_link else "is outside"
                raise UserError(f"{name!r} {outside} the embeddings folder; copy the file there.")
            return path
    raise UserError(f"There is no {name!r} in the embeddings folder.")


def temporary_folder() -> Path:
    return Path(folder_paths.get_temp_directory()) / "textual_inversion"


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "textual_inversion"


def states_folder() -> Path:
    """Where unfinished runs are saved. The files survive a restart, and ComfyUI's web server does not serve them."""
    return Path(folder_paths.get_system_user_directory("textual_inversion"))


def workflow_id(extra_pnginfo: Any) -> str:
    """The frontend's id of the workflow. Empty if the workflow was queued without the frontend.

    Whoever calls the API may send anything.
    """
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    number = workflow.get("id") if isinstance(workflow, dict) else None
    return number if isinstance(number, str) else ""


def base_model(prompt: dict | None, node_id: str | None) -> str:
    """File name of the model that a node trains on: that of the nearest loader upstream of its MODEL input."""
    while prompt and node_id in prompt:
        inputs = prompt[node_id].get("inputs", {})
        for key in ("ckpt_name", "unet_name"):
            if isinstance(inputs.get(key), str):
                return inputs[key]
        link = inputs.get("model")
        node_id = link[0] if isinstance(link, list) else None
    return ""
