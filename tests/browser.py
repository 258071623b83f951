"""ComfyUI in a browser, for the tests of what people see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect

from dev.comfyui_server import ComfyServer

SECONDS = 60_000  # milliseconds that anything may take on a busy machine
DEPRECATED = "DEPRECATION"  # ComfyUI's front end warns of calls that will go


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
    bad = [text for kind, text in told if kind == "error" or DEPRECATED in text]
    assert [text for text in bad if server.pack_name in text] == []


def open_comfyui(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_function("window.app?.extensionManager && window.app.canvas && window.app.rootGraph?.nodes.length")
