"""Where the command line keeps what it needs to go on after it was killed: one file a process, beside its results."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .formats import file_name
from .state import PARTIAL, load_state, save_state

FOLDER = "unfinished"

Entry = dict[str, Any]
"""Of one concept: ``fingerprint``, ``initializer``, ``seconds``, whether it has ``ended``, and in ``training`` what
``TrainState.to_dict`` gives."""


@dataclass
class Unfinished:
    """What a run has on disk, by trigger word."""

    concepts: dict[str, Entry] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    """The fingerprints of what it has learned and written."""

    @classmethod
    def merged(cls, parts: "Iterable[Unfinished]") -> "Unfinished":
        """Of two entries about a concept the one of the later step counts."""
        whole = cls()
        for part in parts:
            whole.done |= part.done
            for trigger, entry in part.concepts.items():
                if trigger not in whole.concepts or _steps(entry) >= _steps(whole.concepts[trigger]):
                    whole.concepts[trigger] = entry
        return whole


def _steps(entry: Entry) -> int:
    return entry["training"]["progress"]["step"]


class UnfinishedFiles:
    """The files of a run called ``name`` in ``folder``; this process writes the one of its ``rank``."""

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.folder, self.name = folder / FOLDER, file_name(name)
        self.own = self.folder / f"{self.name}.{rank}.state"

    def read(self) -> Unfinished:
        """What all processes have written; what is damaged, or of another version, is left out."""
        contents = [load_state(path) for path in self._all(".state")]
        return Unfinished.merged(Unfinished(**content) for content in contents if content is not None)

    def write(self, content: Unfinished) -> None:
        save_state(self.own, vars(content))

    def remove(self) -> None:
        for path in self._all(".state", PARTIAL):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another run waits there too, or there never was a folder
            self.folder.rmdir()

    def _all(self, *suffixes: str) -> list[Path]:
        """``NAME.RANK.state``; in a name there may be dots."""
        found = [path for suffix in suffixes for path in self.folder.glob(f"*{suffix}")]
        return sorted(path for path in found if path.name.rsplit(".", 2)[0] == self.name)
