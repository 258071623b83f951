"""Bring a headless Chromium for the tests: one on the PATH, else Playwright's own, else Debian's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MISSING = "There is no Chromium, so the tests in the browser are left out. Debian: apt install chromium."


def browser_path() -> str | None:
    """The Chromium to start; None where there is none yet."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
    return str(own) if own.exists() else None


def main() -> None:
    if browser_path():
        return
    print("Getting Chromium for the tests in the browser.")
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"
        commands.append(["sh", "-c", install])
    if not any(subprocess.run(command).returncode == 0 for command in commands):
        print(MISSING, file=sys.stderr)  # everything else works without


if __name__ == "__main__":
    main()
