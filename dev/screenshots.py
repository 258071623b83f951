"""Pictures of the nodes for their help pages and README, from a real ComfyUI: python -m dev.screenshots"""

import io
import shutil
from typing import Any

from PIL import Image
from playwright.sync_api import Page, Playwright, sync_playwright

from demo.workflow import for_demo_model

from .comfyui_server import ComfyServer
from .get_browser import browser_path
from .get_comfyui import ROOT, newest_front_end

SETTINGS = {
    "Comfy.VueNodes.Enabled": True,
    "Comfy.TutorialCompleted": True,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
WORKFLOWS = {"Inspect and blend": "", "Train an embedding (SD1.5)": "heart"}  # templates, and what they learn
HELP = ROOT / "web/docs"
WIDTH = 420  # pixels of a picture
FRONT_END = ("--cpu", "--front-end-root", str(newest_front_end()))


def main() -> None:
    with ComfyServer(options=FRONT_END) as server, sync_playwright() as playwright:
        for concept in (ROOT / "demo/concepts").iterdir():
            if concept.is_dir():
                shutil.copytree(concept / "train", server.base / "input" / concept.name)
        shutil.copytree(ROOT / "demo/embeddings", server.base / "models/embeddings", dirs_exist_ok=True)
        page = opened(server, playwright)
        for name, concept in WORKFLOWS.items():
            take(page, for_demo_model(ROOT / f"example_workflows/{name}.json", concept))
        page.evaluate("app.graph.clear()")
        page.evaluate("() => { app.graph.add(LiteGraph.createNode('TI_TrainingSettings')); }")
        take_nodes(page)


def opened(server: ComfyServer, playwright: Playwright) -> Page:
    """The front end in a browser, set up for pictures."""
    server.http.post(f"{server.url}/settings", json=SETTINGS, timeout=60).raise_for_status()
    browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1600, "height": 1600})
    page.goto(server.url)
    page.wait_for_function("window.app?.extensionManager && app.graph")
    return page


def bring_into_view(page: Page, number: int) -> None:
    """A node, at its real size."""
    page.evaluate("""number => {
        const node = app.graph.getNodeById(number);
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [300 - node.pos[0], 120 - node.pos[1]];
        app.canvas.setDirty(true, true);
    }""", number)  # fmt: skip


def take(page: Page, workflow: dict[str, Any]) -> None:
    """Runs a workflow and takes a picture of each of our nodes in it."""
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    with page.expect_response("**/prompt"):
        page.evaluate("app.queuePrompt(0)")
    busy = "fetch('/queue').then(a => a.json()).then(queue => queue.queue_running.length + queue.queue_pending.length)"
    if any(node["type"] == "TI_Train" for node in workflow["nodes"]):
        take_training(page)
    while page.evaluate(busy):
        page.wait_for_timeout(500)
    take_nodes(page)


def take_training(page: Page) -> None:
    """Pictures, model and the Train node during a run, for README."""
    page.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset = [120, 180]; app.canvas.setDirty(true, true)")
    page.locator(".ti-strip button").nth(3).wait_for(timeout=120_000)
    page.wait_for_timeout(3000)
    picture = page.screenshot(clip={"x": 110, "y": 140, "width": 890, "height": 880})
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(192).save(ROOT / "docs/training.png", optimize=True)


def take_nodes(page: Page) -> None:
    nodes = page.evaluate("app.graph.nodes.filter(n => n.comfyClass?.startsWith('TI_')).map(n => [n.id, n.comfyClass])")
    for number, kind in nodes:
        bring_into_view(page, number)
        page.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(page.locator(f'[data-node-id="{number}"]').screenshot())).convert("RGB")
        picture = picture.resize((WIDTH, picture.height * WIDTH // picture.width), Image.Resampling.LANCZOS)
        picture.quantize(128).save(HELP / f"{kind}.png", optimize=True)


if __name__ == "__main__":
    main()
