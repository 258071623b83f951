"""Embedding files: what every trainer writes can be read, what we write its tool can read."""

import base64
import json
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from textual_inversion import Embedding, UserError, formats

ROOT = Path(__file__).resolve().parent.parent
SD1, SD2, SDXL = {"clip_l": 768}, {"clip_h": 1024}, {"clip_l": 768, "clip_g": 1280}
SD3, FLUX = {**SDXL, "t5xxl": 4096}, {"clip_l": 768, "t5xxl": 4096}


def vectors(encoders: dict[str, int], count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {key: torch.randn(count, width, generator=generator) for key, width in encoders.items()}


@pytest.fixture
def embedding():
    return Embedding("S*", vectors(SDXL), {"steps": "500", "base_model": "model.safetensors"})


# What the trainers write ---------------------------------------------------------------------------


def parameter_dict(content: dict[str, torch.Tensor]) -> torch.nn.ParameterDict:
    return torch.nn.ParameterDict({key: torch.nn.Parameter(value) for key, value in content.items()})


def original(path: Path, v: dict) -> None:
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameter_dict({"*": v["clip_l"]})}
    torch.save(content, path)


def before_zip(path: Path, v: dict) -> None:
    torch.save({"string_to_param": {"*": v["clip_l"]}}, path, _use_new_zipfile_serialization=False)


def a1111(path: Path, v: dict) -> None:
    notes = {"name": "word", "step": 499, "sd_checkpoint": "ab12", "sd_checkpoint_name": "sd15"}
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": v["clip_l"]}, **notes}, path)


def a1111_json(v: dict) -> bytes:
    params = {"*": {"TORCHTENSOR": v["clip_l"].tolist()}}
    return json.dumps({"string_to_token": {"*": 265}, "string_to_param": params, "name": "word", "step": 499}).encode()


def a1111_png(path: Path, v: dict) -> None:
    text = PngInfo()
    text.add_text("sd-ti-embedding", base64.b64encode(a1111_json(v)).decode())
    Image.new("RGB", (64, 64)).save(path, pnginfo=text)


def a1111_pixels(path: Path, v: dict, height: int = 512) -> None:
    """The documented layout: low and high halves of zlib's bytes, masked, left and right of the picture."""
    packed = np.frombuffer(zlib.compress(a1111_json(v), 9), np.uint8)
    length = packed.size + (-packed.size) % (3 * height)
    blocks = [np.resize(half, length).reshape(height, -1, 3) for half in (packed & 0x0F, packed >> 4)]
    state, mask = 0, []
    for _ in range(length):
        state = (state * 1664525 + 1013904223) % 2**32
        mask.append(state % 255 & 0x0F)
    shade = np.full(blocks[0].shape, 0x50, np.uint8)  # A1111 draws a pattern into the high bits
    left, right = (block ^ np.array(mask, np.uint8).reshape(block.shape) | shade for block in blocks)
    picture = np.random.default_rng(0).integers(1, 255, (height, 64, 3), dtype=np.uint8)
    black = np.zeros((height, 1, 3), np.uint8)
    Image.fromarray(np.concatenate([left, black, picture, black, right], axis=1)).save(path)


def renamed(**names):
    """A safetensors file with other keys: names of the file by names of ours."""
    return lambda path, v: save_file({theirs: v[ours] for theirs, ours in names.items()}, path)


