"""Pictures of the panel after an easy, a noisy and a hopeless run, for docs/method.md: python -m dev.panels

Easy and noisy are the heart of the demo, noisy at cosine .05 of benchmarks/levels.py; hopeless are pictures of nothing.
"""

import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from demo.workflow import for_demo_model

from .comfyui_server import ComfyServer
from .get_comfyui import ROOT
from .screenshots import FRONT_END, bring_into_view, opened

TEMPLATE = ROOT / "example_workflows/Train an embedding (SD1.5).json"
RUNS = {"easy": ("heart", 0.0), "noisy": ("heart", 0.05), "hopeless": ("nothing", 0.0)}  # pictures, cosine
SECONDS = 900
# A pack that puts the level between the node and the engine, as soon as ours is there.
PACK = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
NODE_CLASS_MAPPINGS = {{}}
def patch():
    while not (found := [module for name, module in list(sys.modules.items()) if name.endswith(".nodes.training_run")]):
        time.sleep(0.1)
    from benchmarks.levels import Level, harder
    plain = found[0].learn_together
    def learn_together(model, runs, at_once):
        start, config = runs[0].begin(False)
        level = Level(cosine=float(os.environ["TI_COSINE"]))
        return plain(harder(model, level, start.snapshot(), runs[0].dataset, config), runs, at_once)
    found[0].learn_together = learn_together
threading.Thread(target=patch).start()
"""


def main() -> None:
    for name, (pictures, cosine) in RUNS.items():
        take(name, pictures, cosine)


def take(name: str, pictures: str, cosine: float) -> None:
    os.environ["TI_COSINE"] = str(cosine)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        (Path(folder) / "__init__.py").write_text(PACK)
        with ComfyServer(packs={"zz_level": Path(folder)}, options=FRONT_END) as server:
            shutil.copytree(ROOT / "demo/concepts/heart/train", server.base / "input/heart")
            for caption in (server.base / "input/heart").glob("*.txt"):
                caption.unlink()
            (server.base / "input/nothing").mkdir()
            for number in range(4):
                noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(noise).save(server.base / f"input/nothing/{number}.png")
            page = opened(server, playwright)
            workflow = for_demo_model(TEMPLATE, pictures, preview_every=200)
            page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
            page.evaluate("app.queuePrompt(0)")
            number = page.evaluate("app.graph.nodes.find(node => node.comfyClass === 'TI_Train').id")
            bring_into_view(page, number)
            page.locator(".ti-strip").get_by_text("result").wait_for(timeout=SECONDS * 1000)
            page.wait_for_timeout(2000)
            picture = Image.open(io.BytesIO(page.locator(f'[data-node-id="{number}"] .ti-train').screenshot()))
            picture.convert("RGB").quantize(128).save(ROOT / f"docs/panel_{name}.png", optimize=True)


if __name__ == "__main__":
    main()
