"""Two concepts that are only ever seen together, told apart by their captions.

    python -m benchmarks.together            every pair, 3 seeds; writes results/together/report.md

Four pictures show a character the model has never seen, always on a background in a colour it has never seen:
"a photo of <heart> on a <teal> background". Both words are learned in one run (library.py) from the same four pictures.
Each is then measured without the other, by `identity` as in benchmarks/concepts.py: the character on eight other
backgrounds, the colour behind eight other characters. Beside it, what the character's word becomes when it is learned
from these pictures alone, with captions in which nothing names the background ("a photo of <heart>"), and from four
pictures of its own on four backgrounds.
"""

import argparse
import random
from typing import Any

import numpy as np
import torch

from demo.measure import Bench, Concept
from dev.get_comfyui import ROOT
from textual_inversion import Step, TrainConfig, initial_embedding
from textual_inversion.dataset import make_dataset
from textual_inversion.library import Concept as Learned
from textual_inversion.library import by_concept, learn_together
from textual_inversion.pictures import load_folder
from toy_model.drawing import render
from toy_model.make_concepts import CHARACTERS
from toy_model.world import Picture, contrast, named_characters

from .scale import Run

OUT = ROOT / "benchmarks/results/together"
PAIRS = (
    ("heart", "teal", "cyan"),
    ("star", "moss", "brown"),
    ("moon", "rose", "pink"),
)  # with the nearest known colour
PICTURES = 4


def rendered(pictures: list[Any], seed: int) -> list[torch.Tensor]:
    """(1, 64, 64, 3) each."""
    jitter = np.random.default_rng(seed)
    return [torch.from_numpy(render(picture, jitter)).float()[None] / 255 for picture in pictures]


def pictures_of(who: str, colour: str) -> list[torch.Tensor]:
    """The character on the background; nothing else differs but its place and size."""
    return rendered([Picture(CHARACTERS[who], colour)] * PICTURES, 7)


def others_on(colour: str, word: str) -> tuple[list[torch.Tensor], list[str]]:
    """Characters that the model knows on the background, with captions that name it."""
    fits = [name for name, who in named_characters().items() if contrast(who.colour, colour) > 0.75]
    names = random.Random(3).sample(fits, 8)
    pictures = [Picture(named_characters()[name], colour, name=name) for name in names]
    return rendered(pictures, 8), [f"a photo of {name} on a {word} background" for name in names]


def learned(bench: Bench, concepts: list[Any], initializers: list[str], seed: int) -> dict[str, Any]:
    """The last step of each concept by its trigger word."""
    last: dict[str, Any] = {}
    configs = [
        TrainConfig(trigger=concept.trigger, initializer=word, seed=seed)
        for concept, word in zip(concepts, initializers, strict=True)
    ]
    with bench.model.training() as model:
        runs = [
            Run(concept, concept.dataset(bench.model, config), bench.model, config)
            for concept, config in zip(concepts, configs, strict=True)
        ]
        for run, step in learn_together(model, runs):
            assert isinstance(step, Step), step
            last[run.concept.trigger] = step
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=len(PAIRS))
    arguments, bench = parser.parse_args(), Bench()
    lines = ["| pair | seed | word | together | the same pictures alone | four backgrounds |", "|---" * 6 + "|"]

    def identity(step: Any, heldout: Any, known: str) -> str:
        """1 - L(word) / L(class) on pictures of the concept without the other."""
        with bench.model.training() as model:
            start = initial_embedding(model.vocabularies(), step.best.trigger, known, 1)
            before = bench.heldout_loss(heldout, start, known)
            return f"{1 - bench.heldout_loss(heldout, step.best, step.best.trigger) / before:.2f} ({step.number})"

    for who, colour, near in PAIRS[: arguments.pairs]:
        about, thing, back = Concept.read(who), f"<{who}>", f"<{colour}>"
        images, caption = pictures_of(who, colour), f"a photo of {thing} on a {back} background"
        together = by_concept([thing, thing, back, back], images, [], [caption], "object")
        same = [Learned(thing, images, [], [f"a photo of {thing}"])]
        own, _, texts, _ = load_folder(about.folder / "train", 0, False)
        elsewhere = bench.dataset(about, "heldout", TrainConfig(trigger=thing))
        shown, said = others_on(colour, back)
        behind = make_dataset(bench.model.encode_images, shown, [], said, TrainConfig(trigger=back))
        for seed in arguments.seeds:
            both = learned(bench, together, [about.initializer, near], seed)
            alone = [learned(bench, one, [about.initializer], seed) for one in (same, [Learned(thing, own, [], texts)])]
            cells = [identity(last[thing], elsewhere, about.initializer) for last in (both, *alone)]
            lines.append(f"| {who}, {colour} | {seed} | {thing} | {' | '.join(cells)} |")
            lines.append(f"| {who}, {colour} | {seed} | {back} | {identity(both[back], behind, near)} | | |")
            print("\n".join(lines[-2:]), flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.md").write_text("Identity, and in brackets the steps.\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
