"""Opens safetensors, pickles and PNGs without running code from them or reading beyond the end of the file."""

import base64
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .errors import UserError, listed
from .pickles import PickleError, View, read_archive, read_legacy

# Limits far above those of any prompt and text encoder: anything larger is not an embedding.
MAX_VECTORS = 1024
MAX_WIDTH = 32_768
MAX_TENSORS = 16
MAX_WORDS = 256  # tensors of the words that are bundled in a LoRA file
MAX_NUMBERS = 8 * 2**20  # of all vectors together: 2,048 vectors of T5
MAX_BYTES = 40 * 2**20  # for files that are read as a whole; safetensors are read tensor by tensor
MAX_HEADER = 4 * 2**20  # of safetensors, with all metadata
MAX_KEY = 256  # characters
MAX_NOTE = 1000  # characters
MAX_JSON = 32 * 2**20
MAX_JSON_NUMBERS = 2 * 2**20
MAX_JSON_LISTS = 20_000
MAX_CHUNKS = 20_000  # of a PNG
MAX_PIXELS = 8 * 2**20  # of a picture with an embedding in its pixels

FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
PNG_TEXT = "sd-ti-embedding"
_PNG = b"\x89PNG\r\n\x1a\n"
BUNDLE = "bundle_emb."  # prefix of an embedding in a LoRA file: bundle_emb.TRIGGER.KEY
INNER_NAME = "inner name"  # metadata key: what another program called the word inside the file


# Tensors by key, and metadata.
Content = tuple[dict[str, Tensor], dict[str, str]]


def open_file(path: Path) -> Content:
    """The tensors of a file by key and its metadata. The type is detected by content, never by the name.

    Of a LoRA file only the embeddings bundled in it.

    Raises UserError if the file cannot be read, contains something else, or is too large.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
        return _opener(path, start)(path)
    except UserError:
        raise
    except PickleError as error:
        raise UserError(f"{path.name} was not opened: {error}") from error
    except OSError as error:
        problem = (error.strerror or "unknown error").lower()
        raise UserError(f"{path.name} cannot be read ({problem}): check its name and rights.") from error
    except Exception as error:  # the libraries raise many kinds of errors for broken files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path.name} cannot be read as an embedding: {reason[:300]}") from error


def _opener(path: Path, start: bytes) -> Callable[[Path], Content]:
    """What opens a file, by its first bytes. Raises UserError for what is known not to be an embedding."""
    # A safetensors file begins with the length of its header: 640 and 1152 look like a pickle, 18512 like a zip.
    if start[5:9] == b"\0\0\0{":
        return _open_safetensors
    for magic, opener in _CONTAINERS.items():
        if start.startswith(magic):
            return opener
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in _OTHERS.items():
        if text.startswith(beginning) or start.startswith(beginning):
            size = path.stat().st_size
            raise UserError(f"{path.name} {what.format(size=f'{size:,} bytes' if size != 1 else '1 byte')}.")
    if not start.strip(b"\0"):
        what = "contains only zeros: the download broke off" if start else "is empty"
        raise UserError(f"{path.name} {what}; download or copy it again.")
    raise UserError(
        f"{path.name} is not an embedding, or is cut: it is none of safetensors, pt, bin and PNG; "
        "download or copy it again."
    )


def check_shape(key: str, shape: tuple[int, ...], is_float: bool, path: Path) -> None:
    """Raises UserError unless this is a vector or a matrix of floats within the limits."""
    rows = shape[0] if len(shape) == 2 else 1
    fits = len(shape) in (1, 2) and 0 < rows <= MAX_VECTORS and 0 < shape[-1] <= MAX_WIDTH
    if len(key) > MAX_KEY:
        raise UserError(f"{path.name} is not an embedding: it has a key of {len(key)} characters.")
    if not fits:
        raise UserError(f"{path.name} is not an embedding: {key or 'it'} has shape {shape[:8]}.")
    if not is_float:
        raise UserError(f"{path.name} is not an embedding: {key or 'it'} holds no floating-point numbers.")


def _check_count(numbers: int, path: Path) -> None:
    if numbers > MAX_NUMBERS:
        raise UserError(f"{path.name} is too large for an embedding: it has {numbers:,} numbers.")


def _read_whole(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path.name} is too large for an embedding.")
    return path.read_bytes()


# safetensors -------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> Content:
    with path.open("rb") as file:
        header, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if header > size - 8:
        raise UserError(f"{path.name} ends in the middle, after {size:,} bytes: download or copy it again.")
    if header > MAX_HEADER:
        raise UserError(f"{path.name} is not an embedding: its header has {header:,} bytes.")
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        bundled = [key for key in keys if key.startswith(BUNDLE)]
        keys = bundled or keys
        if len(keys) > (MAX_WORDS if bundled else MAX_TENSORS):
            raise UserError(f"{path.name} is not an embedding: it contains {len(keys)} tensors, {listed(keys)}.")
        numbers = 0
        for key in keys:  # check before loading anything
            described = file.get_slice(key)
            shape = described.get_shape()
            check_shape(key, tuple(shape), described.get_dtype() in FLOATS, path)
            numbers += int(np.prod(shape))
        _check_count(numbers, path)
        return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})


# Pickles -----------------------------------------------------------------------------------------


def _open_archive(path: Path) -> Content:
    return _unwrap(read_archive(_read_whole(path)), path)


def _open_legacy(path: Path) -> Content:
    return _unwrap(read_legacy(_read_whole(path)), path)


# PNG ---------------------------------------------------------------------------------------------


def _open_png(path: Path) -> Content:
    """A1111's pictures with an embedding in a text chunk, or else in the pixels."""
    text = card_text(path)
    if text is not None and len(text) > 2 * MAX_JSON:
        raise UserError(f"{path.name} is too large for an embedding.")
    data = _hidden_in_pixels(_pixels(path)) if text is None else base64.b64decode(text)
    if data is None:
        raise UserError(f"{path.name} is a picture without an embedding.")
    lists, numbers = data.count(b"[") + data.count(b"{"), data.count(b",")
    if len(data) > MAX_JSON or numbers > MAX_JSON_NUMBERS + 100 or lists > MAX_JSON_LISTS:
        raise UserError(f"{path.name} is too large for an embedding.")

    def tensor(item: dict) -> Any:
        return torch.tensor(item["TORCHTENSOR"], dtype=torch.float64) if "TORCHTENSOR" in item else item

    return _unwrap(json.loads(data, object_hook=tensor), path)


