"""Every model family at small width, out of ComfyUI's own classes and with random weights.

Widths of text encoders come down by ``model_options``, ComfyUI's own way to change their config.
Networks whose detection reads its widths off the weights go through the real loader.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan.vae import WanVAE
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.sdxl_clip import SDXLClipModel, SDXLRefinerClipModel, SDXLTokenizer
from comfy.supported_models_base import ClipTarget
from comfy.taesd.taesd import TAESD
from comfy.text_encoders import anima, flux, lumina2, qwen_image, wan, z_image
from comfy.text_encoders.aura_t5 import AuraT5Model, AuraT5Tokenizer
from comfy.text_encoders.hidream import HiDreamTokenizer, hidream_clip
from comfy.text_encoders.hunyuan_video import HunyuanVideoTokenizer, hunyuan_video_clip
from comfy.text_encoders.pixart_t5 import PixArtTokenizer, pixart_te
from comfy.text_encoders.sd2_clip import SD2ClipModel, SD2Tokenizer
from comfy.text_encoders.sd3_clip import SD3Tokenizer, sd3_clip
from small_models import UNET, randomise

from textual_inversion import Embedding, TrainConfig, initial_embedding
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.dataset import Batch, Dataset, fixed_batches, make_dataset
from textual_inversion.objective import batch_loss, row_losses

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


def _tae(channels: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: _random_state(TAESD(latent_channels=channels))


TAE_4, TAE_16 = _tae(4), _tae(16)


def _wan_vae() -> dict[str, torch.Tensor]:
    return _random_state(WanVAE(dim=16, z_dim=16, temperal_downsample=[False, True, True]))


def _flux2_vae() -> dict[str, torch.Tensor]:
    config = {"double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    config |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "batch_norm_latent": True}
    return _random_state(AutoencoderKL(ddconfig=config, embed_dim=32))


def _random_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    randomise(module)
    return module.state_dict()


@dataclass(frozen=True)
class Family:
    """A model family: how to build it small, and what people should know about it."""

    name: str
    model: type
    unet: dict[str, Any]
    tokenizer: type
    encoder: Any
    encoders: dict[str, dict[str, Any]]  # config of each text encoder, by ComfyUI's name of it
    vae: Callable[[], dict[str, torch.Tensor]] = TAE_16
    stock: bool = True  # whether stock ComfyUI's embedding:NAME reaches it
    loader: bool = False  # whether the real loader recognises the small network
    size: int = 64  # of the pictures, in pixels: some take none that small
    tokenizer_data: Callable[[], dict[str, Any]] = field(default=dict)
    limits: str = ""
    marks: dict[str, torch.Tensor] = field(default_factory=dict)  # what a checkpoint carries to tell its kind

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the embedding files: what ComfyUI calls the encoders."""
        return tuple(self.encoders)


FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64}
FLUX |= {"hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "theta": 10000}
FLUX |= {"axes_dim": [16, 56, 56], "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}
FLUX2 = FLUX | {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "theta": 2000}
FLUX2 |= {"context_in_dim": 3 * 64, "mlp_ratio": 3.0, "axes_dim": [32, 32, 32, 32], "txt_ids_dims": [3]}
FLUX2 |= {"patch_size": 1, "qkv_bias": False, "ops_bias": False, "guidance_embed": False, "global_modulation": True}
FLUX2 |= {"mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0}
HUNYUAN = FLUX | {"image_model": "hunyuan_video", "patch_size": [1, 2, 2], "vec_in_dim": 768, "theta": 256}
HUNYUAN |= {"meanflow": False, "byt5": False, "use_cond_type_embedding": False, "vision_in_dim": None}
HUNYUAN |= {"meanflow_sum": False}
del HUNYUAN["txt_ids_dims"]
LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "n_layers": 2, "n_heads": 1}
LUMINA |= {"n_refiner_layers": 1, "n_kv_heads": 1, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512]}
LUMINA |= {"cap_feat_dim": 64, "qk_norm": True, "multiple_of": 32, "ffn_dim_multiplier": 4.0, "rope_theta": 10000.0}
Z_IMAGE = LUMINA | {"axes_dims": [32, 48, 48], "dim": 256, "n_heads": 2, "n_kv_heads": 2, "rope_theta": 256.0}
Z_IMAGE |= {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32, "ffn_dim_multiplier": 8 / 3}
SD1 = {**UNET, "model_channels": 32, "context_dim": 32, "adm_in_channels": None, "use_linear_in_transformer": False}
SD1 |= {"transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1}
SD1 |= {"num_heads": 4, "num_head_channels": -1}
SD2 = SD1 | {"context_dim": 40, "use_linear_in_transformer": True, "model_channels": 64}
SDXL = SD1 | {"context_dim": 80, "use_linear_in_transformer": True, "num_classes": "sequential"}
SDXL |= {"transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2}
SDXL |= {"adm_in_channels": 48 + 6 * 256}
REFINER = SDXL | {"context_dim": 48, "adm_in_channels": 48 + 5 * 256}
SD3 = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 80}
SD3 |= {"num_patches": 1024, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None}
SD3["context_embedder_config"] = {
    "target": "torch.nn.Linear",
    "params": {"in_features": 4096, "out_features": 128},
}
PIXART = {"num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 1}
PIXART |= {"model_max_length": 120, "input_size": 64, "pe_interpolation": 1}
ANIMA = {"image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128}
ANIMA |= {"in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1}
ANIMA |= {"model_channels": 64, "num_blocks": 2, "num_heads": 1, "use_adaln_lora": True, "adaln_lora_dim": 32}
ANIMA |= {"pos_emb_cls": "rope3d", "pos_emb_learnable": True, "rope_enable_fps_modulation": False}
ANIMA |= {"rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0}
HIDREAM = {"image_model": "hidream", "axes_dims_rope": [64, 32, 32], "caption_channels": [64, 64], "in_channels": 16}
HIDREAM |= {"out_channels": 16, "patch_size": 2, "num_attention_heads": 1, "num_layers": 2, "num_single_layers": 2}
HIDREAM |= {"max_resolution": [128, 128], "text_emb_dim": 80, "llama_layers": [0, 1, 0, 1]}
HIDREAM["num_activated_experts"] = 4  # all there are: of 2 the choice jumps, and finite differences with it
QWEN = {"image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64}
WAN = {"image_model": "wan2.1", "model_type": "t2v", "dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2}
AURA = {"dim": 64, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 64}


def _sentencepiece_in_checkpoint() -> dict[str, Any]:
    return {"spiece_model": sentencepiece_model()}


SD2_EPSILON = Family("SD2", models.SD20, SD2, SD2Tokenizer, SD2ClipModel, {"clip_h": CLIP_H}, TAE_4)
SDXL_EPSILON = Family(
    "SDXL", models.SDXL, SDXL, SDXLTokenizer, SDXLClipModel, {"clip_l": CLIP_L, "clip_g": CLIP_G}, TAE_4
)
SD3_WHOLE = Family(
    "SD3, SD3.5",
    models.SD3,
    SD3 | {"qk_norm": "rms", "x_block_self_attn_layers": [0]},
    SD3Tokenizer,
    sd3_clip(),
    {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5xxl": T5 | {"d_model": 4096}},
    loader=True,
)
FLUX_DEV = Family(
    "Flux.1 dev",
    models.Flux,
    FLUX,
    flux.FluxTokenizer,
    flux.flux_clip(),
    {"clip_l": CLIP_L, "t5xxl": T5},
    loader=True,
)
KLEIN_4B = Family(
    "Flux.2 Klein 4B",
    models.Flux2,
    FLUX2,
    flux.KleinTokenizer,
    flux.klein_te(),
    {"qwen3_4b": LLAMA | {"num_hidden_layers": 29}},
    _flux2_vae,
    loader=True,
)
PIXART_ALPHA = Family(
    "PixArt alpha",
    models.PixArtAlpha,
    PIXART | {"image_model": "pixart_alpha", "micro_condition": True},
    PixArtTokenizer,
    pixart_te(),
    {"t5xxl": T5 | {"d_model": 4096}},
    TAE_4,
    loader=True,
    size=320,
)

FAMILIES = [
    Family("SD1", models.SD15, SD1, SD1Tokenizer, SD1ClipModel, {"clip_l": CLIP_L}, TAE_4),
    SD2_EPSILON,
    replace(
        SD2_EPSILON,
        name="SD2, v-prediction",
        marks={"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])},
    ),
    SDXL_EPSILON,
    replace(
        SDXL_EPSILON,
        name="SDXL, v-prediction, zero terminal SNR",
        marks={"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
    ),
    replace(
        SDXL_EPSILON,
        name="SDXL, EDM (Playground 2.5)",
        marks={"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
    ),
    replace(
        SDXL_EPSILON,
        name="SDXL refiner",
        model=models.SDXLRefiner,
        unet=REFINER,
        encoder=SDXLRefinerClipModel,
        encoders={"clip_g": CLIP_G},
    ),
    SD3_WHOLE,
    replace(
        SD3_WHOLE,
        name="SD3 without T5",
        unet=SD3,
        encoder=sd3_clip(t5=False),
        encoders={"clip_l": CLIP_L, "clip_g": CLIP_G},
    ),
    FLUX_DEV,
    replace(FLUX_DEV, name="Flux.1 schnell", model=models.FluxSchnell, unet=FLUX | {"guidance_embed": False}),
    KLEIN_4B,
    replace(
        KLEIN_4B,
        name="Flux.2 Klein 9B",
        tokenizer=flux.KleinTokenizer8B,
        encoder=flux.klein_te(model_type="qwen3_8b"),
        encoders={"qwen3_8b": LLAMA | {"num_hidden_layers": 29}},
    ),
    PIXART_ALPHA,
    replace(
        PIXART_ALPHA,
        name="PixArt sigma",
        model=models.PixArtSigma,
        unet=PIXART | {"image_model": "pixart_sigma", "micro_condition": False},
    ),
    Family(
        "HunyuanVideo 1",
        models.HunyuanVideo,
        HUNYUAN,
        HunyuanVideoTokenizer,
        hunyuan_video_clip(),
        {"clip_l": CLIP_L | {"hidden_size": 768}, "llama": LLAMA | {"num_hidden_layers": 4}},
        _wan_vae,
        stock=False,
        loader=True,
        limits="stock ComfyUI fails on any embedding",
    ),
    Family(
        "HiDream I1",
        models.HiDream,
        HIDREAM,
        HiDreamTokenizer,
        hidream_clip(),
        {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5xxl": T5, "llama": LLAMA | {"num_hidden_layers": 2}},
    ),
    Family(
        "Z-Image",
        models.ZImage,
        Z_IMAGE,
        z_image.ZImageTokenizer,
        z_image.te(),
        {"qwen3_4b": LLAMA | {"num_hidden_layers": 3}},
    ),
    Family(
        "Lumina 2",
        models.Lumina2,
        LUMINA,
        lumina2.LuminaTokenizer,
        lumina2.te(),
        {"gemma2_2b": LLAMA | {"num_hidden_layers": 3, "vocab_size": SMALL_VOCABULARY}},
        stock=False,
        tokenizer_data=_sentencepiece_in_checkpoint,
    ),
    Family(
        "Qwen-Image",
        models.QwenImage,
        QWEN,
        qwen_image.QwenImageTokenizer,
        qwen_image.te(),
        {"qwen25_7b": LLAMA | {"num_hidden_layers": 2}},
        _wan_vae,
        stock=False,
    ),
    Family(
        "Wan 2.1 (pictures)",
        models.WAN21_T2V,
        WAN,
        wan.WanT5Tokenizer,
        wan.te(),
        {"umt5xxl": T5 | {"d_model": 4096, "vocab_size": SMALL_VOCABULARY}},
        _wan_vae,
        stock=False,
        loader=True,
        tokenizer_data=_sentencepiece_in_checkpoint,
    ),
    Family("AuraFlow", models.AuraFlow, AURA, AuraT5Tokenizer, AuraT5Model, {"pile_t5xl": T5}, TAE_4, stock=False),
    Family(
        "Anima",
        models.Anima,
        ANIMA,
        anima.AnimaTokenizer,
        anima.te(),
        {"qwen3_06b": {"num_hidden_layers": 2}},
        _wan_vae,
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
    draw_on: str = "cpu",
) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a family as loader nodes give them, made under inference mode.

    ``embeddings`` is the folder that stock ComfyUI looks for ``embedding:NAME`` in; ``draw_on`` the device that
    draws the random weights, since a CPU takes minutes for those of a large model.
    """
    with torch.inference_mode():
        clip = _clip(family, encoder_dtype or dtype, embeddings, draw_on)
        return _model(family, dtype, seed, draw_on), clip, comfy.sd.VAE(sd=family.vae())


def _model(family: Family, dtype: torch.dtype, seed: int, draw_on: str):
    config = family.model({**family.unet, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    network = config.get_model(dict(family.marks), "")
    randomise(network.diffusion_model, seed, draw_on)
    if not family.loader:
        device, offload = comfy.model_management.get_torch_device(), torch.device("cpu")
        return comfy.model_patcher.CoreModelPatcher(network, load_device=device, offload_device=offload)
    state = {key: value.clone() for key, value in network.diffusion_model.state_dict().items()}
    loaded = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    assert loaded is not None
    found = type(loaded.model.model_config)
    assert found is family.model, f"the loader takes it for {found.__name__}"
    return loaded


def _clip(family: Family, dtype: torch.dtype, embeddings: str | None, draw_on: str):
    options = {f"{name}_model_config": config for name, config in family.encoders.items()}
    clip = comfy.sd.CLIP(
        ClipTarget(family.tokenizer, family.encoder),
        embedding_directory=embeddings,
        tokenizer_data=family.tokenizer_data(),
        model_options={**options, "dtype": dtype},
    )
    randomise(clip.cond_stage_model, device=draw_on)
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
    return word.mapped(lambda rows: rows + 0.1 * torch.randn(rows.shape, generator=generator)).trainable()


def gradients(family: Family, graph, checkpointing: bool = False) -> tuple[list[torch.Tensor], Embedding, Batch]:
    """Of the loss of a fixed batch by the vectors of a word, with the two."""
    config = TrainConfig(per_image_tokens=0, batch_size=2)
    model = ComfyModel(*graph[:3], gradient_checkpointing=checkpointing)
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
        above = row_losses(model, [word], batch).double().mean().item()
        vectors.copy_(start - step * direction)
        below = row_losses(model, [word], batch).double().mean().item()
        vectors.copy_(start)
        return (above - below) / (2 * step)

    return (4 * difference(step / 2) - difference(step)) / 3


def agrees(graph, word: Embedding, batch: Batch, gradients: list[torch.Tensor]) -> bool:
    """Whether finite differences find every gradient within 0.1%.

    Along the gradient the difference is largest. Small steps drown in rounding, large ones in curvature:
    of five one has to agree.
    """
    model = ComfyModel(*graph[:3])
    with model.training():
        loss = batch_loss(model, [word], batch).item()
        for vectors, gradient in zip(word.parameters(), gradients, strict=True):
            size = gradient.norm().item()
            if size == 0:
                return False
            steps = (share * loss / size for share in (1e-3, 5e-4, 2e-4, 1e-4, 7e-5))
            slopes = (slope(model, word, batch, vectors, gradient / size, step) for step in steps)
            if not any(abs(slope / size - 1) < 1e-3 for slope in slopes):
                return False
    return True
