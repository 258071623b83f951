"""What version 0.1.0 left on disk: unfinished runs resume, and are found by settings and pictures.

``version_0_1_0/`` was written by that version: the state after 13 steps on the demo's hearts, and what the
same runs had learned at their end. Workflows of that version are what test_server.py queues.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.measure import Bench, Concept
from textual_inversion import TrainConfig, initial_embedding, train
from textual_inversion.state import fingerprint, load_state

OLD = Path(__file__).resolve().parent / "version_0_1_0"


@pytest.mark.parametrize(("optimizer", "settings"), [("sphere", {}), ("adamw", {"steps": 30})])
def test_unfinished_run_resumes(optimizer, settings, tmp_path):
    saved = load_state(Path(shutil.copy(OLD / f"{optimizer}.state", tmp_path)))
    assert saved is not None
    bench, concept = Bench(), Concept.read("heart")
    config = TrainConfig(kind="object", initializer=saved["initializer"], optimizer=optimizer, **settings)
    dataset = bench.dataset(concept, "train", config, with_captions=False)
    with bench.model.training() as model:
        start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)
        first, *_, last = train(model, start.trainable(), dataset, config, saved["training"])
    assert first.number == 13
    assert last.number == config.steps
    learned = load_file(OLD / "learned.safetensors")[optimizer]
    torch.testing.assert_close(last.best.vectors["clip_l"], learned, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "beginning"),
    [
        (TrainConfig(), "d10fe81cc0dc29c9"),
        (TrainConfig(per_image_tokens=2, averaging=0.5, learning_rate=0.2, seed=7), "e90b2bbf6f466df1"),
    ],
)
def test_fingerprint_is_that_of_the_last_version(config, beginning):
    """Renamed settings keep their name here, and the default rate is the one that was used."""
    assert fingerprint(config, [], [torch.zeros(2)]).startswith(beginning)
