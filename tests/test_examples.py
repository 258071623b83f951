"""The templates and the ready block: what they are made of, on the demo model, and in a real browser."""

import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import opened
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from ti_pack.nodes.sockets import MAIN_FIELDS  # pyright: ignore[reportMissingImports]  made by conftest.py

from demo.measure import CONCEPTS
from dev.comfyui_server import DEMO_PACK_NAME, ComfyServer
from dev.in_process import ROOT

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLOCK = ROOT / "subgraphs/Learn a Concept.json"
NOTES = {"Note", "MarkdownNote"}
SECONDS = 300_000  # milliseconds that anything may take on a busy machine

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def nodes_of(workflow: dict, kind: str = "") -> list[dict]:
    """All nodes or those of one type, inside of subgraphs too."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return [node for graph in graphs for node in graph["nodes"] if node["type"] == (kind or node["type"])]


@pytest.fixture(scope="module")
def demo(server: ComfyServer) -> Iterator[ComfyServer]:
    """The server with what the workflows name: pictures to learn from, and somebody's embeddings."""
    embeddings = server.base / "models/embeddings"
    before = set(embeddings.iterdir())
    folders = {node["widgets_values"][0] for path in WORKFLOWS for node in nodes_of(read(path), "TI_LoadImages")}
    for name in folders:
        shutil.copytree(CONCEPTS / name / "train", server.base / "input" / name)
    for path in (ROOT / "demo/embeddings").iterdir():
        shutil.copy(path, embeddings)
    yield server
    for name in folders:
        shutil.rmtree(server.base / "input" / name)
    for path in set(embeddings.iterdir()) - before:
        path.unlink()


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
    assert not re.search(r'"(/|~|[A-Za-z]:\\)|https?:|file:', path.read_text())
    workflow, known = read(path), server.object_info()
    blocks = {item["id"] for item in workflow.get("definitions", {}).get("subgraphs", [])}
    for kind in {node["type"] for node in nodes_of(workflow)} - NOTES - blocks:
        module = known[kind]["python_module"]
        assert module == "nodes" or module.startswith(("comfy_extras.", f"custom_nodes.{server.pack_name}")), kind
        assert DEMO_PACK_NAME not in module


@each_workflow
def test_a_note_says_what_to_change(path):
    (note,) = nodes_of(read(path), "MarkdownNote")
    for words in ("**Load Checkpoint**", "512 for SD1", "To use your own"):
        assert words in note["widgets_values"][0]


# On the demo model -----------------------------------------------------------------------------------


@each_workflow
def test_workflow_draws(path, demo, tmp_path):
    """As committed, but for the numbers of steps: `make demo` does all of them, this need not learn or draw well."""
    workflow = read(path)
    for kind, place in (("TI_Train", MAIN_FIELDS.index("steps")), ("KSampler", 2)):
        for node in nodes_of(workflow, kind):
            node["widgets_values"][place] = 4
    shorter = tmp_path / path.name
    shorter.write_text(json.dumps(workflow))
    pictures = demo.run_workflow(shorter)["data"]["outputs_by_node"]
    drawn = []
    for node in nodes_of(workflow, "SaveImage"):
        (address,) = pictures[str(node["id"])]
        pixels = np.asarray(Image.open(io.BytesIO(demo.http.get(address, timeout=60).content)).convert("RGB"))
        assert pixels.std() > 5
        drawn.append(pixels)
    assert drawn
    for one, other in itertools.combinations(drawn, 2):
        assert not np.array_equal(one, other), "the word changes nothing"
    for node in nodes_of(workflow, "TI_SaveEmbedding"):
        assert (demo.base / f"models/embeddings/{node['widgets_values'][0]}.safetensors").is_file()


# In the browser --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(interface, chromium: Browser) -> Iterator[Page]:
    with opened(interface.server, chromium, interface.renderer) as page:
        yield page


