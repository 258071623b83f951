"""The live panel of the Train node in a real browser: on the canvas and in Vue nodes, against the real server."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PALETTES, contrast, open_comfyui, opened, use_palette, wait_until
from playwright.sync_api import Browser, Locator, Page, expect

from dev.comfyui_server import ComfyServer
from textual_inversion import formats

LOAD, IMAGES, SETTINGS, TRAIN, REPORT, SECOND, SECOND_REPORT, CAPTION = map(str, range(1, 9))
ENDLESS = 100_000  # steps: a run that only ends when it is told to
_seeds = itertools.count(1)  # ComfyUI would not run the same graph twice


@pytest.fixture(scope="module")
def server(interface) -> ComfyServer:
    return interface.server


@pytest.fixture(scope="module")
def page(interface, chromium: Browser) -> Iterator[Page]:
    with opened(interface.server, chromium, interface.renderer) as page:
        yield page


@pytest.fixture(autouse=True)
def idle_afterwards(server) -> Iterator[None]:
    """Ends what a test left running."""
    yield
    if is_running(server):
        server.interrupt()
        wait_until(lambda: not is_running(server))


def test_a_run_is_seen_and_stopped(page, server):
    load(page, graph(steps=ENDLESS, preview_every=10))
    panel = show(page)
    expect(panel).to_contain_text("appear here during training")

    queue(page)
    expect(run(panel, "learning")).to_contain_text("pictures/s")
    wait_until(lambda: points(panel) > 2)
    earlier = points(panel)
    wait_until(lambda: points(panel) > earlier)
    expect(panel.locator(".ti-strip img").first).to_have_js_property("naturalWidth", 64)
    assert pictures_outside(page, panel) == 0, "ComfyUI shows the pictures once more"

    panel.get_by_role("button", name="Stop and keep").click()
    expect(run(panel, "done")).to_contain_text("Stopped by hand")
    expect(panel.get_by_role("button", name="Stop and keep")).to_be_disabled()
    expect(panel.get_by_role("button", name="Preview now")).to_be_disabled()
    wait_until(lambda: not is_running(server))
    history = server.http.get(f"{server.url}/history?max_items=1", timeout=60).json()
    (outputs,) = [entry["outputs"] for entry in history.values()]
    assert "Stopped by hand" in outputs[REPORT]["text"][0], "the nodes behind did not run"


def test_a_preview_is_kept_during_and_after_the_run(page, server):
    load(page, graph(trigger="Kzept", steps=ENDLESS, preview_every=10, preview_prompt="a photo of {}\n{} in the snow"))
    queue(page)
    panel, pictures = show(page), show(page).locator(".ti-strip button")
    expect(pictures.nth(1)).to_be_visible()
    expect(pictures.first.locator("img")).to_have_js_property("naturalWidth", 2 * 64)  # one beside the other

    pictures.nth(1).click()
    page.get_by_role("button", name="Keep this one").click()
    page.keyboard.press("Escape")
    expect(run(panel, "done")).to_contain_text("to keep what the preview of step 10 shows")
    expect(pictures.last).to_contain_text("result")
    assert steps_of(max((server.base / "temp/textual_inversion").glob("Kzept*"), key=os.path.getmtime)) == 10

    pictures.first.click()
    page.get_by_role("button", name="Keep this one").click()
    expect(page.get_by_text(re.compile(r"^Saved\. Write embedding:Kzept-step-0"))).to_be_visible()
    page.keyboard.press("Escape")
    (saved,) = (server.base / "models/embeddings").glob("Kzept-step-0*")
    assert steps_of(saved) == 0
    saved.unlink()


def steps_of(path: Path) -> int:
    return int(formats.read(path).metadata["steps"])


def test_a_click_that_does_not_reach_the_server_can_be_repeated(page, server):
    load(page, graph(steps=ENDLESS))
    panel = show(page)
    queue(page)
    expect(run(panel, "learning")).to_be_visible()
    stop, address = panel.get_by_role("button", name="Stop and keep"), re.compile("/runs/.*/stop")
    page.route(address, lambda route: route.abort())
    stop.click()
    expect(page.get_by_text("ComfyUI did not accept this.").last).to_be_visible()
    page.unroute(address)
    stop.click()
    expect(run(panel, "done")).to_contain_text("Stopped by hand")


def test_preview_now_and_full_size(page):
    load(page, graph(steps=ENDLESS))
    panel = show(page)
    queue(page)
    expect(run(panel, "learning")).to_be_visible()
    pictures = panel.locator(".ti-strip button")
    for count in (1, 2):
        panel.get_by_role("button", name="Preview now").click()
        expect(pictures).to_have_count(count)

    dialog = page.locator("dialog.ti-full-size")
    for close in (lambda: page.keyboard.press("Escape"), dialog.click):
        pictures.first.click()
        expect(dialog).to_contain_text(pictures.first.inner_text())
        page.keyboard.press("ArrowRight")
        expect(dialog).to_contain_text(pictures.last.inner_text())
        close()
        expect(dialog).to_have_count(0)


def test_history_survives_a_reload_and_a_run_can_be_cancelled(page, server):
    workflow = load(page, graph(steps=ENDLESS))
    queue(page)
    panel = show(page)
    wait_until(lambda: points(panel) > 2)
    earlier = points(panel)

    page.wait_for_timeout(1000)  # ComfyUI writes the open workflow down a moment after it changed
    open_comfyui(page, server.url)
    page.wait_for_function("id => app.rootGraph.id === id", arg=workflow)
    panel = show(page)
    expect(run(panel, "learning")).to_be_visible()
    assert points(panel) >= earlier
    wait_until(lambda: points(panel) > earlier + 1)
    expect(panel.get_by_role("button", name="Stop and keep")).to_be_enabled()

    server.interrupt()
    expect(run(panel, "cancelled")).to_contain_text("Queue the workflow again to go on.")
    assert points(panel) > earlier, "the curve of a cancelled run stays"


@pytest.fixture
def library(server) -> Iterator[str]:
    """The name of a folder in input/ with three folders of pictures."""
    folder = server.base / "input/many"
    for concept in ("cat", "dog", "owl"):
        shutil.copytree(server.base / "input/pictures", folder / concept)
    yield folder.name
    shutil.rmtree(folder)


def test_the_concepts_of_a_run_are_listed_shown_and_stopped(page, server, library):
    many = graph(steps=ENDLESS, preview_every=10, trigger=[IMAGES, 3])
    many[IMAGES] = node("TI_LoadImages", folder=library, size=64)
    workflow = load(page, many)
    queue(page)
    panel = show(page)
    expect(names(panel)).to_have_text(["<cat>", "<dog>", "<owl>"])
    expect(run(panel, "learning")).to_contain_text("<cat> · Training")
    expect(option(panel, "is training <cat>")).to_have_attribute("aria-selected", "true")
    expect(option(panel, "waits for its turn <owl>")).to_be_visible()

    panel.get_by_role("button", name="Stop and keep").click()
    expect(panel).to_contain_text("1 of 3 done")
    expect(run(panel, "learning")).to_contain_text("<dog> · Training")  # the one that learns now
    option(panel, "done <cat> loss").click()
    expect(run(panel, "done")).to_contain_text("Stopped by hand")
    expect(panel.locator(".ti-strip button").last).to_contain_text("result")
    expect(panel.get_by_role("button", name="Stop and keep")).to_be_disabled()
    panel.get_by_role("listbox").press("ArrowDown")
    expect(run(panel, "learning")).to_contain_text("<dog> · Training")

    page.wait_for_timeout(1000)  # ComfyUI writes the open workflow down a moment after it changed
    open_comfyui(page, server.url)
    page.wait_for_function("id => app.rootGraph.id === id", arg=workflow)
    panel = show(page)
    expect(names(panel)).to_have_text(["<cat>", "<dog>", "<owl>"])
    expect(run(panel, "learning")).to_contain_text("<dog> · Training")

    panel.get_by_role("button", name="Stop all").click()
    expect(panel).to_contain_text("2 of 3 done")
    expect(panel.get_by_role("button", name="Stop all")).to_be_disabled()
    option(panel, "cancelled <owl>").click()
    expect(run(panel, "cancelled")).to_contain_text("Stopped before it began.")
    wait_until(lambda: not is_running(server))
    history = server.http.get(f"{server.url}/history?max_items=1", timeout=60).json()
    (outputs,) = [entry["outputs"] for entry in history.values()]
    assert [text.split(":")[0] for text in outputs[REPORT]["text"]] == ["<cat>", "<dog>"]


def test_five_hundred_concepts(page):
    """The list stays as high as for a few, each event is handled at once, and the keyboard reaches all."""
    workflow = load(page, graph())
    panel = show(page)
    send_concepts(page, workflow, 6, group="few")
    found = panel.get_by_role("listbox")
    height = found.evaluate("list => list.offsetHeight")
    waiting = send_concepts(page, workflow, 500, state="waiting")
    learning = send_concepts(page, workflow, 500)
    done = send_concepts(page, workflow, 500, state="done")
    print(f"\nms an event, median and most: {waiting}, {learning}, {done}")
    # A few ms each; where the work grew with the square of the concepts it would be seconds.
    assert max(median for median, _ in (waiting, learning, done)) < 500
    expect(panel).to_contain_text("500 of 500 done")
    assert found.evaluate("list => list.offsetHeight") == height
    assert found.evaluate("list => list.scrollHeight / list.clientHeight") == 100
    found.press("End")
    expect(run(panel, "done")).to_contain_text("<concept-499> · Done")
    assert found.evaluate("list => list.scrollTop + list.clientHeight === list.scrollHeight"), "out of sight"
    found.press("ArrowUp")
    expect(run(panel, "done")).to_contain_text("<concept-498> · Done")

    send_concepts(page, workflow, 2, group="next")  # a run replaces the one before
    expect(names(panel)).to_have_text(["<concept-0>", "<concept-1>"])
    record = {"run": "single", "group": "single", "concept": ""}
    page.evaluate(SEND, [workflow, TRAIN, [record]])
    expect(names(panel)).to_have_count(0)
    expect(panel.get_by_role("button", name="Stop all")).to_have_count(0)


def test_a_run_ends_while_another_workflow_is_open(page, server):
    load(page, graph(steps=40))
    queue(page)
    expect(run(show(page), "learning")).to_contain_text("step")
    load(page, graph(trigger="other"))
    ended = "window.ended = new Promise(done => comfyAPI.api.api.addEventListener('execution_success', done))"
    page.evaluate(f"() => {{ {ended} }}")
    assert is_running(server)
    page.evaluate("window.ended.then(() => null)")
    expect(show(page).get_by_text("appear here during training")).to_be_visible()


def test_a_cached_run_and_a_failed_one(page):
    once = graph()
    load(page, once)
    queue(page)
    expect(run(show(page), "done")).to_contain_text("Done after 3 steps")
    load(page, once)  # another workflow: the server has no run of it
    expect(show(page)).to_contain_text("appear here during training")
    queue(page)
    expect(run(show(page), "done")).to_contain_text("Done after 3 steps")

    load(page, graph(vectors=75))
    queue(page)
    failed = run(show(page), "failed")
    expect(failed).to_contain_text("use fewer vectors")
    expect(failed.locator(".ti-chart")).to_be_hidden()  # nothing was measured
    for line in failed.locator(".ti-message").all():
        assert line.evaluate("line => line.scrollWidth <= line.clientWidth"), "cut off"


def test_two_nodes_one_of_them_in_a_subgraph(page):
    two = graph()
    inputs = two[TRAIN]["inputs"] | {"steps": 5}
    two |= {SECOND: node("TI_Train", **inputs), SECOND_REPORT: node("PreviewAny", source=[SECOND, 3])}
    load(page, two)
    outer = page.evaluate(f"app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById({SECOND})])).node.id")
    queue(page)
    expect(run(show(page), "done")).to_contain_text("Done after 3 steps")
    page.evaluate(f"app.canvas.setGraph(app.rootGraph.getNodeById({outer}).subgraph)")
    expect(run(show(page), "done")).to_contain_text("Done after 5 steps")


def test_a_restart_of_the_server_ends_the_run_shown(page):
    workflow = load(page, graph())
    panel = show(page)
    record = {"run": "lost", "workflow": workflow, "node": TRAIN, "state": "learning", "message": "", "step": 1}
    record |= {"steps": 9, "learning_rate": 0.1, "rate": 1.0, "seconds_left": None, "best": 0}
    record |= {"planned": 9, "trend": "improving", "flat": 0}
    record |= {"losses": [[0, 0.2], [1, 0.1]], "fixed": [[0, 0.2]], "pictures": []}
    send = "([type, data]) => comfyAPI.api.api.dispatchCustomEvent(type, data)"
    page.evaluate(send, ["textual_inversion.run", record])
    expect(run(panel, "learning")).to_contain_text("step 1 of at most 9, 1.00 pictures/s")
    expect(run(panel, "learning")).to_contain_text("improving")

    panel.get_by_role("button", name="Preview now").click()
    expect(page.get_by_text("The run may have ended.").first).to_be_visible()
    page.evaluate(send, ["reconnected", None])
    expect(run(panel, "failed")).to_contain_text("Queue the workflow again")


def test_the_panel_is_no_part_of_the_workflow(page):
    load(page, graph(trigger="Zorp", preview_every=7))
    saved, prompt = page.evaluate("app.graphToPrompt().then(({workflow, output}) => [workflow, output])")
    (train,) = [item for item in saved["nodes"] if item["type"] == "TI_Train"]
    assert (train["widgets_values"][0], train["widgets_values"][-1]) == ("Zorp", 7)
    assert "training" not in prompt[TRAIN]["inputs"]


def test_the_wheel_still_zooms_the_canvas(page):
    load(page, graph())
    show(page).hover()
    before = page.evaluate("app.canvas.ds.scale")
    page.mouse.wheel(0, -100)
    page.wait_for_function("before => app.canvas.ds.scale > before", arg=before)


@pytest.mark.looks
def test_words_can_be_read_in_every_palette(page):
    load(page, graph())
    queue(page)
    panel = show(page)
    expect(run(panel, "done")).to_be_visible()
    run_words = (".ti-state", ".ti-line:nth-child(2)", ".ti-legend")
    for palette in PALETTES:
        use_palette(page, palette)
        for words in run_words:
            assert contrast(panel.locator(words)) > 4.5, (palette, words)
    workflow = load(page, graph())
    panel = show(page)
    send_concepts(page, workflow, 3, state="failed")
    concept_words = [".ti-summary", ".ti-group button"]
    for which in ("[aria-selected=true]", "[aria-selected=false] >> nth=0"):
        concept_words += [f"{which} >> {part}" for part in (".ti-sign", ".ti-name", ".ti-figure")]
    for palette in PALETTES:
        use_palette(page, palette)
        for words in concept_words:
            assert contrast(panel.locator(words)) > 4.5, (palette, words)


def graph(**widgets) -> dict:
    """Loader -> Train -> report, in ComfyUI's API format. Without a caption a long run would look for words first."""
    settings = {"evaluate_every": 3, "patience": 0, "preview_steps": 2}
    # Every widget that a test sets: the front end may keep that of the graph before.
    train = {"trigger": "S*", "initializer": "toy", "vectors": 1, "steps": 3, "batch_size": 1, "preview_every": 0}
    train |= {"size": 64, "seed": next(_seeds)} | widgets
    return {
        LOAD: node("CheckpointLoaderSimple", ckpt_name="toy.safetensors"),
        IMAGES: node("TI_LoadImages", folder="pictures", size=64),
        CAPTION: node("PrimitiveString", value="a photo of {}"),
        SETTINGS: node("TI_TrainingSettings", **settings),
        TRAIN: node(
            "TI_Train",
            model=[LOAD, 0],
            clip=[LOAD, 1],
            vae=[LOAD, 2],
            images=[IMAGES, 0],
            captions=[CAPTION, 0],
            settings=[SETTINGS, 0],
            **train,
        ),
        REPORT: node("PreviewAny", source=[TRAIN, 3]),
    }


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def load(page: Page, prompt: dict) -> str:
    """Opens a graph as a new workflow and returns its id."""
    page.evaluate("prompt => app.loadApiJson(prompt, 'test')", prompt)
    return page.evaluate("app.loadGraphData({...app.rootGraph.serialize(), id: null}).then(() => app.rootGraph.id)")


