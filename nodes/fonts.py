"""Text of every script in a picture: Pillow's own font has little more than ASCII, the rest comes from the machine's.

A letter that no font has is written as its number, ``U+732B``. So are letters that change their shape beside others,
such as Arabic ones, where Pillow lacks the libraries for it.
"""

import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont, features

_PROBE = 16  # pixels: the size at which fonts are asked for a letter
_NOWHERE = "\uffff"  # is no letter: a font draws its box for it
_SHAPED = range(0x590, 0x10A0)  # Hebrew and Arabic to Burmese: written from the right, or with signs around letters
# In the names of fonts that are not the plain one of their kind.
_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif", "emoji", "math")

_OWN = Path()  # in the place of a file: Pillow's own font

Run = tuple[str, ImageFont.FreeTypeFont]


def write(draw: ImageDraw.ImageDraw, x: float, baseline: float, text: str, size: int, color: tuple) -> None:
    """Writes one line, from ``x`` on."""
    for part, font in _runs(text, size):
        draw.text((x, baseline), part, color, font, anchor="ls")
        x += draw.textlength(part, font)


def length(draw: ImageDraw.ImageDraw, text: str, size: int) -> float:
    """Pixels that ``write`` takes for a text."""
    return sum(draw.textlength(part, font) for part, font in _runs(text, size))


def own(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's font, for numbers and English."""
    return _font(_OWN, size)


def _runs(text: str, size: int) -> Iterator[Run]:
    """The text in parts of one font each: a word is in one font, where one has all of its letters."""
    chosen: list[tuple[Path, str]] = []
    for word in re.findall(r"\s+|\S+", unicodedata.normalize("NFC", text)):
        if word.isspace():
            chosen.append((chosen[-1][0] if chosen else _OWN, word))
        elif font := _font_with(word):
            chosen.append((font, word))
        else:
            for letter in _letters(word):
                numbers = " ".join(f"U+{ord(part):04X}" for part in letter)
                chosen.append((font, letter) if (font := _font_with(letter)) else (_OWN, f" {numbers} "))
    for path, parts in groupby(chosen, lambda choice: choice[0]):
        yield "".join(part for _, part in parts), _font(path, size)


def _letters(word: str) -> list[str]:
    """Each letter with the marks that belong to it."""
    found: list[str] = []
    for letter in word:
        if found and unicodedata.category(letter)[0] == "M":
            found[-1] += letter
        else:
            found.append(letter)
    return found


def _font_with(text: str) -> Path | None:
    """The first font that has all of a text; None where none has, or it could not be put right."""
    if not features.check("raqm") and any(ord(letter) in _SHAPED for letter in text):
        return None
    return next((path for path in _fonts() if all(_has(path, letter) for letter in text)), None)


@cache
def _has(path: Path, letter: str) -> bool:
    invisible = unicodedata.category(letter) == "Cf"
    return invisible or _drawn(_font(path, _PROBE), letter) != _drawn(_font(path, _PROBE), _NOWHERE)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask: Any = font.getmask(letter)
    return mask.size, bytes(mask)


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if path == _OWN else ImageFont.truetype(path, size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # without FreeType, Pillow has a font of bitmaps only
    return font


@cache
def _fonts() -> list[Path]:
    """Pillow's own font, then the font files of the machine that Pillow can open, plain ones first."""
    files = {
        file for folder in _folders() for file in folder.rglob("*") if file.suffix.lower() in (".ttf", ".ttc", ".otf")
    }
    names = sorted(files, key=lambda file: (sum(style in file.stem.lower() for style in _STYLES), file.name.lower()))
    return [_OWN, *filter(_opens, names)]


def _opens(file: Path) -> bool:
    try:
        _drawn(_font(file, _PROBE), _NOWHERE)
    except OSError:  # bitmaps of one size, damaged, or without the right to read it
        return False
    return True


def _folders() -> list[Path]:
    """Where the system and the user have fonts."""
    home = Path.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", str(home / "AppData/Local"))
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), Path(local, "Microsoft/Windows/Fonts")]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    users = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
    return [Path(folder, "fonts") for folder in (users, *shared.split(":"))]
