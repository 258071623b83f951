"""Errors whose text is one sentence for the user: what is wrong and what to do."""

from collections.abc import Iterable


class UserError(ValueError):
    """An input that cannot be used."""


class TrainingError(RuntimeError):
    """Training cannot start or cannot work with this model."""


class TrainingStopped(RuntimeError):
    """Training ended early, but the vectors of earlier steps are good."""


class ProcessEnded(RuntimeError):
    """Another process of a run of several has ended before its time."""


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names, each shortened to 60 characters, and how many more there are."""
    names = [name if len(name) <= 60 else f"{name[:60]}..." for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