def queue(page: Page) -> None:
    page.evaluate("app.queuePrompt(0)")


def show(page: Page) -> Locator:
    """The panel of the Train node of the graph on screen, brought into view."""
    page.evaluate("""() => {
        const { pos } = app.canvas.graph.nodes.find((node) => node.comfyClass === "TI_Train");
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [400 - pos[0], 100 - pos[1]];
        app.canvas.setDirty(true, true);
    }""")
    return page.locator(".ti-train:visible")


# Sends records through ComfyUI's event channel and returns the milliseconds of each, with the layout that it causes.
SEND = """async ([workflow, node, records]) => {
    const times = [];
    for (const record of records) times.push(await send(record));
    return times;

    async function send(record) {
        const numbers = { step: 400, steps: 3000, planned: 800, learning_rate: 0.1, rate: 1, seconds_left: 9 };
        numbers.best = numbers.step;
        const losses = [...Array(401).keys()].map((step) => [step, 0.2 - step / 4000]);
        const fixed = losses.filter(([step]) => step % 10 === 0);
        const more = { state: "done", message: "", trend: "improving", flat: 0, losses, fixed, pictures: [] };
        const detail = { workflow, node, ...numbers, ...more, ...record };
        const began = performance.now();
        comfyAPI.api.api.dispatchCustomEvent("textual_inversion.run", detail);
        await new Promise(queueMicrotask); // behind the panel's own
        document.body.getBoundingClientRect();
        return performance.now() - began;
    }
}"""


