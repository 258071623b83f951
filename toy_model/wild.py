"""The toy world as a camera finds it: 128 x 128 pixels, with what no caption mentions.

The creatures, places and captions are those of world.py. Pose, light, shadows, textures and the things that lie
about differ from picture to picture, so that words explain little of what there is to see.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .drawing import Brush, apply_style, body_distance, draw_background, draw_character, page
from .world import Picture

SIZE = 128
PAGE = page(SIZE)
OCTAVES = (3, 6, 12, 24, 48)  # cells a side


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Random values on a coarse grid, smoothly between; (128, 128), deviation about 1/2."""
    grid = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def clouds(rng: np.random.Generator) -> np.ndarray:
    roughness = rng.uniform(0.4, 0.9)
    return np.sum([roughness**n * smooth_noise(rng, cells) for n, cells in enumerate(OCTAVES)], 0)


def texture(rng: np.random.Generator) -> np.ndarray:
    """Clouds, grain, waves or tiles; (128, 128), within about -1 to 1."""
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(8, 30)
    along = PAGE[0] * np.cos(angle) + PAGE[1] * np.sin(angle)
    across = PAGE[1] * np.cos(angle) - PAGE[0] * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        return 0.6 * clouds(rng)
    if kind == 1:
        return np.sin(pitch * along + 4 * smooth_noise(rng, 4)) * 0.7 + 0.3 * smooth_noise(rng, 40)
    if kind == 2:
        return np.sin(pitch * along) * np.sin(pitch * across) + 0.3 * smooth_noise(rng, 24)
    seam = np.maximum(np.cos(pitch * along / 2), np.cos(pitch * across / 2))
    return np.where(seam > 0.97, -1, 0.5 * smooth_noise(rng, 12))


def litter(brush: Brush, rng: np.random.Generator, things: int, reach: float) -> None:
    """Discs, boxes, sticks and rings of any colour, `reach` from the middle or further."""
    for _ in range(things):
        x, y = rng.uniform(-1.1, 1.1, 2)
        if max(abs(x), abs(y)) < reach:
            continue
        colour, size = rng.uniform(0, 1, 3), rng.uniform(0.08, 0.3)
        kind = rng.integers(4)
        if kind == 0:
            brush.disc(x, y, size, colour)
        elif kind == 1:
            brush.box(x, y, size, size * rng.uniform(0.4, 1.5), colour)
        elif kind == 2:
            turn = rng.uniform(0, np.pi)
            brush.segment((x, y), (x + 3 * size * np.cos(turn), y + 3 * size * np.sin(turn)), 0.03, colour)
        else:
            brush.paint(np.abs(np.hypot(brush.x - x, brush.y - y) - size) - 0.04, colour)


def lit(image: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Brighter or darker by a factor, (128, 128) or (128, 128, 1)."""
    return image * light.reshape(SIZE, SIZE, 1)


def render(picture: Picture, rng: np.random.Generator) -> np.ndarray:
    """The picture as uint8 (128, 128, 3); `rng` decides all that is not in it."""
    dx, dy, turn, slant, tint, light_x, light_y = rng.uniform(-1, 1, 7)
    scale, angle = rng.uniform(0.5, 0.78), turn * 0.4
    image = draw_background(picture.background, 0.25 + tint * 0.2, *PAGE)
    brush = Brush(lit(image, 1 + rng.uniform(0.05, 0.25) * texture(rng)), *PAGE, 1)
    litter(brush, rng, int(rng.integers(5)), 0)

    x, y = PAGE[0] - dx * 0.25, PAGE[1] - 0.15 - dy * 0.15
    shadow = brush.coverage((np.hypot((x + light_x * 0.2) / scale, (y - scale * 0.85) / 0.14) - 1) * 0.14 * 2)
    brush.image = lit(brush.image, 1 - 0.5 * shadow)
    x, y = (x + slant * 0.15 * y) / scale, y / scale
    cos, sin = np.cos(angle), np.sin(angle)
    brush = Brush(brush.image, cos * x + sin * y, cos * y - sin * x, scale)
    draw_character(brush, picture.character, picture.hat)
    body = brush.coverage(body_distance(picture.character.shape, brush.x, brush.y))[..., 0]
    shade = rng.uniform(0.1, 0.4) * (light_x * x + light_y * y) + rng.uniform(0, 0.08) * smooth_noise(rng, 50)
    brush = Brush(lit(brush.image, 1 + body * shade), *PAGE, 1)
    litter(brush, rng, int(rng.integers(3)), 0.75)

    image = lit(brush.image, 1 + 0.25 * (light_x * PAGE[0] + light_y * PAGE[1]))
    image = image * rng.uniform(0.85, 1.1, 3).astype(np.float32)  # the colour of the light
    image = np.clip(image, 0, 1)
    if picture.style is not None:
        image = apply_style(image, picture.style)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
