"""Tables, plot and contact sheets from the cells that concepts.py has measured."""

import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.stats import sem
from scipy.stats import t as student_t

from .cells import Key, file_name, read_cells
from .recipes import ABLATIONS

mpl.use("Agg")
from matplotlib import pyplot as plt

Cells = list[dict[str, Any]]
MEASURES = ("identity", "looks", "obeys", "drift", "norm_ratio", "leak")
OURS, FIRST_VERSION = "ours", "version 0.1"
SIDE = 96  # pixels of a picture on a contact sheet


def write_report(out: Path) -> None:
    """``report.md``, ``report.json``, ``identity.png`` and one sheet a concept, from the cells in ``out``."""
    cells: Cells = list(read_cells(out).values())
    recipes: dict[str, Cells] = {}
    for cell in cells:
        cell["95%"] = to_95_percent(cell)
        recipes.setdefault(cell["recipe"], []).append(cell)
    identity = {name: mean(rows, "identity") or 0.0 for name, rows in recipes.items()}
    ordered = sorted(recipes, key=lambda name: (name != OURS, name in ABLATIONS, -identity[name]))
    recipes = {name: recipes[name] for name in ordered}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    machine = f"{platform.machine()}, at most {os.cpu_count()} threads of the CPU a run"
    summary = {name: {key: mean(rows, key) for key in (*MEASURES, "95%", "seconds")} for name, rows in recipes.items()}
    about = {"date": date.today().isoformat(), "machine": machine, **versions, "cells": len(cells), "recipes": summary}
    (out / "report.json").write_text(json.dumps(about, indent=1) + "\n")
    text = [f"# Recipes on the demo model\n\n{about['date']}, {machine}, torch {torch.__version__}.\n", table(recipes)]
    text.append(paired(recipes))
    (out / "report.md").write_text("\n".join(text))
    plot({name: rows for name, rows in recipes.items() if name not in ABLATIONS}, out / "identity.png")
    for concept in sorted({cell["concept"] for cell in cells}) if len(recipes) > 2 else ():
        sheet(concept, [name for name in recipes if name not in ABLATIONS], out)


LEVELS = """# As hard as real models may be

The demo model at several levels of difficulty (`benchmarks/levels.py`), one folder each. Held-out losses are always the
plain model's. *Agreement* and *noise scale* (in pictures) are medians at the start; *a word explains*: the gain of ours
as a share of the loss in training, beside the per-image tokens. *Kept*: mean identity as a share of the same recipe's
on the same concepts and seeds of the plain model. *Before*: ours before the per-image tokens started at words.
[method.md](../../../docs/method.md#as-hard-as-real-models-may-be) says which default each row of *ours* is of.
*Wild* is the other demo model (`--wild`).

| level | recipe | cells | agreement | noise scale | a word explains | identity | worst | kept | pictures | at most |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def write_levels(out: Path) -> None:
    """``levels.md``: every recipe at each level in the folders of ``out``, and ours and the first version's as is."""
    plain, lines = read_cells(out), []
    for folder in (out, *sorted(path.parent for path in out.glob("*/cells.jsonl"))):
        recipes: dict[str, Cells] = {}
        for cell in read_cells(folder).values():
            if folder != out or cell["recipe"].startswith((OURS, FIRST_VERSION)):
                recipes.setdefault(cell["recipe"], []).append(cell)
        level = "as is" if folder == out else folder.name
        same = {} if level == "wild" else plain  # it is another model
        lines += [level_row(level, name, rows, same) for name, rows in recipes.items()]
    (out / "levels.md").write_text(LEVELS + "\n".join(lines) + "\n")


def shown_scale(value: float) -> str:
    """Where no agreement could be measured the noise scale is only known to be large."""
    return f"{value:.2f}" if value < 1e4 else "> 10,000"


def level_row(level: str, recipe: str, rows: Cells, plain: dict[Key, dict[str, Any]]) -> str:
    starts = [row["level"] for row in rows if "level" in row]
    measured = [
        shown_scale(statistics.median(values(starts, key))) if starts else "" for key in ("agreement", "noise_scale")
    ]
    gains = [row["gain"][0] for row in rows if "gain" in row]
    same = [plain[key]["identity"] for row in rows if (key := (recipe, row["concept"], row["seed"])) in plain]
    found = values(rows, "identity")
    # Of a recipe that loses on the plain model as well, a share says nothing.
    kept = f"{sum(found) / sum(same):.0%}" if len(same) == len(rows) and sum(same) > 0 else ""
    seen = [row["curve"][-1][0] for row in rows]
    columns = [level, recipe, len(rows), *measured, f"{statistics.mean(gains):.1%}" if gains else ""]
    columns += [f"{statistics.mean(found):.3f}", f"{min(found):.2f}", kept, f"{statistics.mean(seen):.0f}", max(seen)]
    return f"| {' | '.join(map(str, columns))} |"


def to_95_percent(cell: dict[str, Any]) -> float | None:
    """Pictures seen until identity is 95% of its last value, interpolated; None where nothing was learned."""
    images, seconds, losses = (np.array(column, float) for column in zip(*cell["curve"], strict=True))
    cell["seconds"] = float(seconds[-1])
    gains = cell["class_loss"] - losses
    if gains[-1] <= 0:
        return None
    reached = int(np.argmax(gains >= 0.95 * gains[-1]))
    if reached == 0:
        return float(images[0])
    before, after = gains[reached - 1], gains[reached]
    share = (0.95 * gains[-1] - before) / (after - before)
    return float(images[reached - 1] + share * (images[reached] - images[reached - 1]))


