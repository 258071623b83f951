"""The MODEL, CLIP and VAE of a ComfyUI graph as a DiffusionModel."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.sd import CLIP, VAE
from torch import Tensor

from ..devices import NO_BACKWARD, is_out_of_memory, to_device
from ..embedding import Embedding
from ..errors import UserError
from ..memory import kept_bytes
from ..prompts import check_whole
from ..vocabulary import Vocabulary
from .comfyui_autograd import (
    checkpointed_blocks,
    differentiable_products,
    differentiable_rotations,
    mutable_residuals,
    mutable_saved_tensors,
    networks_of,
    ordinary_adapters,
    ordinary_weights,
    training_flag,
)
from .comfyui_encoding import encode, moved
from .comfyui_errors import explained
from .comfyui_tokens import (
    embedding_keys,
    row_of,
    supports_embedding_files,
    text_encoders,
    vocabularies,
    with_triggers,
)
from .protocol import DiffusionModel, TrainableModel

Conditioning = list[dict[str, Any]]


WITH_BACKWARD = {"attention_split", "attention_sub_quad"}


def _differentiable_attention(chosen, q: Tensor, *args, free_memory: Callable | None = None, **kwargs):
    """PyTorch's attention: flash and sage attention have no backward pass.

    On a Mac, and on AMD cards without PyTorch's kernels, ComfyUI has chosen another one that has it, with the
    precision that a Mac needs, and less memory. It slices its work by what ``free_memory`` says.
    """
    if q.device.type == "cpu" or chosen.__name__ not in WITH_BACKWARD:
        return comfy.ldm.modules.attention.attention_pytorch(q, *args, **kwargs)
    return _sliced_attention(chosen, q, *args, free_memory=free_memory, **kwargs)


def _sliced_attention(chosen, q: Tensor, *args, free_memory: Callable | None, **kwargs):
    """``chosen``; split attention where little memory is free, for which sub-quadratic has no backward pass."""
    before = comfy.model_management.get_free_memory
    comfy.model_management.get_free_memory = free_memory or before
    try:
        try:
            return chosen(q, *args, **kwargs)
        except RuntimeError as error:
            if NO_BACKWARD not in str(error) or error.__context__:  # in the middle of another: memory has run out
                raise
        return comfy.ldm.modules.attention.attention_split(q, *args, **kwargs)
    finally:
        comfy.model_management.get_free_memory = before


def _alike(inputs: list[dict[str, Any]]) -> list[list[int]]:
    """Rows that can be one batch, by the rules of ComfyUI's samplers: most take no prompts of unequal length."""

    def joins(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one.keys() == other.keys() and all(part.can_concat(other[name]) for name, part in one.items())

    groups: list[list[int]] = []
    for row, parts in enumerate(inputs):
        group = next((group for group in groups if joins(parts, inputs[group[0]])), None)
        if group is None:
            groups.append(group := [])
        group.append(row)
    return groups


# Wrappers around what training does too. The others are around a sampler, a guider or its batches.
OF_THE_NETWORK = {comfy.patcher_extension.WrappersMP.APPLY_MODEL, comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL}


def _without_samplers(options: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Transformer options without the wrappers of nodes that wrap a sampler too, and the names of these nodes.

    Their part around the network is ready only while a sampler runs: EasyCache would keep the last step in memory, or
    answer from an earlier one.
    """
    wrappers: dict[str, dict[str | None, list]] = options["wrappers"]
    sampling = {key for kind, by_key in wrappers.items() if kind not in OF_THE_NETWORK for key in by_key if key}
    ours = {
        kind: {key: added for key, added in by_key.items() if key not in sampling} for kind, by_key in wrappers.items()
    }
    left_out = {key for kind in OF_THE_NETWORK for key in wrappers.get(kind, {}) if key in sampling}
    return {**options, "wrappers": ours}, left_out


def _loaded(patcher: ModelPatcher) -> bool:
    """Whether all weights are on the device, as this patcher wants them and none of its clones."""
    current = any(loaded.model is patcher for loaded in comfy.model_management.current_loaded_models)
    return current and patcher.loaded_size() >= patcher.model_size()


def _without_dynamic_vram(model: ModelPatcher, clip: CLIP) -> tuple[ModelPatcher, CLIP]:
    """Copies that share the weights, except under dynamic VRAM, the default on NVIDIA cards.

    It keeps weights in pages that it may take away in the middle of a backward pass. ComfyUI's own way around, as in
    its Train LoRA, loads a second MODEL and CLIP from their files.

    Raises:
        UserError: what loaded them cannot do it again, or a LoRA would stay behind: in bypass mode it is tied to the
            modules of the first.
    """
    dynamic = {name: patcher for name, patcher in (("MODEL", model), ("CLIP", clip.patcher)) if patcher.is_dynamic()}
    if bypassed := [name for name, patcher in dynamic.items() if patcher.injections]:
        raise UserError(
            f"Training under dynamic VRAM would lose what a LoRA in bypass mode adds to {' and '.join(bypassed)}: use "
            "Load LoRA instead of Load LoRA (Bypass), or start ComfyUI with --disable-dynamic-vram."
        )
    try:
        model, clip = model.clone(disable_dynamic=True), clip.clone(disable_dynamic=True)
    except RuntimeError as error:
        if is_out_of_memory(error) or not dynamic:
            raise
        raise UserError(
            f"{' and '.join(dynamic)} cannot be loaded a second time, which training needs under dynamic VRAM: use "
            "ComfyUI's own loader nodes, or start ComfyUI with --disable-dynamic-vram."
        ) from error
    if dynamic:
        for patcher in (model, clip.patcher):
            _cast_to_model_dtype(patcher)
        size = (model.model_size() + clip.patcher.model_size()) / 2**30
        logging.info(
            "Textual inversion: dynamic VRAM is on, so %s loaded a second time for training, %.1f GB with everything. "
            "ComfyUI's --disable-dynamic-vram saves that.",
            f"{' and '.join(dynamic)} {'are' if len(dynamic) > 1 else 'is'}",
            size,
        )
    clip.cond_stage_model = clip.patcher.model
    return model, clip


def _cast_to_model_dtype(patcher: ModelPatcher) -> None:
    """Gives weights the precision that the model computes in, as dynamic VRAM does whenever it needs one.

    While it is on, ComfyUI leaves linear layers as the file has them, and what loads a model completely does not know.
    """
    for module in patcher.model.modules():
        for name, weight in module.named_parameters(recurse=False):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None) or weight.dtype
            if weight.dtype != dtype and not isinstance(weight, comfy.quant_ops.QuantizedTensor):
                weight.data = weight.data.to(dtype)
    patcher.size = 0  # to be counted again


class ComfyModel:
    """Trains on what the graph has loaded, LoRAs and other patches included.

    ``with model.training():`` loads the weights and makes them differentiable. Outside, and inside
    ``with model.paused():``, they are bit for bit the graph's and ComfyUI may move them.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        gradient_checkpointing: bool = False,
        sampler: str = "euler",
        scheduler: str = "normal",
    ):
        self.keys = embedding_keys(clip)
        if clip.patcher.forced_hooks or clip.apply_hooks_to_conds:
            raise UserError(
                "This CLIP has hooks (Set CLIP Hooks), which change it in the course of sampling and have no course to "
                "follow in training: connect the CLIP from before that node, and load LoRAs with Load LoRA."
            )
        if model.model_patches_models():
            raise UserError(
                "This MODEL has a patch from Load Model Patch, which follows a picture or a sound of its own and not "
                "those to learn from: connect the MODEL from before the node that applies it."
            )
        self._patcher, self._clip = _without_dynamic_vram(model, clip)
        self._vae = vae
        self._sampler, self._scheduler = sampler, scheduler
        self._checkpointable = (self._clip.cond_stage_model, self._patcher.model.diffusion_model)
        self._checkpointed = len(self._checkpointable) if gradient_checkpointing else 0
        self._contexts = ExitStack()
        self._options: dict[str, Any] = {}
        self._left_out: set[str] = set()

    # Loading ------------------------------------------------------------------------------------

    @contextmanager
    def training(self) -> Iterator[TrainableModel]:
        self._start()
        try:
            yield self
        finally:
            self._contexts.close()

    @contextmanager
    def paused(self) -> Iterator[DiffusionModel]:
        self._contexts.close()
        try:
            yield self
        finally:
            self._start()

    def _start(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(comfy.model_management.cuda_device_context(self.device))
            self._load()
            network, encoder = self._patcher.model, self._clip.cond_stage_model
            options = self._patcher.model_options["transformer_options"]
            patches = [options[kind] for kind in ("patches", "patches_replace") if kind in options]
            for module in (network, encoder, *networks_of(patches)):
                for context in (ordinary_weights, ordinary_adapters, differentiable_products, mutable_residuals):
                    stack.enter_context(context(module))
            for module in self._checkpointable[: self._checkpointed]:
                stack.enter_context(checkpointed_blocks(module, mutable=bool(patches)))
            stack.enter_context(training_flag())
            stack.enter_context(differentiable_rotations())
            stack.callback(self._patcher.cleanup)
            self._patcher.pre_run()
            # What other nodes have put around the network, ready as for a sampler.
            self._options = create_model_options_clone(self._patcher.model_options)
            comfy.sampler_helpers.prepare_model_patcher(self._patcher, {}, self._options)
            options, left_out = _without_samplers(self._options["transformer_options"])
            self._options["transformer_options"] = {**options, "sample_sigmas": self._schedule()}
            for name in left_out - self._left_out:
                logging.info("Textual inversion: %s works in samplers only and is left out of training.", name)
            self._left_out |= left_out
            comfy.samplers.cast_to_load_options(self._options, self.device, self._patcher.model_dtype())
            if patches:
                stack.enter_context(mutable_saved_tensors())  # FreeU, for one, changes them
            self._contexts = stack.pop_all()

    def _load(self) -> None:
        """Loads MODEL and CLIP completely, as core's Train LoRA does; everything else may leave the device.

        A weight that was moved or freed in between would be wrong, or missing, in the backward pass.
        """
        patchers = [self._patcher, self._clip.patcher]
        if all(map(_loaded, patchers)):  # as after a preview: loading again would empty the cache of the allocator
            return
        try:
            # Where nodes load them too. Moved outside of it, weights made in it would no longer work in either.
            with torch.inference_mode():
                comfy.model_management.load_models_gpu(patchers, memory_required=int(1e20), force_full_load=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if not all(map(_loaded, patchers)):
            needed, free = (
                f"{size / 2**30:.1f} GB" for size in (sum(p.model_size() for p in patchers), self.free_memory())
            )
            raise UserError(
                f"MODEL and CLIP must fit on {self.device} completely: {needed} needed, {free} free. "
                "Close other programs, use fp8 weights, or start ComfyUI without --novram."
            )

    @property
    def device(self) -> torch.device:
        return self._patcher.load_device

    @property
    def attention_backend(self) -> str:
        return comfy.ldm.modules.attention.optimized_attention.__name__.removeprefix("attention_")

    @property
    def supports_embedding_files(self) -> bool:
        """Whether ComfyUI without this pack takes ``embedding:NAME`` with this CLIP."""
        return supports_embedding_files(self._clip)

    def free_memory(self) -> float:
        """Without what ComfyUI leaves to other programs on a card (``--reserve-vram``; more on Windows)."""
        reserved = 0 if self.device.type == "cpu" else comfy.model_management.extra_reserved_memory()
        return max(0.0, comfy.model_management.get_free_memory(self.device) - reserved)  # type: ignore[arg-type]

    def weights(self) -> list[Tensor]:
        return [*self._patcher.model.parameters(), *self._clip.cond_stage_model.parameters()]

    def enable_gradient_checkpointing(self) -> bool:
        """First the text encoders: ComfyUI computes them in float32, and autograd keeps a copy of every weight."""
        if self._checkpointed == len(self._checkpointable):
            return False
        part = ("the text encoders", "the diffusion model")[self._checkpointed]
        self._checkpointed += 1
        with self.paused():  # which also frees what a step that failed has kept
            comfy.model_management.soft_empty_cache()
        logging.info("Textual inversion: memory is short, so gradient checkpointing is on for %s.", part)
        return True

    # Prompts ------------------------------------------------------------------------------------

    def vocabularies(self) -> dict[str, Vocabulary]:
        return vocabularies(self._clip)

    def check_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> None:
        clip = with_triggers(self._clip, *embeddings)
        for prompt in dict.fromkeys(prompts):
            tokens = clip.tokenize(prompt)
            for encoder in text_encoders(clip):
                sections = [[id(row_of(token)) for token, _ in section] for section in tokens.get(encoder.name, [])]
                for embedding in embeddings:
                    rows = {id(row) for row in clip.tokenizer.embeddings[embedding.trigger][encoder.key]}
                    counts = (sum(token in rows for token in section) for section in sections)
                    check_whole(counts, embedding.count, prompt)

    # The diffusion model ------------------------------------------------------------------------

    @property
    def native_size(self) -> int:
        # ComfyUI knows no sizes of pictures. The autoencoder of SD1 is that of SD2 too, whose larger model predicts v.
        model = self._patcher.model
        if not isinstance(self._patcher.get_model_object("latent_format"), comfy.latent_formats.SD15):
            return 1024
        return 768 if model.model_type is comfy.model_base.ModelType.V_PREDICTION else 512

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """One at a time: shapes differ, and video autoencoders take a batch for frames. See ``DiffusionModel``.

        ComfyUI may move other models away to load the VAE, which is why it is not called during training.
        """
        latent_format: Any = self._patcher.get_model_object("latent_format")
        channels, dimensions = latent_format.latent_channels, latent_format.latent_dimensions
        latents = []
        for image in images:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with torch.inference_mode():
                encoded = self._vae.encode(image)  # (1, C, h, w), of a video model (1, C, 1, h, w)
            if encoded.ndim != dimensions + 2 or encoded.shape[1] != channels:
                raise UserError(
                    f"The VAE makes latents of shape {tuple(encoded.shape)}, but the MODEL takes {channels} channels "
                    f"and {dimensions} dimensions: connect the VAE that belongs to the MODEL."
                )
            with torch.inference_mode(False):
                latents.append(latent_format.process_in(encoded.clone().float().cpu())[0])
        return latents

    def encode_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> Conditioning:
        clip = with_triggers(self._clip, *moved(embeddings, self._clip.patcher.load_device))
        return encode(clip, prompts, self.device)

    def text_outputs(self, prompts: Sequence[str], *embeddings: Embedding) -> list[Tensor]:
        return [encoded["cross_attn"][0] for encoded in self.encode_prompts(prompts, *embeddings)]

    def _schedule(self) -> Tensor:
        """All noise levels that training draws from, as of a sampler that visits each: falling, 0 at the end."""
        sigmas = to_device(self._patcher.model.model_sampling.sigmas, self.device)
        return torch.cat([sigmas.flip(0), sigmas.new_zeros(1)])

    def sample_sigmas(self, quantiles: Tensor) -> Tensor:
        sigmas = self._patcher.model.model_sampling.sigmas
        return to_device(sigmas, self.device)[to_device((quantiles * len(sigmas)).long(), self.device)]

    def add_noise(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self._patcher.model.model_sampling.noise_scaling(sigmas, noise, latents)

    def denoise(self, noised: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = [self._inputs(noised[row : row + 1], condition) for row, condition in enumerate(conditioning)]
        denoised: dict[int, Tensor] = {}
        for rows in _alike(inputs):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # Taken row by row: a list of numbers as an index would be copied to the device.
            x, levels = (torch.cat([tensor[row : row + 1] for row in rows]) for tensor in (noised, sigmas))
            out = self._apply(x, levels, comfy.samplers.cond_cat([inputs[row] for row in rows]))
            denoised |= zip(rows, out.split(1), strict=True)
        return torch.cat([denoised[row] for row in range(len(inputs))])

    def _inputs(self, noised: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        """What the network takes besides latents and noise level, made from a row's conditioning as samplers do."""
        (encoded,) = comfy.samplers.encode_model_conds(
            self._patcher.model.extra_conds,
            [{**condition, "model_conds": {}}],
            noised,
            noised.device,
            "positive",
            latent_image=torch.zeros_like(noised),
            denoise_mask=None,
        )
        return {name: part.process_cond(batch_size=1, area=None) for name, part in encoded["model_conds"].items()}

    def _apply(self, noised: Tensor, sigmas: Tensor, inputs: dict[str, Any]) -> Tensor:
        # Attention slices its work by it. What is recomputed in the backward pass must do so as the first time.
        free_memory = functools.cache(comfy.model_management.get_free_memory)
        inputs["transformer_options"] = {
            **self._options["transformer_options"],
            "optimized_attention_override": functools.partial(_differentiable_attention, free_memory=free_memory),
            # Every row has a prompt of its own, as if a sampler had that many positive ones.
            "cond_or_uncond": [0] * len(noised),
            "uuids": [uuid4() for _ in noised],
            "sigmas": sigmas,
        }
        apply = self._patcher.model.apply_model
        if wrapper := self._options.get("model_function_wrapper"):  # other packs' nodes, as samplers call it
            return wrapper(
                apply, {"input": noised, "timestep": sigmas, "c": inputs, "cond_or_uncond": [0] * len(noised)}
            )
        return apply(noised, sigmas, **inputs)

    def loss_weights(self, sigmas: Tensor) -> Tensor:
        # Denoised latents are linear in what the network predicts. Their slope turns the error of the
        # one into the error of the other, whatever is predicted: noise, velocity, v or the latents.
        none, one = (torch.full((len(sigmas), 1, 1, 1), value, device=sigmas.device) for value in (0.0, 1.0))
        denoised = self._patcher.model.model_sampling.calculate_denoised
        slope = denoised(sigmas, one, none) - denoised(sigmas, none, none)
        return (sigmas / slope.flatten()) ** 2

    def check_compatible(self, latent: Tensor, prompt: str, embedding: Embedding) -> None:
        def one_pass() -> None:
            conditioning = self.encode_prompts([prompt], embedding.trainable())
            sigmas = self.sample_sigmas(torch.tensor([0.5]))
            self.denoise(to_device(latent[None], self.device), sigmas, conditioning)

        try:
            kept_bytes(one_pass, self.weights())  # autograd saves nothing, but refuses here what it cannot save
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, UserError):
                raise
            raise explained(error) from error

    # Pictures -----------------------------------------------------------------------------------

    @torch.inference_mode()
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
        """Drawn by ComfyUI's own sampler; see ``DiffusionModel``."""
        clip = with_triggers(self._clip, *([embedding] if embedding else []))
        wanted, unwanted = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative))
        latent = torch.zeros(1, *shape)
        samples = comfy.sample.sample(
            self._patcher,
            comfy.sample.prepare_noise(latent, seed),
            steps,
            cfg,
            self._sampler,
            self._scheduler,
            wanted,
            unwanted,
            latent,
            disable_pbar=True,
            seed=seed,
        )
        pictures = self._vae.decode(samples)
        return pictures.reshape(-1, *pictures.shape[-3:])[:1].clamp(0, 1).cpu()  # of a video, the first one
