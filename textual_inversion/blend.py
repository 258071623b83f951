"""New embeddings out of learned ones: between two, one less the other, one after the other, a part of one."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .embedding import Embedding, named_by_width
from .errors import UserError

_RANGE = re.compile(r"(-?)(\d+)(?:-(\d+))?")
_OPPOSITE = 1e-6  # length of the sum of two unit vectors, from where float32 knows no plane that holds both


def weighted_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``(1 - weight) a + weight b``."""
    return (1 - weight) * a + weight * b


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From each row of ``a`` to that of ``b``, both (vectors, width): directions turn, lengths change evenly.

    With the angle w between two rows, their directions u and v, and t = ``weight``, the direction is
    ``(sin((1 - t) w) u + sin(t w) v) / sin(w)`` (Shoemake 1985, Animating Rotation with Quaternion
    Curves), the length ``(1 - t) |a| + t |b|``. Equal directions stay what they are.

    Raises UserError for a row of zeros, which has no direction, and for opposite rows, between which
    every way around is as short.
    """
    rows = torch.stack([a, b]).double()
    lengths = rows.norm(dim=-1, keepdim=True)  # (2, vectors, 1)
    start, end = rows / lengths  # NaN for zeros: neither comparison below holds
    apart, together = (start - end).norm(dim=-1), (start + end).norm(dim=-1)
    lost = (~(together > _OPPOSITE)).nonzero()
    if len(lost):
        raise UserError(
            f"slerp finds no way between the vectors {lost[0].item() + 1} of a and b, which are opposite or zero: "
            "use weighted sum."
        )
    # Exact for small angles too, unlike the arc cosine; sinc keeps sin(x) / sin(w) finite at w = 0.
    turns = (2 * torch.atan2(apart, together) / torch.pi)[:, None]  # (vectors, 1), 1 is half a circle
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
    """``MODES[mode]`` for every text encoder. The trigger is that of ``a``.

    The metadata keep what ``a`` and ``b`` agree on; ``blend`` tells what was done.

    Raises:
        UserError: the two are made for different text encoders; or have different numbers of vectors
            and are not joined; or ``slerp`` cannot (see there).
    """
    a, b = _same_encoders(a, b)
    if mode != "join" and any(len(rows) != len(b.vectors[key]) for key, rows in a.vectors.items()):
        raise UserError(
            f"{mode} needs as many vectors in b as in a, but a ({a.trigger!r}) has {a.count} and b ({b.trigger!r}) "
            f"has {b.count}: use join, or drop vectors of one with a Blend Embeddings of its own."
        )
    vectors = {key: MODES[mode](rows, b.vectors[key], weight) for key, rows in a.vectors.items()}
    agreed = {key: value for key, value in a.metadata.items() if b.metadata.get(key) == value}
    how = "" if mode == "join" else f", weight {weight:g}"
    return _told(replace(a, vectors=vectors, metadata=agreed), f"{mode} of {_name(a)} and {_name(b)}{how}")


def take(embedding: Embedding, numbers: str) -> Embedding:
    """The vectors that ``numbers`` names (see ``chosen``), of every text encoder."""
    vectors = {key: rows[chosen(numbers, len(rows))] for key, rows in embedding.vectors.items()}
    return _told(replace(embedding, vectors=vectors), f"vectors {numbers.strip()} of {_name(embedding)}")


def chosen(numbers: str, count: int) -> list[int]:
    """Rows, from 0, that a text such as ``1-3, 5`` takes out of ``count``, in the order it names them.

    ``-2`` and ``-2-4`` drop; a text that only drops starts from all.

    Raises UserError for anything else, for numbers that there are not, and where nothing is left.
    """
    taken, dropped = [], set()
    for part in numbers.split(","):
        match = _RANGE.fullmatch("".join(part.split()))
        if not match:
            raise UserError(f"vectors: {part.strip()!r} is no number of a vector: write 1-3, 5 to take, -2 to drop.")
        minus, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if not 1 <= first <= last <= count:
            raise UserError(f"vectors: there is no {part.strip()!r}, the vectors are numbered from 1 to {count}.")
        rows = range(first - 1, last)
        if minus:
            dropped |= set(rows)
        else:
            taken += rows
    only_drops = all(part.lstrip().startswith("-") for part in numbers.split(","))
    left = [row for row in (range(count) if only_drops else taken) if row not in dropped]
    if not left:
        raise UserError(f"vectors: {numbers.strip()!r} leaves no vector: take at least one.")
    return left


def _same_encoders(a: Embedding, b: Embedding) -> tuple[Embedding, Embedding]:
    """Both with the keys of ``a``."""
    a, b = named_by_width(a), named_by_width(b)
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


def _told(embedding: Embedding, what: str) -> Embedding:
    return replace(embedding, metadata={**embedding.metadata, "blend": what})


def _name(embedding: Embedding) -> str:
    """What was done to get the embedding, or its trigger."""
    return f"({embedding.metadata['blend']})" if "blend" in embedding.metadata else embedding.trigger