WRITERS = {
    "diffusers": (SD1, ".safetensors", lambda path, v: save_file({"<word>": v["clip_l"]}, path)),
    "diffusers bin": (SD1, ".bin", lambda path, v: torch.save({"<word>": v["clip_l"]}, path)),
    "diffusers SD2": (SD2, ".safetensors", lambda path, v: save_file({"<word>": v["clip_h"]}, path)),
    "bare tensor": (SD1, ".pt", lambda path, v: torch.save(v["clip_l"], path)),
    "original": (SD1, ".pt", original),
    "torch before 1.6": (SD1, ".pt", before_zip),
    "A1111": (SD1, ".pt", a1111),
    "A1111 SDXL": (SDXL, ".pt", lambda path, v: torch.save(dict(v), path)),
    "A1111 png": (SD1, ".png", a1111_png),
    "A1111 pixels": (SD1, ".png", a1111_pixels),
    "kohya, invoke": (SD1, ".safetensors", renamed(emb_params="clip_l")),
    "kohya pt": (SD1, ".pt", lambda path, v: torch.save({"emb_params": v["clip_l"]}, path)),
    "kohya, invoke SDXL": (SDXL, ".safetensors", renamed(clip_l="clip_l", clip_g="clip_g")),
    "OneTrainer": (SD1, ".safetensors", renamed(emp_params="clip_l")),
    "OneTrainer Flux": (FLUX, ".safetensors", renamed(clip_l="clip_l", t5="t5xxl")),
    "OneTrainer LoRA": (SDXL, ".safetensors", renamed(**{f"bundle_emb.word.{key}": key for key in SDXL})),
    "bundle for ComfyUI": (SD1, ".safetensors", renamed(**{"bundle_emb.word.string_to_param.*": "clip_l"})),
    "diffusers advanced": (SD3, ".safetensors", renamed(clip_l="clip_l", clip_g="clip_g", t5="t5xxl")),
    "ComfyUI SD2": (SD2, ".safetensors", renamed(clip_h="clip_h")),
    "ComfyUI HiDream": ({**SD3, "llama": 4096}, ".safetensors", lambda path, v: save_file(v, path)),
    "ComfyUI Z-Image": ({"qwen3_4b": 2560}, ".safetensors", renamed(qwen3_4b="qwen3_4b")),
    "ComfyUI Klein": ({"qwen3_8b": 4096}, ".safetensors", renamed(qwen3_8b="qwen3_8b")),
    "ComfyUI Flux 2": ({"mistral3_24b": 5120}, ".safetensors", renamed(mistral3_24b="mistral3_24b")),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_file_of(name, count, tmp_path):
    encoders, suffix, write = WRITERS[name]
    written = vectors(encoders, count)
    path = tmp_path / f"word{suffix}"
    write(path, written)
    found = formats.read(path).for_encoders(encoders)
    assert found.trigger in ("word", "<word>")
    assert found.vectors.keys() == encoders.keys()
    for key in encoders:
        assert torch.equal(found.vectors[key], written[key])


def test_one_dimensional_vector_of_the_concepts_library(tmp_path):
    written = vectors(SD1, 1)
    torch.save({"<word>": written["clip_l"][0]}, tmp_path / "learned_embeds.bin")
    found = formats.read(tmp_path / "learned_embeds.bin")
    assert found.trigger == "<word>"
    assert torch.equal(found.for_encoders(SD1).vectors["clip_l"], written["clip_l"])


def test_pair_of_files_for_sdxl(tmp_path):
    written = vectors(SDXL)
    paths = [tmp_path / "learned_embeds.safetensors", tmp_path / "learned_embeds_2.safetensors"]
    for path, tensor in zip(paths, written.values(), strict=True):
        save_file({"<word>": tensor}, path)
    for order in (paths, paths[::-1]):
        found = formats.read_pair(*order).for_encoders(SDXL)
        assert found.trigger == "<word>"  # learned_embeds says nothing
        assert all(torch.equal(found.vectors[key], written[key]) for key in SDXL)
    with pytest.raises(UserError, match=r"it has <word> \(768\), the model takes clip_l \(768\), clip_g \(1280\)"):
        formats.read(paths[0]).for_encoders(SDXL)


def test_vectors_behind_the_encoder_are_named_and_left_out(tmp_path):
    save_file({"clip_l": torch.ones(1, 768), "clip_l_out": torch.ones(1, 768)}, tmp_path / "both.safetensors")
    found = formats.read(tmp_path / "both.safetensors")
    assert found.vectors.keys() == {"clip_l"}
    assert found.metadata["left out"] == "clip_l_out"
    save_file({"clip_l_out": torch.ones(1, 768)}, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="no token vectors, only clip_l_out"):
        formats.read(tmp_path / "out.safetensors")


def test_words_bundled_in_a_lora_among_its_weights(tmp_path):
    path = tmp_path / "lora.safetensors"
    words = {f"bundle_emb.{word}.clip_l": torch.full((2, 768), float(n)) for n, word in enumerate(("cat", "dog"))}
    save_file({**words, **{f"lora_{n}.weight": torch.zeros(4, 4, 3, 3) for n in range(30)}}, path)
    assert formats.read(path, "dog").trigger == "dog"
    assert formats.read(path, "dog").vectors["clip_l"].eq(1).all()
    with pytest.raises(UserError, match="contains the embeddings cat, dog: choose one"):
        formats.read(path)


def test_vectors_go_to_an_encoder_only_where_one_fits(tmp_path):
    t5 = Embedding("w", {"t5xxl": torch.ones(1, 4096)})
    with pytest.raises(UserError, match=r"has t5xxl \(4096\), the model takes llama \(4096\)"):
        t5.for_encoders({"llama": 4096})
    nameless = Embedding("w", {"emb_params": torch.ones(1, 4096)}, unnamed=frozenset({"emb_params"}))
    assert nameless.for_encoders({"t5xxl": 4096}).vectors.keys() == {"t5xxl"}
    with pytest.raises(UserError, match="another model"):
        nameless.for_encoders({"t5xxl": 4096, "llama": 4096})
    with pytest.raises(UserError, match="another model"):
        Embedding("w", {"clip_l": torch.ones(1, 96)}).for_encoders(SD1)


def test_vectors_of_every_float_type_become_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({"clip_l": torch.ones(768, dtype=dtype)}, tmp_path / "half.safetensors")
        torch.save({"*": torch.ones(768, dtype=dtype)}, tmp_path / "half.pt")
        for name in ("half.safetensors", "half.pt"):
            (found,) = formats.read(tmp_path / name).vectors.values()
            assert found.dtype == torch.float32
            assert found.shape == (1, 768)


# What we write -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("encoders", [SD1, SD2, SDXL, SD3, FLUX], ids=lambda encoders: "+".join(encoders))
@pytest.mark.parametrize("format", formats.FORMATS)
def test_round_trip(format, encoders, count, tmp_path):
    word = Embedding("<word>", vectors(encoders, count), {"steps": "7", "base_model": "model"})
    if format == "concepts-library" and len(encoders) > 1:
        with pytest.raises(UserError, match="one text encoder; this embedding has"):
            formats.write_new(word, tmp_path, "word", format)
        assert not list(tmp_path.iterdir())
        return
    written = formats.write_new(word, tmp_path, "word", format)
    again = formats.read_pair(written[0], written[1]) if len(written) == 2 else formats.read(written[0])
    assert len(written) == (2 if format == "diffusers" and encoders == SDXL else 1)
    assert again.trigger == ("<word>" if format == "comfyui" else "word")
    for key, tensor in again.for_encoders(encoders).vectors.items():
        assert torch.equal(tensor, word.vectors[key])
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_comfyui_file_says_where_it_comes_from(tmp_path, embedding):
    (path,) = formats.write(embedding, tmp_path / "word.safetensors")
    assert set(load_file(path)) == {"clip_l", "clip_g"}
    with safe_open(path, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if not key.startswith("modelspec.")}
    assert metadata == {"trigger": "S*", "steps": "500", "base_model": "model.safetensors"}
    assert path.stat().st_size < 20_000


def test_card_shows_the_picture(tmp_path, embedding):
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    (path,) = formats.write(embedding, tmp_path / "card.png", "png-card", picture)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_names_of_encoders_are_found_when_other_files_are_converted(tmp_path):
    for number, width in (("", 768), ("_2", 1280)):
        save_file({"<w>": torch.ones(1, width)}, tmp_path / f"pair{number}.safetensors")
    nameless = formats.read_pair(tmp_path / "pair.safetensors", tmp_path / "pair_2.safetensors")
    assert nameless.unnamed == nameless.vectors.keys() == {"<w>", "<w> of pair_2.safetensors"}
    (path,) = formats.write(nameless, tmp_path / "w.safetensors")
    assert set(load_file(path)) == {"clip_l", "clip_g"}


# Keys ----------------------------------------------------------------------------------------------

# Text encoders that hold embeddings for another model than their width would say, or for none.
OTHER_ENCODERS = ["gemma4", "t5base", "umt5base", "t5gemma", "byt5_small", "gpt_oss", "hidream_o1", "lyrics"]
OTHER_ENCODERS += ["sam3_clip", "qwen35_08b", "qwen3vl_4b"]
GENERIC_KEYS = ["*", "emb_params", "emp_params", "string_to_param.*", "<word>", "my style"]


@pytest.mark.parametrize("width", [768, 1024, 1280, 1472, 2560])
@pytest.mark.parametrize("key", OTHER_ENCODERS)
def test_key_of_an_encoder_is_kept_whatever_its_width(tmp_path, key, width):
    rows = vectors({key: width})
    save_file(rows, tmp_path / "word.safetensors")
    found = formats.read(tmp_path / "word.safetensors")
    assert found.trigger == "word"
    assert not found.unnamed
    (path,) = formats.write(found, tmp_path / "again.safetensors")
    assert load_file(path).keys() == {key}
    again = formats.read(path)
    assert again.trigger == "word"
    assert torch.equal(again.for_encoders({key: width}).vectors[key], rows[key])
    with pytest.raises(UserError, match="another model"):
        again.for_encoders({"clip_l": width})


@pytest.mark.parametrize(("width", "usual"), [(768, "clip_l"), (1024, "clip_h"), (1280, "clip_g"), (2560, None)])
@pytest.mark.parametrize("key", GENERIC_KEYS)
def test_key_that_says_nothing_is_settled_by_the_model_or_the_usual_width(tmp_path, key, width, usual):
    rows = vectors({key: width})
    save_file(rows, tmp_path / "word.safetensors")
    found = formats.read(tmp_path / "word.safetensors")
    assert found.trigger == "word"
    assert found.metadata.get("inner name") == (key if key in ("<word>", "my style") else None)
    assert found.unnamed == {key}
    assert torch.equal(found.for_encoders({"t5base": width}).vectors["t5base"], rows[key])
    (path,) = formats.write(found, tmp_path / "again.safetensors")
    assert load_file(path).keys() == {usual or key}
    again = formats.read(path)
    assert again.trigger == found.trigger
    assert again.unnamed == (set() if usual else {key})
    assert torch.equal(again.vectors[usual or key], rows[key])


def test_two_keys_that_say_nothing(tmp_path):
    path = tmp_path / "word.safetensors"
    save_file({"a": torch.ones(1, 768), "b": torch.ones(1, 1280)}, path)
    found = formats.read(path)
    assert found.unnamed == {"a", "b"}
    assert found.for_encoders(SDXL).vectors.keys() == SDXL.keys()
    (written,) = formats.write(found, tmp_path / "again.safetensors")
    assert load_file(written).keys() == SDXL.keys()
    save_file({"a": torch.ones(1, 2304), "b": torch.ones(1, 3584)}, path)
    (written,) = formats.write(formats.read(path), tmp_path / "again.safetensors")
    assert formats.read(written).unnamed == {"a", "b"}
    save_file({"clip_l": torch.ones(1, 768), "b": torch.ones(1, 768)}, path)
    with pytest.raises(UserError, match="two sets of vectors for clip_l"):
        formats.write(formats.read(path), tmp_path / "w.safetensors")


def test_encoders_of_a_newer_comfyui_can_be_named(tmp_path):
    save_file({"newest": torch.ones(1, 768)}, tmp_path / "word.safetensors")
    assert formats.read(tmp_path / "word.safetensors").metadata == {"inner name": "newest"}
    found = formats.read(tmp_path / "word.safetensors", encoders=("clip_l", "newest"))
    assert not found.metadata
    (path,) = formats.write(found, tmp_path / "again.safetensors")
    assert load_file(path).keys() == {"newest"}


# What is written, and how --------------------------------------------------------------------------


def test_name_that_exists_gets_a_number(tmp_path, embedding):
    embedding = Embedding("S*", vectors(SD1))
    names = []
    for format in ("comfyui", "a1111", "png-card", "comfyui", "png-card"):  # embedding:word would mean any
        names += [path.name for path in formats.write_new(embedding, tmp_path, "word", format)]
    assert names == ["word.safetensors", "word-2.pt", "word-3.png", "word-4.safetensors", "word-5.png"]


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


def test_write_that_reads_back_differently_is_an_error(tmp_path, embedding, monkeypatch):
    """A disk that changes numbers, or cuts the file: the old file stays, and what was written too, by another name."""
    (path,) = formats.write(embedding, tmp_path / "word.safetensors")
    before, write_bytes = path.read_bytes(), Path.write_bytes
    for spoil, problem in (
        (lambda data: data[:-4] + bytes(4), "other numbers"),
        (lambda data: data[:-9], "the middle|cannot be read|incomplete"),
    ):
        monkeypatch.setattr("pathlib.Path.write_bytes", lambda path, data, spoil=spoil: write_bytes(path, spoil(data)))
        with pytest.raises(UserError, match=rf"(?s)does not read back.*{problem}.*kept as word-unchecked"):
            formats.write(embedding.scaled(2), path)
        with pytest.raises(UserError, match="kept as word-unchecked"):
            formats.write_new(embedding.scaled(2), tmp_path, "word")
    monkeypatch.undo()
    assert path.read_bytes() == before
    kept = {file.name: file.stat().st_size for file in tmp_path.iterdir() if file != path}
    assert len(kept) == 4
    assert min(kept.values()) > 16_000
    assert kept.keys() == {f"word-unchecked{end}.safetensors" for end in ("", "-2", "-3", "-4")}


# What is no embedding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(4, 4, 3, 3)}, r"not an embedding: weight has shape \(4, 4, 3, 3\)"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "not an embedding: ids holds no floating-point numbers"),
        ({"clip_l": torch.full((1, 768), float("nan"))}, "contains NaN"),
        ({"matrix": torch.zeros(2000, 768)}, r"not an embedding: matrix has shape \(2000, 768\)"),
        ({f"layer{n}": torch.zeros(8) for n in range(40)}, "not an embedding: it contains 40 tensors"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_files_are_refused(tmp_path, tensors, message, suffix):
    path = tmp_path / f"other{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(UserError, match=message):
        formats.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 100, "is none of safetensors, pt, bin and PNG; download or copy it again"),
        (b"", "is empty; download or copy it again"),
        (bytes(5000), "contains only zeros: the download broke off"),
        (b"\x80\x02" + b"\xff" * 50, "cut or damaged"),
        (b"PK\x03\x04" + b"\xff" * 50, "cut or damaged"),
        (b"\x89PNG" + b"\xff" * 50, "is none of"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 50, "too large for a picture|cannot be read"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 16384\n",
            "Git LFS pointer, 130 bytes that only name the real file: download the file itself",
        ),
        (b"<!DOCTYPE html>\n<html><head>", "is a web page, not an embedding: download the file itself"),
        (b"\n\n  <html lang='en'>", "is a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "is a web page"),
        (b'{"error":"Invalid username or password."}', "is a JSON text"),
        (b'{"name":{"a": 1}, "more": "and more"}', "is a JSON text"),
        (b'[{"id": 1}]', "is a JSON text"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "is a JPEG: embeddings are read from PNG pictures only"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "is a WebP"),
        (b"\x1f\x8b\x08" + bytes(100), "is a packed archive: unpack it"),
        (b"7z\xbc\xaf\x27\x1c", "is a packed archive"),
    ],
)
def test_each_thing_that_is_no_embedding_has_its_sentence(tmp_path, content, message):
    for name in ("broken", "broken.safetensors", "broken.pt", "broken.png"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            formats.read(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "A1111 pixels"])
