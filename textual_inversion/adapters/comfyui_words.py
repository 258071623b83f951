"""A CLIP in which a word means our vectors. Training and applying both go through here."""

import copy
import re
from functools import partial
from typing import Any

from comfy.sd import CLIP
from comfy.sd1_clip import SDTokenizer
from torch import Tensor

from ..embedding import Embedding
from ..errors import UserError
from ..prompts import trigger_pattern
from ..vocabulary import Vocabulary

# What a trigger becomes inside ComfyUI's own "embedding:NAME" syntax. No number, or the weight
# parser would read "(embedding:NAME)" as a weight.
_NAME = "ti-word-{}"


class _KnowsWords:
    """Mixed into a copy of a tokenizer. ``words`` maps a trigger to its vectors, (vectors, width)."""

    words: dict[str, Tensor]
    embedding_directory: Any

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        for number, trigger in enumerate(self.words):
            # The spaces make ComfyUI's parser see the name apart from punctuation and brackets.
            name = f" embedding:{_NAME.format(number)} "
            text = trigger_pattern(trigger).sub(lambda _, name=name: name, text)
        return super().tokenize_with_weights(text, *args, **kwargs)  # type: ignore[misc]

    def _try_get_embedding(self, embedding_name: str):
        name, *rest = embedding_name.split()
        if match := re.fullmatch(_NAME.format(r"(\d+)"), name):
            return list(self.words.values())[int(match[1])], name, " ".join(rest)
        return super()._try_get_embedding(embedding_name)  # type: ignore[misc]


def sub_tokenizers(tokenizer) -> dict[str, SDTokenizer]:
    """ComfyUI's tokenizers by the attribute that holds them: one per text encoder."""
    return {name: part for name, part in vars(tokenizer).items() if isinstance(part, SDTokenizer)}


def embedding_keys(clip: CLIP) -> dict[str, int]:
    """Keys and widths of the text encoders of ``clip``: ``{"clip_l": 768}``.

    Raises UserError for a CLIP whose text encoder takes no embeddings.
    """
    keys = {part.embedding_key: part.embedding_size for part in sub_tokenizers(clip.tokenizer).values()}
    if not keys:
        raise UserError(
            f"The text encoder of this CLIP ({type(clip.cond_stage_model).__name__}) takes no embeddings: "
            "use a model with a CLIP text encoder, such as SD1 or SDXL."
        )
    return keys


def with_words(clip: CLIP, *embeddings: Embedding) -> CLIP:
    """A copy of ``clip`` in which the trigger of each embedding stands for its vectors.

    The copy shares the weights; ``clip`` itself stays as it is. May be chained.

    Raises:
        UserError: an embedding lacks vectors for an encoder of the CLIP, or has another width.
    """
    fitted = [embedding.fitted(embedding_keys(clip)) for embedding in embeddings]
    clip = clip.clone()
    clip.tokenizer = copy.copy(clip.tokenizer)
    for name, part in sub_tokenizers(clip.tokenizer).items():
        part = copy.copy(part)
        ours = {embedding.trigger: embedding.vectors[part.embedding_key] for embedding in fitted}
        words = {**getattr(part, "words", {}), **ours}
        if not isinstance(part, _KnowsWords):
            part.__class__ = type(type(part).__name__, (_KnowsWords, type(part)), {})
        vars(part)["words"] = words
        part.embedding_directory = part.embedding_directory or []  # None would switch embeddings off
        setattr(clip.tokenizer, name, part)
    return clip


def vocabularies(clip: CLIP) -> dict[str, Vocabulary]:
    """What each text encoder of ``clip`` knows, by its key."""
    found = {}
    for part in sub_tokenizers(clip.tokenizer).values():
        table = getattr(clip.cond_stage_model, part.embedding_key).transformer.get_input_embeddings()
        encode = partial(_token_ids, part)
        found[part.embedding_key] = Vocabulary(table.weight.detach(), part.inv_vocab, encode)
    return found


def _token_ids(tokenizer: SDTokenizer, text: str) -> list[int]:
    """Vocabulary entries of ``text`` without start and end tokens."""
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    return list(tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start : end])
