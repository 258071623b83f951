"""A CLIP that knows an embedding: where it fires, where it must not, and that ComfyUI's own files mean the same."""

import copy
import gc
import weakref
from itertools import chain
from typing import Any

import comfy.text_encoders.qwen3vl
import comfy.text_encoders.qwen35
import pytest
import torch
from comfy.sd1_clip import SDClipModel
from families import FAMILIES, NAMED, build

from textual_inversion import Embedding, UserError, formats
from textual_inversion.adapters.comfyui_encoding import encode
from textual_inversion.adapters.comfyui_tokens import (
    embedding_keys,
    known_encoders,
    supports_embedding_files,
    text_encoders,
    with_embeddings,
)
from textual_inversion.embedding import ENCODERS

CPU = torch.device("cpu")


@pytest.fixture
def word(graph):
    generator = torch.Generator().manual_seed(5)

    def make(trigger, count=2):
        keys = embedding_keys(graph.clip)
        return Embedding(trigger, {key: torch.randn(count, width, generator=generator) for key, width in keys.items()})

    return make


def token_ids(tokenizer, text: str) -> list[int]:
    """Without those that begin and end a prompt."""
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    return tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start : end]


def encoded(clip, prompt, with_pooled=False) -> Any:
    """What ComfyUI makes of a prompt: the conditioning, and the pooled output beside it if asked for."""
    return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=with_pooled)


def tokens(clip, prompt):
    """Tokens of the prompt without padding; ours are written as (row, weight)."""
    found = []
    for token, weight in next(iter(clip.tokenize(prompt).values()))[0][1:]:
        if torch.is_tensor(token):
            found.append(("vector", round(weight, 3)))
        elif token in (49407, 0):
            break
        else:
            found.append((token, round(weight, 3)))
    return found


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("S* on grass", "_ on grass"),
        ("a photo of S*", "a photo of _"),
        ("a photo of S* on grass", "a photo of _ on grass"),
        ("a photo of S*, on grass", "a photo of _, on grass"),
        ("a photo of S*.", "a photo of _."),
        ('the "S*"!', 'the "_"!'),
        ("S*'s hat", "_'s hat"),
        ("s* in lower case", "_ in lower case"),
        ("S* and S*", "_ and _"),
        ("a\nS*\nb", "a\n_\nb"),
        (r"\(S*\)", r"\(_\)"),
    ],
)
def test_word_works_anywhere(graph, word, prompt, plain):
    clip = with_embeddings(graph.clip, word("S*"))
    expected = []
    for part in plain.replace("_", "\0_\0").split("\0"):
        expected += [("vector", 1.0)] * 2 if part == "_" else tokens(graph.clip, part)
    assert tokens(clip, prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [("(S*:1.2)", 1.2), ("(S*)", 1.1), ("((S*))", 1.21), ("a (photo of S*:0.5) b", 0.5)],
)
def test_word_takes_weights(graph, word, prompt, weight):
    found = [token for token in tokens(with_embeddings(graph.clip, word("S*")), prompt) if token[0] == "vector"]
    assert found == [("vector", weight)] * 2


@pytest.mark.parametrize("prompt", ["a category", "concat", "cat-like", "bobcat cats", "cat_2", "embedding:cat"])
def test_words_that_contain_the_trigger_are_untouched(graph, word, prompt):
    assert tokens(with_embeddings(graph.clip, word("cat")), prompt) == tokens(graph.clip, prompt)


def test_words_can_be_chained(graph, word):
    first, second = word("S*", 1), word("T*", 3)
    clip = with_embeddings(with_embeddings(graph.clip, first), second)
    assert [token[0] for token in tokens(clip, "S* T* S*")] == ["vector"] * 5
    for part, (row, *_) in clip.tokenize("T* S*").items():
        key = {"l": "clip_l", "g": "clip_g"}[part]
        values = [token for token, _ in row if torch.is_tensor(token)]
        assert torch.equal(torch.stack(values), torch.cat([second.vectors[key], first.vectors[key]]))


def tokens_by_encoder(clip, prompt):
    return {
        name: ["vector" if torch.is_tensor(token) else token for token, _ in row]
        for name, (row, *_) in clip.tokenize(prompt).items()
    }


@pytest.mark.parametrize("prompt", ["a photo of S*", "S* and T* and S*", "(S*:1.2), grass", "T*", "grass"])
def test_an_encoder_without_vectors_reads_the_word_as_text(checkpoints, load, prompt):
    """S* has vectors for one encoder of SDXL, T* for the other: whichever comes first."""
    clip = load(checkpoints["SmallSDXL"]).clip
    keys = embedding_keys(clip)
    one, other = (Embedding(f"{word}*", {key: torch.ones(2, keys[key])}) for word, key in zip("ST", keys, strict=True))
    plain = tokens_by_encoder(clip, prompt)
    for words in ((one, other), (other, one)):
        found = tokens_by_encoder(with_embeddings(with_embeddings(clip, words[0]), words[1]), prompt)
        for name, trigger, text in (("l", "S*", "T*"), ("g", "T*", "S*")):
            assert found[name].count("vector") == 2 * prompt.count(trigger)
            if trigger not in prompt:
                assert found[name] == plain[name]
            ids = {token for token in plain[name] if text in prompt and token in tokens_by_encoder(clip, text)[name]}
            assert ids <= set(found[name])
    encoded(with_embeddings(clip, one), prompt, True)


