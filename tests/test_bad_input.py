"""Bad input: one clear sentence each, before anything is trained."""

from dataclasses import replace

import pytest
import torch
from ti_pack.nodes import train  # pyright: ignore[reportMissingImports]  made by conftest.py
from ti_pack.nodes.train import Train  # pyright: ignore[reportMissingImports]

from textual_inversion import PreviewConfig, TrainConfig, UserError, initial_embedding
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.adapters.comfyui_tokens import with_embeddings
from textual_inversion.dataset import Batch, check_pictures, make_dataset
from textual_inversion.formats import file_name
from textual_inversion.image_tokens import IMAGE_SLOT, IMAGE_TEMPLATES, image_trigger
from textual_inversion.prompts import (
    MARK,
    SLOT,
    TEMPLATES,
    caption_prompt,
    check_trigger,
    has_trigger,
    plain,
    template_prompts,
)
from textual_inversion.training import check_prompts

PICTURE = torch.rand(1, 16, 16, 3)


@pytest.mark.parametrize("trigger", ["S*", "<cat-toy>", "my_word", "Zorp", "ohwx2", "\u732b\u306e"])
def test_good_triggers(trigger):
    check_trigger(trigger)


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ("", "is empty"),
        ("x" * 300, "is 300 bytes long"),
        ("a/b", "contains '/'"),
        ("..", "contains '.'"),
        ("a\\b", "slashes"),
        ("two words", "without spaces"),
        ("a:b", "contains ':'"),
        ("(a)", "brackets"),
        ("{}", "brackets"),
        ("CON", "Windows reserves"),
        ("lpt1", "Windows reserves"),
        ("embedding", "must not start with 'embedding'"),
        ("a\u200bb", r"invisible character U\+200B: enter it without"),
        ("\u0645\u06cc\u200c\u062e", r"U\+200C"),
        ("\u202eabc", r"U\+202E"),
        ("\U0001f468\u200d\U0001f469", r"U\+200D"),
        ("a\ud800", r"U\+D800"),
        ("a\0b", r"U\+0000"),
    ],
)
def test_bad_triggers(trigger, message):
    with pytest.raises(UserError, match=message):
        check_trigger(trigger)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("S*", "S"),
        ("<cat-toy>", "cat-toy"),
        ("a b", "a_b"),
        ("*", "embedding"),
        ("\u2764\ufe0f", "embedding"),
        ("\u0301x", "x"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_file_names_of_triggers(name, expected):
    assert file_name(name) == expected


@pytest.mark.parametrize(
    "name", ["../up", "a/../b", "/up", "a//b", "c:up", "nul", "com1.x", "a/nul", "con*", "x" * 226]
)
def test_bad_file_names(name):
    with pytest.raises(UserError):
        file_name(name)


@pytest.mark.parametrize("trigger", ["con*", "<nul>", "com1_"])
def test_a_trigger_that_cannot_name_a_file_is_refused_before_training(trigger):
    check_trigger(trigger)
    with pytest.raises(UserError, match="cannot be the name of a file: enter a short name"):
        Train.execute(*[None] * 4, trigger=[trigger])  # nothing of the model is looked at


NESTED = "(" * 5000 + "a" + ")" * 5000
ONE = {"trigger": ["S*"], "kind": ["object"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NESTED, "has 5000 brackets inside one another, more than 50: take some out"),
        ("a \ud800 b", r"contains half of a character \(U\+D800\): type it again"),
        ("my gran (in Wales: Nan)", "has 'Nan' at the end of a bracket, which ComfyUI takes for the weight"),
        ("a mirror (depth: -infinity)", "has '-infinity' at the end of a bracket"),
        ("a shop (call: 5551234567)", "has '5551234567' at the end of a bracket"),
    ],
    ids=["nested", "half", "nan", "infinite", "large"],
)
@pytest.mark.parametrize("name", ["caption", "initializer", "template", "preview_prompt", "preview_negative"])
def test_texts_that_no_tokenizer_takes_are_refused_before_training(name, text, message):
    """They gave errors without a sentence, or said that the model overflows."""
    given = {"captions": ["a cat", text]} if name == "caption" else {name: [text]}
    if name == "preview_negative":
        given = {"settings": [{name: text}]}
    said = "Caption 2" if name == "caption" else name
    with pytest.raises(UserError, match=f"{said} {message}"):
        Train.execute(*[[None]] * 3, [PICTURE], **ONE, **given)  # nothing of the model is looked at


