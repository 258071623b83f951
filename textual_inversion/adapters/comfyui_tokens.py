"""A CLIP in which a trigger stands for vectors. Training and Apply Embedding both tokenize through here."""

import copy
import re
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd
import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel, SDTokenizer
from torch import Tensor, nn

from ..embedding import ENCODERS, Embedding
from ..errors import UserError
from ..prompts import MARK, replace_triggers
from ..vocabulary import Vocabulary

# What a trigger becomes inside ComfyUI's own "embedding:NAME" syntax. No number, or the weight
# parser would read "(embedding:NAME)" as a weight.
_NAME = f"{MARK}ti-embedding-{{}}{MARK}"
_NAMED = re.compile(_NAME.format(r"(\d+)"))
# Ends text around names whose last line break ComfyUI would cut off, or whose blank the name needs. Nobody types it.
_END = "\ue0f3"
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# Prompts ----------------------------------------------------------------------------------------


class Rows(tuple[Tensor, ...]):
    """Vectors as ComfyUI's tokenizer takes an embedding apart: it asks for the shape, then for each row.

    A row is the same tensor each time, so that tokens can be told apart by identity.
    """

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), len(self[0])


# The next three classes are mixed into copies of tokenizers. ComfyUI lets others choose a tokenizer's class
# while a file is loaded only (tokenizer_data), and the CLIP of a graph is loaded already.


class _TriggersToNames:
    """For the tokenizer of a CLIP, which sees a prompt before a chat template is put around it."""

    embeddings: dict[str, dict[str, Rows]]  # by trigger and embedding key

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        text = _with_names(text, self.embeddings)
        try:
            return self._inside(False).tokenize_with_weights(text, *args, **kwargs)
        except RuntimeError:  # it compares tokens with numbers, which tensors cannot answer; stock embeddings fail here
            return self._inside(True).tokenize_with_weights(text, *args, **kwargs)

    def _inside(self, as_dictionaries: bool) -> Any:
        """The tokenizer as it was before, with parts that know names."""
        inside = copy.copy(self)
        for slot, part in vars(self).items():
            if isinstance(part, _NamesToVectors):
                part = copy.copy(part)
                part.knows_triggers, part.as_dictionaries = False, as_dictionaries
                setattr(inside, slot, part)
        return super(_TriggersToNames, inside)


class _NamesToVectors:
    """For the tokenizer of one text encoder. Other packs call it with prompts of their own, triggers and all."""

    vectors: dict[str, Rows | None]  # by trigger; without vectors for this encoder, the trigger stays text
    embedding_directory: Any
    tokenizer: Any
    knows_triggers = True  # not inside a whole tokenizer: the words of a template are no triggers
    as_dictionaries = False

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        if self.knows_triggers:
            text = _with_names(text, self.vectors)
        text = _without_names(text, {n: word for n, (word, rows) in enumerate(self.vectors.items()) if rows is None})
        inside, text = (self._verbatim(), _with_ends(text)) if self.is_ours_alone() else (self, text)
        sections = super(_NamesToVectors, inside).tokenize_with_weights(text, *args, **kwargs)  # type: ignore[misc]
        if self.as_dictionaries:
            return [[(_dictionary(token), *rest) for token, *rest in section] for section in sections]
        return sections

    def _verbatim(self) -> Any:
        """A copy that takes the marks of ``_with_ends`` off the text between names."""
        inside, tokenizer = copy.copy(self), self.tokenizer
        inside.tokenizer = lambda piece, *args, **kwargs: tokenizer(re.sub(f"{_END} ?", "", piece), *args, **kwargs)
        return inside

    def _begins_with(self) -> str:
        """What the tokenizer puts in front of a text by itself: a blank, or nothing."""
        blank, letter = (len(self.tokenizer(text)["input_ids"]) for text in (" a", "a"))
        return " " if blank > letter else ""

    def is_ours_alone(self) -> bool:
        """Whether stock embeddings do not reach this encoder, or fail in it."""
        return self.as_dictionaries or not self.embedding_directory

    def _try_get_embedding(self, embedding_name: str):
        if match := _NAMED.match(embedding_name):
            rows, after = list(self.vectors.values())[int(match[1])], embedding_name[match.end() :].removeprefix(" ")
            # As stock, line breaks become blanks: a file gives the same tokens. Where there is no stock, they stay.
            after = after.removeprefix(self._begins_with()) if self.is_ours_alone() else " ".join(after.split())
            return rows, match.group(), after
        if not self.embedding_directory:
            return None, embedding_name, f"embedding:{embedding_name}"  # text, as it is to stock
        return super()._try_get_embedding(embedding_name)  # type: ignore[misc]


