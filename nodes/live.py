"""What the panel of a Train node sees of a run, and what its buttons ask of it."""

import math
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from aiohttp import web
from comfy.model_management import InterruptProcessingException
from server import PromptServer

EVENT = "textual_inversion.run"
SECONDS_BETWEEN_EVENTS = 0.25
POINTS = 400  # of a curve in the browser

State = Literal["encoding", "searching", "learning", "finishing", "done", "cancelled", "failed"]
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Record:
    """A run as the browser gets it, whole each time, so that no message needs those before it."""

    workflow: str
    node: str  # execution id: "3", inside of subgraphs "7:3"
    run: str = ""
    state: State = "encoding"
    message: str = ""
    step: int = 0
    steps: int = 0
    learning_rate: float = 0.0
    rate: float = 0.0  # pictures a second
    seconds_left: float | None = None
    best: int = 0
    losses: Curve = field(default_factory=list)
    fixed: Curve = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LiveRun:
    """One run of a Train node: tells the browsers, and hears from them. As a context it tells the end."""

    def __init__(self, workflow: str, node: str) -> None:
        self.record = Record(workflow, node, uuid.uuid4().hex)
        self.stop, self.preview = threading.Event(), threading.Event()
        self._told = -math.inf
        RUNS[workflow, node] = self
        self.tell("encoding")

    def __enter__(self) -> "LiveRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.tell("done")
        elif issubclass(kind, InterruptProcessingException):
            self.tell("cancelled")
        else:
            self.tell("failed", message=str(error))

    def tell(self, state: State, **changes: Any) -> None:
        """Changes the record and sends it; within the same state at most four times a second."""
        same, now = state == self.record.state, time.monotonic()
        self.record = replace(self.record, state=state, **changes)
        if not same or now - self._told >= SECONDS_BETWEEN_EVENTS:
            self._told = now
            PromptServer.instance.send_sync(EVENT, self.record.to_dict())

    @property
    def ended(self) -> bool:
        return self.record.state in ("done", "cancelled", "failed")


RUNS: dict[tuple[str, str], LiveRun] = {}  # the last run of every node since ComfyUI started


def thinned(losses: Sequence[float]) -> Curve:
    """(step, loss) at most ``POINTS`` times: means of neighbours."""
    size = max(1, math.ceil(len(losses) / POINTS))
    return [(first, fmean(losses[first : first + size])) for first in range(0, len(losses), size)]


def add_run_routes() -> None:
    """Adds what the panels ask for to ComfyUI's server."""
    routes = PromptServer.instance.routes

    @routes.get("/textual_inversion/runs")
    async def runs(request: web.Request) -> web.Response:
        return web.json_response([run.record.to_dict() for run in list(RUNS.values())])

    @routes.post("/textual_inversion/runs/{run}/{action:stop|preview}")
    async def act(request: web.Request) -> web.Response:
        wanted, action = request.match_info["run"], request.match_info["action"]
        for run in list(RUNS.values()):
            if run.record.run == wanted and not run.ended:
                (run.stop if action == "stop" else run.preview).set()
                return web.json_response({})
        return web.json_response({"error": "This run has ended."}, status=404)
