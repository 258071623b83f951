"""Per-image tokens: what only one picture shows goes into tokens of its own, not into the embedding.

A picture without a caption gets a prompt with one more token, which stands for its background, or
under a style for its subject. These tokens are trained with the embedding and then thrown away
(docs/method.md measures their effect).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainConfig
from .embedding import Embedding
from .prompts import MARK, SLOT
from .vocabulary import Vocabulary

IMAGE_SLOT = "{image}"

# The templates of prompts.TEMPLATES with a second slot. It must be a natural part of the sentence: a
# token appended after a comma learned nothing that the embedding would otherwise learn.
IMAGE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {} on a {image} background",
        "a photo of a {} on a {image} background",
        "a photo of the {} on a {image} background",
        "a picture of {} on a {image} background",
        "a picture of a {} on a {image} background",
        "an image of the {} on a {image} background",
        "a close-up photo of {} on a {image} background",
        "a good photo of a {} on a {image} background",
        "a cropped photo of the {} on a {image} background",
        "a rendering of a {} on a {image} background",
    ),
    "style": (
        "a picture of {image} in the style of {}",
        "a painting of {image} in the style of {}",
        "an image of {image} in the style of {}",
        "a rendering of {image} in the style of {}",
        "a detailed picture of {image} in the style of {}",
        "a close-up of {image} in the style of {}",
        "a good picture of {image} in the style of {}",
        "a small picture of {image} in the style of {}",
    ),
    "face": (
        "a photo of {} on a {image} background",
        "a portrait of {} on a {image} background",
        "a close-up portrait of {} on a {image} background",
        "a photo of the face of {} on a {image} background",
        "a good photo of {} on a {image} background",
        "a picture of {} looking at the camera on a {image} background",
    ),
}

# Of many pictures each per-image token also takes up to this many times the mean update of all of them: what all
# backgrounds have in common is learned before every picture was seen often (docs/method.md).
SHARED_UPDATE_WEIGHT = 2.0


@dataclass(frozen=True)
class TrainedTokens:
    """Everything that the prompts of one concept name."""

    concept: Embedding
    """What is wanted: the embedding that is saved."""
    per_image: tuple[Embedding, ...] = ()
    """One for each picture without a caption; only the prompts of that picture name it."""
    beside: tuple[Embedding, ...] = ()
    """Other concepts that captions name too. They are learned elsewhere: here their vectors are only used."""

    @property
    def trained(self) -> tuple[Embedding, ...]:
        return (self.concept, *self.per_image)

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """Everything that the prompts name."""
        return (*self.trained, *self.beside)

    def parameters(self) -> list[Tensor]:
        return [vectors for embedding in self.trained for vectors in embedding.parameters()]

    def snapshot(self) -> "TrainedTokens":
        """A copy of what is trained, on the CPU, cut from every graph."""
        concept, *per_image = (embedding.snapshot() for embedding in self.trained)
        return TrainedTokens(concept, tuple(per_image), self.beside)


def uses_image_tokens(config: TrainConfig, caption: str, mask: Tensor | None) -> bool:
    """Whether a picture with this caption and mask (1, H, W) gets tokens of its own.

    A custom template has no place for them. And where the background is masked, there is nothing else than the thing
    itself that they could explain.
    """
    if config.per_image_tokens == 0 or config.kind not in IMAGE_TEMPLATES or caption.strip():
        return False
    return mask is None or config.kind == "style" or _shows_background(mask)


def _shows_background(mask: Tensor) -> bool:
    """Whether a mask (1, H, W) counts most of the picture's edge."""
    edge = torch.cat([mask[..., [0, -1], :].flatten(), mask[..., [0, -1]].flatten()])
    return edge.float().mean().item() > 0.5


def image_trigger(index: int) -> str:
    """What stands for the tokens of picture ``index`` in its prompts."""
    return f"{MARK}image-{index}{MARK}"


def image_prompts(kind: str, trigger: str, image: str) -> tuple[str, ...]:
    """The prompts of one picture; ``image`` is its ``image_trigger``."""
    return tuple(text.replace(SLOT, trigger).replace(IMAGE_SLOT, image) for text in IMAGE_TEMPLATES[kind])


def new_image_tokens(
    vocabularies: Mapping[str, Vocabulary], triggers: Sequence[str], concept: Embedding, count: int
) -> tuple[Embedding, ...]:
    """Trainable tokens, ``count`` vectors for each of the ``triggers`` that is not empty.

    They start in the mean direction of the vocabulary, as long as the vectors of ``concept``.
    """
    start = {
        key: vocabulary.mean_direction(concept.vectors[key].detach().norm(dim=1).mean()).expand(count, -1)
        for key, vocabulary in vocabularies.items()
    }
    return tuple(Embedding(trigger, start).trainable() for trigger in triggers if trigger)
