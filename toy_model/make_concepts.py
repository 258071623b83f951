"""Draw what the model has never seen: `python -m toy_model.make_concepts` fills demo/concepts.

    python -m toy_model.make_concepts --wild FOLDER     the same concepts as wild.py draws them

Every concept gets four pictures to learn from and eight to check with, each with a caption beside
it in which `{}` stands for the new word, and a concept.json that says what it really is.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from dev.get_comfyui import ROOT

from . import drawing, wild
from .world import Character, Picture, Style, caption, describe, named_characters, named_styles

CONCEPTS = ROOT / "demo/concepts"
CHARACTERS = {  # shape, colour, second colour, pattern, eyes, ears
    "heart": Character("heart", "orange", "blue", "dots", 1, "horns"),
    "square": Character("square", "white", "red", "checks", 2, "ears"),
    "star": Character("star", "lavender", "coral", "half", 2, "none"),
    "circle": Character("circle", "teal", "yellow", "stripes", 3, "antenna"),
    "drop": Character("drop", "moss", "rose", "bars", 2, "antenna"),
    "moon": Character("moon", "mustard", "navy", "plain", 1, "ears"),
    "mushroom": Character("mushroom", "purple", "lime", "dots", 2, "none"),
    "flower": Character("flower", "pink", "green", "half", 3, "horns"),
    "diamond": Character("diamond", "cyan", "maroon", "stripes", 1, "ears"),
    "oval": Character("oval", "brown", "mint", "bars", 3, "ears"),
    "triangle": Character("triangle", "yellow", "violet", "plain", 2, "horns"),
    "cross": Character("cross", "rose", "white", "checks", 1, "none"),
}
STYLES = {  # dark, light
    "ember": ((0.25, 0.00, 0.12), (1.00, 0.78, 0.25)),
    "lagoon": ((0.00, 0.12, 0.30), (0.55, 1.00, 0.75)),
    "orchid": ((0.10, 0.25, 0.05), (1.00, 0.70, 0.95)),
}
TRAINING = ("white", "grass", "azure", "gray")
HELD_OUT = ("black", "snow", "green", "beach", "tan", "night", "magenta", "sea")
HATS = ("none", "none", "none", "none", "hat", "none", "none", "crown")


def picture_of(who: Character, background: str, hat: str = "none") -> Picture:
    return Picture(who, background, hat, prefix="a photo of")


def character_pictures(who: Character, places: tuple[str, ...]) -> list[tuple[Picture, str]]:
    """The character in these places; some held-out pictures have a hat."""
    hats = HATS if len(places) == len(HATS) else ("none",) * len(places)
    pictures = [picture_of(who, *scene) for scene in zip(places, hats, strict=True)]
    return [(picture, caption(picture, subject="{}")) for picture in pictures]


def style_pictures(style: Style, rng: random.Random, places: tuple[str, ...]) -> list[tuple[Picture, str]]:
    """Different characters of the model's world, all in one style."""
    result = []
    for background, name in zip(places, rng.sample(list(named_characters()), len(places)), strict=True):
        picture = Picture(named_characters()[name], background, style=style, name=name, prefix="a picture of")
        result.append((picture, caption(picture)))
    return result


def write(folder: Path, pictures: list[tuple[Picture, str]], seed: int, render: Callable = drawing.render) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    jitter = np.random.default_rng(seed)
    for i, (picture, text) in enumerate(pictures):
        Image.fromarray(render(picture, jitter)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text + "\n")


def write_concept(folder: Path, about: dict, training: list, held_out: list, seed: int, render: Callable) -> None:
    write(folder / "train", training, seed, render)
    write(folder / "heldout", held_out, seed + 1, render)
    (folder / "concept.json").write_text(json.dumps(about, indent=2) + "\n")


def nearest_style(style: Style) -> str:
    """The named style whose colours come closest."""
    palettes = {name: known.palette for name, known in named_styles().items() if known.palette}
    return min(palettes, key=lambda name: float(np.abs(np.subtract(palettes[name], style.palette)).sum()))


def draw_concepts(into: Path, render: Callable, names: Iterable[str] = (*CHARACTERS, *STYLES)) -> None:
    """Each of the concepts in a folder of its name."""
    for number, (name, who) in enumerate(CHARACTERS.items()):
        if who in named_characters().values():
            raise ValueError(f"{name} has a name already")
        about = {
            "kind": "object",
            "initializer": who.shape,
            "description": describe(who),
            "identity": asdict(who),
        }
        if name in names:
            training, held_out = (character_pictures(who, places) for places in (TRAINING, HELD_OUT))
            write_concept(into / name, about, training, held_out, 100 + 2 * number, render)
    for number, (name, palette) in enumerate(STYLES.items()):
        style, rng = Style("palette", "{}", palette=palette), random.Random(number)
        near = nearest_style(style)
        about = {
            "kind": "style",
            "initializer": near,
            "description": near,
            "identity": {"dark": palette[0], "light": palette[1]},
        }
        if name in names:
            training, held_out = (style_pictures(style, rng, places) for places in (TRAINING, HELD_OUT))
            write_concept(into / name, about, training, held_out, 200 + 2 * number, render)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wild", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    draw_concepts(*((args.wild, wild.render) if args.wild else (CONCEPTS, drawing.render)))


if __name__ == "__main__":
    main()
