"""Which files the nodes list, load and save, against ComfyUI's own look-up of embedding:NAME."""

import unicodedata
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.sd1_clip import load_embed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from ti_pack.nodes.files import (  # pyright: ignore[reportMissingImports]  made by conftest.py
    embedding_files,
    embeddings_named,
    is_taken,
)
from ti_pack.nodes.load_embedding import LoadEmbedding  # pyright: ignore[reportMissingImports]
from ti_pack.nodes.save_embedding import SaveEmbedding  # pyright: ignore[reportMissingImports]

from textual_inversion import Embedding, UserError, formats

WORD = Embedding("S*", {"clip_l": torch.rand(2, 768)})


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[Path]:
    """Two embeddings folders, as extra_model_paths.yaml gives."""
    made = [tmp_path / "embeddings", tmp_path / "more"]
    for folder in made:
        folder.mkdir()
    paths = {"embeddings": ([str(folder) for folder in made], folder_paths.supported_pt_extensions)}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folder_paths.folder_names_and_paths | paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return made


def stock(name: str, folders: list[Path]) -> Any:
    return load_embed(name, [str(folder) for folder in folders], 768, "clip_l")


def save(
    name: str, embedding: Embedding = WORD, overwrite: bool = False, format: formats.FormatName = "comfyui"
) -> str:
    return SaveEmbedding.execute([embedding], [name], [overwrite], [format]).args[0][0]


