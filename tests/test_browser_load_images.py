"""Load Images in a real browser, in both renderers of both front ends: pictures in, changes, graph, what goes wrong."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from mimetypes import guess_type

import pytest
from browser import PALETTES, contrast, drop_folder, opened, use_palette, wait_until
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect

from dev.comfyui_server import ComfyError, ComfyServer

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
    expect(tab.locator(".ti-pictures-list")).to_contain_text("Drop pictures here")
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


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
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
    expect(count(page)).to_have_text("3 pictures, 1 with captions")
    expect(note(page)).to_be_hidden()
    images = page.locator(".ti-picture img")
    assert [image.get_attribute("alt") for image in images.all()] == ["a.png", "b.jpg", "c.jpg"]
    for image in images.all():
        expect(image).to_have_js_property("naturalWidth", 48)
    assert [tile.locator(".ti-mark-mask").count() for tile in tiles(page).all()] == [1, 0, 0]
    assert [tile.locator(".ti-mark-caption").count() for tile in tiles(page).all()] == [0, 0, 1]
    expect(tiles(page).nth(2).locator(".ti-open")).to_have_attribute(
        "title", re.compile("c.jpg\n48 × 32\na blue thing")
    )

    folder = widget(page, "folder")
    assert folder == "pictures-2", "input/pictures is there already, and not ours to fill"
    expect(page.locator(".lg-node").get_by_text(folder)).to_have_count(page.locator(".lg-node").count())
    assert {file.name for file in (server.base / "input" / folder).iterdir()} == {"a.png", "b.jpg", "c.jpg", "c.txt"}
    assert page.evaluate("app.graph.serialize().nodes[0].widgets_values") == [folder, "", "keep shape", 512]
    assert run(page, server) == 3

    pick(page, files(d_jpg=picture("white")))
    expect(count(page)).to_have_text("4 pictures, 1 with captions")
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
    assert captions == {"c.txt": "a blue thing\n", "c (1).txt": "a black thing\n", "b.txt": "a red thing\n"}

    pick(page, files(c_txt=b"another", z_txt=b"nobody's"))
    expect(note(page)).to_contain_text("Skipped c.txt: the picture already has another caption.")
    expect(note(page)).to_contain_text("Skipped z.txt: there is no picture with that name.")
    assert {file.name: file.read_text() for file in folder.glob("*.txt")} == captions

    before = sorted(folder.iterdir())
    pick(
        page,
        files(broken_png=b"no picture", phone_heic=HEIC, text_txt="Größe".encode("latin-1"), e_jpg=THREE[0]["buffer"]),
    )
    expect(note(page)).to_contain_text("Left out broken.png: it is damaged, or no picture")
    expect(note(page)).to_contain_text("Left out phone.heic: it is damaged")
    expect(tiles(page)).to_have_count(5)
    assert sorted(folder.iterdir()) == sorted([*before, folder / "e.jpg"]), "nothing unusable is left behind"


def test_a_folder_that_is_not_there_is_made(page, server):
    """As in a template: the name of a folder that nobody has, and a new one named in the node."""
    choose(page, "folder", "my own/cat")
    expect(count(page)).to_have_text("0 pictures")
    expect(note(page)).to_be_hidden()
    with pytest.raises(ComfyError, match="Load Images has no pictures: press 'Add pictures'"):
        run(page, server)
    pick(page, THREE)
    expect(tiles(page)).to_have_count(3)
    assert widget(page, "folder") == "my own/cat"
    assert (server.base / "input/my own/cat/a.png").is_file()
    assert run(page, server) == 3

    page.get_by_role("button", name="New folder").click()
    page.get_by_role("dialog").get_by_role("textbox").fill("my dog")
    page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    expect(count(page)).to_have_text("0 pictures")
    assert widget(page, "folder") == "my dog"
    pick(page, THREE[:1])
    expect(tiles(page)).to_have_count(1)
    assert (server.base / "input/my dog/b.jpg").is_file()

    choose(page, "folder", "a:b")
    expect(note(page)).to_contain_text("No folder can be called 'a:b'")
    page.evaluate("app.loadGraphData(app.graph.serialize())")
    expect(note(page)).to_contain_text("No folder can be called 'a:b'")


def test_the_input_folder_itself_still_works(page, server):
    """As in workflows of before: '.' is all that lies in it; pictures that are added get a folder of their own."""
    picture_of_others = server.base / "input/others.png"
    picture_of_others.write_bytes(picture("red", hole=True))
    try:
        choose(page, "folder", ".")
        expect(tiles(page)).to_have_count(1)
        assert run(page, server) == 1
        pick(page, THREE)
        expect(tiles(page)).to_have_count(3)
        assert widget(page, "folder") == "pictures-2"
    finally:
        picture_of_others.unlink()


def test_a_dropped_folder_adds_its_pictures(page, server, tmp_path):
    folder = tmp_path / "tabby"
    (folder / "more/.hidden").mkdir(parents=True)
    for file in THREE:
        (folder / file["name"]).write_bytes(file["buffer"])
    (folder / "more/d.jpg").write_bytes(picture("white"))
    (folder / "more/.hidden/e.jpg").write_bytes(picture("white"))
    (folder / "notes.md").write_text("no picture")
    drop_folder(page, folder)
    expect(tiles(page)).to_have_count(4)
    expect(count(page)).to_have_text("4 pictures, 1 with captions")
    expect(note(page)).to_have_text("Skipped, neither a picture nor a caption: notes.md.")
    assert widget(page, "folder") == "tabby"


def test_a_dropped_folder_of_folders_adds_concepts(page, server, tmp_path):
    folder = tmp_path / "pets"
    for file in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(picture("red"))
    (folder / "cat/1.txt").write_text("a red {}")
    (folder / "notes").mkdir()
    (folder / "notes/list.md").write_text("no picture")
    drop_folder(page, folder)
    expect(count(page)).to_have_text("2 concepts, 3 pictures, 1 with captions")
    expect(note(page)).to_have_text("Skipped, neither a picture nor a caption: list.md.")
    assert widget(page, "folder") == "pets"
    expect(tiles(page)).to_have_text(["cat2", "dog1"])
    expect(tiles(page).last.locator("img")).to_have_js_property("naturalWidth", 48)
    assert run(page, server) == 3

    tiles(page).first.locator(".ti-open").click()
    dialog = page.locator("dialog.ti-full-size")
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_role("textbox")).to_have_value("a red {}")
    page.keyboard.press("ArrowLeft")
    dialog.get_by_role("textbox").fill("a {} in red")
    page.keyboard.press("Escape")
    expect(count(page)).to_have_text("2 concepts, 3 pictures, 2 with captions")
    assert (server.base / "input/pets/cat/0.txt").read_text() == "a {} in red\n"

    drop_folder(page, folder / "dog")  # pictures beside folders
    expect(count(page)).to_have_text("1 picture")
    expect(note(page)).to_contain_text("Left out cat/: it is a folder beside pictures: only these are read.")


def test_captions_of_a_dropped_folder_go_to_the_pictures_beside_them(page, server, tmp_path):
    """Pictures of the same name in several folders, captions in a folder apart, and a folder nobody can make."""
    library = tmp_path / "things"
    for file in ("mug/front/1", "mug/back/1", "a: bad/1", "cup/1"):
        (library / file).parent.mkdir(parents=True)
        (library / f"{file}.jpg").write_bytes(picture("red", size=(len(file) * 8, 32)))
        (library / f"{file}.txt").write_text(f"a {file}")
    (library / "cup/texts").mkdir()
    (library / "cup/2.jpg").write_bytes(picture("blue"))
    (library / "cup/texts/2.txt").write_text("apart")
    drop_folder(page, library)
    expect(count(page)).to_have_text("2 concepts, 4 pictures, 4 with captions")
    expect(note(page)).to_have_text(re.compile("No folder can be called 'things/a: bad'"))
    added = server.base / "input/things"
    for name in ("mug/front/1", "mug/back/1", "cup/1"):
        (own,) = (file for file in added.rglob("*.jpg") if Image.open(file).width == len(name) * 8)
        assert own.with_suffix(".txt").read_text().strip() == f"a {name}"
    assert (added / "cup/2.txt").read_text().strip() == "apart"


def test_looking_at_a_caption_does_not_change_its_file(page, server):
    pick(page, files(a_png=picture("red"), a_txt=b"a photo of {}\r\non grass\r\n"))
    expect(count(page)).to_have_text("1 picture, 1 with captions")
    (file,) = (server.base / "input" / widget(page, "folder")).glob("*.txt")
    before = file.read_bytes(), file.stat().st_mtime_ns
    tiles(page).first.locator("button").first.click()
    expect(page.locator("dialog textarea")).to_have_value("a photo of {}\non grass")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    pick(page, files(b_png=picture("blue")))
    expect(tiles(page)).to_have_count(2)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_pasted_pictures_are_added(page):
    paste = """([data, selector]) => {
        const clipboardData = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
        const target = document.querySelector(selector);
        target.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
    }"""
    for number, (colour, selector) in enumerate([("red", ".ti-pictures-list"), ("blue", "body")], 1):
        if selector == "body":
            page.evaluate("app.canvas.selectItems([app.graph.nodes[0]])")
        page.evaluate(paste, [base64.b64encode(picture(colour, hole=True)).decode(), selector])
        expect(tiles(page)).to_have_count(number)
    assert page.evaluate("app.graph.nodes.length") == 1, "ComfyUI must not make a node of it"
    assert [image.get_attribute("alt") for image in page.locator(".ti-picture img").all()] == [
        "image (1).png",
        "image.png",
    ]


def test_a_picture_is_enlarged_described_and_deleted(page, server):
    pick(page, THREE)
    expect(count(page)).to_have_text("3 pictures, 1 with captions")
    folder = server.base / "input" / widget(page, "folder")
    tiles(page).nth(1).locator(".ti-open").click()
    dialog = page.locator("dialog.ti-full-size")
    expect(dialog).to_contain_text("b.jpg, 48 × 32")
    expect(dialog.locator("img")).to_have_js_property("naturalWidth", 48)
    page.keyboard.press("ArrowRight")
    expect(dialog).to_contain_text("c.jpg")
    expect(dialog.get_by_role("textbox")).to_have_value("a blue thing")
    page.keyboard.press("ArrowLeft")
    dialog.get_by_role("textbox").fill("a red thing")
    dialog.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(dialog.get_by_role("textbox")).to_have_value("a red thing")
    dialog.get_by_role("textbox").fill("a rote Fläche, ß")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(count(page)).to_have_text("3 pictures, 2 with captions")
    wait_until(lambda: (folder / "b.txt").read_text(encoding="utf-8") == "a rote Fläche, ß\n")

    tiles(page).nth(1).hover()
    tiles(page).nth(1).locator(".ti-remove").click()
    question = page.get_by_role("dialog")
    expect(question).to_contain_text(f"Delete from the folder {folder.name}? This cannot be undone.")
    expect(question.get_by_role("listitem")).to_have_text(["b.jpg", "b.txt"])
    question.get_by_role("button", name="Cancel").click()
    expect(question).to_have_count(0)
    assert (folder / "b.jpg").is_file()
    tiles(page).nth(1).locator(".ti-open").click()
    dialog.get_by_role("button", name="Delete").click()
    question.get_by_role("button", name="Delete").click()
    expect(count(page)).to_have_text("2 pictures, 1 with captions")
    assert {file.name for file in folder.iterdir()} == {"a.png", "c.jpg", "c.txt"}


def test_damage_behind_the_beginning_of_a_file_is_named(page, server):
    """The list reads only heads of files: the thumbnail finds out, and so does a run."""
    folder = server.base / "input/damaged"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture("red"))
    for name in "bcdefgh":
        (folder / f"{name}.jpg").write_bytes(picture("red", size=(400, 400))[:-500])
    (folder / "a.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "empty.png").write_bytes(b"")
    choose(page, "folder", "damaged")
    for text in ("a.txt: it is not UTF-8", "empty.png: it is empty", "b.jpg: it is damaged"):
        expect(note(page)).to_contain_text(f"Left out {text}")
    expect(note(page)).to_contain_text("Left out 4 more files.")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = prompt
    left_out = server.run(prompt | {"seen": {"class_type": "PreviewImage", "inputs": {"images": [node, 0]}}})
    names = [file["name"] for file in left_out.history["outputs"][node]["left_out"]]
    assert names == sorted(["a.txt", *(f"{name}.jpg" for name in "bcdefgh"), "empty.png"])


@pytest.mark.looks
def test_words_can_be_read_in_every_palette(page, server):
    pick(page, [*THREE, *files(broken_png=b"no picture")])
    expect(note(page)).to_contain_text("Left out broken.png")
    measured = {}
    for palette in PALETTES:
        use_palette(page, palette)
        for words in (".ti-pictures-note", ".ti-pictures-count", ".ti-button >> nth=-1"):
            measured[palette, words] = contrast(page.locator(f".ti-pictures {words}"))
        tiles(page).first.locator(".ti-open").click()
        for words in ("textarea", "div"):
            measured[palette, words] = contrast(page.locator(f"dialog.ti-full-size {words}"))
        page.keyboard.press("Escape")
    choose(page, "folder", "")
    expect(page.locator(".ti-empty")).to_be_visible()
    measured["empty"] = contrast(page.locator(".ti-empty"))
    assert min(measured.values()) >= 4.5, measured


def test_other_places(page, server, tmp_path):
    choose(page, "folder", "pictures")
    expect(tiles(page)).to_have_count(2)
    choose(page, "path", str(tmp_path))
    expect(note(page)).to_contain_text("There is no folder")
    expect(note(page)).to_contain_text("TEXTUAL_INVERSION_FOLDERS")
    expect(tiles(page)).to_have_count(0)
    expect(page.get_by_role("button", name="Add pictures")).to_be_disabled()
    elsewhere = server.base / "output/drawn"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "a.png").write_bytes(picture("red", hole=True))
    choose(page, "path", f'"{elsewhere}"')
    expect(tiles(page)).to_have_count(1)
    expect(page.locator(".ti-picture img")).to_have_js_property("naturalWidth", 48)
    expect(page.locator(".ti-remove")).to_have_count(0)
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
    page.route("**/pictures?*name=*", lambda route: route.fulfill(status=413))
    pick(page, THREE[:1])
    expect(note(page)).to_have_text(
        "Left out b.jpg: it is larger than ComfyUI accepts (see its option --max-upload-size)."
    )
    assert widget(page, "folder") == ""
    refusal = {"error": "The file system refuses this (no space left on device): check the folder."}
    page.route("**/pictures?*name=*", lambda route: route.fulfill(status=400, json=refusal))
    pick(page, THREE[:1])
    expect(note(page)).to_have_text(
        "Left out b.jpg: The file system refuses this (no space left on device): check the folder."
    )
    page.route("**/pictures?*name=*", lambda route: route.abort())
    pick(page, THREE)
    expect(note(page)).to_have_text("ComfyUI does not respond: check whether it is still running.")
    expect(page.get_by_role("button", name="Add pictures")).to_be_enabled()
