"""The same engine from a shell, on a diffusers pipeline: ``python -m textual_inversion --help``."""

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from . import __version__, formats, inspection
from .adapters.diffusers_pipeline import DiffusersModel
from .config import TrainConfig
from .dataset import GRID, make_dataset
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped, UserError
from .formats import FormatName
from .initializer import with_initializer
from .pictures import load_folder, to_pillow
from .prompts import check_trigger, place_word
from .report import report
from .training import Step, train
from .vocabulary import initial_embedding

app = tyro.extras.SubcommandApp()
INTERRUPTED = 130  # what shells call a program that Ctrl-C ended


@dataclass(frozen=True)
class Pipeline:
    """The diffusion model, read from disk; nothing is downloaded."""

    model: Path
    """A diffusers folder, or one .safetensors checkpoint."""

    config: Path | None = None
    """For a checkpoint whose family is not in the local cache: a diffusers folder with its configuration and
    tokenizers; the weights in it are not needed."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model. The vectors are always float32."""

    def load(self, gradient_checkpointing: bool = False) -> DiffusersModel:
        return DiffusersModel.load(
            self.model, self.config, getattr(torch, self.dtype), self.device, gradient_checkpointing
        )


@dataclass(frozen=True)
class Settings(TrainConfig):
    """How to learn."""

    trigger: Annotated[str, tyro.conf.arg(aliases=("--token",))] = TrainConfig.trigger
    initializer: Annotated[str, tyro.conf.arg(aliases=("--init",))] = TrainConfig.initializer


@app.command(name="train")
def train_command(
    pipeline: tyro.conf.OmitArgPrefixes[Pipeline],
    images: Path,
    settings: tyro.conf.OmitArgPrefixes[Settings],
    output: Path | None = None,
    format: FormatName = "comfyui",
) -> None:
    """Learn a new word from a folder of pictures.

    Captions are read from NAME.txt beside NAME.png. The vectors with the lowest loss on fixed noise are kept;
    Ctrl-C keeps the best so far.

    Example: python -m textual_inversion train --model sd15/ --images cat/ --token "<my-cat>" --init cat

    Args:
        images: Folder of 3 to 5 pictures.
        output: Name of the file to write; its ending follows the format. Default: the trigger word.
            An existing file is never replaced: the next one is called NAME-2.
        format: Who is to read the file. comfyui is also for A1111, Forge, kohya and InvokeAI.
    """
    check_trigger(settings.trigger)
    folder, name = (output.parent, output.stem) if output else (Path(), settings.trigger)
    target = formats.free_path(folder, formats.file_name(name), formats.FORMATS[format].suffix)
    pictures, masks, captions = load_folder(images, 0)
    model = pipeline.load(settings.gradient_checkpointing)
    dataset = make_dataset(model.encode_images, pictures, masks, captions, settings)
    config = with_initializer(model, dataset, settings)
    start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)

    steps = train(model, start.trainable(), dataset, config)
    step = next(steps)
    ended = ""
    with tqdm(total=config.steps, unit="step", desc=config.trigger) as bar:
        try:
            for step in steps:
                bar.update()
                bar.set_postfix_str(f"fixed loss {step.best_loss:.4f} at step {step.best_number}")
        except TrainingStopped as error:
            ended = str(error)
        except KeyboardInterrupt:
            ended = f"Interrupted at step {step.number}."
    for path in formats.write(_learned(step, config, pipeline), target, format):
        print(path)
    _say(f"{report(model, dataset, config, start, step, repr(config.initializer), ended)}")
    if ended.startswith("Interrupted"):
        sys.exit(INTERRUPTED)


def _learned(step: Step, settings: TrainConfig, pipeline: Pipeline) -> Embedding:
    metadata = {
        "base_model": pipeline.model.name,
        "steps": str(step.best_number),
        "seed": str(settings.seed),
        "settings": json.dumps(asdict(settings)),
        "version": __version__,
    }
    return Embedding(step.best.trigger, step.best.vectors, metadata)


@app.command
def inspect(file: tyro.conf.Positional[Path], partner: Path | None = None, word: str = "") -> None:
    """Say what is in an embedding file, whatever tool wrote it.

    Args:
        file: safetensors, pt, bin, or a PNG with an embedding.
        partner: The other of two files that diffusers wrote for SDXL.
        word: Which word to take from a file that bundles several.
    """
    embedding = _read(file, partner, word)
    print(inspection.describe(embedding, inspection.inspect(embedding, {})))


@app.command
def convert(
    file: tyro.conf.Positional[Path],
    to: FormatName,
    output: Path | None = None,
    partner: Path | None = None,
    word: str = "",
    picture: Path | None = None,
) -> None:
    """Write an embedding in the format of another tool.

    Args:
        file: safetensors, pt, bin, or a PNG with an embedding.
        to: Who is to read it.
        output: Name of the new file; its ending follows the format. Default: the name of the old one.
        partner: The other of two files that diffusers wrote for SDXL.
        word: Which word to take from a file that bundles several.
        picture: What a PNG card shows.
    """
    embedding = _read(file, partner, word)
    target = output or file
    path = formats.free_path(target.parent, target.stem, formats.FORMATS[to].suffix)
    shown = Image.open(picture).convert("RGB") if picture else None
    for written in formats.write(embedding, path, to, shown):
        print(written)


@app.command
def generate(
    pipeline: tyro.conf.OmitArgPrefixes[Pipeline],
    embedding: Path,
    prompt: str = "a photo of {}",
    output: Path = Path("with_and_without.png"),
    width: int = 512,
    height: int = 512,
    seed: int = 0,
    steps: int = 25,
    cfg: float = 7.0,
) -> None:
    """Draw a prompt without and with the learned word, side by side.

    Args:
        embedding: The file of the word.
        prompt: {} or the trigger word is where the word goes. Without it, the model reads the trigger as plain text.
        output: The picture to write.
        width: Pixels of each picture.
        height: Pixels of each picture.
        seed: The same noise for both.
        steps: Sampling steps.
        cfg: Guidance scale.
    """
    word, model = formats.read(embedding), pipeline.load()
    text = place_word(prompt, word.trigger)
    shape = (0, height // GRID, width // GRID)  # the pipeline knows its channels
    drawn = [model.generate(text, known, shape, seed, steps, cfg)[0] for known in (None, word)]
    to_pillow(torch.cat(drawn, dim=1)).save(output)
    print(output)


def _read(file: Path, partner: Path | None, word: str) -> Embedding:
    return formats.read_pair(file, partner) if partner else formats.read(file, word)


def _say(text: str) -> None:
    print(text.strip(), file=sys.stderr)


def main() -> None:
    """Exit codes: 0 done, 1 an input or a model that cannot be used, 2 a wrong command line, 130 interrupted."""
    try:
        app.cli(prog="textual_inversion", description="Teach an image model a new word from a few pictures.")
    except (UserError, TrainingError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            _say("Interrupted.")
        sys.exit(INTERRUPTED)
