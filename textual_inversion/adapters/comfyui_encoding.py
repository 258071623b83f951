"""Prompts through the text encoders of a CLIP: as ComfyUI encodes them, but all at once."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from ..devices import to_device
from ..embedding import Embedding
from .comfyui_tokens import text_encoders

Row = list[Any]  # the tokens of a section: numbers, and vectors in their midst


def moved(embeddings: Sequence[Embedding], device: torch.device) -> list[Embedding]:
    """The same vectors on ``device``, differentiable, in one copy there and one copy back."""
    vectors = [tensor for embedding in embeddings for tensor in embedding.vectors.values()]
    if all(tensor.device == device for tensor in vectors):
        return list(embeddings)
    joined = to_device(torch.cat([tensor.flatten() for tensor in vectors]), device)
    parts = iter(joined.split([tensor.numel() for tensor in vectors]))
    return [embedding.mapped(lambda tensor: next(parts).view(tensor.shape)) for embedding in embeddings]


def encode(clip: CLIP, prompts: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """The conditioning of each prompt on ``device``, differentiable; distinct ones are encoded once.

    Families differ in what they do with the outputs of their encoders. So their own code runs for every
    prompt, as in ``CLIP.encode_from_tokens``; it finds the encoders' outputs made already, in one pass
    for all prompts of one length. It runs on copies that share all weights: options and outputs are theirs.
    """
    clip = _with_own_encoders(clip)
    encoder: Any = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    encoder.set_clip_options({"execution_device": clip.patcher.load_device})
    tokens = {prompt: clip.tokenize(prompt) for prompt in dict.fromkeys(prompts)}
    encoded = {}
    with comfy.model_management.cuda_device_context(clip.patcher.load_device), _outputs_on(device):
        for part in text_encoders(clip):
            sections = [section for parts in tokens.values() for section in _unweighted(parts.get(part.name, []))]
            _encode_ahead(part.model, sections)
        for prompt, parts in tokens.items():
            cross_attn, pooled, *extra = encoder.encode_token_weights(parts)
            encoded[prompt] = {"cross_attn": cross_attn, "pooled_output": pooled, **(extra[0] if extra else {})}
    return [encoded[prompt] for prompt in prompts]


@contextmanager
def _outputs_on(device: torch.device) -> Iterator[None]:
    """Between nodes ComfyUI keeps conditioning on the CPU. There and back stops the device twice a prompt."""
    before = comfy.model_management.intermediate_device
    comfy.model_management.intermediate_device = lambda: device
    try:
        yield
    finally:
        comfy.model_management.intermediate_device = before


def _with_own_encoders(clip: CLIP) -> CLIP:
    """A shallow copy down to the text encoders."""
    clip, encoder = copy.copy(clip), copy.copy(clip.cond_stage_model)
    encoder._modules = {name: copy.copy(part) for name, part in encoder._modules.items()}
    clip.cond_stage_model = encoder
    return clip


def _unweighted(sections: Sequence[Sequence[tuple]]) -> list[Row]:
    """The tokens of a prompt's sections; none where it has weights, which ComfyUI encodes against an empty prompt."""
    if any(weight != 1.0 for section in sections for _, weight in section):
        return []
    return [[token for token, _ in section] for section in sections]


def _encode_ahead(model: SDClipModel, rows: Sequence[Row]) -> None:
    """Encodes ``rows`` now; what ``model`` is asked for later it knows."""
    plain = copy.copy(model).encode  # of a copy: the outputs would keep themselves alive in a circle
    groups: dict[int, dict[tuple, Row]] = {}
    for row in rows:
        groups.setdefault(len(row), {})[_identity(row)] = row
    known: dict[tuple, list[Any]] = {}
    for group in groups.values():
        known |= zip(group, _split(plain(list(group.values()))), strict=True)

    def encode(rows: Sequence[Row]) -> Any:
        outputs = [known.get(_identity(row)) for row in rows]
        return plain(rows) if None in outputs else [_joined(parts) for parts in zip(*outputs, strict=True)]  # type: ignore[arg-type]

    model.encode = encode  # type: ignore[method-assign]


def _identity(row: Row) -> tuple:
    """Tells rows apart: the same numbers, and the very same vectors."""
    return tuple(token if isinstance(token, int) else id(token) for token in row)


def _split(outputs: Any) -> list[list[Any]]:
    """An encoder's outputs (tensors, None, dicts of tensors), row by row."""
    count = len(outputs[0])
    return [[_row(part, number) for part in outputs] for number in range(count)]


def _row(part: Any, number: int) -> Any:
    if isinstance(part, dict):
        return {name: _row(value, number) for name, value in part.items()}
    return part[number : number + 1] if isinstance(part, Tensor) else part


def _joined(parts: Sequence[Any]) -> Any:
    """The reverse of ``_row`` for all rows."""
    if isinstance(parts[0], dict):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0]
