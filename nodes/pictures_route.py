"""Server routes for the picture list of *Load Images* (web/load_images.js)."""

import asyncio
import io
import itertools
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import folder_paths
from aiohttp import web
from server import PromptServer

from ..textual_inversion import UserError
from ..textual_inversion.concept_folders import BESIDE_FOLDERS, BESIDE_PICTURES, concepts_inside, folders_inside
from ..textual_inversion.picture_files import PictureInfo, decoded, picture_info, thumbnail
from ..textual_inversion.pictures import (
    FolderFiles,
    LeftOut,
    caption_file,
    caption_of,
    caption_text,
    folder_files,
    is_caption,
    is_inside,
)
from .picture_folders import chosen_folder, input_folder, input_roots, roots

SIDES = {"small": 192, "large": 1600}  # pixels; small is twice the size of a tile, for sharp displays
LONGEST_NAME = 200  # bytes; file systems allow 255
_NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_decoding = asyncio.Lock()  # one picture at a time, so that many requests do not fill the memory

Handler = Callable[[web.Request], Awaitable[web.Response]]


def list_pictures(folder: str, path: str) -> dict[str, Any]:
    """What the folder that the widgets name holds, and the names of all folders inside the input folder.

    It holds pictures, or folders with them: concepts. One that does not exist is empty. Raises UserError as
    `chosen_folder` and `folder_files` do.
    """
    chosen = chosen_folder(folder, path)
    pictures, concepts, left_out = [], [], []
    if chosen and chosen.exists():
        pictures, left_out = _pictures_of(chosen)
        inside = concepts_inside(chosen, roots())
        if inside:
            left_out = [LeftOut(file.name, BESIDE_FOLDERS) for file in left_out]
        elif pictures:
            left_out += [LeftOut(f"{one.name}/", BESIDE_PICTURES) for one in folders_inside(chosen, roots())]
        for one in inside:
            place = {"folder": "", "path": str(one)} if path.strip() else {"folder": f"{folder}/{one.name}", "path": ""}
            try:
                found, problems = _pictures_of(one)
            except UserError as error:  # the node leaves it out too
                left_out.append(LeftOut(f"{one.name}/", str(error)))
                continue
            left_out += [LeftOut(f"{one.name}/{file.name}", file.reason) for file in problems]
            if found:
                concepts.append({"name": one.name, "place": place, "pictures": found})
            else:
                left_out.append(LeftOut(f"{one.name}/", "there are no pictures in it"))
    return {
        "pictures": pictures,
        "concepts": concepts,
        "left_out": [file._asdict() for file in left_out],
        "folders": [*folder_paths.get_input_subfolders(), "."],
    }


