"""What a training step costs: the bare networks, ours, and the way of diffusers' script, on the same classes.

    python -m benchmarks.speed                     the demo model, through ComfyUI and through diffusers
    python -m benchmarks.speed --checkpointing     without and with gradient checkpointing
    python -m benchmarks.speed --full              SD1.5's full size with random weights (16 GB of memory)
    python -m benchmarks.speed --full --device cuda --dtype bfloat16 --channels-last --compile

For every size and batch: the bare UNet forward and backward to its context, the bare text encoder
forward and backward to its token vectors, our whole step, and one of diffusers' training script. They
take turns, so that whatever else the machine does hits all alike. Prints medians with their quartiles,
and the memory that each takes above the loaded weights (on a CPU: on Linux only).
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from dev.in_process import ROOT, import_comfyui
from textual_inversion import TrainConfig, initial_embedding, train
from textual_inversion.adapters.diffusers_pipeline import DiffusersModel
from textual_inversion.dataset import Batch, Dataset, make_dataset, training_batches
from toy_model.networks import pipeline_from_checkpoint, sampling_schedule
from toy_model.text import tokenizer

CHECKPOINT = ROOT / "demo/models/toy.safetensors"
WAYS = UNET, TEXT, OURS, THEIRS = "bare UNet", "text encoder", "our step", "diffusers' way"
WARM_UP = {"cpu": 1, "cuda": 3}  # steps; CUDA chooses kernels in its first

Step = Callable[[], Any]
Ways = dict[str, Callable[[], Step]]  # each call sets one up from nothing


@dataclass(frozen=True)
class Case:
    """What one row of the table is about."""

    model: str
    through: str
    size: int  # pixels a side
    batch: int
    checkpointing: bool

    def config(self) -> Any:
        """The defaults without per-image tokens, evaluations and early stopping."""
        settings: dict[str, Any] = {"per_image_tokens": 0, "steps": 100_000, "evaluate_every": 10_000, "patience": 0}
        settings |= {"batch_size": self.batch, "gradient_checkpointing": self.checkpointing}
        return TrainConfig(initializer="toy", **settings)

    def dataset(self, encode_images) -> Dataset:
        return make_dataset(encode_images, [torch.rand(1, self.size, self.size, 3)], [], [], self.config())

    def batches(self) -> Iterator[Batch]:
        """The prompts, noise and noise levels that ``train`` draws, over and over again."""
        dataset = self.dataset(lambda _images: [torch.zeros(4, self.size // 8, self.size // 8)])
        drawn = training_batches(dataset, self.config(), torch.Generator().manual_seed(self.config().seed))
        return cycle(list(islice(drawn, 32)))


# The models --------------------------------------------------------------------------------------


def full_size_pipeline() -> StableDiffusionPipeline:
    """SD1.5 by the configs of its diffusers folder, with the weights that PyTorch draws."""
    text: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    text |= {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
    unet: dict[str, Any] = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
    unet |= {"cross_attention_dim": 768, "attention_head_dim": 8}  # that is 8 heads
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    unused: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**unet),
        scheduler=sampling_schedule(),
        **unused,
    )


def demo_graph() -> tuple[Any, ...]:
    """MODEL, CLIP and VAE of the demo model, as ComfyUI's Load Checkpoint gives them."""
    import comfy.sd

    import demo.comfyui_pack  # noqa: F401  lets ComfyUI recognise the checkpoint

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=True, output_clip=True)[:3]


# What is measured --------------------------------------------------------------------------------


def our_step(model, case: Case) -> Step:
    """The training loop itself, past its measurement before the first step."""
    config = case.config()
    with getattr(model, "paused", nullcontext)():  # ComfyUI encodes pictures while the model rests
        dataset = case.dataset(model.encode_images)
    embedding = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)
    steps = train(model, embedding.trainable(), dataset, config)
    next(steps)
    return lambda: next(steps)


