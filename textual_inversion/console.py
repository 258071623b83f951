"""What the commands say, and where they write."""

import os
import sys
from pathlib import Path

from . import formats
from .embedding import Embedding
from .formats import FormatName


def say(text: str) -> None:
    print(text.strip(), file=sys.stderr, flush=True)


class Folder(type(Path())):
    """A path that was written with a slash at its end, which ``Path`` forgets."""


def typed_path(text: str) -> Path:
    return Folder(text) if text.endswith(("/", os.sep)) else Path(text)


def is_folder(output: Path) -> bool:
    """Whether files go into ``output``, which may be a folder that is yet to be made."""
    return output.is_dir() or isinstance(output, Folder)


def target(output: Path | None, name: str) -> tuple[Path, str]:
    """Folder and name of a new file: ``name`` where ``output`` is a folder or not given.

    Raises UserError for a name that ComfyUI's embedding:NAME could not have.
    """
    if output is None or is_folder(output):
        return output or Path(), formats.file_name(name)
    return output.parent, formats.file_name(output.name)


def print_files(files: list[Path], embedding: Embedding, format: FormatName) -> None:
    for path in files:
        print(path)
    if hint := formats.prompt_hint(embedding, format):
        say(hint)
