"""Draw samples from a trained checkpoint, without ComfyUI: for the judge and for sample sheets."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dev.get_comfyui import ROOT

from .networks import read_checkpoint, sampling_schedule, use_channels_last
from .text import tokenize
from .world import caption, named_styles, random_picture

CHECKPOINT = ROOT / "demo/models/toy.safetensors"


class Sampler:
    """The checkpoint as diffusers classes."""

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        self.unet, self.text_encoder, self.vae = read_checkpoint(checkpoint)
        use_channels_last(self.unet)
        self.schedule = sampling_schedule()

    def text(self, prompts: list[str]) -> Tensor:
        return self.text_encoder(tokenize(prompts)).last_hidden_state

    @torch.no_grad()
    def sample(self, prompts: list[str], guidance: float = 4.0, steps: int = 25, seed: int = 0) -> Tensor:
        """Pictures (prompts, 3, side, side) from 0 to 1; prompt number i starts at seed + i."""
        context = torch.cat([self.text([""]).repeat(len(prompts), 1, 1), self.text(prompts)])
        seeds = (torch.Generator().manual_seed(seed + i) for i in range(len(prompts)))
        side = self.unet.config["sample_size"]
        latents = torch.stack([torch.randn(4, side, side, generator=g) for g in seeds])
        self.schedule.set_timesteps(steps)
        for t in self.schedule.timesteps:
            without, given = self.unet(latents.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
            noise = without + guidance * (given - without)
            latents = self.schedule.step(noise, t, latents).prev_sample
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return (self.vae.decode(latents)[0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        return self.vae.encode(pictures * 2 - 1)[0]


def sheet(pictures: Tensor, labels: list[str], path: Path, columns: int = 8) -> None:
    """Pictures at twice their size, each above its caption."""
    side, text_height, letters = 128, 42, 21
    rows = -(-len(labels) // columns)
    page = Image.new("RGB", (columns * (side + 4), rows * (side + text_height)), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=False)):
        x, y = i % columns * (side + 4), i // columns * (side + text_height)
        pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        lines = [label[k : k + letters] for k in range(0, len(label), letters)]
        draw.multiline_text((x, y + side + 1), "\n".join(lines[:4]), fill="black", spacing=-1)
    page.save(path, quality=92)


def prompts_of_every_kind(seed: int = 5) -> list[str]:
    """Descriptions, names, styles and monochromes; the same for every checkpoint."""
    rng = random.Random(seed)
    free = [random_picture(rng, named=0, styled=0) for _ in range(24)]
    names = [random_picture(rng, named=1, styled=0) for _ in range(5)]
    prompts = [caption(p).replace(p.prefix, "a photo of") for p in free + names]
    prompts += [f"a photo of lucy {where}" for where in ("on grass", "at night", "in the sea")]
    for style in list(named_styles())[:6]:
        prompts.append(f"a picture of lucy in the style of {style}")
    return [*prompts, "a green monochrome of lucy", "a red monochrome of a star with two eyes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a sheet of samples")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    prompts = args.prompt or prompts_of_every_kind()
    sheet(Sampler(args.checkpoint).sample(prompts, args.guidance), prompts, args.out)


if __name__ == "__main__":
    main()
