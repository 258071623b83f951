"""Words in prompts: in every script, beside each other, and never inside of others or of file names."""

import itertools
import unicodedata

import pytest
import torch
from safetensors.torch import save_file

from textual_inversion import Embedding
from textual_inversion.adapters.comfyui_tokens import _named, embedding_keys, with_embeddings
from textual_inversion.prompts import (
    caption_prompt,
    has_trigger,
    place_trigger,
    plain,
    replace_triggers,
    usable_trigger,
    without_trigger,
)


def marked(prompt: str, *triggers: str) -> str:
    """The prompt with the number of the trigger in the place of each."""
    return replace_triggers(place_trigger(prompt, triggers[0]), triggers, lambda number, before: f"<{number}>")


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("一张{}的照片", "一张<0>的照片"),
        ("{}の写真", "<0>の写真"),
        ("사진{}의", "사진<0>의"),
        ("ภาพ{}บนโต๊ะ", "ภาพ<0>บนโต๊ะ"),
        ("two {}s on a table", "two <0>s on a table"),
        ("a {}-style painting", "a <0>-style painting"),
        ("pre{}post_{}_{}1", "pre<0>post_<0>_<0>1"),
        ("{}{}", "<0><0>"),
        ("({}:1.2), [{}]", "(<0>:1.2), [<0>]"),
        ("embedding:{}", "embedding:S*"),  # somebody's file
    ],
)
@pytest.mark.parametrize("trigger", ["S*", "cat", "Кот", "猫", "<my-cat>"])
def test_a_slot_always_is_the_word(prompt, found, trigger):
    assert marked(prompt, trigger) == found.replace("S*", trigger)
    assert plain(place_trigger(prompt, trigger)) == prompt.replace("{}", trigger)


@pytest.mark.parametrize(
    ("trigger", "prompt", "found"),
    [
        ("S*", "一张S*的照片, 사진S*의, S*の写真", "一张<0>的照片, 사진<0>의, <0>の写真"),
        ("猫", "一只猫的照片", "一只<0>的照片"),
        ("Кот", "Мой кот дома, КОТ; котик и скот", "Мой <0> дома, <0>; котик и скот"),
        ("हिन्दी", "हिन्दी में हिन्दीका", "<0> में हिन्दीका"),  # ends with a vowel sign
        ("n", "n n\u0303o", "<0> n\u0303o"),
        ("कि", "कि की किं", "<0> की किं"),
        ("cat", "cat's, (cat:1.2) Cat! category concat cat-like bobcat cat_2", "<0>'s, (<0>:1.2) <0>! "
         "category concat cat-like bobcat cat_2"),
        ("S*", "S*S* S*-style S*s xS* _S*_", "<0><0> <0>-style <0>s xS* _S*_"),  # letters end at the *
        ("ñ", "ñ niño", "<0> niño"),
        ("cat", "embedding:animals/cat, embedding:cat (EMBEDDING:cat:1.1) cat", "embedding:animals/cat, embedding:cat "
         "(EMBEDDING:cat:1.1) <0>"),
    ],
)  # fmt: skip
def test_a_word_ends_where_its_letters_end(trigger, prompt, found):
    assert marked(prompt, trigger) == found


@pytest.mark.parametrize(
    ("triggers", "prompt", "found"),
    [
        (("S*", "S**"), "S** and S*", ("S**", " and ", "S*")),
        (("cat-toy", "<cat-toy>", "cat"), "<cat-toy> cat-toy cat", ("<cat-toy>", " ", "cat-toy", " ", "cat")),
        (("red", "red*hat", "hat"), "red*hat, red hat", ("red*hat", ", ", "red", " ", "hat")),
        (("猫", "熊猫"), "熊猫和猫", ("熊猫", "和", "猫")),
    ],
)
def test_words_inside_words_in_any_order(triggers, prompt, found):
    for order in itertools.permutations(triggers):
        expected = "".join(f"<{order.index(part)}>" if part in order else part for part in found)
        assert replace_triggers(prompt, order, lambda number, before: f"<{number}>") == expected


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("{}", ""),
        ("bad hands, {}", "bad hands"),
        ("S*, ugly,{}, blurry", "ugly, blurry"),
        ("(ugly, {}:1.2), ({}:1.3), (({}))", "(ugly:1.2)"),
        ("({}, ugly:1.2) embedding:S*", "(ugly:1.2) embedding:S*"),
    ],
)
def test_a_prompt_without_its_word(prompt, left):
    assert without_trigger(place_trigger(prompt, "S*"), "S*") == left


