"""The defaults in other uses: fewer and more pictures, busy scenes, masks, captions, vectors, batches of one.

    python -m benchmarks.uses                  heart and ember, seed 0, at every use
    python -m benchmarks.uses --concepts moon --uses "1 picture" "200 pictures"

Pictures are drawn for each use by the world of the demo model (toy_model/); held-out pictures and identity are those of
benchmarks/concepts.py. Results: benchmarks/results/uses.md.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from demo.measure import CONCEPTS, Bench, Concept
from dev.in_process import ROOT
from textual_inversion import TrainConfig
from toy_model.make_concepts import CHARACTERS, HELD_OUT, STYLES, TRAINING, character_pictures, style_pictures, write
from toy_model.world import Style

from .concepts import Cell
from .levels import Level
from .recipes import Recipe

OUT = ROOT / "benchmarks/results/uses.md"
ABOUT = (
    "Identity on held-out pictures of the demo model (`python -m benchmarks.uses`), one seed, no captions unless said."
)
SCENES = tuple(place for place in HELD_OUT if place not in ("black", "green"))


@dataclass(frozen=True)
class Use:
    pictures: int = 4
    places: tuple[str, ...] = TRAINING
    settings: Mapping[str, Any] = field(default_factory=dict)
    captions: bool = False
    masks: bool = False


USES = {
    "4 pictures, as in the demo": Use(),
    "1 picture": Use(1),
    "2 pictures": Use(2),
    "8 pictures": Use(8),
    "30 pictures": Use(30, TRAINING + SCENES),
    "200 pictures": Use(200, TRAINING + SCENES),
    "30 pictures with captions": Use(30, TRAINING + SCENES, captions=True),
    "200 pictures with captions": Use(200, TRAINING + SCENES, captions=True),
    "4 scenes": Use(4, SCENES),
    "4 scenes with captions": Use(4, SCENES, captions=True),
    "captions": Use(captions=True),
    "masks": Use(masks=True),
    "masks with captions": Use(captions=True, masks=True),
    "batch 1, accumulation 4": Use(settings={"batch_size": 1, "accumulation": 4}),
    "batch 1": Use(settings={"batch_size": 1}),
    "4 vectors": Use(settings={"vectors": 4}),
    "16 vectors": Use(settings={"vectors": 16}),
    "1 picture, 4 vectors": Use(1, settings={"vectors": 4}),
    "mirrored at random": Use(settings={"flip_probability": 0.5}),
}


def drawn(name: str, use: Use, folder: Path) -> Concept:
    """A concept of the demo with pictures in the places of a use; held-out pictures stay."""
    places = tuple(islice(cycle(use.places), use.pictures))
    if name in CHARACTERS:
        pictures = [picture for place in places for picture in character_pictures(CHARACTERS[name], (place,))]
    else:
        style, rng = Style("palette", "{}", palette=STYLES[name]), random.Random(0)
        pictures = [picture for place in places for picture in style_pictures(style, rng, (place,))]
    write(folder / "train", pictures, seed=500)
    shutil.copytree(CONCEPTS / name / "heldout", folder / "heldout")
    shutil.copy(CONCEPTS / name / "concept.json", folder)
    return Concept.read(str(folder))


def with_masks(dataset):
    """The middle of every picture counts: where the character is."""
    height, width = dataset.latents[0].shape[-2:]
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 1
    return replace(dataset, masks=[mask] * len(dataset.latents))


def measured(bench: Bench, name: str, use: Use, seed: int) -> dict[str, Any]:
    # As the engine does it where masks leave no background; here they come later.
    settings = {**use.settings, "per_image_tokens": 0} if use.masks and name in CHARACTERS else use.settings
    with tempfile.TemporaryDirectory() as folder:
        cell = Cell(bench, name, Recipe(settings), drawn(name, use, Path(folder)), seed, use.captions, Level())
        if use.masks:  # what is outside may become anything
            cell.training, cell.heldout = with_masks(cell.training), with_masks(cell.heldout)
        return cell.run()[0]


def table(rows: Mapping[str, list[dict[str, Any]]]) -> str:
    concepts = list(dict.fromkeys(cell["concept"] for cells in rows.values() for cell in cells))
    lines = ["# The defaults in other uses", "", ABOUT, ""]
    lines += [f"| use | {' | '.join(concepts)} | pictures seen | ended by itself | says it learned |", "|---" * 6 + "|"]
    for use, cells in rows.items():
        found = {cell["concept"]: cell for cell in cells}
        identity = " | ".join(f"{found[name]['identity']:.3f}" if name in found else "" for name in concepts)
        seen = ", ".join(str(round(cell["curve"][-1][0])) for cell in cells)
        ended = ", ".join("yes" if cell["stopped"] < TrainConfig().steps else "no" for cell in cells)
        says = ", ".join("yes" if cell["gain"][1] else "no" for cell in cells)
        lines.append(f"| {use} | {identity} | {seen} | {ended} | {says} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["heart", "ember"], choices=[*CHARACTERS, *STYLES])
    parser.add_argument("--uses", nargs="+", default=list(USES), choices=USES)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    bench = Bench()
    rows: dict[str, list[dict[str, Any]]] = {}
    for use in args.uses:
        rows[use] = []
        for name in args.concepts:
            rows[use].append({**measured(bench, name, USES[use], 0), "concept": name})
            print(json.dumps({"use": use, "concept": name, "identity": rows[use][-1]["identity"]}), flush=True)
        args.out.write_text(table(rows))


if __name__ == "__main__":
    main()
