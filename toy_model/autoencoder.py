"""A narrow TAESD: the tiny autoencoder's own layout with fewer channels and blocks.

Missing channels are zeros and missing blocks add nothing, so the narrow net can be written out,
exactly, as the 64-channel TAESD that ComfyUI and diffusers know.  A block ends with a ReLU, so
a stage without any block still has that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import nn

SHARP_DECODER = (1, 1, 1, 3)  # blocks of the decoder once its last training adds one
WILD = {"widths": (32, 64, 64, 64), "encoder_blocks": (0, 2, 3, 3), "decoder_blocks": (1, 2, 3, 3)}  # for wild.py


def conv(inputs: int, outputs: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """TAESD's residual block; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, last = (conv(width, width) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


def stage(width: int, blocks: int) -> list[nn.Module]:
    return [Block(width) for _ in range(blocks)] or [nn.ReLU()]


class NarrowTAESD(nn.Module):
    """Pixels from 0 to 1; widths and block counts are listed from full resolution down."""

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 48, 64),
        encoder_blocks: tuple[int, ...] = (0, 1, 1, 3),
        decoder_blocks: tuple[int, ...] = (0, 1, 1, 3),
    ) -> None:
        super().__init__()
        self.encoder_blocks, self.decoder_blocks = encoder_blocks, decoder_blocks
        layers: list[nn.Module] = [conv(3, widths[0])]
        for level, blocks in enumerate(encoder_blocks):
            if level:
                layers.append(conv(widths[level - 1], widths[level], stride=2, bias=False))
            layers += stage(widths[level], blocks)
        self.encoder = nn.Sequential(*layers, conv(widths[3], 4))
        layers = [Clamp(), conv(4, widths[3]), nn.ReLU()]
        for level in (3, 2, 1, 0):
            if level < 3:
                layers.append(nn.Upsample(scale_factor=2))
                layers.append(conv(widths[level + 1], widths[level], bias=False))
            layers += stage(widths[level], decoder_blocks[level])
        self.decoder = nn.Sequential(*layers, conv(widths[0], 3))

    def forward(self, images: torch.Tensor, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """What becomes of images whose latents get noise on the way, and the latents without it."""
        latents = self.encoder(images)
        return self.decoder(latents + noise * torch.randn_like(latents)), latents


def padded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` in the top corner of zeros shaped as `like`."""
    result = torch.zeros_like(like)
    result[tuple(slice(size) for size in value.shape)] = value
    return result


def aligned(
    narrow: nn.Sequential, full: nn.Sequential, present: tuple[int, ...]
) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Pairs of corresponding layers; None where the narrow net has no such block."""
    layers, counts = iter(narrow), iter(present)
    block = blocks = 0  # the next block of this stage, and how many the narrow net has
    for layer in full:
        if not hasattr(layer, "fuse"):
            block = 0
            yield next(layers), layer
            continue
        if block == 0:
            blocks = next(counts)
            if blocks == 0:
                next(layers)  # the ReLU of an empty stage
        yield (next(layers) if block < blocks else None), layer
        block += 1


def to_diffusers(narrow: NarrowTAESD) -> AutoencoderTiny:
    """The same function as a full-width TAESD."""
    vae = AutoencoderTiny()
    sides = (
        (narrow.encoder, vae.encoder.layers, narrow.encoder_blocks),
        (narrow.decoder[1:], vae.decoder.layers, narrow.decoder_blocks[::-1]),
    )
    for small, full, present in sides:
        for source, target in aligned(small, full, present):
            weights = {} if source is None else source.state_dict()
            target.load_state_dict(
                {
                    name: padded(weights[name], like) if name in weights else torch.zeros_like(like)
                    for name, like in target.state_dict().items()
                }
            )
    return vae.eval()
