"""Every model family at small width, trained through ComfyUI's own classes (families.py).

What holds of a family here is what docs/models.md says of it: the last test compares the two.
"""

import gc
from collections import defaultdict
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from comfyui_pack import weights_hash
from families import FAMILIES, NAMED, Family, agrees, build, gradients, prepared

from dev.in_process import ROOT
from textual_inversion import Embedding, TrainConfig, formats, initial_embedding, train
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.adapters.comfyui_tokens import embedding_keys, supports_embedding_files, with_embeddings
from textual_inversion.initializer import with_initializer

DOCS = ROOT / "docs/models.md"
VERIFIED: dict[str, set[str]] = defaultdict(set)  # checks that a family passed, for the table
MARKS = ("<!-- begin: written by tests/test_families.py -->", "<!-- end -->")
PROMPTS = ("a photo of {}", "{} on the beach", "a close-up photo of a {} at night")

pytestmark = pytest.mark.usefixtures("one_thread")


NATIVE_SIZES = {"SD1": 512, "SD2": 512, "SD2, v-prediction": 768, "PixArt alpha": 512}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def graph(family, tmp_path_factory):
    """MODEL, CLIP and VAE of a family, and the folder of its embeddings."""
    folder = tmp_path_factory.mktemp("embeddings")
    yield *build(family, embeddings=str(folder)), folder
    gc.collect()  # some are half a gigabyte


def test_keys(family, graph):
    """Every encoder that is loaded and sees the word is trained, under the key that ComfyUI looks up."""
    assert tuple(embedding_keys(graph[1])) == family.keys
    assert ComfyModel(*graph[:3]).native_size == NATIVE_SIZES.get(family.name, 1024)
    VERIFIED[family.name].add("keys")


def test_gradient(family, graph):
    """Of every vector, against finite differences in float32."""
    found, word, batch = gradients(family, graph)
    assert agrees(graph, word, batch, found)
    VERIFIED[family.name].add("gradient")


def test_checkpointing(family, graph):
    """Recomputing the blocks changes no gradient."""
    plain, recomputed = (gradients(family, graph, checkpointing)[0] for checkpointing in (False, True))
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    VERIFIED[family.name].add("checkpointing")


def test_training(family, graph):
    """14 steps on one picture lower the loss on fixed noise; MODEL, CLIP and VAE are bit for bit what they were."""
    before = weights_hash(graph[0].model, graph[1].cond_stage_model, graph[2].first_stage_model)
    config = TrainConfig(
        initializer="toy",
        steps=14,
        batch_size=1,
        learning_rate=0.05,
        schedule="constant",
        averaging=0.8,
        evaluate_every=100,
        patience=0,
        per_image_tokens=0,
    )
    model = ComfyModel(*graph[:3])
    dataset = prepared(family, model, config, 1)
    with model.training():
        word = initial_embedding(model.vocabularies(), config.trigger, config.initializer, 1)
        steps = list(train(model, word.trainable(), dataset, config))
    assert steps[-1].best_loss < steps[0].best_loss
    assert all(not torch.equal(steps[-1].best.vectors[key], start) for key, start in word.vectors.items())
    assert weights_hash(graph[0].model, graph[1].cond_stage_model, graph[2].first_stage_model) == before
    VERIFIED[family.name].add("training")


@pytest.mark.parametrize("name", ["Flux.1 dev", "Flux.2 Klein 4B", "Lumina 2"])
def test_initializer_is_found_in_every_kind_of_vocabulary(name):
    """CLIP's, T5's, a byte-level one and sentencepiece's: a word of it, and learning starts at it."""
    family = NAMED[name]
    model = ComfyModel(*build(family))
    config = TrainConfig(batch_size=2, per_image_tokens=0)
    dataset = prepared(family, model, config, 1)
    with model.training():
        word = with_initializer(model, dataset, config).initializer
        known = model.vocabularies()
        assert any(word in vocabulary.words().values() for vocabulary in known.values())
        for key, rows in initial_embedding(known, "S*", word, 1).vectors.items():
            assert known[key].nearest(rows, 1)[0][0][1] > 0.5


