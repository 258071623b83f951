"""Pictures between files, Pillow and tensors."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .dataset import fit
from .errors import UserError


def load_folder(folder: Path, size: int, square: bool = False) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Pictures (1, H, W, 3) in 0..1, masks (1, H, W) and captions of a folder, by file name.

    Rotates as EXIF says; transparent parts become white in the picture and black in the mask.
    Files that should be pictures and are not are named in a warning and left out.

    Raises UserError when no picture is left.
    """
    images, masks, captions, broken = [], [], [], []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.suffix.lower() == ".txt" or not file.is_file() or file.name.startswith("."):
            continue
        try:
            picture = ImageOps.exif_transpose(Image.open(file))
            if picture.mode.startswith("I"):  # 16 bits a pixel
                picture = picture.point(lambda value: value / 256).convert("L")
            rgba = picture.convert("RGBA")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            broken.append(file.name)
            continue
        pixels = torch.from_numpy(np.asarray(rgba, dtype=np.float32) / 255)[None]  # (1, H, W, 4)
        alpha = pixels[..., 3:]
        pixels = fit(torch.cat([pixels[..., :3] * alpha + (1 - alpha), alpha], dim=-1), size, square)
        images.append(pixels[..., :3])
        masks.append(pixels[..., 3])
        caption = file.with_suffix(".txt")
        captions.append(caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else "")
    if broken:
        logging.warning("Load Images leaves out what is no picture: %s", ", ".join(broken))
    if not images:
        raise UserError(f"There is no picture in {folder}: put some there, or choose another folder.")
    return images, masks, captions


def to_pillow(pixels: Tensor) -> Image.Image:
    """(H, W, 3) in 0..1 as a picture."""
    return Image.fromarray((pixels * 255).round().byte().cpu().numpy())
