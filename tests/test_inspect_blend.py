"""Inspect and Blend Embeddings: numbers against plain formulas, then both nodes in a real graph."""

import unicodedata
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image, features
from safetensors.torch import load_file, save_file
from ti_pack.nodes import fonts  # pyright: ignore[reportMissingImports]  made by conftest.py
from ti_pack.nodes.embedding_chart import BAR, HEADING, MARGIN, MOST_ROWS, ROW, TITLE, UNUSUAL, USUAL, WIDTH, chart  # pyright: ignore[reportMissingImports]  made by conftest.py

from textual_inversion import Embedding, UserError, formats
from textual_inversion.adapters.comfyui_tokens import embedding_keys, vocabularies
from textual_inversion.blend import blend, parse_vector_numbers, slerp, take
from textual_inversion.embedding import ENCODERS
from textual_inversion.inspection import Vectors, describe, inspect, title


def random_word(trigger, number, count=3, widths=(768, 1280), **metadata):
    generator = torch.Generator().manual_seed(number)
    keys = ("clip_l", "clip_g")[: len(widths)]
    vectors = {key: torch.randn(count, width, generator=generator) for key, width in zip(keys, widths, strict=True)}
    return Embedding(trigger, vectors, metadata)


A, B = random_word("S*", 1), random_word("T*", 2)


def same(one, other, **tolerance):
    assert one.vectors.keys() == other.vectors.keys()
    for key, rows in one.vectors.items():
        torch.testing.assert_close(rows, other.vectors[key], **tolerance)


# Blending ----------------------------------------------------------------------------------------


