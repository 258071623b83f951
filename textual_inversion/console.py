"""What the commands say, and where they write."""

import sys
from pathlib import Path

from . import formats
from .embedding import Embedding
from .formats import FormatName


def say(text: str) -> None:
    print(text.strip(), file=sys.stderr, flush=True)


def target(output: Path | None, name: str) -> tuple[Path, str]:
    """Folder and name of a new file: ``name`` where ``output`` is a folder or not given.

    Raises UserError for a name that ComfyUI's embedding:NAME could not have.
    """
    if output is None or output.is_dir():
        return output or Path(), formats.file_name(name)
    return output.parent, formats.file_name(output.name)


def print_files(files: list[Path], embedding: Embedding, format: FormatName) -> None:
    for path in files:
        print(path)
    if hint := formats.prompt_hint(embedding, format):
        say(hint)
