"""The folders and file names that the nodes use."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths

from ..textual_inversion import UserError
from ..textual_inversion.formats import STOCK_SUFFIXES, is_card

LONGEST_ID = 100  # characters; the front end's have 36


def embeddings_folders() -> list[Path]:
    return [Path(folder) for folder in folder_paths.get_folder_paths("embeddings")]


def embeddings_folder() -> Path:
    return embeddings_folders()[0]


def embedding_files() -> list[str]:
    """Names of the readable files in the embeddings folders. ComfyUI's own list has only what ComfyUI reads.

    A picture beside an embedding of its name is a preview, unless it holds an embedding itself.
    """
    names = set(folder_paths.get_filename_list("embeddings"))
    for folder in embeddings_folders():
        for picture in folder.rglob("*.png"):
            is_preview = picture.stem.endswith(".preview") or any(
                picture.with_suffix(suffix).exists() for suffix in STOCK_SUFFIXES
            )
            if not is_preview or is_card(picture):
                names.add(picture.relative_to(folder).as_posix())
    return sorted(names)


def embedding_file(name: str) -> Path:
    """The path of a file in an embeddings folder; a link there may lead anywhere, as in ComfyUI itself.

    Raises UserError for a name that leads out of the folder, or that is not there: the same text for both.
    """
    for folder in embeddings_folders():
        path = Path(os.path.normpath(folder / name))
        if path.is_relative_to(os.path.normpath(folder)) and path.is_file():
            return path
    raise UserError(f"There is no {name!r} in the embeddings folder: choose another file, or copy it there.")


def embeddings_named(name: str) -> Iterator[Path]:
    """Files that ``embedding:NAME`` may mean: ComfyUI looks for NAME in the embeddings folders and all folders inside.

    Which of several it takes is up to chance. Letters may be written in two ways that look the same (NFC, NFD).
    """
    wanted = PurePosixPath(unicodedata.normalize("NFC", name)).parts
    for folder in embeddings_folders():
        for inside, _, files in os.walk(folder, followlinks=True):
            for file in files:
                path = Path(inside, file)
                called = unicodedata.normalize("NFC", path.with_suffix("").relative_to(folder).as_posix())
                if path.suffix in STOCK_SUFFIXES and PurePosixPath(called).parts[-len(wanted) :] == wanted:
                    yield path


def is_taken(name: str) -> bool:
    """Whether a new embedding must not have this name, or ComfyUI or Load Embedding would mix it up with another."""
    return any(embeddings_named(name)) or is_card(embeddings_folder() / f"{name}.png")


def check_overwrite(path: Path, name: str) -> None:
    """Raises UserError if ``embedding:NAME`` could mean another file than ``path``."""
    later = STOCK_SUFFIXES[STOCK_SUFFIXES.index(path.suffix) :]  # ComfyUI takes the first, in this order
    for other in embeddings_named(name):
        is_behind = other.parent == path.parent and other.stem == path.stem and other.suffix in later
        if not is_behind and not (path.exists() and path.samefile(other)):
            shown = next(other.relative_to(folder) for folder in embeddings_folders() if other.is_relative_to(folder))
            raise UserError(
                f"embedding:{name} could also mean {shown.as_posix()}: choose another name, or delete that file."
            )


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
    return number if isinstance(number, str) and len(number) <= LONGEST_ID else ""


def connected(prompt: dict | None, node_id: str | None, name: str) -> dict:
    """The node that is connected to this input, as it is in a prompt; empty where there is none."""
    link = (prompt or {}).get(node_id, {}).get("inputs", {}).get(name)
    return (prompt or {}).get(link[0], {}) if isinstance(link, list) and link else {}


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
