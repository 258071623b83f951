"""A folder of pictures, or of folders with pictures: one for each concept, which gives it its trigger word."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import UserError
from .formats import file_name
from .picture_files import picture_info
from .pictures import LeftOut, Pictures, folder_files, is_inside, load_folder
from .prompts import check_trigger, usable_trigger

BESIDE_PICTURES = "it is a folder beside pictures: only these are read"  # why it is left out
BESIDE_FOLDERS = "it is no picture of a concept: put pictures into the folders"


class Loaded(NamedTuple):
    """Pictures, and the trigger word of the concept that each of them shows."""

    pictures: Pictures
    triggers: list[str]


def load_concepts(folder: Path, size: int, square: bool = False, roots: Sequence[Path] = (), enough: int = 0) -> Loaded:
    """The pictures in ``folder``, or where there are none those in the folders inside it.

    The other parameters are those of ``load_folder``. A folder without pictures, or whose name makes no trigger word
    or that of another one, is left out; so are folders beside pictures. Raises UserError when no picture is left.
    """
    inside = concepts_inside(folder, roots)
    if not inside:
        loaded = load_folder(folder, size, square, roots, enough)
        loaded.left_out.extend(LeftOut(f"{one.name}/", BESIDE_PICTURES) for one in folders_inside(folder, roots))
        return Loaded(loaded, [trigger_of(folder)] * len(loaded.images))
    images, masks, captions, triggers = [], [], [], []
    left_out = [LeftOut(file.name, BESIDE_FOLDERS) for file in folder_files(folder, roots).pictures]
    known: dict[str, str] = {}
    for one in inside:
        try:
            check_trigger(word := trigger_of(one))
            if other := known.get(file_name(word).casefold()):
                raise UserError(f"its name makes the same word as that of {other!r}: rename it")
            found = load_folder(one, size, square, roots, enough)
        except UserError as error:
            left_out.append(LeftOut(f"{one.name}/", str(error)))
            continue
        known[file_name(word).casefold()] = one.name
        images += found.images
        masks += found.masks
        captions += found.captions
        triggers += [word] * len(found.images)
        left_out += [LeftOut(f"{one.name}/{file.name}", file.reason) for file in found.left_out]
    if not images:
        raise UserError(
            f"There are no pictures in {folder.name!r}: none of the {len(inside)} folders inside can be used, the "
            f"first because {left_out[0].reason}"
        )
    return Loaded(Pictures(images, masks, captions, left_out), triggers)


def concepts_inside(folder: Path, roots: Sequence[Path] = ()) -> list[Path]:
    """The folders in ``folder`` where each is a concept of its own, which they are not beside pictures.

    Raises UserError where the folder cannot be listed.
    """
    files, inside = folder_files(folder, roots).pictures, folders_inside(folder, roots)
    return [] if inside and any(map(_is_picture, files)) else inside


def _is_picture(file: Path) -> bool:
    try:
        picture_info(file)
    except (UserError, OSError):
        return False
    return True


def folders_inside(folder: Path, roots: Sequence[Path] = ()) -> list[Path]:
    """The folders in ``folder``, sorted by name, without hidden ones and links to outside of ``roots``."""
    folders = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    return [one for one in folders if not (roots and one.is_symlink() and not is_inside(one, roots))]


def trigger_of(folder: Path) -> str:
    """``<my_cat>`` of the folder ``my cat``: in brackets, since a text encoder may know the word itself."""
    name = usable_trigger(folder.name).replace(".", "_")
    return name if name.startswith("<") and name.endswith(">") else f"<{name}>"
