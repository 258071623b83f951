"""A diffusers pipeline as a DiffusionModel, for scripts and clusters without ComfyUI."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..embedding import Embedding, resample
from ..errors import UserError
from .diffusers_words import spelled, tokenizer_slot, with_names, with_words

Conditioning = dict[str, Tensor]  # one prompt a row

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
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


def _encode_sd(pipeline, prompts: list[str]) -> Conditioning:
    return {"context": pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0]}


def _encode_sdxl(pipeline, prompts: list[str]) -> Conditioning:
    context, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _encode_sd3(pipeline, prompts: list[str]) -> Conditioning:
    context, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _encode_flux(pipeline, prompts: list[str]) -> Conditioning:
    context, pooled, _ = pipeline.encode_prompt(prompts)
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
    encode: Callable[[Any, list[str]], Conditioning]
    predict: Callable[..., Tensor]


FAMILIES: dict[type[DiffusionPipeline], Family] = {
    StableDiffusionPipeline: Family(("clip_l",), "unet", 1, 77, Diffusion, _encode_sd, _predict_sd),
    StableDiffusionXLPipeline: Family(("clip_l", "clip_g"), "unet", 1, 77, Diffusion, _encode_sdxl, _predict_sdxl),
    StableDiffusion3Pipeline: Family(
        ("clip_l", "clip_g", "t5xxl"), "transformer", 2, 256, Flow, _encode_sd3, _predict_sd3
    ),
    FluxPipeline: Family(("clip_l", "t5xxl"), "transformer", 2, 512, Flow, _encode_flux, _predict_flux),
}
OPENCLIP_H = 1024  # width of SD2's text encoder, which sits in the same slot as SD1's


# Loading -----------------------------------------------------------------------------------------


def load_pipeline(path: Path, config: Path | None = None, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A diffusers folder, or one checkpoint file with the other files in ``config``; never the network.

    ``config`` is a diffusers folder of the same family. Its configs and tokenizers are used, and
    whatever part the checkpoint lacks. Without it the local cache is searched.

    Raises:
        UserError: a file is missing or does not fit, or the family is not supported.
    """
    if not path.exists():
        raise UserError(f"There is no model {path}.")
    if config and not config.is_dir():  # diffusers would take it for a name on the Hub
        raise UserError(f"{config} is no folder: give a diffusers folder of the same family as {path}.")
    folder = path if path.is_dir() else config or _cached_configs(path)
    try:
        index = DiffusionPipeline.load_config(folder, local_files_only=True)
        options: dict[str, Any] = {slot: None for slot in UNUSED if slot in index}
        if "safety_checker" in index:
            options["requires_safety_checker"] = False
        pipeline_class = _supported(index["_class_name"])
        if path.is_dir():
            return pipeline_class.from_pretrained(path, torch_dtype=dtype, local_files_only=True, **options)
        return pipeline_class.from_single_file(  # type: ignore[attr-defined]
            str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **options
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be loaded with the configs of {folder}: {reason}") from error


def _supported(name: str) -> type[DiffusionPipeline]:
    for pipeline_class in FAMILIES:
        if pipeline_class.__name__ == name:
            return pipeline_class
    raise UserError(f"{name} is not supported: use {', '.join(known.__name__ for known in FAMILIES)}.")


def _cached_configs(checkpoint: Path) -> str:
    """The folder in the local cache that diffusers would look up for this checkpoint."""
    try:
        repository = fetch_diffusers_config(load_single_file_checkpoint(str(checkpoint)))
        return snapshot_download(repository["pretrained_model_name_or_path"], local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} cannot be loaded alone: give a diffusers folder of the same family for its "
            "configs and tokenizers as well."
        ) from error


# The model ---------------------------------------------------------------------------------------


