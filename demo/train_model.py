"""Train the text encoder and the UNet on the autoencoder's latents.

python train_model.py WORK --minutes 75     reads WORK/d*.npy and WORK/vae.pt,
                                            writes WORK/model and WORK/latest.safetensors
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
from autoencoder import NarrowTAESD
from dataset import load_set
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from export import export, load_vae
from parallel import Clock, run
from text import CONTEXT, END, VOCABULARY, tokenize
from torch import Tensor, nn
from train_vae import as_batch
from transformers import CLIPTextConfig, CLIPTextModel

TEXT_WIDTH = 96
UNET_WIDTHS = (64, 128)
HEADS = 4
NULL_CAPTIONS = 0.1
FULL_CONTEXT_EVERY = 5  # other steps leave out padding: the text encoder is causal
MIN_SNR = 5.0


def new_text_encoder(words: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        hidden_act="quick_gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=END - 1,
        eos_token_id=END,
        pad_token_id=0 if words < VOCABULARY else END,
    )
    config._attn_implementation = "eager"  # at this size the fastest on a CPU
    return CLIPTextModel(config)


def new_unet(size: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        attention_head_dim=HEADS,  # the number of heads, in this class's naming
        cross_attention_dim=TEXT_WIDTH,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@torch.no_grad()
def encode(images: Tensor, vae_path: Path) -> Tensor:
    vae = NarrowTAESD().to(memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(vae_path))
    return torch.cat([vae.encoder(as_batch(part)) for part in images.split(128)])


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


class Average:
    """A moving average of parameters, and a copy of the modules that carries it."""

    def __init__(self, modules: nn.ModuleList) -> None:
        self.modules = modules
        self.values = [p.detach().clone() for p in modules.parameters()]

    def update(self, step: int) -> None:
        decay = min(0.999, (1 + step) / (20 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.modules.parameters()], 1 - decay)

    def save(self, words: Words, work: Path) -> None:
        """Write the averaged model as a folder and as a checkpoint."""
        current = [p.detach().clone() for p in self.modules.parameters()]
        for parameter, value in zip(self.modules.parameters(), self.values, strict=False):
            parameter.data.copy_(value)
        unet, text_encoder = self.modules[0], words.whole(self.modules[1])
        unet.save_pretrained(work / "model" / "unet")
        text_encoder.save_pretrained(work / "model" / "text_encoder")
        noise_schedule().save_pretrained(work / "model" / "scheduler")
        export(unet, text_encoder, load_vae(work / "vae.pt"), work / "latest.safetensors")
        for parameter, value in zip(self.modules.parameters(), current, strict=False):
            parameter.data.copy_(value)


def new_optimizer(modules: nn.ModuleList, peak: float) -> torch.optim.AdamW:
    """Weight decay for matrices and kernels alone; words, each of them rare, learn faster."""
    named = list(modules.named_parameters())
    words = [p for n, p in named if n.endswith("token_embedding.weight")]
    matrices = [p for n, p in named if p.ndim > 1 and not n.endswith("embedding.weight")]
    chosen = {id(p) for p in words + matrices}
    groups = [
        {"params": matrices, "weight_decay": 0.01, "faster": 1},
        {"params": [p for _, p in named if id(p) not in chosen], "weight_decay": 0.0, "faster": 1},
        {"params": words, "weight_decay": 0.0, "faster": 3},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))


def train(args: argparse.Namespace, modules: nn.ModuleList, latents: Tensor, words: Words) -> None:
    unet, text_encoder = modules
    optimizer = new_optimizer(modules, args.learning_rate)
    average = Average(modules)
    kept = noise_schedule().alphas_cumprod
    snr = kept / (1 - kept)
    weight = snr.clamp(max=MIN_SNR) / snr
    clock, saved, step, mean = Clock(args.minutes), 0.0, 0, None
    order = torch.empty(0, dtype=torch.long)
    while clock.progress < 1:
        rate = args.learning_rate * min(1, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = group["faster"] * rate * (0.49 * (1 + math.cos(math.pi * clock.progress)) + 0.02)
        if len(order) < args.batch:
            order = torch.randperm(len(latents))
        chosen, order = order[: args.batch], order[args.batch :]
        ids = words.captions[chosen]
        ids = torch.where(torch.rand(args.batch, 1) < NULL_CAPTIONS, words.null, ids)
        if step % FULL_CONTEXT_EVERY:
            ids = ids[:, : words.longest]
        spread = (torch.rand(args.batch) + torch.randperm(args.batch)) / args.batch
        t = (spread * len(kept)).long().clamp(max=len(kept) - 1)
        noise = torch.randn_like(latents[chosen])
        share = kept[t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents[chosen] + (1 - share).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, t, text_encoder(ids).last_hidden_state).sample
        errors = (predicted - noise).square().mean((1, 2, 3))
        (errors * weight[t]).mean().backward()
        clock.share_gradients(list(modules.parameters()))
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average.update(step)
        error = errors.mean().item()
        mean = error if mean is None else 0.995 * mean + 0.005 * error
        if dist.get_rank() > 0:
            continue
        if step % 100 == 0:
            speed = step * args.batch * dist.get_world_size() / clock.seconds
            print(f"{step} {clock.seconds:.0f}s loss {mean:.4f} {speed:.0f}/s", flush=True)
        if clock.seconds - saved > 60 * args.save_every or clock.progress >= 1:
            average.save(words, args.work)
            saved = clock.seconds


def worker(args: argparse.Namespace) -> None:
    """Every process trains on a part of the pictures."""
    images, captions = load_set(sorted(args.work.glob("d*.npy")))
    words = Words(captions)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    words.captions = words.captions[part]
    latents = encode(torch.from_numpy(images[part]), args.work / "vae.pt")
    torch.manual_seed(2)  # the same start in every process
    unet = new_unet(latents.shape[-1]).to(memory_format=torch.channels_last)
    modules = nn.ModuleList([unet, new_text_encoder(len(words.used))])
    if args.go_on:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.work / "model/unet").state_dict())
        trained = CLIPTextModel.from_pretrained(args.work / "model/text_encoder")
        modules[1].load_state_dict(words.part(trained.state_dict()))
    torch.manual_seed(args.seed + dist.get_rank())
    print(f"{len(latents)} latents, {len(words.used)} words, context {words.longest}", flush=True)
    train(args, modules, latents, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--save-every", type=float, default=15, help="minutes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16, help="of each process")
    parser.add_argument("--go-on", action="store_true", help="start from WORK/model")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    run(worker, args, args.processes)


if __name__ == "__main__":
    main()
