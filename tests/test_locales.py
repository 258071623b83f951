"""Node names and tooltips in other languages: complete, about what exists, and what ComfyUI's page shows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dev.comfyui_server import ComfyServer

LOCALES = Path(__file__).resolve().parent.parent / "locales"
LANGUAGES = ["de", "es", "fr", "ja", "ko", "zh", "zh-TW"]  # English is in the nodes' schemas
# What users type or look for, and numbers, are the same in every language.
LITERAL = re.compile(r'"[^"]+"|\{\}|embedding:NAME|NAME(?:[.-]\w+)?|\(word:[\d.]+\)|\d+(?:\.\d+)?')


@pytest.fixture(scope="module")
def schemas(server: ComfyServer) -> dict[str, dict]:
    return {name: node for name, node in server.object_info().items() if name.startswith("TI_")}


def inputs_of(node: dict) -> dict[str, dict]:
    """The options of every input, by name."""
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    return {name: options for name, (_, options) in inputs.items()}


@pytest.fixture(scope="module")
def english(schemas) -> dict[str, str]:
    """All texts in the schemas of the nodes, by the keys of ``texts``."""
    nodes = {}
    for name, node in schemas.items():
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        nodes[name] = {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                key: {"name": options.get("display_name", key), "tooltip": options["tooltip"]}
                for key, options in inputs_of(node).items()
            },
            "outputs": {str(i): {"name": key, "tooltip": tooltip} for i, (key, tooltip) in enumerate(outputs)},
        }
    return texts(nodes)


def texts(tree: dict, path: str = "") -> dict[str, str]:
    """``{"TI_Train.inputs.model.name": ...}`` of a nodeDefs.json."""
    found = {}
    for key, value in tree.items():
        found |= texts(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def read(language: str) -> dict[str, str]:
    return texts(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def test_no_other_languages():
    assert sorted(path.name for path in LOCALES.iterdir()) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(language, english):
    translated = read(language)
    assert translated.keys() == english.keys()
    for key, text in translated.items():
        assert text.strip(), f"{key} is empty"
        # Inputs may keep their names, as "vae" does.
        assert key.endswith(".name") or text != english[key], f"{key} is English"


@pytest.mark.parametrize("language", LANGUAGES)
def test_literals_stay(language, english):
    translated = read(language)
    for key, text in english.items():
        for literal in LITERAL.findall(text):
            assert literal in translated[key], f"{key} lacks {literal}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_choices_keep_their_names(language, english, schemas):
    """ComfyUI shows the choices of a list untranslated, so a tooltip that explains one says its name."""
    translated = read(language)
    checked = 0
    for name, node in schemas.items():
        for key, options in inputs_of(node).items():
            if key in ("folder", "file", "partner"):  # names of what is on the disk
                continue
            place = f"{name}.inputs.{key}.tooltip"
            for choice in options.get("options", []):
                if choice in english[place].casefold():
                    assert choice in translated[place].casefold(), f"{place} lacks {choice}"
                    checked += 1
    assert checked


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_use_the_translated_names_of_nodes(language, english):
    translated = read(language)
    names = {english[key]: translated[key] for key in english if key.endswith(".display_name")}
    assert len(set(names.values())) == len(names), "two nodes with one name"
    for key, text in english.items():
        for name in names:
            if name in text:
                assert names[name] in translated[key], f"{key} lacks {names[name]}"


def choose(server: ComfyServer, settings: dict[str, str | bool]) -> None:
    server.http.post(f"{server.url}/settings", json=settings, timeout=10).raise_for_status()


# ComfyUI 0.30's page knows no German yet (its later versions do): it shows the schema's English.
@pytest.fixture(params=["fr", "zh-TW"])
def language(request, server: ComfyServer) -> Iterator[str]:
    """What ComfyUI is set to; English afterwards, for the other tests with the same server."""
    # A new user would be greeted with a dialog.
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": True}
    choose(server, {**settings, "Comfy.Locale": request.param})
    yield request.param
    choose(server, {"Comfy.Locale": "en"})


@pytest.fixture
def page(language: str, server: ComfyServer, chromium: Browser) -> Iterator[Page]:
    """ComfyUI in a browser, with one Train node."""
    expect.set_options(timeout=20_000)
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    page.goto(server.url)
    page.wait_for_function("window.app?.extensionManager && document.querySelector('#graph-canvas')")
    page.wait_for_function("window.LiteGraph?.registered_node_types.TI_Train && app.graph")
    page.evaluate(
        """async () => {
            const node = { id: 1, type: "TI_Train", pos: [100, 100] };
            await app.loadGraphData({ id: crypto.randomUUID(), nodes: [node], links: [], version: 0.4 });
            app.canvas.ds.reset();
            app.canvas.setDirty(true, true);
        }"""
    )
    yield page
    page.close()


def test_page_shows_the_translation(page, language):
    words = read(language)
    node = page.locator("[data-node-id='1']")
    for key in ("display_name", "inputs.images.name", "inputs.batch_size.name", "outputs.1.name"):
        expect(node.get_by_text(words[f"TI_Train.{key}"], exact=True)).to_be_visible()
    node.get_by_label(words["TI_Train.inputs.template.name"]).hover()
    expect(page.get_by_text(words["TI_Train.inputs.template.tooltip"])).to_be_visible()
