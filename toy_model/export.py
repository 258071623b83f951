"""Write a UNet, a text encoder and a TAESD as one fp16 checkpoint with Stable Diffusion 1 names.

python -m toy_model.export CHECKPOINT VAE.pt OUT.safetensors     puts another autoencoder into a checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from dev.in_process import comfyui_on_path

from .autoencoder import SHARP_DECODER, WILD, NarrowTAESD, to_diffusers

LATENT_SCALE = 0.18215  # TAESD's latents are unscaled; ComfyUI's SD15 format scales by this


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Under ComfyUI's names, which are those of Stable Diffusion 1."""
    comfyui_on_path()
    from comfy.utils import unet_to_diffusers

    layers = unet.config["layers_per_block"]
    attention = [int("CrossAttn" in name) for name in unet.config["down_block_types"]]
    layout = {
        "num_res_blocks": [layers] * len(attention),
        "channel_mult": [1] * len(attention),  # only their number counts here
        "transformer_depth": [depth for depth in attention for _ in range(layers)],
        "transformer_depth_output": [depth for depth in attention for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
    }
    names = unet_to_diffusers(layout)
    return {f"model.diffusion_model.{names[name]}": value for name, value in unet.state_dict().items()}


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
    weights = torch.load(path, map_location="cpu")
    known = NarrowTAESD(), NarrowTAESD(decoder_blocks=SHARP_DECODER), NarrowTAESD(**WILD)
    narrow = next(vae for vae in known if vae.state_dict().keys() == weights.keys())
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