def test_cut_files_say_so(name, tmp_path):
    """At every tenth of the file; a picture whose text is whole is still a card."""
    encoders, suffix, write = WRITERS[name]
    path = tmp_path / f"word{suffix}"
    write(path, vectors(encoders))
    data = path.read_bytes()
    for tenth in range(1, 10):
        path.write_bytes(data[: len(data) * tenth // 10])
        if suffix == ".png" and b"sd-ti-embedding" in path.read_bytes() and tenth == 9:
            continue
        with pytest.raises(UserError, match=r"cut|middle|damaged|cannot be read|picture"):
            formats.read(path)


def test_ordinary_picture_is_refused(tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "picture.png")
    with pytest.raises(UserError, match="a picture without an embedding"):
        formats.read(tmp_path / "picture.png")


def test_pickled_rubbish_is_refused(tmp_path):
    for content in ([1, 2], {"a": "b"}, {"string_to_param": 3}, OrderedDict()):
        torch.save(content, tmp_path / "rubbish.pt")
        with pytest.raises(UserError, match="not an embedding"):
            formats.read(tmp_path / "rubbish.pt")


def test_every_format_has_a_name_in_the_choices():
    assert tuple(formats.FORMATS) == get_args(formats.FormatName)


@pytest.mark.parametrize(
    ("beginning", "length"),
    [(b"\x80\x02", 640), (b"\x80\x04", 1152), (b"\x80\x02", 66176), (b"\x80\x05", 1408), (b"\x80\x03", 896)],
)
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, beginning, length):
    """A safetensors file begins with the length of its header; its metadata decides that length."""
    embedding = Embedding("S*", {"clip_l": torch.rand(1, 768)})
    (path,) = formats.write(Embedding("S*", embedding.vectors, {"note": ""}), tmp_path / "bare.safetensors")
    bare = int.from_bytes(path.read_bytes()[:8], "little")
    noted = Embedding("S*", embedding.vectors, {"note": "x" * (length - bare)})
    (path,) = formats.write(noted, tmp_path / "word.safetensors")
    assert path.read_bytes().startswith(beginning)
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert torch.equal(formats.read(path).vectors["clip_l"], embedding.vectors["clip_l"])


# Magic numbers -------------------------------------------------------------------------------------


def test_every_length_of_a_header(tmp_path):
    """Two bytes of a safetensors file are the length of its header, so that they look like anything."""
    path, rows = tmp_path / "word.safetensors", torch.rand(1, 16)
    for length in range(1400):
        save_file({"clip_l": rows}, path, {"note": "x" * length})
        assert torch.equal(formats.read(path).vectors["clip_l"], rows)


@pytest.mark.parametrize("beginning", [b"\x80\x02", b"\x80\x04", b"PK", b"\x1f\x8b", b"RI", b"7z", b"\xff\xd8", b"<\0"])
def test_a_header_whose_length_looks_like_another_file(tmp_path, beginning):
    wanted = int.from_bytes(beginning, "little") % 65536
    wanted += 65536 * (wanted < 200)
    wanted -= wanted % 8  # safetensors pads headers to eight bytes
    bare = len(save({"clip_l": torch.ones(1, 4)}, {"note": ""})) - 8 - 16
    path = tmp_path / "word.bin"
    save_file({"clip_l": torch.ones(1, 4)}, path, {"note": "x" * (wanted - bare)})
    assert formats.read(path).vectors["clip_l"].eq(1).all()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".png", ".ckpt", ""])
