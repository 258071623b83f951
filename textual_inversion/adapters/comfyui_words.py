"""A CLIP in which a word means our vectors. Training and applying both go through here."""

import copy
import re
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel, SDTokenizer
from torch import Tensor, nn

from ..embedding import Embedding
from ..errors import UserError
from ..prompts import trigger_pattern
from ..vocabulary import Vocabulary

# What a trigger becomes inside ComfyUI's own "embedding:NAME" syntax. No number, or the weight
# parser would read "(embedding:NAME)" as a weight.
_NAME = "ti-word-{}"
_NAMED = re.compile(_NAME.format(r"(\d+)"))
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Vectors(Tensor):
    """Vectors among the numbers of tokens: equal to none of them, where a tokenizer looks for a certain one.

    What is computed from them is an ordinary tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __hash__ = Tensor.__hash__

    def __eq__(self, other):
        return False if isinstance(other, int) else super().__eq__(other)

    def __getitem__(self, index):
        return super().__getitem__(index).as_subclass(_Vectors)


class _NamesWords:
    """Mixed into a copy of a CLIP's tokenizer: it sees a prompt before a chat template is put around it.

    ``words`` maps a trigger to its vectors by embedding key.
    """

    words: dict[str, dict[str, Tensor]]

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        for number, trigger in enumerate(self.words):
            text = trigger_pattern(trigger).sub(partial(_named, number), text)
        return super().tokenize_with_weights(text, *args, **kwargs)  # type: ignore[misc]


def _named(number: int, match: re.Match[str]) -> str:
    # ComfyUI's parser wants a name apart from punctuation and brackets. Not one blank more: other
    # tokenizers than CLIP's make a token of it.
    before = match.string[: match.start()]
    return f"{'' if not before or before[-1].isspace() else ' '}embedding:{_NAME.format(number)} "


class _ResolvesNames:
    """Mixed into copies of the tokenizers that have a text encoder. ``vectors``: one (vectors, width) a word."""

    vectors: list[Tensor]
    embedding_directory: Any

    def _try_get_embedding(self, embedding_name: str):
        name, *rest = embedding_name.split()
        if match := _NAMED.fullmatch(name):
            return self.vectors[int(match[1])].as_subclass(_Vectors), name, " ".join(rest)
        return super()._try_get_embedding(embedding_name)  # type: ignore[misc]


class _SpellsNames:
    """Mixed into copies of the other tokenizers, to which a word stays the text that it was."""

    triggers: list[str]

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        text = re.sub(f"embedding:{_NAMED.pattern} ", lambda match: self.triggers[int(match[1])], text)
        return super().tokenize_with_weights(text, *args, **kwargs)  # type: ignore[misc]


def _mix_in(mixin: type, part: Any) -> Any:
    """A copy of an object whose class has ``mixin`` in front."""
    part = copy.copy(part)
    if not isinstance(part, mixin):
        part.__class__ = type(type(part).__name__, (mixin, type(part)), {})
    return part


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


def reads_files(clip: CLIP) -> bool:
    """Whether ComfyUI itself looks for ``embedding:NAME`` in the prompts of this CLIP."""
    return all(encoder.tokenizer.embedding_directory is not None for encoder in text_encoders(clip))


def with_words(clip: CLIP, *embeddings: Embedding) -> CLIP:
    """A copy of ``clip`` in which the trigger of each embedding stands for its vectors.

    The copy shares the weights; ``clip`` itself stays as it is. May be chained.

    Raises:
        UserError: an embedding lacks vectors for an encoder of the CLIP, or has another width.
    """
    keys = embedding_keys(clip)
    slots = {encoder.slot: encoder.key for encoder in text_encoders(clip)}
    ours = {embedding.trigger: embedding.fitted(keys).vectors for embedding in embeddings}
    words = {**getattr(clip.tokenizer, "words", {}), **ours}
    clip = clip.clone()
    clip.tokenizer = _mix_in(_NamesWords, clip.tokenizer)
    vars(clip.tokenizer)["words"] = words
    for slot, part in list(vars(clip.tokenizer).items()):
        if slot in slots:
            part = _mix_in(_ResolvesNames, part)
            part.vectors = [vectors[slots[slot]] for vectors in words.values()]
            part.embedding_directory = part.embedding_directory or []  # None would switch embeddings off
        elif isinstance(part, SDTokenizer):
            part = _mix_in(_SpellsNames, part)
            part.triggers = list(words)
        setattr(clip.tokenizer, slot, part)
    return clip


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
