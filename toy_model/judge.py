"""A small network that reads pictures of the toy world, and with it a measure of the model.

python -m toy_model.judge train WORK      trains it, on rendered pictures alone
python -m toy_model.judge measure         how often samples show what their captions ask for
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dev.get_comfyui import ROOT

from .autoencoder import NarrowTAESD
from .drawing import render
from .sampling import CHECKPOINT, Sampler
from .world import (
    COLOURS,
    EARS,
    EYES,
    HATS,
    HELD_OUT_COLOURS,
    PATTERNS,
    SCENES,
    SHAPES,
    Picture,
    caption,
    random_character,
    random_picture,
)

WEIGHTS = ROOT / "demo/models/judge.safetensors"
ALL_COLOURS = (*COLOURS, *HELD_OUT_COLOURS)
ATTRIBUTES: dict[str, tuple] = {
    "shape": SHAPES,
    "colour": ALL_COLOURS,
    "second colour": ALL_COLOURS,
    "pattern": PATTERNS,
    "eyes": EYES,
    "ears": EARS,
    "hat": HATS,
    "background": (*COLOURS, *SCENES),
    "style": ("none", "some"),
}
UNKNOWN = -100  # what a picture does not tell, as cross_entropy wants it


def truth(picture: Picture) -> dict[str, object]:
    """What can be seen in a picture; a style hides the colours."""
    who = picture.character
    seen: dict[str, object] = {
        "shape": who.shape,
        "pattern": who.pattern,
        "eyes": who.eyes,
        "ears": who.ears,
        "hat": picture.hat,
        "style": "some" if picture.style else "none",
    }
    if not picture.style:
        seen |= {"colour": who.colour, "background": picture.background}
        if who.shows_second_colour:
            seen["second colour"] = who.second_colour
    return seen


def labels(pictures: list[Picture]) -> Tensor:
    """Class numbers (pictures, attributes)."""
    seen = [truth(picture) for picture in pictures]
    rows = [[v.index(t[a]) if a in t else UNKNOWN for a, v in ATTRIBUTES.items()] for t in seen]
    return torch.tensor(rows)


class Judge(nn.Module):
    """Reads every attribute from a picture of 64 x 64 pixels with values from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 128, 2))
        for inputs, outputs, stride in widths:
            layers.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 192), nn.ReLU())
        self.heads = nn.Linear(192, sum(len(values) for values in ATTRIBUTES.values()))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Scores of every attribute's values."""
        scores = self.heads(self.body(pictures * 2 - 1))
        return list(scores.split([len(values) for values in ATTRIBUTES.values()], 1))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """The likeliest class numbers (pictures, attributes)."""
        return torch.stack([scores.argmax(1) for scores in self(pictures)], 1)

    def describe(self, pictures: Tensor) -> list[dict[str, object]]:
        """The likeliest value of every attribute of every picture."""
        named = list(ATTRIBUTES.items())
        return [
            {a: values[i] for (a, values), i in zip(named, row, strict=True)} for row in self.read(pictures).tolist()
        ]


def load_judge(path: Path = WEIGHTS) -> Judge:
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    return judge.eval()


def rendered(pictures: list[Picture], seed: int) -> Tensor:
    """Pictures as the renderer draws them, uint8 (pictures, 3, 64, 64)."""
    jitter = np.random.default_rng(seed)
    images = np.stack([render(picture, jitter) for picture in pictures])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def fresh_pictures(count: int, seed: int) -> list[Picture]:
    """Free descriptions of every kind, half of them with the held-out colours among the others."""
    rng, pictures = random.Random(seed), []
    for i in range(count):
        picture = random_picture(rng, named=0)
        if i % 2:
            who = random_character(rng, ALL_COLOURS)
            picture = replace(picture, character=who)
        pictures.append(picture)
    return pictures


