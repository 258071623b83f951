"""Recipes against each other: what a word learned from pictures without captions is worth.

    python -m benchmarks.concepts                                  every recipe, 8 concepts, 3 seeds
    python -m benchmarks.concepts --recipes ours diffusers --seeds 0 --concepts heart ember
    python -m benchmarks.concepts --cosine 0.05                    gradients of batches agree that little at the start
    python -m benchmarks.concepts --noise 30                       30 x the residual is not to be known (levels.py)
    python -m benchmarks.concepts --wild                           on the model of 128 pixels (toy_model/wild.py)
    python -m benchmarks.concepts --report                         only the tables, plot and sheets
    python -m benchmarks.concepts --model my.safetensors --concepts my/cat my/dog

Every finished cell (recipe, concept, seed) is a line of cells.jsonl, so that a run can be stopped and goes
on later, and several can share the work. A concept of one's own is a folder with train/, heldout/ (pictures with
NAME.txt, {} for the word) and concept.json ({"kind": "object", "initializer": "cat"}).

identity   1 - L(word) / L(class): the share of the initializer's held-out loss that the word takes away,
           on 8 pictures it has not seen, with their true captions and the same noise for all
obeys      demo model only: share of the backgrounds, hats or shapes asked for in unseen prompts that a
           judge network finds in the samples (toy_model/judge.py)
looks      the same for the concept's own shape, colours, pattern, eyes and ears
drift      1 - cosine of the text encoder's outputs for unseen prompts with the word and with its class
leak       L(word) of held-out minus of training pictures
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from demo.measure import CHECKPOINT, CONCEPTS, WILD, Bench, Concept
from dev.get_comfyui import ROOT
from textual_inversion import TrainConfig, formats, initial_embedding, train
from textual_inversion.dataset import fixed_batches
from textual_inversion.objective import mean_loss
from textual_inversion.pictures import to_pillow
from textual_inversion.prompts import place_trigger
from textual_inversion.report import drift
from textual_inversion.state import saved_settings
from toy_model import wild
from toy_model.judge import load_judge
from toy_model.make_concepts import draw_concepts

from .cells import add_cell, file_name, read_cells
from .levels import Level, harder
from .recipes import ABLATIONS, RECIPES, Recipe

OUT = ROOT / "benchmarks/results/concepts"
DEFAULT_CONCEPTS = ("circle", "diamond", "flower", "heart", "moon", "star", "ember", "lagoon")
BANDS = 3  # thirds of the noise schedule, from low to high noise
DRAWS, CURVE_DRAWS = 12, 3  # noise levels per held-out picture, at the end and along the curve
CURVE = (0, 5, *range(10, 101, 10), 150, 200, 300, 400, 600, 800, 1000, 1500, 2000, 3000, 4000, 5000, 6100)
SAMPLING = {"steps": 25, "cfg": 4.0}

# Nothing of this is in the training pictures' captions. {} is the word.
ASKED: dict[str, dict[str, dict[str, object]]] = {
    "object": {
        "a photo of {} in the snow": {"background": "snow"},
        "a photo of {} at night": {"background": "night"},
        "a photo of {} on the beach": {"background": "beach"},
        "a photo of {} in the desert": {"background": "desert"},
        "a photo of {} on a yellow background": {"background": "yellow"},
        "a photo of {} on a pink background": {"background": "pink"},
        "a photo of {} wearing a crown on a blue background": {"background": "blue", "hat": "crown"},
        "a photo of {} wearing a hat in the sea": {"background": "sea", "hat": "hat"},
        "a photo of {} wearing a crown on a green background": {"background": "green", "hat": "crown"},
        "a photo of {} wearing a hat on an orange background": {"background": "orange", "hat": "hat"},
    },
    "style": {
        f"a picture of a {colour} {shape} {where} in the style of {{}}": {"shape": shape, "hat": hat}
        for colour, shape, where, hat in (
            ("red", "heart", "on grass", "none"),
            ("blue", "star", "wearing a crown", "crown"),
            ("yellow", "moon", "in the snow", "none"),
            ("green", "flower", "wearing a hat", "hat"),
            ("pink", "mushroom", "at night", "none"),
            ("orange", "cross", "wearing a crown", "crown"),
            ("white", "drop", "in the sea", "none"),
            ("brown", "triangle", "wearing a hat", "hat"),
        )
    },
}
SHOWN = slice(0, 10, 2)  # of these prompts, on the contact sheets


class Cell:
    """One recipe on one concept with one seed."""

    def __init__(
        self, bench: Bench, name: str, recipe: Recipe, concept: Concept, seed: int, captions: bool, level: Level
    ) -> None:

        base = {"initializer": concept.initializer, "kind": concept.kind, "seed": seed}
        self.config = TrainConfig(**base, **recipe.settings)
        self.bench, self.recipe, self.concept, self.level = bench, recipe, concept, level
        self.about = {"recipe": name, "concept": concept.folder.name, "kind": concept.kind, "seed": seed}
        self.about |= {"captions": captions, "settings": saved_settings(self.config)}
        self.training = bench.dataset(concept, "train", self.config, captions)
        plain = replace(self.config, per_image_tokens=0)
        self.seen, self.heldout = (bench.dataset(concept, part, plain) for part in ("train", "heldout"))

    def run(self) -> tuple[dict[str, Any], Any, Tensor | None]:
        """Measurements, the learned word, and pictures (P, H, W, 3) of the prompts to show."""

        curve, seconds = [], 0.0
        with ExitStack() as stack:
            for path, value in self.recipe.constants.items():
                module, name = path.split(".")
                stack.enter_context(patch.object(import_module(f"textual_inversion.{module}"), name, value))
            plain = stack.enter_context(self.bench.model.training())
            with torch.no_grad():
                known = plain.vocabularies(), self.config.trigger, self.concept.initializer
                class_word = initial_embedding(*known, self.config.vectors)
            model = harder(plain, self.level, class_word, self.training, self.config)
            embedding = self.recipe.start(model, self.training, self.config).trainable()
            started = time.perf_counter()
            for step in train(model, embedding, self.training, self.config):
                # What the tool hands out: the last vectors, or ours, chosen on fixed noise.
                keeps_best = self.config.evaluate_every < self.config.steps
                word = step.best if keeps_best else embedding.snapshot()
                if step.number in CURVE or step.number == self.config.steps:
                    seconds += time.perf_counter() - started
                    curve.append(self._point(step, seconds, word))
                    started = time.perf_counter()
            if curve[-1][0] < self._images(step):
                curve.append(self._point(step, seconds + time.perf_counter() - started, word))
            class_losses, losses = (self.losses(self.heldout, w, DRAWS) for w in (class_word, word))
            result = self.about | {
                "curve": curve,
                "stopped": step.number,
                "kept": step.best_step if keeps_best else step.number,
                "began": step.progress.began,
                "agreement": step.progress.agreement,
                "gain": [step.progress.gain.mean / step.progress.initial_loss, step.progress.gain.certain],
                "level": vars(self.level) | vars(model.measured) | {"noise_scale": model.measured.noise_scale},
                "identity": 1 - sum(losses) / sum(class_losses),
                "bands": [1 - ours / theirs for ours, theirs in zip(losses, class_losses, strict=True)],
                "leak": sum(losses) / BANDS - self.loss(self.seen, word, DRAWS),
                "norm_ratio": _length(word) / _length(class_word),
                "drift": self.drift(class_word, word),
                "class_loss": self.loss(self.heldout, class_word, CURVE_DRAWS),
            }
        found, pictures = self.look(word)
        return result | found, word, pictures

    def _images(self, step) -> int:
        return step.number * self.config.batch_size * self.config.accumulation

    def _point(self, step, seconds: float, word) -> list[float]:
        return [self._images(step), round(seconds, 2), self.loss(self.heldout, word, CURVE_DRAWS)]

    def loss(self, dataset, word, draws: int) -> float:
        return sum(self.losses(dataset, word, draws)) / BANDS

    def losses(self, dataset, word, draws: int) -> list[float]:
        """By band of noise, on the same noise for every word."""

        batches = fixed_batches(dataset, replace(self.config, batch_size=32, flip_probability=0.0), draws)
        banded = [[batch.rows((batch.quantiles * BANDS).long() == band) for batch in batches] for band in range(BANDS)]
        return [mean_loss(self.bench.model, [word], [b for b in rows if b.prompts]) for rows in banded]

    def drift(self, class_word, word) -> float:

        return drift(self.bench.model, class_word, word)

    def look(self, word) -> tuple[dict[str, Any], Tensor | None]:
        """How often samples show what was asked for, and what the concept is."""
        if self.concept.folder.parent != CONCEPTS:
            return {}, None
        return samples_of(self.bench, self.concept, word, self.heldout.latents[0].shape)


def samples_of(bench: Bench, concept: Concept, word, shape) -> tuple[dict[str, Any], Tensor]:

    asked = ASKED[concept.kind]
    prompts = [place_trigger(prompt, word.trigger) for prompt in asked]
    pictures = torch.cat([bench.model.generate(text, word, shape, n, **SAMPLING) for n, text in enumerate(prompts)])
    read = load_judge().describe(pictures.movedim(-1, 1))
    identity = json.loads((concept.folder / "concept.json").read_text())["identity"]
    own = {name.replace("_", " "): value for name, value in identity.items()}
    own = own if concept.kind == "object" else {"style": "some"}
    obeyed = [
        seen[name] == value for seen, wish in zip(read, asked.values(), strict=True) for name, value in wish.items()
    ]
    looked = [seen[name] == value for seen in read for name, value in own.items()]
    return {"obeys": sum(obeyed) / len(obeyed), "looks": sum(looked) / len(looked)}, pictures[SHOWN]


def _length(word) -> float:
    return torch.cat([vectors.norm(dim=1) for vectors in word.vectors.values()]).mean().item()


def cells(args: argparse.Namespace, recipes: dict[str, Recipe]) -> Iterator[tuple[str, str, int]]:
    """The cheap recipes and the first seed first, so that a stopped run has something of all."""
    for seed in args.seeds:
        for name in args.recipes or sorted(recipes, key=lambda name: recipes[name].settings.get("steps", 0)):
            yield from ((name, concept, seed) for concept in args.concepts)


def main() -> None:
    recipes = RECIPES | ABLATIONS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=recipes, help="default: all")
    parser.add_argument("--concepts", nargs="+", default=DEFAULT_CONCEPTS, help="names of demo/concepts, or folders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--captions", action="store_true", help="use the captions of the training pictures")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of the demo model")
    parser.add_argument("--cosine", type=float, default=0.0, help="agreement of gradients at the start (levels.py)")
    parser.add_argument("--noise", type=float, default=0.0, help="irreducible noise, times the residual (levels.py)")
    parser.add_argument("--wild", action="store_true", help="the model of 128 pixels and the concepts in its world")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.relative_to(ROOT)}, and a folder in it for each level")
    parser.add_argument("--report", action="store_true", help="learn nothing: only write tables, plot and sheets")
    args = parser.parse_args()
    level = Level(args.cosine, args.noise)
    name = "wild" if args.wild else level.name.replace(" ", "-")
    args.out = args.out or (OUT / name if args.wild or args.cosine or args.noise else OUT)
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    if not args.report:
        with tempfile.TemporaryDirectory() as folder:
            if args.wild:
                draw_concepts(Path(folder), wild.render, args.concepts)
                args.concepts = [str(Path(folder, concept)) for concept in args.concepts]
            bench = Bench(args.model or (WILD if args.wild else CHECKPOINT))
            for name, concept, seed in cells(args, recipes):
                learn(bench, args, name, recipes[name], Concept.read(concept), seed, level)
    from .concepts_report import write_levels, write_report

    write_report(args.out)
    write_levels(OUT)


def learn(
    bench: Bench, args: argparse.Namespace, name: str, recipe: Recipe, concept: Concept, seed: int, level: Level
) -> None:
    """Measures a cell, unless that has been done with the same settings."""

    name += " + captions" if args.captions else ""
    cell = Cell(bench, name, recipe, concept, seed, args.captions, level)
    known = read_cells(args.out).get((name, concept.folder.name, seed))
    if known and known["settings"] == cell.about["settings"]:
        return
    result, word, pictures = cell.run()
    path = args.out / "cells" / file_name(result)
    if pictures is not None and seed == 0:
        to_pillow(torch.cat(list(pictures), dim=1)).save(f"{path}.jpg", quality=90)
    formats.write(word, Path(f"{path}.safetensors"))
    add_cell(args.out, result)
    obeys = f"obeys {result['obeys']:.0%} looks {result['looks']:.0%}" if "obeys" in result else ""
    print(f"{path.name}: identity {result['identity']:.3f} drift {result['drift']:.3f} {obeys}", flush=True)


if __name__ == "__main__":
    main()