def test_sampling(family, graph):
    """ComfyUI's own sampler draws with the word, and its network sees what training shows it: with the same noise
    it predicts the same. So guidance, shift, sizes, masks and chat templates are those of inference."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def look(apply, given):
        out = apply(given["input"], given["timestep"], **given["c"])
        seen.append((given["input"].clone(), given["timestep"].clone(), out.clone()))
        return out

    watched = graph[0].clone()
    watched.set_model_unet_function_wrapper(look)
    sampler, model = ComfyModel(watched, *graph[1:3]), ComfyModel(*graph[:3])
    shape = prepared(family, model, TrainConfig(), 1).latents[0].shape
    word = initial_embedding(model.vocabularies(), "S*", "toy", 1)
    with torch.inference_mode():
        drawn = sampler.generate("a photo of S*", word, shape, 0, 2, 1.0)  # at scale 1 the prompt alone
    assert drawn.shape == (1, family.size, family.size, 3)
    assert torch.isfinite(drawn).all()
    with torch.inference_mode(False), model.training(), torch.no_grad():
        for latents, sigmas, sampled in seen:
            # Encoded together with others, of the same length and another.
            conditioning = model.encode_prompts(["S*", "a photo of S*", "a photo of a S* at night"], word)[1:2]
            ours = model.denoise(latents.clone(), sigmas.clone(), conditioning)
            torch.testing.assert_close(ours, sampled.clone(), rtol=1e-4, atol=1e-4)
    VERIFIED[family.name].add("sampling")


def test_file(family, graph):
    """A saved file means to stock ComfyUI, bit for bit, what Apply Embedding makes of it; or does not reach it."""
    _, clip, _, folder = graph
    generator = torch.Generator().manual_seed(5)
    keys = embedding_keys(clip)
    word = Embedding("S*", {key: torch.randn(2, width, generator=generator) for key, width in keys.items()})
    formats.write(word, folder / "same.safetensors")
    again = formats.read(folder / "same.safetensors").renamed("S*")
    assert list(again.for_encoders(keys).vectors) == list(word.vectors)
    ours = with_embeddings(clip, again)
    assert supports_embedding_files(clip) or not family.stock
    for prompt in PROMPTS:
        applied = encoded(ours, prompt.replace("{}", "S*"))
        assert not same(applied, encoded(clip, prompt.replace("{}", "S*")))
        if family.stock:
            assert same(applied, encoded(clip, prompt.replace("{}", "embedding:same")))
        else:
            with suppress(RuntimeError, TypeError, ValueError):  # some tokenizers fail on any embedding
                assert not same(applied, encoded(clip, prompt.replace("{}", "embedding:same")))
    VERIFIED[family.name].add("file")


def encoded(clip, prompt: str) -> list[torch.Tensor]:
    """All tensors of the conditioning of a prompt."""
    with torch.inference_mode():
        found = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True, return_dict=True)
    return [found[name] for name in sorted(found) if torch.is_tensor(found[name])]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_bfloat16(family, graph):
    """In bf16 the gradient points where it does in float32."""
    in_bf16 = build(family, torch.bfloat16, embeddings=str(graph[3]))  # the same tokens
    exact, rounded = (gradients(family, parts)[0] for parts in (graph, in_bf16))
    for one, other in zip(exact, rounded, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    VERIFIED[family.name].add("bf16")


CHECKS = ("keys", "gradient", "checkpointing", "bf16", "training", "sampling", "file")


def table() -> str:
    """What was verified, as docs/models.md has it."""
    lines = [
        "| family | keys (width) | `embedding:NAME` without this pack | network made small by | verified | limits |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        clip = family.tokenizer(tokenizer_data=family.tokenizer_data())
        widths = {part.embedding_key: part.embedding_size for part in vars(clip).values() if hasattr(part, "inv_vocab")}
        keys = ", ".join(f"`{key}` ({widths[key]})" for key in family.keys)
        loader = "ComfyUI's loader" if family.loader else "its class"
        passed = [check for check in CHECKS if check in VERIFIED[family.name]]
        verified = "all" if len(passed) == len(CHECKS) else ", ".join(passed)
        stock = "yes, bit for bit" if family.stock else "no: *Apply Embedding* only"
        lines.append(f"| {family.name} | {keys} | {stock} | {loader} | {verified} | {family.limits} |")
    return "\n".join(lines) + "\n"


def test_docs_say_what_was_verified(request):
    if set(VERIFIED) != {family.name for family in FAMILIES} or any(len(VERIFIED[f.name]) < 2 for f in FAMILIES):
        pytest.skip("needs all tests of this file")
    text = DOCS.read_text(encoding="utf-8")
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    if request.config.getoption("--update-docs"):
        DOCS.write_text(f"{text[:start]}\n{table()}{text[end:]}", encoding="utf-8")
    elif text[start:end] != f"\n{table()}":
        pytest.fail(
            "docs/models.md does not say what these tests found. "
            "Run `python -m pytest tests/test_families.py --update-docs`, read what it wrote, and commit it."
        )
