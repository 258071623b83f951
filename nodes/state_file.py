"""Where an unfinished run waits for its graph to be queued again."""

import hashlib
from dataclasses import dataclass
from typing import Any

from ..textual_inversion.state import load_state, save_state
from .files import states_folder


@dataclass(frozen=True)
class StateFile:
    """The file of one node of one workflow, with certain settings and pictures."""

    owner: str
    """Hash of workflow and node; without a workflow of settings and pictures alone."""
    fingerprint: str
    """Fingerprint of settings and pictures."""

    @classmethod
    def of(cls, workflow: str, node: str, fingerprint: str) -> "StateFile":
        owner = hashlib.sha256(f"{workflow} {node}".encode()).hexdigest() if workflow else fingerprint
        return cls(owner[:12], fingerprint[:32])

    def read(self) -> dict[str, Any] | None:
        """What was saved with the same settings and pictures, by any node."""
        for path in states_folder().glob(f"*-{self.fingerprint}.state"):
            if saved := load_state(path):
                return saved
        return None

    def write(self, content: dict[str, Any]) -> None:
        save_state(states_folder() / f"{self.owner}-{self.fingerprint}.state", content)

    @property
    def has_others(self) -> bool:
        """Whether the node has an unfinished run with other settings or pictures."""
        return any(states_folder().glob(f"{self.owner}-*.state"))

    def remove(self) -> None:
        for pattern in (f"*-{self.fingerprint}.state", f"{self.owner}-*.state"):
            for path in states_folder().glob(pattern):
                path.unlink(missing_ok=True)
