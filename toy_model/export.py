"""Write a UNet, a text encoder and a TAESD as one fp16 checkpoint with Stable Diffusion 1 names.

python -m toy_model.export CHECKPOINT VAE.pt OUT.safetensors     puts another autoencoder into a checkpoint
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from .autoencoder import SHARP_DECODER, NarrowTAESD, to_diffusers

LATENT_SCALE = 0.18215  # TAESD's latents are unscaled; ComfyUI's SD15 format scales by this

OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
INSIDE_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def inner_name(kind: str, rest: str) -> str:
    """The name within a block: ResNets call their layers differently, attentions the same."""
    if kind != "resnets":
        return rest
    layer, parameter = rest.split(".", 1)
    return f"{INSIDE_RESNET[layer]}.{parameter}"


def unet_name(name: str, layers: int, attention_levels: set[int]) -> str:
    """The Stable Diffusion 1 name of a diffusers UNet parameter.

    Each of diffusers' down levels is `layers` input blocks and a downsampler, each of its up
    levels `layers + 1` output blocks, the last of which ends with the upsampler.
    """
    for ours, theirs in OUTER.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    if found := MIDDLE.fullmatch(name):
        kind, index, rest = found.groups()
        position = 2 * int(index) if kind == "resnets" else 1
        return f"middle_block.{position}.{inner_name(kind, rest)}"
    found = BLOCK.fullmatch(name)
    if not found:
        raise KeyError(name)
    side, level, kind, index, rest = found.groups()
    first = int(level) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        position = 2 if int(level) in attention_levels else 1
        return f"output_blocks.{first + layers}.{position}.{rest}"
    block = f"input_blocks.{first + int(index) + 1}"
    if side == "up":
        block = f"output_blocks.{first + int(index)}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{inner_name(kind, rest)}"


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    weights = unet.state_dict()
    attention = {int(name.split(".")[1]) for name in weights if name.startswith("up_blocks") and ".attentions." in name}
    layers = unet.config.layers_per_block
    return {"model.diffusion_model." + unet_name(name, layers, attention): value for name, value in weights.items()}


def text_tensors(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    return {
        "cond_stage_model.transformer.text_model." + name.removeprefix("text_model."): value
        for name, value in text_encoder.state_dict().items()
        if "position_ids" not in name
    }


def vae_tensors(vae: AutoencoderTiny) -> dict[str, Tensor]:
    """The original TAESD names: there the decoder's first layer is the clamp."""
    result = {
        "first_stage_model.vae_scale": torch.tensor(LATENT_SCALE),
        "first_stage_model.vae_shift": torch.tensor(0.0),
    }
    for name, value in vae.state_dict().items():
        side, _, index, rest = name.split(".", 3)
        position = int(index) + (side == "decoder")
        result[f"first_stage_model.taesd_{side}.{position}.{rest}"] = value
    return result


def export(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderTiny, path: Path) -> None:
    """One checkpoint, written whole or not at all."""
    tensors = unet_tensors(unet) | text_tensors(text_encoder) | vae_tensors(vae)
    exact = ("vae_scale", "vae_shift")
    tensors = {
        name: (value.float() if name.endswith(exact) else value.half()).contiguous() for name, value in tensors.items()
    }
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(path)


def load_vae(path: Path) -> AutoencoderTiny:
    weights = torch.load(path)
    sharp = NarrowTAESD(decoder_blocks=SHARP_DECODER)
    narrow = sharp if weights.keys() == sharp.state_dict().keys() else NarrowTAESD()
    narrow.load_state_dict(weights)
    return to_diffusers(narrow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="written by train_model.py")
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    weights = load_file(args.checkpoint)
    vae = {name: value.half() for name, value in vae_tensors(load_vae(args.vae)).items() if "vae_s" not in name}
    save_file(weights | vae, args.out, metadata={"format": "pt"})
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
