"""What a card would see of one step, counted on tensors without numbers (dev/pretended_card.py)."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from families import NAMED

from dev.in_process import ROOT
from textual_inversion.memory import MARGIN

# Where ComfyUI's own code makes conditioning on the CPU, or reads a number from the card, for every row.
WAITS_OF_COMFYUI = {
    **dict.fromkeys(("SDXL", "SDXL, v-prediction, zero terminal SNR", "SDXL, EDM (Playground 2.5)"), 5),
    "SDXL refiner": 5,
    "HunyuanVideo 1": 4,
    "Z-Image": 8,
    "Lumina 2": 8,
    "Qwen-Image": 4,
}
NOT_COUNTED = {"HiDream I1"}  # its experts take as many tokens as they are given: shapes depend on numbers
GB_PER_GIB = 1.073741824
GOALS = {"SD1": 8, "SDXL": 12, "Flux.1 dev, fp8": 24}  # GB of cards that train a batch of 4


def run(*arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "dev.pretended_card", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_family_makes_a_step_on_a_card():
    """No tensor has the wrong device or dtype, and the host waits for the card twice: for the loss and its gradient.

    What goes to the card does not wait for it: vectors, latents, noise and noise levels in one copy each, and
    ComfyUI's token numbers before there is work to wait for.
    """
    for found in run("step", *(name for name in NAMED if name not in NOT_COUNTED)):
        waits, ours = 0, Counter()
        for place, count in found["copies"].items():
            what, _, where = place.partition(": ")
            waits += count * (what in ("gpu to cpu", "read gpu"))
            if what == "cpu to gpu" and where.startswith(("devices.py", "objective.py", "comfyui")):
                ours[where.partition(":")[0]] += count
        assert waits == 2 + WAITS_OF_COMFYUI.get(found["family"], 0), found
        assert ours == {"devices.py": 4}, found


def test_a_step_fits_on_the_cards_that_people_have():
    for (name, goal), found in zip(GOALS.items(), run("memory", *GOALS), strict=True):
        assert found["family"] == name
        weights = found["network"] + found["encoders"]
        assert weights + found["peak"] < goal / GB_PER_GIB, found
        assert found["estimated"] == pytest.approx(found["plain"], rel=0.2)
        assert found["all checkpointed"] * MARGIN == pytest.approx(found["peak"], rel=0.2)
        if name == "SD1":  # without recomputing anything
            assert weights + found["plain"] < goal / GB_PER_GIB
