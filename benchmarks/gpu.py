"""What training takes on a card: every family's gradients, full-size models with random weights, a real server.

    make gpu                                        every part, 10 to 15 minutes
    python -m benchmarks.gpu --parts steps server   some
    python -m benchmarks.gpu --device cpu --small   a dry run: the same code on small models

Each part is a process of its own with a time limit; one that fails is told, and the others go on. Results go to
benchmarks/results/gpu/CARD.json, and as tables to CARD.md.

families   gradients of every family on the card against those on the CPU, in float32
steps      our step against the bare network and text encoders: milliseconds, memory, and what was estimated
memory     a step in too little memory is taken again with checkpointing, and learns the same
server     ComfyUI itself, with dynamic VRAM and without, on little memory and all on the card: the search for a word,
           100 steps and a preview of an SD1.5, an interrupt, resume, and a picture with the graph's own model after it
script     diffusers' training script on the same sizes (benchmarks/speed.py)
learn      a word from the demo's pictures with captions, in the precision that ComfyUI chooses there
"""

import argparse
import json
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dev.in_process import ROOT, import_comfyui, import_pack

from .full_size import SIZES
from .speed import milliseconds, spread

OUT = ROOT / "benchmarks/results/gpu"
PARTS = {"steps": 240, "memory": 60, "server": 400, "script": 120, "learn": 60, "families": 240}  # seconds at most
GIB = 2**30
WARM_UP, REPEATS = 3, 10
STEP_CASES = {"SD1": (1, 4, 8), "SDXL": (1, 4), "SD3.5 medium": (1,), "Flux.1 dev, fp8": (1,)}
SMALL_CASES = {"SD1": (1, 2), "SDXL": (2,)}
SERVERS = {  # a checkpoint, the precision of its weights, and ComfyUI's options
    "as it starts": ("SD1", "float16", ()),
    "as it starts, float32 checkpoint": ("SD1", "float32", ()),
    "as it starts, SDXL": ("SDXL", "float16", ()),
    "without dynamic VRAM": ("SD1", "float16", ("--disable-dynamic-vram",)),
    "little memory": ("SD1", "float16", ("--disable-dynamic-vram", "--lowvram")),
    "all on the card": ("SD1", "float16", ("--gpu-only",)),
}
PICTURES = ROOT / "demo/concepts/heart/train"

Found = Iterator[dict[str, Any]]


# Parts: each yields one dictionary a line of its table -----------------------------------------------


def families(args: argparse.Namespace) -> Found:
    from families import FAMILIES, build, gradients

    torch.backends.cudnn.allow_tf32 = False
    for family in FAMILIES[:2] if args.small else FAMILIES:
        if not chosen(family.name, args):
            continue
        graph = build(family)
        on_card = gradients(family, graph)[0]
        for patcher in (graph[0], graph[1].patcher):
            patcher.detach()
            patcher.load_device = patcher.offload_device = torch.device("cpu")
        on_cpu = gradients(family, graph)[0]
        apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(on_card, on_cpu, strict=True))
        yield {"family": family.name, "relative difference": apart, "within 1e-3": apart < 1e-3}


def steps(args: argparse.Namespace) -> Found:
    for name, batches in (SMALL_CASES if args.small else STEP_CASES).items():
        size = SIZES[name]
        with told(model=name) as not_made:
            graph = made(name, args)
            for rows in batches:
                with told(model=name, batch=rows) as failed:
                    yield measured(name, graph, 64 if args.small else size.pixels, rows)
                yield from failed
        yield from not_made


def memory(args: argparse.Namespace) -> Found:
    """The same steps with all the memory and with too little."""
    from textual_inversion.memory import step_bytes

    pixels = 64 if args.small else SIZES["SD1"].pixels
    graph = made("SD1", args)
    plain = learned(graph, pixels)
    yield {"memory": "all", "checkpointing": plain["checkpointing"], "loss": plain["loss"]}
    if args.device == "cpu":
        return
    ours, batch, tokens = example(graph, pixels, 4)
    with ours.training() as model:
        allocated = torch.cuda.memory_allocated()
        needed = step_bytes(model, tokens.embeddings, [batch], 4)
    torch.cuda.empty_cache()  # what PyTorch keeps from the steps before would be taken again unasked
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((allocated + 0.6 * needed) / total)
    short = learned(graph, pixels)
    same = abs(short["loss"] - plain["loss"]) < 1e-3 * plain["loss"]
    yield {"memory": "60% of a step", "checkpointing": short["checkpointing"], "loss": short["loss"], "same": same}