def _pictures_of(folder: Path) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """What the list shows of each picture in a folder, and what is left out."""
    files = folder_files(folder, roots())
    own = _own_captions(files)
    pictures, left_out = [], list(files.left_out)
    for file in files.pictures:
        try:
            stat = file.stat()
            info = _cached_info(file, stat.st_mtime_ns, stat.st_size)
        except OSError:  # gone meanwhile
            continue
        if isinstance(info, str):
            left_out.append(LeftOut(file.name, info))
            continue
        caption, problems = caption_of(file, files.captions)
        left_out += problems
        about = {"name": file.name, "caption": caption, "caption_file": own[file].name if file in own else ""}
        pictures.append({**about, "modified": stat.st_mtime_ns // 1000, **info._asdict()})
    return pictures, left_out


@lru_cache(maxsize=10_000)
def _cached_info(file: Path, modified: int, size: int) -> PictureInfo | str:
    """What is known about a picture, or why it cannot be read."""
    try:
        return picture_info(file)
    except UserError as error:
        return str(error)


def add_picture(folder: str, name: str, data: bytes) -> str:
    """Writes a picture into a folder inside the input folder, which is made if needed; returns its name there.

    A number is added to a name that is taken, unless it is the same file. Raises UserError where `data`
    is no picture or the folder is outside.
    """
    place, name = input_folder(folder), _file_name(name)
    decoded(io.BytesIO(data), SIDES["small"])
    place.mkdir(parents=True, exist_ok=True)
    same = place / name
    if same.is_file() and not same.is_symlink() and same.read_bytes() == data:
        return name
    file = _new_file(place, name)
    try:
        with file:
            file.write(data)
    except OSError:  # a full disk
        Path(file.name).unlink()
        raise
    return Path(file.name).name


def _new_file(place: Path, name: str) -> BinaryIO:
    """Opens NAME, or NAME (1), NAME (2) ... where there is a file or a picture called that."""
    taken = {file.stem.casefold() for file in place.iterdir() if not is_caption(file.name)}
    stem, suffix = Path(name).stem, Path(name).suffix
    for number in itertools.count():
        free = f"{stem} ({number})" if number else stem
        if free.casefold() not in taken:  # cat.jpg beside cat.png would share its caption
            with suppress(FileExistsError):
                return (place / f"{free}{suffix}").open("xb")
    raise AssertionError


def delete_picture(folder: str, name: str) -> list[str]:
    """Deletes a picture of a folder inside the input folder, and its caption; returns the names of the files.

    A caption that another picture has too stays. Raises UserError if there is no such picture.
    """
    file, files = _picture(folder, name)
    caption = _own_captions(files).get(file)
    gone = [file, caption] if caption else [file]
    for one in gone:
        one.unlink()
    return [one.name for one in gone]


def write_caption(folder: str, name: str, data: bytes) -> str:
    """Makes the text of `data` the caption of a picture inside the input folder, and returns it.

    Raises UserError as `caption_text` does, or if there is no such picture.
    """
    file, files = _picture(folder, name)
    text = caption_text(data)
    target = _own_captions(files).get(file)
    if target is None:
        twins = [other for other in files.pictures if other.stem.casefold() == file.stem.casefold()]
        target = file.with_name(f"{file.name}.txt") if len(twins) > 1 else file.with_suffix(".txt")
    unfinished = target.with_name(f".{target.name}")
    unfinished.unlink(missing_ok=True)
    unfinished.write_text(text + "\n" if text else "", encoding="utf-8")
    unfinished.replace(target)  # also where that is a link, which may lead elsewhere
    return text


def _picture(folder: str, name: str) -> tuple[Path, FolderFiles]:
    """A picture that can be changed, and the files of its folder."""
    place = input_folder(folder)
    files = folder_files(place, input_roots()) if place.is_dir() else FolderFiles([], {}, [])
    for file in files.pictures:
        if file.name == name:
            return file, files
    raise UserError(f"There is no picture {name!r} in the folder {folder!r}: press R to refresh.")


def _own_captions(files: FolderFiles) -> dict[Path, Path]:
    """By picture: the caption file that belongs to it alone."""
    found = {file: caption for file in files.pictures if (caption := caption_file(file, files.captions))}
    pictures = Counter(found.values())
    return {file: caption for file, caption in found.items() if pictures[caption] == 1}


def _file_name(name: str) -> str:
    """A name that every file system takes. Raises UserError for that of a caption."""
    name = _NOT_IN_NAMES.sub("_", name).strip(". ")
    if is_caption(name):
        raise UserError("its name is that of a caption: rename it")
    stem, suffix = Path(name).stem or "picture", Path(name).suffix[:20]
    return stem.encode()[: LONGEST_NAME - 20].decode(errors="ignore") + suffix


async def _list(request: web.Request) -> web.Response:
    query = request.query
    async with _decoding:
        return web.json_response(await asyncio.to_thread(list_pictures, query.get("folder", ""), query.get("path", "")))


async def _thumbnail(request: web.Request) -> web.Response:
    query = request.query
    side = SIDES.get(query.get("side", ""), SIDES["small"])
    async with _decoding:
        picture = await asyncio.to_thread(_shown, query.get("folder", ""), query.get("path", ""), query["name"], side)
    # The browser may cache it: the URL contains the modification time, so it changes with the file.
    return web.Response(body=picture, content_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})


def _shown(folder: str, path: str, name: str, side: int) -> bytes:
    """The thumbnail of a picture. Raises UserError with the reason where there is none."""
    place = chosen_folder(folder, path)
    file = place / Path(name).name if place else Path()
    if not (file.is_file() and is_inside(file, roots())):
        raise UserError("it is not in this folder")
    return thumbnail(file, side)


async def _add(request: web.Request) -> web.Response:
    data = await request.read()
    async with _decoding:
        name = await asyncio.to_thread(add_picture, request.query["folder"], request.query["name"], data)
    return web.json_response({"name": name})


async def _delete(request: web.Request) -> web.Response:
    names = await asyncio.to_thread(delete_picture, request.query["folder"], request.query["name"])
    return web.json_response({"deleted": names})


async def _caption(request: web.Request) -> web.Response:
    data = await request.read()
    text = await asyncio.to_thread(write_caption, request.query["folder"], request.query["name"], data)
    return web.json_response({"caption": text})


def _answering(handler: Handler) -> Handler:
    """Answers what the user can mend with one sentence and status 400."""

    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except UserError as error:
            message = str(error)
        except KeyError as error:
            message = f"The parameter {error} is missing: add it to the address."
        except OSError as error:
            message = f"The file system refuses this ({(error.strerror or 'unknown error').lower()}): check the folder."
        return web.json_response({"error": message}, status=400)

    return answer


def add_picture_routes() -> None:
    """Adds the routes of the list, its thumbnails and its changes to ComfyUI's server."""
    routes = PromptServer.instance.routes
    routes.get("/textual_inversion/pictures")(_answering(_list))
    routes.get("/textual_inversion/thumbnail")(_answering(_thumbnail))
    routes.post("/textual_inversion/pictures")(_answering(_add))
    routes.delete("/textual_inversion/pictures")(_answering(_delete))
    routes.put("/textual_inversion/caption")(_answering(_caption))
