"""The demo model's networks, and the three of them read back from a checkpoint.

python -m toy_model.networks CHECKPOINT FOLDER     writes a folder that diffusers' from_pretrained takes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from .export import text_tensors, unet_tensors, vae_tensors
from .text import CONTEXT, END, VOCABULARY, tokenizer

LATENT_SIDE = 8
TEXT_WIDTH = 96
UNET_WIDTHS = {8: (64, 128), 16: (64, 128, 160)}  # by the side of the latents
HEADS = 4


def new_text_encoder(words: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        hidden_act="quick_gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=END - 1,
        eos_token_id=END,
        pad_token_id=0 if words < VOCABULARY else END,
    )
    config._attn_implementation = "eager"  # at this size the fastest on a CPU
    return CLIPTextModel(config)


def new_unet(size: int = LATENT_SIDE) -> UNet2DConditionModel:
    """Looks at the text at every resolution but the lowest."""
    widths = UNET_WIDTHS[size]
    attending = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=size,
        down_block_types=(*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending),
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=HEADS,  # the number of heads, in this class's naming
        cross_attention_dim=TEXT_WIDTH,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def use_channels_last(network: nn.Module) -> None:
    """Faster on a CPU."""
    network.to(memory_format=torch.channels_last)


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@torch.no_grad()
def read_checkpoint(path: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderTiny]:
    """What ``export`` wrote, as frozen float32 networks."""
    weights = load_file(path)
    size = 16 if "model.diffusion_model.input_blocks.5.0.in_layers.0.weight" in weights else LATENT_SIDE
    unet, text_encoder, vae = new_unet(size), new_text_encoder(VOCABULARY), AutoencoderTiny()
    for network, named in (
        (unet, unet_tensors(unet)),
        (text_encoder, text_tensors(text_encoder)),
        (vae, vae_tensors(vae)),
    ):
        for name, parameter in named.items():  # the named tensors are the network's own memory
            parameter.copy_(weights[name])
        network.eval().requires_grad_(False)
    return unet, text_encoder, vae


def sampling_schedule() -> Any:
    """A DDIMScheduler. diffusers' pipelines name an enum as the type of theirs."""
    return DDIMScheduler.from_config(noise_schedule().config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def pipeline_from_checkpoint(path: Path) -> StableDiffusionPipeline:
    unet, text_encoder, vae = read_checkpoint(path)
    others: dict[str, Any] = {"vae": vae, "safety_checker": None, "feature_extractor": None}  # outside the types
    return StableDiffusionPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=sampling_schedule(),
        requires_safety_checker=False,
        **others,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    pipeline_from_checkpoint(args.checkpoint).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
