"""What benchmarks keep of finished cells."""

from benchmarks.cells import add_cell, read_cells


def test_an_interrupted_cell_is_measured_again_and_no_other(tmp_path):
    first, second = ({"recipe": "ours", "concept": name, "seed": 0} for name in ("heart", "star"))
    assert read_cells(tmp_path) == {}
    add_cell(tmp_path, first)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"recipe": "ours", "conc')
    assert list(read_cells(tmp_path).values()) == [first]
    for cell in (second, {**first, "identity": 0.5}):
        add_cell(tmp_path, cell)
    assert read_cells(tmp_path) == {("ours", "heart", 0): {**first, "identity": 0.5}, ("ours", "star", 0): second}
