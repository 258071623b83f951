"""What a training step costs beyond the network itself, in one process.

    python benchmarks/step.py             the demo model
    python benchmarks/step.py --full      SD1.5's full size with random weights (8 GB of memory)

Prints medians: the bare UNet forward and backward to its context, the text encoder's, and our whole
step (prompts, noise, UNet, loss, backward, AdamW); and memory above the loaded model.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "tests")]

from in_process import import_comfyui, import_folder, import_pack  # noqa: E402


def load_demo():
    import comfy.sd

    import_folder("textual_inversion_demo_model", ROOT / "demo/comfyui_pack")
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(ROOT / "demo/models/toy.safetensors"), output_vae=True, output_clip=True
        )[:3]


def load_full():
    """SD1.5 as ComfyUI builds it, weights drawn at random."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    from comfy.taesd.taesd import TAESD
    from small_models import randomise

    config = comfy.supported_models.SD15(
        {
            **comfy.supported_models.SD15.unet_config,
            **comfy.supported_models.SD15.unet_extra_config,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "legacy": False,
            "dtype": torch.float32,
        }
    )
    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = comfy.model_patcher.ModelPatcher(config.get_model({}, device=cpu), cpu, cpu)
        clip = comfy.sd.CLIP(config.clip_target({}), embedding_directory=None)
        autoencoder = TAESD()
        for module in (model.model.diffusion_model, clip.cond_stage_model, autoencoder):
            randomise(module)
        return model, clip, comfy.sd.VAE(sd=autoencoder.state_dict())


def median_seconds(run, repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="SD1.5's full size with random weights")
    parser.add_argument("--size", type=int, help="pixels a side (64, or 256 with --full)")
    parser.add_argument("--batch", type=int, help="pictures a step (4, or 1 with --full)")
    parser.add_argument("--repeats", type=int, help="steps to take the median of (30, or 3 with --full)")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    size, batch = args.size or (256 if args.full else 64), args.batch or (1 if args.full else 4)
    repeats = args.repeats or (3 if args.full else 30)

    import_pack()
    base = tempfile.TemporaryDirectory()
    import_comfyui(Path(base.name))
    parts = load_full() if args.full else load_demo()
    from ti_pack.textual_inversion import TrainConfig, train
    from ti_pack.textual_inversion.adapters.comfyui import ComfyModel
    from ti_pack.textual_inversion.dataset import make_dataset, training_batches

    config = TrainConfig(
        initializer="toy",
        steps=repeats + 2,
        batch_size=batch,
        evaluate_every=10_000,
        gradient_checkpointing=args.checkpointing,
    )
    model = ComfyModel(*parts, args.checkpointing)
    dataset = make_dataset(model.encode_images, [torch.rand(1, size, size, 3)], [], [], config)
    loaded = psutil.Process().memory_info().rss
    with model:
        embedding = model.initial_embedding("S*", "toy", 1).trainable()
        vectors = list(embedding.parameters())
        drawn = next(training_batches(dataset, config, torch.Generator().manual_seed(0)))
        sigmas = model.sample_sigmas(drawn.quantiles)
        noised = model.add_noise(drawn.latents, drawn.noise, sigmas)
        conditioning = model.encode_prompts(drawn.prompts, embedding)
        context = torch.cat([part["cross_attn"] for part in conditioning]).detach().requires_grad_(True)
        network = model._patcher.model

        def unet():
            out = network.apply_model(noised, sigmas, c_crossattn=context, transformer_options={})
            torch.autograd.grad(out.square().mean(), context)

        def text():
            encoded = model.encode_prompts(drawn.prompts, embedding)
            torch.autograd.grad(sum(part["cross_attn"].square().mean() for part in encoded), vectors)

        bare, encoder = median_seconds(unet, repeats), median_seconds(text, repeats)
        steps = train(model, embedding, dataset, config)
        next(steps)
        ours = median_seconds(lambda: next(steps), repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(
        p.numel() * p.element_size() for part in (parts[0].model, parts[1].cond_stage_model) for p in part.parameters()
    )
    print(f"{'SD1.5 size' if args.full else 'demo model'}, {size} px, batch {batch}, {torch.get_num_threads()} threads")
    print(f"bare UNet forward + backward  {bare * 1e3:8.1f} ms")
    print(f"text encoder                  {encoder * 1e3:8.1f} ms")
    print(f"our step                      {ours * 1e3:8.1f} ms = {ours / (bare + encoder):.3f} x their sum")
    print(f"weights {weights / 2**20:.0f} MiB; peak above the loaded model {(peak - loaded) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
