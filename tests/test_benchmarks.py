"""What benchmarks keep of finished cells, and how they make the demo model harder."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from benchmarks.cells import add_cell, read_cells
from benchmarks.levels import Level, harder
from demo.measure import Bench, Concept
from dev.in_process import ROOT
from textual_inversion import TrainConfig, initial_embedding
from textual_inversion.agreement import Agreement
from textual_inversion.dataset import fixed_batches, training_batches
from textual_inversion.gradients import Share, compute_gradients
from textual_inversion.image_tokens import TrainedTokens, new_image_tokens
from textual_inversion.objective import fixed_losses, mean_loss


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


@pytest.mark.parametrize(
    ("level", "least", "most"),
    [
        (Level(), 0.7, 0.95),
        (Level(cosine=0.1), 0.05, 0.2),
        (Level(cosine=0.02), 0.0, 0.06),
        (Level(noise=40), 0.1, 0.5),
    ],
    ids=lambda value: value.name if isinstance(value, Level) else "",
)
def test_levels_are_as_hard_as_they_say(bench, level, least, most):
    """Agreement of the gradients in training, and the loss that no word can explain."""
    concept, config = Concept.read("heart"), TrainConfig(initializer="heart")
    dataset = bench.dataset(concept, "train", config, with_captions=False)
    batches = fixed_batches(dataset, config)
    with bench.model.training() as model:
        start = initial_embedding(model.vocabularies(), "S*", "heart", 1)
        model_at_level = harder(model, level, start, dataset, config)
        assert least <= model_at_level.measured.agreement <= most
        image_tokens = new_image_tokens(model.vocabularies(), dataset.image_triggers, start, 1)
        found, word = Agreement(), TrainedTokens(start.trainable(), image_tokens)
        for batch in itertools.islice(training_batches(dataset, config, torch.Generator().manual_seed(0)), 24):
            compute_gradients(model_at_level, Share(word, [batch]))
            found.add([vectors.grad for vectors in word.concept.parameters() if vectors.grad is not None])
        assert least <= found.value <= most
        tokens = [start, *image_tokens]
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
