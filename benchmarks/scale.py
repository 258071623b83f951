"""What many concepts in one run, and many processes, bring: ratios within one run, on the demo model.

    python -m benchmarks.scale                     all of the following; a few minutes on a quiet machine
    python -m benchmarks.scale --only passes       8 concepts in shared passes against one, and against 8 runs
    python -m benchmarks.scale --only processes    n processes on n cores against one, shared out and split
    python -m benchmarks.scale --only own          the loop's own work and what processes tell each other
    python -m benchmarks.scale --library 24        characters that the model has never seen, on the command line

Ways take turns, so that whatever else the machine does hits all alike. Medians. CPU seconds are those of the process
alone: with them a busy machine says less, but waiting for others is not in them.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from demo.measure import CHECKPOINT
from dev.in_process import ROOT
from textual_inversion import TrainConfig, formats, gradients, initial_embedding
from textual_inversion.adapters.diffusers_pipeline import DiffusersModel
from textual_inversion.concept_folders import load_concepts
from textual_inversion.dataset import Dataset, fixed_batches
from textual_inversion.embedding import Embedding
from textual_inversion.initializer import unseen
from textual_inversion.library import Concept, by_concept, learn_together
from textual_inversion.objective import mean_loss
from textual_inversion.processes import ALONE, Processes, joined, leave
from textual_inversion.training import learn, next_of
from toy_model.make_concepts import HELD_OUT, TRAINING, character_pictures, write
from toy_model.networks import pipeline_from_checkpoint
from toy_model.world import HELD_OUT_COLOURS, Character, random_character

RESULTS = ROOT / "benchmarks/results/scale"
CONFIG = TrainConfig(initializer="circle", evaluate_every=10_000, patience=0, seed=0)
CONCEPTS = ("circle", "cross", "diamond", "drop", "flower", "heart", "moon", "star")


@dataclass
class Run:
    """One concept for ``learn_together``, with an initializer that is known."""

    concept: Concept
    dataset: Dataset
    model: Any
    config: TrainConfig
    saved: dict[str, Any] | None = None

    searching = staticmethod(unseen)

    def begin(self, resume: bool) -> tuple[Embedding, TrainConfig]:
        vocabularies, config = self.model.vocabularies(), self.config
        return initial_embedding(vocabularies, config.trigger, config.initializer, config.vectors), config


def demo_model() -> DiffusersModel:
    return DiffusersModel(pipeline_from_checkpoint(CHECKPOINT))


def runs_of(model: DiffusersModel, count: int, **settings: Any) -> list[Run]:
    """``count`` concepts with captions: those of the demo, over and over again."""
    runs = []
    for number in range(count):
        images, _, captions, _ = load_concepts(ROOT / f"demo/concepts/{CONCEPTS[number % 8]}/train", 0).pictures
        word = f"<{CONCEPTS[number % 8]}-{number}>"
        (concept,) = by_concept([word], images, [], captions, "object")
        config = replace(CONFIG, trigger=word, **settings)
        runs.append(Run(concept, concept.dataset(model, config), model, config))
    return runs


def learn_all(runs: list[Run], at_once: int, processes: Processes = ALONE) -> None:
    for _, news in learn_together(runs[0].model, runs, at_once, processes):
        if isinstance(news, Exception):
            raise news


@dataclass(frozen=True)
class Seconds:
    """What something took."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, act: Callable[[], object]) -> "Seconds":
        wall, cpu = time.perf_counter(), time.process_time()
        act()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)


def medians(ways: Mapping[str, Callable[[], object]], times: int) -> dict[str, Seconds]:
    """Of each way, taking turns after one turn that does not count."""
    measured: dict[str, list[Seconds]] = {name: [] for name in ways}
    for turn in range(times + 1):
        for name, act in ways.items():
            seconds = Seconds.of(act)
            if turn:
                measured[name].append(seconds)
    return {
        name: Seconds(*(statistics.median(getattr(one, what) for one in all_) for what in ("wall", "cpu")))
        for name, all_ in measured.items()
    }


def ratio(one: Seconds, other: Seconds) -> str:
    return f"{one.wall / other.wall:.2f} ({one.cpu / other.cpu:.2f})"


# Shared passes ----------------------------------------------------------------------------------


