"""Load Images in a real browser and both of ComfyUI's renderers: pictures in, thumbnails, graph, what goes wrong."""

import base64
import io
import shutil
from collections.abc import Iterator
from mimetypes import guess_type

import numpy as np
import pytest
from browser import opened
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect

from dev.comfyui_server import ComfyServer

NODE = "TI_LoadImages"
ROUTE = "/textual_inversion/pictures"
THUMBNAIL = "/textual_inversion/thumbnail"


@pytest.fixture(scope="module")
def server(interface) -> ComfyServer:
    return interface.server


@pytest.fixture(scope="module")
def tab(interface, chromium: Browser) -> Iterator[Page]:
    with opened(interface.server, chromium, interface.renderer) as page:
        yield page


@pytest.fixture
def page(tab: Page, server: ComfyServer) -> Iterator[Page]:
    """The browser with one Load Images node; folders that a test made in input/ are removed after it."""
    before = {path.name for path in (server.base / "input").iterdir()}
    tab.evaluate(
        """async type => {
            const node = { id: 1, type, pos: [100, 100] };
            await app.loadGraphData({ id: crypto.randomUUID(), nodes: [node], links: [], version: 0.4 });
            app.canvas.ds.reset();
            app.canvas.setDirty(true, true);
        }""",
        NODE,
    )
    expect(count(tab)).to_have_text("0 pictures")
    tab.locator(".ti-pictures-list").hover(trial=True)  # lies where it will stay
    yield tab
    tab.unroute_all()
    for path in (server.base / "input").iterdir():
        if path.name not in before:
            shutil.rmtree(path)


def count(page: Page):
    return page.locator(".ti-pictures-count")


def note(page: Page):
    return page.locator(".ti-pictures-note")


def tiles(page: Page):
    return page.locator(".ti-picture")


def widget(page: Page, name: str):
    return page.evaluate("name => app.graph.nodes[0].widgets.find(widget => widget.name === name).value", name)


def choose(page: Page, name: str, value: str) -> None:
    """What both renderers do when the user changes a widget."""
    page.evaluate(
        """([name, value]) => {
            const widget = app.graph.nodes[0].widgets.find(widget => widget.name === name);
            widget.value = value;
            widget.callback(value);
        }""",
        [name, value],
    )


def picture(colour: str, hole: bool = False, size: tuple[int, int] = (48, 32), **options) -> bytes:
    image = Image.new("RGBA" if hole else "RGB", size, colour)
    if hole:
        image.paste((0, 0, 0, 0), (0, 0, 16, 16))
    file = io.BytesIO()
    image.save(file, "PNG" if hole else "JPEG", **options)
    return file.getvalue()


def files(**contents: bytes) -> list[FilePayload]:
    """Files for the browser; `cat_png` becomes cat.png."""
    named = [(name.replace("_", "."), content) for name, content in contents.items()]
    return [FilePayload(name=name, mimeType=guess_type(name)[0] or "", buffer=content) for name, content in named]


THREE = files(b_jpg=picture("red"), a_png=picture("green", hole=True), c_jpg=picture("blue"), c_txt=b"a blue thing\n")


def pick(page: Page, chosen: list[FilePayload]) -> None:
    """Through the file dialog behind the button."""
    with page.expect_file_chooser() as dialog:
        page.get_by_role("button", name="Add pictures").click()
    dialog.value.set_files(chosen)


def drop(page: Page, dropped: list[FilePayload], x: float, y: float) -> None:
    """Moves files over a point of the page and lets them go there."""
    content = [[file["name"], file["mimeType"], base64.b64encode(file["buffer"]).decode()] for file in dropped]
    page.evaluate(
        """([content, clientX, clientY]) => {
            const dataTransfer = new DataTransfer();
            for (const [name, type, data] of content) {
                const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
                dataTransfer.items.add(new File([bytes], name, { type }));
            }
            const options = { dataTransfer, clientX, clientY, bubbles: true, cancelable: true };
            for (const kind of ["dragover", "drop"])
                document.elementFromPoint(clientX, clientY).dispatchEvent(new DragEvent(kind, options));
        }""",
        [content, x, y],
    )