def card_text(path: Path) -> bytes | None:
    """A1111's text chunk of a PNG, None where it has none. The picture itself, or its many frames, is not read.

    Raises UserError for a broken chunk, or one that unpacks to far more than an embedding.
    """
    with path.open("rb") as file:
        if file.read(8) != _PNG:  # previews may be JPEGs by that name
            return None
        for kind, length in _chunks(file, path):
            if kind not in (b"tEXt", b"zTXt", b"iTXt"):
                file.seek(length + 4, io.SEEK_CUR)
                continue
            if length > 2 * MAX_JSON:
                raise UserError(f"{path.name} is too large for an embedding.")
            data, checksum = file.read(length), file.read(4)
            keyword, _, rest = data.partition(b"\0")
            if keyword != PNG_TEXT.encode():
                continue
            if zlib.crc32(kind + data) != int.from_bytes(checksum, "big"):
                raise UserError(f"{path.name} is damaged, and its embedding with it: download or copy it again.")
            packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
            if kind == b"iTXt":  # two bytes about compression, then a language and a translated keyword
                rest = rest[2:].split(b"\0", 2)[-1]
            return _unpacked(rest[1:] if kind == b"zTXt" else rest, 2 * MAX_JSON) if packed else rest
    return None


def _chunks(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk of a PNG; the file is at its data, and the caller moves behind its checksum."""
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        yield head[4:], int.from_bytes(head[:4], "big")
    raise UserError(f"{path.name} is no ordinary PNG: it has more than {MAX_CHUNKS:,} parts.")


def _unpacked(data: bytes, limit: int) -> bytes:
    """zlib's bytes, at most one more than ``limit``."""
    return zlib.decompressobj().decompress(data, limit + 1)


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) bytes of a PNG that is small enough."""
    with path.open("rb") as file:
        width, height = np.frombuffer(file.read(24)[16:], ">u4").tolist()
    if width * height > MAX_PIXELS or path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path.name} is too large for a picture with an embedding: {width} x {height} pixels.")
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def _hidden_in_pixels(pixels: np.ndarray) -> bytes | None:
    """The data that A1111 hides to the left and right of the picture; ``pixels`` are (H, W, 3) bytes.

    Black columns separate data and picture.  The low four bits of every pixel value hold the zlib bytes,
    masked by a linear congruential generator: low halves on the left, high halves on the right.
    """
    bright = (pixels > 0).all(axis=2)  # (H, W)
    rows, columns = np.flatnonzero(bright.any(axis=-1)), np.flatnonzero(bright.any(axis=0))
    if len(rows) == 0:
        return None
    low_bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~low_bits.any(axis=(0, 2)))
    if len(black) < 2:
        return None
    left, right = low_bits[:, : black[0]], low_bits[:, black[-1] + 1 :]
    if left.size == 0 or left.shape != right.shape:
        return None
    mask = _scramble(left.size).reshape(left.shape)
    try:
        return _unpacked((((right ^ mask) << 4) | (left ^ mask)).tobytes(), MAX_JSON)
    except zlib.error:
        return None


def _scramble(count: int) -> np.ndarray:
    """The mask of A1111's hidden data: 4 bits of each number of the generator from Numerical Recipes."""
    factor, step = 1664525, 1013904223  # of the next number; of the k-th next one after each round
    numbers = np.array([step], np.uint32)
    while len(numbers) < count:
        numbers = np.concatenate([numbers, numbers * np.uint32(factor) + np.uint32(step)])
        factor, step = factor * factor % 2**32, (factor * step + step) % 2**32
    return (numbers[:count] % 255 & 0x0F).astype(np.uint8)