def server(args: argparse.Namespace) -> Found:
    servers = {"on the CPU": ("SD1", "float16", ("--cpu",))} if args.device == "cpu" else SERVERS
    for name, (model, weights, flags) in servers.items():
        if not chosen(name, args):
            continue
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder, told(server=name) as failed:
            path = Path(folder) / "random.safetensors"
            write_checkpoint(path, model, weights, args)
            yield {"server": name, **on_a_server(path, flags, 64 if args.small else SIZES[model].pixels)}
        yield from failed


def script(args: argparse.Namespace) -> Found:
    """As benchmarks/speed.py has it, in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "speed.json"
        command = [sys.executable, "-m", "benchmarks.speed", "--through", "diffusers", "--json", str(result)]
        command += ["--device", args.device, "--repeats", str(REPEATS)]
        command += ["--batch", "1"] if args.small else ["--full", "--size", "512", "--batch", "1", "4"]
        command += [] if args.device == "cpu" else ["--dtype", "bfloat16"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        for case in json.loads(result.read_text())["cases"]:
            ratios = {name: spread(values, 2) for name, values in case["ratios"].items()}
            yield {"pixels": case["size"], "batch": case["batch"], **ratios}


def learn(args: argparse.Namespace) -> Found:
    """As a cell of benchmarks/concepts.py."""
    from demo.measure import Bench, Concept

    from .concepts import Cell
    from .levels import Level
    from .recipes import RECIPES

    bench = Bench()
    concept = Concept.read("heart")
    result, *_ = Cell(bench, "ours", RECIPES["ours"], concept, seed=0, captions=True, level=Level()).run()
    found = {name: result[name] for name in ("identity", "looks", "obeys", "stopped", "agreement")}
    yield {
        "concept": "heart",
        "weights": str(bench.model.weights()[0].dtype),
        **found,
        "seconds": result["curve"][-1][1],
    }


def chosen(name: str, args: argparse.Namespace) -> bool:
    return not args.rows or any(part.lower() in name.lower() for part in args.rows)


@contextmanager
def told(**about: Any) -> Iterator[list[dict[str, Any]]]:
    """What fails inside is a line of the table, and the rest goes on."""
    failed: list[dict[str, Any]] = []
    try:
        yield failed
    except Exception as error:
        failed.append({**about, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


# What they are made of ---------------------------------------------------------------------------


def made(name: str, args: argparse.Namespace, weights: str | None = None) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE with random weights, in the precision that the family comes in, or in that of `weights`."""
    from families import NAMED, build

    size = SIZES[name]
    family = NAMED[size.family or name]
    if args.small:
        return build(family)
    whole = replace(family, unet={**family.unet, **size.unet}, encoders={})
    kinds = getattr(torch, weights or size.weights), None, getattr(torch, weights or size.encoder_weights)
    return build(whole, *kinds, draw_on=args.device)


def example(graph, pixels: int, rows: int):
    """A model, a batch of noise as pictures, the same every time, and a word to learn."""
    from textual_inversion import TrainConfig, initial_embedding
    from textual_inversion.adapters.comfyui import ComfyModel
    from textual_inversion.dataset import make_dataset, training_batches
    from textual_inversion.image_tokens import TrainedTokens

    ours = ComfyModel(*graph)
    latents: Any = ours._patcher.get_model_object("latent_format")
    side = pixels // latents.spacial_downscale_ratio
    shape = (latents.latent_channels, *[1] * (latents.latent_dimensions - 2), side, side)
    config = TrainConfig(batch_size=rows, per_image_tokens=0)
    noise = torch.Generator().manual_seed(0)
    made_up = [torch.rand(1, 64, 64, 3, generator=noise) for _ in range(4)]
    dataset = make_dataset(
        lambda images: [torch.randn(shape, generator=noise) for _ in images], made_up, [], [], config
    )
    with ours.training() as model, torch.no_grad():
        word = initial_embedding(model.vocabularies(), config.trigger, "toy", 1)
    batch = next(training_batches(dataset, config, torch.Generator().manual_seed(0)))
    return ours, batch, TrainedTokens(word.trainable())


