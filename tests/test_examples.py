"""The templates and the ready block: what they are made of, and what they draw on the demo model."""

import io
import itertools
import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
from examples import BLOCK, LIBRARY, WORKFLOWS, demo_files, nodes_of, pictures_for, read
from PIL import Image

from demo.workflow import for_demo_model, set_widgets
from dev.comfyui_server import DEMO_PACK_NAME, ComfyServer
from dev.in_process import ROOT

NOTES = {"Note", "MarkdownNote"}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def demo(server: ComfyServer) -> Iterator[ComfyServer]:
    with demo_files(server):
        yield server


# The files -------------------------------------------------------------------------------------------


def test_there_is_one_thumbnail_a_workflow():
    pictures = sorted((ROOT / "example_workflows").glob("*.jpg"))
    assert [path.stem for path in pictures] == [path.stem for path in WORKFLOWS]
    for path in pictures:
        assert path.stat().st_size < 60_000
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
            assert picture.width == picture.height
            assert 512 <= picture.width <= 768


@pytest.mark.parametrize("path", [*WORKFLOWS, BLOCK], ids=lambda path: path.stem)
def test_files_hold_nothing_of_the_machine_they_were_made_on(path, server):
    assert not re.search(r'"(/|~|[A-Za-z]:\\)|file:|toy\.safetensors', path.read_text())
    workflow, known = read(path), server.object_info()
    blocks = {item["id"] for item in workflow.get("definitions", {}).get("subgraphs", [])}
    for kind in {node["type"] for node in nodes_of(workflow)} - NOTES - blocks:
        module = known[kind]["python_module"]
        assert module == "nodes" or module.startswith(("comfy_extras.", f"custom_nodes.{server.pack_name}")), kind
        assert DEMO_PACK_NAME not in module


@each_workflow
def test_links_are_whole(path):
    """Both ends of a link name it: the front end drops one that only its list has."""
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, _ in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


@each_workflow
def test_template_is_set_up_for_a_users_model(path):
    """A model that ComfyUI can download, the size it was made for everywhere, and no picture or file of ours."""
    workflow = read(path)
    (loader,) = nodes_of(workflow, "CheckpointLoaderSimple")
    (model,) = loader["properties"]["models"]
    assert loader["widgets_values"] == [model["name"]]
    assert model["directory"] == "checkpoints"
    assert model["url"].startswith("https://huggingface.co/")
    assert model["url"].endswith(f"/{model['name']}")
    size = 1024 if "SDXL" in path.stem else 512
    for node in nodes_of(workflow, "TI_LoadImages"):
        assert node["widgets_values"] == ["", "", "keep shape", size]
    for node in nodes_of(workflow, "EmptyLatentImage"):
        assert node["widgets_values"][:2] == ([1024, 1024] if "Flux" in path.stem else [size, size])
    for node in nodes_of(workflow, "TI_SaveEmbedding"):
        assert node["widgets_values"][0] == "", "the trigger word"


@each_workflow
def test_a_note_says_what_to_do(path):
    (note,) = nodes_of(read(path), "MarkdownNote")
    for words in ("**Load Checkpoint**", "Press **Run**"):
        assert words in note["widgets_values"][0]


# On the demo model -----------------------------------------------------------------------------------


@each_workflow
def test_workflow_draws(path, demo, tmp_path):
    """Set up for the demo model; with few steps, since this need not learn or draw well as `make demo` does."""
    folder = pictures_for(path)
    workflow = for_demo_model(path, folder)
    for node in [*nodes_of(workflow, "TI_Train"), *nodes_of(workflow, "KSampler")]:
        set_widgets(node, steps=4)
    shorter = tmp_path / path.name
    shorter.write_text(json.dumps(workflow))
    pictures = demo.run_workflow(shorter)["data"]["outputs_by_node"]
    drawn = []
    for node in nodes_of(workflow, "SaveImage"):
        addresses = pictures[str(node["id"])]
        assert len(addresses) == (len(LIBRARY) if folder == "library" else 1)
        for address in addresses:
            pixels = np.asarray(Image.open(io.BytesIO(demo.http.get(address, timeout=60).content)).convert("RGB"))
            assert pixels.std() > 5
            drawn.append(pixels)
    assert drawn
    for one, other in itertools.combinations(drawn, 2):
        assert not np.array_equal(one, other), "the word changes nothing"
    if nodes_of(workflow, "TI_SaveEmbedding"):
        for word in LIBRARY if folder == "library" else ("S",):
            assert (demo.base / f"models/embeddings/{word}.safetensors").is_file()
            assert (demo.base / f"models/embeddings/{word}.preview.png").is_file()
