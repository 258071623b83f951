"""Describes an embedding: the length of its vectors and the words nearest to them."""

import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from .embedding import Embedding, with_guessed_encoders
from .errors import UserError
from .vocabulary import Vocabulary

NEAREST = 5
_MOST_NOTES = 40  # metadata entries shown
_LONGEST = 1000  # characters shown of a metadata value: kohya's trainer writes all captions of a data set into one

# What people call the text encoders, and the families that take vectors for just these.
ENCODER_NAMES = {
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "clip_h": "CLIP-H",
    "t5xxl": "T5-XXL",
    "umt5xxl": "UMT5-XXL",
    "pile_t5xl": "Pile-T5-XL",
    "llama": "Llama",
    "gemma2_2b": "Gemma 2 2B",
    "qwen25_7b": "Qwen2.5 7B",
    "qwen3_06b": "Qwen3 0.6B",
    "qwen3_4b": "Qwen3 4B",
    "qwen3_8b": "Qwen3 8B",
    "mistral3_24b": "Mistral 3 24B",
}
FAMILIES = {
    frozenset({"clip_l"}): "SD1",
    frozenset({"clip_h"}): "SD2",
    frozenset({"clip_l", "clip_g"}): "SDXL",
    frozenset({"clip_g"}): "SDXL refiner",
    frozenset({"clip_l", "clip_g", "t5xxl"}): "SD3",
    frozenset({"clip_l", "t5xxl"}): "Flux.1",
    frozenset({"t5xxl"}): "PixArt",
    frozenset({"clip_l", "llama"}): "HunyuanVideo",
    frozenset({"clip_l", "clip_g", "t5xxl", "llama"}): "HiDream",
    frozenset({"gemma2_2b"}): "Lumina 2",
    frozenset({"qwen25_7b"}): "Qwen-Image",
    frozenset({"umt5xxl"}): "Wan",
    frozenset({"pile_t5xl"}): "AuraFlow",
    frozenset({"qwen3_06b"}): "Anima",
    frozenset({"qwen3_4b"}): "Z-Image or Flux.2 Klein 4B",
    frozenset({"qwen3_8b"}): "Flux.2 Klein 9B",
    frozenset({"mistral3_24b"}): "Flux.2",
}


@dataclass(frozen=True)
class Vectors:
    """The vectors of one text encoder."""

    key: str
    width: int
    lengths: list[float]  # of each vector
    usual: tuple[float, float, float] | None = None  # 5%, 50% and 95% quantiles of the length of the vocabulary's words
    nearest: list[list[tuple[str, float]]] | None = None  # words and cosines for each vector; none for a zero vector


def inspect(embedding: Embedding, vocabularies: Mapping[str, Vocabulary]) -> list[Vectors]:
    """Measures the vectors of every text encoder, and compares them with its words if ``vocabularies`` has its key."""
    found = []
    for key, rows in embedding.vectors.items():
        usual = nearest = None
        if key in vocabularies:
            lengths = vocabularies[key].word_lengths()
            low, middle, high = lengths.quantile(torch.tensor([0.05, 0.5, 0.95]).to(lengths)).tolist()
            usual, nearest = (low, middle, high), vocabularies[key].nearest(rows, NEAREST)
        found.append(Vectors(key, rows.shape[-1], rows.double().norm(dim=1).tolist(), usual, nearest))
    return found


def readable(length: float) -> str:
    """With three digits behind the point, or as a power of ten where that would fill the line."""
    return f"{length:.3f}" if length < 1e6 else f"{length:.3e}"


def title(embedding: Embedding) -> str:
    """Number, family and encoders for people: ``2 vectors, SDXL: CLIP-L 768 + CLIP-G 1280``.

    The encoders of unnamed vectors are told by their width; keys that nobody knows stay as they are.
    """
    with suppress(UserError):  # two of one width: each has its key
        embedding = with_guessed_encoders(embedding)
    encoders = " + ".join(
        f"{ENCODER_NAMES.get(key, key)[:60]} {rows.shape[-1]}" for key, rows in embedding.vectors.items()
    )
    family = FAMILIES.get(frozenset(embedding.vectors))
    return f"{embedding.count} vector{'s' if embedding.count > 1 else ''}, {f'{family}: ' if family else ''}{encoders}"


def printable(text: str) -> str:
    """With a replacement character for what is none: a file may hold what a terminal takes for a command."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" or unicodedata.category(letter) == "Zs" else "\ufffd"
        for letter in text
    )


def describe(embedding: Embedding, found: list[Vectors]) -> str:
    """A readable text: the trigger word, the metadata, then every vector."""
    lines = [f"{embedding.trigger}: {title(embedding)}"]
    for key, value in list(embedding.metadata.items())[:_MOST_NOTES]:
        lines.append(f"{key[:_LONGEST]}: {value[:_LONGEST]}{' ...' if len(value) > _LONGEST else ''}")
    if len(embedding.metadata) > _MOST_NOTES:
        lines.append(f"... and {len(embedding.metadata) - _MOST_NOTES} more entries")
    for part in found:
        ordinary = ""
        if part.usual:
            low, middle, high = part.usual
            ordinary = f"; ordinary words: {low:.3f} to {high:.3f}, median {middle:.3f}"
        lines.append(f"{part.key}: {len(part.lengths)} x {part.width}{ordinary}")
        for number, length in enumerate(part.lengths):
            near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in part.nearest[number]) if part.nearest else ""
            lines.append(f"  {number + 1}: length {readable(length)}{'; nearest: ' if near else ''}{near}")
    return printable("\n".join(lines))
