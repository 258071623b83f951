"""Describes an embedding: the length of its vectors and the words nearest to them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .embedding import Embedding
from .vocabulary import Vocabulary

NEAREST = 5
_MOST_NOTES = 40  # metadata entries shown
_LONGEST = 1000  # characters shown of a metadata value: kohya's trainer writes all captions of a data set into one


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


def describe(embedding: Embedding, found: list[Vectors]) -> str:
    """A readable text: the trigger word, the metadata, then every vector."""
    lines = [f"{embedding.trigger}: {embedding.describe()}"]
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
    return "\n".join(lines)