def softened(pictures: Tensor) -> Tensor:
    """Some pictures blurred and noisy, as samples can be."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(pictures), 1, 1, 1)
    noise = 0.06 * torch.rand(len(pictures), 1, 1, 1) * torch.randn_like(pictures)
    return (pictures.lerp(blurred, share) + noise).clamp(0, 1)


def through_vae(sampler: Sampler, pictures: Tensor) -> Tensor:
    parts = (part.float() / 255 for part in pictures.split(64))
    return torch.cat([sampler.decode(sampler.encode(part)) for part in parts])


def train(args: argparse.Namespace) -> None:
    """Half of every batch comes from the autoencoder, so that the judge knows its softness."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pictures = fresh_pictures(args.pictures, seed=77)
    images, known = rendered(pictures, seed=77), labels(pictures)
    print(f"{len(images)} pictures", flush=True)
    vae = NarrowTAESD()
    vae.load_state_dict(torch.load(args.work / "vae.pt"))
    parts = images[: args.softened].split(64)
    with torch.no_grad():
        passed = torch.cat([(vae.decoder(vae.encoder(part / 255)).clamp(0, 1) * 255).byte() for part in parts])
    print(f"{len(passed)} through the autoencoder", flush=True)
    judge, batch, start = Judge(), 48, time.time()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    for step in range(1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 100) * (1.01 - step / args.steps)
        sharp, soft = torch.randint(len(images), (batch,)), torch.randint(len(passed), (batch,))
        inputs = torch.cat([images[sharp], passed[soft]]).float() / 255
        targets = torch.cat([known[sharp], known[soft]])
        scores = judge(softened(inputs))
        loss = torch.stack([F.cross_entropy(s, targets[:, k]) for k, s in enumerate(scores)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"{step} {time.time() - start:.0f}s loss {loss:.3f}", flush=True)
    keep = {k: v.half() for k, v in judge.state_dict().items() if "num_batches" not in k}
    save_file(keep, args.out)


def accuracy(judge: Judge, images: Tensor, known: Tensor) -> dict[str, float]:
    """Of the attributes that can be seen, the share that the judge reads as given."""
    right, told = judge.read(images) == known, known != UNKNOWN
    shares = (right & told).sum(0) / told.sum(0)
    return dict(zip(ATTRIBUTES, shares.tolist(), strict=True))


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    rng, judge, sampler = random.Random(2024), load_judge(), Sampler(args.checkpoint)
    pictures = [random_picture(rng, named=0, styled=0) for _ in range(args.count)]
    prompts = [caption(replace(picture, prefix="a photo of")) for picture in pictures]
    parts = [
        sampler.sample(prompts[i : i + 32], args.guidance, args.steps, seed=1000 + i) for i in range(0, args.count, 32)
    ]
    known, originals = labels(pictures), rendered(pictures, seed=9)
    sampled = accuracy(judge, torch.cat(parts), known)
    ceiling = accuracy(judge, through_vae(sampler, originals), known)
    clean = accuracy(judge, originals.float() / 255, known)
    print(f"{args.count} descriptions, guidance {args.guidance}, {args.steps} steps\n")
    print("| attribute | in the sample | judge on rendered, through the VAE | on rendered |")
    print("|---|---|---|---|")
    for name in ATTRIBUTES:
        print(f"| {name} | {sampled[name]:.0%} | {ceiling[name]:.0%} | {clean[name]:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train")
    command.add_argument("work", type=Path, help="the folder with vae.pt")
    command.add_argument("--out", type=Path, default=WEIGHTS)
    command.add_argument("--pictures", type=int, default=16000)
    command.add_argument("--softened", type=int, default=6000)
    command.add_argument("--steps", type=int, default=1500)
    command.set_defaults(run=train)
    command = commands.add_parser("measure")
    command.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    command.add_argument("--count", type=int, default=192)
    command.add_argument("--guidance", type=float, default=4.0)
    command.add_argument("--steps", type=int, default=25)
    command.set_defaults(run=measure)
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
