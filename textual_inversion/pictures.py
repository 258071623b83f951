"""A folder of pictures with their captions, and pictures between Pillow and tensors."""

import codecs
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .dataset import resize
from .errors import UserError
from .picture_files import NOTHING_OPAQUE, decoded

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION = 2**16  # bytes
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class LeftOut(NamedTuple):
    """A file that is not used."""

    name: str
    reason: str
    """Goes on after the name and a colon."""


class Pictures(NamedTuple):
    """What a folder holds, by file name."""

    images: list[Tensor]
    """(1, H, W, 3) in 0..1 each."""
    masks: list[Tensor]
    """(1, H, W) each, 1 where the picture is opaque."""
    captions: list[str]
    """One for each picture; empty where there is none."""
    left_out: list[LeftOut]
    """Files that cannot be read, or of which nothing could be learned."""


class FolderFiles(NamedTuple):
    """The files of a folder, by their names only."""

    pictures: list[Path]
    """All but captions and hidden ones, sorted by name."""
    captions: dict[str, Path]
    """By what comes before the suffix."""
    left_out: list[LeftOut]
    """Links to elsewhere."""


def load_folder(folder: Path, size: int, square: bool = False, roots: Sequence[Path] = (), enough: int = 0) -> Pictures:
    """The pictures of a folder with their masks and captions.

    Rotates as EXIF says; transparent parts become white in the picture and black in the mask.
    ``size`` and ``square`` as for ``resize``, ``roots`` as for ``folder_files``. ``enough`` is what pictures that keep
    their size will be scaled down to: those several times as large come out at a fraction of their size.
    Raises UserError when no picture is left, or as ``folder_files`` does.
    """
    files = folder_files(folder, roots)
    images, masks, captions, left_out = [], [], [], list(files.left_out)
    for file in files.pictures:
        try:
            image, mask = _tensors(decoded(file, size or enough, square), size, square)
        except UserError as error:
            left_out.append(LeftOut(file.name, str(error)))
            continue
        caption, problems = caption_of(file, files.captions)
        images.append(image)
        masks.append(mask)
        captions.append(caption)
        left_out += problems
    if not images:
        advice = "put some there, or choose another folder"
        if left_out:
            advice = f"none of its files can be used, the first because {left_out[0].reason}"
        raise UserError(f"There are no pictures in the folder {folder.name!r}: {advice}.")
    if left_out:
        logging.warning("%d of the files in a folder of pictures are left out.", len(left_out))
    return Pictures(images, masks, captions, left_out)


def folder_files(folder: Path, roots: Sequence[Path] = ()) -> FolderFiles:
    """Pictures and captions of a folder.

    Where ``roots`` are given, links to files outside of these folders are left out.
    Raises UserError where the folder cannot be listed.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and not is_hidden(file.name))
    except OSError as error:
        problem = (error.strerror or "unknown error").lower()
        raise UserError(f"The folder {folder.name!r} cannot be read ({problem}): choose another one.") from error
    outside = [file for file in files if roots and file.is_symlink() and not is_inside(file, roots)]
    files = [file for file in files if file not in outside]
    texts = [file for file in files if is_caption(file.name)]
    texts.sort(key=lambda file: CAPTION_SUFFIXES.index(file.suffix.lower()))
    captions: dict[str, Path] = {}
    for file in texts:
        captions.setdefault(_composed(file.stem), file)
    for file in texts:  # file names that a system without capitals takes for the same
        captions.setdefault(_composed(file.stem).casefold(), file)
    pictures = [file for file in files if not is_caption(file.name)]
    return FolderFiles(
        pictures, captions, [LeftOut(file.name, "it is a link to elsewhere: copy the file itself") for file in outside]
    )


def is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a path, or what it links to, is inside one of these folders."""
    real = path.resolve()
    return any(real.is_relative_to(root.resolve()) for root in roots)


def is_hidden(name: str) -> bool:
    """Whether a file is none of the user's: Finder and Windows' Explorer write some into folders that are looked at."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def is_caption(name: str) -> bool:
    return Path(name).suffix.lower() in CAPTION_SUFFIXES


def caption_file(picture: Path, captions: Mapping[str, Path]) -> Path | None:
    """NAME.png.txt, NAME.txt or NAME.caption of NAME.png, of the ``captions`` of its folder."""
    name, stem = _composed(picture.name), _composed(picture.stem)
    names = (name, name.casefold(), stem, stem.casefold())
    return next((captions[name] for name in names if name in captions), None)


def _composed(name: str) -> str:
    """With accents as parts of their letters: names from a Mac have them as characters of their own."""
    return unicodedata.normalize("NFC", name)


def caption_of(picture: Path, captions: Mapping[str, Path]) -> tuple[str, list[LeftOut]]:
    """The caption of a picture, empty where there is none, and the file that holds it if that cannot be read."""
    file = caption_file(picture, captions)
    if file is None:
        return "", []
    try:
        with file.open("rb") as stream:
            return caption_text(stream.read(MAX_CAPTION + 1)), []
    except UserError as error:
        return "", [LeftOut(file.name, str(error))]
    except OSError:
        return "", [LeftOut(file.name, "it must not be read: change the rights of the file")]


def caption_text(data: bytes) -> str:
    """The text of a caption file: UTF-8, or UTF-16 with or without its mark.

    Raises UserError with the reason where it is something else, or long.
    """
    if len(data) > MAX_CAPTION:
        raise UserError(f"it is longer than {MAX_CAPTION:,} bytes: shorten the caption")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 0 in data[:2]:
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError("it is not UTF-8 text: save it again as UTF-8") from error
    if "\0" in text:
        raise UserError("it is not text: save the caption again as UTF-8")
    return text.strip()


def _tensors(picture: Image.Image, size: int, square: bool) -> tuple[Tensor, Tensor]:
    """Picture (1, H, W, 3) and mask (1, H, W) in 0..1 of an RGBA picture.

    Raises UserError where what is left of it after cropping is transparent.
    """
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]  # (1, H, W, 4)
    alpha = pixels[..., 3:]
    pixels = resize(torch.cat([pixels[..., :3] * alpha + (1 - alpha), alpha], dim=-1), size, square)
    if not pixels[..., 3].any():
        raise UserError(NOTHING_OPAQUE)
    return pixels[..., :3], pixels[..., 3]


def to_pillow(pixels: Tensor) -> Image.Image:
    """(H, W, 3) as a picture. Scaling may have left numbers outside of 0..1, which bytes would wrap around."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy())