@pytest.mark.parametrize(
    "caption",
    [
        "(" * 50 + "a" + ")" * 50,
        "\\(" * 99 + "a" + "\\)" * 99,
        "(a:1.2) (b: nanny)",
        "my gran \\(in Wales: Nan\\)",
        ")(",
    ],
)
def test_brackets_of_ordinary_texts_are_left_alone(caption):
    train._check_texts({"Caption 1": caption})


@pytest.mark.parametrize(
    ("images", "masks", "captions", "message"),
    [
        ([], [], [], "There are no pictures"),
        ([torch.rand(1, 7, 64, 3)], [], [], "Picture 1 is 64 x 7 pixels"),
        ([PICTURE, PICTURE * float("nan")], [], [], "Picture 2 contains NaN"),
        ([torch.rand(16, 16, 3)], [], [], "Picture 1 has shape"),
        ([PICTURE] * 3, [PICTURE[..., 0]] * 2, [], "2 masks for 3 pictures"),
        ([PICTURE], [torch.zeros(1, 16, 16)], [], r"white in mask 1, .*from Load Image \(Invert Mask\)"),
        ([PICTURE] * 3, [PICTURE[..., 0], *[torch.zeros(1, 64, 64)] * 2], [], "white in masks 2 and 3,"),
        ([PICTURE] * 9, [torch.zeros(1, 64, 64)] * 9, [], "white in masks 1, 2, 3, 4, 5 and 4 more,"),
        ([PICTURE], [torch.zeros(1, 0, 0)], [], "white in mask 1,"),
        ([PICTURE] * 2, [PICTURE[..., 0], PICTURE[..., 0] * float("inf")], [], "Mask 2 contains NaN or infinite"),
        ([PICTURE] * 3, [], ["a", "b"], "2 captions for 3 pictures"),
        ([PICTURE] * 2, [], ["a", None], "Caption 2 is None, which is no text"),
        ([PICTURE], [], [7], "Caption 1 is 7, which is no text"),
        ([PICTURE], [], [{"text": "a"}], "Caption 1 is {'text': 'a'}, which is no text"),
        ([PICTURE], [], [b"a"], "Caption 1 is b'a', which is no text"),
        ([PICTURE], [], [torch.zeros(300)], "Caption 1 is tensor"),
        ([PICTURE] * 2, [], ["a", "b \ud800"], r"Caption 2 contains half of a character \(U\+D800\): type it again"),
    ],
)
def test_bad_pictures(images, masks, captions, message):
    with pytest.raises(UserError, match=message):
        check_pictures(images, masks, captions)


@pytest.mark.parametrize("flip", [0.0, 0.5])
@pytest.mark.parametrize(
    ("broken", "named"), [([1], "picture 2"), ([0, 2], "pictures 1 and 3"), ([0, 1, 2], "1, 2 and")]
)
def test_latents_that_are_no_numbers_name_the_pictures(broken, named, flip):
    def encode(images):
        latents = [torch.zeros(4, 2, 2) for _ in images]
        for number in broken:
            latents[number][0, 0, 0] = float("nan")
        return latents

    with pytest.raises(UserError, match=rf"The VAE makes NaN of .*{named}"):
        make_dataset(encode, [PICTURE] * 3, [], [], TrainConfig(flip_probability=flip))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vectors": 0}, "vectors is 0; choose a value from 1 to 75"),
        ({"vectors": 76}, "vectors is 76"),
        ({"steps": 1}, "steps is 1"),
        ({"learning_rate": 2.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"kind": "person"}, "kind is 'person'; choose one of object, style, face, custom"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**values)


def test_bad_preview_settings():
    with pytest.raises(UserError, match="preview_steps is 0"):
        PreviewConfig(preview_steps=0)


def test_templates_must_contain_the_trigger_word():
    with pytest.raises(UserError, match=r"does not contain \{\} or 'S\*'"):
        template_prompts("custom", "a sketch of {}\na sketch", "S*")
    with pytest.raises(UserError, match="needs a template"):
        template_prompts("custom", " \n", "S*")
    prompts = template_prompts("custom", "a sketch of {}\n\nS* drawn", "S*")
    assert [plain(prompt) for prompt in prompts] == ["a sketch of S*", "S* drawn"]


@pytest.mark.parametrize(
    ("caption", "kind", "prompt"),
    [
        ("a photo of {} on grass", "object", "a photo of S* on grass"),
        ("my S* asleep", "object", "my S* asleep"),
        ("on the beach", "object", "a photo of S*, on the beach"),
        ("a red house", "style", "in the style of S*, a red house"),
        ("red", "custom", "S*, red"),
    ],
)
def test_captions_get_the_word(caption, kind, prompt):
    assert plain(caption_prompt(caption, "S*", kind)) == prompt