def measured(name: str, graph, pixels: int, rows: int) -> dict[str, Any]:
    """Our gradients, and those of the network and the text encoders alone, in turns."""
    from textual_inversion.gradients import Share, compute_gradients
    from textual_inversion.memory import enable_checkpointing_if_needed, step_bytes

    ours, batch, tokens = example(graph, pixels, rows)
    with ours.training() as model:
        enable_checkpointing_if_needed(model, tokens.embeddings, [batch], rows)
        estimate = step_bytes(model, tokens.embeddings, [batch], rows) / GIB
        share = Share(tokens, [batch])
        ways = {
            "ours": lambda: compute_gradients(model, share),
            "network": bare_network(model, batch, tokens),
            "text encoders": bare_encoders(model, batch, tokens),
        }
        taken = [
            {way: milliseconds(step, model.device) for way, step in ways.items()} for _ in range(WARM_UP + REPEATS)
        ]
        taken = taken[WARM_UP:]
        found = {way: statistics.median(one[way] for one in taken) for way in ways}
        ratio = statistics.median(one["ours"] / (one["network"] + one["text encoders"]) for one in taken)
        peak = peak_gib(ways["ours"], model.device)
    return {
        "model": name,
        "pixels": pixels,
        "batch": rows,
        **{f"{way}, ms": value for way, value in found.items()},
        "ours / bare": ratio,
        "peak, GiB": peak,
        "estimated, GiB": estimate,
        "checkpointed": ("nothing", "text encoders", "everything")[ours._checkpointed],
    }


def bare_network(model, batch, tokens) -> Callable[[], Any]:
    """Forward and backward of the network, to all that depends on the prompts, with what it gets in our step."""
    network, seen = model._patcher.model.diffusion_model, []

    def look(_module, args, kwargs):
        seen.append((args, kwargs))

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    from textual_inversion.objective import batch_loss

    with torch.no_grad():
        batch_loss(model, tokens.embeddings, batch)
    handle.remove()
    (args, kwargs), *_ = seen  # prompts of unequal length take several passes: the first one stands for them
    x, timesteps, *rest = args
    leaves = []

    def leaf(value):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaves.append(value.detach().clone().requires_grad_(True))
        return leaves[-1]

    rest, kwargs = [leaf(value) for value in rest], {key: leaf(value) for key, value in kwargs.items()}

    def step() -> None:
        out = network(x, timesteps, *rest, **kwargs)
        torch.autograd.grad(out.float().square().mean(), leaves, allow_unused=True)

    return step


def bare_encoders(model, batch, tokens) -> Callable[[], Any]:
    """Forward and backward of the text encoders for the distinct prompts, tokenised before, all in one pass."""
    from textual_inversion.adapters.comfyui_encoding import moved
    from textual_inversion.adapters.comfyui_tokens import text_encoders, with_embeddings

    word = moved(tokens.embeddings, model.device)[0].trainable()
    clip = with_embeddings(model._clip, word)
    prompts = [clip.tokenize(prompt) for prompt in dict.fromkeys(batch.prompts)]
    encoders = text_encoders(clip)
    rows = {
        encoder.name: [[token for token, _ in section] for text in prompts for section in text[encoder.name]]
        for encoder in encoders
    }

    def step() -> None:
        for encoder in encoders:
            encoder.model.set_clip_options({"execution_device": model.device})
            by_length: dict[int, list] = {}
            for row in rows[encoder.name]:
                by_length.setdefault(len(row), []).append(row)
            outputs = [encoder.model.encode(group)[0] for group in by_length.values()]
            loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
            torch.autograd.grad(loss, [word.vectors[encoder.key]])

    return step


def peak_gib(step: Callable[[], Any], device: torch.device) -> float | None:
    """The most on the card beside what is loaded, during one step."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def learned(graph, pixels: int) -> dict[str, Any]:
    """Three gradients of a batch of four."""
    from textual_inversion.gradients import Share, compute_gradients

    ours, batch, tokens = example(graph, pixels, 4)
    with ours.training() as model:
        share = Share(tokens, [batch])
        (losses,) = zip(*(compute_gradients(model, share) for _ in range(3)), strict=True)
    return {"checkpointing": ours._checkpointed > 0, "loss": losses[-1]}


def write_checkpoint(path: Path, name: str, weights: str, args: argparse.Namespace) -> None:
    """Random weights in the layout that everybody's checkpoints have."""
    if args.small:
        from small_models import write_checkpoint

        write_checkpoint("SmallSD1", path)
        return
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from small_models import randomise

    config: dict[str, Any] = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    config |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    autoencoder = AutoencoderKL(ddconfig=config, embed_dim=4)
    randomise(autoencoder)
    model, clip, _ = made(name, args, weights)
    vae = comfy.sd.VAE(sd=autoencoder.to(getattr(torch, weights)).state_dict())
    with torch.inference_mode():  # as ComfyUI's nodes are run: the weights were made so
        comfy.sd.save_checkpoint(str(path), model, clip, vae)