def send_concepts(page: Page, workflow: str, count: int, state: str = "learning", group: str = "made up"):
    """One record for each of made-up concepts; returns the milliseconds an event took: the median and the most."""
    numbers = range(count)
    concepts = [{"run": f"{group}{n}", "concept": f"<concept-{n}>", "group": group, "state": state} for n in numbers]
    times = sorted(page.evaluate(SEND, [workflow, TRAIN, concepts]))
    return round(times[len(times) // 2], 1), round(times[-1], 1)


def names(panel: Locator) -> Locator:
    return panel.locator(".ti-concepts .ti-name")


def option(panel: Locator, name: str) -> Locator:
    """A concept in the list, by what a screen reader says."""
    return panel.get_by_role("option", name=name)


def run(panel: Locator, state: str) -> Locator:
    return panel.locator(f"[data-state={state}]")


def points(panel: Locator) -> int:
    """How many measurements on fixed noise the curve shows."""
    return (panel.locator(".ti-points").get_attribute("d") or "").count("M")


def pictures_outside(page: Page, panel: Locator) -> int:
    """How many pictures ComfyUI itself shows on the Train node."""
    on_canvas = page.evaluate(f"app.rootGraph.getNodeById({TRAIN}).imgs?.length ?? 0")
    in_vue = page.locator(f"[data-node-id='{TRAIN}'] img").count() - panel.locator("img").count()
    return on_canvas + max(0, in_vue)


def is_running(server: ComfyServer) -> bool:
    return bool(server.http.get(f"{server.url}/queue", timeout=60).json()["queue_running"])
