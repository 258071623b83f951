"""What is in an embedding: how long its vectors are, and which words they come close to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .embedding import Embedding
from .vocabulary import Vocabulary

NEAREST = 5
_LONGEST = 1000  # characters of a metadata value; kohya's trainer writes every caption of a data set into one


@dataclass(frozen=True)
class Vectors:
    """The vectors of one text encoder."""

    key: str
    width: int
    lengths: list[float]  # of each vector
    usual: tuple[float, float, float] | None = None  # 5 %, 50 % and 95 % of the vocabulary's words are shorter
    nearest: list[list[tuple[str, float]]] | None = None  # of each vector, words with cosines; none for zeros


def inspect(embedding: Embedding, vocabularies: Mapping[str, Vocabulary]) -> list[Vectors]:
    """The facts about every text encoder of ``embedding``; beside words where ``vocabularies`` has the key."""
    found = []
    for key, rows in embedding.vectors.items():
        usual = nearest = None
        if key in vocabularies:
            lengths = vocabularies[key].word_lengths()
            low, middle, high = lengths.quantile(torch.tensor([0.05, 0.5, 0.95]).to(lengths)).tolist()
            usual, nearest = (low, middle, high), vocabularies[key].nearest(rows, NEAREST)
        found.append(Vectors(key, rows.shape[-1], rows.norm(dim=1).tolist(), usual, nearest))
    return found


def describe(embedding: Embedding, found: list[Vectors]) -> str:
    """Text for people: the word, its metadata as they are, then every vector."""
    lines = [f"{embedding.trigger}: {embedding.describe()}"]
    for key, value in embedding.metadata.items():
        lines.append(f"{key}: {value[:_LONGEST]}{' ...' if len(value) > _LONGEST else ''}")
    for part in found:
        words = ""
        if part.usual:
            low, middle, high = part.usual
            words = f"; words are {low:.3f} to {high:.3f} long, usually {middle:.3f}"
        lines.append(f"{part.key}: {len(part.lengths)} x {part.width}{words}")
        for number, length in enumerate(part.lengths):
            near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in part.nearest[number]) if part.nearest else ""
            lines.append(f"  {number + 1}: length {length:.3f}{'; nearest: ' if near else ''}{near}")
    return "\n".join(lines)