def on_a_server(checkpoint: Path, flags: tuple[str, ...], side: int) -> dict[str, Any]:
    from dev.comfyui_server import ComfyServer  # its packages are missing on a machine without ComfyUI's

    interrupted_at = 20
    packs = {"ti_test_pack": ROOT / "tests/comfyui_pack"}
    with ComfyServer(packs=packs, checkpoints=[checkpoint], options=flags) as comfyui:
        shutil.copytree(PICTURES, comfyui.base / "input/heart")
        graph = workflow(checkpoint.name, side)
        for part in graph.values():
            part["inputs"] = defaults(comfyui, part["class_type"]) | part["inputs"]
        began, nodes = time.perf_counter(), []

        def note(event: dict[str, Any]) -> None:
            if event["type"] == "executing":
                nodes.append((event["data"]["node"], time.perf_counter()))

        whole = comfyui.run(graph, on_event=note)
        seconds = time.perf_counter() - began
        training = next(end - start for (node, start), (_, end) in pairwise(nodes) if node == "train")
        report = whole.history["outputs"]["report"]["text"][0]
        graph["train"]["inputs"]["seed"] = 1

        def interrupt(event: dict[str, Any]) -> None:
            data = event["data"]
            # Of training: the search for a word and previews count to less than twice that. Not every step is told.
            if event["type"] == "progress" and data["value"] >= interrupted_at and data["max"] > 2 * interrupted_at:
                comfyui.interrupt()

        comfyui.run(graph, on_event=interrupt, check=False)
        again = comfyui.run(graph)
        resumed = "Resumed" in json.dumps(comfyui.training_runs())
        drew = bool(again.history["outputs"]["picture"]["images"])
    ended = next(line for line in report.splitlines() if " steps of " in line)
    return {
        "seconds, Train": training,
        "seconds, all": seconds,
        "report": ended,
        "resumed": resumed,
        "drew with the graph's model": drew,
    }


def defaults(comfyui: Any, node: str) -> dict[str, Any]:
    inputs = comfyui.object_info(node)[node]["input"]
    found = {**inputs.get("required", {}), **inputs.get("optional", {})}
    return {name: kind[1]["default"] for name, kind in found.items() if len(kind) > 1 and "default" in kind[1]}


def workflow(checkpoint: str, side: int) -> dict[str, Any]:
    """Pictures, search for a word, 100 steps, one preview; then a picture with the word."""

    def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    train = {"trigger": "S*", "initializer": "", "steps": 100, "size": side, "seed": 0, "preview_every": 100}
    sampler = {"seed": 7, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "images": ["images", 0]}
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "images": node("TI_LoadImages", folder="heart", crop="square", size=side),
        "train": node("TI_Train", **wires, **train),
        "report": node("PreviewAny", source=["train", 3]),
        "apply": node("TI_ApplyEmbedding", clip=["load", 1], embedding=["train", 0], trigger="", strength=1.0),
        "positive": node("CLIPTextEncode", clip=["apply", 0], text="a photo of S*"),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptyLatentImage", width=side, height=side, batch_size=1),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            **sampler,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix="picture"),
    }


# Reporting ---------------------------------------------------------------------------------------


def card_name(device: str) -> str:
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


def tables(about: dict[str, str], results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"# {about['card']}", "", "; ".join(about.values()) + ".", ""]
    for part, rows in results.items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += [f"## {part}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(shown(row.get(name)) for name in columns)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def run_part(name: str, args: argparse.Namespace) -> None:
    """In this process; a line of JSON for each row."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a server ends with it
    sys.path.append(str(ROOT / "tests"))
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base:
        import_pack()
        import_comfyui(Path(base), args.device)
        import comfyui_pack  # noqa: F401  lets ComfyUI recognise the small checkpoint

        for row in globals()[name](args):
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, to try the code")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="families and servers with it in their name")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run_part(args.only, args)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no card here; a dry run: --device cpu --small")
    about = {"card": card_name(args.device), "date": datetime.now(timezone.utc).date().isoformat()}
    about |= {"versions": f"torch {torch.__version__}, Python {platform.python_version()}"}
    results: dict[str, list[dict[str, Any]]] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", part, "--device", args.device]
        command += ["--rows", *args.rows] if args.rows else []
        began = time.perf_counter()
        with subprocess.Popen(
            [*command, *["--small"][: args.small]], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                lines, _ = process.communicate(timeout=PARTS[part])
            except subprocess.TimeoutExpired:
                process.terminate()
                lines, _ = process.communicate()
        rows = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
        if process.returncode:
            rows.append({"failed": f"ended with {process.returncode} after {time.perf_counter() - began:.0f} s"})
        results[part] = rows
        name = about["card"].replace(" ", "-").replace(",", "")
        (args.out / f"{name}.json").write_text(json.dumps({**about, **results}, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(tables(about, results))
        print(tables(about, {part: rows}), flush=True)


if __name__ == "__main__":
    main()
