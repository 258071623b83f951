"""What the engine asks of a model. Everything a model family does differently stays behind this."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..embedding import Embedding


class DiffusionModel(Protocol):
    """A frozen diffusion model with its text encoders and autoencoder; latents are in its own scale."""

    @property
    def device(self) -> torch.device:
        """Where latents, noise and sigmas are expected."""
        ...

    @property
    def attention_backend(self) -> str:
        """Name of the attention in use, for error messages."""
        ...

    def initial_embedding(self, trigger: str, initializer: str, vectors: int) -> Embedding:
        """Vectors to start from: those of the initializer's words, or the mean of the vocabulary.

        As many words as vectors: one each. Fewer: repeated in turn. More: neighbours are averaged.
        Raises UserError when the trigger is an ordinary word or the initializer has no token.
        """
        ...

    def check_prompts(self, prompts: Sequence[str], embedding: Embedding) -> None:
        """Raises UserError for a prompt in which the whole word does not fit."""
        ...

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Pictures (1, H, W, 3) in 0..1 to latents (C, h, w), one by one."""
        ...

    def encode_prompts(self, prompts: Sequence[str], embedding: Embedding) -> Any:
        """Conditioning of one prompt a row, differentiable by the vectors of ``embedding``."""
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