def test_word_of_the_vocabulary_is_refused(graph):
    with ComfyModel(*graph).training() as model, pytest.raises(UserError, match="already knows the word 'cat'"):
        initial_embedding(model.vocabularies(), "cat", "", 1)


def test_initializer_without_a_token_is_refused(graph):
    with ComfyModel(*graph).training() as model, pytest.raises(UserError, match="contains no word"):
        initial_embedding(model.vocabularies(), "S*", " ", 1)


def test_initializers(graph):
    """Fewer words than vectors are repeated, more are averaged, none is the mean of the vocabulary."""
    with ComfyModel(*graph).training() as model:
        table = graph.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.float()
        one = initial_embedding(model.vocabularies(), "S*", "toy", 3).vectors["clip_l"]
        assert torch.equal(one[0], one[2])
        two = initial_embedding(model.vocabularies(), "S*", "red toy", 2).vectors["clip_l"]
        assert torch.equal(two[1], one[0])
        mean = initial_embedding(model.vocabularies(), "S*", "red toy", 1).vectors["clip_l"]
        torch.testing.assert_close(mean[0], two.mean(0))
        nothing = initial_embedding(model.vocabularies(), "S*", "", 1).vectors["clip_l"]
        torch.testing.assert_close(nothing[0], table.mean(0))


def test_more_vectors_than_a_prompt_holds(graph):
    with ComfyModel(*graph).training() as model:
        word = initial_embedding(model.vocabularies(), "S*", "toy", 72)
        model.check_prompts(["a photo of S*"], word)
        with pytest.raises(UserError, match="use fewer vectors or a shorter prompt"):
            model.check_prompts(["a photo of the S*"], word)


def test_the_prompt_in_a_message_is_the_users_own(graph):
    """The sentences for pictures without captions hold names of the pack's own."""
    config = TrainConfig(vectors=75, per_image_tokens=3)
    with ComfyModel(*graph).training() as model:
        dataset = make_dataset(lambda images: [torch.zeros(4, 2, 2)] * len(images), [PICTURE], [], [], config)
        word = initial_embedding(model.vocabularies(), "S*", "toy", 75)
        with pytest.raises(UserError) as caught:
            check_prompts(model, word, dataset, config)
    assert "The prompt 'a photo of S* on a ... background' has no room" in str(caught.value)


INSIDE = ["image-0", "ti-image-0", "ti-context-0", "ti-embedding-0", "ti-embedding-5", "ti-vector-0", "ti-word-5"]


@pytest.mark.parametrize("name", INSIDE)
def test_names_of_the_packs_own_are_ordinary_text(graph, name):
    """In a prompt, as an embedding that is not there, and in the caption of a picture."""
    with ComfyModel(*graph).training() as model:
        word = initial_embedding(model.vocabularies(), "S*", "toy", 2)
        image = replace(word, trigger=image_trigger(0))
    clip = with_embeddings(graph.clip, word, image)
    for prompt in (f"a photo of {name}", f"a photo of embedding:{name} here", f"(embedding:{name}:1.2)"):
        assert ids(clip, prompt) == ids(graph.clip, prompt)
    caption = caption_prompt(f"{name} on grass, {MARK}image-0{MARK}", "S*", "object")
    assert not has_trigger(caption, image_trigger(0))


@pytest.mark.parametrize("name", INSIDE)
def test_a_trigger_may_be_called_like_a_name_of_the_packs_own(graph, name):
    with ComfyModel(*graph).training() as model:
        word = initial_embedding(model.vocabularies(), name, "toy", 2)
        image = replace(initial_embedding(model.vocabularies(), "S*", "dog", 3), trigger=image_trigger(0))
    clip = with_embeddings(graph.clip, word, image)
    for sections in clip.tokenize(f"a photo of {name} on a {image_trigger(0)} background").values():
        vectors = [token for section in sections for token, _ in section if torch.is_tensor(token)]
        assert len(vectors) == 5


def ids(clip, prompt):
    return {
        key: [[int(token) for token, _ in section] for section in parts] for key, parts in clip.tokenize(prompt).items()
    }


