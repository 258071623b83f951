"""Finds words of the vocabulary to start from: of per-image tokens, and of the embedding where the user names none."""

import heapq
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import FIXED_DRAWS, Batch, Dataset, fixed_batches
from .embedding import Embedding
from .gradients import Share, compute_gradients
from .image_tokens import TrainedTokens, new_image_tokens
from .memory import enable_checkpointing_if_needed, out_of_memory_explained
from .objective import fixed_losses
from .processes import ALONE, Processes
from .vocabulary import Vocabulary, initial_embedding

CANDIDATES = 16
DRAWS_PER_PICTURE = 2
# For per-image tokens, which go on learning from there.
FEW_CANDIDATES = 4
ROUNDS = 4


Progress = Callable[[int, int], None]  # what is done, and of how much


def with_initializer(
    model: TrainableModel,
    dataset: Dataset,
    config: TrainConfig,
    progress: Progress | None = None,
    beside: Sequence[str] = (),
    processes: Processes = ALONE,
) -> TrainConfig:
    """``config``, with the best word of the vocabulary where it names no initializer.

    ``progress`` is called before the search and after each of its passes, and may raise to end it. ``beside`` are
    trigger words of other concepts that the captions name.
    """
    if config.initializer:
        return config
    progress = progress or (lambda done, total: None)
    return replace(config, initializer=best_word(model, dataset, config, progress, beside, processes))


def best_word(
    model: TrainableModel,
    dataset: Dataset,
    config: TrainConfig,
    progress: Progress,
    beside: Sequence[str] = (),
    processes: Processes = ALONE,
) -> str:
    """The whole word of the vocabulary that explains the pictures best in the place of the trigger word.

    One gradient g at a neutral v ranks the words w of the vocabulary by -g (w - v), the first-order
    gain in loss; the best 16 are then tried on the same fixed noise. Other concepts stay neutral meanwhile.
    """
    vocabularies = model.vocabularies()
    neutral_vectors = {
        key: vocabulary.mean_direction(vocabulary.word_length())[None] for key, vocabulary in vocabularies.items()
    }
    neutral = Embedding(config.trigger, neutral_vectors).trainable()
    image_tokens = new_image_tokens(vocabularies, dataset.image_triggers, neutral, config.per_image_tokens)
    few = DRAWS_PER_PICTURE * len(dataset.latents) <= FIXED_DRAWS
    batches = fixed_batches(dataset, config, DRAWS_PER_PICTURE if few else 0)
    others = [neutral.renamed(trigger).snapshot() for trigger in beside]
    tokens = TrainedTokens(neutral, image_tokens, tuple(others))
    # A gradient takes about as long as three passes, which are counted as one here.
    done, total = 0, (1 + CANDIDATES) * len(batches)
    progress(done, total)
    with out_of_memory_explained(0):
        enable_checkpointing_if_needed(model, tokens.embeddings, batches, config.batch_size)
        compute_gradients(model, Share(tokens, batches), processes=processes)
    progress(done := len(batches), total)
    (candidates,) = likely_words(vocabularies, [neutral], CANDIDATES)
    losses: dict[str, float] = {}
    for word in candidates:
        start, rows = initial_embedding(vocabularies, config.trigger, word, 1), []
        for batch in batches:
            with out_of_memory_explained(0):
                rows.append(fixed_losses(model, [start, *image_tokens, *others], [batch], processes))
            progress(done := done + 1, total)
        losses[word] = torch.cat(rows).mean().item()
    return min(losses, key=lambda word: losses[word], default="")  # none without a gradient, which train() explains


def start_at_words(
    model: TrainableModel, tokens: TrainedTokens, batches: Sequence[Batch], processes: Processes = ALONE
) -> Generator[Share, Any, None]:
    """Puts each per-image token at the whole word of the vocabulary that explains its rows of ``batches`` best.

    In four rounds, since the words that a gradient ranks first depend on where it is taken: first in the mean direction
    of the vocabulary, then at the best word so far. The best 4 of each are tried. A token stays where it is if no
    word is better, it has no rows, or gradients are not numbers.

    Yields a ``Share`` where it needs gradients, as ``training.learn`` does.
    """
    vocabularies, images = model.vocabularies(), tokens.per_image
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    rows = [[row for row, prompt in enumerate(prompts) if image.trigger in prompt] for image in images]

    def losses() -> list[float]:
        with out_of_memory_explained(0):
            of_rows = fixed_losses(model, tokens.embeddings, batches, processes)
        return [of_rows[numbers].mean().item() for numbers in rows]  # NaN without rows

    best, least, share = [image.snapshot() for image in images], losses(), Share(tokens, batches)
    tried: list[set[str]] = [set() for _ in images]
    for _ in range(ROUNDS):
        yield share
        if not share.finite:
            break
        likely = likely_words(vocabularies, images, FEW_CANDIDATES, tried)
        for words in zip_longest(*likely):  # one for each image; None without a gradient
            for image, word in zip(images, words, strict=True):
                if word is not None:
                    _move(image, initial_embedding(vocabularies, image.trigger, word, image.count))
            for index, loss in enumerate(losses()):
                if loss < least[index]:
                    best[index], least[index] = images[index].snapshot(), loss
        for known, words in zip(tried, likely, strict=True):
            known.update(words)
        for image, word in zip(images, best, strict=True):
            _move(image, word)
    for vectors in tokens.parameters():
        vectors.grad = None


def likely_words(
    vocabularies: Mapping[str, Vocabulary],
    embeddings: Sequence[Embedding],
    count: int,
    without: Sequence[set[str]] = (),
) -> list[list[str]]:
    """For each embedding the whole words that lower the loss most, by the gradient g of its vectors: -g w.

    All vectors of an embedding would become that word. None for one without a gradient. ``without``: known already.
    """
    gains: list[dict[str, float]] = [{} for _ in embeddings]
    for key, vocabulary in vocabularies.items():
        gradients = [(n, e.vectors[key].grad) for n, e in enumerate(embeddings)]
        known = [(number, gradient.sum(0)) for number, gradient in gradients if gradient is not None]
        if not known:
            continue
        words, rows = vocabulary.first_order_gain(torch.stack([gradient for _, gradient in known]))
        for (number, _), row in zip(known, rows, strict=True):
            for word, gain in zip(words, row.tolist(), strict=True):
                gains[number][word] = gains[number].get(word, 0.0) + gain
    for some, known_words in zip(gains, without, strict=False):
        for word in known_words:
            some.pop(word, None)
    return [heapq.nlargest(count, some, key=some.__getitem__) for some in gains]


@torch.no_grad()
def _move(embedding: Embedding, to: Embedding) -> None:
    for key, vectors in embedding.vectors.items():
        vectors.copy_(to.vectors[key])
