"""What the engine asks of a model. Everything a model family does differently stays behind this."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..embedding import Embedding
from ..vocabulary import Vocabulary


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

    def free_memory(self) -> float:
        """Bytes of the device that are free; infinite where nobody knows."""
        ...

    def weights(self) -> list[Tensor]:
        """The tensors that are loaded anyway."""
        ...

    def recompute(self) -> bool:
        """From now on the network's blocks are computed anew in the backward pass instead of kept (gradient
        checkpointing): less memory, half as much time again, the same gradients. False if they were already."""
        ...

    def vocabularies(self) -> dict[str, Vocabulary]:
        """What each text encoder knows already, by its key."""
        ...

    def check_prompts(self, prompts: Sequence[str], *words: Embedding) -> None:
        """Raises UserError for a prompt in which one of the words is missing or does not fit as a whole."""
        ...

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Pictures (1, H, W, 3) in 0..1 to latents (C, h, w), one by one."""
        ...

    def encode_prompts(self, prompts: Sequence[str], *words: Embedding) -> Any:
        """Conditioning of one prompt a row, differentiable by the vectors of every word."""
        ...

    def text_outputs(self, prompts: Sequence[str], *words: Embedding) -> list[Tensor]:
        """What the text encoders make of each prompt, (tokens, width); tokens end to end where there are several."""
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
