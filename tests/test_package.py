"""The package as others see it: imports, versions, templates, help pages."""

import ast
import dataclasses
import json
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dev.in_process import finished
from textual_inversion import PreviewConfig, TrainConfig, __version__
from textual_inversion.config import field_help

ROOT = Path(__file__).resolve().parent.parent


def imported(path: Path) -> set[str]:
    """Absolute modules a file imports, and relative ones with their dots."""
    found = set()
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found |= {alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom):
            found.add("." * item.level + (item.module or ""))
    return found


def test_imports_go_one_way():
    engine = ROOT / "textual_inversion"
    allowed = sys.stdlib_module_names | {"torch"}
    files = ("containers.py", "formats.py", "pictures.py", "picture_files.py")
    more = {name: {"numpy", "PIL", "safetensors"} for name in files}
    for path in engine.glob("*.py"):
        if path.name in ("cli.py", "train_command.py", "__main__.py"):  # a face of the engine, as nodes/ is
            continue
        for module in imported(path):
            inside = re.fullmatch(r"\.(adapters\.protocol|\w+)?", module)
            known = module.split(".")[0] in allowed | more.get(path.name, set())
            assert inside or known, f"{path.name} imports {module}"
    for path in engine.rglob("*.py"):
        assert not any("nodes" in module for module in imported(path)), f"{path.name} imports nodes"


def test_pack_works_without_an_installed_engine():
    """ComfyUI imports this folder by its path; only development installs ``textual_inversion``."""
    for path in [*ROOT.glob("nodes/*.py"), *ROOT.glob("textual_inversion/**/*.py")]:
        assert not any(module.split(".")[0] == "textual_inversion" for module in imported(path)), path.name


def test_root_imports_nothing_at_once():
    (_, *constants, entry) = ast.parse((ROOT / "__init__.py").read_text()).body
    assert all(isinstance(item, ast.Assign) for item in constants)
    assert isinstance(entry, ast.AsyncFunctionDef)


@pytest.mark.parametrize("version", ["0.29.9", "0.3.77", "0.30.0rc1"])
def test_an_older_comfyui_is_named(version, monkeypatch):
    monkeypatch.setattr(import_module("comfyui_version"), "__version__", version)
    entrypoint = runpy.run_path(str(ROOT / "__init__.py"))["comfy_entrypoint"]
    sentence = f"Textual Inversion needs ComfyUI 0.30.0 or newer, this is {version}: update it."
    with pytest.raises(ImportError, match=re.escape(sentence)):
        finished(entrypoint())


def test_one_version_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.*)"$', text, re.M) == [__version__]
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_one_repository_address_everywhere():
    (repository,) = re.findall(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nrepository-code: {repository}\n" in citation
    assert f"\nversion: {__version__}\n" in citation
    assert f"\ngit clone {repository} && cd {repository.rpartition('/')[2]}\n" in (ROOT / "README.md").read_text()
    assert f"{repository}/security/" in (ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text()


@pytest.mark.parametrize("config", [TrainConfig, PreviewConfig])
def test_every_setting_explains_itself(config):
    assert field_help(config).keys() == {item.name for item in dataclasses.fields(config)}
    assert all(text.endswith(".") or text.endswith('"') for text in field_help(config).values())


def test_every_node_has_a_help_page(server):
    nodes = {name for name in server.object_info() if name.startswith("TI_")}
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == nodes
    for name in nodes:
        page = server.http.get(f"{server.url}/extensions/{server.pack_name}/docs/{name}.md", timeout=10)
        assert page.ok
        assert page.text.startswith("# ")


def test_templates_use_what_exists(server):
    known = server.object_info()
    workflows = sorted((ROOT / "example_workflows").glob("*.json"))
    assert workflows
    for path in workflows:
        assert path.with_suffix(".jpg").is_file(), f"{path.name} has no thumbnail"
        types = {item["type"] for item in json.loads(path.read_text())["nodes"]}
        assert types - {"Note", "MarkdownNote"} <= known.keys()


def test_files_can_be_read_everywhere():
    """The registry's checks refuse Python files that Windows' old encoding cannot show."""
    for path in [*ROOT.glob("nodes/*.py"), *ROOT.rglob("textual_inversion/**/*.py"), ROOT / "__init__.py"]:
        path.read_text(encoding="utf-8").encode("cp1252")


def test_every_node_has_help_with_its_picture(server):
    ours = [name for name in server.object_info() if name.startswith("TI_")]
    for name in ours:
        page = ROOT / f"web/docs/{name}.md"
        assert f"![The node]({name}.png)" in page.read_text()
        address = f"{server.url}/extensions/{server.pack_name}/docs/{name}"
        for suffix in (".md", ".png"):
            assert server.http.get(address + suffix, timeout=60).ok


def test_architecture_names_what_exists():
    """Every file and test that docs/architecture.md names."""
    text = (ROOT / "docs/architecture.md").read_text()
    names = {path.name for path in ROOT.rglob("*") if not path.relative_to(ROOT).parts[0].startswith(".")}
    files = set(re.findall(r"[\w./-]*?([\w-]+\.(?:py|js|md|css|sh|json))\b", text))
    assert files - names - {"NAME.json"} == set()
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    cited = set(re.findall(r"`(test_\w+)`", text))
    assert cited
    assert {name for name in cited if f"def {name}(" not in tests} == set()