def run(page: Page, server: ComfyServer) -> int:
    """Queues what the page would queue, with a Preview Image behind the node; returns how many pictures come out."""
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (name,) = prompt
    assert list(prompt[name]["inputs"]) == ["folder", "path", "crop", "size"]
    prompt["preview"] = {"class_type": "PreviewImage", "inputs": {"images": [name, 0]}}
    return len(server.run(prompt).history["outputs"]["preview"]["images"])


def test_picked_pictures_are_shown_and_used(page, server):
    pick(page, THREE)
    expect(count(page)).to_have_text("3 pictures")
    expect(note(page)).to_be_hidden()
    images = page.locator(".ti-picture img")
    assert [image.get_attribute("alt") for image in images.all()] == ["a.png", "b.jpg", "c.jpg"]
    for image in images.all():
        expect(image).to_have_js_property("naturalWidth", 48)
    assert [tile.locator(".ti-mark-mask").count() for tile in tiles(page).all()] == [1, 0, 0]
    assert [tile.locator(".ti-mark-caption").count() for tile in tiles(page).all()] == [0, 0, 1]
    assert tiles(page).nth(2).get_attribute("title") == "c.jpg\n48 × 32\na blue thing"

    folder = widget(page, "folder")
    assert folder == "pictures-2", "input/pictures is there already, and not ours to fill"
    expect(page.locator(".lg-node").get_by_text(folder)).to_have_count(page.locator(".lg-node").count())
    assert {file.name for file in (server.base / "input" / folder).iterdir()} == {"a.png", "b.jpg", "c.jpg", "c.txt"}
    assert page.evaluate("app.graph.serialize().nodes[0].widgets_values") == [folder, "", "keep shape", 512]
    assert run(page, server) == 3

    pick(page, files(d_jpg=picture("white")))
    expect(count(page)).to_have_text("4 pictures")
    assert widget(page, "folder") == folder
    assert run(page, server) == 4, "the node runs again for a new picture"


