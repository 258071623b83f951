"""ComfyUI in a browser, for the tests of what people see."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

from dev.comfyui_server import ComfyServer

SECONDS = 60_000  # milliseconds that anything may take on a busy machine
# The front end's warnings name no file. Some it causes itself: those begin with [ or are about input.link.
DEPRECATED = re.compile(r"^(?!input\.link)\w+\.\w+ is deprecated")

PALETTES = {"light": "#F5F5F5", "solarized": "#073642", "nord": "#161b22", "dark": "#353535"}  # and that of a node


@contextmanager
def opened(server: ComfyServer, chromium: Browser, renderer: str, **settings: Any) -> Iterator[Page]:
    """ComfyUI in a fresh browser profile; an error or a deprecation of ours in its console fails the last test."""
    # A new user would be greeted with a dialog.
    values = {"Comfy.VueNodes.Enabled": renderer == "vue", "Comfy.TutorialCompleted": True, **settings}
    server.http.post(f"{server.url}/settings", json=values, timeout=60).raise_for_status()
    expect.set_options(timeout=SECONDS)
    context = chromium.new_context(viewport={"width": 1400, "height": 1200})
    page, told = context.new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: told.append((message.type, f"{message.text} {message.location}")))
    page.on("pageerror", lambda error: told.append(("error", f"{error} {error.stack}")))
    open_comfyui(page, server.url)
    yield page
    context.close()
    bad = [text for kind, text in told if kind == "error" and server.pack_name in text]
    bad += [text for _, text in told if DEPRECATED.search(text)]
    assert not bad, bad


def open_comfyui(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_function("window.app?.extensionManager && window.app.canvas && window.app.rootGraph?.nodes.length")


def use_palette(page: Page, palette: str) -> None:
    """Sets one of `PALETTES`."""
    page.evaluate("name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
    page.wait_for_function("colour => LiteGraph.NODE_DEFAULT_BGCOLOR === colour", arg=PALETTES[palette])
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def contrast(words: Locator) -> float:
    """WCAG's ratio of the text colour to what is behind it; behind a node on the canvas is its body."""
    return words.evaluate("""(words) => {
        const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const luminance = (colours) => {
            for (const colour of colours) {
                context.fillStyle = colour;
                context.fillRect(0, 0, 1, 1);
            }
            const linear = (part) => (part <= 10 ? part / 3294 : ((part / 255 + 0.055) / 1.055) ** 2.4);
            const [red, green, blue] = [...context.getImageData(0, 0, 1, 1).data].map(linear);
            return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
        };
        const behind = [];
        for (let at = words; at && !at.matches(".dom-widget"); at = at.parentElement) {
            behind.unshift(getComputedStyle(at).backgroundColor);
        }
        const body = words.closest(".dom-widget") ? [LiteGraph.NODE_DEFAULT_BGCOLOR] : [];
        const [one, two] = [[...body, ...behind], [...body, ...behind, getComputedStyle(words).color]].map(luminance);
        return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    }""")


def drop_folder(page: Page, folder: Path) -> None:
    """Drops a folder with real files on Load Images, which only the browser itself can do."""
    box = page.locator(".ti-pictures-list").bounding_box()
    assert box is not None
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": box["x"] + box["width"] / 2, "y": box["y"] + 10, "data": data}
        session.send("Input.dispatchDragEvent", event)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
