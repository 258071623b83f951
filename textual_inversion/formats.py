"""Embedding files. Reads and writes safetensors in the layout ComfyUI, A1111 and Forge share."""

from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .embedding import Embedding
from .errors import UserError

MOST_VECTORS = 1024  # far above any prompt; a file with more rows is no embedding


def write(embedding: Embedding, path: Path) -> None:
    """Writes ``path`` at once or not at all: a temporary file beside it is renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save(
        {key: tensor.contiguous() for key, tensor in embedding.snapshot().vectors.items()},
        metadata={**embedding.metadata, "trigger": embedding.trigger},
    )
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Embedding:
    """Reads an embedding; its keys name the text encoders.

    Raises UserError, naming the file's keys, for a file that is no embedding.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} cannot be read as a safetensors file: {error}") from error
    vectors = {}
    for key, tensor in tensors.items():
        if tensor.ndim not in (1, 2) or not tensor.is_floating_point() or len(tensor) == 0:
            raise UserError(f"{path.name} is no embedding: {key} has shape {tuple(tensor.shape)}.")
        matrix = tensor.float().reshape(-1, tensor.shape[-1])
        if len(matrix) > MOST_VECTORS or not torch.isfinite(matrix).all():
            raise UserError(f"{path.name} is no usable embedding: {key} is too large or holds NaN.")
        vectors[key] = matrix
    if not vectors:
        raise UserError(f"{path.name} holds no vectors.")
    return Embedding(metadata.get("trigger") or path.stem, vectors, metadata)


def free_path(folder: Path, name: str) -> Path:
    """``NAME.safetensors``, or the first of ``NAME-2``, ``NAME-3`` ... that does not exist yet."""
    path, number = folder / f"{name}.safetensors", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.safetensors"
    return path
