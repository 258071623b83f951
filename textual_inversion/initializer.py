"""The word of the vocabulary to start from where the user names none."""

from dataclasses import replace

from torch import Tensor

from .adapters.protocol import DiffusionModel
from .config import TrainConfig
from .dataset import Dataset, fixed_batches
from .embedding import Embedding
from .objective import batch_loss, mean_loss
from .training import context_words
from .vocabulary import Vocabulary, initial_embedding

CANDIDATES = 16
DRAWS_PER_PICTURE = 2


def with_initializer(model: DiffusionModel, dataset: Dataset, config: TrainConfig) -> TrainConfig:
    """``config``, with the best word of the vocabulary where it names no initializer."""
    return config if config.initializer else replace(config, initializer=best_word(model, dataset, config))


def best_word(model: DiffusionModel, dataset: Dataset, config: TrainConfig) -> str:
    """The whole word that explains the pictures best in the place of the new one.

    One gradient g at a neutral v ranks the words w of the vocabulary by -g (w - v), the fall of the
    loss to first order; the best 16 are then tried on the same fixed noise.
    """
    vocabularies = model.vocabularies()
    neutral = Embedding(config.trigger, {key: _neutral(known) for key, known in vocabularies.items()}).trainable()
    contexts = context_words(vocabularies, dataset, neutral, config)
    batches = fixed_batches(dataset, config, DRAWS_PER_PICTURE)
    for batch in batches:
        (batch_loss(model, [neutral, *contexts], batch) / len(batches)).backward()
    falls: dict[str, float] = {}
    for key, vocabulary in vocabularies.items():
        gradient = neutral.vectors[key].grad
        if gradient is not None:  # train says why there is none
            for word, fall in vocabulary.falls(gradient[0]).items():
                falls[word] = falls.get(word, 0.0) + fall
    candidates = sorted(falls, key=lambda word: falls[word], reverse=True)[:CANDIDATES]

    def loss(word: str) -> float:
        start = initial_embedding(vocabularies, config.trigger, word, 1)
        return mean_loss(model, [start, *contexts], batches)

    return min(candidates, key=loss)


def _neutral(vocabulary: Vocabulary) -> Tensor:
    """The direction of the mean token, as long as a word usually is: (1, width)."""
    mean = vocabulary.mean()[None]
    return (mean / mean.norm() * vocabulary.word_length()).cpu()