@pytest.mark.parametrize("family", ["Flux.1 dev", "SD3, SD3.5"])
@pytest.mark.parametrize("kept", ["t5xxl", "clip_l"])
def test_an_embedding_for_one_of_several_encoders(family, kept):
    """Only T5 on Flux, only clip_l on SD3: the vectors that are there, and text as ever for the rest."""
    clip = build(NAMED[family])[1]
    keys = embedding_keys(clip)
    found = tokens_by_encoder(with_embeddings(clip, Embedding("S*", {kept: torch.ones(2, keys[kept])})), "a S* b")
    plain = tokens_by_encoder(clip, "a S* b")
    name = kept.removeprefix("clip_")
    assert found[name].count("vector") == 2
    assert {other: ids for other, ids in found.items() if other != name} == {
        other: ids for other, ids in plain.items() if other != name
    }


def test_partial_embeddings_are_told(checkpoints, load):
    sdxl, sd1 = (load(checkpoints[name]).clip for name in ("SmallSDXL", "SmallSD1"))
    both = Embedding("S*", {key: torch.ones(1, width) for key, width in embedding_keys(sdxl).items()})
    assert both.partly(embedding_keys(sdxl)) == ""
    only = "S* works in clip_l only"
    assert both.partly(embedding_keys(sd1)) == f"{only}: the vectors for clip_g are not used."
    one = Embedding("S*", {"clip_l": both.vectors["clip_l"]})
    assert one.partly(embedding_keys(sdxl)) == f"{only}: clip_g of the model reads the word as text."
    assert one.partly(embedding_keys(sd1)) == ""
    t5 = Embedding("S*", {"t5xxl": torch.ones(1, 64)})
    for clip in (sdxl, sd1):
        with pytest.raises(UserError, match="made for another model"):
            t5.partly(embedding_keys(clip))


def test_graphs_own_clip_keeps_working(graph, word):
    before = encoded(graph.clip, "a photo of S*")
    clip = with_embeddings(graph.clip, word("S*"))
    assert not torch.equal(encoded(clip, "a photo of S*"), before)
    assert torch.equal(encoded(graph.clip, "a photo of S*"), before)


@pytest.mark.parametrize("format", ["comfyui", "a1111", "diffusers", "concepts-library"])
@pytest.mark.parametrize("prompt", ["a photo of {}", "{} here", "a (photo of {}:1.3) on grass, red"])
def test_file_and_node_give_the_same_conditioning(graph, word, embeddings_folder, prompt, format):
    """Stock ``embedding:NAME`` against Apply Embedding, bit for bit."""
    embedding = word("S*", 3)
    if len(embedding.vectors) > 1 and format in ("diffusers", "concepts-library"):
        pytest.skip("one text encoder a file: ComfyUI takes two from one file only")
    for old in embeddings_folder.glob("same.*"):
        old.unlink()
    formats.write(embedding, embeddings_folder / f"same{formats.FORMATS[format].suffix}", format)
    ours = with_embeddings(graph.clip, embedding)
    # Stock ComfyUI needs a blank before "embedding:" inside brackets, and one after the name.
    stock = prompt.replace("{}", " embedding:same ")
    one, other = encoded(ours, prompt.replace("{}", "S*"), True), encoded(graph.clip, stock, True)
    assert len(one) == len(other) == 2
    assert all(map(torch.equal, one, other))


def test_stock_word_and_ours_in_one_prompt(graph, word, embeddings_folder):
    formats.write(word("F*", 1), embeddings_folder / "other.safetensors")
    clip = with_embeddings(graph.clip, word("S*", 1))
    assert [token[0] for token in tokens(clip, "embedding:other S*")][-1] == "vector"
    assert sum(token[0] == "vector" for token in tokens(clip, "a embedding:other S*")) == 2


def test_embedding_of_another_model_is_refused(graph):
    with pytest.raises(
        UserError, match=r"made for another model: it has clip_l \(768\), the model takes clip_l \(32\)"
    ):
        with_embeddings(graph.clip, Embedding("S*", {"clip_l": torch.zeros(1, 768)}))


def test_strength_scales_the_vectors(graph, word):
    embedding = word("S*")
    for key, vectors in embedding.scaled(0.5).vectors.items():
        assert torch.equal(vectors, embedding.vectors[key] * 0.5)


