"""The word that is learned: its trigger and one matrix of vectors per text encoder."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors.

    ``vectors`` maps a text encoder's key (ComfyUI's names: ``clip_l``, ``clip_g``, ...) to a float32
    tensor of shape (vectors, width). In training these are the only parameters.
    """

    trigger: str
    vectors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens the word takes in a prompt: the same for every encoder."""
        return max(tensor.shape[0] for tensor in self.vectors.values())

    def parameters(self) -> Iterator[Tensor]:
        yield from self.vectors.values()

    def trainable(self) -> "Embedding":
        """A copy whose vectors are leaf tensors that collect gradients."""
        return self._map(lambda tensor: tensor.detach().clone().requires_grad_(True))

    def snapshot(self) -> "Embedding":
        """A copy on the CPU, cut from every graph."""
        return self._map(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))

    def scaled(self, strength: float) -> "Embedding":
        return self._map(lambda tensor: tensor * strength)

    def renamed(self, trigger: str) -> "Embedding":
        return replace(self, trigger=trigger)

    def describe(self) -> str:
        """For people: ``1 vector, clip_l 768 and clip_g 1280``."""
        widths = " and ".join(f"{key} {t.shape[-1]}" for key, t in self.vectors.items())
        return f"{self.count} vector{'s' if self.count > 1 else ''}, {widths}"

    def _map(self, change) -> "Embedding":
        vectors = {key: change(tensor) for key, tensor in self.vectors.items()}
        return replace(self, vectors=vectors)
