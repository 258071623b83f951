"""The demo model and what it can learn: a word that explains pictures it has not been trained on."""

import json

import pytest
from measure import CONCEPTS, Bench, Concept, world_words

FOLDERS = sorted(path.parent for path in CONCEPTS.glob("*/concept.json"))


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.mark.parametrize("name", ["heart", "lagoon"])
def test_learned_word_beats_every_word_of_the_vocabulary(bench, name):
    """An object and a style, with the node's defaults; fixed noise, pictures held out."""
    row = bench.learn(Concept.read(name), world_words()[::4])
    assert row["learned"] < row["initializer"]
    assert row["learned"] < row["best word"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_concepts_are_complete(folder):
    about = json.loads((folder / "concept.json").read_text())
    assert about.keys() >= {"kind", "initializer", "description", "identity"}
    for part, least, most in (("train", 3, 5), ("heldout", 8, 8)):
        pictures = sorted((folder / part).glob("*.png"))
        assert least <= len(pictures) <= most
        for picture in pictures:
            assert "{}" in picture.with_suffix(".txt").read_text()


def test_there_are_enough_concepts():
    kinds = [json.loads((folder / "concept.json").read_text())["kind"] for folder in FOLDERS]
    assert kinds.count("object") >= 8
    assert kinds.count("style") >= 2


def test_weights_are_small():
    assert sum(path.stat().st_size for path in (CONCEPTS.parent / "models").iterdir()) < 32 * 2**20
