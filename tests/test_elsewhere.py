"""Files we write, loaded by diffusers' own loader: the prompt then means the same as in our model."""

import copy

import pytest
import torch
from small_pipelines import small_pipeline

from textual_inversion import Embedding, formats
from textual_inversion.adapters.diffusers_pipeline import DiffusersModel

PROMPT = "a photo of <word> on grass, with <word>"


def loaded(pipeline, files) -> tuple[torch.Tensor, ...]:
    """Conditioning of the prompt in a copy of the pipeline that has loaded the files the documented way."""
    pipeline = copy.deepcopy(pipeline)
    pipeline.load_textual_inversion(str(files[0]), token="<word>")
    if len(files) == 2:
        encoder, tokenizer = pipeline.text_encoder_2, pipeline.tokenizer_2
        pipeline.load_textual_inversion(str(files[1]), token="<word>", text_encoder=encoder, tokenizer=tokenizer)
    if hasattr(pipeline, "text_encoder_2"):
        context, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        return context, pooled
    return pipeline.encode_prompt(PROMPT, pipeline.device, 1, False)[:1]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("family", "format"),
    [("SD1", "diffusers"), ("SD1", "concepts-library"), ("SD1", "a1111"), ("SD1", "comfyui"), ("SDXL", "diffusers")],
)
@torch.no_grad()
def test_diffusers_loads(family, format, count, tmp_path):
    pipeline = small_pipeline(family)
    model = DiffusersModel(pipeline)
    generator = torch.Generator().manual_seed(0)
    vectors = {key: torch.randn(count, width, generator=generator) for key, width in model.keys.items()}
    word = Embedding("<word>", vectors)
    files = formats.write(word, tmp_path / f"word{formats.FORMATS[format].suffix}", format)
    ours = model.encode_prompts([PROMPT], word)
    for one, other in zip(ours.values(), loaded(pipeline, files), strict=False):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(ours["context"], model.encode_prompts([PROMPT], word.scaled(0.5))["context"], atol=1e-2)


@pytest.mark.parametrize("trigger", ["S*", "Cat", "Кот", "<Cat>", "cat", "*", "word", "Ünder", "2Girls", "猫"])
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_uses_all_vectors(trigger, count, tmp_path):
    """With its own tokenizer and loader: the word that the hint says brings all vectors, in any case of letters."""
    untouched = small_pipeline("SD1")
    width = untouched.text_encoder.config.hidden_size
    word = Embedding(trigger, {"clip_l": torch.randn(count, width)})
    for format in ("diffusers", "concepts-library"):
        (path,) = formats.write_new(word, tmp_path, "word", format)
        pipeline = copy.deepcopy(untouched)
        pipeline.load_textual_inversion(str(path))
        token = formats.diffusers_token(trigger)
        hint = formats.prompt_hint(word, format)
        assert hint == (f"In diffusers, write {token} in prompts." if token != trigger else "")
        assert pipeline.tokenizer is not None
        text = pipeline.maybe_convert_prompt(f"a photo of {token} here", pipeline.tokenizer)
        ids = pipeline.tokenizer(text).input_ids
        table = pipeline.text_encoder.get_input_embeddings().weight
        rows = [table[number] for number in ids if number >= len(table) - count]
        assert torch.equal(torch.stack(rows), word.vectors["clip_l"])
