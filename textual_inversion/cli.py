"""The engine on the command line, with a diffusers pipeline: ``python -m textual_inversion --help``."""

import logging
import os
import signal
import sys
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from . import formats, inspection
from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import GRID, Dataset, make_dataset
from .devices import fastest_dtype, usable_device
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped, UserError, listed
from .formats import FormatName
from .initializer import with_initializer
from .optimizers import check_settings
from .pictures import folder_files, load_folder, to_pillow
from .prompts import check_trigger, place_trigger
from .report import learned_embedding, more_steps, report
from .training import Step, check_prompts, earliest_end, train
from .vocabulary import initial_embedding

if TYPE_CHECKING:
    from .adapters.diffusers_pipeline import DiffusersModel

app = tyro.extras.SubcommandApp()
TriggerOption = Annotated[str, tyro.conf.arg(aliases=("--word",))]
INTERRUPTED = 128 + signal.SIGINT  # exit code of programs that Ctrl-C ends


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

    dtype: Literal["automatic", "float32", "bfloat16", "float16"] = "automatic"
    """Precision of the model; the vectors are always float32. automatic: bfloat16 on a card that computes in it,
    float16 on an older one, float32 elsewhere."""

    def load(self, gradient_checkpointing: bool = False) -> "DiffusersModel":
        from .adapters.diffusers_pipeline import DiffusersModel  # seconds, and only drawing and training need it

        device = usable_device(self.device)
        dtype = fastest_dtype(device) if self.dtype == "automatic" else getattr(torch, self.dtype)
        return DiffusersModel.load(self.model, self.config, dtype, device, gradient_checkpointing)


@dataclass(frozen=True)
class Settings(TrainConfig):
    """How to train."""

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
    """Train an embedding on a folder of pictures.

    Captions are read from NAME.txt beside NAME.png. Training ends by itself when there is nothing more to learn.
    Ctrl-C stops after the step that runs and keeps the best vectors so far.

    Example: python -m textual_inversion train --model sd15/ --images cat/ --token "<my-cat>" --init cat

    Args:
        images: Folder of 3 to 5 pictures.
        output: The file to write, or a folder that is there; the format decides the suffix. Default: the trigger
            word. An existing file is never overwritten: the next one is called NAME-2.
        format: The tool that will read the file. comfyui also works for A1111, Forge, kohya and InvokeAI.
    """
    check_trigger(settings.trigger)
    check_settings(settings)
    folder, name = _target(output, settings.trigger)
    folder_files(images)  # what is wrong with the folder is told before the model is loaded
    model = pipeline.load(settings.gradient_checkpointing)
    pictures, masks, captions, left_out = load_folder(images, 0, enough=settings.size or model.native_size)
    for file in left_out:
        _say(f"Left out {file.name}: {file.reason}.")
    dataset = make_dataset(model.encode_images, pictures, masks, captions, settings, model.native_size)
    with model.training() as trainable:
        start = initial_embedding(trainable.vocabularies(), settings.trigger, settings.initializer, settings.vectors)
        check_prompts(trainable, start, dataset, settings)
        _check_writable(start, folder, name, format)
        config = _with_initializer(trainable, dataset, settings)
        start = initial_embedding(trainable.vocabularies(), config.trigger, config.initializer, config.vectors)
        with StopSignals() as stop:
            step, ended = _follow(train(trainable, start.trainable(), dataset, config), config, stop)
        learned = learned_embedding(step, config, pipeline.model.name)
        _print_files(_keep(learned, folder, name, format), learned, format)
        _say(report(trainable, dataset, config, start, step, repr(config.initializer), ended))
    if stop.code:
        sys.exit(stop.code)


