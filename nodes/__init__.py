"""The ComfyUI nodes. Each is a schema and a call into the engine."""

import json
from pathlib import Path
from urllib.parse import quote

from aiohttp import web
from comfy_api.latest import ComfyExtension, io
from server import PromptServer
from typing_extensions import override

from nodes import EXTENSION_WEB_DIRS  # pyright: ignore  ComfyUI's module of this name

from .apply_embedding import ApplyEmbedding
from .blend_embeddings import BlendEmbeddings
from .inspect_embedding import InspectEmbedding
from .live import add_run_routes
from .load_embedding import LoadEmbedding
from .load_images import LoadImages
from .pictures_route import add_picture_routes
from .save_embedding import SaveEmbedding
from .train import Train
from .training_settings import TrainingSettings

WEB_NAME = "textual-inversion"


def serve_web_files(folder: str) -> None:
    """Gives our web files an address that the web server can serve.

    It does not find files under an address with a blank, so in a ``folder`` with such a name the pack would have no
    panel and no picture list, without a word.
    """
    if quote(folder) != folder:
        EXTENSION_WEB_DIRS[WEB_NAME] = EXTENSION_WEB_DIRS.pop(folder)  # pyright: ignore


def add_texts_route() -> None:
    """Adds the route of the texts of panel and list, by language.

    ComfyUI's own has none where its folder has a bracket in its name, or another pack a text file that is not UTF-8.
    """
    files = (Path(__file__).parents[1] / "locales").glob("*/main.json")
    texts = {file.parent.name: json.loads(file.read_text("utf-8"))["textual_inversion"] for file in files}

    @PromptServer.instance.routes.get("/textual_inversion/texts")
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(texts)


class TextualInversionExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        serve_web_files(Path(__file__).parents[1].name)
        add_texts_route()
        add_run_routes()
        add_picture_routes()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadImages,
            Train,
            TrainingSettings,
            SaveEmbedding,
            LoadEmbedding,
            ApplyEmbedding,
            InspectEmbedding,
            BlendEmbeddings,
        ]