@pytest.mark.parametrize("name", WRITERS)
def test_the_name_never_decides_what_a_file_is(name, suffix, tmp_path):
    encoders, _, write = WRITERS[name]
    if name == "A1111 pixels" and suffix not in (".pt", ""):
        return  # slow to write
    written = vectors(encoders)
    write(tmp_path / f"word{WRITERS[name][1]}", written)
    path = (tmp_path / f"word{WRITERS[name][1]}").rename(tmp_path / f"other{suffix}")
    found = formats.read(path).for_encoders(encoders)
    assert all(torch.equal(found.vectors[key], written[key]) for key in encoders)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_vectors_of_eight_bits(tmp_path, dtype):
    rows = torch.randn(3, 768).to(dtype)
    save_file({"clip_l": rows}, tmp_path / "word.safetensors")
    torch.save({"clip_l": rows}, tmp_path / "word.pt")
    for name in ("word.safetensors", "word.pt"):
        assert torch.equal(formats.read(tmp_path / name).vectors["clip_l"], rows.float())


def pickles(rows: torch.Tensor) -> dict:
    """Contents that are written in more ways than one."""
    whole = torch.cat([torch.zeros(5, rows.shape[1]), rows])
    return {
        "a row of a table": {"*": whole[5:]},
        "transposed": {"*": rows.t().contiguous().t()},
        "a parameter": {"*": torch.nn.Parameter(rows)},
        "an OrderedDict": OrderedDict({"*": rows}),
        "a ParameterDict": torch.nn.ParameterDict({"*": rows}),
        "the original": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameter_dict({"*": rows})},
        "a list": [{"*": rows}],
        "notes of numpy": {"string_to_param": {"*": rows}, "step": np.int64(3), "name": "x", "size": rows.shape},
        "a tensor alone": rows,
        "a double": {"*": rows.double()},
        "a bfloat16": {"*": rows.bfloat16()},
        "shared": {"string_to_param": {"*": rows}, "copy": rows},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", pickles(torch.ones(2, 4)))