def test_clip_of_another_model(checkpoints, load):
    small, other = load(checkpoints["SmallSD1"]), load(checkpoints["SmallSDXL"])
    with ComfyModel(small.model, other.clip, small.vae).training() as model:
        word = initial_embedding(model.vocabularies(), "S*", "", 1)
        with pytest.raises(UserError, match="CLIP and MODEL do not belong together"):
            model.check_compatible(torch.zeros(4, 8, 8), "a photo of S*", word)


def test_vae_of_another_model(graph, wide_vae):
    model = ComfyModel(graph.model, graph.clip, wide_vae)
    with pytest.raises(UserError, match="connect the VAE that belongs to the MODEL"):
        make_dataset(model.encode_images, [torch.rand(1, 64, 64, 3)], [], [], TrainConfig())


def test_text_encoder_without_embeddings(graph):
    class Plain:
        pass

    clip = graph.clip.clone()
    clip.tokenizer = Plain()
    with pytest.raises(UserError, match="takes no embeddings"):
        ComfyModel(graph.model, clip, graph.vae)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_image_templates_are_the_templates_with_a_second_slot(kind):
    """Prompts with and without a per-image token are drawn alike, and each slot is there once."""
    assert len(IMAGE_TEMPLATES[kind]) == len(TEMPLATES[kind])
    for without_image, with_image in zip(TEMPLATES[kind], IMAGE_TEMPLATES[kind], strict=True):
        assert (without_image.count(SLOT), with_image.count(SLOT), with_image.count(IMAGE_SLOT)) == (1, 1, 1)
        rest = with_image.replace(f" of {IMAGE_SLOT}", "").replace(f" on a {IMAGE_SLOT} background", "")
        assert rest == without_image


@pytest.mark.parametrize(
    ("changes", "caption", "used"),
    [
        ({}, "", True),
        ({}, "  ", True),
        ({}, "on grass", False),
        ({"per_image_tokens": 0}, "", False),
        ({"kind": "style"}, "", True),
        ({"kind": "custom", "template": "a painting inspired by {}"}, "", False),
    ],
)
def test_only_pictures_without_captions_get_tokens_of_their_own(changes, caption, used):
    config = TrainConfig(**changes)
    dataset = make_dataset(lambda images: [torch.zeros(4, 2, 2) for _ in images], [PICTURE], [], [caption], config)
    assert bool(dataset.image_triggers[0]) == used
    assert all((image_trigger(0) in prompt) == used for prompt in dataset.prompts[0])
    assert all(config.trigger in prompt for prompt in dataset.prompts[0])


@pytest.mark.parametrize(
    ("rows", "columns", "inside", "outside", "used"),
    [
        pytest.param((0, 64), (0, 48), 1, 0, True, id="whole"),
        pytest.param((8, 56), (6, 42), 1, 0, False, id="cut out"),
        pytest.param((8, 56), (6, 42), 1, 0.2, False, id="cut out, soft"),
        pytest.param((8, 64), (6, 42), 1, 0, False, id="down to the lower edge"),
        pytest.param((0, 16), (0, 16), 0, 1, True, id="without a corner"),
        pytest.param((16, 48), (12, 36), 0, 1, True, id="without the middle"),
    ],
)
def test_a_picture_whose_background_is_masked_gets_no_token_for_it(rows, columns, inside, outside, used):
    """Nothing but the thing itself would be left for it to explain. In a style it stands for the thing."""
    mask = torch.full((1, 64, 48), float(outside))
    mask[:, slice(*rows), slice(*columns)] = inside
    for kind in ("object", "face", "style"):
        config = TrainConfig(kind=kind)
        picture = torch.rand(1, 64, 48, 3)
        dataset = make_dataset(lambda images: [torch.zeros(4, 8, 6) for _ in images], [picture], [mask], [], config)
        assert bool(dataset.image_triggers[0]) == (used or kind == "style")


@pytest.mark.parametrize("index", [slice(1, 3), [2, 0], torch.tensor([True, False, True])])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_a_batch(index, masked):
    numbers = torch.arange(3.0)
    shaped = numbers.view(3, 1, 1, 1).expand(3, 1, 2, 2)
    batch = Batch(shaped, shaped if masked else None, ["0", "1", "2"], shaped, numbers).rows(index)
    chosen = numbers[index]
    assert batch.prompts == [str(int(number)) for number in chosen]
    assert torch.equal(batch.quantiles, chosen)
    parts = [batch.latents, batch.noise, *([] if batch.masks is None else [batch.masks])]
    assert len(parts) == 2 + masked
    assert all(torch.equal(part[:, 0, 0, 0], chosen) for part in parts)