class _NamesToTriggers:
    """For the other tokenizers of a CLIP, to which a trigger stays the text that it was."""

    triggers: list[str]

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        text = _without_names(text, dict(enumerate(self.triggers)))
        return super().tokenize_with_weights(text, *args, **kwargs)  # type: ignore[misc]


def _with_names(text: str, triggers: Iterable[str]) -> str:
    """The prompt with the name of its embedding in the place of each trigger."""
    return replace_triggers(text, list(triggers), _named)


def _without_names(text: str, triggers: dict[int, str]) -> str:
    """The prompt with these triggers, by number, in the place of their names again."""
    return re.sub(f"embedding:{_NAMED.pattern} ", lambda match: triggers.get(int(match[1]), match.group()), text)


def _named(number: int, before: str) -> str:
    # ComfyUI's parser wants a name apart from punctuation and brackets. Not one blank more: other
    # tokenizers than CLIP's make a token of it.
    return f"{'' if not before or before[-1].isspace() else ' '}embedding:{_NAME.format(number)} "


def _with_ends(text: str) -> str:
    """The text with ``_END`` where ComfyUI would cut off line breaks, and where a blank stands before a name alone."""
    text = re.sub(r"\n(?=\Z|[()])", f"\n{_END}", text)
    return re.sub(f"(\n| ?)(?=embedding:{MARK})", lambda match: f"{match[1].strip(' ')}{_END} ", text)


def _dictionary(token: Any) -> Any:
    """Vectors in ComfyUI's other kind of token for them."""
    return {"type": "embedding", "data": token} if torch.is_tensor(token) else token


def row_of(token: Any) -> Any:
    """The vectors of a token, or its number."""
    return token["data"] if isinstance(token, dict) else token


def _mix_in(mixin: type, part: Any) -> Any:
    """A copy of an object whose class has ``mixin`` in front."""
    part = copy.copy(part)
    if not isinstance(part, mixin):
        part.__class__ = _mixed(mixin, type(part))
    return part


@cache
def _mixed(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {})


def with_embeddings(clip: CLIP, *embeddings: Embedding) -> CLIP:
    """``with_triggers`` for other nodes: the copy has a patcher of its own, which they may change."""
    return with_triggers(clip.clone(), *embeddings)


def with_triggers(clip: CLIP, *embeddings: Embedding) -> CLIP:
    """A copy of ``clip`` in which the trigger of each embedding stands for its vectors.

    Only the tokenizer is another one. The patcher stays: when a clone of it dies, ComfyUI takes LoRAs in bypass mode
    off the modules that both share. May be chained. The tokenizer keeps the rows that go among the tokens:
    ``clip.tokenizer.embeddings[trigger][key]``.

    Raises:
        UserError: an embedding has vectors for no encoder of the CLIP. To an encoder without, the trigger stays text.
    """
    keys = embedding_keys(clip)
    slots = {encoder.slot: encoder.key for encoder in text_encoders(clip)}
    known = dict(clip.tokenizer.embeddings) if isinstance(clip.tokenizer, _TriggersToNames) else {}
    for embedding in embeddings:
        vectors = embedding.for_encoders(keys, complete=False).vectors
        known = {word: rows for word, rows in known.items() if word.casefold() != embedding.trigger.casefold()}
        known[embedding.trigger] = {key: Rows(rows[n] for n in range(len(rows))) for key, rows in vectors.items()}
    clip = copy.copy(clip)
    clip.tokenizer = _mix_in(_TriggersToNames, clip.tokenizer)
    clip.tokenizer.embeddings = known
    for slot, part in list(vars(clip.tokenizer).items()):
        if slot in slots:
            part = _mix_in(_NamesToVectors, part)
            part.vectors = {trigger: rows.get(slots[slot]) for trigger, rows in known.items()}
            part.embedding_directory = part.embedding_directory or []  # None would switch embeddings off
        elif isinstance(part, SDTokenizer):
            part = _mix_in(_NamesToTriggers, part)
            part.triggers = list(known)
        setattr(clip.tokenizer, slot, part)
    return clip