def test_our_reader_of_pickles_against_torch(name, is_zip, protocol, tmp_path):
    rows = torch.rand(3, 768)
    content = pickles(rows)[name]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    (found,) = formats.read(tmp_path / "w.pt").vectors.values()
    content = torch.load(tmp_path / "w.pt", weights_only=False)
    content = content[0] if isinstance(content, list) else content
    content = content.get("string_to_param", content) if isinstance(content, dict) else content
    expected = content if torch.is_tensor(content) else dict(content.items())["*"]
    assert torch.equal(found, expected.detach().float())


# A1111 ---------------------------------------------------------------------------------------------

# The names that modules/safe.py of A1111 (1.10) allows in a pickle, and the members of an archive.
A1111_NAMES = {
    "collections": {"OrderedDict"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_device_tensor_from_numpy"},
    "torch": {
        *("FloatStorage", "HalfStorage", "IntStorage", "LongStorage", "DoubleStorage", "ByteStorage"),
        *("BFloat16Storage", "float32"),
    },
    "torch.nn.modules.container": {"ParameterDict"},
}
A1111_MEMBERS = re.compile(r"[^/]+/(data/\d+|version|data\.pkl)")


class AsA1111Checks(pickle.Unpickler):
    def find_class(self, module, name):
        assert name in A1111_NAMES.get(module, ()), f"A1111 forbids {module}.{name}"
        return super().find_class(module, name)

    def persistent_load(self, pid):
        assert pid[0] == "storage"
        return torch.storage.TypedStorage(_internal=True)


def loaded_by_a1111(path: Path):
    """Through its check of pickles, then torch.load; or its reader of pictures or of safetensors."""

    def decode(item):
        return torch.tensor(item["TORCHTENSOR"]) if "TORCHTENSOR" in item else item

    if path.suffix == ".png":
        with PngImageFile(path) as image:
            return json.loads(base64.b64decode(image.text["sd-ti-embedding"]), object_hook=decode)
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                assert A1111_MEMBERS.fullmatch(member), f"A1111 refuses {member}"
            (pickled,) = (member for member in archive.namelist() if member.endswith("/data.pkl"))
            AsA1111Checks(archive.open(pickled)).load()
    else:
        with path.open("rb") as file:
            for _ in range(5):
                AsA1111Checks(file).load()
    return torch.load(path, map_location="cpu", weights_only=False)


def embedding_of_a1111(data) -> dict[str, torch.Tensor]:
    """What its create_embedding_from_data makes of a loaded file: vectors, by key where there are several."""
    if "string_to_param" in data:
        (vectors,) = data["string_to_param"].values()
        return {"": vectors.detach().float()}
    assert type(data) is dict
    if "clip_g" in data and "clip_l" in data:
        vectors = {key: value.detach().float() for key, value in data.items()}  # of every value
        assert len({len(rows) for rows in vectors.values()}) == 1
        return vectors
    ((_, vectors),) = data.items()
    assert type(vectors) is torch.Tensor
    return {"": (vectors[None] if vectors.ndim == 1 else vectors).detach().float()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("encoders", [SD1, SD2, SDXL, SD3], ids=lambda encoders: "+".join(encoders))
@pytest.mark.parametrize("format", ["a1111", "png-card", "comfyui", "concepts-library"])
def test_a1111_reads(format, encoders, count, tmp_path):
    """Along its whole path, by its published rules."""
    if format == "concepts-library" and len(encoders) > 1:
        return
    word = Embedding("word", vectors(encoders, count), {"steps": "7", "base_model": "model"})
    (path,) = formats.write(word, tmp_path / f"word{formats.FORMATS[format].suffix}", format)
    data = loaded_by_a1111(path)
    found = embedding_of_a1111(data)
    if len(encoders) == 1:
        assert torch.equal(found[""], next(iter(word.vectors.values())))
    else:
        assert found.keys() == encoders.keys()
        assert all(torch.equal(found[key], word.vectors[key]) for key in encoders)
    if format in ("a1111", "png-card") and len(encoders) == 1:
        assert (data["name"], data["step"], data["sd_checkpoint_name"]) == ("word", 7, "model")


# Names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "trigger"),
    [
        ("verybadimagenegative_v1.3.pt", "verybadimagenegative_v1.3"),
        ("unaestheticXL_Sky3.1.safetensors", "unaestheticXL_Sky3.1"),
        ("gasai yuno.pt", "gasai_yuno"),
        ("embeddings.pt", "_embeddings"),
        ("Embedding.bin", "_Embedding"),
        ("bad(hand), v4.pt", "bad_hand___v4"),
        ("a:b|c.pt", "a_b_c"),
        ("S*.pt", "S*"),
        ("猫の.pt", "猫の"),
        ("x" * 200 + ".pt", "x" * 200),
        ("learned_embeds.bin", "inside"),
        ("learned_embeds-steps-500.bin", "inside"),
    ],
)
def test_the_name_of_the_file_is_the_word(tmp_path, file, trigger):
    """As in ComfyUI, A1111 and InvokeAI; what another program wrote inside is shown."""
    torch.save({"string_to_param": {"*": torch.ones(1, 768)}, "name": "inside"}, tmp_path / file)
    found = formats.read(tmp_path / file)
    assert found.trigger == trigger
    assert found.metadata == ({} if trigger == "inside" else {"inner name": "inside"})


def test_files_of_this_pack_keep_the_word_that_was_trained(tmp_path, embedding):
    (path,) = formats.write(embedding, tmp_path / "other.safetensors")
    assert formats.read(path).trigger == "S*"
    assert "inner name" not in formats.read(path).metadata


@pytest.mark.parametrize("key", ["emb", "*", "emb_params", "text_encoders_0", "string_to_param.*"])
def test_keys_of_other_programs_are_no_words(tmp_path, key):
    save_file({key: torch.ones(2, 768)}, tmp_path / "word.safetensors")
    found = formats.read(tmp_path / "word.safetensors")
    assert (found.trigger, found.metadata) == ("word", {})


@pytest.mark.parametrize("keys", [("emb", "emb2"), ("text_encoders_0", "text_encoders_1")])
def test_two_encoders_by_the_keys_of_other_programs(tmp_path, keys):
    save_file(dict(zip(keys, vectors(SDXL).values(), strict=True)), tmp_path / "word.safetensors")
    found = formats.read(tmp_path / "word.safetensors")
    assert found.trigger == "word"
    assert all(torch.equal(found.for_encoders(SDXL).vectors[key], rows) for key, rows in vectors(SDXL).items())


def words_in_one_file(kind: str, path: Path, a: torch.Tensor, b: torch.Tensor) -> None:
    if kind == "bundle":
        save_file({"bundle_emb.a.clip_l": a, "bundle_emb.b.clip_l": b}, path)
    elif kind == "bundle with dots":
        save_file({"bundle_emb.a.string_to_param.*": a, "bundle_emb.b.string_to_param.*": b}, path)
    elif kind == "pickle":
        torch.save({"a": a, "b": b}, path)
    elif kind == "list":
        torch.save([{"a": a}, {"b": b}], path)
    else:
        save_file({"a": a, "b": b}, path)


@pytest.mark.parametrize("kind", ["bundle", "bundle with dots", "keys", "pickle", "list"])
def test_one_of_several_words(kind, tmp_path):
    a, b = torch.zeros(1, 768), torch.ones(2, 768)
    words_in_one_file(kind, tmp_path / "words", a, b)
    for word, rows in {"a": a, "b": b}.items():
        found = formats.read(tmp_path / "words", word)
        assert found.trigger == word
        assert torch.equal(found.for_encoders(SD1).vectors["clip_l"], rows)
    for word in ("", "c"):
        with pytest.raises(UserError, match="contains the embeddings a, b: choose one"):
            formats.read(tmp_path / "words", word)
    both = formats.read_all(tmp_path / "words")
    assert [(word.trigger, word.count) for word in both] == [("a", 1), ("b", 2)]


def test_all_of_one_word_is_that_word(tmp_path, embedding):
    (path,) = formats.write(embedding, tmp_path / "other.safetensors")
    (found,) = formats.read_all(path)
    assert (found.trigger, found.metadata) == (embedding.trigger, formats.read(path).metadata)


@pytest.mark.parametrize("keys", [("emb", "emb2"), ("clip_l", "clip_g")])
@pytest.mark.parametrize("count", [2, 11])
def test_a_list_of_embeddings_with_the_same_keys(tmp_path, keys, count):
    both = dict(zip(keys, vectors(SDXL).values(), strict=True))
    parts = [{key: rows * (n + 1) for key, rows in both.items()} for n in range(count)]
    torch.save(parts, tmp_path / "all.pt")
    found = formats.read_all(tmp_path / "all.pt")
    assert [word.trigger for word in found] == [f"all-{n + 1}" for n in range(count)]
    for n, word in enumerate(found):
        for key, rows in vectors(SDXL).items():
            assert torch.equal(word.for_encoders(SDXL).vectors[key], rows * (n + 1))


@pytest.mark.parametrize("word", ["v1.3", "my.word", "<s0>"])
def test_bundled_words_with_dots(word, tmp_path):
    keys = {f"bundle_emb.{word}.{key}": rows for key, rows in vectors(SDXL).items()}
    save_file(keys, tmp_path / "lora.safetensors")
    assert formats.read(tmp_path / "lora.safetensors", word).trigger == word
    assert formats.read(tmp_path / "lora.safetensors").vectors.keys() == SDXL.keys()


def test_messages_name_five_things_at_most(tmp_path):
    many = {f"bundle_emb.word{number:03}.clip_l": torch.ones(1, 8) for number in range(200)}
    save_file(many, tmp_path / "many.safetensors")
    with pytest.raises(UserError, match=r"word000, .*, word004 and 195 more: choose one") as caught:
        formats.read(tmp_path / "many.safetensors")
    assert len(str(caught.value)) < 200
    save_file({"x" * 100_000: torch.ones(1, 768)}, tmp_path / "long.safetensors")
    with pytest.raises(UserError, match="it has a key of 100000 characters"):
        formats.read(tmp_path / "long.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_v1.3", "my_v1.3"),
        ("styles/cat", "styles/cat"),
        ("styles\\cat", "styles/cat"),
        ("cat.safetensors", "cat"),
        ("a.pt", "a"),
        ("हिन्दी", "हिन्दी"),
        ("ไทย", "ไทย"),
        ("e\u0301te\u0301", "été"),
        ("猫" * 75, "猫" * 75),
        ("gasai yuno", "gasai_yuno"),
        ("v1.", "v1"),
    ],
)
def test_file_names_in_any_script(name, expected, tmp_path, embedding):
    assert formats.file_name(name) == expected
    (path,) = formats.write_new(embedding, tmp_path, formats.file_name(name))
    (other,) = formats.write_new(embedding, tmp_path, formats.file_name(name))
    assert path == tmp_path / f"{expected}.safetensors"
    assert other == tmp_path / f"{expected}-2.safetensors"


