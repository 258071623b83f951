"""What the engine asks of a model. Everything a model family does differently stays behind this.

There are two protocols, for what can be called when: a ``DiffusionModel`` encodes and draws pictures,
and ``with model.training() as trainable:`` makes it a ``TrainableModel`` for a while.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..embedding import Embedding
from ..vocabulary import Vocabulary


class DiffusionModel(Protocol):
    """A frozen diffusion model with its text encoders and autoencoder; latents are in its own scale."""

    @property
    def native_size(self) -> int:
        """Pixels a side of the square pictures that the model was trained on."""
        ...

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Pictures (1, H, W, 3) in 0..1 to latents (C, h, w), one by one.

        Raises UserError where the autoencoder does not belong to the model.
        """
        ...

    def generate(
        self,
        prompt: str,
        embedding: Embedding | None,
        shape: Sequence[int],
        seed: int,
        steps: int,
        cfg: float,
        negative: str = "",
    ) -> Tensor:
        """One picture (1, H, W, 3) in 0..1 of latent ``shape`` (C, h, w), drawn by the library's own sampler."""
        ...

    def training(self) -> "AbstractContextManager[TrainableModel]":
        """Inside, the weights stay on the device and can be differentiated through. Afterwards they are as before.

        Raises UserError where they do not fit on the device.
        """
        ...


class TrainableModel(Protocol):
    """A model during training."""

    def paused(self) -> AbstractContextManager[DiffusionModel]:
        """Inside, the model is as it was before training, for instance to draw a picture."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents, noise and sigmas are expected."""
        ...

    @property
    def attention_backend(self) -> str:
        """Name of the attention in use, for error messages."""
        ...

    def free_memory(self) -> float:
        """Free bytes of the device; infinite where they are not known."""
        ...

    def weights(self) -> list[Tensor]:
        """The tensors that are loaded anyway."""
        ...

    def enable_gradient_checkpointing(self) -> bool:
        """From now on the backward pass of one more part computes activations again instead of keeping them: less
        memory, up to half as much time again, the same gradients. False if nothing is left to do so."""
        ...

    def vocabularies(self) -> dict[str, Vocabulary]:
        """The words each text encoder knows, by its key."""
        ...

    def check_compatible(self, latent: Tensor, prompt: str, embedding: Embedding) -> None:
        """One forward pass with a latent (C, h, w). Raises UserError where text encoders and network do not belong
        together."""
        ...

    def check_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> None:
        """Raises UserError for a prompt in which one of the embeddings is missing or was cut off."""
        ...

    def encode_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> Any:
        """Conditioning of one prompt per row, differentiable by the vectors of every embedding."""
        ...

    def text_outputs(self, prompts: Sequence[str], *embeddings: Embedding) -> list[Tensor]:
        """The outputs of the text encoders for each prompt, (tokens, width); several are put end to end."""
        ...

    def sample_sigmas(self, quantiles: Tensor) -> Tensor:
        """Noise levels (B,) at positions (B,) in [0, 1) of the schedule the model was trained on."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Latents (B, C, h, w) at noise level ``sigmas``."""
        ...

    def denoise(self, noised: Tensor, sigmas: Tensor, conditioning: Any) -> Tensor:
        """The model's estimate of the clean latents, (B, C, h, w)."""
        ...

    def loss_weights(self, sigmas: Tensor) -> Tensor:
        """Factors (B,) that make ((denoised - latents) / sigma)^2 the loss the model was trained with.

        1 for models that predict the noise or a flow's velocity, 1 + sigma^2 for v-prediction
        (Salimans and Ho 2022, arXiv 2202.00512, appendix D).
        """
        ...
