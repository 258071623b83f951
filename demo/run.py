"""The main job, `make demo`: a real ComfyUI learns a word from four pictures and draws with it.

Runs a template on the demo model of 128 pixels and one concept through comfy-cli and leaves in demo/output/: the
pictures, the embedding, before_after.png and report.json.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dev.comfyui_server import ComfyServer
from dev.get_comfyui import ROOT
from textual_inversion import TrainConfig, formats, initial_embedding
from toy_model import wild
from toy_model.make_concepts import draw_concepts

from .measure import WILD, Bench, Concept
from .workflow import for_demo_model

OUTPUT = ROOT / "demo/output"
TEMPLATE = ROOT / "example_workflows/Train an embedding (SD1.5).json"
CONCEPT, TRIGGER = "heart", "S*"
PROMPTS = (
    "a photo of {} on a white background",
    "a photo of {} in the snow",
    "a photo of {} wearing a hat on grass",
    "a photo of {} at night",
    "a photo of {} on a yellow background",
    "a photo of {} wearing a crown on the beach",
)
SIDE = 192  # pixels of a picture on the sheet


def picture_graph(prompts: list[str], embedding: str | None) -> dict[str, Any]:
    """Draws each prompt with the same seed; ``embedding`` is the file whose word the CLIP learns."""
    clip = ["load", 1]
    graph: dict[str, Any] = {"load": node("CheckpointLoaderSimple", ckpt_name=WILD.name)}
    if embedding:
        graph["file"] = node("TI_LoadEmbedding", file=embedding)
        graph["apply"] = node("TI_ApplyEmbedding", clip=clip, embedding=["file", 0], trigger="", strength=1.0)
        clip = ["apply", 0]
    graph["latent"] = node("EmptyLatentImage", width=wild.SIZE, height=wild.SIZE, batch_size=1)
    graph["negative"] = node("CLIPTextEncode", clip=clip, text="")
    for number, prompt in enumerate(prompts):
        graph[f"positive{number}"] = node("CLIPTextEncode", clip=clip, text=prompt)
        graph[f"sample{number}"] = node(
            "KSampler",
            model=["load", 0],
            positive=[f"positive{number}", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=25,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        graph[f"decode{number}"] = node("VAEDecode", samples=[f"sample{number}", 0], vae=["load", 2])
        graph[f"save{number}"] = node("SaveImage", images=[f"decode{number}", 0], filename_prefix="sheet")
    return graph


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def draw(server: ComfyServer, prompts: list[str], embedding: str | None) -> list[Image.Image]:
    outputs = server.run(picture_graph(prompts, embedding)).history["outputs"]
    files = [outputs[f"save{number}"]["images"][0]["filename"] for number in range(len(prompts))]
    return [Image.open(server.base / "output" / name).convert("RGB") for name in files]


def sheet(rows: dict[str, list[Image.Image]], labels: list[str]) -> Image.Image:
    """Rows of pictures with their titles, and what the prompts of the last rows were."""
    top = 18
    columns = max(len(row) for row in rows.values())
    page = Image.new("RGB", (columns * SIDE, len(rows) * (SIDE + top) + top), "white")
    pen = ImageDraw.Draw(page)
    for index, (title, pictures) in enumerate(rows.items()):
        y = index * (SIDE + top)
        pen.text((4, y + 3), title, fill="black")
        for column, picture in enumerate(pictures):
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * SIDE, y + top))
    for column, label in enumerate(labels):
        pen.text((column * SIDE + 2, len(rows) * (SIDE + top) + 3), label, fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    draw_concepts(OUTPUT, wild.render, [CONCEPT])
    concept = Concept.read(str(OUTPUT / CONCEPT))

    with ComfyServer(checkpoints=[WILD]) as server:
        shutil.copytree(concept.folder / "train", server.base / "input" / concept.folder.name)
        workflow = server.base / "workflow.json"
        graph = for_demo_model(TEMPLATE, CONCEPT, model=WILD.name, side=wild.SIZE, trigger=TRIGGER)
        workflow.write_text(json.dumps(graph))
        print(f"ComfyUI runs and learns {TRIGGER!r} from {CONCEPT}.", flush=True)
        server.run_workflow(workflow)
        (learned,) = (server.base / "models/embeddings").glob("*.safetensors")
        prompts = [prompt.format(TRIGGER) for prompt in PROMPTS]
        print("Drawing the same prompts and seeds without and with the word.", flush=True)
        rows = {
            "Training pictures": [Image.open(path) for path in sorted((concept.folder / "train").glob("*.png"))],
            "Without the word": draw(server, prompts, None),
            f"With the word {TRIGGER}": draw(server, prompts, learned.name),
        }
        shutil.copy(learned, OUTPUT)
    sheet(rows, [prompt.format(TRIGGER).removeprefix("a photo of ") for prompt in PROMPTS]).save(
        OUTPUT / "before_after.png"
    )
    print("Measuring the word on pictures it has not seen.", flush=True)
    report = measured(concept, OUTPUT / learned.name, TRIGGER)
    report |= {"seconds": round(time.perf_counter() - started, 1), "embedding": learned.name}
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"See {OUTPUT.relative_to(ROOT)}/before_after.png")


def measured(concept: Concept, learned: Path, trigger: str) -> dict[str, float]:
    """Losses on fixed noise, of the training and of the held-out pictures, before and after.

    The loss of the true and complete description says how much words can explain at all.
    """
    bench = Bench(WILD)

    config = TrainConfig(trigger=trigger, initializer=concept.initializer)
    word = formats.read(learned)
    training, heldout = (bench.dataset(concept, part, config) for part in ("train", "heldout"))
    with bench.model.training() as model:
        start = initial_embedding(model.vocabularies(), trigger, concept.initializer, 1)
        return {
            "loss_first": bench.heldout_loss(training, start, trigger),
            "loss_last": bench.heldout_loss(training, word, trigger),
            "heldout_loss_before": bench.heldout_loss(heldout, start, trigger),
            "heldout_loss_after": bench.heldout_loss(heldout, word, trigger),
            "heldout_loss_described": bench.heldout_loss(heldout, start, concept.description),
        }


if __name__ == "__main__":
    main()