@contextmanager
def _precise(vae) -> Iterator[None]:
    """SDXL's autoencoder overflows in fp16, as its config says. There and back changes no weight."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if upcast:
        vae.float()
    try:
        yield
    finally:
        if upcast:
            vae.half()


class DiffusersModel:
    """Trains on a pipeline as it is on its device; its weights, tokenizers and scheduler stay bit for bit.

    Raises:
        UserError: the pipeline's class or scheduler is not supported, or a tokenizer is missing.
    """

    def __init__(self, pipeline: DiffusionPipeline, gradient_checkpointing: bool = False):
        self._pipeline: Any = pipeline
        self._family = FAMILIES[_supported(type(pipeline).__name__)]
        self._schedule = self._family.schedule(self._pipeline.scheduler)
        self._network = getattr(pipeline, self._family.network)
        slots = zip(("text_encoder", "text_encoder_2", "text_encoder_3"), self._family.keys, strict=False)
        self._encoders = {slot: key for slot, key in slots if getattr(pipeline, slot) is not None}
        tables = {slot: getattr(pipeline, slot).get_input_embeddings() for slot in self._encoders}
        for slot, table in tables.items():
            # Where the files of a tokenizer are missing, transformers makes one that knows no word.
            if len(getattr(pipeline, tokenizer_slot(slot))) < table.num_embeddings // 2:
                raise UserError(f"The files of {tokenizer_slot(slot)} are missing: complete the pipeline's folder.")
        if len(tables) == 1 and tables["text_encoder"].embedding_dim == OPENCLIP_H:
            self._encoders["text_encoder"] = "clip_h"
        self.keys = {self._encoders[slot]: table.embedding_dim for slot, table in tables.items()}
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if gradient_checkpointing:
            self._network.enable_gradient_checkpointing()

    @classmethod
    def load(
        cls,
        path: Path,
        config: Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
    ) -> "DiffusersModel":
        """See ``load_pipeline``. Raises UserError."""
        return cls(load_pipeline(path, config, dtype).to(device), gradient_checkpointing)

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def attention_backend(self) -> str:
        return type(next(iter(self._network.attn_processors.values()))).__name__

    # The word -----------------------------------------------------------------------------------

    def initial_embedding(self, trigger: str, initializer: str, vectors: int) -> Embedding:
        start = {}
        for slot, key in self._encoders.items():
            tokenizer = getattr(self._pipeline, tokenizer_slot(slot))
            if len(tokenizer(trigger, add_special_tokens=False).input_ids) == 1:
                raise UserError(
                    f"{trigger!r} is a word the text encoder knows already and would lose: choose a new one, "
                    f"such as '{trigger}-x' or '<{trigger}>'."
                )
            vocabulary = getattr(self._pipeline, slot).get_input_embeddings().weight  # (tokens, width)
            rows = vocabulary.float().mean(0, keepdim=True)
            if initializer:
                ids = tokenizer(initializer, add_special_tokens=False).input_ids
                if not ids:
                    raise UserError(f"The initializer {initializer!r} holds no word: write one, or leave it empty.")
                rows = vocabulary[ids].float()
            start[key] = resample(rows, vectors)
        return Embedding(trigger, start)

    def check_prompts(self, prompts: Sequence[str], embedding: Embedding) -> None:
        for prompt in dict.fromkeys(prompts):
            for slot in self._encoders:
                original = getattr(self._pipeline, tokenizer_slot(slot))
                tokenizer = with_names(original, embedding.count)
                limit = min(tokenizer.model_max_length, self._family.tokens)
                ids = tokenizer(spelled(prompt, embedding), truncation=True, max_length=limit).input_ids
                # A repeated word gives multiples; a word cut off gives fractions.
                found = sum(number >= len(original) for number in ids)
                if not found or found % embedding.count:
                    raise UserError(
                        f"A word of {embedding.count} vectors does not fit into the prompt {prompt!r}: "
                        "use fewer vectors or a shorter prompt."
                    )

    # DiffusionModel -----------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """One at a time, since shapes differ; the most likely latent where the VAE gives a distribution."""
        vae, latents = self._pipeline.vae, []
        with _precise(vae):
            for image in images:
                encoded = vae.encode((image.movedim(-1, 1) * 2 - 1).to(vae.device, vae.dtype))
                latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
                shift = vae.config.get("shift_factor") or 0.0
                latents.append(((latent[0].float() - shift) * vae.config.scaling_factor).cpu())
        return latents

    def encode_prompts(self, prompts: Sequence[str], embedding: Embedding) -> Conditioning:
        """All distinct prompts at once, by the pipeline's own ``encode_prompt``. Raises UserError."""
        distinct = list(dict.fromkeys(prompts))
        with with_words(self._pipeline, self._encoders, embedding.fitted(self.keys)) as pipeline:
            encoded = self._family.encode(pipeline, [spelled(prompt, embedding) for prompt in distinct])
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: tensor[rows] for name, tensor in encoded.items()}

    def sample_sigmas(self, quantiles: Tensor) -> Tensor:
        sigmas = self._schedule.sigmas
        return sigmas[(quantiles * len(sigmas)).long().to(sigmas.device)].to(self.device)

    def add_noise(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self._schedule.add_noise(latents, noise, sigmas)

    def denoise(self, noised: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """In float32 around the network, which runs in its own precision."""
        x, timesteps = self._schedule.network_input(noised, sigmas)
        height, width = noised.shape[-2:]
        # Sides that are no multiple of the patch go on around the edge, as in ComfyUI.
        x = F.pad(x, (0, -width % self._family.patch, 0, -height % self._family.patch), mode="circular")
        output = self._family.predict(self._pipeline, x.to(self._network.dtype), timesteps, **conditioning)
        return self._schedule.denoised(noised, sigmas, output[..., :height, :width].float())

    def loss_weights(self, sigmas: Tensor) -> Tensor:
        return self._schedule.loss_weights(sigmas)

    # Pictures -----------------------------------------------------------------------------------

    def generate(
        self, prompt: str, embedding: Embedding | None, shape: Sequence[int], seed: int, steps: int, cfg: float
    ) -> Tensor:
        """One picture (1, H, W, 3) in 0..1 of latent ``shape`` (C, h, w), drawn by the pipeline itself."""
        patch, scale = self._family.patch, self._pipeline.vae_scale_factor
        height, width = (side // patch * patch * scale for side in shape[-2:])
        words = nullcontext(copy.copy(self._pipeline))
        if embedding is not None:
            words = with_words(self._pipeline, self._encoders, embedding.fitted(self.keys))
            prompt = spelled(prompt, embedding)
        with words as pipeline:
            pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # it keeps where it stands
            pipeline.set_progress_bar_config(disable=True)
            pictures = pipeline(
                prompt,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=cfg,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images  # (1, 3, H, W)
        return pictures.movedim(1, -1).float().cpu()
