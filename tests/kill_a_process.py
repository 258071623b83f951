"""Kills one of two processes that learn a library, runs the same command again, and compares every bit.

python -m tests.kill_a_process 10
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from toy_model.networks import pipeline_from_checkpoint

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "textual_inversion", "train"]
STEPS = 24
BAR = re.compile(rb"(\d+)/\d+ \[[^\r\n]*step/s")  # of the first process
PARTS = "shared out", "split"


def launched(processes: int) -> list[str]:
    """The command in several processes, by torchrun."""
    module = COMMAND[COMMAND.index("-m") :]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *run, *module] if processes > 1 else COMMAND


def make_library(folder: Path, linked: bool, concepts: tuple[str, ...] = ("heart", "star")) -> None:
    """Concepts of the demo. Linked: captions name the other one, so that both learn at the same time."""
    for name in concepts:
        shutil.copytree(ROOT / f"demo/concepts/{name}/train", folder / name)
    if linked:
        (folder / f"{concepts[0]}/0.txt").write_text(f"a photo of {{}} beside <{concepts[1]}>")
        (folder / f"{concepts[1]}/1.txt").write_text(f"a photo of {{}} beside <{concepts[0]}>")


def options(model: Path, library: Path, output: Path) -> list[str]:
    settings = {"init": "toy", "steps": STEPS, "batch-size": 2, "model": model, "images": library, "output": output}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def learn(arguments: list[str], processes: int = 2) -> str:
    """Runs to the end, and returns what was said."""
    done = subprocess.run(
        [*launched(processes), *arguments], capture_output=True, text=True, timeout=600, env=one_thread()
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def kill_one(arguments: list[str], step: int, rank: int) -> str:
    """Runs until the first process has done ``step`` steps, kills one, and returns what the other says."""
    with subprocess.Popen([*launched(2), *arguments], stderr=subprocess.PIPE, env=one_thread()) as process:
        assert process.stderr is not None
        try:
            seen = b""
            while not any(int(done) >= step for done in BAR.findall(seen)):
                assert process.poll() is None, seen.decode()
                seen += os.read(process.stderr.fileno(), 4096)
            workers = psutil.Process(process.pid).children()
            (worker,) = (worker for worker in workers if worker.environ().get("RANK") == str(rank))
            worker.kill()
            _, rest = process.communicate(timeout=120)
        finally:
            process.terminate()
    assert process.returncode
    return (seen + rest).decode()


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["clip_l"] for path in folder.glob("*.safetensors")}


def differences(one: Path, two: Path) -> list[str]:
    """The files of which not every bit is the same."""
    first, second = learned(one), learned(two)
    assert first
    return [name for name in first.keys() | second if not torch.equal(first[name], second.get(name, torch.zeros(0)))]


def main(times: int) -> None:
    chance, wrong = random.Random(0), 0
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        pipeline_from_checkpoint(ROOT / "demo/models/toy.safetensors").save_pretrained(base / "toy")
        for part in PARTS:
            make_library(base / part / "library", linked=part == "split")
            learn(options(base / "toy", base / part / "library", base / part / "whole"))
        for number in range(times):
            part, rank = PARTS[number % 2], chance.randint(0, 1)
            step = chance.randint(1, (2 * STEPS if part == "split" else STEPS) - 1)  # of both concepts together
            output = base / f"{number}"
            arguments = options(base / "toy", base / part / "library", output)
            kill_one(arguments, step, rank)
            there = learned(output)
            said = re.findall(r"goes on after step \d+", learn(arguments))
            lost = [name for name, vectors in there.items() if not torch.equal(vectors, learned(output)[name])]
            different = differences(base / part / "whole", output)
            wrong += bool(lost or different)
            print(f"{part}: process {rank} killed at step {step}, {said}, {different or 'the same bits'}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