def backward(output: Tensor, inputs: Tensor | Sequence[Tensor]) -> None:
    torch.autograd.grad(output.float().square().mean(), inputs)


class ThroughComfyUI:
    """A graph's MODEL, CLIP and VAE, on the CPU."""

    def __init__(self, parts: tuple[Any, ...]):
        self.parts = parts

    @contextmanager
    def ways(self, case: Case) -> Iterator[Ways]:
        from textual_inversion.adapters.comfyui import ComfyModel

        with ComfyModel(*self.parts, gradient_checkpointing=case.checkpointing).training() as model:
            yield {
                UNET: lambda: self.unet_step(model, case),
                TEXT: lambda: self.text_step(model, case),
                OURS: lambda: our_step(model, case),
            }

    def unet_step(self, model, case: Case) -> Step:
        from textual_inversion.adapters.comfyui import _differentiable_attention

        network, batch = model._patcher.model, next(case.batches())
        sigmas = model.sample_sigmas(batch.quantiles)
        context = torch.randn(case.batch, 77, *model.keys.values(), requires_grad=True)
        options = {"optimized_attention_override": _differentiable_attention}  # as in our step
        return lambda: backward(
            network.apply_model(batch.noise, sigmas, c_crossattn=context, transformer_options=options), context
        )

    def text_step(self, model, case: Case) -> Step:
        """The distinct prompts of a batch in one pass, tokenised before."""
        from textual_inversion.adapters.comfyui_tokens import text_encoders, with_embeddings

        word = initial_embedding(model.vocabularies(), "S*", "toy", 1).trainable()
        clip = with_embeddings(model._clip, word)
        (encoder,) = text_encoders(clip)
        batches = [[clip.tokenize(p) for p in dict.fromkeys(batch.prompts)] for batch in islice(case.batches(), 32)]
        rows = cycle([[[token for token, _ in text[encoder.name][0]] for text in batch] for batch in batches])
        return lambda: backward(encoder.model.encode(next(rows))[0], list(word.parameters()))


