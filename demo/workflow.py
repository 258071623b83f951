"""A template, set up for the demo model as its user would do it: model, pictures, sizes and guidance."""

import json
from pathlib import Path
from typing import Any

MODEL, SIDE, CFG = "toy.safetensors", 64, 4.0
EMBEDDINGS = ("demo-heart.safetensors", "demo-star.safetensors")  # files of demo/embeddings


def for_demo_model(
    template: Path, concept: str, prompt: str = "", model: str = MODEL, side: int = SIDE, **train: Any
) -> dict[str, Any]:
    """The workflow of a template, with the pictures of input/``concept``, a prompt and these widgets of Train."""
    workflow = json.loads(template.read_text())
    embeddings = iter(EMBEDDINGS)
    for node in workflow["nodes"]:
        match node["type"]:
            case "CheckpointLoaderSimple":
                set_widgets(node, ckpt_name=model)
                node["properties"].pop("models", None)
            case "TI_LoadImages":
                set_widgets(node, folder=concept, size=side)
            case "TI_Train":
                set_widgets(node, **train)
            case "TI_LoadEmbedding":
                node["widgets_values"] = [next(embeddings), "none", ""]
            case "PrimitiveStringMultiline" if prompt:
                set_widgets(node, value=prompt)
            case "EmptyLatentImage":
                set_widgets(node, width=side, height=side)
            case "KSampler":
                set_widgets(node, cfg=CFG)
    return workflow


def set_widgets(node: dict[str, Any], **values: Any) -> None:
    """Sets widgets by name in a node of a saved workflow, which lists only their values."""
    names = [item["name"] for item in node["inputs"] if "widget" in item]
    if node["type"] == "KSampler":
        names.insert(1, "control_after_generate")  # the front end's own, behind the seed
    for name, value in values.items():
        node["widgets_values"][names.index(name)] = value
