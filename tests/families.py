"""Every model family at small width, out of ComfyUI's own classes and with random weights.

Widths of text encoders come down by ``model_options``, ComfyUI's own way to change their config.
Networks whose detection reads its widths off the weights go through the real loader.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as models
import comfy.text_encoders.anima
import comfy.text_encoders.aura_t5
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.lumina2
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.text_encoders.z_image
import torch
from comfy import sdxl_clip
from comfy.ldm.wan.vae import WanVAE
from comfy.supported_models_base import ClipTarget
from comfy.taesd.taesd import TAESD
from small_models import UNET, randomise

from textual_inversion import Embedding, TrainConfig, initial_embedding
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.dataset import Batch, Dataset, fixed_batches, make_dataset
from textual_inversion.objective import batch_loss

CLIP = {"num_hidden_layers": 3, "num_attention_heads": 4}
CLIP_L = CLIP | {"hidden_size": 32, "intermediate_size": 64}
CLIP_G = CLIP | {"hidden_size": 48, "intermediate_size": 96}
CLIP_H = CLIP | {"hidden_size": 40, "intermediate_size": 80}
T5 = {"d_ff": 64, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 2}
LLAMA = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL_VOCABULARY = 400  # of the sentencepiece models that ComfyUI finds in checkpoints only


@cache
def sentencepiece_model() -> torch.Tensor:
    """A small sentencepiece tokenizer, as checkpoints of Wan and Lumina carry theirs."""
    import sentencepiece

    words = "a an the photo picture image painting of in on style toy cat dog house beach snow night red blue close-up"
    sentences = [f"{one} {two} {three}" for one in words.split() for two in words.split() for three in ("toy", "cat")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=SMALL_VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


@dataclass(frozen=True)
class Family:
    """A model family: how to build it small, and what people should know about it."""

    name: str
    model: type
    unet: dict[str, Any]
    tokenizer: type
    encoder: Any
    encoders: dict[str, dict[str, Any]]  # config of each text encoder, by ComfyUI's name of it
    vae: Callable[[], dict[str, torch.Tensor]]
    keys: tuple[str, ...]  # of the embedding files
    stock: bool = True  # whether stock ComfyUI's embedding:NAME reaches it
    loader: bool = False  # whether the real loader recognises the small network
    size: int = 64  # of the pictures, in pixels: some take none that small
    tokenizer_data: Callable[[], dict[str, Any]] = field(default=dict)
    limits: str = ""
    marks: dict[str, torch.Tensor] = field(default_factory=dict)  # what a checkpoint carries to tell its kind


def _tae(channels: int) -> Callable[[], dict[str, torch.Tensor]]:
    def state() -> dict[str, torch.Tensor]:
        module = TAESD(latent_channels=channels)
        randomise(module)
        return module.state_dict()

    return state


def _wan_vae() -> dict[str, torch.Tensor]:
    module = WanVAE(
        dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    randomise(module)
    return module.state_dict()


def _flux2_vae() -> dict[str, torch.Tensor]:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {"double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    config |= {
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": True,
    }
    module = AutoencoderKL(ddconfig=config, embed_dim=32)
    randomise(module)
    return module.state_dict()


def flux_network(**changes) -> dict[str, Any]:
    return {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 32,
        "context_in_dim": 64,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
        **changes,
    }


FLUX2 = flux_network(
    image_model="flux2",
    in_channels=128,
    out_channels=128,
    vec_in_dim=None,
    context_in_dim=3 * 64,
    mlp_ratio=3.0,
    axes_dim=[32, 32, 32, 32],
    theta=2000,
    patch_size=1,
    qkv_bias=False,
    ops_bias=False,
    guidance_embed=False,
    global_modulation=True,
    mlp_silu_act=True,
    default_ref_method="index",
    ref_index_scale=10.0,
    txt_ids_dims=[3],
)
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
    "qk_norm": True,
    "multiple_of": 32,
}
SD1 = {**UNET, "model_channels": 32, "context_dim": 32, "adm_in_channels": None, "use_linear_in_transformer": False}
SD1 |= {"transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1}
SD1 |= {"num_heads": 4, "num_head_channels": -1}
SD2 = SD1 | {"context_dim": 40, "use_linear_in_transformer": True, "model_channels": 64}
SDXL = SD1 | {
    "use_linear_in_transformer": True,
    "context_dim": 80,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
}
SDXL |= {"transformer_depth_middle": 2, "num_classes": "sequential", "adm_in_channels": 48 + 6 * 256}
REFINER = SDXL | {"context_dim": 48, "adm_in_channels": 48 + 5 * 256}

SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 80,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    "num_patches": 1024,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
}
PIXART = {"num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 1}
PIXART |= {"model_max_length": 120, "input_size": 64, "pe_interpolation": 1}
ANIMA = {
    "image_model": "anima",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 1,
    "num_heads": 1,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}

FAMILIES = [
    Family(
        name="SD1",
        model=models.SD15,
        unet=SD1,
        tokenizer=comfy.sd1_clip.SD1Tokenizer,
        encoder=comfy.sd1_clip.SD1ClipModel,
        encoders={"clip_l": CLIP_L},
        vae=_tae(4),
        keys=("clip_l",),
    ),
    Family(
        name="SD2",
        model=models.SD20,
        unet=SD2,
        tokenizer=comfy.text_encoders.sd2_clip.SD2Tokenizer,
        encoder=comfy.text_encoders.sd2_clip.SD2ClipModel,
        encoders={"clip_h": CLIP_H},
        vae=_tae(4),
        keys=("clip_h",),
    ),
    Family(
        name="SD2, v-prediction",
        model=models.SD20,
        unet=SD2,
        tokenizer=comfy.text_encoders.sd2_clip.SD2Tokenizer,
        encoder=comfy.text_encoders.sd2_clip.SD2ClipModel,
        encoders={"clip_h": CLIP_H},
        vae=_tae(4),
        keys=("clip_h",),
        marks={"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])},
    ),
    Family(
        name="SDXL",
        model=models.SDXL,
        unet=SDXL,
        tokenizer=sdxl_clip.SDXLTokenizer,
        encoder=sdxl_clip.SDXLClipModel,
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G},
        vae=_tae(4),
        keys=("clip_l", "clip_g"),
    ),
    Family(
        name="SDXL, v-prediction, zero terminal SNR",
        model=models.SDXL,
        unet=SDXL,
        tokenizer=sdxl_clip.SDXLTokenizer,
        encoder=sdxl_clip.SDXLClipModel,
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G},
        vae=_tae(4),
        keys=("clip_l", "clip_g"),
        marks={"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
    ),
    Family(
        name="SDXL, EDM (Playground 2.5)",
        model=models.SDXL,
        unet=SDXL,
        tokenizer=sdxl_clip.SDXLTokenizer,
        encoder=sdxl_clip.SDXLClipModel,
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G},
        vae=_tae(4),
        keys=("clip_l", "clip_g"),
        marks={"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
    ),
    Family(
        name="SDXL refiner",
        model=models.SDXLRefiner,
        unet=REFINER,
        tokenizer=sdxl_clip.SDXLTokenizer,
        encoder=sdxl_clip.SDXLRefinerClipModel,
        encoders={"clip_g": CLIP_G},
        vae=_tae(4),
        keys=("clip_g",),
    ),
    Family(
        name="SD3, SD3.5",
        model=models.SD3,
        unet=SD3 | {"qk_norm": "rms", "x_block_self_attn_layers": [0]},
        tokenizer=comfy.text_encoders.sd3_clip.SD3Tokenizer,
        encoder=comfy.text_encoders.sd3_clip.sd3_clip(),
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G, "t5xxl": T5 | {"d_model": 4096}},
        vae=_tae(16),
        keys=("clip_l", "clip_g", "t5xxl"),
        loader=True,
    ),
    Family(
        name="SD3 without T5",
        model=models.SD3,
        unet=SD3,
        tokenizer=comfy.text_encoders.sd3_clip.SD3Tokenizer,
        encoder=comfy.text_encoders.sd3_clip.sd3_clip(t5=False),
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G},
        vae=_tae(16),
        keys=("clip_l", "clip_g"),
        loader=True,
    ),
    Family(
        name="Flux.1 dev",
        model=models.Flux,
        unet=flux_network(),
        tokenizer=comfy.text_encoders.flux.FluxTokenizer,
        encoder=comfy.text_encoders.flux.flux_clip(),
        encoders={"clip_l": CLIP_L, "t5xxl": T5},
        vae=_tae(16),
        keys=("clip_l", "t5xxl"),
        loader=True,
    ),
    Family(
        name="Flux.1 schnell",
        model=models.FluxSchnell,
        unet=flux_network(guidance_embed=False),
        tokenizer=comfy.text_encoders.flux.FluxTokenizer,
        encoder=comfy.text_encoders.flux.flux_clip(),
        encoders={"clip_l": CLIP_L, "t5xxl": T5},
        vae=_tae(16),
        keys=("clip_l", "t5xxl"),
        loader=True,
    ),
    Family(
        name="Flux.2 Klein 4B",
        model=models.Flux2,
        unet=FLUX2,
        tokenizer=comfy.text_encoders.flux.KleinTokenizer,
        encoder=comfy.text_encoders.flux.klein_te(),
        encoders={"qwen3_4b": LLAMA | {"num_hidden_layers": 29}},
        vae=_flux2_vae,
        keys=("qwen3_4b",),
        loader=True,
    ),
    Family(
        name="Flux.2 Klein 9B",
        model=models.Flux2,
        unet=FLUX2,
        tokenizer=comfy.text_encoders.flux.KleinTokenizer8B,
        encoder=comfy.text_encoders.flux.klein_te(model_type="qwen3_8b"),
        encoders={"qwen3_8b": LLAMA | {"num_hidden_layers": 29}},
        vae=_flux2_vae,
        keys=("qwen3_8b",),
        loader=True,
    ),
    Family(
        name="PixArt alpha",
        model=models.PixArtAlpha,
        unet=PIXART | {"image_model": "pixart_alpha", "micro_condition": True},
        tokenizer=comfy.text_encoders.pixart_t5.PixArtTokenizer,
        encoder=comfy.text_encoders.pixart_t5.pixart_te(),
        encoders={"t5xxl": T5 | {"d_model": 4096}},
        vae=_tae(4),
        keys=("t5xxl",),
        loader=True,
        size=320,
    ),
    Family(
        name="PixArt sigma",
        model=models.PixArtSigma,
        unet=PIXART | {"image_model": "pixart_sigma", "micro_condition": False},
        tokenizer=comfy.text_encoders.pixart_t5.PixArtTokenizer,
        encoder=comfy.text_encoders.pixart_t5.pixart_te(),
        encoders={"t5xxl": T5 | {"d_model": 4096}},
        vae=_tae(4),
        keys=("t5xxl",),
        loader=True,
        size=320,
    ),
    Family(
        name="HunyuanVideo 1",
        model=models.HunyuanVideo,
        unet={
            "image_model": "hunyuan_video",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
            "vec_in_dim": 768,
            "axes_dim": [16, 56, 56],
            "meanflow": False,
            "context_in_dim": 64,
            "hidden_size": 128,
            "mlp_ratio": 4.0,
            "num_heads": 1,
            "depth": 1,
            "depth_single_blocks": 1,
            "theta": 256,
            "qkv_bias": True,
            "byt5": False,
            "guidance_embed": True,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        tokenizer=comfy.text_encoders.hunyuan_video.HunyuanVideoTokenizer,
        encoder=comfy.text_encoders.hunyuan_video.hunyuan_video_clip(),
        encoders={"clip_l": CLIP_L | {"hidden_size": 768}, "llama": LLAMA | {"num_hidden_layers": 4}},
        vae=_wan_vae,
        keys=("clip_l", "llama"),
        stock=False,
        loader=True,
        limits="stock ComfyUI fails on any embedding",
    ),
    Family(
        name="HiDream I1",
        model=models.HiDream,
        unet={
            "image_model": "hidream",
            "attention_head_dim": 128,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": [64, 64],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [0, 1],
            "num_attention_heads": 1,
            "num_routed_experts": 4,
            "num_activated_experts": 4,  # of 2 the choice jumps, and finite differences with it
            "num_layers": 1,
            "num_single_layers": 1,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": 80,
        },
        tokenizer=comfy.text_encoders.hidream.HiDreamTokenizer,
        encoder=comfy.text_encoders.hidream.hidream_clip(),
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G, "t5xxl": T5, "llama": LLAMA | {"num_hidden_layers": 2}},
        vae=_tae(16),
        keys=("clip_l", "clip_g", "t5xxl", "llama"),
    ),
    Family(
        name="Z-Image",
        model=models.ZImage,
        unet=LUMINA
        | {
            "axes_dims": [32, 48, 48],
            "dim": 256,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 64,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "rope_theta": 256.0,
            "pad_tokens_multiple": 32,
            "ffn_dim_multiplier": 8 / 3,
        },
        tokenizer=comfy.text_encoders.z_image.ZImageTokenizer,
        encoder=comfy.text_encoders.z_image.te(),
        encoders={"qwen3_4b": LLAMA | {"num_hidden_layers": 3}},
        vae=_tae(16),
        keys=("qwen3_4b",),
    ),
    Family(
        name="Lumina 2",
        model=models.Lumina2,
        unet=LUMINA | {"cap_feat_dim": 64},
        tokenizer=comfy.text_encoders.lumina2.LuminaTokenizer,
        encoder=comfy.text_encoders.lumina2.te(),
        encoders={"gemma2_2b": LLAMA | {"num_hidden_layers": 3, "vocab_size": SMALL_VOCABULARY}},
        vae=_tae(16),
        keys=("gemma2_2b",),
        stock=False,
        tokenizer_data=lambda: {"spiece_model": sentencepiece_model()},
    ),
    Family(
        name="Qwen-Image",
        model=models.QwenImage,
        unet={
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 1,
            "num_attention_heads": 1,
            "joint_attention_dim": 64,
        },
        tokenizer=comfy.text_encoders.qwen_image.QwenImageTokenizer,
        encoder=comfy.text_encoders.qwen_image.te(),
        encoders={"qwen25_7b": LLAMA | {"num_hidden_layers": 2}},
        vae=_wan_vae,
        keys=("qwen25_7b",),
        stock=False,
    ),
    Family(
        name="Wan 2.1 (pictures)",
        model=models.WAN21_T2V,
        unet={
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "out_dim": 16,
            "num_heads": 1,
            "ffn_dim": 128,
            "num_layers": 1,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "in_dim": 16,
        },
        tokenizer=comfy.text_encoders.wan.WanT5Tokenizer,
        encoder=comfy.text_encoders.wan.te(),
        encoders={"umt5xxl": T5 | {"d_model": 4096, "vocab_size": SMALL_VOCABULARY}},
        vae=_wan_vae,
        keys=("umt5xxl",),
        stock=False,
        loader=True,
        tokenizer_data=lambda: {"spiece_model": sentencepiece_model()},
    ),
    Family(
        name="AuraFlow",
        model=models.AuraFlow,
        unet={
            "dim": 64,
            "n_layers": 2,
            "n_double_layers": 1,
            "n_heads": 2,
            "global_conddim": 64,
            "cond_seq_dim": 64,
            "max_seq": 1024,
        },
        tokenizer=comfy.text_encoders.aura_t5.AuraT5Tokenizer,
        encoder=comfy.text_encoders.aura_t5.AuraT5Model,
        encoders={"pile_t5xl": T5},
        vae=_tae(4),
        keys=("pile_t5xl",),
        stock=False,
    ),
    Family(
        name="Anima",
        model=models.Anima,
        unet=ANIMA,
        tokenizer=comfy.text_encoders.anima.AnimaTokenizer,
        encoder=comfy.text_encoders.anima.te(),
        encoders={"qwen3_06b": {"num_hidden_layers": 2}},
        vae=_wan_vae,
        keys=("qwen3_06b",),
        stock=False,
    ),
]

NAMED = {family.name: family for family in FAMILIES}


def build(
    family: Family,
    dtype: torch.dtype = torch.float32,
    embeddings: str | None = None,
    encoder_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a family as loader nodes give them, made under inference mode.

    ``embeddings`` is the folder that stock ComfyUI looks for ``embedding:NAME`` in.
    """
    with torch.inference_mode():
        clip = _clip(family, encoder_dtype or dtype, embeddings)
        return _model(family, dtype, seed), clip, comfy.sd.VAE(sd=family.vae())


