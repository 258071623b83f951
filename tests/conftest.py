"""ComfyUI and the pack in this process, small models, and the one server that tests share."""

import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from dev.comfyui_server import ComfyServer
from dev.get_browser import MISSING, browser_path
from dev.get_comfyui import newest_front_end
from dev.in_process import ROOT, import_comfyui, import_pack
from toy_model.networks import pipeline_from_checkpoint

_base = tempfile.TemporaryDirectory(prefix="comfyui-tests-")
TEST_PACK = ROOT / "tests/comfyui_pack"

import_pack()
import_comfyui(Path(_base.name))
import_module("comfyui_pack")  # lets ComfyUI recognise the small checkpoints


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="write docs/models.md as the tests of families find it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is about looks runs in all interfaces, the rest in two of them: each renderer, each front end."""
    rest = [item for item in items if _interface_of(item) in OTHER_INTERFACES and not item.get_closest_marker("looks")]
    items[:] = [item for item in items if item not in set(rest)]


def _interface_of(item: pytest.Item) -> str:
    return item.callspec.params.get("interface", "") if hasattr(item, "callspec") else ""  # pyright: ignore


def pytest_unconfigure() -> None:
    """Remove ComfyUI's temporary folders."""
    _base.cleanup()


OTHER_INTERFACES = ("vue, required", "canvas, newest")  # renderer, front end
INTERFACES = ("canvas, required", *OTHER_INTERFACES, "vue, newest")


class Interface(NamedTuple):
    """What a browser shows: the front end of a server, drawn by one of its renderers."""

    server: ComfyServer
    renderer: str


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """The demo model as a diffusers folder."""
    folder = tmp_path_factory.mktemp("toy")
    pipeline_from_checkpoint(ROOT / "demo/models/toy.safetensors").save_pretrained(folder)
    return folder


class Graph(NamedTuple):
    """What a checkpoint loader puts on the wires of a graph."""

    model: Any
    clip: Any
    vae: Any


@pytest.fixture(scope="session")
def embeddings_folder(tmp_path_factory) -> Path:
    """Where the CLIPs of ``load`` look for ``embedding:NAME``."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """SD1 and SDXL checkpoints of small width, by name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    from small_models import write_checkpoint

    paths = {name: folder / f"{name}.safetensors" for name in ("SmallSD1", "SmallSDXL")}
    for name, path in paths.items():
        write_checkpoint(name, path)
    return paths


@pytest.fixture(scope="session")
def load(embeddings_folder) -> Callable[[Path], Graph]:
    """Loads a checkpoint the way a node does: under inference mode."""
    import comfy.sd

    def load_checkpoint(path: Path) -> Graph:
        with torch.inference_mode():
            parts = comfy.sd.load_checkpoint_guess_config(
                str(path), output_vae=True, output_clip=True, embedding_directory=str(embeddings_folder)
            )
        return Graph(*parts[:3])

    return load_checkpoint


@pytest.fixture(params=["SmallSD1", "SmallSDXL"])
def graph(request, checkpoints, load) -> Graph:
    return load(checkpoints[request.param])


@pytest.fixture(scope="session")
def pictures() -> Callable[[int], list[torch.Tensor]]:
    """The same random pictures (1, 64, 64, 3) every time."""

    def make(count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(1, 64, 64, 3, generator=generator) for _ in range(count)]

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks so small that threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def wide_vae():
    """A VAE with 16 latent channels, as SD3 and Flux have."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    return comfy.sd.VAE(sd=TAESD(latent_channels=16).state_dict())


def running(options: tuple[str, ...], checkpoints: dict[str, Path]) -> Iterator[ComfyServer]:
    """A running ComfyUI, with two pictures in input/pictures."""
    packs = {"ti_test_pack": TEST_PACK}
    with ComfyServer(packs=packs, checkpoints=list(checkpoints.values()), options=options) as server:
        folder = server.base / "input/pictures"
        folder.mkdir()
        generator = np.random.default_rng(0)
        for number in range(2):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        yield server


@pytest.fixture(scope="session")
def server_with_required_front_end(checkpoints) -> Iterator[ComfyServer]:
    """One ComfyUI for the whole session."""
    yield from running(("--cpu",), checkpoints)


@pytest.fixture(scope="session")
def server(server_with_required_front_end) -> ComfyServer:
    """What tests that need no browser use; in those with one, the server of ``interface`` takes its name."""
    return server_with_required_front_end


@pytest.fixture(scope="session")
def server_with_newest_front_end(checkpoints) -> Iterator[ComfyServer]:
    yield from running(("--cpu", "--front-end-root", str(newest_front_end())), checkpoints)


@pytest.fixture(scope="module", params=INTERFACES)
def interface(request) -> Interface:
    """Both renderers of the front end that ComfyUI 0.30.0 requires, and of the newest one."""
    renderer, age = request.param.split(", ")
    return Interface(request.getfixturevalue(f"server_with_{age}_front_end"), renderer)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A headless Chromium that asks nobody but this machine."""
    if (path := browser_path()) is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()
