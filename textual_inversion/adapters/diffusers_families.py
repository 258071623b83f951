"""What differs between the families of diffusers pipelines: encoders, noise schedule, network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from ..errors import UserError

Conditioning = dict[str, Tensor]  # one prompt a row

SMALLEST_ABAR = 2**-24  # schedules with zero terminal SNR end at 0, which would be an infinite sigma
FLUX_GUIDANCE = 3.5  # what its distilled guidance was trained around, and ComfyUI's default


# Noise schedules ---------------------------------------------------------------------------------


class Diffusion:
    """Networks that predict the noise or v: x = latents + sigma noise, sigma^2 = (1 - abar) / abar.

    The network sees x / sqrt(1 + sigma^2), which is the x_t of DDPM (Ho et al. 2020, arXiv 2006.11239,
    equation 4); v is that of Salimans and Ho 2022 (arXiv 2202.00512, appendix D).
    """

    def __init__(self, scheduler):
        predicted = scheduler.config.get("prediction_type")
        if predicted not in ("epsilon", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"The scheduler {type(scheduler).__name__} with prediction type {predicted} is not supported: "
                "use one with epsilon or v_prediction, such as DDPMScheduler."
            )
        abar = scheduler.alphas_cumprod.float().clamp(min=SMALLEST_ABAR)
        self.sigmas = ((1 - abar) / abar).sqrt()
        self.predicts_v = predicted == "v_prediction"

    def add_noise(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return latents + _column(sigmas) * noise

    def network_input(self, noised: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees, (B, C, h, w), and its timesteps, (B,)."""
        table = self.sigmas.to(sigmas.device).log()
        timesteps = (sigmas.log()[:, None] - table).abs().argmin(1)
        return noised / (1 + _column(sigmas) ** 2).sqrt(), timesteps

    def denoised(self, noised: Tensor, sigmas: Tensor, output: Tensor) -> Tensor:
        sigmas = _column(sigmas)
        if self.predicts_v:
            return noised / (1 + sigmas**2) - output * sigmas / (1 + sigmas**2).sqrt()
        return noised - sigmas * output

    def loss_weights(self, sigmas: Tensor) -> Tensor:
        return 1 + sigmas**2 if self.predicts_v else torch.ones_like(sigmas)


class Flow:
    """Networks that predict the velocity noise - latents: x = (1 - sigma) latents + sigma noise.

    The schedule is shifted as in Esser et al. 2024 (arXiv 2403.03206, equation 23). Where the shift
    depends on the size of the picture, that of the largest is used, as in ComfyUI.
    """

    def __init__(self, scheduler):
        config = scheduler.config
        shift = torch.tensor(config.max_shift).exp() if config.use_dynamic_shifting else config.shift
        times = torch.arange(1, config.num_train_timesteps + 1) / config.num_train_timesteps
        self.sigmas = shift * times / (1 + (shift - 1) * times)

    def add_noise(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return (1 - _column(sigmas)) * latents + _column(sigmas) * noise

    def network_input(self, noised: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees, (B, C, h, w), and its timesteps, (B,)."""
        return noised, sigmas * 1000

    def denoised(self, noised: Tensor, sigmas: Tensor, output: Tensor) -> Tensor:
        return noised - _column(sigmas) * output

    def loss_weights(self, sigmas: Tensor) -> Tensor:
        return torch.ones_like(sigmas)


def _column(sigmas: Tensor) -> Tensor:
    return sigmas.view(-1, 1, 1, 1)


# What differs between families -------------------------------------------------------------------


def _encode_sd(pipeline, prompts: list[str], device: torch.device) -> Conditioning:
    return {"context": pipeline.encode_prompt(prompts, device, 1, False)[0]}


def _encode_sdxl(pipeline, prompts: list[str], device: torch.device) -> Conditioning:
    context, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _encode_sd3(pipeline, prompts: list[str], device: torch.device) -> Conditioning:
    context, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _encode_flux(pipeline, prompts: list[str], device: torch.device) -> Conditioning:
    context, pooled, _ = pipeline.encode_prompt(prompts, device=device)
    return {"context": context, "pooled": pooled}


def _predict_sd(pipeline, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    return pipeline.unet(x, timesteps, context).sample


def _predict_sdxl(pipeline, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    height, width = (side * pipeline.vae_scale_factor for side in x.shape[-2:])
    # Original size, corner of the crop, target size: in pixels, as ComfyUI and inference say it.
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device).expand(len(x), -1)  # (B, 6)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return pipeline.unet(x, timesteps, context, added_cond_kwargs=added).sample


def _predict_sd3(pipeline, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return pipeline.transformer(x, context, pooled, timesteps).sample


def _predict_flux(pipeline, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    rows, channels, height, width = x.shape
    guided = pipeline.transformer.config.guidance_embeds
    output = pipeline.transformer(
        pipeline._pack_latents(x, rows, channels, height, width),
        context,
        pooled,
        timesteps / 1000,
        pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, x.device, x.dtype),
        x.new_zeros(context.shape[1], 3),
        timesteps.new_full((rows,), FLUX_GUIDANCE) if guided else None,
    ).sample
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(output, height * scale, width * scale, scale)


class Family(NamedTuple):
    """How one pipeline class names, encodes, predicts and was trained."""

    keys: tuple[str, ...]  # ComfyUI's names of text_encoder, text_encoder_2, ...
    network: str  # the slot of the network
    patch: int  # latent sides are multiples of it
    tokens: int  # the most that encode_prompt lets through
    schedule: Callable[[Any], Diffusion | Flow]
    encode: Callable[[Any, list[str], torch.device], Conditioning]
    predict: Callable[..., Tensor]


FAMILIES: dict[type[DiffusionPipeline], Family] = {
    StableDiffusionPipeline: Family(("clip_l",), "unet", 1, 77, Diffusion, _encode_sd, _predict_sd),
    StableDiffusionXLPipeline: Family(("clip_l", "clip_g"), "unet", 1, 77, Diffusion, _encode_sdxl, _predict_sdxl),
    StableDiffusion3Pipeline: Family(
        ("clip_l", "clip_g", "t5xxl"), "transformer", 2, 256, Flow, _encode_sd3, _predict_sd3
    ),
    FluxPipeline: Family(("clip_l", "t5xxl"), "transformer", 2, 512, Flow, _encode_flux, _predict_flux),
}
