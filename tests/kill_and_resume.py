"""Kills ComfyUI with SIGKILL in the middle of training, runs the graph again, and compares every bit.

python -m tests.kill_and_resume 100
"""

import itertools
import random
import shutil
import sys
import time
from typing import Any

from safetensors.torch import load_file

from dev.comfyui_server import ComfyServer
from dev.get_comfyui import ROOT

STEPS = 40
NUMBERS = itertools.count()


def graph(steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """The demo model learns from four pictures without captions, and saves."""
    settings = {"trigger": "S*", "initializer": "", "kind": "object", "template": "", "vectors": 1, "steps": steps}
    settings |= {"editability": 0.1, "batch_size": 2, "size": 0, "seed": 0, "gradient_checkpointing": False}
    # ComfyUI would not run the same graph again; what a preview shows does not change what is learned.
    settings |= {"preview_prompt": f"photo {next(NUMBERS)} of {{}}", "preview_every": 0, **changes}
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="toy.safetensors"),
        "pictures": node("TI_LoadImages", folder="heart", path="", crop="square", size=64),
        "learn": node(
            "TI_Train", **settings, model=["load", 0], clip=["load", 1], vae=["load", 2], images=["pictures", 0]
        ),
        "save": node("TI_SaveEmbedding", embedding=["learn", 0], name="learned", overwrite=True),
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def learned(server: ComfyServer, workflow: str = "", **changes: Any) -> tuple[list[float], str]:
    """The learned vector and the panel's message after running the graph to its end."""
    run = server.run(graph(**changes), workflow_id=workflow)
    (record,) = run.history["outputs"]["learn"]["textual_inversion"]
    file = load_file(server.base / "models/embeddings/learned.safetensors")
    return file["clip_l"].flatten().tolist(), record["message"]


def kill_at(server: ComfyServer, step: int, workflow: str = "", **changes: Any) -> None:
    """Runs the graph until ``step`` is done, kills the server, and starts it again."""
    earlier = {run["run"] for run in server.training_runs()}
    server.submit(graph(**changes), workflow_id=workflow)
    reached = 0
    while reached < step:
        time.sleep(0.01)
        for run in server.training_runs():
            if run["run"] not in earlier:
                assert run["state"] in ("encoding", "searching", "learning"), "training ended before it was killed"
                reached = run["step"]
    server.kill()
    server.start_again()


def main(times: int) -> None:
    """Kills at random steps; a run is killed up to three times before it may end."""
    chance = random.Random(0)
    killed = wrong = 0
    with ComfyServer() as server:
        shutil.copytree(ROOT / "demo/concepts/heart/train", server.base / "input/heart")
        reference, _ = learned(server)
        while killed < times:
            for _ in range(min(chance.randint(1, 3), times - killed)):
                step = chance.randint(1, STEPS - 2)
                kill_at(server, step)
                killed += 1
            found, message = learned(server)
            wrong += found != reference
            print(f"{killed} kills, {wrong} wrong; the last at step {step}: {message or 'started over'}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