def known_as(clip: CLIP, trigger: str) -> str:
    """The trigger of a chained embedding that ``trigger`` would replace, in any letter case; empty if there is none."""
    known = clip.tokenizer.embeddings if isinstance(clip.tokenizer, _TriggersToNames) else ()
    return next((word for word in known if word.casefold() == trigger.casefold()), "")


# Text encoders ----------------------------------------------------------------------------------


class TextEncoder(NamedTuple):
    """A text encoder of a CLIP that prompts reach token by token."""

    slot: str  # attribute of the tokenizer
    name: str  # of its tokens among a prompt's
    key: str  # of its vectors in embedding files
    tokenizer: SDTokenizer
    model: SDClipModel

    @property
    def table(self) -> nn.Embedding:
        return self.model.transformer.get_input_embeddings()  # type: ignore[operator,return-value]


def text_encoders(clip: CLIP) -> list[TextEncoder]:
    """The text encoders that are there: a tokenizer may bring parts whose encoder is not loaded, or has none."""
    found = []
    for slot, part in vars(clip.tokenizer).items():
        # A part of the tokenizer has the name of its encoder, some with "clip_" in front; tokens go by the short one.
        name = slot.removeprefix("clip_")
        models = (getattr(clip.cond_stage_model, named, None) for named in (slot, name))
        model = next((model for model in models if isinstance(model, SDClipModel)), None)
        if isinstance(part, SDTokenizer) and model is not None:
            found.append(TextEncoder(slot, name, part.embedding_key, part, model))
    return found


def embedding_keys(clip: CLIP) -> dict[str, int]:
    """Keys and widths of the text encoders of ``clip``: ``{"clip_l": 768}``.

    Raises UserError for a CLIP whose text encoder takes no embeddings.
    """
    keys = {encoder.key: encoder.table.embedding_dim for encoder in text_encoders(clip)}
    if not keys:
        raise UserError(
            f"The text encoder of this CLIP ({type(clip.cond_stage_model).__name__}) takes no embeddings: "
            "use a model with another one; the pack's docs/models.md lists them."
        )
    return keys


def supports_embedding_files(clip: CLIP) -> bool:
    """Whether ComfyUI itself looks for ``embedding:NAME`` in the prompts of this CLIP."""
    return all(encoder.tokenizer.embedding_directory for encoder in text_encoders(clip))


# A tokenizer's own key, or the one that ComfyUI's loader hands to it.
_KEY = re.compile(r"""(?:embedding_key\s*=|TEModel\.\w+:)\s*["'](\w+)["']""")


@cache
def known_encoders() -> tuple[str, ...]:
    """Every key that an embedding file may have for a text encoder of this ComfyUI."""
    # ComfyUI keeps no list: a key is an argument inside a tokenizer's constructor. To construct all would take
    # seconds, and vocabularies that only checkpoints bring. Its sources say the same in milliseconds.
    folder = Path(comfy.sd.__file__).parent
    sources = [*folder.glob("sd*.py"), *folder.glob("text_encoders/*.py")]
    found = {key for source in sources for key in _KEY.findall(source.read_text(encoding="utf-8"))}
    return (*ENCODERS, *sorted(found.difference(ENCODERS)))


@torch.no_grad()
def vocabularies(clip: CLIP) -> dict[str, Vocabulary]:
    """What each text encoder of ``clip`` knows, by its key."""
    return {
        encoder.key: Vocabulary(
            _vectors(encoder.table), encoder.tokenizer.inv_vocab, partial(_token_ids, encoder.tokenizer)
        )
        for encoder in text_encoders(clip)
    }


def _vectors(table: nn.Embedding) -> Tensor:
    """(tokens, width): the weight itself, or what ComfyUI makes of a quantised one."""
    weight = table.weight.detach()
    if type(weight) is Tensor and weight.dtype in _PLAIN:
        return weight
    numbers = torch.arange(table.num_embeddings, device=weight.device)
    return table(numbers, out_dtype=torch.bfloat16)


def _token_ids(tokenizer: SDTokenizer, text: str) -> list[int]:
    """Vocabulary entries of ``text`` without start and end tokens, as within a sentence: after a blank."""
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    return list(tokenizer.tokenizer(f" {text}")["input_ids"][tokenizer.tokens_start : end])