class ThroughDiffusers:
    """One pipeline. The script trains a text encoder of its own, everything else is shared."""

    def __init__(self, pipeline: StableDiffusionPipeline, args: argparse.Namespace):
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        # The encoder that the script trains stays float32, whatever the precision of the rest.
        self.trained: Any = copy.deepcopy(pipeline.text_encoder).to(self.device).requires_grad_(False).train()
        self.trained_tokenizer = copy.deepcopy(pipeline.tokenizer)
        assert self.trained_tokenizer.add_tokens([TrainConfig().trigger]) == 1
        self.trained.resize_token_embeddings(len(self.trained_tokenizer), mean_resizing=False)
        self.pipeline: Any = pipeline.to(self.device, self.dtype)
        self.unet, self.vae = self.pipeline.unet, self.pipeline.vae
        if args.channels_last:
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        if args.compile:
            self.unet.compile()

    @contextmanager
    def ways(self, case: Case) -> Iterator[Ways]:
        self.unet.disable_gradient_checkpointing()
        model = DiffusersModel(self.pipeline, case.checkpointing)
        yield {
            UNET: lambda: self.unet_step(case),
            TEXT: lambda: self.text_step(case),
            OURS: lambda: our_step(model, case),
            THEIRS: lambda: self.script_step(case),
        }

    def unet_step(self, case: Case) -> Step:
        batch = next(case.batches())
        noised, timesteps = batch.noise.to(self.device, self.dtype), (batch.quantiles * 1000).long().to(self.device)
        context = torch.randn(case.batch, 77, self.unet.config.cross_attention_dim).to(noised).requires_grad_(True)
        return lambda: backward(self.unet(noised, timesteps, context).sample, context)

    def text_step(self, case: Case) -> Step:
        encoder = self.pipeline.text_encoder
        prompts = [list(dict.fromkeys(batch.prompts)) for batch in islice(case.batches(), 32)]
        ids = cycle([self.token_ids(self.pipeline.tokenizer, texts) for texts in prompts])

        def step() -> None:
            vectors: list[Tensor] = []  # what the table of tokens gave
            table = encoder.get_input_embeddings()
            handle = table.register_forward_hook(lambda _table, _ids, out: vectors.append(out.requires_grad_(True)))
            context = encoder(next(ids))[0]
            handle.remove()
            backward(context, vectors)

        return step

    def script_step(self, case: Case) -> Step:
        """A step of diffusers' examples/textual_inversion/textual_inversion.py, in our own words.

        The pictures go through the VAE every time, AdamW moves the whole table of tokens, and the old
        rows are copied back. Left out: it also reads the pictures from disk every time.
        """
        unet, encoder, scheduler = self.unet, self.trained, self.pipeline.scheduler
        encoder.gradient_checkpointing_enable() if case.checkpointing else encoder.gradient_checkpointing_disable()
        table = encoder.get_input_embeddings().weight.requires_grad_(True)
        optimizer = torch.optim.AdamW([table], lr=5e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        original, old = table.detach().clone(), torch.arange(len(table)) < len(self.pipeline.tokenizer)
        pixels = torch.rand(case.batch, 3, case.size, case.size) * 2 - 1
        batches = case.batches()
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

        def step() -> None:
            latents = self.sampled_latents(pixels.to(self.device, self.dtype))
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (case.batch,), device=self.device)
            with mixed:
                context = encoder(self.token_ids(self.trained_tokenizer, next(batches).prompts))[0]
            noised = scheduler.add_noise(latents, noise, timesteps)
            predicted = unet(noised, timesteps, context.to(self.dtype)).sample
            loss = F.mse_loss(predicted.float(), noise.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                table[old] = original[old]
            loss.item()  # for its progress bar

        return step

    @torch.no_grad()
    def sampled_latents(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
        return latents * self.vae.config.scaling_factor

    def token_ids(self, tokenizer, prompts: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        return tokenizer(prompts, **options).input_ids.to(self.device)


# Measuring ---------------------------------------------------------------------------------------


def milliseconds(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def take_turns(ways: Ways, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every step of each way; those of one round follow each other."""
    steps = {name: set_up() for name, set_up in ways.items()}
    rounds = [
        {name: milliseconds(step, device) for name, step in steps.items()}
        for _ in range(WARM_UP[device.type] + repeats)
    ]
    return {name: [taken[name] for taken in rounds[-repeats:]] for name in steps}


def peak_memory(set_up: Callable[[], Step], device: torch.device) -> float | None:
    """The most MiB above what is loaded, while a way is set up and does its first two steps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loaded, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    elif sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc keeps what is freed
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident
        loaded, peak = resident("VmRSS"), lambda: resident("VmHWM")
    else:
        return None
    step = set_up()
    step()
    step()
    return (peak() - loaded) / 2**20


def resident(key: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def quartiles(values: Sequence[float]) -> list[float]:
    """First, second (the median) and third."""
    return torch.tensor(values).double().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


def measure(case: Case, ways: Ways, repeats: int, device: torch.device) -> dict[str, Any]:
    """Times first: memory that PyTorch keeps from first calls then counts for none of the ways."""
    taken = take_turns(ways, repeats, device)
    memory = {name: peak_memory(set_up, device) for name, set_up in ways.items()}
    bare = [unet + text for unet, text in zip(taken[UNET], taken[TEXT], strict=True)]
    ratios = {"ours / (UNet + text)": quartiles([ours / b for ours, b in zip(taken[OURS], bare, strict=True)])}
    if THEIRS in ways:
        pairs = zip(taken[THEIRS], taken[OURS], strict=True)
        ratios["speed: diffusers' / ours"] = quartiles([slow / fast for slow, fast in pairs])
        if (ours := memory[OURS]) and (theirs := memory[THEIRS]):
            ratios["memory: ours / diffusers'"] = [ours / theirs]
    times = {name: quartiles(values) for name, values in taken.items()}
    return {**asdict(case), "milliseconds": times, "peak_mib": memory, "ratios": ratios}


# Reporting ---------------------------------------------------------------------------------------


def circumstances(args: argparse.Namespace) -> dict[str, str]:
    cuda = args.device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        "options": f"{args.dtype}{', channels last' * args.channels_last}{', compiled UNet' * args.compile}",
        "repeats": f"{args.repeats} repeats: median (quartiles), peak above the loaded weights",
    }


def table(about: dict[str, str], rows: list[dict[str, Any]]) -> str:
    ratios = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    columns = ["model", "pixels", "batch", "checkpointing", *WAYS, *ratios]
    lines = ["; ".join(about.values()), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [f"{row['model']}, {row['through']}", row["size"], row["batch"], "-+"[row["checkpointing"]]]
        for way in WAYS:
            mib = row["peak_mib"].get(way)
            cells.append(spread(row["milliseconds"].get(way), 1, " ms") + (f", {mib:.0f} MiB" if mib else ""))
        cells += [spread(row["ratios"].get(name), 3) for name in ratios]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float] | None, digits: int, unit: str = "") -> str:
    """The median, and the quartiles around it in brackets."""
    if not values:
        return ""
    numbers = [f"{value:.{digits}f}" for value in values]
    return f"{numbers[1]}{unit} ({numbers[0]}-{numbers[2]})" if len(numbers) == 3 else numbers[0] + unit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="SD1.5's full size with random weights")
    parser.add_argument("--through", nargs="+", choices=["comfyui", "diffusers"], help="both, where both can be")
    parser.add_argument("--size", type=int, nargs="+", help="pixels a side (64; with --full 256 and 512)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="pictures a step (1 2 4)")
    parser.add_argument("--repeats", type=int, help="steps to take the median of (30; with --full 5)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing as well")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--channels-last", action="store_true", help="memory format of UNet and VAE")
    parser.add_argument("--compile", action="store_true", help="the UNet by torch.compile")
    parser.add_argument("--json", type=Path, help="file for the results, written after every case")
    parser.add_argument("--markdown", type=Path, help="file for the table, written after every case")
    args = parser.parse_args()
    plain = args.device == "cpu" and args.dtype == "float32" and not (args.full or args.channels_last or args.compile)
    if not plain and "comfyui" in (args.through or []):
        parser.error("through ComfyUI the demo model is measured as it is: on the CPU, in float32")
    args.through = args.through or (["comfyui", "diffusers"] if plain else ["diffusers"])
    args.size = args.size or ([256, 512] if args.full else [64])
    args.repeats = args.repeats or (5 if args.full else 30)
    return args


def main() -> None:
    args = parse_arguments()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast of a pipeline
    torch.manual_seed(0)
    about, rows, name = circumstances(args), [], "SD1.5 size" if args.full else "demo model"
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base:
        for through in args.through:
            if through == "comfyui":
                import_comfyui(Path(base))
                side: Any = ThroughComfyUI(demo_graph())
            else:
                pipeline = full_size_pipeline() if args.full else pipeline_from_checkpoint(CHECKPOINT)
                side = ThroughDiffusers(pipeline, args)
            for checkpointing, size, batch in product([False, True][: 1 + args.checkpointing], args.size, args.batch):
                case = Case(name, through, size, batch, checkpointing)
                with side.ways(case) as ways:
                    rows.append(measure(case, ways, args.repeats, torch.device(args.device)))
                print(table(about, rows[-1:]).splitlines()[-1], flush=True)
                if args.json:
                    args.json.write_text(json.dumps({**about, "cases": rows}, indent=1) + "\n")
                if args.markdown:
                    args.markdown.write_text(table(about, rows))
    print(table(about, rows))


if __name__ == "__main__":
    main()
