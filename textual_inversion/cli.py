"""The engine on the command line, with a diffusers pipeline: ``python -m textual_inversion --help``."""

import io
import logging
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from PIL import Image

from . import formats, inspection, processes
from .config import TrainConfig
from .console import is_folder, print_files, say, target, typed_path
from .dataset import GRID
from .devices import fastest_dtype, usable_device
from .embedding import Embedding
from .errors import ProcessEnded, TrainingError, UserError, listed
from .formats import FormatName
from .picture_files import decoded
from .pictures import to_pillow
from .prompts import has_trigger, place_trigger, plain
from .train_command import Existing, Order, train_order

if TYPE_CHECKING:
    from .adapters.diffusers_pipeline import DiffusersModel

app = tyro.extras.SubcommandApp()
TriggerOption = Annotated[str, tyro.conf.arg(aliases=("--word",))]
TypedPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: typed_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
MOST_SEED = 2**64 - 1
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

    def load(self, gradient_checkpointing: bool = False, quiet: bool = False) -> "DiffusersModel":
        # Takes seconds, and only drawing and training need it.
        from .adapters.diffusers_pipeline import DiffusersModel, load_quietly

        if quiet:
            load_quietly()
        device = usable_device(processes.own_card(self.device))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
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
    output: TypedPath | None = None,
    format: FormatName = "comfyui",
    existing: Existing = "skip",
) -> None:
    """Train an embedding on a folder of pictures, or one for each folder of a library.

    Captions are read from NAME.txt beside NAME.png. Training ends by itself when there is nothing more to learn.
    Ctrl-C stops after the step that runs and keeps the best vectors so far. A folder of folders is a library: each
    folder is a concept and names its word, <cat> for cat/; captions may name the words of others. After a kill or
    Ctrl-C the same command goes on where it was. torchrun and accelerate launch start it in many processes: they
    share out the concepts, or where there are fewer, the pictures of every batch.

    Example: python -m textual_inversion train --model sd15/ --images cat/ --token "<my-cat>" --init cat

    Example: torchrun --nproc-per-node 8 -m textual_inversion train --model sd15/ --images library/ --output words/

    Args:
        images: Folder of 3 to 5 pictures, or of such folders.
        output: The file to write, or a folder, which is there or ends in a slash; the format decides the suffix.
            Default: the trigger word. An existing file is never overwritten: the next one is called NAME-2. Of a
            library: the folder of the files, by default LIBRARY-embeddings.
        format: The tool that will read the file. comfyui also works for A1111, Forge, kohya and InvokeAI.
        existing: Of a library: skip concepts whose file is there already, or learn them again and replace it.
    """
    _check_text(settings.trigger, settings.initializer, settings.template)
    with processes.joined() as together:
        load = partial(pipeline.load, settings.gradient_checkpointing, quiet=together.rank > 0)
        order = Order(load, pipeline.model.name, images, settings, output, format, existing)
        code = train_order(order, together)
    if together.count > 1:
        processes.leave(code)
    if code:
        sys.exit(code)


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
    output: TypedPath | None = None,
    partner: Path | None = None,
    trigger: TriggerOption = "",
    picture: Path | None = None,
) -> None:
    """Write an embedding in the format of another tool.

    Args:
        file: safetensors, pt, bin, or a PNG with an embedding.
        to: The tool that will read it.
        output: The new file, or a folder, which is there or ends in a slash; the format decides the suffix.
            Default: the name of the old one, and the words themselves where it contains several.
        partner: The second of two files that diffusers wrote for SDXL.
        trigger: Which embedding to take from a file that contains several. Default: all.
        picture: The picture of a PNG card.
    """
    found = _read(file, partner, trigger)
    several = len(found) > 1
    if several and output and not is_folder(output):
        words = listed(embedding.trigger for embedding in found)
        raise UserError(f"{file.name} contains {words}: choose one with --word, or a folder, NAME/, as --output.")
    shown = _picture(picture).convert("RGB") if picture else None
    for embedding in found:
        name, place = (embedding.trigger, output or file.parent) if several else (file.name, output or file)
        try:
            new = target(place, name)
        except UserError as error:
            problem, one = str(error).rpartition(": ")[0], f"--word {name} and " if several else ""
            raise UserError(f"{problem}: choose another name with {one}--output.") from error
        try:
            files = formats.write_new(embedding, *new, to, shown)
        except OSError as error:
            problem = error.strerror
            raise UserError(f"{new[0]} cannot be written to ({problem}): choose another --output.") from error
        print_files(files, embedding, to)


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
    _check_text(prompt, trigger)
    for name, value, least in (("steps", steps, 1), ("width", width, GRID), ("height", height, GRID)):
        if value < least:
            raise UserError(f"{name} is {value}; choose {least} or more.")
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"seed is {seed}; choose a value from 0 to {MOST_SEED}.")
    learned = formats.read(embedding, trigger)
    text = place_trigger(prompt, learned.trigger)
    if not has_trigger(text, learned.trigger):
        raise UserError(f"The prompt {prompt!r} does not contain {{}} or {learned.trigger!r}: add one of them.")
    _check_picture_name(output)
    model = pipeline.load()
    model.check_prompts([text], learned)
    shape = (0, height // GRID, width // GRID)  # channels do not matter: the pipeline knows them
    sampling = (shape, seed, steps, cfg)
    drawn = [model.generate(plain(text), None, *sampling)[0], model.generate(text, learned, *sampling)[0]]
    to_pillow(torch.cat(drawn, dim=1)).save(output)
    print(output)


def _check_picture_name(output: Path) -> None:
    """Makes the folder. Raises UserError where a picture could not be written there, or not in this format."""
    form = Image.registered_extensions().get(output.suffix.lower())
    try:
        Image.new("RGB", (GRID, GRID)).save(io.BytesIO(), form or "")
    except (OSError, ValueError, KeyError) as error:
        name = output.name
        raise UserError(f"{name!r} is not the name of a picture: choose an --output that ends in .png.") from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = error.strerror
        raise UserError(f"{output.parent} cannot be written to ({problem}): choose another --output.") from error


def _picture(file: Path) -> Image.Image:
    """Upright, as RGBA. Raises UserError."""
    if not file.is_file():
        raise UserError(f"There is no picture {file}: choose another --picture.")
    try:
        return decoded(file)
    except UserError as error:
        raise UserError(f"{file.name} cannot be the picture of a card: {error}.") from error


def _check_text(*texts: str) -> None:
    """Raises UserError for bytes on the command line that are no characters."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{text!r} has bytes that are no text: type it again in UTF-8.") from error


def _read(file: Path, partner: Path | None, trigger: str) -> list[Embedding]:
    """The embedding that is asked for, or all of the file."""
    if partner:
        return [formats.read_pair(file, partner)]
    return [formats.read(file, trigger)] if trigger else formats.read_all(file)


def main() -> None:
    """Exit codes: 0 done, 1 an input or model that cannot be used, 2 a wrong command line, 130 interrupted."""
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    for stream in (sys.stdout, sys.stderr):  # a word may have letters that a terminal has not
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app.cli(prog="textual_inversion", description="Teach an image model a new word from a few pictures.")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ProcessEnded as error:
        say(f"error: {error} What was saved is there: run the same command again to go on.")
        sys.exit(1)
    except (UserError, TrainingError, OSError) as error:
        say(f"error: {inspection.printable(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            say("Interrupted.")
        sys.exit(INTERRUPTED)
