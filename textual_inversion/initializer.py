"""Finds the word of the vocabulary to start from where the user names none."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import FIXED_DRAWS, Dataset, fixed_batches
from .embedding import Embedding
from .gradients import Share, compute_gradients
from .image_tokens import TrainedTokens, new_image_tokens
from .memory import enable_checkpointing_if_needed, out_of_memory_explained
from .objective import fixed_losses
from .processes import ALONE, Processes
from .vocabulary import initial_embedding

CANDIDATES = 16
DRAWS_PER_PICTURE = 2


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
    gains: dict[str, float] = {}
    for key, vocabulary in vocabularies.items():
        gradient = neutral.vectors[key].grad
        if gradient is not None:
            for word, gain in vocabulary.first_order_gain(gradient[0]).items():
                gains[word] = gains.get(word, 0.0) + gain
    candidates = sorted(gains, key=lambda word: gains[word], reverse=True)[:CANDIDATES]
    losses: dict[str, float] = {}
    for word in candidates:
        start, rows = initial_embedding(vocabularies, config.trigger, word, 1), []
        for batch in batches:
            with out_of_memory_explained(0):
                rows.append(fixed_losses(model, [start, *image_tokens, *others], [batch], processes))
            progress(done := done + 1, total)
        losses[word] = torch.cat(rows).mean().item()
    return min(losses, key=lambda word: losses[word], default="")  # none without a gradient, which train() explains