def passes(times: int) -> list[str]:
    """8 concepts of one row each in a pass of 8 rows, against one concept of 8 rows; and whole runs."""
    model = demo_model()
    many, one = runs_of(model, 8, batch_size=1), runs_of(model, 1, batch_size=8)
    steps = {}
    for name, runs in (("8 concepts", many), ("1 concept", one)):
        shares = [next_share(run) for run in runs]
        steps[name] = partial(gradients.compute_gradients, model, *shares)
    found = medians(steps, 4 * times)
    lines = [
        "A pass of 8 rows forward and backward, text encoder and network: 8 concepts with a batch of 1 take "
        f"{ratio(found['8 concepts'], found['1 concept'])} times as long as one concept with a batch of 8 "
        f"({found['8 concepts'].wall * 1000:.0f} and {found['1 concept'].wall * 1000:.0f} ms).",
        "",
        "| batch | 8 concepts at once | one after the other | ratio |",
        "|---|---|---|---|",
    ]
    for batch in (1, 4, 8):
        runs = runs_of(model, 8, batch_size=batch, steps=4)
        ways = {"at once": partial(learn_all, runs, 8), "alone": partial(learn_all, runs, 1)}
        found = medians(ways, max(1, times // 2))
        both = found["at once"], found["alone"]
        lines.append(f"| {batch} | {both[0].wall:.1f} s | {both[1].wall:.1f} s | {ratio(*both)} |")
    load = Seconds.of(demo_model)
    lines += ["", f"8 runs load the model 8 times instead of once, which is not counted ({load.wall:.1f} s each here)."]
    return lines


def next_share(run: Run) -> gradients.Share:
    """What a run asks for in its first step."""
    embedding, config = run.begin(False)
    learner = learn(run.model, embedding.trainable(), run.dataset, config)
    next_of(learner, None)
    share = next_of(learner, None)
    assert isinstance(share, gradients.Share)
    return share


# Processes --------------------------------------------------------------------------------------


def worker(way: str, steps: int, output: Path) -> None:
    """One of the processes that ``processes`` launches: one concept each, or one for all with a batch for all."""
    torch.set_num_threads(1)
    with joined() as together:
        model = demo_model()
        split = way == "split"
        runs = runs_of(model, 1, batch_size=4 * together.count if split else 4, steps=steps)
        learn_all(runs, 1, together if split else ALONE)
        together.gather(0)  # all begin at the same time
        seconds = Seconds.of(lambda: learn_all(runs, 1, together if split else ALONE))
        all_ = together.gather(seconds)
        if together.rank == 0:
            output.write_text(json.dumps([max(one.wall for one in all_), max(one.cpu for one in all_)]))
    leave(0)


def launched(way: str, count: int, steps: int, output: Path) -> Seconds:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *run, "-m", "benchmarks.scale", "--worker", way, str(steps), str(output)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, cwd=ROOT)
    return Seconds(*json.loads(output.read_text()))


def processes(times: int) -> list[str]:
    """Four rows a step for each process, shared out or split, against one process with four rows."""
    count, steps = os.cpu_count() or 1, 24
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        ways = {"one": ("shared", 1), "shared out": ("shared", count), "split": ("split", count)}
        measured: dict[str, list[Seconds]] = {name: [] for name in ways}
        for _ in range(times):
            for name, (way, number) in ways.items():
                measured[name].append(launched(way, number, steps, output))
    found = {
        name: Seconds(*(statistics.median(getattr(s, what) for s in all_) for what in ("wall", "cpu")))
        for name, all_ in measured.items()
    }
    lines = [f"{count} processes of one thread each on {count} cores, {steps} steps of 4 rows for each process.", ""]
    lines += ["| | pictures a second | times one process, wall (CPU) | goal |", "|---|---|---|---|"]
    for name, (_, number) in ways.items():
        rate = 4 * number * steps / found[name].wall
        gain = ratio(Seconds(number * found["one"].wall, number * found["one"].cpu), found[name])
        lines.append(f"| {name} | {rate:.1f} | {gain} | {f'{0.95 * count:.2f}' if name == 'shared out' else ''} |")
    return lines


# The loop's own work ----------------------------------------------------------------------------


@contextmanager
def network_seconds() -> Iterator[list[float]]:
    """Adds up the seconds in the network, forward and backward, and in the text encoder."""
    spent, forward, backward = [0.0, 0.0], gradients.row_losses, torch.autograd.grad

    def timed(function: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - wall
                spent[1] += time.process_time() - cpu

        return run

    with patch.object(gradients, "row_losses", timed(forward)), patch.object(torch.autograd, "grad", timed(backward)):
        yield spent


def own(times: int) -> list[str]:
    """100 concepts in the same rounds: what the loop does beside the network, and what processes would tell."""
    torch.set_num_threads(1)
    model, count = demo_model(), 100
    tell = statistics.median(float(value) for value in told(count))
    lines = [
        f"{count} concepts in the same rounds, one thread: a step of all, what of it is not the text encoder and the "
        "network, and that as CPU time for each concept.",
        "",
        "| rows a concept | step | network | own work a concept | share of the step |",
        "|---|---|---|---|---|",
    ]
    for batch in (1, TrainConfig().batch_size):
        wall, network, each = round_of(runs_of(model, count, batch_size=batch), times)
        share = count * each / (1000 * network + count * each)
        lines.append(f"| {batch} | {wall:.2f} s | {network:.2f} s | {each:.2f} ms | {share:.1%} |")
    return [
        *lines,
        "",
        f"Two processes add up the gradients of all {count} (768 numbers each) in {tell:.1f} ms by gloo on this "
        f"machine, {tell / count:.3f} ms a concept. With that it is within 2% of a step where a concept's rows take "
        f"{49 * (each + tell / count):.0f} ms or more.",
    ]


def round_of(runs: list[Run], times: int) -> tuple[float, float, float]:
    """Medians of a step of all: its seconds, those in the network, and the rest as CPU milliseconds a concept."""
    marks: list[tuple[float, ...]] = []
    with network_seconds() as spent:

        def mark(_learning: list[Run]) -> None:
            marks.append((time.perf_counter(), time.process_time(), *spent))

        for _ in learn_together(runs[0].model, runs, len(runs), after_round=mark):
            if len(marks) == 1 + times:
                break
    rounds = [[b - a for a, b in zip(one, two, strict=True)] for one, two in pairwise(marks)]
    wall, cpu, network, network_cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
    return wall, network, 1000 * (cpu - network_cpu) / len(runs)


def told(count: int) -> list[str]:
    code = (
        "import time, torch\nfrom textual_inversion.processes import joined\nwith joined() as p:\n"
        f"    for _ in range(20):\n        n = torch.zeros({count} * 770)\n        b = time.perf_counter()\n"
        "        p.sum(n)\n        print(1000 * (time.perf_counter() - b)) if p.rank == 0 else None\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "tell.py"
        script.write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return done.stdout.split()


# A library that the model has never seen --------------------------------------------------------


def characters(count: int) -> dict[str, Character]:
    """Characters in colours that the demo model has never seen, as different ones as there are."""
    rng, found = random.Random(23), {}
    while len(found) < count:
        who = random_character(rng, HELD_OUT_COLOURS)
        if who not in found.values():
            found[f"{who.shape}-{len(found) + 1}"] = who
    return found


def library(count: int, number: int, steps: int) -> list[str]:
    """Learned by the command line, and measured on pictures of other places."""
    with tempfile.TemporaryDirectory() as temporary:
        base, looks = Path(temporary), characters(count)
        pipeline_from_checkpoint(CHECKPOINT).save_pretrained(base / "toy")
        for seed, (name, who) in enumerate(looks.items()):
            write(base / "library" / name, character_pictures(who, TRAINING), 1000 + 2 * seed)
            write(base / "held-out" / name, character_pictures(who, HELD_OUT), 1001 + 2 * seed)
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)] if number > 1 else []
        command = [sys.executable, *run, "-m", "textual_inversion", "train", "--model", "toy", "--images", "library"]
        command += ["--output", "words", "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        took = Seconds.of(lambda: subprocess.run(command, check=True, cwd=base, env=environment))
        lines = ["| word | initializer | held-out loss of it | learned | share removed |", "|---|---|---|---|---|"]
        model, worse = demo_model(), 0
        for name in looks:
            learned = formats.read(base / f"words/{name}.safetensors")
            images, _, captions, _ = load_concepts(base / "held-out" / name, 0).pictures
            (concept,) = by_concept([learned.trigger], images, [], captions, "object")
            batches = fixed_batches(concept.dataset(model, replace(CONFIG, trigger=learned.trigger)),
                                    TrainConfig(batch_size=32), 16)  # fmt: skip
            word = json.loads(learned.metadata["settings"])["initializer"]
            start = initial_embedding(model.vocabularies(), learned.trigger, word, 1)
            before, after = (mean_loss(model, [one], batches) for one in (start, learned))
            worse += after >= before
            lines.append(f"| {learned.trigger} | {word} | {before:.4f} | {after:.4f} | {1 - after / before:.0%} |")
        lines += ["", f"{count - worse} of {count} are below their initializer. {number} processes, {took.wall:.0f} s."]
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"passes": passes, "processes": processes, "own": own}
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--library", type=int, default=0, metavar="CONCEPTS")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        way, steps, output = args.worker
        return worker(way, int(steps), Path(output))
    RESULTS.mkdir(parents=True, exist_ok=True)
    learned = f"library_{args.processes}"
    jobs = {learned: lambda: library(args.library, args.processes, args.steps)} if args.library else {
        name: lambda part=part: part(args.times) for name, part in parts.items() if args.only in (None, name)
    }  # fmt: skip
    for name, job in jobs.items():
        load = os.getloadavg()[0]
        lines = job()
        machine = f"{os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
        text = "\n".join([f"{datetime.now(timezone.utc):%Y-%m-%d}. {machine}. {versions}.", "", *lines, ""])
        (RESULTS / f"{name}.md").write_text(text)
        print(f"{name}\n{text}", flush=True)


if __name__ == "__main__":
    main()
