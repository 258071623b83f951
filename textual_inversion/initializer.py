"""Finds the word of the vocabulary to start from where the user names none."""

from dataclasses import replace

from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import Dataset, fixed_batches
from .embedding import Embedding
from .gradients import Gradients
from .image_tokens import TrainedTokens, new_image_tokens
from .memory import enable_checkpointing_if_needed, out_of_memory_explained
from .objective import mean_loss
from .vocabulary import initial_embedding

CANDIDATES = 16
DRAWS_PER_PICTURE = 2


def with_initializer(model: TrainableModel, dataset: Dataset, config: TrainConfig) -> TrainConfig:
    """``config``, with the best word of the vocabulary where it names no initializer."""
    return config if config.initializer else replace(config, initializer=best_word(model, dataset, config))


def best_word(model: TrainableModel, dataset: Dataset, config: TrainConfig) -> str:
    """The whole word of the vocabulary that explains the pictures best in the place of the trigger word.

    One gradient g at a neutral v ranks the words w of the vocabulary by -g (w - v), the first-order
    gain in loss; the best 16 are then tried on the same fixed noise.
    """
    vocabularies = model.vocabularies()
    neutral_vectors = {
        key: vocabulary.mean_direction(vocabulary.word_length())[None] for key, vocabulary in vocabularies.items()
    }
    neutral = Embedding(config.trigger, neutral_vectors).trainable()
    image_tokens = new_image_tokens(vocabularies, dataset.image_triggers, neutral, config.per_image_tokens)
    batches = fixed_batches(dataset, config, DRAWS_PER_PICTURE)
    tokens = TrainedTokens(neutral, image_tokens)
    with out_of_memory_explained(0):
        enable_checkpointing_if_needed(model, tokens.embeddings, batches, config.batch_size)
        Gradients(model, tokens).compute(batches)
    gains: dict[str, float] = {}
    for key, vocabulary in vocabularies.items():
        gradient = neutral.vectors[key].grad
        if gradient is not None:  # train() tells the user why there is none
            for word, gain in vocabulary.first_order_gain(gradient[0]).items():
                gains[word] = gains.get(word, 0.0) + gain
    candidates = sorted(gains, key=lambda word: gains[word], reverse=True)[:CANDIDATES]

    def loss(word: str) -> float:
        start = initial_embedding(vocabularies, config.trigger, word, 1)
        return mean_loss(model, [start, *image_tokens], batches)

    with out_of_memory_explained(0):
        return min(candidates, key=loss)
