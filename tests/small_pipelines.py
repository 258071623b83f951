"""diffusers' own pipelines at small width with random weights; SD1 and SDXL as in small_models.py."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file
from small_models import randomise
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dev.get_comfyui import comfyui_path

WIDTH, WIDTH_G, WIDTH_T5 = 32, 48, 96
DDPM: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 8,
}
UNET_XL: dict[str, Any] = UNET | {"transformer_layers_per_block": (1, 2)}
NO_CHECKS: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@cache
def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(
        comfyui_path() / "comfy/sd1_tokenizer", model_max_length=77, pad_token=pad_token
    )


@cache
def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(comfyui_path() / "comfy/text_encoders/t5_tokenizer")


def clip(kind: type, width: int, activation: str, eos_token_id: int):
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=49408,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=eos_token_id,
    )
    return kind(config)


def t5() -> T5EncoderModel:
    config = T5Config(d_model=WIDTH_T5, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


def autoencoder(channels: int = 4, **config: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config |= {**blocks, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": channels}
    return AutoencoderKL(**config)


def small_pipeline(
    family: str, prediction: str = "epsilon", eos_token_id: int = 49407, checkpoint: Path | None = None
) -> Any:
    """``family`` is SD1, SDXL, SD3 or Flux; ``checkpoint`` is one of ``small_models.write_checkpoint``.

    A copy every time, but for the tokenizers, which are slow to copy.
    """
    built = _built(family, prediction, eos_token_id, checkpoint)
    shared = {id(part): part for name, part in built.components.items() if "tokenizer" in name}
    return copy.deepcopy(built, shared)


def noise_schedule(prediction: str) -> Any:
    """A DDPMScheduler; diffusers' pipelines name an enum as the type of theirs."""
    options: dict[str, Any] = DDPM | {"prediction_type": prediction}
    return DDPMScheduler(**options)


@cache
def _built(family: str, prediction: str, eos_token_id: int, checkpoint: Path | None) -> DiffusionPipeline:
    text_encoder = clip(CLIPTextModel, WIDTH, "quick_gelu", eos_token_id)
    text_encoder_g = clip(CLIPTextModelWithProjection, WIDTH_G, "gelu", eos_token_id)
    scheduler = noise_schedule(prediction)
    if family == "SD1":
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder,
            tokenizer=clip_tokenizer(),
            unet=UNet2DConditionModel(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=WIDTH,
                attention_head_dim=4,
                **UNET,
            ),
            scheduler=scheduler,
            **NO_CHECKS,
        )
    elif family == "SDXL":
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_g,
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer("!"),
            unet=UNet2DConditionModel(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=1,  # heads in truth: of 64 channels each, as in every SDXL
                cross_attention_dim=WIDTH + WIDTH_G,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=WIDTH_G + 6 * 256,
                **UNET_XL,
            ),
            scheduler=scheduler,
        )
    elif family == "SD3":
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=WIDTH_T5,
                caption_projection_dim=32,
                pooled_projection_dim=WIDTH + WIDTH_G,
                pos_embed_max_size=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(16, shift_factor=0.0609, scaling_factor=1.5305),
            text_encoder=clip(CLIPTextModelWithProjection, WIDTH, "quick_gelu", eos_token_id),
            tokenizer=clip_tokenizer(),
            text_encoder_2=text_encoder_g,
            tokenizer_2=clip_tokenizer("!"),
            text_encoder_3=t5(),
            tokenizer_3=t5_tokenizer(),
        )
    else:
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=autoencoder(16, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=text_encoder,
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH_T5,
                pooled_projection_dim=WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 4, 8),
            ),
        )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    if checkpoint:
        _load_comfyui_weights(pipeline, load_file(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_comfyui_weights(pipeline: DiffusionPipeline, state: dict[str, torch.Tensor]) -> None:
    """Network and text encoders from ComfyUI's layout, the network by diffusers' own conversion.

    ComfyUI keeps text encoders in fp16 and computes in float32.
    """
    pipeline.unet.load_state_dict(convert_ldm_unet_checkpoint(dict(state), dict(pipeline.unet.config)))
    prefixes = {"text_encoder": "cond_stage_model.transformer."}
    if "text_encoder_2" in pipeline.components:
        prefixes = {
            f"text_encoder{end}": f"conditioner.clip_{key}.transformer." for end, key in (("", "l"), ("_2", "g"))
        }
    for slot, prefix in prefixes.items():
        encoder = getattr(pipeline, slot)
        names = {name: name if "text_" in name else f"text_model.{name}" for name in encoder.state_dict()}
        encoder.load_state_dict({name: state[prefix + theirs].half().float() for name, theirs in names.items()})
