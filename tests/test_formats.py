"""Embedding files: what every trainer writes can be read, what we write its tool can read."""

import base64
import json
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
        assert found.trigger == "<word>"
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
    path = formats.free_path(tmp_path, "word", formats.FORMATS[format].suffix)
    if format == "concepts-library" and len(encoders) > 1:
        with pytest.raises(UserError, match="one text encoder; this embedding has"):
            formats.write(word, path, format)
        assert not list(tmp_path.iterdir())
        return
    written = formats.write(word, path, format)
    again = formats.read_pair(written[0], written[1]) if len(written) == 2 else formats.read(written[0])
    assert len(written) == (2 if format == "diffusers" and encoders == SDXL else 1)
    assert again.trigger == ("word" if format == "diffusers" and "t5xxl" in encoders else "<word>")
    for key, tensor in again.for_encoders(encoders).vectors.items():
        assert torch.equal(tensor, word.vectors[key])
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_comfyui_file_says_where_it_comes_from(tmp_path, embedding):
    (path,) = formats.write(embedding, tmp_path / "word.safetensors")
    assert set(load_file(path)) == {"clip_l", "clip_g"}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"trigger": "S*", "steps": "500", "base_model": "model.safetensors"}
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("encoders", [SD1, SDXL], ids=["SD1", "SDXL"])
@pytest.mark.parametrize("format", ["a1111", "png-card", "comfyui"])
def test_a1111_reads(format, encoders, tmp_path):
    """By the rules of its loader: string_to_param's one entry, clip_l with clip_g, or the only key."""

    def decode(item):
        return torch.tensor(item["TORCHTENSOR"]) if "TORCHTENSOR" in item else item

    word = Embedding("word", vectors(encoders), {"steps": "7"})
    (path,) = formats.write(word, tmp_path / f"word{formats.FORMATS[format].suffix}", format)
    if path.suffix == ".png":
        with PngImageFile(path) as image:
            data = json.loads(base64.b64decode(image.text["sd-ti-embedding"]))
        data = json.loads(
            json.dumps(data),
            object_hook=decode,
        )
    else:
        data = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "string_to_param" in data:
        (found,) = data["string_to_param"].values()
        assert torch.equal(found, word.vectors["clip_l"])
        assert len(encoders) == 1
        assert data["name"] == "word"
        assert data["step"] == 7
    elif "clip_g" in data and "clip_l" in data:
        assert all(torch.equal(data[key], word.vectors[key]) for key in encoders)
    else:
        (found,) = data.values()
        assert torch.equal(found, word.vectors["clip_l"])


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
    assert found.trigger == (key if key in ("<word>", "my style") else "word")
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
    save_file({"a": torch.ones(1, 768), "b": torch.ones(1, 768)}, path)
    with pytest.raises(UserError, match="two sets of vectors for clip_l"):
        formats.write(formats.read(path), tmp_path / "w.safetensors")
    save_file({"clip_l": torch.ones(1, 768), "b": torch.ones(1, 768)}, path)
    with pytest.raises(UserError, match="two sets of vectors for clip_l"):
        formats.write(formats.read(path), tmp_path / "w.safetensors")


def test_encoders_of_a_newer_comfyui_can_be_named(tmp_path):
    save_file({"newest": torch.ones(1, 768)}, tmp_path / "word.safetensors")
    assert formats.read(tmp_path / "word.safetensors").trigger == "newest"
    found = formats.read(tmp_path / "word.safetensors", encoders=("clip_l", "newest"))
    assert found.trigger == "word"
    (path,) = formats.write(found, tmp_path / "again.safetensors")
    assert load_file(path).keys() == {"newest"}


# What is written, and how --------------------------------------------------------------------------


def test_name_that_exists_gets_a_number(tmp_path, embedding):
    names = []
    for suffix in (".safetensors", ".pt", ".safetensors"):  # embedding:word would mean either
        path = formats.free_path(tmp_path, "word", suffix)
        path.touch()
        names.append(path.name)
    assert names == ["word.safetensors", "word-2.pt", "word-3.safetensors"]


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
    write_bytes = Path.write_bytes
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda path, data: write_bytes(path, data[:-4] + b"\0\0\0\0"))
    with pytest.raises(UserError, match="could not be read back"):
        formats.write(embedding, tmp_path / "word.safetensors")
    assert not list(tmp_path.iterdir())


# What is no embedding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(4, 4, 3, 3)}, r"not an embedding: weight has shape \(4, 4, 3, 3\)"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "not an embedding: ids"),
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
        (b"\xff" * 100, "cannot be read as an embedding"),
        (b"", "cannot be read as an embedding"),
        (b"\x80\x02" + b"\xff" * 50, "broken, or contains more than numbers"),
        (b"PK\x03\x04" + b"\xff" * 50, "cannot be read as an embedding"),
        (b"\x89PNG" + b"\xff" * 50, "cannot be read as an embedding"),
    ],
)
def test_broken_file_is_refused(tmp_path, content, message):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(UserError, match=message):
        formats.read(tmp_path / "broken")


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


@pytest.mark.parametrize(("beginning", "length"), [(b"\x80\x02", 640), (b"\x80\x04", 1152), (b"\x80\x02", 66176)])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, beginning, length):
    """A safetensors file begins with the length of its header; its metadata decides that length."""
    embedding = Embedding("S*", {"clip_l": torch.rand(1, 768)})
    bare = len(save({"clip_l": embedding.vectors["clip_l"]}, {"note": "", "trigger": "S*"})) - 8 - 768 * 4
    noted = Embedding("S*", embedding.vectors, {"note": "x" * (length - bare)})
    (path,) = formats.write(noted, tmp_path / "word.safetensors")
    assert path.read_bytes().startswith(beginning)
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert torch.equal(formats.read(path).vectors["clip_l"], embedding.vectors["clip_l"])
