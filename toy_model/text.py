"""CLIP's tokenizer, from the vocabulary files that come with ComfyUI."""

from __future__ import annotations

from functools import cache

from torch import Tensor
from transformers import CLIPTokenizer

from dev.get_comfyui import comfyui_path

CONTEXT = 77
END = 49407  # ends a text and pads it
VOCABULARY = 49408


@cache
def tokenizer() -> CLIPTokenizer:
    folder = comfyui_path() / "comfy" / "sd1_tokenizer"
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)


def tokenize(captions: list[str]) -> Tensor:
    """Token ids, (captions, 77)."""
    return tokenizer()(
        captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids
