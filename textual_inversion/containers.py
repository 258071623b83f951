"""Opens safetensors, pickles and PNGs without running code from them or reading beyond the end of the file."""

import base64
import io
import json
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .errors import UserError

# Limits far above those of any prompt and text encoder: anything larger is not an embedding.
MAX_VECTORS = 1024
MAX_WIDTH = 32_768
MAX_TENSORS = 16
MAX_BYTES = 64 * 2**20  # for files that are read as a whole; safetensors are read tensor by tensor
MAX_JSON = 8 * 2**20
MAX_PIXELS = 32 * 2**20

PNG_TEXT = "sd-ti-embedding"
BUNDLE = "bundle_emb."  # prefix of an embedding in a LoRA file: bundle_emb.TRIGGER.KEY


# Tensors by key, and metadata.
Content = tuple[dict[str, Tensor], dict[str, str]]


def open_file(path: Path) -> Content:
    """The tensors of a file by key, at most ``MAX_TENSORS``, and its metadata. The type is detected by content.

    Of a LoRA file only the embeddings bundled in it.

    Raises UserError if the file cannot be read, contains something else, or is too large.
    """
    try:
        return _opener(path)(path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for broken files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path.name} cannot be read as an embedding: {reason}") from error


def _opener(path: Path) -> Callable[[Path], Content]:
    """What opens a file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, and 640 or 1152 look like the start of a pickle.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return _open_safetensors
    for magic, opener in _CONTAINERS.items():
        if start.startswith(magic):
            return opener
    return _open_safetensors


def check_shape(key: str, shape: tuple[int, ...], is_float: bool, path: Path) -> None:
    """Raises UserError unless this is a vector or a matrix of floats within the limits."""
    rows = shape[0] if len(shape) == 2 else 1
    fits = len(shape) in (1, 2) and 0 < rows <= MAX_VECTORS and 0 < shape[-1] <= MAX_WIDTH
    if not (fits and is_float):
        raise UserError(f"{path.name} is not an embedding: {key or 'it'} has shape {shape}.")


class _Parameters:
    """Replaces torch.nn.ParameterDict while unpickling; the first embeddings were saved in one."""


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path.name} is too large for an embedding.")


def _open_safetensors(path: Path) -> Content:
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        keys = [key for key in keys if key.startswith(BUNDLE)] or keys
        if len(keys) > MAX_TENSORS and not keys[0].startswith(BUNDLE):
            raise UserError(f"{path.name} is not an embedding: it contains {len(keys)} tensors, such as {keys[0]}.")
        for key in keys:  # check before loading anything
            described = file.get_slice(key)
            check_shape(key, tuple(described.get_shape()), described.get_dtype() in ("F16", "BF16", "F32", "F64"), path)
        return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})


def _open_pickle(path: Path) -> Content:
    """torch.load with weights_only runs no code; with mmap it cannot read beyond the end of the file."""
    _check_size(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                    raise UserError(f"{path.name} was not opened: it is compressed, and embeddings never are.")
                if ".." in Path(entry.filename).parts or entry.filename.startswith(("/", "\\")):
                    raise UserError(f"{path.name} was not opened: it contains the path {entry.filename!r}.")
    stand_in: Any = (_Parameters, "torch.nn.modules.container.ParameterDict")
    with torch.serialization.safe_globals([stand_in]):
        source = str(path) if is_zip else io.BytesIO(path.read_bytes())
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path.name} was not opened: it is broken, or contains more than numbers.") from error
    return _unwrap(content, path)


def _open_png(path: Path) -> Content:
    """A1111's pictures with an embedding in a text chunk, or else in the pixels."""
    _check_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path.name} is too large for a picture with an embedding.")
            text = getattr(image, "text", {}).get(PNG_TEXT)
            data = base64.b64decode(text) if text else _hidden_in_pixels(np.asarray(image.convert("RGB")))
    if data is None:
        raise UserError(f"{path.name} is a picture without an embedding.")
    if len(data) > MAX_JSON:
        raise UserError(f"{path.name} is too large for an embedding.")

    def tensor(item: dict) -> Any:
        return torch.tensor(item["TORCHTENSOR"], dtype=torch.float64) if "TORCHTENSOR" in item else item

    return _unwrap(json.loads(data, object_hook=tensor), path)


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
    black = np.flatnonzero(low_bits.sum((0, 2)) == 0)
    if len(black) < 2:
        return None
    left, right = low_bits[:, : black[0]], low_bits[:, black[-1] + 1 :]
    if left.size == 0 or left.shape != right.shape:
        return None
    mask = _scramble(left.size).reshape(left.shape)
    try:
        return zlib.decompressobj().decompress((((right ^ mask) << 4) | (left ^ mask)).tobytes(), MAX_JSON + 1)
    except zlib.error:
        return None


def _scramble(count: int) -> np.ndarray:
    """The mask of A1111's hidden data: 4 bits of each number of the generator from Numerical Recipes."""
    numbers, state = np.empty(count, np.uint8), 0
    for index in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        numbers[index] = state % 255 & 0x0F
    return numbers


def _unwrap(content: Any, path: Path) -> Content:
    """The tensors of a pickled or JSON dictionary, and A1111's metadata."""
    if isinstance(content, Tensor):
        return {"": content}, {}
    if not isinstance(content, Mapping):
        raise UserError(f"{path.name} is not an embedding: it contains a {type(content).__name__}.")
    notes = {"name": "trigger", "step": "steps", "sd_checkpoint_name": "base_model"}
    metadata = {ours: str(content[theirs]) for theirs, ours in notes.items() if content.get(theirs) is not None}
    vectors = content.get("string_to_param", content)
    if isinstance(vectors, _Parameters):
        vectors = vars(vectors).get("_parameters")
    if not isinstance(vectors, Mapping):
        raise UserError(f"{path.name} is not an embedding: it contains {', '.join(map(str, content))}.")
    tensors = {str(key): value for key, value in vectors.items() if isinstance(value, Tensor)}
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise UserError(f"{path.name} is not an embedding: it contains {len(tensors)} tensors.")
    return tensors, metadata


_CONTAINERS: dict[bytes, Callable[[Path], Content]] = {
    b"\x89PNG": _open_png,
    b"PK\x03\x04": _open_pickle,
    b"\x80\x02": _open_pickle,
    b"\x80\x04": _open_pickle,
}
