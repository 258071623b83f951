"""Sends the progress of a run to the panel of its Train node, and receives the clicks on the panel's buttons."""

import asyncio
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

from ..textual_inversion import Embedding, formats
from .files import embeddings_folder

EVENT = "textual_inversion.run"
SECONDS_BETWEEN_EVENTS = 0.25
POINTS = 400  # most points of a curve that is sent to the browser
MOST_RUNS = 100  # of different nodes are remembered, with the embeddings of their previews

State = Literal["encoding", "waiting", "searching", "learning", "drawing", "finishing", "done", "cancelled", "failed"]
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Record:
    """The state of a concept's run as sent to the browser. Always complete, so no message depends on earlier ones."""

    workflow: str
    node: str  # execution id, such as "3", or "7:3" in a subgraph
    run: str = ""
    group: str = ""
    """The same for all concepts of a run of the node."""
    concept: str = ""
    """Its trigger word, where the run has several."""
    state: State = "encoding"
    message: str = ""
    step: int = 0
    steps: int = 0
    """At most."""
    planned: int = 0
    """The step at which training may end, as far as it is known now."""
    learning_rate: float = 0.0
    rate: float = 0.0  # pictures per second
    seconds_left: float | None = None
    trend: Literal["tokens", "improving", "flat"] = "improving"
    flat: int = 0  # evaluations in a row without progress
    best: int = 0
    losses: Curve = field(default_factory=list)
    fixed: Curve = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: browsers refuse a message with one."""
        return _finite(asdict(self))


class LiveRun:
    """One concept of a run of a Train node, connected to the browsers."""

    def __init__(self, workflow: str, node: str, group: str, concept: str) -> None:
        self.record = Record(workflow, node, uuid.uuid4().hex, group, concept)
        self.client = PromptServer.instance.client_id  # the browser tab that queued the run; empty for a bare API call
        self.stop, self.preview = threading.Event(), threading.Event()
        self.pictured: dict[int, Embedding] = {}  # what the preview of each step shows
        self.chosen: int | None = None  # the step whose preview somebody wants to keep
        self._closed, self._choosing = False, threading.Lock()
        self._told = -math.inf

    def end(self, state: State, **changes: Any) -> None:
        """Sends how the run ended, unless it has been told."""
        self.close()
        if not self.ended:
            self.tell(state, **changes)

    def tell(self, state: State, **changes: Any) -> None:
        """Changes the record and sends it, at most four times per second while the state stays the same."""
        same, now = state == self.record.state, time.monotonic()
        self.record = replace(self.record, state=state, **changes)
        if not same or now - self._told >= SECONDS_BETWEEN_EVENTS:
            self._told = now
            if self.client:  # otherwise all would hear of it
                PromptServer.instance.send_sync(EVENT, self.record.to_dict(), self.client)

    def choose(self, step: int) -> bool:
        """Makes what the preview of ``step`` shows the result, and ends training; False where it is too late."""
        with self._choosing:
            if self._closed:
                return False
            self.chosen = step
            self.stop.set()
            return True

    def close(self) -> None:
        """From now on nobody can choose: what was chosen until now counts."""
        with self._choosing:
            self._closed = True

    @property
    def ended(self) -> bool:
        return self.record.state in ("done", "cancelled", "failed")


class LiveRuns(list[LiveRun]):
    """The concepts of one run of a Train node. On leaving its ``with`` block it sends how those left have ended."""

    def __init__(self, workflow: str, node: str, concepts: Sequence[str]) -> None:
        group, several = uuid.uuid4().hex, len(concepts) > 1
        super().__init__(LiveRun(workflow, node, group, concept if several else "") for concept in concepts)
        key = (self[0].client, workflow, node)
        RUNS.pop(key, None)
        RUNS[key] = self
        while len(RUNS) > MOST_RUNS:
            del RUNS[next(iter(RUNS))]
        for run in self:
            run.tell("waiting" if several else "encoding")

    def __enter__(self) -> "LiveRuns":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for run in self:
            if kind is None:
                run.end("done")
            elif issubclass(kind, InterruptProcessingException):
                run.end("cancelled")
            else:
                run.end("failed", message=str(error))


RUNS: dict[tuple[Any, str, str], LiveRuns] = {}  # of each client, workflow and node the latest run, oldest first


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def thinned(losses: Sequence[float]) -> Curve:
    """At most ``POINTS`` pairs (step, loss). Longer curves are averaged over neighbouring steps."""
    size = max(1, math.ceil(len(losses) / POINTS))
    return [(first, fmean(losses[first : first + size])) for first in range(0, len(losses), size)]


def keep(run: LiveRun, step: int) -> str | None:
    """Makes what the preview of ``step`` shows the result of a run; of one that has ended, saves it and returns how
    prompts name it. None where the run is just ending."""
    if run.choose(step):
        return ""
    if not run.ended:
        return None
    embedding = run.pictured[step]
    name = f"{formats.file_name(embedding.trigger)}-step-{step}"
    (path,) = formats.write_new(embedding, embeddings_folder(), name)
    return f"embedding:{path.stem}"


def add_run_routes() -> None:
    """Adds the routes of the panel to ComfyUI's server."""
    routes = PromptServer.instance.routes

    @routes.get("/textual_inversion/runs")
    async def runs(request: web.Request) -> web.Response:
        """Those that the client queued who asks; it keeps its id when its page is loaded again."""
        client = request.query.get("client_id")
        own = [run for run in _all_runs() if client and run.client == client]
        return web.json_response([run.record.to_dict() for run in own])

    @routes.post("/textual_inversion/runs/{run}/{action:stop|preview}")
    async def act(request: web.Request) -> web.Response:
        """For one concept, or for all concepts of a group."""
        wanted, action = request.match_info["run"], request.match_info["action"]
        named = [run for run in _all_runs() if wanted in (run.record.run, run.record.group)]
        still = [run for run in named if not (run.ended or run.record.state == "finishing")]
        for run in still:
            (run.stop if action == "stop" else run.preview).set()
        return web.json_response({} if still else {"error": "This run has ended."}, status=200 if still else 404)

    @routes.post(r"/textual_inversion/runs/{run}/keep/{step:\d{1,9}}")
    async def keep_picture(request: web.Request) -> web.Response:
        run, step = _run(request), int(request.match_info["step"])
        if run is None or step not in run.pictured:
            return web.json_response({"error": "The embedding of this picture is gone."}, status=404)
        try:
            saved = await asyncio.to_thread(keep, run, step)
        except OSError as error:
            return web.json_response({"error": error.strerror or str(error)}, status=507)
        if saved is None:
            return web.json_response({"error": "The run is ending: try again when it has ended."}, status=409)
        return web.json_response({"saved": saved})


def _run(request: web.Request) -> LiveRun | None:
    """The run that a request names."""
    wanted = request.match_info["run"]
    return next((run for run in _all_runs() if run.record.run == wanted), None)


def _all_runs() -> list[LiveRun]:
    return [run for runs in list(RUNS.values()) for run in runs]
