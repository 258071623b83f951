"""What training takes through ComfyUI at full size: SD1.5 and SDXL with random weights, float32, on a CPU.

    python -m benchmarks.full_size SD1 --size 256 512
    python -m benchmarks.full_size SDXL --size 512 --batch 1 --repeats 3      (20 GB of memory)

Seconds a step (median), the memory of MODEL and CLIP loaded, and what the training loop takes above it
at its peak; without and with gradient checkpointing. Linux only.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dev.in_process import ROOT, import_comfyui

from .speed import peak_memory, resident

UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
UNET |= {"use_temporal_attention": False, "use_checkpoint": False, "model_channels": 320}
SD1 = UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "adm_in_channels": None,
    "use_linear_in_transformer": False,
}
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_head_channels": 64,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "use_linear_in_transformer": True,
}


@dataclass(frozen=True)
class Size:
    """A family as it is published."""

    unet: Mapping[str, Any]
    pixels: int = 1024
    weights: str = "bfloat16"
    computes: str = ""
    """The same, unless said."""
    encoder_weights: str = "float16"
    family: str = ""
    """Name in tests/families.py where it differs."""


FLUX = {"vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "num_heads": 24}
FLUX |= {"depth": 19, "depth_single_blocks": 38}
SD2 = {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
LUMINA = {"n_refiner_layers": 2}
AURA = {"dim": 3072, "n_layers": 36, "n_double_layers": 4, "n_heads": 12}
AURA |= {"global_conddim": 3072, "cond_seq_dim": 2048}
SIZES = {
    "SD1": Size(SD1, 512, "float16"),
    "SD2": Size(SD1 | SD2, 768, "float16"),
    "SDXL": Size(SDXL, 1024, "float16"),
    "SD3.5 medium": Size(
        {
            "depth": 24,
            "adm_in_channels": 2048,
            "num_patches": 384**2,
            "pos_embed_max_size": 384,
            "x_block_self_attn_layers": list(range(13)),
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 1536},
            },
        },
        family="SD3, SD3.5",
    ),
    "Flux.1 dev": Size(FLUX),
    "Flux.1 dev, fp8": Size(FLUX, 512, "float8_e4m3fn", "bfloat16", "float8_e4m3fn", "Flux.1 dev"),
    "Flux.2 Klein 4B": Size(
        {"context_in_dim": 3 * 2560, "hidden_size": 3072, "num_heads": 24, "depth": 5, "depth_single_blocks": 20}
    ),
    "Flux.2 Klein 9B": Size(
        {"context_in_dim": 3 * 4096, "hidden_size": 4096, "num_heads": 32, "depth": 8, "depth_single_blocks": 24}
    ),
    "PixArt sigma": Size({"depth": 28, "model_max_length": 300}, weights="float16"),
    "HunyuanVideo 1": Size(
        {"context_in_dim": 4096, "hidden_size": 3072, "num_heads": 24, "depth": 20, "depth_single_blocks": 40}, 512
    ),
    "Z-Image": Size(LUMINA | {"dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560}),
    "Lumina 2": Size(LUMINA | {"dim": 2304, "n_layers": 26, "n_heads": 24, "n_kv_heads": 8, "cap_feat_dim": 2304}),
    "Qwen-Image": Size({"num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584}),
    "Wan 2.1 1.3B": Size(
        {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 512, family="Wan 2.1 (pictures)"
    ),
    "AuraFlow": Size(AURA, weights="float16"),
    "Anima": Size({"model_channels": 2048, "num_blocks": 28, "num_heads": 16, "adaln_lora_dim": 256}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["SD1", "SDXL"])
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="pixels a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="steps to take the median of")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base:
        import_comfyui(Path(base))
        sys.path.append(str(ROOT / "tests"))
        from families import NAMED, build

        family = NAMED[args.model]
        before = resident("VmRSS")
        graph = build(replace(family, unet=SIZES[args.model].unet, encoders={}))
        loaded = (resident("VmRSS") - before) / 2**30
        print(f"{args.model}, float32, {torch.get_num_threads()} threads: MODEL, CLIP and a small VAE {loaded:.1f} GiB")
        for size in args.size:
            for checkpointing in (False, True):
                seconds, peak = measure(graph, size, args.batch, args.repeats, checkpointing)
                way = "with" if checkpointing else "without"
                print(
                    f"{size} px, batch {args.batch}, {way} checkpointing: {seconds:.2f} s a step, {peak:.2f} GiB above"
                )


def measure(graph, size: int, batch: int, repeats: int, checkpointing: bool) -> tuple[float, float]:
    """Seconds a step, and GiB at the peak of the loop above what is loaded."""
    from textual_inversion import TrainConfig, initial_embedding, train
    from textual_inversion.adapters.comfyui import ComfyModel
    from textual_inversion.dataset import make_dataset

    config = TrainConfig(initializer="toy", batch_size=batch, steps=1000, evaluate_every=1000, patience=0)
    model = ComfyModel(*graph, gradient_checkpointing=checkpointing)
    dataset = make_dataset(model.encode_images, [torch.rand(1, size, size, 3)], [], [], config)
    taken = []

    def set_up():
        start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, 1)
        steps = train(model, start.trainable(), dataset, config)
        next(steps)

        def step() -> None:
            started = time.perf_counter()
            next(steps)
            taken.append(time.perf_counter() - started)

        for _ in range(repeats):
            step()
        return step

    with model.training():
        peak = peak_memory(set_up, torch.device("cpu"))
    assert peak is not None
    return statistics.median(taken), peak / 1024


if __name__ == "__main__":
    main()
