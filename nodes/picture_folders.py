"""Which folders *Load Images* may read and change: a path is judged by its text before any file is touched."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import folder_paths

from ..textual_inversion import UserError
from ..textual_inversion.pictures import is_inside

VARIABLE = "TEXTUAL_INVERSION_FOLDERS"  # more folders, separated as in PATH
_NOT_IN_NAMES = re.compile(r'[<>:"|?*\x00-\x1f]')  # for folders that Windows can open too


def chosen_folder(folder: str, path: str) -> Path | None:
    """The folder that the widgets name, which may not exist if `path` is empty; None where neither names one.

    Raises UserError as `input_folder` and `other_folder` do.
    """
    if path.strip():
        return other_folder(path)
    return input_folder(folder) if folder.strip() else None


def roots() -> list[Path]:
    """The folders in and below which pictures may be read."""
    own = (folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory())
    more = [_plain(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]
    return [_normal(folder) for folder in (*own, *more)]


def input_roots() -> list[Path]:
    """The folder in and below which pictures may be changed."""
    return [_normal(folder_paths.get_input_directory())]


def input_folder(name: str) -> Path:
    """A folder inside ComfyUI's input folder by its relative path. It may not exist.

    Raises UserError if it, or the target of a link, is outside, or no folder can be called that.
    """
    (root,) = input_roots()
    folder = _normal(root / name)
    if not _is_below(folder, [root]):
        raise UserError(f"{name!r} is no folder inside ComfyUI's input folder: choose another one.")
    if _NOT_IN_NAMES.search(str(folder.relative_to(root))):
        raise UserError(f"No folder can be called {name!r}: use letters, digits, blanks, '-' and '_'.")
    return folder


def other_folder(path: str) -> Path:
    """An existing folder inside `roots`, by a full path as people paste it: in quotes, with ~, as file://.

    Raises UserError with the same words for what may not be read and what does not exist.
    """
    text = Path(_plain(path))
    if not text.is_absolute():
        raise UserError(f"{path!r} is not a full path: enter one, or use 'folder' for ComfyUI's input folder.")
    folder = _normal(text)
    if _is_below(folder, roots()):
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise UserError(f"{path!r} is a file: enter the folder that it is in.")
    raise UserError(
        f"There is no folder {path!r} that may be read: use one in ComfyUI's input, output or temp folder, or let the "
        f"owner of this server name it in the environment variable {VARIABLE}."
    )


def _normal(path: str | Path) -> Path:
    """A full path without `..`, by its text alone."""
    return Path(os.path.normpath(Path(path).absolute()))


def _is_below(folder: Path, allowed: list[Path]) -> bool:
    """First by the text alone, so that a share on another computer is never asked; then through links."""
    if not any(folder.is_relative_to(place) for root in allowed for place in (root, root.resolve())):
        return False
    try:
        folder.exists()  # says what a path cannot be
        return is_inside(folder, allowed)
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, links in a circle
        return False


def _plain(path: str) -> str:
    text = path.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    if text.lower().startswith("file:"):
        try:
            address = urlsplit(text)
        except ValueError:
            return text
        if address.netloc.lower() not in ("", "localhost"):
            return text
        text = url2pathname(address.path)
    return os.path.expanduser(text)  # noqa: PTH111  the text is no path yet
