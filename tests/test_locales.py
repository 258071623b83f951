"""Texts in other languages (nodes, panel, picture list): complete, about what exists, and what the page shows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import opened
from playwright.sync_api import Browser, Page, expect

from dev.comfyui_server import ComfyServer

LOCALES = Path(__file__).resolve().parent.parent / "locales"
ENGLISH = "en"  # has only a main.json: what is in nodeDefs.json stands in the nodes' schemas
# What the newest front end ships. It would offer nobody another language, such as German.
LANGUAGES = ["ar", "es", "fa", "fr", "he", "it", "ja", "ko", "pt-BR", "ru", "tr", "zh", "zh-TW"]
# What users type or look for, and numbers, are the same in every language.
LITERAL = re.compile(r'"[^"]+"|\{\}|embedding:NAME|NAME(?:[.-]\w+)?|\(word:[\d.]+\)|\d+(?:\.\d+)?')
LITERAL_ON_PAGE = re.compile(r"\{\w+\}|cat\.[a-z]+|--[a-z-]+")  # placeholders, files and options


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


def read(language: str, file: str = "nodeDefs.json") -> dict[str, str]:
    return texts(json.loads((LOCALES / language / file).read_text(encoding="utf-8")))


def test_no_other_languages():
    assert sorted(path.name for path in LOCALES.iterdir()) == sorted([ENGLISH, *LANGUAGES])


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_page_is_translated(language):
    """The texts of the panel and of the picture list."""
    english, translated = read(ENGLISH, "main.json"), read(language, "main.json")
    assert translated.keys() == english.keys()
    same = []
    for key, text in english.items():
        assert translated[key].strip(), f"{key} is empty"
        literals = sorted(LITERAL_ON_PAGE.findall(text))
        assert sorted(LITERAL_ON_PAGE.findall(translated[key])) == literals, f"{key} has not {literals}"
        is_unit = not re.search("[a-z]{4}", LITERAL_ON_PAGE.sub("", text))  # as in "5 min 3 s"
        if translated[key] == text and not is_unit:
            same.append(key)
    assert len(same) <= 2, f"English: {same}"  # a word may be the same


@pytest.fixture(params=["fr", "zh-TW"])
def language(request) -> str:
    return request.param


@pytest.fixture
def page(language: str, server: ComfyServer, chromium: Browser) -> Iterator[Page]:
    """ComfyUI in a browser and in this language, with Train (node 1) and Load Images (node 2)."""
    with opened(server, chromium, "vue", **{"Comfy.Locale": language}) as page:
        page.evaluate(
            """async () => {
                const nodes = ["TI_Train", "TI_LoadImages"].map((type, i) => (
                    { id: i + 1, type, pos: [100 + 500 * i, 100] }
                ));
                await app.loadGraphData({ id: crypto.randomUUID(), nodes, links: [], version: 0.4 });
                app.canvas.ds.reset();
                app.canvas.setDirty(true, true);
            }"""
        )
        yield page
    # English again, for the other tests with the same server.
    server.http.post(f"{server.url}/settings", json={"Comfy.Locale": "en"}, timeout=60).raise_for_status()


def test_page_shows_the_translation(page, language):
    words, on_page = read(language), read(language, "main.json")
    train, pictures = page.locator("[data-node-id='1']"), page.locator("[data-node-id='2']")
    for key in ("display_name", "inputs.images.name", "inputs.batch_size.name", "outputs.1.name"):
        expect(train.get_by_text(words[f"TI_Train.{key}"], exact=True)).to_be_visible()
    expect(train.locator(".ti-hint")).to_have_text(on_page["textual_inversion.panel.hint"])
    expect(pictures.locator(".ti-pictures-list")).to_have_text(on_page["textual_inversion.pictures.none"])
    expect(pictures.get_by_role("button", name=on_page["textual_inversion.pictures.add"])).to_be_visible()
    train.get_by_label(words["TI_Train.inputs.preview_prompt.name"]).hover()
    expect(page.get_by_text(words["TI_Train.inputs.preview_prompt.tooltip"])).to_be_visible()


def test_broken_texts_of_another_pack_cost_none_of_ours(chromium, tmp_path):
    """ComfyUI then sends nobody any texts. It sends none either where its folder has a bracket in its name."""
    (tmp_path / "locales/en").mkdir(parents=True)
    (tmp_path / "locales/en/main.json").write_bytes('{"x": "中文"}'.encode("gbk"))
    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    with ComfyServer(packs={"broken": tmp_path}) as server:
        assert server.http.get(f"{server.url}/i18n", timeout=60).status_code == 500
        with opened(server, chromium, "canvas") as page:
            page.evaluate("app.graph.add(LiteGraph.createNode('TI_LoadImages'))")
            expect(page.locator(".ti-pictures")).to_be_attached()
