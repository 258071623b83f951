"""Finished cells (recipe, concept, seed) of a benchmark: a line of ``cells.jsonl`` each, added as they are measured."""

import json
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]


def read_cells(out: Path) -> dict[Key, dict[str, Any]]:
    """All cells in the order of their keys; of several lines about one cell the last counts."""
    path, cells = out / "cells.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:  # cut short by an interruption: the cell is measured again
            continue
        cells[cell["recipe"], cell["concept"], cell["seed"]] = cell
    return dict(sorted(cells.items()))


def add_cell(out: Path, cell: dict[str, Any]) -> None:
    """One write, so that several runs may share the work; begins a new line after one that was cut short."""
    path = out / "cells.jsonl"
    unfinished = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" * unfinished + json.dumps(cell) + "\n")


def file_name(cell: dict[str, Any]) -> str:
    """Of the learned word and its samples in ``out/cells``, without a suffix. They are not kept in git."""
    return f"{cell['recipe'].replace(' ', '-')}--{cell['concept']}--{cell['seed']}"
