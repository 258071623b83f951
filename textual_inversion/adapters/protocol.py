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
