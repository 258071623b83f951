"""A real, headless ComfyUI with this pack and the demo model in it.

    with ComfyServer() as server:
        run = server.run(prompt)            # a graph in ComfyUI's API format
        run.history["outputs"], run.events

comfy-cli starts it in a folder of its own, which goes away with it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import requests
import websocket
from tqdm import tqdm

from .get_comfyui import ROOT, comfy_cli, comfyui_path

START_SECONDS = 300
STOP_SECONDS = 15
PACK_NAME = "ComfyUI-Textual-Inversion"
DEMO_PACK_NAME = "textual_inversion_demo_model"


class ComfyError(RuntimeError):
    """ComfyUI did not start, refused a prompt, or a node failed; the message says what it said."""


@dataclass
class Run:
    """What became of one prompt: its history entry, and what came over the websocket meanwhile."""

    prompt_id: str
    history: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)

    @property
    def error(self) -> dict[str, Any] | None:
        """Data of `execution_error` or `execution_interrupted`; None after a success."""
        endings = ("execution_error", "execution_interrupted")
        return next((event["data"] for event in self.events if event["type"] in endings), None)


class ComfyServer:
    """Context manager around one ComfyUI process."""

    def __init__(
        self,
        pack_name: str = PACK_NAME,
        packs: Mapping[str, Path] = MappingProxyType({}),
        checkpoints: Sequence[Path] = (),
        options: Sequence[str] = ("--cpu",),
    ) -> None:
        """`pack_name`: the folder in custom_nodes that this repository appears as.

        `packs` (more folders in custom_nodes, by name) and `checkpoints` come on top of the demo's.
        `options` of ComfyUI itself say what it runs on.
        """
        self.pack_name, self.options = pack_name, options
        self.packs = {pack_name: ROOT, DEMO_PACK_NAME: ROOT / "demo/comfyui_pack", **packs}
        self.checkpoints = [*(ROOT / "demo/models").glob("toy.safetensors"), *checkpoints]
        self.client_id = uuid.uuid4().hex
        self.http = requests.Session()
        self.http.trust_env = False  # a proxy must not see requests to this machine

    def __enter__(self) -> ComfyServer:
        """Start the server and wait until it answers and every pack is loaded."""
        self._folder = tempfile.TemporaryDirectory(prefix="comfyui-")
        self.base = Path(self._folder.name)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_path = self.base / "comfyui.log"
        try:
            self._lay_out()
            self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the server, whatever happened."""
        self.stop()

    @property
    def log(self) -> str:
        """All that the server has printed so far."""
        return self._log_path.read_text(errors="replace")

    def object_info(self, node: str = "") -> dict[str, Any]:
        """Schemas of every node, or of the one named."""
        return self._get(f"/object_info/{node}" if node else "/object_info")

    def submit(self, prompt: dict[str, Any], workflow_id: str = "") -> str:
        """Queue a graph in API format, as part of that workflow if one is named, and return its prompt id."""
        data = {"prompt": prompt, "client_id": self.client_id}
        data["extra_data"] = {"extra_pnginfo": {"workflow": {"id": workflow_id}}} if workflow_id else {}
        answer = self.http.post(f"{self.url}/prompt", json=data, timeout=60)
        if answer.status_code != 200:
            raise ComfyError(f"ComfyUI refused the prompt: {answer.text}")
        return answer.json()["prompt_id"]

    def run(
        self,
        prompt: dict[str, Any],
        timeout: float = 600,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        check: bool = True,
        workflow_id: str = "",
    ) -> Run:
        """Run a graph to its end; `timeout` is the longest silence allowed, in seconds.

        A failed or interrupted graph raises ComfyError, or with `check=False` is told by
        `Run.error`.  `on_event` sees every event as it comes.
        """
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        connection = websocket.create_connection(address, timeout=timeout)
        try:
            run = Run(self.submit(prompt, workflow_id))
            self._follow(connection, run, on_event)
        except websocket.WebSocketException as error:
            raise ComfyError(f"{error} while a graph ran:\n{_tail(self.log)}") from error
        finally:
            connection.close()
        if check and run.error is not None:
            told = run.error.get("exception_message", "interrupted")
            raise ComfyError(f"{told}\n{json.dumps(run.error, indent=1)}")
        run.history = self._get(f"/history/{run.prompt_id}")[run.prompt_id]
        return run

    def run_workflow(self, path: Path, timeout: int = 600) -> dict[str, Any]:
        """Run a saved workflow (the front end's format) with `comfy run`, a progress bar on screen.

        Returns comfy-cli's closing words; `data.outputs` has an address for every saved picture.
        """
        command, environment = comfy_cli(self.base / "home")
        command += ["run", "--workflow", str(path), "--wait", "--json", "--timeout", str(timeout)]
        command += ["--where", "local", "--host", "127.0.0.1", "--port", str(self.port)]
        event: dict[str, Any] = {}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process, tqdm() as bar:
            for line in process.stdout or ():
                event = json.loads(line)
                if event["type"] == "executing":
                    bar.set_description(event["title"])
                elif event["type"] == "progress":
                    bar.total, bar.n = event["total"], event["completed"]
                    bar.refresh()
        if process.returncode != 0:
            raise ComfyError(f"comfy run {path.name}: {json.dumps(event, indent=1)}\n{_tail(self.log)}")
        return event

    def training_runs(self) -> list[dict[str, Any]]:
        """What the panels of Train nodes show to whom queued the graphs."""
        return self._get(f"/textual_inversion/runs?client_id={self.client_id}")

    def interrupt(self) -> None:
        """Stop the graph that is running."""
        self.http.post(f"{self.url}/interrupt", json={}, timeout=60).raise_for_status()

    def free(self) -> None:
        """Unload models and empty the cache of node outputs, before the next graph runs."""
        both = {"unload_models": True, "free_memory": True}
        self.http.post(f"{self.url}/free", json=both, timeout=60).raise_for_status()

    def processes(self) -> list[psutil.Process]:
        """ComfyUI and whatever it has started."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> None:
        """End the server as a power failure would, in the middle of whatever it does."""
        for process in [*self.processes(), self._process]:
            process.kill()
        self._process.wait()

    def start_again(self) -> None:
        """After ``kill``: a new server in the same folder."""
        self._launch()
        self._wait_until_ready()

    def stop(self) -> None:
        """End the server and remove its folder."""
        process: subprocess.Popen[bytes] | None = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            # ComfyUI first: comfy-cli then sees it end, and nothing is left without a parent.
            children = self.processes()
            for child in children:
                child.terminate()
            for child in psutil.wait_procs(children, timeout=STOP_SECONDS)[1]:
                child.kill()
            process.terminate()
            process.wait()
        self.http.close()
        self._folder.cleanup()

    def _lay_out(self) -> None:
        """Make ComfyUI's base directory, with the packs and the demo's checkpoints as links."""
        for folder in ("custom_nodes", "models/checkpoints", "models/embeddings", "input"):
            (self.base / folder).mkdir(parents=True)
        for folder in ("output", "temp", "user"):
            (self.base / folder).mkdir()
        for name, folder in self.packs.items():
            (self.base / "custom_nodes" / name).symlink_to(folder)
        for model in self.checkpoints:
            (self.base / "models/checkpoints" / model.name).symlink_to(model)

    def _launch(self) -> None:
        """Start ComfyUI through comfy-cli, in a session of its own: Ctrl-C is ours to handle."""
        command, environment = comfy_cli(self.base / "home")
        command += ["--workspace", str(comfyui_path()), "launch", "--", *self.options]
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch", "--disable-all-custom-nodes"]
        command += ["--whitelist-custom-nodes", *self.packs]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**environment, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        """Return when the server answers; raise with its last words when it dies or hangs."""
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None:
                raise ComfyError(f"ComfyUI ended at its start:\n{_tail(self.log)}")
            if time.monotonic() > deadline:
                raise ComfyError(f"ComfyUI is silent after {START_SECONDS} s:\n{_tail(self.log)}")
            time.sleep(0.2)
        if "IMPORT FAILED" in self.log:
            raise ComfyError(f"ComfyUI could not load a pack:\n{_tail(self.log)}")

    def _answers(self) -> bool:
        try:
            return self.http.get(f"{self.url}/system_stats", timeout=5).ok
        except requests.RequestException:
            return False

    def _follow(
        self,
        connection: websocket.WebSocket,
        run: Run,
        on_event: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        """Collect events and preview pictures until the history of the prompt is written."""
        while True:
            message = connection.recv()
            if isinstance(message, bytes):
                run.previews.append(message[8:])  # after 4 bytes each: kind of event, of picture
                continue
            event = json.loads(message)
            run.events.append(event)
            if on_event is not None:
                on_event(event)
            data = event["data"]
            ended = event["type"] == "executing" and data["node"] is None
            if ended and data["prompt_id"] == run.prompt_id:
                return

    def _get(self, path: str) -> Any:
        answer = self.http.get(self.url + path, timeout=60)
        answer.raise_for_status()
        return answer.json()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(text: str, lines: int = 40) -> str:
    return os.linesep.join(text.splitlines()[-lines:])
