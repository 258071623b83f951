"""ComfyUI and this pack inside one Python process, without a server: for measurements and tests."""

import asyncio
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .get_comfyui import ROOT, comfyui_path


class _InstalledEngine(MetaPathFinder, Loader):
    """Lets ``ti_pack.textual_inversion`` be the installed engine instead of a second copy of it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith("ti_pack.textual_inversion") else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(module.__name__.removeprefix("ti_pack."))


def import_pack() -> None:
    """Makes the repository the package ``ti_pack``, so that ``ti_pack.nodes`` can be imported.

    ComfyUI too makes a package of the folder: the top-level name ``nodes`` is a module of its own.
    """
    if "ti_pack" not in sys.modules:
        pack = sys.modules["ti_pack"] = ModuleType("ti_pack")
        pack.__path__ = [str(ROOT)]
        sys.meta_path.insert(0, _InstalledEngine())


def comfyui_on_path() -> None:
    """Its modules can be imported, and come first: ``nodes`` is the name of one, and of a folder here."""
    if (folder := str(comfyui_path())) not in sys.path:
        sys.path.insert(0, folder)


def import_comfyui(base: Path, device: str = "cpu") -> None:
    """ComfyUI, with its models, input and output folders below ``base``; once a process.

    On a card it runs without dynamic VRAM, which only its server can start.
    """
    comfyui_on_path()
    from comfy.cli_args import args  # reads no command line unless main.py tells it to

    if args.base_directory:
        return
    args.cpu, args.disable_dynamic_vram = device == "cpu", True
    args.base_directory = str(base)
    for folder in ("custom_nodes", "models/checkpoints", "models/embeddings", "input", "output"):
        (base / folder).mkdir(parents=True, exist_ok=True)


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, run in a thread of its own: in this one Playwright's loop may be running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
