"""What the pictures are called during training: templates and captions, and the rules for the word."""

import re

from .errors import UserError

SLOT = "{}"

# The idea of neutral sentences, drawn at random, is from Gal et al. 2022 (arXiv 2208.01618),
# appendix F; the wording is ours.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {}",
        "a photo of a {}",
        "a photo of the {}",
        "a picture of {}",
        "a picture of a {}",
        "an image of the {}",
        "a close-up photo of {}",
        "a good photo of a {}",
        "a cropped photo of the {}",
        "a rendering of a {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "an image in the style of {}",
        "a rendering in the style of {}",
        "a detailed picture in the style of {}",
        "a close-up in the style of {}",
        "a good picture in the style of {}",
        "a small picture in the style of {}",
    ),
    "face": (
        "a photo of {}",
        "a portrait of {}",
        "a close-up portrait of {}",
        "a photo of the face of {}",
        "a good photo of {}",
        "a picture of {} looking at the camera",
    ),
}

# Words around a caption that does not say where the new word belongs.
CAPTION_FRAMES = {"object": "a photo of {}, ", "face": "a photo of {}, ", "style": "in the style of {}, "}

_FORBIDDEN = re.compile(r"[\s/\\.:,;()\[\]{}|\"']")
_RESERVED_NAMES = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)$")
_LONGEST = 64


def check_trigger(trigger: str) -> None:
    """Raises UserError for a trigger word that prompts or file names could not carry."""
    if not trigger:
        raise UserError("The trigger word is empty: write the word you want to use in prompts.")
    if len(trigger.encode()) > _LONGEST:
        raise UserError(
            f"The trigger word has {len(trigger.encode())} bytes; use at most {_LONGEST}, it also names files."
        )
    if match := _FORBIDDEN.search(trigger):
        raise UserError(
            f"The trigger word {trigger!r} contains {match.group()!r}; use letters, digits and "
            "signs such as * - _ < > without spaces, slashes, dots, brackets or commas."
        )
    if trigger.startswith("embedding"):
        raise UserError("The trigger word must not start with 'embedding': prompts give that a meaning.")
    if not trigger.isprintable():
        raise UserError("The trigger word contains invisible characters: write it anew.")
    if _RESERVED_NAMES.match(trigger):
        raise UserError(f"Windows reserves the name {trigger!r}: choose another trigger word.")


def trigger_pattern(trigger: str) -> re.Pattern[str]:
    """Finds the trigger as a word of its own, in any letter case (CLIP lowers it anyway).

    ``cat`` is found in ``a cat, (Cat:1.2) cat's`` but not in ``category``, ``cat-like`` or
    ``embedding:cat``.
    """
    return re.compile(rf"(?<!\w)(?<!\w-)(?<!embedding:){re.escape(trigger)}(?!\w)(?!-\w)", re.IGNORECASE)


def templates_for(kind: str, template: str) -> tuple[str, ...]:
    """The prompts of pictures without captions, each with a ``{}`` slot."""
    if kind != "custom":
        return TEMPLATES[kind]
    return tuple(line.strip() for line in template.splitlines() if line.strip())


def place_word(text: str, trigger: str) -> str:
    """``text`` with every ``{}`` replaced by the trigger word."""
    return text.replace(SLOT, trigger)


def training_prompts(kind: str, template: str, trigger: str) -> tuple[str, ...]:
    """Template prompts with the word in place. Raises UserError when one lacks the word."""
    templates = templates_for(kind, template)
    if not templates:
        raise UserError('Kind "custom" needs a template, such as "a sketch of {}": write one a line.')
    prompts = tuple(place_word(text, trigger) for text in templates)
    for text in prompts:
        if not trigger_pattern(trigger).search(text):
            raise UserError(f"The template {text!r} has no place for the word: put {{}} or {trigger!r} into it.")
    return prompts


def caption_prompt(caption: str, trigger: str, kind: str) -> str:
    """A caption as a prompt: ``{}`` or the trigger mark the word; else it is put in front."""
    prompt = place_word(caption.strip(), trigger)
    if trigger_pattern(trigger).search(prompt):
        return prompt
    frame = CAPTION_FRAMES.get(kind, "{}, ")
    return place_word(frame, trigger) + prompt


def with_context(prompt: str, kind: str, context: str) -> str:
    """The template prompt with a second word for what only one picture shows.

    That is its scene, or under a style its content. The language has to expect it where it stands:
    appended after a comma it takes nothing off the word (docs/method.md).
    """
    if kind == "style":
        return prompt.replace(" in the style of", f" of {context} in the style of")
    return f"{prompt} on a {context} background"
