"""Server routes for the picture list of *Load Images* (web/load_images.js)."""

import asyncio
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from server import PromptServer

from ..textual_inversion import UserError
from ..textual_inversion.pictures import PictureInfo, caption_of, picture_files, picture_info, thumbnail

THUMBNAIL = 192  # pixels per side, twice the size of a tile for sharp displays


def input_folder(name: str) -> Path:
    """A folder inside ComfyUI's input folder, by its relative path.

    Raises UserError if it does not exist, or if it or the target of a link is outside the input folder.
    """
    root = Path(folder_paths.get_input_directory())
    folder = root / name
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name!r} is outside ComfyUI's input folder: use 'path' for other folders.")
    if not folder.is_dir():
        raise UserError(f"The folder {name!r} does not exist in ComfyUI's input folder: choose another one.")
    return folder


def list_pictures(name: str) -> dict[str, Any]:
    """The pictures of a folder inside the input folder, sorted by name, and the names of all such folders.

    Skips links to pictures outside the input folder.  Raises UserError as `input_folder` and
    `caption_of` do.
    """
    pictures = []
    for file in picture_files(input_folder(name)):
        if not _inside(file):
            continue
        stat = file.stat()
        info = _cached_info(file, stat.st_mtime_ns, stat.st_size)
        if info is not None:
            about = {"name": file.name, "caption": caption_of(file), "modified": stat.st_mtime_ns // 1000}
            pictures.append({**about, **info._asdict()})
    return {"pictures": pictures, "folders": [".", *folder_paths.get_input_subfolders()]}


def _inside(file: Path) -> bool:
    return file.resolve().is_relative_to(Path(folder_paths.get_input_directory()).resolve())


@lru_cache(maxsize=10_000)
def _cached_info(file: Path, modified: int, size: int) -> PictureInfo | None:
    return picture_info(file)


async def _thumbnail(request: web.Request) -> web.Response:
    try:
        file = input_folder(request.query.get("folder", ".")) / Path(request.query.get("name", "")).name
        if not (file.is_file() and _inside(file)):
            raise UserError(f"There is no {file.name!r} in this folder.")
        picture = await asyncio.to_thread(thumbnail, file, THUMBNAIL)
    except UserError as error:
        return web.json_response({"error": str(error)}, status=404)
    # The browser may cache it: the URL contains the modification time, so it changes with the file.
    return web.Response(body=picture, content_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})


async def _answer(request: web.Request) -> web.Response:
    try:
        return web.json_response(await asyncio.to_thread(list_pictures, request.query.get("folder", ".")))
    except UserError as error:
        return web.json_response({"error": str(error)}, status=400)


def add_picture_routes() -> None:
    """Adds the routes of the list and its thumbnails to ComfyUI's server."""
    PromptServer.instance.routes.get("/textual_inversion/pictures")(_answer)
    PromptServer.instance.routes.get("/textual_inversion/thumbnail")(_thumbnail)
