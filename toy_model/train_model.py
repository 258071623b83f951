"""Train the text encoder and the UNet on the autoencoder's latents.

python -m toy_model.train_model WORK --minutes 110  reads WORK/d*.npy, WORK/vae.pt, writes WORK/latest.safetensors
python -m toy_model.train_model WORK --go-on FILE   trains FILE further on WORK/d*.npy
python -m toy_model.train_model WORK --minutes 6 --device cuda --processes 1 --batch 256
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPTextModel

from .dataset import load_set
from .export import export, load_vae
from .networks import new_text_encoder, new_unet, noise_schedule, read_checkpoint, use_channels_last
from .text import CONTEXT, END, VOCABULARY, tokenize
from .train_vae import as_batch
from .training import Clock, Muon, Replay, moving_average, run, shared

NULL_CAPTIONS = 0.1
FULL_CONTEXT_EVERY = 5  # other steps leave out padding: the text encoder is causal
MIN_SNR = 5.0


@torch.no_grad()
def encode(images: Tensor, vae: AutoencoderTiny, device: str) -> Tensor:
    use_channels_last(vae)
    encoder = vae.encoder.to(device)
    latents = torch.cat([encoder(as_batch(part.to(device)) * 2 - 1) for part in images.split(128)])
    encoder.cpu()
    return latents


class Words:
    """The few words of the captions, numbered without gaps, so that training touches no others."""

    def __init__(self, captions: list[str]) -> None:
        tokens = tokenize([*captions, ""])
        self.used, numbered = tokens.unique(return_inverse=True)
        self.captions, self.null = numbered[:-1], numbered[-1]
        self.longest = min(CONTEXT, int((tokens != END).sum(1).max()) + 6)

    def whole(self, small: CLIPTextModel) -> CLIPTextModel:
        """A text encoder with CLIP's whole vocabulary; words never seen get the mean vector."""
        large = new_text_encoder(VOCABULARY)
        weights = small.state_dict()
        name = next(n for n in weights if n.endswith("token_embedding.weight"))
        learned = weights[name]
        table = learned.mean(0).repeat(VOCABULARY, 1)
        table[self.used] = learned
        large.load_state_dict(weights | {name: table})
        return large.eval()

    def part(self, large: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a text encoder with the whole vocabulary, cut to these words."""
        name = next(n for n in large if n.endswith("token_embedding.weight"))
        return large | {name: large[name][self.used]}


class Denoiser(nn.Module):
    """Text encoder and UNet as one: the noise in noisy latents, from the numbers of a caption's words."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.mask: Tensor
        self.register_buffer("mask", torch.full((1, 1, CONTEXT, CONTEXT), -1e4).triu(1), persistent=False)

    def forward(self, noisy: Tensor, t: Tensor, words: Tensor) -> Tensor:
        mask = self.mask[..., : words.shape[1], : words.shape[1]]  # given, since a GPU cannot record its making
        return self.unet(noisy, t, self.text_encoder(words, attention_mask=mask).last_hidden_state).sample


def new_optimizers(model: Denoiser, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for kernels and matrices; words, each of them rare, learn faster than the rest."""
    named = list(model.named_parameters())
    words = [p for n, p in named if n.endswith("token_embedding.weight")]
    matrices = [p for n, p in named if p.ndim > 1 and min(p.shape[:2]) > 4 and not n.endswith("embedding.weight")]
    chosen = {id(p) for p in words + matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, peak),
        torch.optim.AdamW(others, peak, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.AdamW(words, 3 * peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, progress: float) -> float:
    """Warm-up by steps, then a cosine over the time given."""
    return min(1, (step + 1) / 200) * (0.49 * (1 + math.cos(math.pi * progress)) + 0.02)


def train(args: argparse.Namespace, model: Denoiser, latents: Tensor, words: Words, vae: AutoencoderTiny) -> None:
    clock, device = Clock(args.minutes), latents.device
    optimizers = new_optimizers(model, args.learning_rate)
    schedules = [LambdaLR(optimizer, lambda step: rate(step, clock.progress)) for optimizer in optimizers]
    both, average = shared(model), moving_average(model, 0.999)
    kept = noise_schedule().alphas_cumprod.to(device)
    snr = kept / (1 - kept)
    weight = snr.clamp(max=MIN_SNR) / snr
    captions, null = words.captions.to(device), words.null.to(device)
    noisy, noise = (torch.empty_like(latents[: args.batch]) for _ in range(2))
    t, error = torch.zeros(args.batch, dtype=torch.long, device=device), torch.zeros((), device=device)
    ids = captions[: args.batch].clone()

    def step(given: Tensor = ids) -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = both(noisy, t, given)
        errors = (predicted - noise).square().mean((1, 2, 3))
        (errors * weight[t]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        error.lerp_(errors.detach().mean(), 0.005)

    saved, taken, take = 0.0, 0, Replay(step, optimizers, device)
    order = torch.empty(0, dtype=torch.long, device=device)
    while clock.progress < 1:
        if len(order) < args.batch:
            order = torch.randperm(len(latents), device=device)
        chosen, order = order[: args.batch], order[args.batch :]
        ids.copy_(torch.where(torch.rand(args.batch, 1, device=device) < NULL_CAPTIONS, null, captions[chosen]))
        spread = (torch.rand(args.batch, device=device) + torch.randperm(args.batch, device=device)) / args.batch
        t.copy_((spread * len(kept)).long().clamp(max=len(kept) - 1))
        noise.normal_()
        share = kept[t].view(-1, 1, 1, 1)
        noisy.copy_(share.sqrt() * latents[chosen] + (1 - share).sqrt() * noise)
        if device.type == "cpu" and taken % FULL_CONTEXT_EVERY:
            step(ids[:, : words.longest])
        else:
            take()
        for schedule in schedules:
            schedule.step()
        average.update_parameters(model)
        clock.tick()
        taken += 1
        if dist.get_rank() > 0:
            continue
        if taken % 100 == 0:
            speed = taken * args.batch * dist.get_world_size() / clock.seconds
            mean = error.item() / (1 - 0.995**taken)  # it starts from zero
            print(f"{taken} {clock.seconds:.0f}s loss {mean:.4f} {speed:.0f}/s", flush=True)
        if clock.seconds - saved > 60 * args.save_every or clock.progress >= 1:
            learned = copy.deepcopy(average.module).cpu()
            assert isinstance(learned, Denoiser)
            text_encoder = words.whole(learned.text_encoder)
            export(learned.unet, text_encoder, vae, args.work / "latest.safetensors")
            saved = clock.seconds


def worker(args: argparse.Namespace) -> None:
    """Every process trains on a part of the pictures."""
    images, captions = load_set(sorted(args.work.glob("d*.npy")))
    words = Words(captions)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    words.captions = words.captions[part]
    vae = read_checkpoint(args.go_on)[2] if args.go_on else load_vae(args.work / "vae.pt")
    latents = encode(torch.from_numpy(images[part]), vae, args.device)
    torch.manual_seed(2)  # the same start in every process
    model = Denoiser(new_unet(latents.shape[-1]), new_text_encoder(len(words.used)))
    if args.go_on:
        unet, text_encoder, _ = read_checkpoint(args.go_on)
        model.unet.load_state_dict(unet.state_dict())
        model.text_encoder.load_state_dict(words.part(text_encoder.state_dict()))
    model.to(args.device)
    use_channels_last(model.unet)
    torch.manual_seed(args.seed + dist.get_rank())
    print(f"{len(latents)} latents, {len(words.used)} words, context {words.longest}", flush=True)
    train(args, model, latents, words, vae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--save-every", type=float, default=15, help="minutes")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--go-on", type=Path, metavar="CHECKPOINT", help="train this one further")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    run(worker, args, args.processes)


if __name__ == "__main__":
    main()