def test_dropped_pictures_are_added_wherever_on_the_node(page):
    box = page.locator(".ti-pictures-list").bounding_box()
    drop(page, THREE, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(tiles(page)).to_have_count(3)
    drop(page, files(d_jpg=picture("white")), box["x"] + box["width"] / 2, box["y"] - 60)  # on the widgets
    expect(tiles(page)).to_have_count(4)
    assert page.evaluate("app.graph.nodes.length") == 1, "ComfyUI must not open them itself"


def test_a_workflow_dropped_on_the_node_is_opened(page):
    box = page.locator(".ti-pictures-list").bounding_box()
    workflow = b'{"nodes": [], "links": [], "version": 0.4}'
    drop(page, files(empty_json=workflow), box["x"] + 50, box["y"] + 50)
    page.wait_for_function("app.graph.nodes.length === 0")


def test_taken_names_and_captions(page, server):
    pick(page, THREE)
    expect(tiles(page)).to_have_count(3)
    pick(page, files(c_jpg=picture("black"), c_txt=b"a black thing", b_txt=b"a red thing", notes_json=b"{}"))
    expect(tiles(page)).to_have_count(4)
    expect(note(page)).to_have_text("Skipped, neither a picture nor a caption: notes.json.")
    folder = server.base / "input" / widget(page, "folder")
    captions = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert captions == {"c.txt": "a blue thing\n", "c (1).txt": "a black thing", "b.txt": "a red thing"}

    pick(page, files(c_txt=b"another", z_txt=b"nobody's"))
    expect(note(page)).to_contain_text("Skipped c.txt: the picture already has another caption.")
    expect(note(page)).to_contain_text("Skipped z.txt: there is no picture with that name.")
    assert {file.name: file.read_text() for file in folder.glob("*.txt")} == captions

    pick(page, files(broken_png=b"no picture"))
    expect(note(page)).to_have_text("Added, but cannot be read as a picture: broken.png.")
    expect(tiles(page)).to_have_count(4)


def test_other_places(page, tmp_path):
    choose(page, "folder", "pictures")
    expect(tiles(page)).to_have_count(2)
    choose(page, "path", str(tmp_path))
    expect(page.locator(".ti-pictures-list")).to_contain_text("inside ComfyUI's input folder")
    expect(tiles(page)).to_have_count(0)
    expect(page.get_by_role("button", name="Add pictures")).to_be_disabled()
    choose(page, "path", "")
    expect(tiles(page)).to_have_count(2)
    page.evaluate(
        """() => {
            const [node] = app.graph.nodes;
            const text = LiteGraph.createNode("PrimitiveString");
            app.graph.add(text);
            text.connect(0, node, node.inputs.findIndex(input => input.name === "path"));
        }"""
    )
    expect(page.locator(".ti-pictures-list")).to_contain_text("comes from another node")
    page.evaluate("app.graph.remove(app.graph.nodes[1])")
    expect(tiles(page)).to_have_count(2)
    choose(page, "folder", "nowhere")
    expect(note(page)).to_contain_text("'nowhere' does not exist")


def test_the_list_follows_the_folder(page, server):
    pick(page, THREE)
    expect(tiles(page)).to_have_count(3)
    folder = server.base / "input" / widget(page, "folder")

    (folder / "d.jpg").write_bytes(picture("white"))
    page.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    expect(tiles(page)).to_have_count(4)

    (folder / "a.png").unlink()
    page.evaluate(
        """async () => {
            const preview = LiteGraph.createNode("PreviewImage");
            app.graph.add(preview);
            app.graph.nodes[0].connect(0, preview, 0);
            await app.queuePrompt(0);
        }"""
    )
    expect(tiles(page)).to_have_count(3)

    page.evaluate("app.loadGraphData(app.graph.serialize())")
    expect(tiles(page)).to_have_count(3)
    assert widget(page, "folder") == folder.name


def test_failures_are_one_sentence(page):
    page.route("**/upload/image", lambda route: route.fulfill(status=413))
    pick(page, THREE)
    expect(note(page)).to_have_text("ComfyUI refused b.jpg (error 413).")
    assert widget(page, "folder") == "."
    page.route("**/upload/image", lambda route: route.abort())
    pick(page, THREE)
    expect(note(page)).to_have_text("ComfyUI does not respond: check whether it is still running.")
    expect(page.get_by_role("button", name="Add pictures")).to_be_enabled()


def test_route_lists_what_the_node_loads(server):
    folder = server.base / "input/listed"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "turned.jpg").write_bytes(picture("red", exif=turned.tobytes()))
    (folder / "hole.png").write_bytes(picture("red", hole=True))
    (folder / "hole.txt").write_text("\ufeffgroße Lücke\n", encoding="utf-8")
    (folder / "notes.md").write_text("no picture")
    pixels = np.zeros((4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(server.base / "elsewhere.png")
    (folder / "link.png").symlink_to(server.base / "elsewhere.png")
    (server.base / "input/out").symlink_to(server.base / "output", target_is_directory=True)
    try:
        answer = server.http.get(server.url + ROUTE, params={"folder": "listed"}, timeout=10).json()
        assert "listed" in answer["folders"]
        hole, upright = answer["pictures"]
        assert (hole["name"], hole["caption"], hole["masked"]) == ("hole.png", "große Lücke", True)
        assert (upright["name"], upright["caption"], upright["masked"]) == ("turned.jpg", "", False)
        assert (upright["width"], upright["height"]) == (32, 48)
        small = server.http.get(server.url + THUMBNAIL, params={"folder": "listed", "name": "turned.jpg"}, timeout=10)
        with Image.open(io.BytesIO(small.content)) as shown:
            assert shown.size == (32, 48)
        for name in ("link.png", "notes.md", "missing.png", "../../elsewhere.png"):
            refused = server.http.get(server.url + THUMBNAIL, params={"folder": "listed", "name": name}, timeout=10)
            assert refused.status_code == 404, name
        for outside in ("..", "listed/../..", "../output", "/", str(server.base / "output"), "out"):
            refused = server.http.get(server.url + ROUTE, params={"folder": outside}, timeout=10)
            assert refused.status_code == 400, outside
            assert "is outside ComfyUI's input folder" in refused.json()["error"]
    finally:
        (server.base / "input/out").unlink()
        (server.base / "elsewhere.png").unlink()
        shutil.rmtree(folder)