def _model(family: Family, dtype: torch.dtype, seed: int):
    config = family.model({**family.unet, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    network = config.get_model(dict(family.marks), "")
    randomise(network.diffusion_model, seed)
    if not family.loader:
        cpu = torch.device("cpu")
        return comfy.model_patcher.CoreModelPatcher(network, load_device=cpu, offload_device=cpu)
    state = {key: value.clone() for key, value in network.diffusion_model.state_dict().items()}
    loaded = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    found = type(loaded.model.model_config)
    assert found is family.model, f"the loader takes it for {found.__name__}"
    return loaded


def _clip(family: Family, dtype: torch.dtype, embeddings: str | None):
    options = {f"{name}_model_config": config for name, config in family.encoders.items()}
    clip = comfy.sd.CLIP(
        ClipTarget(family.tokenizer, family.encoder),
        embedding_directory=embeddings,
        tokenizer_data=family.tokenizer_data(),
        model_options={**options, "dtype": dtype},
    )
    randomise(clip.cond_stage_model)
    return clip


def pictures(family: Family, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, family.size, family.size, 3, generator=generator) for _ in range(count)]


def prepared(family: Family, model: ComfyModel, config: TrainConfig, count: int = 2) -> Dataset:
    """Random pictures as a data set."""
    return make_dataset(model.encode_images, pictures(family, count), [], [], config)


def moved(model: ComfyModel, count: int = 2) -> Embedding:
    """A word beside the one it starts from, where no gradient happens to be zero."""
    generator = torch.Generator().manual_seed(3)
    word = initial_embedding(model.vocabularies(), "S*", "toy", count)
    return word._map(lambda rows: rows + 0.1 * torch.randn(rows.shape, generator=generator)).trainable()


def gradients(family: Family, graph, checkpointing: bool = False) -> tuple[list[torch.Tensor], Embedding, Batch]:
    """Of the loss of a fixed batch by the vectors of a word, with the two."""
    config = TrainConfig(per_image_tokens=0, batch_size=2)
    model = ComfyModel(*graph[:3], checkpointing)
    batch = fixed_batches(prepared(family, model, config), config)[0]
    with model.training():
        word = moved(model)
        loss = batch_loss(model, [word], batch)
        return list(torch.autograd.grad(loss, list(word.parameters()))), word, batch


def slope(model: ComfyModel, word: Embedding, batch: Batch, vectors: torch.Tensor, direction, step: float) -> float:
    """Of the loss along ``direction``: central differences of two steps, extrapolated (Richardson)."""

    @torch.no_grad()
    def difference(step: float) -> float:
        start = vectors.clone()
        vectors.copy_(start + step * direction)
        above = batch_loss(model, [word], batch).item()
        vectors.copy_(start - step * direction)
        below = batch_loss(model, [word], batch).item()
        vectors.copy_(start)
        return (above - below) / (2 * step)

    return (4 * difference(step / 2) - difference(step)) / 3


def agrees(graph, word: Embedding, batch: Batch, gradients: list[torch.Tensor]) -> bool:
    """Whether finite differences find every gradient within 0.1%.

    Along the gradient the difference is largest. Small steps drown in rounding, large ones in curvature:
    of four one has to agree.
    """
    model = ComfyModel(*graph[:3])
    with model.training():
        loss = batch_loss(model, [word], batch).item()
        for vectors, gradient in zip(word.parameters(), gradients, strict=True):
            size = gradient.norm().item()
            if size == 0:
                return False
            steps = (share * loss / size for share in (1e-3, 5e-4, 2e-4, 1e-4))
            slopes = (slope(model, word, batch, vectors, gradient / size, step) for step in steps)
            if not any(abs(slope / size - 1) < 1e-3 for slope in slopes):
                return False
    return True
