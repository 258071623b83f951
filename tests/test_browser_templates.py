"""The templates and the ready block in a real browser."""

import io
import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import drop_folder, opened, wait_until
from examples import BLOCK, LIBRARY, WORKFLOWS, demo_files, nodes_of, read
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from demo.measure import CONCEPTS

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def page(interface, chromium: Browser) -> Iterator[Page]:
    """With the front end's own check of what it opens."""
    check = {"Comfy.Validation.Workflows": True}
    with demo_files(interface.server), opened(interface.server, chromium, interface.renderer, **check) as page:
        yield page


def open_template(page: Page, name: str, pack: str) -> None:
    """Through the template browser."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(pack).first.click()
    dialog.get_by_role("heading", name=name, exact=True).click()
    expect(dialog).to_have_count(0)


@contextmanager
def template(page: Page, interface, name: str, **widgets: object) -> Iterator[set[Path]]:
    """A template with these widgets, at the demo model's sizes; that model has the name of the usual checkpoint here.

    Gives what lies in models/embeddings and in input; what is there besides at the end is removed.
    """
    (path,) = [path for path in WORKFLOWS if path.stem == name]
    (checkpoint,) = nodes_of(read(path), "CheckpointLoaderSimple")[0]["widgets_values"]
    models, inputs = interface.server.base / "models", interface.server.base / "input"
    usual = models / "checkpoints" / checkpoint
    before = {*(models / "embeddings").iterdir(), *inputs.iterdir()}
    usual.symlink_to(usual.with_name("toy.safetensors"))
    open_template(page, name, interface.server.pack_name)
    page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=len(read(path)["nodes"]))
    page.evaluate(
        """widgets => {
            for (const node of app.rootGraph.nodes)
                for (const widget of node.widgets ?? []) {
                    const { name } = widget;
                    if (["size", "width", "height"].includes(name) && node.type !== "TI_Train") widget.value = 64;
                    if (node.type === "KSampler" && name === "steps") widget.value = 2;
                    if (node.type.startsWith("TI_")) widget.value = widgets[name] ?? widget.value;
                }
        }""",
        widgets,
    )
    try:
        yield before
    finally:
        usual.unlink()
        for made in {*(models / "embeddings").iterdir(), *inputs.iterdir()} - before:
            shutil.rmtree(made) if made.is_dir() else made.unlink()


def saved(interface, before: set[Path]) -> list[str]:
    return sorted(path.name for path in set((interface.server.base / "models/embeddings").iterdir()) - before)


def test_from_the_template_to_a_word(page, interface):
    """With nothing chosen but pictures."""
    with template(page, interface, "Train an embedding (SD1.5)") as before:
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Add pictures").click()
        chooser.value.set_files(sorted((CONCEPTS / "heart/train").glob("*.png")))
        expect(page.locator(".ti-pictures-count")).to_contain_text("4 pictures")

        page.get_by_test_id("queue-button").click()
        expect(page.locator(".ti-train [data-state=learning]")).to_be_visible()
        page.get_by_role("button", name="Stop and keep").click()
        expect(page.get_by_role("textbox", name="preview_text").first).to_have_value(
            re.compile(r"Write embedding:S(-\d+)? in")  # S-2 beside the S of another test
        )
        assert [name.partition(".")[2] for name in saved(interface, before)] == ["preview.png", "safetensors"]


def test_from_the_template_to_a_library(page, interface, tmp_path):
    """With nothing chosen but a folder of folders."""
    for concept in LIBRARY:
        shutil.copytree(CONCEPTS / concept / "train", tmp_path / "words" / concept)
    with template(page, interface, "Learn a library", steps=6) as before:
        drop_folder(page, tmp_path / "words")
        expect(page.locator(".ti-pictures-count")).to_contain_text("2 concepts, 8 pictures")
        page.get_by_test_id("queue-button").click()
        panel = page.locator(".ti-train")
        expect(panel).to_contain_text("2 of 2 done")
        expect(panel.get_by_role("option", name=re.compile("^done <(heart|star)>"))).to_have_count(len(LIBRARY))
        wait_until(lambda: len(saved(interface, before)) == 2 * len(LIBRARY))
        assert {name.partition(".")[2] for name in saved(interface, before)} == {"preview.png", "safetensors"}


@pytest.mark.looks
@each_workflow
def test_template_opens_and_nothing_overlaps(path, page, interface):
    """As it comes, and when the panels of Train have grown to what they show during a run."""
    workflow = read(path)
    open_template(page, path.stem, interface.server.pack_name)
    page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=len(workflow["nodes"]))
    shown = page.evaluate(
        "app.rootGraph.nodes.map((node) => [node.type, LiteGraph.registered_node_types[node.type]?.type])"
    )
    assert all(kind == known for kind, known in shown), shown
    assert sorted(kind for kind, _ in shown) == sorted(node["type"] for node in workflow["nodes"])
    expect(page.get_by_text("Invalid workflow")).to_have_count(0)
    wait_until(lambda: overlaps(page) == [])  # nodes take their sizes one after the other

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
    wait_until(lambda: overlaps(page) == [])  # nodes take their sizes one after the other


@pytest.mark.looks
def test_block_is_what_the_front_end_expects(page):
    """The check of workflows knows no blocks of the library, but the file of one is a workflow."""
    page.evaluate("workflow => app.loadGraphData(workflow)", read(BLOCK))
    page.wait_for_function("app.rootGraph.nodes[0]?.subgraph?.nodes.length === 4")
    expect(page.get_by_text("Invalid workflow")).to_have_count(0)
    # The kind "custom" may be chosen outside, where the node inside does not see it.
    train = "app.rootGraph.nodes[0].subgraph.nodes.find((node) => node.type === 'TI_Train')"
    assert page.evaluate(f"{train}.widgets.find((widget) => widget.name === 'template').hidden") is False


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

    inside = {"folder": "heart", "size": 64}
    outside = {"trigger": "Zorp", "initializer": "heart", "steps": 3, "name": "block"}
    page.evaluate(
        """([inside, outside]) => {
            const [loader, report, encode, block] = app.rootGraph.nodes;
            const pictures = block.subgraph.nodes.find((node) => node.type === "TI_LoadImages");
            for (const widget of pictures.widgets) widget.value = inside[widget.name] ?? widget.value;
            for (const widget of block.widgets) widget.value = outside[widget.name] ?? widget.value;
            const connect = (from, output, to, input) =>
                from.connect(from.findOutputSlot(output), to, to.findInputSlot(input));
            for (const name of ["model", "clip", "vae"]) connect(loader, name.toUpperCase(), block, name);
            connect(block, "report", report, "source");
            connect(block, "clip", encode, "clip");
            return app.queuePrompt(0);
        }""",
        [inside, outside],
    )
    page.evaluate("app.canvas.setGraph(app.rootGraph.nodes.at(-1).subgraph)")
    expect(page.locator(".ti-train:visible [data-state=done]")).to_contain_text("Done after 3 steps")
    shown = page.get_by_role("textbox", name="preview_text")
    expect(shown).to_have_value(re.compile("embedding:block"))
    page.evaluate("app.canvas.setGraph(app.rootGraph)")
    expect(shown).to_have_value(re.compile("Zorp: 1 vector.* initialized from 'heart'"))


def test_what_apply_embedding_has_to_say_is_seen(page):
    """A chained word that replaces its like; the first of the chain says nothing and stays small."""
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "toy.safetensors"}},
        "2": {"class_type": "TI_LoadEmbedding", "inputs": {"file": "demo-heart.safetensors", "partner": "none"}},
        "3": {
            "class_type": "TI_ApplyEmbedding",
            "inputs": {"clip": ["1", 1], "embedding": ["2", 0], "trigger": "Zorp"},
        },
        "4": {
            "class_type": "TI_ApplyEmbedding",
            "inputs": {"clip": ["3", 0], "embedding": ["2", 0], "trigger": "zorp"},
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
    }
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.evaluate("app.queuePrompt(0)")
    said = "id => app.rootGraph.getNodeById(id).widgets.find((widget) => widget.name === 'preview_text')?.value"
    page.wait_for_function(f"({said})(4) === \"Replaces the 'Zorp' from before.\"")
    assert page.evaluate(said, 3) is None
    page.evaluate("app.rootGraph.getNodeById(4).widgets.find((widget) => widget.name === 'trigger').value = 'Other'")
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function(f"({said})(4) === ''")


def test_the_model_library_shows_what_is_saved(page, interface):
    """ComfyUI's own panel: word, thumbnail and, under the mouse, what is known about the file."""
    inputs = {"embedding": ["1", 0], "name": "saved-heart", "overwrite": True, "picture": ["2", 0]}
    graph = {
        "1": {"class_type": "TI_LoadEmbedding", "inputs": {"file": "demo-heart.safetensors"}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xFF0000}},
        "3": {"class_type": "TI_SaveEmbedding", "inputs": inputs},
    }
    interface.server.run(graph)
    page.locator("body").press("m")
    page.get_by_text("embeddings", exact=True).first.click()
    thumbnail = page.locator('[style*="embeddings/0/saved-heart.webp"]')
    thumbnail.hover()
    shown = page.locator(".model_preview")
    for told in (
        "saved-heart.safetensors",
        "stable-diffusion-v1",
        "demo-heart",
        "1 vector, 100 steps on toy.safetensors",
    ):
        expect(shown).to_contain_text(told)
    address = f"{interface.server.url}/experiment/models/preview/embeddings/0/saved-heart.webp"
    picture = Image.open(io.BytesIO(interface.server.http.get(address, timeout=60).content)).convert("RGB")
    assert picture.getpixel((32, 32)) == pytest.approx((255, 0, 0), abs=8)
    page.locator("body").press("m")
    for file in (interface.server.base / "models/embeddings").glob("saved-heart.*"):
        file.unlink()


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