# Saving --------------------------------------------------------------------------------------------


def test_no_name_is_lost_when_four_processes_save_at_once(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from textual_inversion import Embedding, formats\n"
        "for n in range(30):\n"
        "    value = float(int(sys.argv[2]) * 30 + n)\n"
        "    formats.write_new(Embedding('S*', {'clip_l': torch.full((1, 8), value)}), Path(sys.argv[1]), 'word')\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], cwd=ROOT) for n in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    values = {formats.read(path).vectors["clip_l"][0, 0].item() for path in tmp_path.iterdir()}
    assert values == set(map(float, range(120)))
    assert len(list(tmp_path.iterdir())) == 120


def test_second_file_of_a_pair_replaces_no_other(tmp_path, embedding):
    (other,) = formats.write(embedding.scaled(3), tmp_path / "pair_2.safetensors")
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"pair_2\.safetensors is another embedding"):
        formats.write(embedding, tmp_path / "pair.safetensors", "diffusers")
    assert [file.name for file in tmp_path.iterdir()] == ["pair_2.safetensors"]
    names = [path.name for path in formats.write_new(embedding, tmp_path, "pair", "diffusers")]
    assert names == ["pair-2.safetensors", "pair-2_2.safetensors"]
    assert other.read_bytes() == before
    again = formats.write(embedding.scaled(2), tmp_path / "pair-2.safetensors", "diffusers")
    assert [path.name for path in again] == names
    first, second = again
    assert torch.equal(
        formats.read_pair(first, second).for_encoders(SDXL).vectors["clip_g"], 2 * embedding.vectors["clip_g"]
    )


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (SDXL, SDXL),  # what the format comfyui writes of two words
        (SD1, SD1),
        ({"emb": 768}, {"emb": 1280}),
        ({"<cat>": 768}, {"<cat>": 768}),
        ({"<cat>": 768}, {"<dog>": 1280}),
    ],
)
def test_two_files_with_the_same_keys_are_no_pair(tmp_path, embedding, one, two):
    for name, encoders in (("cat", one), ("cat_2", two)):
        save_file(vectors(encoders), tmp_path / f"{name}.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"cat_2\.safetensors is another embedding: choose another name, or move"):
        formats.write(embedding, tmp_path / "cat.safetensors", "diffusers")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_written_embedding_is_read_whole(tmp_path, format):
    """Also what diffusers' format puts into two files; an unrelated NAME_2 is no part of it."""
    one, other = Embedding("<cat>", vectors(SDXL)), Embedding("<dog>", vectors(SD1))
    formats.write(other, tmp_path / "dog_2.safetensors")
    if format != "concepts-library":  # of one text encoder
        path, *_ = formats.write_new(one, tmp_path, "cat", format)
        found = formats.read_whole(path).for_encoders({"clip_l": 768, "clip_g": 1280})
        assert all(torch.equal(found.vectors[key], rows) for key, rows in one.vectors.items())
    path, *_ = formats.write_new(other, tmp_path, "dog", format)
    assert list(formats.read_whole(path).for_encoders({"clip_l": 768}).vectors) == ["clip_l"]


@pytest.mark.parametrize("trigger", ["bundle_emb.a.clip_l", "cat_out", "t5", "emb", "clip_l", "S*", "../up"])
@pytest.mark.parametrize("format", formats.FORMATS)
def test_no_word_keeps_vectors_from_being_saved(tmp_path, format, trigger):
    """Vectors are compared when a file is read back, not keys."""
    word = Embedding(trigger, vectors(SD1))
    (path,) = formats.write_new(word, tmp_path, "word", format)
    (rows,) = formats.read(path).vectors.values()
    assert torch.equal(rows, word.vectors["clip_l"])


def test_a_disk_that_fails_leaves_no_claimed_name(tmp_path, embedding, monkeypatch):
    def full_disk(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        formats.write_new(embedding, tmp_path, "word", "diffusers")
    assert not list(tmp_path.iterdir())


def test_what_can_be_made_can_be_saved(tmp_path):
    """512 vectors of T5 on a card; what is too much for one is told before anything is written."""
    word = Embedding("w", {"t5xxl": torch.randn(512, 4096)})
    (path,) = formats.write_new(word, tmp_path, "word", "png-card")
    assert torch.equal(formats.read(path).vectors["*"], word.vectors["t5xxl"])
    with pytest.raises(UserError, match="choose the format comfyui, or take fewer vectors"):
        formats.write_new(Embedding("w", {"t5xxl": torch.zeros(513, 4096)}), tmp_path, "more", "png-card")
    assert list(tmp_path.iterdir()) == [path]
