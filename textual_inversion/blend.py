"""Makes a new embedding out of two: a mix, the difference, or both joined. Or keeps only some vectors of one."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .containers import MAX_NUMBERS, MAX_VECTORS
from .embedding import Embedding, with_guessed_encoders
from .errors import UserError

_RANGE = re.compile(r"(-?)(\d{1,9})(?:-(\d{1,9}))?")
MAX_HISTORY = 500  # characters of what is told about each of the two
_OPPOSITE = 1e-6  # unit vectors whose sum is shorter count as opposite: float32 has no unique rotation between them


def weighted_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``(1 - weight) a + weight b``."""
    return (1 - weight) * a + weight * b


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Rotates each row of ``a`` towards that of ``b``, both (vectors, width). Lengths change linearly.

    With the angle w between two rows, their directions u and v, and t = ``weight``, the direction is
    ``(sin((1 - t) w) u + sin(t w) v) / sin(w)`` (Shoemake 1985, Animating Rotation with Quaternion
    Curves), and the length is ``(1 - t) |a| + t |b|``. Equal directions do not change.

    Raises UserError for a row of zeros, which has no direction, and for opposite rows, where no
    rotation is the shortest.
    """
    rows = torch.stack([a, b]).double()
    lengths = rows.norm(dim=-1, keepdim=True)  # (2, vectors, 1)
    start, end = rows / lengths  # NaN for zeros: neither comparison below holds
    apart, together = (start - end).norm(dim=-1), (start + end).norm(dim=-1)
    undefined_rows = (~(together > _OPPOSITE)).nonzero()
    if len(undefined_rows):
        number = undefined_rows[0].item() + 1
        raise UserError(
            f"slerp cannot interpolate between vector {number} of a and of b, because they are opposite or zero: "
            "use weighted sum."
        )
    # atan2 is exact for small angles too, unlike the arc cosine; sinc keeps sin(x) / sin(w) finite at w = 0.
    turns = (2 * torch.atan2(apart, together) / torch.pi)[:, None]  # (vectors, 1); 1 is half a turn
    share_a, share_b = (part * torch.sinc(part * turns) / torch.sinc(turns) for part in (1 - weight, weight))
    length = (1 - weight) * lengths[0] + weight * lengths[1]
    return (length * (share_a * start + share_b * end)).to(a.dtype)


def difference(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``a - weight b``."""
    return a - weight * b


def join(a: Tensor, b: Tensor, _weight: float) -> Tensor:
    """The vectors of ``a``, then those of ``b``."""
    return torch.cat([a, b])


MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "weighted sum": weighted_sum,
    "slerp": slerp,
    "difference": difference,
    "join": join,
}


def blend(a: Embedding, b: Embedding, mode: str, weight: float) -> Embedding:
    """Applies ``MODES[mode]`` to the vectors of every text encoder. The result has the trigger word of ``a``.

    Its metadata are the entries that are the same in ``a`` and ``b``, and ``blend``, which describes what was done.

    Raises:
        UserError: the two are for different text encoders, or have different numbers of vectors and
            are not joined, or ``slerp`` raises it.
    """
    a, b = _same_encoders(a, b)
    if mode != "join" and any(len(rows) != len(b.vectors[key]) for key, rows in a.vectors.items()):
        raise UserError(
            f"{mode} needs the same number of vectors in both, but a ({a.trigger!r}) has {a.count} and b "
            f"({b.trigger!r}) has {b.count}: use join, or drop vectors of one with another Blend Embeddings node."
        )
    vectors = {key: MODES[mode](rows, b.vectors[key], weight) for key, rows in a.vectors.items()}
    _check_count(vectors)
    agreed = {key: value for key, value in a.metadata.items() if b.metadata.get(key) == value}
    how = "" if mode == "join" else f", weight {weight:g}"
    return _with_history(
        replace(a, vectors=vectors, metadata=agreed),
        f"{mode} of {_history(a)} and {_history(b)}{how}",
    )


def take(embedding: Embedding, numbers: str) -> Embedding:
    """Keeps the vectors that ``numbers`` selects (see ``parse_vector_numbers``), for every text encoder."""
    vectors = {key: rows[parse_vector_numbers(numbers, len(rows))] for key, rows in embedding.vectors.items()}
    _check_count(vectors)
    return _with_history(replace(embedding, vectors=vectors), f"vectors {numbers.strip()} of {_history(embedding)}")


def parse_vector_numbers(numbers: str, count: int) -> list[int]:
    """The row indices, from 0, that a text such as ``1-3, 5`` selects from ``count`` rows, in the order of the text.

    ``-2`` and ``-2-4`` drop rows; a text that only drops keeps all the others.

    Raises UserError for any other text, for numbers that do not exist, and if nothing is left.
    """
    taken, dropped = [], set()
    for part in numbers.split(","):
        match = _RANGE.fullmatch("".join(part.split()))
        if not match:
            raise UserError(f"vectors: {part.strip()[:40]!r} is not a vector number: write 1-3, 5 to keep, -2 to drop.")
        minus, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if not 1 <= first <= last <= count:
            raise UserError(f"vectors: there is no {part.strip()!r}; the vectors are numbered from 1 to {count}.")
        rows = range(first - 1, last)
        if minus:
            dropped |= set(rows)
        else:
            taken += rows
        if len(taken) > MAX_VECTORS:
            raise UserError(f"vectors: {numbers[:40]!r} names more than {MAX_VECTORS} vectors: name fewer.")
    only_drops = all(part.lstrip().startswith("-") for part in numbers.split(","))
    left = [row for row in (range(count) if only_drops else taken) if row not in dropped]
    if not left:
        raise UserError(f"vectors: {numbers.strip()!r} leaves no vector: keep at least one.")
    return left


def _same_encoders(a: Embedding, b: Embedding) -> tuple[Embedding, Embedding]:
    """Both embeddings, with the vectors of ``b`` under the keys of ``a``."""
    a, b = with_guessed_encoders(a), with_guessed_encoders(b)
    try:
        matched = b.for_encoders({key: rows.shape[-1] for key, rows in a.vectors.items()})
    except UserError:
        matched = None
    if matched is None or len(matched.vectors) != len(b.vectors):
        raise UserError(
            f"a and b are made for different models and cannot be blended: a ({a.trigger!r}) has {a.describe()}; "
            f"b ({b.trigger!r}) has {b.describe()}."
        )
    return a, matched


def _with_history(embedding: Embedding, what: str) -> Embedding:
    return replace(embedding, metadata={**embedding.metadata, "blend": what})


def _history(embedding: Embedding) -> str:
    """How the embedding was blended, or its trigger word if it was not. A long history ends in dots."""
    if "blend" not in embedding.metadata:
        return embedding.trigger
    history = embedding.metadata["blend"]
    return f"({history if len(history) <= MAX_HISTORY else f'{history[:MAX_HISTORY]} ...'})"


def _check_count(vectors: dict[str, Tensor]) -> None:
    """Raises UserError for more vectors than files may have: what can be made can be saved."""
    count, numbers = max(map(len, vectors.values())), sum(rows.numel() for rows in vectors.values())
    if count > MAX_VECTORS or numbers > MAX_NUMBERS:
        raise UserError(f"The result would have {count} vectors, more than a file may hold: join or take fewer.")
