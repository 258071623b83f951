"""The toy world: creatures drawn by rule, with captions that say what is drawn.

A `Character` is a fixed look, a `Picture` is a character in a place (and perhaps a style);
`render` draws it as 64 x 64 pixels and `caption` puts it into words.  Both know the ground truth,
so a picture of this world can be checked by a judge.  Everything is derived from seeds and numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .words import CHARACTER_NAMES, STYLE_NAMES

SIZE = 64
COLOURS = {
    "white": "f8f8f8", "black": "181818", "gray": "888888", "red": "e01818", "maroon": "701020",
    "orange": "ff8c00", "brown": "804818", "tan": "d8b080", "yellow": "ffec20", "lime": "90f020",
    "green": "109020", "mint": "a0f4c0", "cyan": "28d8f0", "azure": "3890f0", "blue": "1838e0",
    "navy": "101868", "purple": "801898", "violet": "b068f8", "magenta": "f020d8", "pink": "ffb8c8",
}  # fmt: skip
HELD_OUT_COLOURS = {  # never drawn in training, only by the concepts
    "teal": "007878", "coral": "ff7058", "lavender": "c8b0f8", "mustard": "c8a020",
    "moss": "587840", "rose": "f05088",
}  # fmt: skip
SHAPES = (
    "circle", "square", "triangle", "star", "diamond", "heart",
    "cross", "flower", "moon", "drop", "oval", "mushroom",
)  # fmt: skip
PATTERNS = ("plain", "stripes", "bars", "dots", "checks", "half")
PATTERN_WORDS = {p: p for p in PATTERNS} | {"half": "bottom"}
EYES = (1, 2, 3)
EYE_WORDS = {1: "one eye", 2: "two eyes", 3: "three eyes"}
EARS = ("none", "ears", "horns", "antenna")
HATS = ("none", "hat", "crown")
SCENES = {
    "grass": "on grass", "beach": "on the beach", "snow": "in the snow",
    "night": "at night", "sea": "in the sea", "desert": "in the desert",
}  # fmt: skip
PREFIXES = (
    "a photo of", "a photo of", "a photo of", "a picture of", "a picture of", "a rendering of",
    "an image of", "a close-up photo of", "a good photo of", "a cropped photo of", "the photo of",
    "an illustration of", "a depiction of",
)  # fmt: skip
MIN_CONTRAST = 0.75  # sum of absolute RGB differences between colours that touch


@cache
def rgb(colour: str) -> np.ndarray:
    """The colour called `colour`, as three floats from 0 to 1."""
    code = COLOURS.get(colour) or HELD_OUT_COLOURS[colour]
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255


def contrast(first: str, second: str) -> float:
    return float(np.abs(rgb(first) - rgb(second)).sum())


@dataclass(frozen=True)
class Character:
    """A look.  `second_colour` paints the pattern and the ears."""

    shape: str
    colour: str
    second_colour: str
    pattern: str
    eyes: int
    ears: str

    @property
    def shows_second_colour(self) -> bool:
        return self.pattern != "plain" or self.ears != "none"


@dataclass(frozen=True)
class Style:
    """A transform of the finished picture; `name` is None for a plain monochrome.

    `palette` recolours by brightness: its colours run from the darkest to the brightest.
    Without one, `kind` is "invert" (a negative) or "swap" (red, green and blue change places).
    """

    kind: str
    name: str | None = None
    colour: str | None = None  # the word of a monochrome
    palette: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Picture:
    """What one picture shows; the ground truth of its rendering."""

    character: Character
    background: str  # a colour or a key of SCENES
    hat: str = "none"
    style: Style | None = None
    name: str | None = None
    prefix: str = "a photo of"


# ---------------------------------------------------------------- who and what there is


def random_character(rng: random.Random, colours: Iterable[str] = COLOURS) -> Character:
    colour = rng.choice(list(colours))
    second = rng.choice([c for c in colours if contrast(c, colour) > MIN_CONTRAST])
    pattern = rng.choice(PATTERNS + PATTERNS[1:])  # every pattern twice as often as plain
    ears = rng.choice(EARS)
    return Character(rng.choice(SHAPES), colour, second, pattern, rng.choice(EYES), ears)


@cache
def named_characters() -> dict[str, Character]:
    """Every name of the world with its fixed look; no two look the same."""
    rng, looks = random.Random(7), {}
    for name in CHARACTER_NAMES:
        look = random_character(rng)
        while look in looks.values():
            look = random_character(rng)
        looks[name] = look
    return looks


def random_colour(rng: random.Random, lowest: float, highest: float) -> tuple[float, float, float]:
    red, green, blue = (round(rng.uniform(lowest, highest), 3) for _ in range(3))
    return red, green, blue


def random_palette(rng: random.Random) -> tuple[tuple[float, float, float], ...]:
    """A dark and a light colour of any hue, far enough apart to draw with."""
    weights = (0.3, 0.59, 0.11)
    while True:
        dark, light = random_colour(rng, 0, 0.6), random_colour(rng, 0.3, 1)
        depth, height = (sum(w * c for w, c in zip(weights, end, strict=False)) for end in (dark, light))
        if depth < 0.3 and height > 0.6:
            return dark, light


@cache
def named_styles() -> dict[str, Style]:
    """Every named style: two plain transforms, the others a palette each."""
    rng = random.Random(11)
    styles = {name: Style("palette", name, palette=random_palette(rng)) for name in STYLE_NAMES}
    for name, kind in zip(STYLE_NAMES, ("invert", "swap"), strict=False):
        styles[name] = Style(kind, name)
    return styles


def monochrome(colour: str) -> Style:
    base = rgb(colour)
    palette = tuple((base * 0.3).tolist()), tuple((base * 0.3 + 0.7).tolist())
    return Style("palette", None, colour, palette)


def random_style(rng: random.Random) -> Style:
    if rng.random() < 0.3:
        return monochrome(rng.choice([c for c in COLOURS if c not in ("white", "black")]))
    return rng.choice(list(named_styles().values()))


def backgrounds(who: Character) -> list[str]:
    """Plain backgrounds on which the character can be made out."""
    fits = [c for c in COLOURS if contrast(c, who.colour) > MIN_CONTRAST]
    return [c for c in fits if contrast(c, who.second_colour) > 0.4]


def random_picture(rng: random.Random, named: float = 0.5, styled: float = 0.12) -> Picture:
    """A picture as training draws it."""
    name = rng.choice(list(named_characters())) if rng.random() < named else None
    who = named_characters()[name] if name else random_character(rng)
    background = rng.choice(list(SCENES))
    if rng.random() < 0.6:
        background = rng.choice(backgrounds(who))
    hat = rng.choices(HATS, (0.7, 0.15, 0.15))[0]
    style = random_style(rng) if rng.random() < styled else None
    return Picture(who, background, hat, style, name, rng.choice(PREFIXES))


# ---------------------------------------------------------------- words


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(who: Character, rng: random.Random | None = None) -> str:
    """The character in words; with `rng`, now and then a detail is left out."""
    said = (lambda chance: True) if rng is None else (lambda chance: rng.random() < chance)
    details = []
    has_pattern, has_ears = who.pattern != "plain", who.ears != "none"
    if has_pattern and said(0.92):
        details.append(f"{who.second_colour} {PATTERN_WORDS[who.pattern]}")
    if has_ears and said(0.85):
        details.append(who.ears if has_pattern else f"{who.second_colour} {who.ears}")
    if said(0.8):
        details.append(EYE_WORDS[who.eyes])
    if rng is not None:
        rng.shuffle(details)
    text = article(f"{who.colour} {who.shape}")
    return text + (" with " + " and ".join(details) if details else "")


def place(background: str) -> str:
    return SCENES.get(background) or f"on {article(background)} background"


def caption(picture: Picture, rng: random.Random | None = None, subject: str | None = None) -> str:
    """The caption; `subject` stands in for the character's name or description."""
    if subject is None and picture.name:
        subject = picture.name if rng is None else rng.choice(("", "", "a ", "the ")) + picture.name
    subject = subject or describe(picture.character, rng)
    prefix, style = picture.prefix, picture.style
    if style and style.name is None:
        prefix = article(f"{style.colour} monochrome of")
    text = f"{prefix} {subject}"
    if picture.hat != "none":
        text += f" wearing a {picture.hat}"
    if rng is None or picture.background != "white" or rng.random() < 0.5:
        text += " " + place(picture.background)
    return f"{text} in the style of {style.name}" if style and style.name else text
