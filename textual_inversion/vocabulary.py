"""The words a text encoder already knows: where training starts, and what a learned vector is close to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding import Embedding, resample
from .errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one text encoder."""

    vectors: Tensor  # (tokens, width), the encoder's own table
    tokens: Mapping[int, str] = field(repr=False)  # by id, as the tokenizer spells them
    encode: Callable[[str], list[int]] = field(repr=False)  # a text to token ids, without start and end

    def words(self) -> dict[int, str]:
        """Tokens that are whole words of three or more plain letters."""
        spelled = {number: word_of(token) for number, token in self.tokens.items()}
        return {number: word for number, word in spelled.items() if word and number < len(self.vectors)}

    def mean(self) -> Tensor:
        """The mean of all vectors, (width,) float32; no second table is made for it."""
        return self.vectors.mean(0, dtype=torch.float32)

    def word_length(self) -> float:
        """The usual length of a whole word's vector: the median."""
        return self.word_lengths().median().item()

    def mean_direction(self, length: float | Tensor) -> Tensor:
        """The direction of the mean vector, ``length`` long: (width,) float32 on the CPU."""
        mean = self.mean().cpu()
        return length * mean / mean.norm()

    def nearest(self, rows: Tensor, count: int) -> list[list[tuple[str, float]]]:
        """For each of ``rows`` (vectors, width) the whole words that point most in its direction, with the cosines.

        All rows at once, since a vocabulary is hundreds of megabytes to read. None for a row of zeros.
        """
        words = self.words()
        table = self._rows(list(words))
        rows = F.normalize(rows.to(table), dim=1)
        best = (rows @ F.normalize(table, dim=1).T).topk(min(count, len(table)))  # (vectors, count)
        spelled = list(words.values())
        return [
            [(spelled[i], cosine) for i, cosine in zip(indices, cosines, strict=True)] if row.any() else []
            for row, indices, cosines in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def word_lengths(self) -> Tensor:
        """The length of each whole word's vector, (words,)."""
        return self._rows(list(self.words())).norm(dim=1)

    def first_order_gain(self, gradients: Tensor) -> tuple[list[str], Tensor]:
        """The whole words, and first-order estimates of how far losses fall from here to each: (losses, words).

        Up to a constant for each loss, of which ``gradients`` (losses, width) are. All at once, as in ``nearest``.
        """
        words = self.words()
        table = self._rows(list(words))
        return list(words.values()), -gradients.to(table) @ table.T

    def _rows(self, numbers: list[int]) -> Tensor:
        return self.vectors[torch.tensor(numbers, device=self.vectors.device)].float()


def word_of(token: str) -> str:
    """The word that a token spells: CLIP marks its end, T5 and the others its beginning. Else empty."""
    word = ""
    if token.endswith("</w>"):
        word = token.removesuffix("</w>")
    elif token.startswith(("\u2581", "\u0120")):
        word = token[1:]
    return word if len(word) >= 3 and word.isascii() and word.isalpha() else ""


def initial_embedding(
    vocabularies: Mapping[str, Vocabulary], trigger: str, initializer: str, vectors: int
) -> Embedding:
    """Vectors to start from: those of the initializer's words, or the mean of the vocabulary.

    As many words as vectors: one each. Fewer: repeated in turn. More: neighbours are averaged.

    Raises:
        UserError: the trigger is an ordinary word, or the initializer has no token.
    """
    start = {}
    for key, vocabulary in vocabularies.items():
        if len(vocabulary.encode(trigger)) == 1:
            raise UserError(
                f"The text encoder already knows the word {trigger!r}: choose a new trigger word, "
                f"such as '{trigger}-x' or '<{trigger}>'."
            )
        if initializer:
            ids = vocabulary.encode(initializer)
            if not ids:
                raise UserError(f"The initializer {initializer!r} contains no word: enter one, or leave it empty.")
            rows = vocabulary.vectors[ids].float()
        else:
            rows = vocabulary.mean()[None]
        start[key] = resample(rows.cpu(), vectors)
    return Embedding(trigger, start)
