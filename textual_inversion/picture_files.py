"""One picture file, from anybody: opened by its content, decoded in bounded memory, refused in one sentence."""

import io
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from .dataset import SMALLEST_SIDE
from .errors import UserError

KINDS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")  # no EPS: Pillow starts Ghostscript for it
MAX_PIXELS = 2**27  # that are decoded at once: half a gigabyte
MAX_STORED = 2**28  # of a JPEG, which can be decoded at a reduced size
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
ORIENTATION = 0x0112  # EXIF: 1 upright, 2 to 8 turned or mirrored
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE_IS_ZERO = 0x0106, 0  # a tag of TIFF and its value; Pillow turns such pictures around in 8 bits only
WHITES = (1, 2**8 - 1, 2**10 - 1, 2**12 - 1, 2**16 - 1)  # what white may be where a format does not say
DARKEST = 16  # of 255: a picture without anything brighter looks black
NO_WHITE = "nobody can tell which of its numbers is white: save it as a PNG or JPEG of 8 bits"
NOTHING_OPAQUE = "nothing in it is opaque, so nothing would be learned: save it without transparency"
_Read = TypeVar("_Read")


class PictureInfo(NamedTuple):
    """What is known about a picture without resizing it."""

    width: int
    """Pixels, after the camera's rotation."""
    height: int
    masked: bool
    """Whether any part is transparent."""


def picture_info(file: Path) -> PictureInfo:
    """Shape and transparency of a picture file.

    Pixels are decoded only where the format says that some may be transparent, or has more than 8 bits.
    Raises UserError with the reason where it cannot be read, or all of it is transparent.
    """

    def read(picture: Image.Image) -> PictureInfo:
        # A PNG without this entry would be decoded to look for EXIF behind its pixels.
        turned = "exif" in picture.info and _orientation(picture) > 4
        width, height = picture.size[::-1] if turned else picture.size
        masked = (picture.has_transparency_data or _is_deep(picture)) and _is_masked(picture)
        return PictureInfo(width, height, masked)

    return _read(file, read)


def decoded(file: Path | BinaryIO, size: int = 0, square: bool = False) -> Image.Image:
    """The picture as RGBA, upright.

    ``size`` and ``square`` as for ``resize``: a picture several times as large comes out at a
    fraction of its size, but at least twice as large as it will be.
    Raises UserError with the reason where it cannot be read.
    """

    def read(picture: Image.Image) -> Image.Image:
        fraction = _fraction(picture.size, size, square)
        if fraction > 1 and "progressive" not in picture.info:  # those are unpacked whole
            picture.draft(None, (picture.width // fraction, picture.height // fraction))
        _check_pixels(picture.width * picture.height)
        eight_bits = _eight_bits(picture)
        orientation, picture = _orientation(picture), eight_bits  # EXIF may stand behind the pixels
        picture = picture.reduce(_fraction(picture.size, size, square)).convert("RGBA")
        return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture

    return _read(file, read)


def thumbnail(file: Path, side: int) -> bytes:
    """The picture as WebP, upright, at most ``side`` pixels a side.

    Raises UserError with the reason where it cannot be read.
    """
    picture = decoded(file, side)
    picture.thumbnail((side, side))
    written = io.BytesIO()
    picture.save(written, "WEBP", quality=80)
    return written.getvalue()


def _read(file: Path | BinaryIO, read: Callable[[Image.Image], _Read]) -> _Read:
    """What ``read`` makes of the opened picture; any failure as UserError."""
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            picture = _opened(stream)
            _check_pixels(picture.width * picture.height, MAX_STORED if picture.format == "JPEG" else MAX_PIXELS)
            if min(picture.size) < SMALLEST_SIDE:
                raise UserError(f"it is smaller than {SMALLEST_SIDE} pixels: scale it up")
            return read(picture)
    except UserError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UserError("it has too many pixels: scale it down") from error
    except PermissionError as error:
        raise UserError("it must not be read: change the rights of the file") from error
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        raise UserError("it is damaged, or no picture of a kind that is read here: save it as PNG or JPEG") from error


def _opened(stream: BinaryIO) -> Image.Image:
    head = stream.read(64)
    stream.seek(0)
    if not head:
        raise UserError("it is empty: save it again")
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and b"avif" not in head and "HEIF" not in _kinds():
        raise UserError("HEIC is not supported here: convert it to JPEG or install pillow-heif")
    # Image.open refuses the largest photos before they can be reduced.
    return JpegImageFile(stream) if head.startswith(b"\xff\xd8") else Image.open(stream, formats=_kinds())


@lru_cache
def _kinds() -> list[str]:
    """Those of ``KINDS`` that are installed."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def _check_pixels(count: int, most: int = MAX_PIXELS) -> None:
    if count > most:
        raise UserError(f"it has {count // 10**6} million pixels, more than {most // 10**6}: scale it down")


def _fraction(shape: tuple[int, int], size: int, square: bool) -> int:
    """The n of 1/n, the scale at which a picture of this shape is still twice as large as it will be."""
    if not size:
        return 1
    side = min(shape) if square else math.sqrt(shape[0] * shape[1])
    return max(1, int(side / (2 * size)))


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF: the picture itself may be fine
        return 1
    return value if value in _TURNS else 1


def _is_deep(picture: Image.Image) -> bool:
    """Whether an opened picture has more than 8 bits a channel; once it is loaded, Pillow has forgotten."""
    return picture.mode[0] in "IF" or any(";16" in str(tile) for tile in getattr(picture, "tile", []))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """L, RGB or, where parts may be transparent, RGBA. Raises UserError where nobody can tell what is white."""
    is_deep = _is_deep(picture)
    picture.load()
    if picture.mode[0] in "IF":
        return _grey(picture)
    if picture.has_transparency_data:
        eight = picture.convert("RGBA")
    else:
        eight = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    # Of 16 bits Pillow takes the upper 8, which are empty where a camera or a program used only the lower ones.
    if is_deep and np.max(eight.getextrema()[:3]) < DARKEST:
        raise UserError(NO_WHITE)
    return eight


def _grey(picture: Image.Image) -> Image.Image:
    """L of numbers of 16 or 32 bits. White is the least that fits: with any other one the picture would be black."""
    numbers = picture if picture.mode == "F" else picture.convert("I")
    low, high = float(np.asarray(numbers).min()), float(np.asarray(numbers).max())  # of numbers with a NaN, that
    # A little more than white comes from scaling; small whole numbers are labels, negative ones directions or depths.
    if not -high / 10 <= low <= high <= 1.1 * WHITES[-1] or 1.1 < high < DARKEST:
        raise UserError(NO_WHITE)
    scale = 255 / next(white for white in WHITES if high <= 1.1 * white)
    grey = numbers.point(lambda value: value * scale + 0.5).convert("L")
    grey.info.pop("transparency", None)  # in 16 bits
    tag, value = WHITE_IS_ZERO
    return ImageOps.invert(grey) if getattr(picture, "tag_v2", {}).get(tag) == value else grey


def _is_masked(picture: Image.Image) -> bool:
    _check_pixels(picture.width * picture.height)
    pixels = _eight_bits(picture)
    if pixels.mode != "RGBA":
        return False
    alpha = np.asarray(pixels.getchannel("A"))
    if not alpha.any():
        raise UserError(NOTHING_OPAQUE)
    return bool(alpha.min() < 255)
