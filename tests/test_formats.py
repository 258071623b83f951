"""Embedding files: what is written can be read, by us and by the library everybody uses."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from ti_pack.textual_inversion import Embedding, UserError, formats


@pytest.fixture
def embedding():
    vectors = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    return Embedding("S*", vectors, {"steps": "500", "base_model": "model.safetensors"})


def test_round_trip(tmp_path, embedding):
    path = tmp_path / "word.safetensors"
    formats.write(embedding, path)
    again = formats.read(path)
    assert again.trigger == "S*"
    assert again.metadata["steps"] == "500"
    assert again.metadata["base_model"] == "model.safetensors"
    for key, vectors in embedding.vectors.items():
        assert torch.equal(again.vectors[key], vectors)
    assert set(load_file(path)) == {"clip_l", "clip_g"}
    with safe_open(path, "pt") as file:
        assert file.metadata()["trigger"] == "S*"
    assert path.stat().st_size < 20_000


def test_vectors_of_every_float_type_become_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({"clip_l": torch.ones(768, dtype=dtype)}, tmp_path / "half.safetensors")
        vectors = formats.read(tmp_path / "half.safetensors").vectors["clip_l"]
        assert vectors.dtype == torch.float32
        assert vectors.shape == (1, 768)


def test_name_that_exists_gets_a_number(tmp_path, embedding):
    names = []
    for _ in range(3):
        path = formats.free_path(tmp_path, "word")
        formats.write(embedding, path)
        names.append(path.name)
    assert names == ["word.safetensors", "word-2.safetensors", "word-3.safetensors"]


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, embedding, monkeypatch):
    path = tmp_path / "word.safetensors"
    formats.write(embedding, path)
    before = path.read_bytes()

    def full_disk(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        formats.write(embedding.scaled(2), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["word.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(4, 4, 3, 3)}, r"no embedding: weight has shape \(4, 4, 3, 3\)"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "no embedding: ids"),
        ({"clip_l": torch.full((1, 768), float("nan"))}, "holds NaN"),
        ({"matrix": torch.zeros(2000, 768)}, "too large"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        formats.read(tmp_path / "other.safetensors")


def test_broken_file_is_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        formats.read(tmp_path / "broken.safetensors")