def picture(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


def test_previews_are_not_listed(folders):
    for name in ("cat", "v1.3", "other"):
        save_file(WORD.vectors, folders[0] / f"{name}.safetensors")
    for name in ("cat.png", "cat.preview.png", "v1.3.png", "v1.3.preview.png", "gone.preview.png"):
        picture(folders[0] / name)
    Image.new("RGB", (8, 8)).save(folders[0] / "other.jpg")
    formats.write(WORD, folders[0] / "card.png", "png-card")
    formats.write(WORD, folders[0] / "other.png", "png-card")  # beside another, but it holds an embedding itself
    (folders[0] / "inside").mkdir()
    picture(folders[0] / "inside/alone.png")  # may hold one in its pixels
    listed = {*(f"{name}.safetensors" for name in ("cat", "v1.3", "other")), "card.png", "other.png"}
    assert set(embedding_files()) == {*listed, "inside/alone.png"}


@pytest.mark.parametrize("preview", ["cat.png", "cat.preview.png", "cat.jpg", "cat.webp", "cat.txt", "cat.json"])
def test_files_beside_an_embedding_take_no_name(folders, preview):
    (folders[0] / preview).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert save("cat") == "embedding:cat"
    assert save("cat") == "embedding:cat-2"


@pytest.mark.parametrize(
    "existing",
    ["cat.safetensors", "cat.pt", "cat.bin", "deep/er/cat.pt", "../more/cat.bin", "../more/sub/cat.safetensors"],
)
def test_a_name_that_comfyui_finds_anywhere_is_taken(folders, existing):
    path = folders[0] / existing
    path.parent.mkdir(parents=True, exist_ok=True)
    formats.write(WORD.scaled(3), path, "a1111" if path.suffix != ".safetensors" else "comfyui")
    before = path.read_bytes()
    assert stock("cat", folders) is not None
    assert save("cat") == "embedding:cat-2"
    assert torch.equal(stock("cat-2", folders), WORD.vectors["clip_l"])
    assert path.read_bytes() == before
    if existing != "cat.safetensors":
        behind = existing in ("cat.pt", "cat.bin")  # ComfyUI takes NAME.safetensors first
        if not behind:
            with pytest.raises(UserError, match=f"embedding:cat could also mean .*cat{path.suffix}: choose another"):
                save("cat", overwrite=True)
            assert not (folders[0] / "cat.safetensors").exists()


def test_overwriting_in_another_format_does_not_leave_the_old_file_in_front(folders):
    assert save("cat") == "embedding:cat"
    for format in ("a1111", "concepts-library"):
        with pytest.raises(UserError, match=r"could also mean cat\.safetensors: choose another name, or delete"):
            save("cat", WORD.scaled(2), True, format)
    assert [path.name for path in folders[0].iterdir()] == ["cat.safetensors"]
    assert save("cat", WORD.scaled(2), True) == "embedding:cat"
    assert torch.equal(stock("cat", folders), 2 * WORD.vectors["clip_l"])


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("my_v1.3", "my_v1.3"),
        ("styles/cat", "styles/cat"),
        ("a\\b", "a/b"),
        ("unaestheticXL_Sky3.1", "unaestheticXL_Sky3.1"),
        ("", "S"),
        ("gasai yuno", "gasai_yuno"),
        ("हिन्दी", "हिन्दी"),
        ("猫" * 75, "猫" * 75),
        ("e\u0301te\u0301", "été"),
        ("cat.pt", "cat"),
    ],
)
def test_stock_comfyui_reads_what_is_saved_by_the_name_that_is_shown(folders, name, prompt):
    assert save(name) == f"embedding:{prompt}"
    assert torch.equal(stock(prompt, folders), WORD.vectors["clip_l"])
    assert save(name, WORD.scaled(2)) == f"embedding:{prompt}-2"
    assert torch.equal(stock(f"{prompt}-2", folders), 2 * WORD.vectors["clip_l"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_refuses_a_file_is_one_sentence(folders, overwrite):
    (folders[0] / "animals").touch()
    with pytest.raises(UserError, match=r"'animals/cat' cannot be written to the embeddings folder \(.+\): make room"):
        save("animals/cat", overwrite=overwrite)


def test_names_that_look_the_same_are_the_same(folders):
    for form in ("NFC", "NFD"):
        save_file(WORD.vectors, folders[1] / f"{unicodedata.normalize(form, 'été')}.safetensors")
    assert len(list(embeddings_named("été"))) == 2
    assert save("été") == "embedding:été-2"


def test_a_folder_in_a_name_counts(folders):
    (folders[0] / "styles").mkdir()
    save_file(WORD.vectors, folders[0] / "styles/cat.safetensors")
    for name, taken in (("styles/cat", True), ("cat", True), ("other/cat", False), ("embeddings/cat", False)):
        assert is_taken(name) == taken == (stock(name, folders) is not None)


def test_the_second_file_of_a_pair_takes_no_name_either(folders):
    sdxl = Embedding("S*", {"clip_l": torch.rand(1, 768), "clip_g": torch.rand(1, 1280)})
    save("pair_2")
    assert save("pair", sdxl, format="diffusers") == ""
    names = {path.name for path in folders[0].iterdir()}
    assert names == {"pair_2.safetensors", "pair-2.safetensors", "pair-2_2.safetensors"}


@pytest.mark.parametrize("file", ["v1.3.pt", "gasai yuno.pt", "embeddings.pt", "sub folder/a,b.pt", "猫.pt"])
def test_loading_gives_a_word_that_apply_takes_and_save_saves(folders, file, checkpoints, load):
    """Any name that a file may have, along the nodes: load, use in a prompt, save again."""
    path = folders[0] / file
    path.parent.mkdir(exist_ok=True)
    clip = load(checkpoints["SmallSD1"]).clip
    formats.write(Embedding("w", {"clip_l": torch.rand(2, 32)}), path, "a1111")
    (embedding,), (trigger,) = LoadEmbedding.execute(file).args
    from ti_pack.nodes.apply_embedding import ApplyEmbedding  # pyright: ignore[reportMissingImports]

    ((applied,),) = ApplyEmbedding.execute([clip], [embedding], [""], [1.0]).args
    row = applied.tokenize(f"a photo of {trigger} here")["l"][0]
    assert sum(torch.is_tensor(token) for token, _ in row) == 2
    assert stock(save("", embedding).removeprefix("embedding:"), folders) is not None


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (("clip_l",), "stable-diffusion-v1/textual-inversion"),
        (("clip_l", "clip_g"), "stable-diffusion-xl-v1-base/textual-inversion"),
        (("qwen3_4b",), None),
    ],
)
def test_model_libraries_find_what_they_show(tmp_path, keys, family):
    """In the file, but not among the notes that are read; somebody's own notes stay, the word is the present one."""
    own = {"modelspec.title": "My dog", "modelspec.author": "me", "steps": "5", "settings": '{"size": 512}'}
    path = tmp_path / "word.safetensors"
    for notes in ({}, own):
        formats.write(Embedding("<dog>", {key: torch.ones(1, 8) for key in keys}, notes), path)
        with safe_open(path, "pt") as file:
            written = file.metadata()
        assert written["modelspec.title"] == notes.get("modelspec.title", "<dog>")
        assert written["modelspec.trigger_phrase"] == "<dog>"
        assert written.get("modelspec.architecture") == family
        assert written.get("modelspec.resolution") == ("512x512" if notes else None)
        read = formats.read(path, encoders=keys)
        assert {key: text for key, text in read.metadata.items() if key != "trigger"} == notes
    formats.write(read.renamed("<cat>"), path)
    assert formats.read(path, encoders=keys).trigger == "<cat>"
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "<cat>"
