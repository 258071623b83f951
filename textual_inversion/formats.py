"""Embedding files of every tool: recognised by content, read without running code, written and read back.

docs/formats.md lists who writes what. ``read`` keeps the keys of the file;
``Embedding.for_encoders`` finds the text encoder that each belongs to.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import Tensor

from .containers import BUNDLE, PNG_TEXT, check_shape, open_file
from .embedding import ENCODERS, Embedding, ordered, with_guessed_encoders
from .errors import UserError
from .prompts import RESERVED_NAMES

ENCODER_ALIASES = {"t5": "t5xxl"}
GENERIC_KEYS = {"", "*", "emb_params", "emp_params", "string_to_param.*"}  # keys that are no trigger word
_NAME = re.compile(r"[\w\-+ ]{1,100}")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Reading -----------------------------------------------------------------------------------------


def read(path: Path, trigger: str = "", encoders: Collection[str] = ENCODERS) -> Embedding:
    """Reads an embedding; ``trigger`` chooses one where a file holds several.

    Keys that are not among ``encoders`` are listed in ``unnamed``.
    The metadata key ``left out`` names vectors that are not token embeddings.

    Raises UserError, naming what is in the file, for a file that is not an embedding.
    """
    tensors, metadata = open_file(path)
    found = _by_trigger(tensors)
    if trigger in found:
        name = trigger
    elif len(found) == 1:
        name = next(iter(found))
    else:
        raise UserError(f"{path.name} contains the embeddings {', '.join(found)}: choose one of them.")
    vectors = found[name]
    outputs = [key for key in vectors if key.endswith("_out")]
    if outputs:  # OneTrainer's vectors behind the text encoder: no prompt can carry them
        metadata["left out"] = ", ".join(outputs)
    vectors = {ENCODER_ALIASES.get(key, key): _matrix(key, t, path) for key, t in vectors.items() if key not in outputs}
    if not vectors:
        raise UserError(f"{path.name} contains no token vectors{', only ' + ', '.join(outputs) if outputs else ''}.")
    unnamed = [key for key in vectors if key not in encoders]
    key_trigger = next((key for key in unnamed if key not in GENERIC_KEYS), "")
    stored_trigger = metadata.get("trigger") or name or key_trigger or path.stem
    return Embedding(stored_trigger, ordered(vectors), metadata, frozenset(unnamed))


def read_pair(first: Path, second: Path, encoders: Collection[str] = ENCODERS) -> Embedding:
    """The two files, one per text encoder, that diffusers' SDXL script writes for one trigger."""
    one, two = read(first, encoders=encoders), read(second, encoders=encoders)
    names = {key: f"{key} of {second.name}" if key in two.unnamed else key for key in two.vectors}
    others = {names[key]: tensor for key, tensor in two.vectors.items()}
    if one.vectors.keys() & others.keys():
        raise UserError(
            f"{first.name} and {second.name} have vectors for the same text encoder: choose the other file of the pair."
        )
    unnamed = one.unnamed.union(names[key] for key in two.unnamed)
    return Embedding(one.trigger, one.vectors | others, two.metadata | one.metadata, unnamed)


