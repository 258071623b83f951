"""Draws the registry's icon and banner and the templates' thumbnails with the demo model: python -m dev.artwork"""

import io
import json
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo.workflow import for_demo_model

from .comfyui_server import ComfyServer
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


TEMPLATES = {  # and the concepts that each of them learns for its thumbnail
    "Train an embedding (SD1.5)": "heart",
    "Train an embedding (SDXL)": "star",
    "Train an embedding (Flux)": "moon",
    "Train a style (SD1.5)": "lagoon",
    "Train an embedding further": "heart",
    "Learn a library": "heart moon star",
    "Prompts with and without": "",
    "Inspect and blend": "",
}
PROMPTS = {"lagoon": "a picture of a red star with blue dots in the style of S*"}  # the demo model knows no cat
SIDE, GAP = 600, 12


def thumbnails() -> None:
    """The pictures to learn from in a row, and below them what the template draws; without words on them."""
    concepts = ROOT / "demo/concepts"
    with ComfyServer() as server:
        shutil.copytree(ROOT / "demo/embeddings", server.base / "models/embeddings", dirs_exist_ok=True)
        for name, learned in TEMPLATES.items():
            template = ROOT / f"example_workflows/{name}.json"
            pictures: list[Image.Image] = []
            folder = "library" if " " in learned else learned
            for concept in learned.split():
                place = server.base / "input" / (f"library/{concept}" if folder == "library" else concept)
                shutil.copytree(concepts / concept / "train", place, dirs_exist_ok=True)
                files = sorted(place.glob("*.png"))[: 2 if folder == "library" else None]
                pictures += [Image.open(path).convert("RGB") for path in files]
            workflow = for_demo_model(template, folder, PROMPTS.get(folder, ""))
            path = server.base / "workflow.json"
            path.write_text(json.dumps(workflow))
            outputs = server.run_workflow(path)["data"]["outputs_by_node"]
            saved = [str(node["id"]) for node in workflow["nodes"] if node["type"] == "SaveImage"]
            bodies = [server.http.get(address, timeout=60).content for node in saved for address in outputs[node]]
            drawn = [Image.open(io.BytesIO(body)).convert("RGB") for body in bodies]
            learned_below = drawn if folder == "library" else drawn[::-1]  # without the word, then with it
            in_rows([pictures, learned_below] if pictures else [[picture] for picture in drawn]).save(
                template.with_suffix(".jpg"), quality=85
            )


def in_rows(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures in rows, each as wide as the square page."""
    page = Image.new("RGB", (SIDE, SIDE), LIGHT)
    sides = [(SIDE - GAP * (len(row) + 1)) // len(row) for row in rows]
    heights = [side * row[0].height // row[0].width for side, row in zip(sides, rows, strict=True)]
    y = (SIDE - sum(heights) - GAP * (len(rows) - 1)) // 2
    for row, side, height in zip(rows, sides, heights, strict=True):
        for column, picture in enumerate(row):
            smooth = picture.resize((side, height), Image.Resampling.LANCZOS)
            page.paste(smooth, (GAP + column * (side + GAP), y))
        y += height + GAP
    return page


if __name__ == "__main__":
    thumbnails()
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
