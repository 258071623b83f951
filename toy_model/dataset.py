"""Render training pictures to disk: `python -m toy_model.dataset OUT.npy --count 24000 --seed 1 [--wild]`."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import drawing, wild
from .world import caption, random_picture


def render_set(count: int, seed: int, render: Callable = drawing.render) -> tuple[np.ndarray, list[str]]:
    """`count` random pictures (count, side, side, 3) and their captions."""
    rng, jitter = random.Random(seed), np.random.default_rng(seed)
    pictures = [random_picture(rng) for _ in range(count)]
    images = np.stack([render(picture, jitter) for picture in pictures])
    return images, [caption(picture, rng) for picture in pictures]


def load_set(paths: list[Path]) -> tuple[np.ndarray, list[str]]:
    """The pictures and captions of files written by `main`."""
    images = np.concatenate([np.load(path) for path in paths])
    captions = [c for path in paths for c in json.loads(path.with_suffix(".json").read_text())]
    return images, captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a .npy file; captions go beside it as .json")
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--wild", action="store_true", help="128 pixels, with pose, light, textures and litter")
    args = parser.parse_args()
    images, captions = render_set(args.count, args.seed, (wild if args.wild else drawing).render)
    args.out.with_suffix(".json").write_text(json.dumps(captions))
    unfinished = args.out.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, images)
    unfinished.replace(args.out)  # whole or not at all


if __name__ == "__main__":
    main()
