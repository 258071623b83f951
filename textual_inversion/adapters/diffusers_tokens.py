"""A pipeline in which a trigger stands for vectors. Training and drawing both go through here."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tokenizers import AddedToken
from torch import Tensor, nn

from ..embedding import Embedding
from ..prompts import MARK, replace_triggers

# What a trigger becomes in the text: one name a vector. Only copies of the tokenizers know them.
_NAME = f"{MARK}ti-vector-{{}}{MARK}"


def spelled(prompt: str, *embeddings: Embedding) -> str:
    """The prompt with every trigger replaced by the names of its vectors, numbered throughout."""
    firsts = [0, *accumulate(embedding.count for embedding in embeddings)]
    names = ["".join(map(_NAME.format, range(*ends))) for ends in pairwise(firsts)]
    return replace_triggers(
        prompt, [embedding.trigger for embedding in embeddings], lambda number, before: names[number]
    )


def with_names(tokenizer, count: int):
    """A copy of ``tokenizer`` in which the names of ``count`` vectors are the tokens after the last one."""
    return _with_names(tokenizer, len(tokenizer), count)


@lru_cache(maxsize=8)
def _with_names(tokenizer, _size: int, count: int):
    tokenizer = copy.deepcopy(tokenizer)
    # Spaces beside a name belong to it, or a tokenizer might make tokens of them.
    tokenizer.add_tokens(
        [AddedToken(_NAME.format(n), lstrip=True, rstrip=True, normalized=False) for n in range(count)]
    )
    return tokenizer


@contextmanager
def with_embeddings(pipeline: DiffusionPipeline, encoders: dict[str, str], *embeddings: Embedding) -> Iterator[Any]:
    """A copy of ``pipeline`` whose own methods understand ``spelled`` prompts inside the block.

    ``encoders`` maps slots of text encoders to keys of the embeddings. The copy shares all weights;
    the hooks on its text encoders go when the block ends.
    """
    pipeline = copy.copy(pipeline)
    with ExitStack() as stack:
        for slot, key in encoders.items():
            tokenizer = getattr(pipeline, tokenizer_slot(slot))
            vectors = torch.cat([embedding.vectors[key] for embedding in embeddings])  # (all vectors, width)
            stack.enter_context(_vectors_after(len(tokenizer), vectors, getattr(pipeline, slot)))
            setattr(pipeline, tokenizer_slot(slot), with_names(tokenizer, len(vectors)))
        yield pipeline


def tokenizer_slot(encoder_slot: str) -> str:
    return encoder_slot.replace("text_encoder", "tokenizer")


@contextmanager
def _vectors_after(vocabulary: int, vectors: Tensor, encoder: nn.Module) -> Iterator[None]:
    """Token ``vocabulary + i`` means ``vectors[i]`` to ``encoder``; its table of tokens keeps its size.

    The encoder sees token 0 in such a place: where a config has the old ``eos_token_id`` 2, CLIP's
    pooled output is taken at the largest id, which must stay that of the end token.
    """
    rows = torch.empty(0, dtype=torch.long)

    def hide(_encoder, args):
        nonlocal rows
        rows = args[0] - vocabulary  # (B, tokens), negative for tokens of the vocabulary
        return args[0].where(rows < 0, 0), *args[1:]

    def place(_table, _args, output):  # (B, tokens, width)
        return torch.where((rows >= 0)[..., None], vectors.to(output)[rows.clamp(min=0)], output)

    size = encoder.get_input_embeddings().weight.shape  # type: ignore[operator]
    # T5 has its table in two modules, of which it uses one.
    tables = [part for part in encoder.modules() if isinstance(part, nn.Embedding) and part.weight.shape == size]
    handles = [encoder.register_forward_pre_hook(hide), *(table.register_forward_hook(place) for table in tables)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
