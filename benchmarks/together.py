"""Two concepts that are only ever seen together, told apart by their captions.

    python -m benchmarks.together            every pair, 3 seeds; writes results/together/report.md

Four pictures show a character the model has never seen, in a style it has never seen: "a picture of <heart> on grass
in the style of <ember>". Both words are learned in one run (library.py) from the same four pictures. Each is then
measured alone: the character in pictures without the style, the style on other characters, as `identity` is in
benchmarks/concepts.py. Beside it, what each reaches from four pictures of its own, where nothing has to be told apart.
"""

import argparse
from typing import Any

import numpy as np
import torch

from demo.measure import Bench, Concept
from dev.get_comfyui import ROOT

OUT = ROOT / "benchmarks/results/together"
PAIRS = (("heart", "ember"), ("star", "lagoon"), ("moon", "orchid"))


def pictures_of(pair: tuple[str, str]) -> tuple[list[torch.Tensor], list[str]]:
    """Pictures (1, 64, 64, 3) of a character in a style, and captions that name both."""
    from toy_model.drawing import render
    from toy_model.make_concepts import CHARACTERS, STYLES, TRAINING
    from toy_model.world import Picture, Style, place

    who, how = pair
    jitter, images, captions = np.random.default_rng(7), [], []
    for background in TRAINING:
        picture = Picture(CHARACTERS[who], background, style=Style("palette", "{}", palette=STYLES[how]))
        images.append(torch.from_numpy(render(picture, jitter)).float()[None] / 255)
        captions.append(f"a picture of <{who}> {place(background)} in the style of <{how}>")
    return images, captions


class Run:
    """One concept for ``learn_together``."""

    saved = None

    def __init__(self, model: Any, concept: Any, config: Any) -> None:
        self.model, self.concept, self.config = model, concept, config
        self.dataset = concept.dataset(model.encode_images, config)

    def begin(self, resume: bool) -> tuple[Any, Any]:
        from textual_inversion import initial_embedding

        return initial_embedding(
            self.model.vocabularies(), self.concept.trigger, self.config.initializer, 1
        ), self.config


def learned(bench: Bench, concepts: list[Any], initializers: list[str], seed: int) -> dict[str, Any]:
    """The last step of each concept by its trigger word."""
    from textual_inversion import Step, TrainConfig
    from textual_inversion.library import learn_together

    last: dict[str, Any] = {}
    with bench.model.training() as model:
        runs = [
            Run(bench.model, concept, TrainConfig(trigger=concept.trigger, initializer=word, seed=seed))
            for concept, word in zip(concepts, initializers, strict=True)
        ]
        for run, step in learn_together(model, runs):
            assert isinstance(step, Step), step
            last[run.concept.trigger] = step
    return last


def identity(bench: Bench, known: Concept, step: Any, trigger: str) -> float:
    """1 - L(word) / L(class) on the held-out pictures of the concept alone."""
    from textual_inversion import TrainConfig, initial_embedding

    heldout = bench.dataset(known, "heldout", TrainConfig(trigger=trigger))
    with bench.model.training() as model:
        start = initial_embedding(model.vocabularies(), trigger, known.initializer, 1)
        before = bench.heldout_loss(heldout, start, known.initializer)
        return 1 - bench.heldout_loss(heldout, step.best.renamed(trigger), trigger) / before


def main() -> None:
    from textual_inversion.library import Concept as Learned
    from textual_inversion.library import by_concept

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=len(PAIRS))
    arguments, bench = parser.parse_args(), Bench()
    lines = [
        "| pair | seed | word | from pairs only | steps | from pictures of its own | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS[: arguments.pairs]:
        known = [Concept.read(name) for name in pair]
        words, classes = [f"<{name}>" for name in pair], [one.initializer for one in known]
        images, captions = pictures_of(pair)
        together = by_concept([words[0], words[0], words[1], words[1]], images, [], captions, "object")
        alone = []
        for one, word in zip(known, words, strict=True):
            own, _, texts, _ = bench._load_folder(one.folder / "train", 0, False)
            alone.append(Learned(word, own, [], texts))
        for seed in arguments.seeds:
            both, single = learned(bench, together, classes, seed), learned(bench, alone, classes, seed)
            for one, word in zip(known, words, strict=True):
                cells = [
                    f"{identity(bench, one, last[word], word):.2f} | {last[word].number}" for last in (both, single)
                ]
                lines.append(f"| {' and '.join(pair)} | {seed} | {word} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