@pytest.mark.parametrize("prompt", ["一张{}的照片", "two {}s on a table", "a {}-style painting", "({}:1.2)の写真"])
def test_stock_embedding_at_the_same_place_gives_the_same_tokens(graph, prompt, embeddings_folder):
    """Apply Embedding beside embedding:NAME, apart from letters as ComfyUI's own parser wants it."""
    word = Embedding("S*", {key: torch.ones(2, width) for key, width in embedding_keys(graph.clip).items()})
    save_file(word.vectors, embeddings_folder / "stock.safetensors")
    ours = with_embeddings(graph.clip, word).tokenize(place_trigger(prompt, "S*"))
    before, after = prompt.split("{}")
    blank = "" if not before else " "
    stock = graph.clip.tokenize(f"{before}{blank}embedding:stock {after}")
    for key, rows in stock.items():
        for one, other in zip(itertools.chain(*rows), itertools.chain(*ours[key]), strict=True):
            assert one[1] == other[1]
            assert torch.is_tensor(one[0]) == torch.is_tensor(other[0])
            assert torch.equal(torch.as_tensor(one[0]), torch.as_tensor(other[0]))


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("{}{}", "N N "),
        ("{}{}{}s", "N N N s"),
        ("a{}S*", "a N N "),
        ("({}{})", "( N N )"),
        ("{}\n{}, {}", "N \nN , N "),
    ],
)
def test_words_beside_each_other_have_one_blank_between_them(prompt, text):
    """As ComfyUI's parser wants them apart, and not one more."""

    def named(_number: int, before: str) -> str:
        return _named(0, before).replace(_named(0, ""), "N ")

    assert replace_triggers(place_trigger(prompt, "S*"), ["S*"], named) == text


@pytest.mark.parametrize("caption", ["一张S*的照片", "S*の写真", "two {}s", "사진{}의", "a photo of s*"])
def test_a_caption_with_the_word_is_left_as_it_is(caption):
    assert plain(caption_prompt(caption, "S*", "object")) == caption.replace("{}", "S*")


@pytest.mark.parametrize("caption", ["grass", "S*x", "embedding:S*", "xS*"])
def test_a_caption_without_it_gets_it_in_front(caption):
    prompt = caption_prompt(caption, "Sx", "object")
    assert plain(prompt) == f"a photo of Sx, {caption}"
    assert has_trigger(prompt, "Sx")


def test_a_chained_word_replaces_its_like_in_any_case(graph):
    words = [
        Embedding(trigger, {key: torch.full((1, width), value) for key, width in embedding_keys(graph.clip).items()})
        for trigger, value in (("S*", 1.0), ("s*", 2.0))
    ]
    clip = graph.clip
    for word in words:
        clip = with_embeddings(clip, word)
    for rows in clip.tokenize("a S* and s*").values():
        vectors = [token for token, _ in rows[0] if torch.is_tensor(token)]
        assert len(vectors) == 2
        assert all((vector == 2.0).all() for vector in vectors)


@pytest.mark.parametrize("trigger", ["<café>", "été", "Ñandú*", "がく", "한글"])
@pytest.mark.parametrize(("known", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_spelled_in_two_ways(trigger, known, typed):
    """As names from a Mac and as keyboards write them; both look the same."""
    word = unicodedata.normalize(known, trigger)
    prompt = unicodedata.normalize(typed, f"a photo of {trigger} on grass, ({trigger}:1.2)")
    assert marked(prompt, word) == "a photo of <0> on grass, (<0>:1.2)"
    assert usable_trigger(word) == usable_trigger(unicodedata.normalize(typed, trigger))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_at_the_end_is_a_part_of_its_letter(form):
    assert not has_trigger(unicodedata.normalize(form, "a photo of cafés"), "café")
    assert not has_trigger(unicodedata.normalize(form, "a photo of a café"), "cafe")