def _check_writable(start: Embedding, folder: Path, name: str, format: FormatName) -> None:
    """Writes the initial vectors in ``folder`` and removes them: a format or a folder that fails does so now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as temporary:
            formats.write_new(start, Path(temporary), name, format)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --output.") from error


def _keep(embedding: Embedding, folder: Path, name: str, format: FormatName) -> list[Path]:
    """Writes the result to ``folder``, or where that fails now to the next one that takes it."""
    folders = [folder, Path(), Path(gettempdir())]
    for number, place in enumerate(folders, 1):
        try:
            return formats.write_new(embedding, place, name, format)
        except OSError as error:
            _say(f"{place.resolve()} cannot be written to ({error.strerror}).")
            if number == len(folders):
                raise
    raise AssertionError("the last folder returns or raises")


def _with_initializer(model: TrainableModel, dataset: Dataset, settings: TrainConfig) -> TrainConfig:
    if settings.initializer:
        return settings
    with tqdm(desc="looking for a word to start from") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return with_initializer(model, dataset, settings, show)


class StopSignals:
    """Ctrl-C and SIGTERM end training after the step that runs; the same once more ends the program."""

    def __init__(self) -> None:
        self.code = 0
        """Exit code of a program that the signal ends; 0 while none came."""

    def __enter__(self) -> "StopSignals":
        # One that is ignored, as Ctrl-C is in the background of a shell script, stays so.
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._stop) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        _say("Ending after this step.")
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _follow(steps: Generator[Step, bool | None], config: TrainConfig, stop: StopSignals) -> tuple[Step, str]:
    """The last good step, and what ended training where somebody or an error did."""
    step = next(steps)
    try:
        with tqdm(total=config.steps, unit="step", desc=config.trigger) as bar:
            for step in steps:
                bar.total = max(step.number, earliest_end(step.progress, config))
                bar.update()
                bar.set_postfix_str(f"fixed loss {step.best_loss:.4f} at step {step.best_step}")
                if stop.code:
                    step = steps.send(True)
                    return step, f"Interrupted at step {step.number}. {more_steps(step.progress, config)}"
    except TrainingStopped as error:
        return step, str(error)
    except KeyboardInterrupt:  # the second one
        return step, f"Interrupted in step {step.number + 1}."
    return step, ""


@app.command
def inspect(file: tyro.conf.Positional[Path], partner: Path | None = None, trigger: TriggerOption = "") -> None:
    """Show what is in an embedding file, whatever tool wrote it.

    Args:
        file: safetensors, pt, bin, or a PNG with an embedding.
        partner: The second of two files that diffusers wrote for SDXL.
        trigger: Which embedding to show of a file that contains several. Default: all.
    """
    found = _read(file, partner, trigger)
    print("\n\n".join(inspection.describe(embedding, inspection.inspect(embedding, {})) for embedding in found))


@app.command
def convert(
    file: tyro.conf.Positional[Path],
    to: FormatName,
    output: Path | None = None,
    partner: Path | None = None,
    trigger: TriggerOption = "",
    picture: Path | None = None,
) -> None:
    """Write an embedding in the format of another tool.

    Args:
        file: safetensors, pt, bin, or a PNG with an embedding.
        to: The tool that will read it.
        output: The new file, or a folder; the format decides the suffix. Default: the name of the old one, and the
            words themselves where it contains several.
        partner: The second of two files that diffusers wrote for SDXL.
        trigger: Which embedding to take from a file that contains several. Default: all.
        picture: The picture of a PNG card.
    """
    found = _read(file, partner, trigger)
    several = len(found) > 1
    if several and output and not output.is_dir():
        words = listed(embedding.trigger for embedding in found)
        raise UserError(f"{file.name} contains {words}: choose one with --word, or a folder that is there as --output.")
    shown = Image.open(picture).convert("RGB") if picture else None
    for embedding in found:
        target = _target(output or file.parent, embedding.trigger) if several else _target(output or file, file.name)
        _print_files(formats.write_new(embedding, *target, to, shown), embedding, to)


@app.command
def generate(
    pipeline: tyro.conf.OmitArgPrefixes[Pipeline],
    embedding: Path,
    trigger: TriggerOption = "",
    prompt: str = "a photo of {}",
    output: Path = Path("with_and_without.png"),
    width: int = 512,
    height: int = 512,
    seed: int = 0,
    steps: int = 25,
    cfg: float = 7.0,
) -> None:
    """Draw a prompt without and with an embedding, side by side.

    Args:
        embedding: The embedding file.
        trigger: Which embedding to draw with, if the file contains several.
        prompt: The prompt, with {} or the trigger word. Without the embedding the trigger is ordinary text.
        output: The picture to write.
        width: Width of each picture in pixels.
        height: Height of each picture in pixels.
        seed: Seed of the noise, the same for both.
        steps: Sampling steps.
        cfg: Guidance scale.
    """
    learned, model = formats.read(embedding, trigger), pipeline.load()
    text = place_trigger(prompt, learned.trigger)
    shape = (0, height // GRID, width // GRID)  # channels do not matter: the pipeline knows them
    drawn = [model.generate(text, known, shape, seed, steps, cfg)[0] for known in (None, learned)]
    to_pillow(torch.cat(drawn, dim=1)).save(output)
    print(output)


def _target(output: Path | None, name: str) -> tuple[Path, str]:
    """Folder and name of a new file: ``name`` where ``output`` is a folder or not given.

    Raises UserError for a name that ComfyUI's embedding:NAME could not have.
    """
    if output is None or output.is_dir():
        return output or Path(), formats.file_name(name)
    return output.parent, formats.file_name(output.name)


def _print_files(files: list[Path], embedding: Embedding, format: FormatName) -> None:
    for path in files:
        print(path)
    if hint := formats.prompt_hint(embedding, format):
        _say(hint)


def _read(file: Path, partner: Path | None, trigger: str) -> list[Embedding]:
    """The embedding that is asked for, or all of the file."""
    if partner:
        return [formats.read_pair(file, partner)]
    return [formats.read(file, trigger)] if trigger else formats.read_all(file)


def _say(text: str) -> None:
    print(text.strip(), file=sys.stderr)


def main() -> None:
    """Exit codes: 0 done, 1 an input or model that cannot be used, 2 a wrong command line, 130 interrupted."""
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    try:
        app.cli(prog="textual_inversion", description="Teach an image model a new word from a few pictures.")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, TrainingError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            _say("Interrupted.")
        sys.exit(INTERRUPTED)