def test_sum_and_difference():
    for key, a in A.vectors.items():
        a, b = a.numpy(), B.vectors[key].numpy()
        summed, without = (blend(A, B, mode, 0.3).vectors[key].numpy() for mode in ("weighted sum", "difference"))
        np.testing.assert_allclose(summed, 0.7 * a + 0.3 * b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(without, a - 0.3 * b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_evenly_and_changes_lengths_evenly(weight):
    """Against the formula with arc cosines, in numpy; and by what it means: angles and lengths."""
    for key, rows in blend(A, B, "slerp", weight).vectors.items():
        for a, b, found in zip(A.vectors[key].numpy(), B.vectors[key].numpy(), rows.numpy(), strict=True):
            a, b = a.astype(float), b.astype(float)
            long_a, long_b = np.linalg.norm(a), np.linalg.norm(b)
            angle = np.arccos(a @ b / long_a / long_b)
            u, v, length = a / long_a, b / long_b, (1 - weight) * long_a + weight * long_b
            formula = (np.sin((1 - weight) * angle) * u + np.sin(weight * angle) * v) / np.sin(angle)
            np.testing.assert_allclose(found, length * formula, rtol=1e-5, atol=1e-5)
            assert np.linalg.norm(found) == pytest.approx(length, rel=1e-5)
            assert np.arccos(np.clip(found @ u / length, -1, 1)) == pytest.approx(weight * angle, abs=1e-3)


def test_slerp_ends_and_of_equal_words():
    same(blend(A, B, "slerp", 0.0), A, rtol=0, atol=0)
    same(blend(A, B, "slerp", 1.0), B, rtol=0, atol=0)
    same(blend(A, A, "slerp", 0.37), A)
    same(blend(A, A.scaled(3.0), "slerp", 0.5), A.scaled(2.0))


def test_slerp_is_exact_between_almost_equal_vectors():
    """Where an arc cosine in float32 would see no angle at all."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    torch.testing.assert_close(slerp(a, b, 0.25), torch.tensor([[1.0, 0.25e-5]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("other", [-1.0, -2.0, 0.0])
def test_slerp_refuses_opposite_and_zero_vectors(other):
    factors = torch.tensor([[1.0], [other], [1.0]])
    b = Embedding("T*", {key: rows * factors for key, rows in A.vectors.items()})
    with pytest.raises(UserError, match="vector 2 of a and of b, because they are opposite or zero: use weighted sum"):
        blend(A, b, "slerp", 0.5)


def test_join_then_take_gives_back_both():
    short = random_word("T*", 3, count=1)
    joined = blend(A, short, "join", 0.5)
    assert joined.count == 4
    same(take(joined, "1-3"), A, rtol=0, atol=0)
    same(take(joined, "-1-3"), short, rtol=0, atol=0)
    assert joined.trigger == "S*"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1-3, 5", [0, 1, 2, 4]),
        ("5,1", [4, 0]),
        ("2, 2", [1, 1]),
        ("-2", [0, 2, 3, 4]),
        ("-2-4, -5", [0]),
        ("1 - 4, -3", [0, 1, 3]),
    ],
)
def test_chosen_vectors(text, rows):
    assert parse_vector_numbers(text, 5) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two", "'two' is not a vector number"),
        ("9" * 5000, "'9999999999999999999999999999999999999999' is not a vector number"),
        ("1,,2", "'' is not a vector number"),
        ("0", "there is no '0'; the vectors are numbered from 1 to 5"),
        ("4-6", "there is no '4-6'"),
        ("3-1", "there is no '3-1'"),
        ("-1-5", "leaves no vector"),
        ("2, -2", "leaves no vector"),
    ],
)
def test_bad_choices_of_vectors(text, message):
    with pytest.raises(UserError, match=message):
        parse_vector_numbers(text, 5)


def test_words_that_cannot_be_blended():
    with pytest.raises(UserError, match=r"a \('S\*'\) has 3 vectors, clip_l 768 and clip_g 1280; b \('T\*'\) has 3"):
        blend(A, random_word("T*", 3, widths=(768,)), "join", 0.5)
    with pytest.raises(UserError, match="different models"):
        blend(random_word("T*", 3, widths=(768,)), A, "join", 0.5)
    with pytest.raises(UserError, match=r"a \('S\*'\) has 3 and b \('T\*'\) has 2: use join"):
        blend(A, random_word("T*", 3, count=2), "weighted sum", 0.5)


def test_keys_of_other_tools_are_understood():
    """diffusers calls the vectors by the trigger word, kohya ``emb_params``; both are clip_l."""
    rows = A.vectors["clip_l"]
    a = Embedding("<a>", {"<a>": rows}, unnamed=frozenset({"<a>"}))
    b = Embedding("b", {"emb_params": 3 * rows}, unnamed=frozenset({"emb_params"}))
    blended = blend(a, b, "weighted sum", 0.5)
    same(blended, Embedding("", {"clip_l": 2 * rows}))


def test_metadata_tell_what_was_blended():
    a = random_word("S*", 1, base_model="sd15", seed="1", steps="300")
    b = random_word("T*", 2, base_model="sd15", seed="2", steps="300")
    blended = blend(a, b, "slerp", 0.25)
    assert blended.metadata == {
        "base_model": "sd15",
        "steps": "300",
        "blend": "slerp of S* and T*, weight 0.25",
    }
    part = take(blend(blended, b, "join", 0.5), "1-2")
    assert part.metadata["blend"] == "vectors 1-2 of (join of (slerp of S* and T*, weight 0.25) and T*)"
    assert take(a, "1").metadata == {**a.metadata, "blend": "vectors 1 of S*"}


def test_a_chain_of_blends_does_not_grow_its_metadata():
    """22 times doubled metadata to 151 MB."""
    word = random_word("S*", 1, widths=(8,))
    for _ in range(30):
        word = blend(word, word, "weighted sum", 0.5)
    assert len(word.metadata["blend"]) < 1200
    long = random_word("S*", 1, widths=(8,), blend="x" * 4_000_000)
    assert len(take(long, "1").metadata["blend"]) < 1200


def test_no_more_vectors_than_a_file_may_hold(tmp_path):
    many = random_word("S*", 1, count=1024, widths=(8,))
    with pytest.raises(UserError, match="would have 2048 vectors, more than a file may hold"):
        blend(many, many, "join", 0.5)
    with pytest.raises(UserError, match="names more than 1024 vectors: name fewer"):
        take(many, "1-1024, 1")
    with pytest.raises(UserError, match="names more than 1024 vectors: name fewer"):
        take(many, "1-1024," * 1_000_000)
    with pytest.raises(UserError, match="more than a file may hold"):
        take(random_word("S*", 1, count=2, widths=(32_000,)), ",".join(["1-2"] * 500))
    half = take(many, "1-512")
    (path,) = formats.write_new(blend(half, half, "join", 0.5), tmp_path, "both")
    assert formats.read(path).count == 1024


# Inspecting --------------------------------------------------------------------------------------


def test_a_words_own_vector_is_nearest_to_the_word(graph):
    """Lengths and cosines against numpy; a vector of zeros is near nothing."""
    known = vocabularies(graph.clip)
    vectors = {key: 2 * known[key].vectors[known[key].encode("toy cat")].float() for key in embedding_keys(graph.clip)}
    vectors = {key: torch.cat([rows, torch.zeros(1, rows.shape[1])]) for key, rows in vectors.items()}
    found = inspect(Embedding("S*", vectors), known)
    assert [part.key for part in found] == list(embedding_keys(graph.clip))
    for part in found:
        table = known[part.key].vectors.float().numpy()
        words = {word: table[number] for number, word in known[part.key].words().items()}
        assert part.nearest is not None
        assert part.usual is not None
        assert [near[0][0] for near in part.nearest[:2]] == ["toy", "cat"]
        assert part.nearest[2] == []
        for word, cosine in part.nearest[0]:
            a, b = vectors[part.key][0].numpy(), words[word]
            assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
        lengths = np.linalg.norm(list(words.values()), axis=1)
        np.testing.assert_allclose(part.usual, np.percentile(lengths, [5, 50, 95]), rtol=1e-5)
        assert part.lengths[0] == pytest.approx(2 * np.linalg.norm(words["toy"]), rel=1e-5)
        assert known[part.key].nearest(vectors[part.key], 5)[0][0][0] == "toy"


def test_text_without_and_with_embeddings(graph):
    known = vocabularies(graph.clip)
    word = Embedding("S*", {"clip_l": torch.full((2, 32), 0.5)}, {"steps": "300", "captions": "x" * 5000})
    text = describe(word, inspect(word, {}))
    assert text.splitlines()[:2] == ["S*: 2 vectors, SD1: CLIP-L 32", "steps: 300"]
    assert text.splitlines()[3:] == ["clip_l: 2 x 32", "  1: length 2.828", "  2: length 2.828"]
    assert len(text) < 1500
    text = describe(word, inspect(word, known))
    assert "; ordinary words: " in text
    assert text.splitlines()[-1].startswith("  2: length 2.828; nearest: ")


@pytest.mark.parametrize("number", [3e38, -3e38, 1e-45, 1e20])
def test_numbers_of_any_size(number):
    word = Embedding("S*", {"clip_l": torch.full((2, 768), number)})
    found = inspect(word, {})
    assert found[0].lengths[0] == pytest.approx(abs(torch.tensor(number).double().item()) * 768**0.5, rel=1e-6)
    assert max(map(len, describe(word, found).splitlines())) < 80
    assert torch.isfinite(chart(word, found)).all()


def test_much_metadata_and_long_names_are_shortened():
    word = Embedding("x" * 20_000, {"k" * 5000: torch.ones(1, 8)}, {f"note {n}": "y" * 5000 for n in range(500)})
    text = describe(word, inspect(word, {}))
    assert "... and 460 more entries" in text
    assert len(text) < 70_000
    chart(word, inspect(word, {}))


def pixels_of(picture, color, row):
    """How many pixels of ``color`` the middle of a bar has, in a chart of one text encoder."""
    line = (picture[0, MARGIN + TITLE + HEADING + ROW * row + BAR // 2] * 255).round().int()
    return (line == torch.tensor(color)).all(dim=-1).sum().item()


def test_bars_are_as_long_as_the_vectors():
    word = Embedding("S*", {"clip_l": torch.eye(2)})
    near = [[("toy", 0.5)]] * 3
    picture = chart(word, [Vectors("clip_l", 2, [1.0, 4.0, 2.0], (0.9, 1.0, 2.1), near)])
    usual, unusual, half = pixels_of(picture, USUAL, 0), pixels_of(picture, UNUSUAL, 1), pixels_of(picture, USUAL, 2)
    assert unusual == pytest.approx(4 * usual, abs=12)  # the line of the median covers two pixels
    assert half == pytest.approx(2 * usual, abs=8)
    assert pixels_of(picture, UNUSUAL, 0) == pixels_of(picture, USUAL, 1) == 0


@pytest.mark.parametrize("trigger", ["\u732b\u306e", "a\nb\x00", "x" * 300, ""])
def test_chart_takes_any_word_and_any_number(trigger):
    word = Embedding(trigger, {"clip_l": torch.zeros(MOST_ROWS + 5, 32), trigger: torch.ones(1, 10)})
    picture = chart(word, inspect(word, {}))
    assert picture.shape[2] == WIDTH
    assert ROW * MOST_ROWS < picture.shape[1] < ROW * (MOST_ROWS + 15)
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_family_is_named(family):
    """Those whose encoders two families share are named together."""
    (told, _) = title(Embedding("S*", {key: torch.ones(1, 8) for key in family.keys})).partition(", ")[2].split(": ")
    name = "SDXL" if family.name == "SD3 without T5" else family.name
    assert any(name.startswith(known) for known in told.split(" or "))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ({"*": 768}, "1 vector, SD1: CLIP-L 768"),
        ({"emb": 768, "emb2": 1280}, "1 vector, SDXL: CLIP-L 768 + CLIP-G 1280"),
        ({"clip_l": 768, "t5xxl": 4096}, "1 vector, Flux.1: CLIP-L 768 + T5-XXL 4096"),
        ({"gpt_oss": 64}, "1 vector, gpt_oss 64"),
        ({"a": 768, "b": 768}, "1 vector, a 768 + b 768"),
        ({"x": 10}, "1 vector, x 10"),
    ],
)
def test_encoders_are_named(vectors, expected):
    known = frozenset(vectors) - frozenset(ENCODERS)
    word = Embedding("S*", {key: torch.ones(1, width) for key, width in vectors.items()}, unnamed=known)
    assert title(word) == expected


SCRIPTS = ["café", "e\u0301te\u0301", "Кот", "γάτα", "猫", "ねこ", "고양이", "قطة", "बिल्ली", "חתול", "แมว", "🐱", "S*"]


@pytest.fixture(params=["no fonts", "the machine's fonts", "no shaping"])
def machine(request, monkeypatch, tmp_path) -> Iterator[str]:
    """With which fonts labels are written."""
    if request.param == "no fonts":
        monkeypatch.setattr(fonts, "_folders", lambda: [tmp_path])
    if request.param == "no shaping":
        monkeypatch.setattr(features, "check", lambda name: False)
    fonts._fonts.cache_clear()
    yield request.param
    fonts._fonts.cache_clear()


@pytest.mark.parametrize("word", SCRIPTS)
def test_no_letter_becomes_a_box(machine, word):
    """It is drawn by a font that has it, or written as its number."""
    drawn = list(fonts._runs(word, 20))
    for part, font in drawn:
        for letter in part:
            box, mark = (bytes(font.getmask(sign)) for sign in ("\uffff", letter))
            assert letter.isspace() or mark != box
    text = "".join(part for part, _ in drawn)
    number = f"U+{ord(unicodedata.normalize('NFC', word)[-1]):04X}"
    if word == "S*":
        assert text == word
    elif machine == "no fonts" or (machine == "no shaping" and word in ("قطة", "बिल्ली", "חתול", "แมว")):
        assert number in text
    else:
        assert (text == unicodedata.normalize("NFC", word)) != (number in text)
    assert chart(Embedding(word, {"clip_l": torch.ones(1, 8)}), []).shape[2] == WIDTH


# In a graph --------------------------------------------------------------------------------------


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def files(server):
    """Two embeddings for the small SDXL and one for the small SD1, in the server's folder."""
    folder = server.base / "models/embeddings"
    words = {
        "one": random_word("S*", 1, 2, (32, 48)),
        "two": random_word("T*", 2, 2, (32, 48)),
        "small": random_word("U*", 3, 1, (32,)),
    }
    for name, word in words.items():
        save_file(word.vectors, folder / f"{name}.safetensors", {"trigger": word.trigger, "steps": "300"})
    yield words
    for name in (*words, "blended"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


def loaded(**names):
    return {name: node("TI_LoadEmbedding", file=f"{file}.safetensors") for name, file in names.items()}


def blend_node(**inputs):
    return node("TI_BlendEmbeddings", **{"mode": "slerp", "weight": 0.25, "vectors": "", "trigger": "", **inputs})


def test_blend_in_a_graph(server, files):
    graph = {
        **loaded(a="one", b="two"),
        "blend": blend_node(a=["a", 0], b=["b", 0], vectors="2", trigger="Both"),
        "save": node("TI_SaveEmbedding", embedding=["blend", 0], name="blended", overwrite=True),
        "inspect": node("TI_InspectEmbedding", embedding=["blend", 0]),
    }
    run = server.run(graph)
    assert run.history["outputs"]["save"]["text"][0] == "embedding:blended"
    written = load_file(server.base / "models/embeddings/blended.safetensors")
    expected = {key: slerp(rows, files["two"].vectors[key], 0.25)[1:] for key, rows in files["one"].vectors.items()}
    same(Embedding("", written), Embedding("", expected))
    (text,) = run.history["outputs"]["inspect"]["text"]
    assert text.startswith("Both: 1 vector, SDXL: CLIP-L 32 + CLIP-G 48\n")
    assert "steps: 300\n" in text
    assert "blend: vectors 2 of (slerp of S* and T*, weight 0.25)" in text
    assert "nearest" not in text


def test_vectors_of_one_alone(server, files):
    blending = blend_node(a=["a", 0], vectors="-1")
    save = node("TI_SaveEmbedding", embedding=["blend", 0], name="blended", overwrite=True)
    server.run({**loaded(a="one"), "blend": blending, "save": save})
    written = load_file(server.base / "models/embeddings/blended.safetensors")
    assert {key: len(rows) for key, rows in written.items()} == {"clip_l": 1, "clip_g": 1}
    assert torch.equal(written["clip_g"][0], files["one"].vectors["clip_g"][1])


@pytest.mark.parametrize(
    ("model", "file", "count"),
    [("SmallSD1", "small", 1), ("SmallSDXL", "one", 4), ("SmallSD1", "one", 4), ("SmallSDXL", "small", 1)],
)
def test_inspect_in_a_graph(server, files, model, file, count):
    """SD1, SDXL, and a word for SDXL beside SD1's only encoder: the other is still shown, without words."""
    graph = {
        **loaded(word=file),
        "load": node("CheckpointLoaderSimple", ckpt_name=f"{model}.safetensors"),
        "inspect": node("TI_InspectEmbedding", embedding=["word", 0], clip=["load", 1]),
        "picture": node("SaveImage", images=["inspect", 1], filename_prefix="inspected"),
        "text": node("PreviewAny", source=["inspect", 0]),
    }
    outputs = server.run(graph).history["outputs"]
    (text,) = outputs["inspect"]["text"]
    assert outputs["text"]["text"] == [text]
    lines = text.splitlines()
    assert sum(": length " in line for line in lines) == count
    assert sum(line.count("; nearest: ") for line in lines) == (2 if model == "SmallSD1" and file == "one" else count)
    shown = []
    for folder, name in (("output", "picture"), ("temp", "inspect")):  # the node shows it by itself, too
        (entry,) = outputs[name]["images"]
        shown.append(Image.open(server.base / folder / entry["subfolder"] / entry["filename"]).convert("RGB"))
    assert shown[0].width == WIDTH
    assert shown[0].tobytes() == shown[1].tobytes()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"bad": blend_node(a=["a", 0])}, "Connect b, or enter which vectors of a to keep, or a new trigger word."),
        ({"bad": blend_node(a=["a", 0], b=["small", 0])}, "made for different models"),
        ({"bad": blend_node(a=["a", 0], vectors="3")}, "numbered from 1 to 2"),
        ({"bad": blend_node(a=["a", 0], trigger="a/b")}, "contains '/'"),
    ],
)
def test_mistakes_reach_the_user_as_a_sentence(server, files, nodes, message):
    load = node("CheckpointLoaderSimple", ckpt_name="SmallSDXL.safetensors")
    end = {"end": node("TI_SaveEmbedding", embedding=["bad", 0], name="blended", overwrite=True)}
    is_blend = nodes["bad"]["class_type"] == "TI_BlendEmbeddings"
    run = server.run(
        {**loaded(a="one", small="small"), "load": load, **nodes, **(end if is_blend else {})}, check=False
    )
    assert message in run.error["exception_message"]


def test_unprintable_characters_of_a_file_are_replaced():
    """A terminal takes some for commands. Letters of every script stay."""
    notes = {"note\x1b[2J": "red \x1b]0;title\x07 \u202e\u732b\u3000\u00e9\n\x9b1m"}
    embedding = Embedding("S*", {"clip_l": torch.ones(1, 768)}, notes)
    _, line, more, *_ = describe(embedding, inspect(embedding, {})).split("\n")
    assert line == "note\ufffd[2J: red \ufffd]0;title\ufffd \ufffd\u732b\u3000\u00e9"
    assert more == "\ufffd1m"