@each_workflow
def test_template_opens_and_nothing_overlaps(path, page, demo):
    """As it comes, and when the panels of Train have grown to what they show during a run."""
    workflow = read(path)
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(demo.pack_name).first.click()
    dialog.get_by_text(path.stem, exact=True).click()
    expect(dialog).to_have_count(0)
    page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=len(workflow["nodes"]))
    shown = page.evaluate(
        "app.rootGraph.nodes.map((node) => [node.type, LiteGraph.registered_node_types[node.type]?.type])"
    )
    assert all(kind == known for kind, known in shown), shown
    assert sorted(kind for kind, _ in shown) == sorted(node["type"] for node in workflow["nodes"])
    assert overlaps(page) == []

    for node in nodes_of(workflow, "TI_Train"):
        page.evaluate(
            """([node, picture]) => comfyAPI.api.api.dispatchCustomEvent("textual_inversion.run", {
                run: "made up", workflow: app.rootGraph.id, node, state: "done", message: "", step: 1, steps: 1,
                learning_rate: 0.1, rate: 1, seconds_left: 0, best: 0, losses: [[0, 0.2], [1, 0.1]],
                fixed: [[0, 0.2]], pictures: [picture],
            })""",
            [str(node["id"]), {"step": 1, "filename": "0.png", "subfolder": "heart", "type": "input"}],
        )
    expect(page.locator(".ti-train [data-state=done]")).to_have_count(len(nodes_of(workflow, "TI_Train")))
    assert overlaps(page) == []


def test_block_is_found_inserted_and_run(page):
    """By its name in the search over nodes; the panel of Train lives inside of it."""
    graph = [
        {"id": 1, "type": "CheckpointLoaderSimple", "pos": [100, 100], "widgets_values": ["toy.safetensors"]},
        {"id": 2, "type": "PreviewAny", "pos": [1100, 100]},
        {"id": 3, "type": "CLIPTextEncode", "pos": [1100, 400], "widgets_values": ["a photo of Zorp"]},
    ]
    page.evaluate("nodes => app.loadGraphData({ nodes, links: [], version: 0.4 })", graph)
    page.wait_for_function("app.rootGraph.nodes.length === 3")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.type(BLOCK.stem)
    page.get_by_role("option", name=BLOCK.stem).click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.mouse.click(700, 400)  # it hangs on the mouse
    page.wait_for_function("app.rootGraph.nodes.length === 4 && app.canvas.state.ghostNodeId == null")

    values = {"folder": "heart", "size": 64, "trigger": "Zorp", "initializer": "heart", "steps": 3, "name": "block"}
    page.evaluate(
        """(values) => {
            const [loader, report, encode, block] = app.rootGraph.nodes;
            for (const widget of block.widgets) widget.value = values[widget.name] ?? widget.value;
            const connect = (from, output, to, input) =>
                from.connect(from.findOutputSlot(output), to, to.findInputSlot(input));
            for (const name of ["model", "clip", "vae"]) connect(loader, name.toUpperCase(), block, name);
            connect(block, "report", report, "source");
            connect(block, "clip", encode, "clip");
            return app.queuePrompt(0);
        }""",
        values,
    )
    page.evaluate("app.canvas.setGraph(app.rootGraph.nodes.at(-1).subgraph)")
    expect(page.locator(".ti-train:visible [data-state=done]")).to_contain_text("Done after 3 steps")
    shown = page.get_by_role("textbox", name="preview_text")
    expect(shown).to_have_value(re.compile("embedding:block"))
    page.evaluate("app.canvas.setGraph(app.rootGraph)")
    expect(shown).to_have_value(re.compile("Zorp: 1 vector.* initialized from 'heart'"))


def overlaps(page: Page) -> list[tuple[str, str]]:
    """Titles of nodes that lie on each other, once they have their sizes."""
    before, now = None, boxes(page)
    while before != now:
        page.wait_for_timeout(500)
        before, now = now, boxes(page)
    return [
        (one, other)
        for (one, *a), (other, *b) in itertools.combinations(now, 2)
        if all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))
    ]


def boxes(page: Page) -> list[list]:
    """[title, x, y, width, height] of every node on screen, title bars included."""
    return page.evaluate("""() => app.rootGraph.nodes.map((node) => {
        const inVue = document.querySelector(`.lg-node[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        const scale = app.canvas.ds.scale;
        const box = inVue ? [inVue.x, inVue.y, inVue.width, inVue.height].map((it) => it / scale) : node.getBounding();
        return [node.title, ...[...box].map(Math.round)];
    })""")
