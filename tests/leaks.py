"""What a server holds before and after many runs that end in every way: memory, threads and open handles.

python -m tests.leaks 30
"""

import itertools
import shutil
import sys
from collections.abc import Callable
from typing import Any

from dev.comfyui_server import ComfyServer
from dev.get_comfyui import ROOT

from .kill_and_resume import graph

WARM_UP = 8  # runs until everything is imported and every cache is filled
MOST_GROWTH = 1.0  # MB a run, above what the system's memory allocator varies by
SHORT, LONG = {"steps": 20, "preview_every": 10}, {"steps": 5000, "preview_every": 10, "initializer": "toy"}


def main(times: int) -> None:
    with ComfyServer() as server:
        shutil.copytree(ROOT / "demo/concepts/heart/train", server.base / "input/heart")
        ways = itertools.cycle((done, cancelled, stopped, failed))
        for way in itertools.islice(ways, WARM_UP):
            way(server)
        before = held(server)
        print(f"after {WARM_UP} runs: {shown(before)}", flush=True)
        for number in range(1, times + 1):
            next(ways)(server)
            if number % 5 == 0 or number == times:
                print(f"{number} runs later: {shown(held(server))}", flush=True)
        after = held(server)
    growth = {name: after[name] - before[name] for name in before}
    print(f"more than before: {shown(growth)}")
    sys.exit(growth["threads"] > 0 or growth["handles"] > 0 or growth["MB"] > MOST_GROWTH * times)


def held(server: ComfyServer) -> dict[str, float]:
    """Of the server's process, which is the child of comfy-cli that holds most."""
    process = max(server.processes(), key=lambda one: one.memory_info().rss)
    return {
        "MB": process.memory_info().rss / 2**20,
        "threads": process.num_threads(),
        "handles": process.num_fds(),  # not on Windows
    }


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{value:.0f} {name}" for name, value in values.items())


# The ways to end --------------------------------------------------------------------------------


def done(server: ComfyServer) -> None:
    """With a search for the initializer, previews and a saved file."""
    server.run(graph(**SHORT))


def failed(server: ComfyServer) -> None:
    """In the search, after the pictures are encoded and the model is loaded."""
    assert server.run(graph(**SHORT, vectors=75), check=False).error is not None


def cancelled(server: ComfyServer) -> None:
    run = server.run(graph(**LONG), on_event=at_a_picture(lambda _run: server.interrupt()), check=False)
    assert run.error is not None


def stopped(server: ComfyServer) -> None:
    def stop(run: str) -> None:
        server.http.post(f"{server.url}/textual_inversion/runs/{run}/stop", timeout=60).raise_for_status()

    server.run(graph(**LONG), on_event=at_a_picture(stop))


def at_a_picture(act: Callable[[str], None]) -> Callable[[dict[str, Any]], None]:
    """Acts once, when the second preview is shown."""
    acted = []

    def look(event: dict[str, Any]) -> None:
        if event["type"] == "textual_inversion.run" and len(event["data"]["pictures"]) > 1 and not acted:
            acted.append(event["data"]["run"])
            act(acted[0])

    return look


if __name__ == "__main__":
    main(int(sys.argv[1]))