def values(rows: Cells, key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def mean(rows: Cells, key: str) -> float | None:
    found = values(rows, key)
    return statistics.mean(found) if found else None


def table(recipes: dict[str, Cells]) -> str:
    lines = [
        "Means over concepts and seeds; in brackets the spread (standard deviation) over the cells, beside it that of",
        "one concept over the seeds. Pictures have no captions unless the recipe says so. What the columns mean is in",
        "`python -m benchmarks.concepts`.\n",
        "| recipe | cells | identity | over seeds | worst | low, middle, high noise | looks | obeys | drift | length "
        "| leak | seen | seconds | seen to 95% |",
        "|" + "---|" * 14,
    ]
    for name, rows in recipes.items():
        bands = ", ".join(f"{np.mean([row['bands'][band] for row in rows]):.2f}" for band in range(3))
        seen = statistics.mean(row["curve"][-1][0] for row in rows)
        never = sum(row["95%"] is None for row in rows)
        reach = f"{statistics.median(values(rows, '95%')):.0f}" if never < len(rows) else "-"
        reach += f" ({never} never)" if never else ""
        spread = np.std(values(rows, "identity"))
        shares = " | ".join(f"{mean(rows, key):.0%}" if values(rows, key) else "-" for key in ("looks", "obeys"))
        numbers = f"{mean(rows, 'drift'):.3f} | {mean(rows, 'norm_ratio'):.2f} | {mean(rows, 'leak'):.4f}"
        lines.append(
            f"| {name} | {len(rows)} | {mean(rows, 'identity'):.3f} ({spread:.3f}) | {over_seeds(rows)} "
            f"| {min(values(rows, 'identity')):.2f} | {bands} | {shares} | {numbers} "
            f"| {seen:.0f} | {mean(rows, 'seconds'):.1f} | {reach} |"
        )
    return "\n".join(lines) + "\n"


def over_seeds(rows: Cells) -> str:
    """Standard deviation of one concept's identity, from the mean of all concepts' variances."""
    concepts: dict[str, list[float]] = {}
    for row in rows:
        concepts.setdefault(row["concept"], []).append(row["identity"])
    variances = [statistics.variance(found) for found in concepts.values() if len(found) > 1]
    return f"{statistics.mean(variances) ** 0.5:.3f}" if variances else "-"


def paired(recipes: dict[str, Cells]) -> str:
    """Ours minus each other recipe on the same concept and seed, with t intervals over these pairs."""
    lines = [
        "## Ours minus the others, pair by pair\n",
        "Same concept, seed, held-out pictures and noise; mean and 95% interval (t, over pairs). More is better for",
        "identity, looks and obeys, less for drift.\n",
        "| recipe | pairs | identity | looks | obeys | drift |",
        "|---|---|---|---|---|---|",
    ]
    ours = {(row["concept"], row["seed"]): row for row in recipes.get(OURS, [])}
    for name, rows in recipes.items():
        pairs = [(ours[key], row) for row in rows if (key := (row["concept"], row["seed"])) in ours]
        if name != OURS and pairs:
            columns = " | ".join(interval(pairs, key) for key in ("identity", "looks", "obeys", "drift"))
            lines.append(f"| {name} | {len(pairs)} | {columns} |")
    return "\n".join(lines) + "\n"


def interval(pairs: list[tuple[dict, dict]], key: str) -> str:
    differences = [a[key] - b[key] for a, b in pairs if key in a and key in b]
    if len(differences) < 2:
        return "-"
    half = student_t.ppf(0.975, len(differences) - 1) * sem(differences)
    return f"{statistics.mean(differences):+.3f} ± {half:.3f}"


def plot(recipes: dict[str, Cells], path: Path) -> None:
    """Identity against pictures seen: mean over the cells, and the middle half of them as a band."""
    figure, axes = plt.subplots(figsize=(8.6, 4.2), dpi=120)
    for name, rows in recipes.items():
        grid = np.geomspace(20, max(row["curve"][-1][0] for row in rows), 60)
        curves = [
            np.interp(grid, *np.array([(seen, 1 - loss / row["class_loss"]) for seen, _, loss in row["curve"]]).T)
            for row in rows
        ]
        width, color = (2.5, "black") if name == OURS else (1.5, None)
        (line,) = axes.plot(grid, np.mean(curves, 0), label=name, linewidth=width, color=color)
        axes.fill_between(grid, *np.quantile(curves, (0.25, 0.75), 0), color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set(xlabel="pictures seen (steps x batch)", ylabel="identity: held-out loss removed")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_ylim(bottom=-0.4)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def sheet(concept: str, recipes: list[str], out: Path) -> None:
    """One row a recipe: samples of unseen prompts with the word of seed 0.

    The samples stay where they were drawn, beside the cells: the sheet is left as it is where one is missing.
    """
    about = {"concept": concept, "seed": 0}
    strips = {name: out / "cells" / f"{file_name({'recipe': name, **about})}.jpg" for name in recipes}
    if not strips or not all(path.exists() for path in strips.values()):
        return
    rows = {name: Image.open(path) for name, path in strips.items()}
    widest = max(strip.width * SIDE // strip.height for strip in rows.values())
    page = Image.new("RGB", (140 + widest, SIDE * len(rows)), "white")
    for number, (name, strip) in enumerate(rows.items()):
        page.paste(
            strip.resize((strip.width * SIDE // strip.height, SIDE), Image.Resampling.BICUBIC), (140, number * SIDE)
        )
        ImageDraw.Draw(page).text((4, number * SIDE + SIDE // 2 - 6), name, fill="black")
    page.save(out / f"sheet-{concept}.jpg", quality=85)
