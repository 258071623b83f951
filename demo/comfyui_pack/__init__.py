"""Lets ComfyUI's own Load Checkpoint recognise the toy models, of 64 and of 128 pixels.

The checkpoints are ordinary Stable Diffusion 1 ones but for their widths, so all that is needed is
an entry of these widths in ComfyUI's list of models, with a text encoder to match.  This pack has
no nodes.  Outside the server, importing it once ComfyUI is on the path does the same.
"""

from __future__ import annotations

from typing import Any

import comfy.supported_models
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget

WIDTH = 96  # of the text encoder, and so of what it gives to the UNet
CHANNELS = 64  # of the UNet's first level
HEADS = 4
TEXT_ENCODER = {
    "num_hidden_layers": 3,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
    "vocab_size": 49408,
}


class ToyTokens(SDTokenizer):
    """CLIP's tokenizer; knows the width that embedding files must have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "embedding_size": WIDTH})


class ToyTokenizer(SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=ToyTokens)


class ToyTextEncoder(SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            return_projected_pooled=False,
            textmodel_json_config=dict(TEXT_ENCODER),
            model_options=model_options or {},
        )


class ToyClip(SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        # As ComfyUI's own models do, whatever the default says.
        super().__init__(device, dtype, model_options or {}, clip_model=ToyTextEncoder)  # pyright: ignore[reportArgumentType]


class ToySD(comfy.supported_models.SD15):
    """Stable Diffusion 1 with the toy model's widths; latents are those of SD 1.5."""

    unet_config = comfy.supported_models.SD15.unet_config | {
        "context_dim": WIDTH,
        "model_channels": CHANNELS,
        "channel_mult": [1, 2],
    }
    unet_extra_config = {"num_heads": HEADS, "num_head_channels": -1}

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> ClipTarget:
        return ClipTarget(ToyTokenizer, ToyClip)


class Times(float):
    """Times so many channels, which is a whole number."""

    def __mul__(self, channels: float) -> int:
        return round(float(self) * channels)

    __rmul__ = __mul__


class WildSD(ToySD):
    """The one of 128 pixels. Its last level has 160 channels, which ComfyUI takes for twice 64."""

    unet_config = ToySD.unet_config | {"channel_mult": [1, 2, 2]}
    unet_extra_config = ToySD.unet_extra_config | {"channel_mult": [1, 2, Times(2.5)]}


def register() -> None:
    """Add the toy models to ComfyUI's list, unless they are there already."""
    models = comfy.supported_models.models
    for ours in (ToySD, WildSD):
        if not any(known.unet_config == ours.unet_config for known in models):
            models.append(ours)


register()
NODE_CLASS_MAPPINGS: dict[str, type] = {}
