"""Pixels of the toy world: signed distances, painted with smooth edges in numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .world import SCENES, SIZE, Character, Picture, Style, rgb


def page(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, both from -1 to 1, y downwards."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    return (columns + 0.5) / size * 2 - 1, (rows + 0.5) / size * 2 - 1


PAGE = page(SIZE)
GREY = np.array([0.3, 0.59, 0.11], np.float32)
INK = (0.05, 0.05, 0.08)


class Anchors(NamedTuple):
    """Where the parts sit on a shape, in body units (the body spans about -0.9 to 0.9)."""

    eye_x: float
    eye_y: float
    ear_x: float
    ear_y: float
    top: float  # where a hat rests


ANCHORS = {
    "circle": Anchors(0, -0.30, 0.60, -0.66, -0.78),
    "square": Anchors(0, -0.34, 0.56, -0.80, -0.74),
    "triangle": Anchors(0, 0.12, 0.40, -0.36, -0.70),
    "star": Anchors(0, -0.14, 0.36, -0.58, -0.80),
    "diamond": Anchors(0, -0.12, 0.46, -0.52, -0.78),
    "heart": Anchors(0, -0.24, 0.52, -0.74, -0.50),
    "cross": Anchors(0, -0.12, 0.52, -0.52, -0.84),
    "flower": Anchors(0, -0.22, 0.56, -0.70, -0.80),
    "moon": Anchors(-0.34, -0.06, 0.56, -0.70, -0.78),
    "drop": Anchors(0, 0.00, 0.46, -0.38, -0.74),
    "oval": Anchors(0, -0.18, 0.62, -0.54, -0.56),
    "mushroom": Anchors(0, -0.34, 0.62, -0.66, -0.76),
}


def body_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """About the distance to the edge of a shape, negative inside."""
    radius = np.hypot(x, y)
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return radius - 0.84
    if shape == "square":
        return np.maximum(ax, ay) - 0.78
    if shape == "triangle":
        return np.maximum(ax * 0.87 - (y + 0.95) * 0.49, y - 0.78)
    if shape == "star":
        turn = 2 * np.pi / 5  # each edge runs from a tip to the notch half a turn further
        part = np.abs((np.arctan2(x, -y) + turn / 2) % turn - turn / 2)
        tip, notch = 1.06, 0.52
        edge_x, edge_y = notch * np.sin(turn / 2), notch * np.cos(turn / 2) - tip
        across = (radius * np.cos(part) - tip) * edge_x - radius * np.sin(part) * edge_y
        return across / np.hypot(edge_x, edge_y)
    if shape == "diamond":
        return (ax * 1.12 + ay * 0.95) * 0.7 - 0.66
    if shape == "heart":
        lobes = np.hypot(ax - 0.43, y + 0.3) - 0.49
        wedge = np.maximum((ax + (y - 0.88) * 0.8) * 0.78, -y - 0.3)
        return np.minimum(lobes, wedge)
    if shape == "cross":
        return np.maximum(np.minimum(ax, ay) - 0.37, np.maximum(ax, ay) - 0.9)
    if shape == "flower":
        return radius - (0.77 + 0.14 * np.cos(np.arctan2(x, -y) * 8))
    if shape == "moon":
        return np.maximum(radius - 0.9, 0.56 - np.hypot(x - 0.62, y + 0.16))
    if shape == "drop":
        cone = np.maximum((ax - (y + 1.0) * 0.62) * 0.85, y - 0.2)
        return np.minimum(np.hypot(x, y - 0.22) - 0.68, cone)
    if shape == "oval":
        return (np.hypot(x / 1.02, y / 0.62) - 1) * 0.66
    if shape == "mushroom":
        cap = np.maximum((np.hypot(x / 0.95, (y - 0.1) / 0.98) - 1) * 0.95, y - 0.12)
        return np.minimum(cap, np.maximum(ax - 0.4, np.maximum(y - 0.85, -y)))
    raise KeyError(shape)


def pattern_mask(pattern: str, x: np.ndarray, y: np.ndarray, sharpness: float) -> np.ndarray:
    """How much of the second colour each pixel of the body has."""

    def edge(value: np.ndarray) -> np.ndarray:
        return np.clip(0.5 + value * sharpness, 0, 1)

    if pattern == "plain":
        return np.zeros_like(x)
    if pattern == "stripes":
        return edge(np.sin((y - 0.05) * 7.4) / 7.4)
    if pattern == "bars":
        return edge(np.cos(x * 7.4) / 7.4)
    if pattern == "dots":
        near = np.full_like(x, 9.0)
        for cx, cy in ((-0.46, 0.12), (0.46, 0.12), (0, 0.52), (-0.56, -0.62), (0.56, -0.62)):
            near = np.minimum(near, np.hypot(x - cx, y - cy))
        return edge(0.22 - near)
    if pattern == "checks":
        return edge(np.sin(x * 6.6) * np.sin((y - 0.05) * 6.6) / 6.6)
    if pattern == "half":
        return edge(y - 0.16)
    raise KeyError(pattern)


class Brush:
    """Paints flat colours on a picture, in the coordinates of one creature."""

    def __init__(self, image: np.ndarray, x: np.ndarray, y: np.ndarray, scale: float) -> None:
        self.image, self.x, self.y = image, x, y
        self.sharpness = scale * len(x) / 2  # pixels a unit

    def coverage(self, distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance * self.sharpness, 0, 1)[..., None]

    def paint(self, distance: np.ndarray, colour: object) -> None:
        cover = self.coverage(distance)
        self.image = self.image * (1 - cover) + np.asarray(colour, np.float32) * cover

    def disc(self, x: float, y: float, radius: float, colour: object) -> None:
        self.paint(np.hypot(self.x - x, self.y - y) - radius, colour)

    def box(self, x: float, y: float, half_w: float, half_h: float, colour: object) -> None:
        inside = np.maximum(np.abs(self.x - x) - half_w, np.abs(self.y - y) - half_h)
        self.paint(inside, colour)

    def segment(self, start: tuple, end: tuple, radius: float, colour: object) -> None:
        dx, dy = end[0] - start[0], end[1] - start[1]
        along = ((self.x - start[0]) * dx + (self.y - start[1]) * dy) / (dx * dx + dy * dy)
        along = np.clip(along, 0, 1)
        gap = np.hypot(self.x - start[0] - along * dx, self.y - start[1] - along * dy)
        self.paint(gap - radius, colour)


def draw_ears(brush: Brush, who: Character, at: Anchors) -> None:
    colour, dark = rgb(who.second_colour), rgb(who.colour) * 0.4
    for side in (-1, 1):
        x = side * at.ear_x
        if who.ears == "ears":
            brush.disc(x, at.ear_y, 0.33, dark)
            brush.disc(x, at.ear_y, 0.27, colour)
        elif who.ears == "horns":
            slope = np.abs(brush.x - x - side * 0.06) * 0.92 - (brush.y - at.ear_y + 0.5) * 0.36
            base = brush.y - at.ear_y - 0.25
            brush.paint(np.maximum(slope - 0.05, base), dark)
            brush.paint(np.maximum(slope, base), colour)
        elif who.ears == "antenna":
            tip = (x * 1.0 + side * 0.12, at.ear_y - 0.42)
            brush.segment((x * 0.5, at.ear_y + 0.25), tip, 0.05, dark)
            brush.disc(*tip, 0.19, dark)
            brush.disc(*tip, 0.145, colour)


def draw_eyes(brush: Brush, who: Character, at: Anchors) -> None:
    radius = {1: 0.25, 2: 0.21, 3: 0.18}[who.eyes]
    spacing = {1: 0.0, 2: 0.50, 3: 0.41}[who.eyes]
    for k in range(who.eyes):
        x = at.eye_x + (k - (who.eyes - 1) / 2) * spacing
        brush.disc(x, at.eye_y, radius + 0.04, INK)
        brush.disc(x, at.eye_y, radius, (1, 1, 1))
        brush.disc(x, at.eye_y + 0.01, radius * 0.55, INK)


def draw_hat(brush: Brush, hat: str, top: float) -> None:
    if hat == "hat":
        brush.box(0, top - 0.24, 0.34, 0.26, INK)
        brush.box(0, top - 0.10, 0.34, 0.07, (0.88, 0.1, 0.15))
        brush.box(0, top, 0.56, 0.07, INK)
    elif hat == "crown":
        teeth = np.abs(((brush.x / 0.9 + 0.5) * 3) % 1 - 0.5) * 0.5 - 0.42
        inside = np.maximum(np.abs(brush.x) - 0.45, brush.y - top - 0.06)
        brush.paint(np.maximum(inside - 0.04, (top + teeth - brush.y) * 0.6 - 0.04), (0.5, 0.3, 0))
        brush.paint(np.maximum(inside, (top + teeth - brush.y) * 0.6), (1.0, 0.8, 0.08))


def draw_character(brush: Brush, who: Character, hat: str) -> None:
    at = ANCHORS[who.shape]
    draw_ears(brush, who, at)
    distance = body_distance(who.shape, brush.x, brush.y)
    mask = pattern_mask(who.pattern, brush.x, brush.y, brush.sharpness)[..., None]
    brush.paint(distance, rgb(who.colour) * (1 - mask) + rgb(who.second_colour) * mask)
    brush.paint(np.abs(distance + 0.02) - 0.045, rgb(who.colour) * 0.4)
    draw_eyes(brush, who, at)
    draw_hat(brush, hat, at.top)


def draw_background(background: str, horizon: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if background not in SCENES:
        return np.broadcast_to(rgb(background), (*x.shape, 3))
    sky, ground = {
        "grass": ((0.60, 0.82, 1.0), (0.30, 0.70, 0.22)),
        "beach": ((0.60, 0.82, 1.0), (0.96, 0.85, 0.55)),
        "snow": ((0.78, 0.83, 0.90), (0.97, 0.98, 1.0)),
        "night": ((0.05, 0.06, 0.20), (0.08, 0.16, 0.14)),
        "sea": ((0.70, 0.90, 1.0), (0.08, 0.36, 0.72)),
        "desert": ((1.0, 0.66, 0.36), (0.80, 0.52, 0.24)),
    }[background]
    brush = Brush(np.broadcast_to(np.array(sky, np.float32), (*x.shape, 3)), x, y, 1)
    if background == "beach":
        brush.paint(horizon - 0.22 - y, (0.15, 0.50, 0.85))
    brush.paint(horizon - y, ground)
    if background == "night":
        brush.disc(0.72, -0.70, 0.17, (1.0, 0.96, 0.7))
        for left, top in ((-0.8, -0.75), (-0.35, -0.88), (0.3, -0.85), (-0.85, -0.2), (0.85, -0.2)):
            brush.disc(left, top, 0.05, (1, 1, 0.85))
    elif background == "desert":
        brush.disc(-0.72, -0.70, 0.18, (1.0, 0.92, 0.35))
    elif background == "snow":
        for left, top in ((-0.8, -0.7), (0.8, -0.8), (-0.85, -0.1), (0.85, -0.15), (0.0, -0.93)):
            brush.disc(left, top, 0.07, (1, 1, 1))
    return brush.image


def apply_style(image: np.ndarray, style: Style) -> np.ndarray:
    if style.kind == "invert":
        return 1 - image
    if style.kind == "swap":
        return image[..., [2, 0, 1]]
    palette = np.array(style.palette, np.float32)
    brightness, stops = image @ GREY, np.linspace(0, 1, len(palette))
    return np.stack([np.interp(brightness, stops, palette[:, k]) for k in range(3)], -1)


def render(picture: Picture, rng: np.random.Generator) -> np.ndarray:
    """The picture as uint8 (64, 64, 3); `rng` moves things about a little."""
    dx, dy, turn, tint = rng.uniform(-1, 1, 4)
    angle, scale = turn * 0.07, rng.uniform(0.78, 0.83)
    x, y = (PAGE[0] - dx * 0.08) / scale, (PAGE[1] - 0.2 - dy * 0.03) / scale
    cos, sin = np.cos(angle), np.sin(angle)
    image = draw_background(picture.background, 0.25 + tint * 0.08, *PAGE)
    brush = Brush(image, cos * x + sin * y, cos * y - sin * x, scale)
    draw_character(brush, picture.character, picture.hat)
    image = brush.image if picture.style is None else apply_style(brush.image, picture.style)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
