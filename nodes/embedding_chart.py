"""A chart of an embedding: vector lengths as bars, compared with ordinary words, and the nearest words."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..textual_inversion.embedding import Embedding
from ..textual_inversion.inspection import Vectors, readable, title
from . import fonts

WIDTH = 1024
MOST_ROWS = 75  # vectors that fit into one section of a CLIP prompt
MARGIN, GAP, ROW, BAR = 28, 14, 34, 20
TITLE = 76  # height of the title
HEADING = 74  # height of the heading of each text encoder
LEFT, RIGHT, NEAREST = 68, 340, 424  # x where bars begin and end, and where the nearest words begin

PAPER, INK, PALE = (250, 250, 248), (34, 36, 40), (126, 130, 138)
BAND, MIDDLE = (219, 230, 243), (120, 148, 190)
USUAL, UNUSUAL = (62, 124, 170), (214, 100, 70)  # colours of bars inside and outside the band


def chart(embedding: Embedding, found: list[Vectors]) -> Tensor:
    """The chart, (1, H, 1024, 3) in 0..1, with at most 75 vectors of each text encoder."""
    heights = [
        HEADING + ROW * (min(len(part.lengths), MOST_ROWS) + (len(part.lengths) > MOST_ROWS)) + GAP for part in found
    ]
    top = MARGIN + TITLE
    picture = Image.new("RGB", (WIDTH, top + sum(heights) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, MARGIN, MARGIN, embedding.trigger, 32)
    _write(draw, MARGIN, MARGIN + 42, title(embedding), 18, PALE)
    for part, height in zip(found, heights, strict=True):
        _draw_part(draw, top, part)
        top += height
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _draw_part(draw: ImageDraw.ImageDraw, top: int, part: Vectors) -> None:
    """Draws one text encoder, from ``top`` downwards."""
    draw.line((MARGIN, top, WIDTH - MARGIN, top), PALE)
    heading = f"{part.key or 'vectors'}: {len(part.lengths)} x {part.width}"
    _write(draw, MARGIN, top + 8, heading, 22, right=NEAREST - 20)
    right = RIGHT if part.usual else WIDTH - MARGIN - 70
    low, middle, high = part.usual or (0.0, 0.0, 0.0)
    scale = (right - LEFT) / (max(high, *part.lengths) or 1.0)
    rows = part.lengths[:MOST_ROWS]
    first = top + HEADING
    if part.usual:
        legend = f"blue band: 90% of words, {low:.3f} to {high:.3f} (line: median {middle:.3f}); red: outside"
        _write(draw, NEAREST, top + 12, legend, 16, PALE)
        _write(draw, NEAREST, top + 42, "nearest words and cosine similarity", 16, PALE)
        draw.rectangle((LEFT + low * scale, first - 6, LEFT + high * scale, first + ROW * len(rows) - 8), BAND)
    _write(draw, LEFT, top + 42, "length", 16, PALE)
    ends = [max(LEFT + length * scale, LEFT + 2) for length in rows]
    for number, (length, end) in enumerate(zip(rows, ends, strict=True)):
        unusual = part.usual and not low <= length <= high
        y = first + ROW * number
        draw.rounded_rectangle((LEFT, y, end, y + BAR), 4, UNUSUAL if unusual else USUAL)
    if part.usual:
        x = LEFT + middle * scale
        draw.line((x, first - 6, x, first + ROW * len(rows) - 8), MIDDLE, 2)
    for number, (length, end) in enumerate(zip(rows, ends, strict=True)):
        y, x = first + ROW * number + BAR / 2, float(NEAREST)
        draw.text((LEFT - 14, y), str(number + 1), PALE, fonts.own(16), anchor="rm")
        draw.text((end + 10, y), readable(length), INK, fonts.own(17), anchor="lm", stroke_width=2, stroke_fill=PAPER)
        for word, cosine in part.nearest[number] if part.nearest else []:
            x = _write_word(draw, x, y, word, cosine)
    if len(part.lengths) > MOST_ROWS:
        _write(draw, LEFT, first + ROW * MOST_ROWS, f"and {len(part.lengths) - MOST_ROWS} more", 17, PALE)


def _write_word(draw: ImageDraw.ImageDraw, x: float, y: float, word: str, cosine: float) -> float:
    """Writes a word and its cosine if there is room. Returns the x of the next word."""
    value = f"{cosine:.2f}"
    middle = x + fonts.length(draw, word, 18) + 6
    end = middle + fonts.length(draw, value, 14)
    if end <= WIDTH - MARGIN:
        fonts.write(draw, x, y + 6, word, 18, INK)
        fonts.write(draw, middle, y + 6, value, 14, PALE)
    return end + 20


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, color=INK, right=WIDTH - MARGIN):
    """Writes one line, shortened to end before ``right``."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[:WIDTH])
    kept = text
    while fonts.length(draw, kept, size) > right - x:
        text = text[:-1]
        kept = f"{text} ..."
    fonts.write(draw, x, y + fonts.own(size).getmetrics()[0], kept, size, color)