# Dictionaries ------------------------------------------------------------------------------------


def _unwrap(content: Any, path: Path) -> Content:
    """The tensors of a pickled or JSON dictionary, and A1111's metadata."""
    if isinstance(content, list):  # of dictionaries: ComfyUI reads those too
        content = _joined(content, path.stem)
    if isinstance(content, View | Tensor):
        content = {"": content}
    if not isinstance(content, Mapping):
        raise UserError(f"{path.name} is not an embedding: it contains a {type(content).__name__}.")
    vectors = content.get("string_to_param", content)
    if not isinstance(vectors, Mapping):
        raise UserError(f"{path.name} is not an embedding: it contains {listed(map(str, content))}.")
    found = {str(key): value for key, value in vectors.items() if isinstance(value, View | Tensor)}
    if not 0 < len(found) <= (MAX_WORDS if all(key.startswith(BUNDLE) for key in found) else MAX_TENSORS):
        raise UserError(f"{path.name} is not an embedding: it contains {len(found)} tensors.")
    for key, value in found.items():
        check_shape(key, tuple(value.shape), value.dtype in FLOATS.values(), path)
    _check_count(sum(int(np.prod(value.shape)) for value in found.values()), path)
    tensors = {key: value.tensor() if isinstance(value, View) else value for key, value in found.items()}
    return tensors, _notes(content)


def _joined(content: list, name: str) -> dict[str, Any]:
    """The tensors of a list of dictionaries, by key and, from the second dictionary on, a number.

    Dictionaries with the same keys, such as ``emb`` and ``emb2`` of SDXL, are an embedding each: ``name-1`` and so on.
    """
    parts = [{str(key): value for key, value in part.items()} for part in content if isinstance(part, dict)]
    alike = len(parts) > 1 and all(part.keys() == parts[0].keys() for part in parts)
    found = {}
    for number, part in enumerate(parts, 1):
        for key, value in part.items():
            if alike and "." not in key:
                found[f"{BUNDLE}{name}-{number}.{key}"] = value
            else:
                found[key if key not in found else f"{key} {number}"] = value
    return found


def _notes(content: Mapping) -> dict[str, str]:
    """What A1111 notes beside the vectors. Only short texts and numbers: anything may stand there."""
    names = {"name": INNER_NAME, "step": "steps", "sd_checkpoint_name": "base_model"}
    found = {}
    for theirs, ours in names.items():
        value = content.get(theirs)
        if (isinstance(value, str) and 0 < len(value) <= MAX_NOTE) or (
            isinstance(value, int | float) and abs(value) < 2**63
        ):
            found[ours] = str(value)
    return found


_CONTAINERS: dict[bytes, Callable[[Path], Content]] = {
    _PNG: _open_png,
    b"PK\x03\x04": _open_archive,
    b"\x80": _open_legacy,
}
_PICTURE = "is a {}: embeddings are read from PNG pictures only, and saving one as {} removes what is in it"
_PACKED = "is a packed archive: unpack it and use the file inside"
# How files begin that people download or rename by mistake.
_OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer, {size} that only name the real file: download the file itself",
    b"<": "is a web page, not an embedding: download the file itself (some sites want you to log in first)",
    b"{": "is a JSON text, not an embedding: download the file itself",
    b"[": "is a JSON text, not an embedding: download the file itself",
    b"\xff\xd8\xff": _PICTURE.format("JPEG", "JPEG"),
    b"RIFF": _PICTURE.format("WebP", "WebP"),
    b"\x1f\x8b": _PACKED,
    b"7z\xbc\xaf": _PACKED,
    b"Rar!": _PACKED,
}
