"""Where results go, and what they may be called."""

from pathlib import Path

import folder_paths

from ..textual_inversion import UserError


def embeddings_folder() -> Path:
    return Path(folder_paths.get_folder_paths("embeddings")[0])


def embedding_files() -> list[str]:
    """Names of everything in the embeddings folders that can be read; ComfyUI's own list has no pictures."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("embeddings")]
    cards = {card.relative_to(folder).as_posix() for folder in folders for card in folder.rglob("*.png")}
    return sorted({*folder_paths.get_filename_list("embeddings"), *cards})


def embedding_file(name: str) -> Path:
    """The file of that name. Raises UserError when it is outside the embeddings folders, by a link too."""
    for folder in map(Path, folder_paths.get_folder_paths("embeddings")):
        path = folder / name
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{name!r} leads out of the embeddings folder: put a copy of the file into it.")
            return path
    raise UserError(f"There is no {name!r} in the embeddings folder.")


def temporary_folder() -> Path:
    return Path(folder_paths.get_temp_directory()) / "textual_inversion"


def states_folder() -> Path:
    """Unfinished runs: kept over restarts, out of the reach of ComfyUI's web server."""
    return Path(folder_paths.get_system_user_directory("textual_inversion"))


def workflow_id(extra_pnginfo: dict | None) -> str:
    """The front end's id of the workflow; empty where the graph did not come from there."""
    return (extra_pnginfo or {}).get("workflow", {}).get("id") or ""


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
