"""The templates and the block, and what they need to run on the demo model."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.measure import CONCEPTS
from dev.comfyui_server import ComfyServer
from dev.in_process import ROOT

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLOCK = ROOT / "subgraphs/Train an Embedding.json"
CONCEPT, LIBRARY = "heart", ("heart", "star")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def pictures_for(path: Path) -> str:
    """The folder in input/ for a template: of ``CONCEPT``, or with a folder for each of ``LIBRARY``."""
    return "library" if path.stem == "Learn a library" else CONCEPT


def nodes_of(workflow: dict, kind: str = "") -> list[dict]:
    """All nodes or those of one type, inside of subgraphs too."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return [node for graph in graphs for node in graph["nodes"] if node["type"] == (kind or node["type"])]


@contextmanager
def demo_files(server: ComfyServer) -> Iterator[None]:
    """Puts in what a user would have: pictures to learn from, and somebody's embeddings."""
    embeddings = server.base / "models/embeddings"
    before = set(embeddings.iterdir())
    shutil.copytree(CONCEPTS / CONCEPT / "train", server.base / "input" / CONCEPT)
    for concept in LIBRARY:
        shutil.copytree(CONCEPTS / concept / "train", server.base / "input/library" / concept)
    for path in (ROOT / "demo/embeddings").iterdir():
        shutil.copy(path, embeddings)
    yield
    for name in (CONCEPT, "library"):
        shutil.rmtree(server.base / "input" / name)
    for path in set(embeddings.iterdir()) - before:
        path.unlink()
