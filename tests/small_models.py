"""Writes checkpoints of SD1 and SDXL at small width with random weights, in ComfyUI's own layout."""

from pathlib import Path

import comfy.sd
import comfy.supported_models
import torch
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "use_spatial_transformer": True,
    "legacy": False,
    "dtype": torch.float32,
    "use_temporal_attention": False,
    "use_checkpoint": False,
}
DEPTHS = {
    "SmallSD1": {"transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1},
    "SmallSDXL": {
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
        "num_head_channels": 16,
        "num_classes": "sequential",
    },
}


def write_checkpoint(name: str, path: Path) -> None:
    """``name`` is SmallSD1 or SmallSDXL. Seeded, and lively enough for gradients of a normal size."""
    family = next(model for model in comfy.supported_models.models if model.__name__ == name)
    config = family({**UNET, **family.unet_config, **DEPTHS[name]})
    if name == "SmallSD1":
        config.unet_config.update(config.unet_extra_config)
    model = config.get_model({}, device="cpu")
    target = config.clip_target({})
    clip = target.clip(device="cpu", dtype=torch.float32)
    autoencoder = TAESD()
    for module in (model.diffusion_model, clip, autoencoder):
        randomise(module)
    vae = {f"first_stage_model.{key}": value for key, value in autoencoder.state_dict().items()}
    state = {f"model.diffusion_model.{key}": value for key, value in model.diffusion_model.state_dict().items()}
    state |= config.process_clip_state_dict_for_saving(clip.state_dict()) | vae
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous() for key, value in state.items()}, path)


def randomise(module: torch.nn.Module, seed: int = 0, device: str = "cpu") -> None:
    """Seeded weights of a size that keeps activations and gradients in a normal range, drawn on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    for key, parameter in module.state_dict().items():
        if not parameter.is_floating_point() or parameter.ndim == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim == 1:
            is_factor = key.endswith(("weight", "scale", "gamma", "running_var"))
            parameter.copy_(is_factor + 0.05 * noise)
        elif "embedding" in key:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
