"""Finds words of the vocabulary to start from: of per-image tokens, and of the embedding where the user names none."""

import heapq
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

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


SearchProgress = Callable[[int, int], None]  # what is done, and of how much; it may raise to end a search


class Passes:
    """Passes through the model of one search, for its ``progress``. A gradient takes three, counted as one."""

    def __init__(self, model: TrainableModel, total: int, progress: SearchProgress, processes: Processes) -> None:
        self.model, self.total, self.progress, self.processes = model, total, progress, processes
        self.done = -1
        self.add()

    def add(self, passes: int = 1) -> None:
        self.done += passes
        self.progress(self.done, self.total)

    def end(self) -> None:
        """It may end before all of them."""
        if self.done < self.total:
            self.add(self.total - self.done)

    def losses(self, embeddings: Sequence[Embedding], batches: Sequence[Batch]) -> Tensor:
        """The loss of each row."""
        rows = []
        for batch in batches:
            with out_of_memory_explained(0):
                rows.append(fixed_losses(self.model, embeddings, [batch], self.processes))
            self.add()
        return torch.cat(rows)


def unseen(done: int, total: int) -> None:
    """The ``SearchProgress`` of a search that nobody follows."""


def with_initializer(
    model: TrainableModel,
    dataset: Dataset,
    config: TrainConfig,
    progress: SearchProgress = unseen,
    beside: Sequence[str] = (),
    processes: Processes = ALONE,
) -> TrainConfig:
    """``config``, with the best word of the vocabulary where it names no initializer.

    ``progress`` is called before the search and after each of its passes. ``beside`` are trigger words of other
    concepts that the captions name.
    """
    if config.initializer:
        return config
    return replace(config, initializer=best_word(model, dataset, config, progress, beside, processes))


def best_word(
    model: TrainableModel,
    dataset: Dataset,
    config: TrainConfig,
    progress: SearchProgress,
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
    passes = Passes(model, (1 + CANDIDATES) * len(batches), progress, processes)
    with out_of_memory_explained(0):
        enable_checkpointing_if_needed(model, tokens.embeddings, batches, config.batch_size)
        compute_gradients(model, Share(tokens, batches), processes=processes)
    passes.add(len(batches))
    (candidates,) = likely_words(vocabularies, [neutral], CANDIDATES)
    losses: dict[str, float] = {}
    for word in candidates:
        start = initial_embedding(vocabularies, config.trigger, word, 1)
        losses[word] = passes.losses([start, *image_tokens, *others], batches).mean().item()
    return min(losses, key=lambda word: losses[word], default="")  # none without a gradient, which train() explains


def start_at_words(
    model: TrainableModel,
    tokens: TrainedTokens,
    batches: Sequence[Batch],
    progress: SearchProgress = unseen,
    processes: Processes = ALONE,
) -> Generator[Share, Any, None]:
    """Puts each per-image token at the whole word of the vocabulary that explains its rows of ``batches`` best.

    In four rounds, since the words that a gradient ranks first depend on where it is taken: first in the mean direction
    of the vocabulary, then at the best word so far. The best 4 of each are tried. A token stays where it is if no
    word is better, it has no rows, or gradients are not numbers.

    Yields a ``Share`` where it needs gradients, as ``training.learn`` does. ``progress`` is called before the search
    and after each of its passes.
    """
    vocabularies, images = model.vocabularies(), tokens.per_image
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    rows = [[row for row, prompt in enumerate(prompts) if image.trigger in prompt] for image in images]
    passes = Passes(model, (1 + ROUNDS * (1 + FEW_CANDIDATES)) * len(batches), progress, processes)

    def losses() -> list[float]:
        of_rows = passes.losses(tokens.embeddings, batches)
        return [of_rows[numbers].mean().item() for numbers in rows]  # NaN without rows

    best, least, share = [image.snapshot() for image in images], losses(), Share(tokens, batches)
    tried: list[set[str]] = [set() for _ in images]
    for _ in range(ROUNDS):
        yield share
        passes.add(len(batches))
        if not share.finite:
            break
        likely = likely_words(vocabularies, images, FEW_CANDIDATES, tried)
        for words in zip_longest(*likely):  # one for each image; None without a gradient
            for image, word in zip(images, words, strict=True):
                if word is not None:
                    image.take_over(initial_embedding(vocabularies, image.trigger, word, image.count))
            for index, loss in enumerate(losses()):
                if loss < least[index]:
                    best[index], least[index] = images[index].snapshot(), loss
        for known, words in zip(tried, likely, strict=True):
            known.update(words)
        for image, word in zip(images, best, strict=True):
            image.take_over(word)
    passes.end()
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
