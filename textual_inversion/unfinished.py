"""Where the command line keeps what it needs to go on after it was killed: beside its results.

Each run has files of its own, one a process.
"""

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .formats import file_name
from .state import PARTIAL, load_state, save_state

FOLDER = "unfinished"
MOST_RUNS = 20  # besides the one at hand
MOST_DAYS = 30
DAY = 24 * 60 * 60  # seconds

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
    def merged(cls, parts: "Iterable[Unfinished]", wanted: Mapping[str, str]) -> "Unfinished":
        """Of entries about a concept that with the ``wanted`` fingerprint counts, or else that of the latest step.

        Of what was written the last part counts.
        """
        whole = cls()

        def worth(trigger: str, entry: Entry) -> tuple[bool, int]:
            return entry["fingerprint"] == wanted.get(trigger), entry["training"]["progress"]["step"]

        for part in parts:
            whole.done |= part.done
            for trigger, entry in part.concepts.items():
                if trigger not in whole.concepts or worth(trigger, entry) >= worth(trigger, whole.concepts[trigger]):
                    whole.concepts[trigger] = entry
        return whole


class UnfinishedFiles:
    """The files of all runs called ``name`` in ``folder``; this process writes the one of its run and its ``rank``.

    ``fingerprints`` of all words tell apart runs with other settings or pictures: those wait beside this one.
    """

    def __init__(self, folder: Path, name: str, rank: int, fingerprints: Mapping[str, str]) -> None:
        self.folder, self.name, self.fingerprints = folder / FOLDER, file_name(name), fingerprints
        self.run = hashlib.sha256(" ".join(sorted(fingerprints.values())).encode()).hexdigest()[:16]
        self.own = self.folder / f"{self.name}.{self.run}.{rank}.state"

    def read(self) -> Unfinished:
        """What all processes have written; what is damaged, or of another version, is left out."""
        contents = map(load_state, sorted(self._all(r"[0-9a-f]{16}"), key=_written))
        found = (Unfinished(**content) for content in contents if content is not None)
        return Unfinished.merged(found, self.fingerprints)

    def write(self, content: Unfinished) -> None:
        save_state(self.own, vars(content))

    def remove(self) -> None:
        """Removes this run's files. Those of other settings and pictures wait on."""
        for path in self._all(self.run, "state|partial"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another run waits there too, or there never was a folder
            self.folder.rmdir()

    def sweep(self) -> None:
        """Removes runs that nobody went on with: besides this one the newest ``MOST_RUNS`` stay, for ``MOST_DAYS``."""
        own = set(self._all(self.run, "state|partial"))
        paths = [path for suffix in (".state", PARTIAL) for path in self.folder.glob(f"*{suffix}") if path not in own]
        paths.sort(key=_written, reverse=True)
        runs = list(dict.fromkeys(path.name.rsplit(".", 2)[0] for path in paths))
        for path in paths:
            is_old = time.time() - _written(path) > MOST_DAYS * DAY
            if is_old or runs.index(path.name.rsplit(".", 2)[0]) >= MOST_RUNS:
                path.unlink(missing_ok=True)

    def _all(self, run: str, suffix: str = "state") -> list[Path]:
        """``NAME.RUN.RANK.state``; in a name there may be dots."""
        pattern = re.compile(rf"{re.escape(self.name)}\.{run}\.\d+\.({suffix})")
        return [path for path in self.folder.glob("*") if pattern.fullmatch(path.name)]


def _written(path: Path) -> float:
    return path.stat().st_mtime
