"""Pictures between files, Pillow and tensors."""

import io
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .dataset import resize
from .errors import UserError

UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
ORIENTATION = 0x0112  # EXIF: 1 upright, 2 to 8 turned or mirrored


class PictureInfo(NamedTuple):
    """What is known about a picture without resizing it."""

    width: int
    """Pixels, after the camera's rotation."""
    height: int
    masked: bool
    """Whether any part is transparent."""


def load_folder(folder: Path, size: int, square: bool = False) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Pictures (1, H, W, 3) in 0..1, masks (1, H, W) and captions of a folder, by file name.

    Rotates as EXIF says; transparent parts become white in the picture and black in the mask.
    Files that are not pictures are skipped; a warning names them.

    Raises UserError when no picture is left, or a caption is not UTF-8.
    """
    images, masks, captions, broken = [], [], [], []
    for file in picture_files(folder):
        try:
            rgba = _rgba(Image.open(file))
        except UNREADABLE:
            broken.append(file.name)
            continue
        pixels = torch.from_numpy(np.asarray(rgba, dtype=np.float32) / 255)[None]  # (1, H, W, 4)
        alpha = pixels[..., 3:]
        pixels = resize(torch.cat([pixels[..., :3] * alpha + (1 - alpha), alpha], dim=-1), size, square)
        images.append(pixels[..., :3])
        masks.append(pixels[..., 3])
        captions.append(caption_of(file))
    if broken:
        logging.warning("Load Images skipped files that are not pictures: %s", ", ".join(broken))
    if not images:
        raise UserError(f"There are no pictures in {folder}: put some there, or choose another folder.")
    return images, masks, captions


def picture_files(folder: Path) -> list[Path]:
    """Files of a folder that should be pictures, by name: all but captions and hidden ones."""
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted((file for file in files if file.suffix.lower() != ".txt"), key=lambda file: file.name)


def caption_of(file: Path) -> str:
    """Text of NAME.txt beside a picture NAME.png; empty where there is none.

    Raises UserError when it is not UTF-8.
    """
    caption = file.with_suffix(".txt")
    try:
        return caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{caption.name} is not UTF-8 text: save it again as UTF-8.") from error


def picture_info(file: Path) -> PictureInfo | None:
    """Shape and transparency of a picture file; None for what is no picture.

    Pixels are decoded only where the format says that some may be transparent.
    """
    try:
        with Image.open(file) as picture:
            # A PNG without this entry would be decoded to look for EXIF behind its pixels.
            orientation = picture.getexif().get(ORIENTATION, 1) if "exif" in picture.info else 1
            width, height = picture.size[::-1] if orientation > 4 else picture.size
            masked = picture.has_transparency_data and _rgba(picture).getchannel("A").getextrema() != (255, 255)
    except UNREADABLE:
        return None
    return PictureInfo(width, height, masked)


def thumbnail(file: Path, side: int) -> bytes:
    """The picture as WebP, upright, at most ``side`` pixels a side.

    Raises UserError for what is no picture.
    """
    try:
        with Image.open(file) as picture:
            picture.thumbnail((side, side))  # a large JPEG is not even decoded in full
            small = _rgba(picture)
    except UNREADABLE as error:
        raise UserError(f"{file.name} cannot be read as a picture.") from error
    written = io.BytesIO()
    small.save(written, "WEBP", quality=80)
    return written.getvalue()


def _rgba(picture: Image.Image) -> Image.Image:
    """Upright, 8 bits a channel, with transparency."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel
        picture = picture.point(lambda value: value / 256).convert("L")
    return picture.convert("RGBA")


def to_pillow(pixels: Tensor) -> Image.Image:
    """(H, W, 3) in 0..1 as a picture."""
    return Image.fromarray((pixels * 255).round().byte().cpu().numpy())
