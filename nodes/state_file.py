"""Where an unfinished run waits for its graph to be queued again."""

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..textual_inversion import UserError
from ..textual_inversion.state import PARTIAL, load_state, save_state
from .files import states_folder

MOST_STATES = 20  # besides that of the run at hand
MOST_DAYS = 30
DAY = 24 * 60 * 60  # seconds
LEFTOVER = re.compile(r"ti-[0-9a-f]{32}\.tmp")  # what formats.write leaves when the process is killed


@dataclass(frozen=True)
class StateFile:
    """The file of one node of one workflow, with certain settings and pictures."""

    owner: str
    """Hash of workflow and node; without a workflow of settings and pictures alone. Of one concept of several, with
    the hash of its trigger word behind a dot."""
    fingerprint: str
    """Fingerprint of settings and pictures."""

    @classmethod
    def of(cls, workflow: str, node: str, fingerprint: str, concept: str = "", run: str = "") -> "StateFile":
        """``concept`` is the trigger word of one of several, ``run`` a fingerprint of all of them."""
        owner = hashlib.sha256(f"{workflow} {node}".encode()).hexdigest() if workflow else run or fingerprint
        part = f".{hashlib.sha256(concept.encode()).hexdigest()[:8]}" if concept else ""
        return cls(f"{owner[:12]}{part}", fingerprint[:32])

    def read(self) -> dict[str, Any] | None:
        """What was saved with the same settings and pictures, by any node.

        Raises UserError where there are only files that are damaged or of another version; they are removed.
        """
        damaged = False
        for path in self.files():
            if saved := load_state(path):
                return saved
            damaged = True
            path.unlink(missing_ok=True)
        if damaged:
            raise UserError("its file is damaged, or of another version, so training starts over.")
        return None

    def write(self, content: dict[str, Any]) -> None:
        save_state(states_folder() / f"{self.owner}-{self.fingerprint}.state", content)

    @property
    def has_others(self) -> bool:
        """Whether the node has an unfinished run with other settings or pictures."""
        return any(states_folder().glob(f"{self.owner}-*.state"))

    def remove(self) -> None:
        """Removes this run's state. Those of other settings and pictures wait on."""
        for path in self.files():
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        return list(states_folder().glob(f"*-{self.fingerprint}.state"))


def sweep(kept: Sequence[StateFile], folders: Sequence[Path]) -> None:
    """Removes unfinished runs that nobody went on with, and what killed processes left here and in ``folders``.

    The newest ``MOST_STATES`` stay, for ``MOST_DAYS``, each with all its concepts; ``kept`` always do.
    """
    own = {path for state_file in kept for path in state_file.files()}
    others = sorted(set(states_folder().glob("*.state")) - own, key=lambda path: path.stat().st_mtime, reverse=True)
    runs = list(dict.fromkeys(map(_run_of, others)))
    removed = [path for path in others if runs.index(_run_of(path)) >= MOST_STATES or _days_old(path) > MOST_DAYS]
    for path in removed:
        path.unlink(missing_ok=True)
    if removed:
        logging.info(
            "Textual inversion: removed %d unfinished runs; the newest %d are kept, for %d days.",
            len(set(map(_run_of, removed))),
            MOST_STATES,
            MOST_DAYS,
        )
    leftovers = [*states_folder().glob(f"*{PARTIAL}")]
    leftovers += [path for folder in folders for path in folder.glob("*.tmp") if LEFTOVER.fullmatch(path.name)]
    for path in leftovers:
        if _days_old(path) > 1:  # not what another process is writing
            path.unlink(missing_ok=True)


def _run_of(path: Path) -> str:
    """The same for all concepts of a run."""
    owner, _, rest = path.name.partition("-")
    run, one_of_several, _ = owner.partition(".")
    return run if one_of_several else f"{owner}-{rest}"


def _days_old(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / DAY
