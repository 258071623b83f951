"""What benchmarks keep of finished cells, and how they make the demo model harder."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cells import add_cell, read_cells
from benchmarks.levels import Level, harder
from demo.measure import Bench, Concept
from dev.in_process import ROOT
from textual_inversion import TrainConfig, initial_embedding
from textual_inversion.dataset import fixed_batches, training_batches
from textual_inversion.image_tokens import new_image_tokens
from textual_inversion.objective import batch_loss, fixed_losses, mean_loss


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


@pytest.fixture(scope="module")
def bench():
    return Bench()


def gradients_of(model, start, batches, scale: float) -> torch.Tensor:
    """Of each batch (batches, n), at the start, with a loss that is scaled as in training."""
    word, found = start.trainable(), []
    for batch in batches:
        loss = scale * batch_loss(model, [word], batch)
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, word.parameters())]) / scale)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("level", "least", "most"),
    [(Level(), 0.4, 0.8), (Level(cosine=0.1), 0.05, 0.2), (Level(cosine=0.02), 0.0, 0.06), (Level(noise=40), 0.1, 0.4)],
    ids=lambda value: value.name if isinstance(value, Level) else "",
)
def test_levels_are_as_hard_as_they_say(bench, level, least, most):
    """Agreement of the gradients as measured, and the loss that no word can explain."""
    concept, config = Concept.read("heart"), TrainConfig(initializer="heart")
    dataset = bench.dataset(concept, "train", config, with_captions=False)
    batches = fixed_batches(dataset, config)
    with bench.model.training() as model:
        start = initial_embedding(model.vocabularies(), "S*", "heart", 1)
        drawn = training_batches(dataset, config, torch.Generator().manual_seed(0))
        gradients = [gradients_of(harder(model, level, start, dataset, config), start, batches, s) for s in (1, 256)]
        torch.testing.assert_close(*gradients)
        model_at_level = harder(model, level, start, dataset, config)
        assert least <= model_at_level.measured.agreement <= most
        found = F.normalize(gradients_of(model_at_level, start, [next(drawn) for _ in range(32)], 1))
        assert least - 0.1 < (found @ found.T).fill_diagonal_(0).sum() / (32 * 31) < most + 0.1
        tokens = [start, *new_image_tokens(model.vocabularies(), dataset.image_triggers, start, 1)]
        plain = mean_loss(model, tokens, batches)
        losses = [fixed_losses(model_at_level, tokens, batches) for _ in range(2)]
    assert torch.equal(*losses), "the same draw has the same noise"
    if level.noise:
        assert losses[0].mean() > 5 * plain
    else:
        assert losses[0].mean().item() == pytest.approx(plain)


def test_the_checks_on_a_card_run_on_small_models(tmp_path):
    parts = ["steps", "server"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--parts", *parts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert [len(results[part]) for part in parts] == [3, 1]
    assert not [row for part in parts for row in results[part] if "failed" in row]
    assert results["server"][0]["resumed"]
    assert "| SDXL | 64 | 2 |" in path.with_suffix(".md").read_text()
