"""What ComfyUI's registry and its users' machines ask of a pack, by the tools that ask it."""

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


def test_static_levels_of_comfy_test(packed):
    command = [sys.executable, "-m", "comfy_test", "lint", "--strict", str(packed)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_registry_shows_icon_and_banner():
    with Image.open(ROOT / "docs/icon.png") as icon, Image.open(ROOT / "docs/banner.png") as banner:
        assert icon.width == icon.height <= 400
        assert banner.width * 9 == banner.height * 21