def _by_trigger(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Vectors by trigger and key; the trigger is "" where the file holds one embedding without a name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        trigger = ""
        if key.startswith(BUNDLE):
            trigger, _, key = key.removeprefix(BUNDLE).partition(".")
        found.setdefault(trigger, {})[key] = tensor
    return found


def _matrix(key: str, tensor: Tensor, path: Path) -> Tensor:
    """(width,) or (vectors, width) as float32 (vectors, width), all numbers finite."""
    check_shape(key, tuple(tensor.shape), tensor.dtype in FLOATS and tensor.layout == torch.strided, path)
    matrix = tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", torch.float32, copy=True)
    if not torch.isfinite(matrix).all():
        raise UserError(f"{path.name} is not a usable embedding: {key} contains NaN or infinite values.")
    return matrix.contiguous()


# Writing -----------------------------------------------------------------------------------------


class File(NamedTuple):
    """One file of a format: what is appended to the given name, its bytes, and its vectors."""

    name_suffix: str
    data: bytes
    vectors: list[Tensor]


def _comfyui(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    metadata = {**embedding.metadata, "trigger": embedding.trigger}
    return [File("", save(embedding.vectors, metadata), list(embedding.vectors.values()))]


def _a1111(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    return [File("", _pickled(_a1111_content(embedding)), list(embedding.vectors.values()))]


def _diffusers(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    """One key, the trigger. SDXL: one file per encoder. With T5: the keys of the advanced scripts."""
    if set(embedding.vectors) <= {"clip_l", "clip_g"} or len(embedding.vectors) == 1:
        return [
            File(name_suffix, save({embedding.trigger: tensor}), [tensor])
            for name_suffix, tensor in zip(("", "_2"), embedding.vectors.values(), strict=False)
        ]
    their_keys = {ours: theirs for theirs, ours in ENCODER_ALIASES.items()}
    named = {their_keys.get(key, key): tensor for key, tensor in embedding.vectors.items()}
    return [File("", save(named), list(named.values()))]


def _concepts_library(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    """``learned_embeds.bin``; a single vector is stored with one dimension."""
    tensor = _single_encoder_vectors(embedding, "A file of the concepts library")
    return [File("", _pickled({embedding.trigger: tensor[0] if len(tensor) == 1 else tensor}), [tensor])]


def _png(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    def plain(value: Any) -> dict:
        return {"TORCHTENSOR": value.tolist()}

    text = PngInfo()
    text.add_text(PNG_TEXT, base64.b64encode(json.dumps(_a1111_content(embedding), default=plain).encode()).decode())
    data = io.BytesIO()
    (picture or Image.new("RGB", (512, 512), "gray")).save(data, "PNG", pnginfo=text)
    return [File("", data.getvalue(), list(embedding.vectors.values()))]


def _a1111_content(embedding: Embedding) -> dict[str, Any]:
    steps = embedding.metadata.get("steps", "")
    notes = {
        "name": embedding.trigger,
        "step": int(steps) if steps.isdecimal() else None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": embedding.metadata.get("base_model") or None,
    }
    if len(embedding.vectors) > 1:
        return {**embedding.vectors, **notes}
    # 265 is the token of "*", the place holder that A1111 and the first script write.
    param = next(iter(embedding.vectors.values()))
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": param}, **notes}


def _single_encoder_vectors(embedding: Embedding, what: str) -> Tensor:
    if len(embedding.vectors) > 1:
        raise UserError(
            f"{what} has vectors for only one text encoder; this embedding has {', '.join(embedding.vectors)}."
        )
    return next(iter(embedding.vectors.values()))


def _pickled(content: Any) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


class Format(NamedTuple):
    suffix: str
    make_files: Callable[[Embedding, Image.Image | None], list[File]]
    stock_reads_it: bool = True
    """Whether ``embedding:NAME`` works without this pack, where the format has one file."""


FormatName = Literal["comfyui", "diffusers", "a1111", "concepts-library", "png-card"]
FORMATS: dict[FormatName, Format] = {
    "comfyui": Format(".safetensors", _comfyui),  # A1111, Forge, kohya and InvokeAI take it too
    "diffusers": Format(".safetensors", _diffusers),
    "a1111": Format(".pt", _a1111),
    "concepts-library": Format(".bin", _concepts_library),
    "png-card": Format(".png", _png, stock_reads_it=False),
}


def write(
    embedding: Embedding, path: Path, format: FormatName = "comfyui", picture: Image.Image | None = None
) -> list[Path]:
    """Writes the file or files of a format, ``path`` being the first; each is complete or not there.

    Each is read back and its vectors are compared before it gets its name. ``picture`` is what a
    PNG card shows.

    Raises UserError when the format cannot hold the embedding, OSError when the disk cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for file in FORMATS[format].make_files(with_guessed_encoders(embedding.snapshot()), picture):
        target = path.with_name(f"{path.stem}{file.name_suffix}{path.suffix}")
        temporary = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
        try:
            temporary.write_bytes(file.data)
            again = list(read(temporary).vectors.values())
            if sorted(map(_bytes, again)) != sorted(map(_bytes, file.vectors)):
                raise UserError(f"{target.name} could not be read back as it was written, so it was not kept.")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        written.append(target)
    return written


def _bytes(tensor: Tensor) -> bytes:
    return str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes()


def file_name(name: str) -> str:
    """A file name that every system and ComfyUI's ``embedding:NAME`` accept.

    Characters allowed in a trigger but not in a file name (``S*``, ``<cat>``) become ``_``.
    Raises UserError if nothing sensible is left.
    """
    if any(sign in name for sign in "/\\.:"):
        raise UserError(f"The name {name!r} must not contain slashes, dots or colons: enter a plain name.")
    clean = re.sub(r"[^\w\-+]", "_", name).strip("_") or "embedding"
    if not _NAME.fullmatch(clean) or RESERVED_NAMES.fullmatch(clean):
        raise UserError(f"{name!r} cannot be the name of a file: enter a short name of letters and digits.")
    return clean


def free_path(folder: Path, name: str, suffix: str = ".safetensors") -> Path:
    """``NAME.safetensors``, or the first of ``NAME-2``, ``NAME-3`` ... that no embedding has yet.

    The suffix is not part of ``embedding:NAME``, so NAME.pt also blocks NAME.safetensors.
    """
    stem, number = name, 1
    while any((folder / f"{stem}{format.suffix}").exists() for format in FORMATS.values()):
        number += 1
        stem = f"{name}-{number}"
    return folder / f"{stem}{suffix}"
