"""What ComfyUI's registry and its users' machines ask of a pack, by the tools that ask it."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from dev.get_comfyui import comfy_cli
from dev.in_process import ROOT


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files that git knows, as a repository of their own: `comfy node pack` writes into its folder."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    folder = tmp_path / "pack"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def comfy(folder: Path, home: Path, *arguments: str) -> str:
    command, environment = comfy_cli(home)
    run = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.fixture
def packed(copy, tmp_path) -> Path:
    """What users get."""
    comfy(copy, tmp_path / "home", "node", "pack")
    with zipfile.ZipFile(copy / "node.zip") as archive:
        archive.extractall(tmp_path / "packed")
    return tmp_path / "packed"


def test_registry_accepts_the_pack(copy, tmp_path):
    assert "All validation checks passed" in comfy(copy, tmp_path / "home", "node", "validate")


def test_packed_pack_has_all_that_users_need_and_no_more(copy, packed):
    names = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    for folder in ("nodes", "textual_inversion", "web", "example_workflows", "subgraphs", "locales"):
        ours = {path.relative_to(copy).as_posix() for path in (copy / folder).rglob("*") if path.is_file()}
        assert ours, folder
        assert ours <= names
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE", "requirements.txt"} <= names
    assert not {name.split("/")[0] for name in names} & {"demo", "toy_model", "dev", "tests", "benchmarks", ".ci"}
    assert sum((packed / name).stat().st_size for name in names) < 2_000_000


def text_of(path: Path) -> str:
    """What users may read of a file: a module's strings without its docstrings, all of any other file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    strings = (node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return "\n".join(string for string in strings if isinstance(string, str))


def test_packed_pack_has_the_files_that_messages_point_to(copy, packed):
    """By path from the top in messages, node texts and the page's scripts; by link in help pages."""
    tops = [re.escape(path.name) + r"/[\w./-]*\.\w+" * path.is_dir() for path in copy.iterdir()]
    path_from_top = re.compile(rf"(?<![\w./-])(?:{'|'.join(tops)})(?![\w-])")
    found = {}
    for folder in ("nodes", "textual_inversion", "web", "locales", "subgraphs", "example_workflows"):
        for file in (copy / folder).rglob("*.*"):
            if file.suffix in (".py", ".js", ".json", ".md"):
                found |= dict.fromkeys(path_from_top.findall(text_of(file)), file)
    for page in (packed / "web/docs").glob("*.md"):
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text(encoding="utf-8")):
            found[(page.parent / link).resolve().relative_to(packed.resolve()).as_posix()] = page
    assert {"docs/models.md", "web/docs/TI_Train.png"} <= found.keys()
    assert not {name: file.name for name, file in found.items() if not (packed / name).is_file()}
    assert {path.suffix for path in (packed / "docs").iterdir()} == {".md"}


def test_static_levels_of_comfy_test(packed):
    command = [sys.executable, "-m", "comfy_test", "lint", "--strict", str(packed)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_registry_shows_icon_and_banner():
    with Image.open(ROOT / "docs/icon.png") as icon, Image.open(ROOT / "docs/banner.png") as banner:
        assert icon.width == icon.height <= 400
        assert banner.width * 9 == banner.height * 21