def test_prompts_encoded_together_are_what_each_is_alone(graph, word):
    """One pass through an encoder for all prompts of one length; weights are ComfyUI's to work out."""
    clip = with_embeddings(graph.clip, word("S*"))
    prompts = [
        "a photo of S*",
        "S* on the beach",
        "a photo of S*",
        "S* and more" * 40,
        "a (photo of S*:1.3) in the snow",
    ]
    passes = []
    encoders = [encoder.model.transformer for encoder in text_encoders(clip)]
    handles = [part.register_forward_hook(lambda *_args: passes.append(1)) for part in encoders]
    with torch.no_grad():
        together = encode(clip, prompts, CPU)
        # two of 77 tokens with one of several times that, cut into sections of 77; one with weights
        assert len(passes) == 2 * len(encoders)
        for prompt, found in zip(prompts, together, strict=True):
            alone, pooled = encoded(clip, prompt, True)
            torch.testing.assert_close(found["cross_attn"], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["pooled_output"], pooled, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert not any("encode" in vars(encoder.model) for encoder in text_encoders(clip))


# What other packs see -------------------------------------------------------------------------------


@pytest.fixture
def both(graph, word, embeddings_folder):
    """A CLIP in which ``S*`` means what ``embedding:same`` means to the graph's own."""
    embedding = word("S*", 3)
    formats.write(embedding, embeddings_folder / "same.safetensors")
    return with_embeddings(graph.clip, embedding), graph.clip


def assert_same_tokens(ours, stock):
    """One by one, numbers and vectors alike, with weights and numbers of words."""
    assert [len(row) for row in ours] == [len(row) for row in stock]
    for mine, theirs in zip(chain(*ours), chain(*stock), strict=True):
        assert type(mine[0]) is type(theirs[0]) in (int, torch.Tensor)
        assert torch.equal(mine[0], theirs[0]) if torch.is_tensor(mine[0]) else mine[0] == theirs[0]
        assert mine[1:] == theirs[1:]


@pytest.mark.parametrize("word_ids", [False, True])
@pytest.mark.parametrize("prompt", ["a photo of {} on grass", "({}:1.3) and {} on (red:0.5) grass", "{} " * 40])
def test_tokens_are_exactly_those_of_a_stock_embedding(both, prompt, word_ids):
    ours, stock = both
    mine = ours.tokenize(prompt.replace("{}", "S*"), return_word_ids=word_ids)
    theirs = stock.tokenize(prompt.replace("{}", " embedding:same ").lstrip(), return_word_ids=word_ids)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert_same_tokens(mine[name], theirs[name])
        assert_same_tokens(copy.deepcopy(mine)[name], theirs[name])  # prompt-control and Cutoff copy tokens


def test_tokenizer_of_one_encoder_knows_the_trigger(both):
    """Cutoff and prompt-control ask it for the tokens of a region and look for equal ones in the prompt."""
    ours, stock = (vars(clip.tokenizer) for clip in both)
    for slot in (encoder.slot for encoder in text_encoders(both[0])):
        region = ours[slot].tokenize_with_weights("a S* hat")
        assert_same_tokens(region, stock[slot].tokenize_with_weights("a embedding:same hat"))
        (prompt,) = both[0].tokenize("see a S* hat")[slot.removeprefix("clip_")]
        found = [token for token, _ in prompt if torch.is_tensor(token)]
        wanted = [token for token, _ in region[0] if torch.is_tensor(token)]
        assert len(found) == len(wanted) == 3
        assert all(map(torch.equal, found, wanted))


def test_tokens_under_inference_mode(graph, word):
    """As nodes run."""
    with torch.inference_mode():
        clip = with_embeddings(graph.clip, word("S*").scaled(0.5))
        copied = copy.deepcopy(clip.tokenize("a photo of S*"))
        found = clip.encode_from_tokens(copied)
        assert torch.is_tensor(found)
        assert torch.equal(found, encoded(clip, "a photo of S*"))


def test_tokenizer_that_compares_tokens_with_numbers_and_has_a_template():
    """Qwen-Image's, in which plain tensors raise. Its template says "image", which is no trigger there."""
    clip = build(NAMED["Qwen-Image"])[1]
    (encoder,) = text_encoders(clip)
    rows = torch.randn(2, encoder.table.embedding_dim)
    ours = with_embeddings(clip, Embedding("image", {encoder.key: rows}))
    assert ours.tokenize("a toy") == clip.tokenize("a toy")
    tokens = ours.tokenize("a toy image")
    for found in (tokens, copy.deepcopy(tokens)):
        (section,) = found[encoder.name]
        vectors = [token for token, _ in section if type(token) is not int]
        assert [token["type"] for token in vectors] == ["embedding"] * 2
        assert torch.equal(torch.stack([token["data"] for token in vectors]), rows)


@pytest.mark.parametrize("family", ["Qwen-Image", "Anima", "Lumina 2", "Wan 2.1 (pictures)", "AuraFlow"])
def test_text_beside_a_word_is_what_the_model_knows(family):
    """Where stock embeddings do not reach: one vector in the place of one token, in templates with line breaks."""
    clip = build(NAMED[family])[1]
    ours = with_embeddings(clip, Embedding("S*", {key: torch.ones(1, n) for key, n in embedding_keys(clip).items()}))
    (encoder,) = text_encoders(clip)
    cats = {token_ids(encoder.tokenizer, text)[-1] for text in ("cat", "a cat")}
    prompts = ["a S* in the snow", "S*", "a S*", "S* and S*", "embedding:none of S* and embedding:"]
    if family != "AuraFlow":  # its tokenizer puts a blank before every line
        prompts += ["a photo of S*\nat night\n\nand S*\n", "two  S*\n", "on grass\nS* (at night)\n"]
    for prompt in prompts:
        (found,), (known,) = (tokens[encoder.name] for tokens in (ours.tokenize(prompt), clip.tokenize(plain(prompt))))
        shown = [token if type(token) is int else "vector" for token, _ in found]
        assert shown == ["vector" if token in cats else token for token, _ in known]


def plain(prompt: str) -> str:
    return prompt.replace("S*", "cat")


def test_stock_embedding_in_a_tokenizer_that_compares_tokens(tmp_path):
    """HunyuanVideo's fails at embeddings of ComfyUI's own; with the node it takes both."""
    clip = build(NAMED["HunyuanVideo 1"], embeddings=str(tmp_path))[1]
    rows = {key: torch.randn(2, width) for key, width in embedding_keys(clip).items()}
    formats.write(Embedding("F*", rows), tmp_path / "same.safetensors")
    with pytest.raises(RuntimeError):
        clip.tokenize("a embedding:same")
    ours = with_embeddings(clip, Embedding("S*", rows))
    with torch.no_grad():
        one, other = (encoded(ours, prompt) for prompt in ("a S*", "a embedding:same"))
    assert torch.equal(one, other)


# What stays as it is --------------------------------------------------------------------------------


def test_encoding_leaves_the_graphs_encoders_alone(graph, word):
    clip = with_embeddings(graph.clip, word("S*"))
    clip.clip_layer(-2)
    modules = [clip.cond_stage_model, *(encoder.model for encoder in text_encoders(clip))]
    before = [dict(vars(module)) for module in modules]
    children = [dict(module._modules) for module in modules]
    with torch.no_grad():
        (found,) = encode(clip, ["a photo of S*"], CPU)
    assert [dict(vars(module)) for module in modules] == before
    assert [dict(module._modules) for module in modules] == children
    assert torch.equal(found["cross_attn"], encoded(clip, "a photo of S*"))


def test_what_was_encoded_is_freed_at_once(graph, word, monkeypatch):
    """Without the garbage collector, which does not know how much memory a graph of activations takes."""
    plain, seen = SDClipModel.encode_token_weights, []

    def look(encoder, tokens):
        seen.append(weakref.ref(encoder))
        return plain(encoder, tokens)

    monkeypatch.setattr(SDClipModel, "encode_token_weights", look)
    gc.disable()
    try:
        with torch.no_grad():
            encode(with_embeddings(graph.clip, word("S*")), ["a photo of S*", "S* on grass"], CPU)
        assert len(seen) == 2 * len(text_encoders(graph.clip))
        assert all(encoder() is None for encoder in seen), "an encoder that holds what it has encoded lives on"
    finally:
        gc.enable()


# Keys -----------------------------------------------------------------------------------------------


def test_table_of_encoders_is_that_of_comfyui():
    known = set(known_encoders())
    assert known == set(ENCODERS), "embedding.py: ENCODERS has fallen behind ComfyUI"
    assert len(ENCODERS) == len(known)
    assert known >= {key for family in FAMILIES for key in family.keys}
    # Their keys are the names of their configs.
    assert known >= comfy.text_encoders.qwen35.QWEN35_MODELS.keys() | comfy.text_encoders.qwen3vl.QWEN3VL_CONFIGS.keys()


def test_embedding_files_are_said_to_work_only_where_comfyui_looks_for_them(word, graph):
    clip = graph.clip
    assert supports_embedding_files(clip)
    clip = copy.copy(clip)
    clip.tokenizer = copy.copy(clip.tokenizer)
    for encoder in text_encoders(clip):
        part = copy.copy(encoder.tokenizer)
        part.embedding_directory = None
        setattr(clip.tokenizer, encoder.slot, part)
    assert not supports_embedding_files(clip)
    assert not supports_embedding_files(with_embeddings(clip, word("S*")))
