"""Draws the registry's icon and banner from the demo's own pictures: python -m dev.artwork"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .get_comfyui import ROOT

DOCS = ROOT / "docs"
PICTURES = ROOT / "demo/concepts/heart/train"
DARK, LIGHT, ACCENT = "#1b1d2b", "#f4f1ea", "#ffb454"
SCALE = 3  # drawn larger, then made smaller: smooth edges


def card(path: Path, side: int, angle: float) -> Image.Image:
    """A picture with a white rim, turned by ``angle`` degrees."""
    rim = side // 14
    inner = side - 2 * rim
    framed = Image.new("RGBA", (side, side), LIGHT)
    framed.paste(Image.open(path).convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS), (rim, rim))
    return framed.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def fan(page: Image.Image, middle: tuple[int, int], side: int, spread: int) -> None:
    """The concept's first three pictures, one over the other."""
    for path, turn in zip(sorted(PICTURES.glob("*.png")), (1, -1, 0), strict=False):
        picture = card(path, side, 14 * turn)
        place = (
            middle[0] - turn * spread - picture.width // 2,
            middle[1] - picture.height // 2 + abs(turn) * side // 12,
        )
        page.alpha_composite(picture, place)


def icon() -> Image.Image:
    side = 400 * SCALE
    page = Image.new("RGBA", (side, side))
    ImageDraw.Draw(page).rounded_rectangle((0, 0, side - 1, side - 1), side // 6, fill=DARK)
    fan(page, (side // 2, side * 36 // 100), side * 38 // 100, side * 17 // 100)
    font = ImageFont.load_default(side * 30 // 100)
    ImageDraw.Draw(page).text((side // 2, side * 80 // 100), "S*", ACCENT, font, anchor="mm", stroke_width=side // 120)
    return page.resize((400, 400), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = 1260 * SCALE // 2, 540 * SCALE // 2
    page = Image.new("RGBA", (width, height), DARK)
    fan(page, (width * 23 // 100, height // 2), height * 46 // 100, height * 24 // 100)
    draw, left = ImageDraw.Draw(page), width * 46 // 100
    draw.text((left, height * 34 // 100), "Textual Inversion", LIGHT, ImageFont.load_default(height * 13 // 100), "lm")
    words = "Teach your model a new word\nfrom a handful of pictures"
    draw.text((left, height * 55 // 100), words, LIGHT, ImageFont.load_default(height * 65 // 1000), "lm")
    prompt = "a photo of S* in the snow"
    draw.text((left, height * 77 // 100), prompt, ACCENT, ImageFont.load_default(height * 65 // 1000), "lm")
    return page.convert("RGB").resize((1260, 540), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
