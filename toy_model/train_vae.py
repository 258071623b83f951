"""Train the autoencoder, or with --decoder-only sharpen the decoder of a trained one.

python -m toy_model.train_vae WORK --minutes 18          reads WORK/d*.npy, writes WORK/vae.pt
python -m toy_model.train_vae WORK --minutes 8 --decoder-only
python -m toy_model.train_vae WORK --minutes 2 --wild --device cuda --processes 1 --batch 64      for wild.py's pictures
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .autoencoder import SHARP_DECODER, WILD, NarrowTAESD, to_diffusers
from .dataset import load_set
from .training import Clock, Muon, Replay, moving_average, run, shared

HELD_BACK = 128  # pictures at the front of the data that training never sees


def gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[..., 1:, :] - image[..., :-1, :], image[..., 1:] - image[..., :-1]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1, squared and edge errors, with L1 at half resolution for the overall layout."""
    loss = F.l1_loss(output, target) + 4 * F.mse_loss(output, target)
    for ours, theirs in zip(gradients(output), gradients(target), strict=False):
        loss = loss + F.l1_loss(ours, theirs)
    return loss + 0.5 * F.l1_loss(F.avg_pool2d(output, 2), F.avg_pool2d(target, 2))


def latent_penalty(latents: Tensor) -> Tensor:
    """Keeps every channel near mean 0 and deviation 1, and the values within the decoder's clamp."""
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    outside = (latents.abs() - 2.5).clamp_min(0)
    return 0.02 * (mean**2 + (deviation - 1) ** 2).mean() + 0.002 * (outside**2).mean()


def learning_rate(peak: float, step: int, progress: float) -> float:
    return peak * min(1, (step + 1) / 50) * (0.49 * (1 + math.cos(math.pi * progress)) + 0.02)


def as_batch(images: Tensor) -> Tensor:
    batch = images.permute(0, 3, 1, 2).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def check(vae: NarrowTAESD, images: Tensor, sheet: Path) -> float:
    """PSNR on held-back pictures; draws them above their reconstructions."""
    target = as_batch(images)
    output = vae.decoder(vae.encoder(target)).clamp(0, 1)
    rows = []
    for start in range(0, 64, 16):
        rows += [torch.cat(list(side[start : start + 16]), 2) for side in (target, output)]
    pixels = (torch.cat(rows, 1).permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(sheet)
    return -10 * torch.log10(F.mse_loss(output, target)).item()


def train(vae: NarrowTAESD, images: Tensor, minutes: float, peak: float, batch: int, decoder_only: bool) -> NarrowTAESD:
    """The moving average of the autoencoder's weights."""
    vae.encoder.requires_grad_(not decoder_only)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    kernels = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) > 4]
    others = [p for p in parameters if p.ndim < 4 or min(p.shape[:2]) <= 4]
    optimizers = [Muon(kernels, peak), torch.optim.AdamW(others, peak, betas=(0.9, 0.97))]
    both, average, device = shared(vae), moving_average(vae, 0.998), images.device
    noise = 0.03 if decoder_only else 0.05
    target, error = as_batch(images[:batch]), torch.zeros((), device=device)

    def step() -> None:
        vae.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output, latents = both(target, noise)
        output, latents = output.float(), latents.float()
        (reconstruction_loss(output, target) + latent_penalty(latents)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        error.copy_(F.mse_loss(output.detach(), target))

    clock, taken, take = Clock(minutes), 0, Replay(step, optimizers, device)
    while clock.progress < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(peak, taken, clock.progress)
        target.copy_(as_batch(images[torch.randint(HELD_BACK, len(images), (batch,), device=device)]))
        take()
        average.update_parameters(vae)
        clock.tick()
        taken += 1
        if taken % 100 == 0 and dist.get_rank() == 0:
            psnr = -10 * math.log10(error.item())
            speed = taken * batch * dist.get_world_size() / clock.seconds
            print(f"{taken} {clock.seconds:.0f}s psnr {psnr:.2f} {speed:.0f}/s", flush=True)
    assert isinstance(average.module, NarrowTAESD)
    return average.module


def worker(args: argparse.Namespace) -> None:
    images = torch.from_numpy(load_set(sorted(args.work.glob("d*.npy")))[0])
    torch.manual_seed(0)  # the same start in every process
    vae, target = NarrowTAESD(**(WILD if args.wild else {})), args.work / "vae.pt"
    if args.decoder_only:  # a new block starts as the ReLU whose place it takes
        vae = NarrowTAESD(decoder_blocks=SHARP_DECODER)
        vae.load_state_dict(torch.load(target), strict=False)
        target = args.work / "vae_sharp.pt"
    elif args.go_on:
        vae.load_state_dict(torch.load(target))
    vae = vae.to(memory_format=torch.channels_last).to(args.device)
    torch.manual_seed(1 + dist.get_rank())  # but pictures and noise of its own
    vae = train(vae, images.to(args.device), args.minutes, args.learning_rate, args.batch, args.decoder_only)
    if dist.get_rank() == 0:
        vae = vae.cpu()
        torch.save(vae.state_dict(), target)
        report(vae.eval(), images[:HELD_BACK], target)


@torch.no_grad()
def report(vae: NarrowTAESD, images: Tensor, target: Path) -> None:
    sample = as_batch(images)
    latents = vae.encoder(sample)
    exact = to_diffusers(vae).encode(sample * 2 - 1)[0]
    psnr = check(vae, images, target.with_suffix(".png"))
    print(f"held-out PSNR {psnr:.2f} dB, export error {(latents - exact).abs().max():.1e}")
    print("latent deviation", latents.std((0, 2, 3)).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--go-on", action="store_true", help="start from WORK/vae.pt")
    parser.add_argument("--wild", action="store_true", help="a wider one, for pictures of 128 pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--batch", type=int, default=4, help="of each process")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    run(worker, args, args.processes)


if __name__ == "__main__":
    main()
