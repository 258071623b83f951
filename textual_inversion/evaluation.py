"""Progress on fixed noise: what is kept, and whether there is more to learn.

Every evaluation has the same pictures, prompts, noise and noise levels, so that two of them are compared row by
row: the mean of the paired differences is told from chance by their standard error, where the losses themselves
differ by many times as much from row to row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapters.protocol import TrainableModel
from .config import TrainConfig
from .dataset import Batch, Dataset, fixed_batches
from .embedding import Embedding
from .image_tokens import TrainedTokens
from .objective import fixed_losses
from .processes import ALONE, Processes

CERTAIN = 2.0  # standard errors
FLAT = 0.15  # the second half of the run brought less than this share of what the word is worth
KNOWN = 0.2  # of what the word is worth: the standard error with which progress is known well enough
NEGLIGIBLE = 1e-4  # of the loss
SHARE = 0.12  # of the work of training that evaluations take in a long run
FORWARD_ROWS = 3  # evaluated in the time that one row takes in training, which has a backward pass
MOST_BLOCKS = 16


@dataclass(frozen=True)
class Evaluation:
    """Losses of the first of the fixed rows after ``step`` steps, (rows,) each; not finite where fp16 overflowed."""

    step: int
    initial: Tensor
    """With the initializer's vectors beside the averaged per-image tokens."""
    learned: Tensor
    """With the averaged vectors beside the same tokens."""

    @property
    def loss(self) -> float:
        return _mean(self.learned)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, larger: Tensor, smaller: Tensor) -> "Difference":
        rows = min(len(larger), len(smaller))
        difference = larger[:rows] - smaller[:rows]
        difference = difference[difference.isfinite()]
        error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
        return cls(_mean(difference), error)

    @property
    def certain(self) -> bool:
        """Whether it is more than nothing, and not by chance."""
        return self.mean > CERTAIN * self.error


def _mean(losses: Tensor) -> float:
    return losses[losses.isfinite()].mean().item()


def fairest(evaluations: Sequence[Evaluation], at: Evaluation) -> Evaluation:
    """The evaluation whose initializer what was learned ``at`` is compared with: the same one, beside the same tokens.

    But where the initializer was surely better beside the per-image tokens of another step, the one in which it did
    best: beside those of now it looks bad once they have left to the embedding what every picture shows, such as a
    background.
    """
    better = [other for other in evaluations if Difference.of(at.initial, other.initial).certain]
    rows = min((len(other.initial) for other in better), default=0)
    return min(better, key=lambda other: _mean(other.initial[:rows]), default=at)


def gain(evaluations: Sequence[Evaluation], at: Evaluation) -> Difference:
    """How far the embedding of ``at`` lowers the loss below the initializer's (see ``fairest``)."""
    return Difference.of(fairest(evaluations, at).initial, at.learned)


def handing_over(evaluations: Sequence[Evaluation], began: int) -> bool:
    """Whether the initializer got surely worse since the middle of the run, beside the per-image tokens of now.

    Then they leave to the embedding what they had learned, such as a background.
    """
    return Difference.of(evaluations[-1].initial, _middle(evaluations, began).initial).certain


def recent_progress(evaluations: Sequence[Evaluation], began: int) -> Difference:
    """What the second half of the run since step ``began`` added to the embedding's lead over the initializer.

    Each beside the same per-image tokens: a lower loss may be what only these learned.
    """
    last, half = evaluations[-1], _middle(evaluations, began)
    return Difference.of(last.initial - last.learned, half.initial - half.learned)


def flat(evaluations: Sequence[Evaluation], began: int) -> bool:
    """Whether recent progress is little beside what the embedding is worth."""
    last = evaluations[-1]
    return recent_progress(evaluations, began).mean < max(FLAT * gain(evaluations, last).mean, NEGLIGIBLE * last.loss)


def well_known(evaluations: Sequence[Evaluation], began: int) -> bool:
    """Whether the noise of the evaluations is small enough to believe in ``flat``."""
    worth = gain(evaluations, evaluations[-1])
    return worth.certain and recent_progress(evaluations, began).error < KNOWN * worth.mean


def _middle(evaluations: Sequence[Evaluation], began: int) -> Evaluation:
    """The last evaluation of the first half of the run since step ``began``."""
    middle = began + (evaluations[-1].step - began) / 2
    return max((evaluation for evaluation in evaluations if evaluation.step <= middle), key=lambda e: e.step)


class Evaluator:
    """Evaluates averaged vectors on fixed rows; the further apart the evaluations, the more rows."""

    def __init__(
        self,
        model: TrainableModel,
        tokens: TrainedTokens,
        dataset: Dataset,
        config: TrainConfig,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.initial, self.dataset, self.config = model, tokens.concept.snapshot(), dataset, config
        self.processes = processes
        self.others = bool(tokens.per_image or tokens.beside)  # vectors beside the concept's that change
        self._initial_losses: dict[int, Tensor] = {}  # by block, where nothing beside them changes

    def block(self, number: int) -> list[Batch]:
        """About 16 rows, drawn again each time: all of them would be hundreds of megabytes of a large model."""
        return fixed_batches(self.dataset, self.config, block=number)

    def steps_apart(self, step: int) -> int:
        """A sixth of the run, but at least ``evaluate_every`` steps for each pass that an evaluation needs."""
        passes = 2 if self.others else 1
        return max(passes * self.config.evaluate_every, step // 6)

    def evaluate(self, step: int, tokens: TrainedTokens, before: Sequence[Evaluation]) -> Evaluation:
        """``tokens`` are the averaged vectors.

        Twice the rows where the evaluations ``before`` cannot tell the gain from chance.
        """
        rows = sum(len(batch.prompts) for batch in self.block(0))
        passes = 2 if self.others else 1
        count = 1
        if before:
            pictures = (step - before[-1].step) * self.config.batch_size * self.config.accumulation
            share = SHARE if gain(before, before[-1]).certain else 2 * SHARE
            count = min(MOST_BLOCKS, max(1, int(share * pictures * FORWARD_ROWS / (rows * passes))))
        learned = torch.cat([self._losses(tokens.embeddings, n) for n in range(count)])
        if not before:
            return Evaluation(step, learned, learned)
        return Evaluation(step, torch.cat([self._initial(tokens, n) for n in range(count)]), learned)

    def _initial(self, tokens: TrainedTokens, number: int) -> Tensor:
        if self.others:
            return self._losses(replace(tokens, concept=self.initial).embeddings, number)
        if number not in self._initial_losses:
            self._initial_losses[number] = self._losses([self.initial], number)
        return self._initial_losses[number]

    def _losses(self, embeddings: Sequence[Embedding], number: int) -> Tensor:
        return fixed_losses(self.model, embeddings, self.block(number), self.processes)
