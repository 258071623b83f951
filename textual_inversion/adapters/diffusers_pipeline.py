"""A diffusers pipeline as a DiffusionModel, for scripts and clusters without ComfyUI."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from ..devices import is_out_of_memory
from ..embedding import Embedding
from ..errors import UserError, listed
from ..prompts import check_whole
from ..vocabulary import Vocabulary
from .diffusers_families import FAMILIES, Conditioning
from .diffusers_tokens import spelled, tokenizer_slot, with_embeddings, with_names
from .protocol import DiffusionModel, TrainableModel

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
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
        raise UserError(f"There is no model at {path}: give a diffusers folder, or a .safetensors checkpoint.")
    if config and not config.is_dir():  # diffusers would take it for a name on the Hub
        raise UserError(f"{config} is not a folder: give a diffusers folder of the same family as {path}.")
    folder = path if path.is_dir() else config or _cached_configs(path)
    try:
        index: Any = DiffusionPipeline.load_config(folder, local_files_only=True)
        if not isinstance(index, dict):
            raise UserError(f"model_index.json in {folder} names no parts of a pipeline: download it again.")
        options: dict[str, Any] = {slot: None for slot in UNUSED if slot in index}
        if "safety_checker" in index:
            options["requires_safety_checker"] = False
        pipeline_class = _supported(index["_class_name"])
        if path.is_dir():
            return pipeline_class.from_pretrained(path, dtype=dtype, local_files_only=True, **options)
        return pipeline_class.from_single_file(  # type: ignore[attr-defined]
            str(path), config=str(folder), dtype=dtype, local_files_only=True, **options
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be loaded with the configs of {folder}: {reason}") from error


def load_quietly() -> None:
    """From now on no bars are shown while a pipeline is loaded."""
    disable_progress_bar()
    disable_transformers_progress_bar()


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
            f"{checkpoint} cannot be loaded alone: also give a diffusers folder of the same family (--config), for "
            "its configs and tokenizers."
        ) from error


def _token_ids(tokenizer, text: str) -> list[int]:
    """Vocabulary entries of ``text`` without start and end tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


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
        self._dtype = self._network.dtype
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
        return next(self._network.parameters()).device  # diffusers' own property looks at every module

    @property
    def attention_backend(self) -> str:
        return type(next(iter(self._network.attn_processors.values()))).__name__

    def free_memory(self) -> float:
        if self.device.type != "cuda":
            return psutil.virtual_memory().available
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def weights(self) -> list[Tensor]:
        encoders = (getattr(self._pipeline, slot) for slot in self._encoders)
        return [weight for module in (self._network, *encoders) for weight in module.parameters()]

    @contextmanager
    def training(self) -> Iterator[TrainableModel]:
        yield self  # a pipeline's weights can be differentiated through as they are

    @contextmanager
    def paused(self) -> Iterator[DiffusionModel]:
        yield self

    def enable_gradient_checkpointing(self) -> bool:
        if self._network.is_gradient_checkpointing:
            return False
        self._network.enable_gradient_checkpointing()
        return True

    # Prompts ------------------------------------------------------------------------------------

    def vocabularies(self) -> dict[str, Vocabulary]:
        found = {}
        for slot, key in self._encoders.items():
            tokenizer = getattr(self._pipeline, tokenizer_slot(slot))
            table = getattr(self._pipeline, slot).get_input_embeddings().weight.detach()
            tokens = {number: token for token, number in tokenizer.get_vocab().items()}
            found[key] = Vocabulary(table, tokens, partial(_token_ids, tokenizer))
        return found

    def _matched(self, embeddings: Sequence[Embedding]) -> list[Embedding]:
        """By the keys of the text encoders. Raises UserError unless these get vectors, each of them as many."""
        found = [embedding.for_encoders(self.keys) for embedding in embeddings]
        for embedding in found:
            counts = {key: len(rows) for key, rows in embedding.vectors.items()}
            if len(set(counts.values())) > 1:
                has = listed(f"{count} for {key}" for key, count in counts.items())
                raise UserError(
                    f"The embedding {embedding.trigger!r} has not as many vectors for each text encoder ({has}), which "
                    "diffusers cannot use: use it in ComfyUI."
                )
        return found

    def check_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> None:
        embeddings = tuple(self._matched(embeddings))
        for slot in self._encoders:
            original = getattr(self._pipeline, tokenizer_slot(slot))
            tokenizer = with_names(original, sum(embedding.count for embedding in embeddings))
            limit = min(tokenizer.model_max_length, self._family.tokens)
            for prompt in dict.fromkeys(prompts):
                ids = tokenizer(spelled(prompt, *embeddings), truncation=True, max_length=limit).input_ids
                first = len(original)
                for embedding in embeddings:
                    found = sum(first <= number < first + embedding.count for number in ids)
                    first += embedding.count
                    check_whole([found], embedding.count, prompt)

    # The diffusion model ------------------------------------------------------------------------

    @property
    def native_size(self) -> int:
        # What the pipelines themselves draw where nobody says a size; SD1's and SD2's have it in the network alone.
        latents = getattr(self._pipeline, "default_sample_size", None) or self._network.config.sample_size
        return (latents if isinstance(latents, int) else min(latents)) * self._pipeline.vae_scale_factor

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

    def encode_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> Conditioning:
        """All distinct prompts at once, by the pipeline's own ``encode_prompt``. Raises UserError."""
        distinct = list(dict.fromkeys(prompts))
        matched = self._matched(embeddings)
        with with_embeddings(self._pipeline, self._encoders, *matched) as pipeline:
            texts = [spelled(prompt, *matched) for prompt in distinct]
            encoded = self._family.encode(pipeline, texts, self.device)
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: tensor[rows] for name, tensor in encoded.items()}

    def text_outputs(self, prompts: Sequence[str], *embeddings: Embedding) -> list[Tensor]:
        return list(self.encode_prompts(prompts, *embeddings)["context"])

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
        output = self._family.predict(self._pipeline, x.to(self._dtype), timesteps, **conditioning)
        return self._schedule.denoised(noised, sigmas, output[..., :height, :width].float())

    def loss_weights(self, sigmas: Tensor) -> Tensor:
        return self._schedule.loss_weights(sigmas)

    def check_compatible(self, latent: Tensor, prompt: str, embedding: Embedding) -> None:
        try:
            with torch.no_grad():
                sigmas = self.sample_sigmas(torch.tensor([0.5]))
                self.denoise(latent[None].to(self.device), sigmas, self.encode_prompts([prompt], embedding))
        except (RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                "The pipeline's text encoders and network do not belong together: load a folder whose parts are of "
                f"one model. ({type(error).__name__}: {error})"
            ) from error

    # Pictures -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        embedding: Embedding | None,
        shape: Sequence[int],
        seed: int,
        steps: int,
        cfg: float,
        negative: str = "",
    ) -> Tensor:
        """One picture (1, H, W, 3) in 0..1 of latent ``shape`` (C, h, w), drawn by the pipeline itself."""
        patch, scale = self._family.patch, self._pipeline.vae_scale_factor
        height, width = (side // patch * patch * scale for side in shape[-2:])
        if not (height and width):
            raise UserError(f"The model draws no picture that small: choose at least {patch * scale} pixels a side.")
        drawing = nullcontext(copy.copy(self._pipeline))
        if embedding is not None:
            (embedding,) = self._matched([embedding])
            drawing = with_embeddings(self._pipeline, self._encoders, embedding)
            prompt, negative = spelled(prompt, embedding), spelled(negative, embedding)
        with drawing as pipeline:
            pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # it keeps where it stands
            pipeline.set_progress_bar_config(disable=True)
            pictures = pipeline(
                prompt,
                height=height,
                **({"negative_prompt": negative} if negative else {}),
                width=width,
                num_inference_steps=steps,
                guidance_scale=cfg,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images  # (1, 3, H, W)
        return pictures.movedim(1, -1).float().cpu()
