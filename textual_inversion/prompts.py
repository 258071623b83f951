"""The prompts of the pictures during training, from templates or captions, and the rules for trigger words."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

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

# What is put in front of a caption that does not contain the trigger word.
CAPTION_PREFIXES = {"object": "a photo of {}, ", "face": "a photo of {}, ", "style": "in the style of {}, "}

# Begins and ends the names that stand for vectors inside the pack. Nobody types it: it is of Unicode's private use,
# which is no printable character and so in no trigger word.
MARK = "\ue0f1"
_MARKED = re.compile(f"{MARK}.*?{MARK}")

# On both sides of a trigger word that took the place of {}: it is the word there, whatever stands beside it.
HERE = "\ue0f2"

# A word ends where letters end, but not all scripts put blanks between words, or between a foreign word and what
# belongs to it: Thai to Khmer, Chinese, Japanese, Korean. Their letters beside a trigger word are no part of it.
_WITHOUT_BLANKS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Vowel signs and accents of their own, which belong to the letter before, but to Python are no part of a word.
_MARKS = "".join(chr(number) for number in range(0x300, 0x20000) if unicodedata.category(chr(number))[0] == "M")
_LETTER = rf"(?:(?![{_WITHOUT_BLANKS}])[\w{_MARKS}])"
# What ComfyUI takes for a file: a trigger word in it is none.
_FILE = r"embedding:[^\s,()]+"

_FORBIDDEN = re.compile(r"[\s/\\.:,;()\[\]{}|\"']")
RESERVED_NAMES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)")  # of Windows' devices
_LONGEST = 64
_LONGEST_NAME = 255  # characters of a file name


def check_characters(name: str, text: str) -> None:
    """Raises UserError for half of a character, which JSON can hold and no tokenizer takes."""
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{name} contains half of a character (U+{ord(half.group()):04X}): type it again.")


def check_trigger(trigger: str) -> None:
    """Raises UserError for a trigger word that prompts or file names could not carry."""
    if not trigger:
        raise UserError("The trigger word is empty: enter the word you want to use in prompts.")
    if unseen := next((letter for letter in trigger if not (letter.isprintable() or letter.isspace())), ""):
        raise UserError(f"The trigger word contains the invisible character U+{ord(unseen):04X}: enter it without.")
    if len(trigger.encode()) > _LONGEST:
        raise UserError(
            f"The trigger word is {len(trigger.encode())} bytes long; use at most {_LONGEST}: it also names files."
        )
    if match := _FORBIDDEN.search(trigger):
        raise UserError(
            f"The trigger word {trigger!r} contains {match.group()!r}; use letters, digits and "
            "characters such as * - _ < > without spaces, slashes, dots, brackets or commas."
        )
    if trigger.casefold().startswith("embedding"):
        raise UserError("The trigger word must not start with 'embedding': ComfyUI reads that as a file name.")
    if RESERVED_NAMES.fullmatch(trigger):
        raise UserError(f"Windows reserves the name {trigger!r}: choose another trigger word.")


def usable_trigger(name: str) -> str:
    """A word that prompts can carry, made of the name of a file: dots stay, what a prompt gives a meaning becomes _.

    Accents are parts of their letters, as keyboards write them (Unicode's NFC).
    """
    name = unicodedata.normalize("NFC", name)
    word = "".join(letter if letter == "." or letter.isprintable() else "_" for letter in name[:_LONGEST_NAME])
    word = _FORBIDDEN.sub(lambda match: match.group() if match.group() == "." else "_", word).strip(".") or "word"
    return f"_{word}" if word.lower().startswith("embedding") else word


def replace_triggers(text: str, triggers: Sequence[str], put: Callable[[int, str], str]) -> str:
    """``text`` with ``put(number of the trigger, what the result has so far)`` in the place of each trigger word.

    A trigger is a word of its own, in any letter case (CLIP lowers it anyway): ``cat`` is found in ``a cat,
    (Cat:1.2) cat's`` and between Chinese letters, but not in ``category``, ``cat-like`` or ``embedding:animals/cat``.
    In the place of ``{}`` it always is the word: ``two {}s``. Of triggers that begin at the same place the longest
    counts, and what one has found is no part of another, so their order does not matter.
    """
    order = sorted(range(len(triggers)), key=lambda number: -len(triggers[number]))
    words = [f"(?P<t{number}>{_word(triggers[number])})" for number in order]
    result, end = "", 0
    for match in re.finditer("|".join([_FILE, *words]), text, re.IGNORECASE):
        result += text[end : match.start()].replace(HERE, "")
        # Without a group it is a file.
        result += match.group() if match.lastgroup is None else put(int(match.lastgroup[1:]), result)
        end = match.end()
    return (result + text[end:]).replace(HERE, "")


def has_trigger(text: str, trigger: str) -> bool:
    """Whether a prompt has the trigger word."""
    found: list[int] = []
    replace_triggers(text, [trigger], lambda number, before: found.append(number) or "")
    return bool(found)


def without_trigger(text: str, trigger: str) -> str:
    """A prompt without the trigger word, nor the brackets and commas that held only it."""
    text = replace_triggers(text, [trigger], lambda number, before: "")
    emptied = re.compile(r"\(\s*(:\s*[\d.]+\s*)?\)")
    while emptied.search(text):
        text = emptied.sub("", text)
    text = re.sub(r"[\s,]*,\s*(?=[,):]|$)|^[\s,]+|(?<=\()[\s,]+", "", text)
    return re.sub(r"[\s,]*,\s*", ", ", text).strip()


def _word(trigger: str) -> str:
    """The pattern of a trigger word. Only beside its own letters others could make another word of it."""
    # An accent may be part of its letter, or a character after it, as in names from a Mac; both look the same.
    spellings = dict.fromkeys(unicodedata.normalize(form, trigger) for form in ("NFC", "NFD"))
    word, letter = f"(?:{'|'.join(map(re.escape, [trigger, *spellings]))})", re.compile(_LETTER)
    left = rf"(?<!{_LETTER})(?<!{_LETTER}-)" if letter.match(trigger[0]) else ""
    right = rf"(?!{_LETTER})(?!-{_LETTER})" if letter.match(trigger[-1]) else ""
    return f"{HERE}{word}{HERE}|(?<!{MARK}){left}{word}{right}(?!{MARK})"


def plain(prompt: str) -> str:
    """A prompt as its user knows it."""
    return _MARKED.sub("...", prompt).replace(HERE, "")


def templates_for(kind: str, template: str) -> tuple[str, ...]:
    """The prompts of pictures without captions, each with a ``{}`` for the trigger word."""
    if kind != "custom":
        return TEMPLATES[kind]
    return tuple(line.strip() for line in template.splitlines() if line.strip())


def place_trigger(text: str, trigger: str) -> str:
    """``text`` with the trigger word in the place of every ``{}``, where it is the word whatever stands beside it."""
    return text.replace(SLOT, f"{HERE}{trigger}{HERE}")


def template_prompts(kind: str, template: str, trigger: str) -> tuple[str, ...]:
    """Template prompts with the trigger word in place. Raises UserError for one without the trigger word."""
    templates = templates_for(kind, template)
    if not templates:
        raise UserError('Kind "custom" needs a template such as "a sketch of {}": enter one per line.')
    prompts = tuple(place_trigger(text, trigger) for text in templates)
    for text in prompts:
        if not has_trigger(text, trigger):
            raise UserError(f"The template {text!r} does not contain {{}} or {trigger!r}: add one of them.")
    return prompts


def caption_prompt(caption: str, trigger: str, kind: str) -> str:
    """A caption as a prompt. Where it has neither ``{}`` nor the trigger word, that is put in front."""
    prompt = place_trigger(caption.strip().replace(MARK, "").replace(HERE, ""), trigger)
    if has_trigger(prompt, trigger):
        return prompt
    return place_trigger(CAPTION_PREFIXES.get(kind, "{}, "), trigger) + prompt


def check_whole(counts: Iterable[int], vectors: int, prompt: str) -> None:
    """Raises UserError unless a text encoder sees all ``vectors`` of an embedding in ``prompt``.

    ``counts`` has how many of them each section of the prompt holds. An embedding that is named
    twice gives multiples; one that was cut off or torn apart gives fractions.
    """
    counts = list(counts)
    if not any(counts) or any(count % vectors for count in counts):
        raise UserError(
            f"The prompt {plain(prompt)!r} has no room for {vectors} vectors: use fewer vectors or a shorter prompt."
        )
