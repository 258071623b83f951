"""The demo model made as hard to learn from as real models may be.

A level changes what training sees and nothing else: held-out losses and samples are those of the plain model.

cosine c   noise is added to every gradient, so that those of two batches of 4 have a mean cosine of c at the start:
           Gaussian, with the covariance of the directions of single rows' gradients there, in proportion to each
noise k    the target is moved by what cannot be known: the residual of another draw at about the same noise level,
           shifted, mirrored and with a random sign, times sqrt(k). The same draw always gets the same. The loss
           grows by the part of it that is added, and a word can explain that much less of it
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textual_inversion.agreement import Agreement
from textual_inversion.config import TrainConfig
from textual_inversion.dataset import Batch, Dataset, fixed_batches, training_batches
from textual_inversion.embedding import Embedding
from textual_inversion.image_tokens import TrainedTokens, new_image_tokens
from textual_inversion.objective import batch_loss

ROWS = 96  # of which gradients and residuals are measured
NEIGHBOURS = 8  # draws on each side whose mean is taken out of a residual
BATCHES = 24  # of 4, whose gradients' cosines are measured


@dataclass(frozen=True)
class Level:
    cosine: float = 0.0
    noise: float = 0.0

    @property
    def name(self) -> str:
        return f"cosine {self.cosine:g}" if self.cosine else f"noise {self.noise:g}" if self.noise else "as is"


@dataclass(frozen=True)
class Measured:
    """What a level is, at the start of a run."""

    agreement: float
    """Mean cosine between the gradients of two batches of 4."""
    loss: float

    @property
    def noise_scale(self) -> float:
        """In pictures (McCandlish et al. 2018, arXiv 1812.06162), were all gradients of the same length."""
        return 4 * (1 / self.agreement - 1)


def measure(model: Any, tokens: TrainedTokens, batches: Sequence[Batch]) -> Measured:
    gradients, _, losses = gradients_of(model, tokens, batches)
    agreement = Agreement()
    for gradient in gradients:
        agreement.add([gradient])
    return Measured(agreement.value, losses.mean().item())


def gradients_of(model: Any, tokens: TrainedTokens, batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of each batch: the concept's gradient (batches, n), those of the per-image tokens in it, and the loss."""
    concept, own, losses = [], [], []
    for batch in batches:
        loss = batch_loss(model, tokens.embeddings, batch)
        count = len(tokens.concept.vectors)
        gradients = torch.autograd.grad(loss, tokens.parameters(), allow_unused=True, materialize_grads=True)
        concept.append(torch.cat([part.flatten() for part in gradients[:count]]))
        per_image = [part for part in gradients[count:] if part.any()]
        own.append(torch.cat([part.flatten() for part in per_image]) if per_image else torch.zeros(0))
        losses.append(loss.item())
    return torch.stack(concept), own, torch.tensor(losses)


class HarderModel:
    """A ``TrainableModel`` at a level; everything else is the model's own."""

    def __init__(self, model: Any, level: Level, tokens: TrainedTokens, dataset: Dataset, config: TrainConfig) -> None:
        self._model, self._level = model, level
        self._generator = torch.Generator().manual_seed(config.seed + 77)
        if level.noise:
            rows = fixed_batches(dataset, config, max(1, ROWS // len(dataset.latents)))
            with torch.no_grad():
                residuals = torch.cat([_residuals(model, tokens, batch) for batch in rows])
            quantiles, order = torch.cat([batch.quantiles for batch in rows]).sort()
            residuals = residuals[order]
            near = [residuals[max(0, n - NEIGHBOURS) : n + NEIGHBOURS + 1].mean(0) for n in range(len(residuals))]
            self._sigmas = model.sample_sigmas(quantiles)
            self._residuals = math.sqrt(level.noise) * (residuals - torch.stack(near))
        self._pools: list[Tensor] = []
        fours = training_batches(dataset, replace(config, batch_size=4), torch.Generator().manual_seed(4321))
        self.measured = measure(self, tokens, [next(fours) for _ in range(BATCHES)])
        if 0 < level.cosine < self.measured.agreement:
            singles = training_batches(dataset, replace(config, batch_size=1), torch.Generator().manual_seed(4321))
            concept, own, _ = gradients_of(model, tokens, [next(singles) for _ in range(ROWS)])
            length = math.sqrt(self.measured.agreement / level.cosine - 1)  # of the noise beside a gradient
            for rows in (concept, torch.stack(own)):
                unit = F.normalize(rows)  # or a few long ones, and with them the mean, would be most of the noise
                centred = unit - unit.mean(0)
                self._pools.append(length * centred / max(centred.square().sum().sqrt().item(), 1e-12))
            self._concept = tokens.concept.trigger
            self.measured = Measured(level.cosine, self.measured.loss)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_prompts(self, prompts: Sequence[str], *embeddings: Embedding) -> Any:
        if self._pools and torch.is_grad_enabled():
            embeddings = tuple(self._with_noisy_gradient(embedding, prompts) for embedding in embeddings)
        return self._model.encode_prompts(prompts, *embeddings)

    def _with_noisy_gradient(self, embedding: Embedding, prompts: Sequence[str]) -> Embedding:
        which = int(embedding.trigger != self._concept)
        rows = sum(embedding.trigger in prompt.split() for prompt in prompts) if which else len(prompts) / 4
        if rows == 0 or not all(vectors.requires_grad for vectors in embedding.vectors.values()):
            return embedding
        noise = torch.randn(len(self._pools[which]), generator=self._generator) @ self._pools[which] / math.sqrt(rows)
        keys = list(embedding.vectors)
        joined = torch.cat([embedding.vectors[key].flatten() for key in keys])
        joined = _AddGradient.apply(joined, lambda gradient: gradient + gradient.norm() * noise)
        parts = joined.split([embedding.vectors[key].numel() for key in keys])
        vectors = {key: part.view_as(embedding.vectors[key]) for key, part in zip(keys, parts, strict=True)}
        return replace(embedding, vectors=vectors)

    def denoise(self, noised: Tensor, sigmas: Tensor, conditioning: Any) -> Tensor:
        denoised = self._model.denoise(noised, sigmas, conditioning)
        if not self._level.noise:
            return denoised
        scale = sigmas / self._model.loss_weights(sigmas).sqrt()
        extra = torch.stack([self._unknowable(x, sigma) for x, sigma in zip(noised, sigmas, strict=True)])
        return denoised + scale.view(-1, *[1] * (noised.ndim - 1)) * extra

    def _unknowable(self, noised: Tensor, sigma: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(int(noised.double().sum().abs().item() * 1e6) % 2**31)

        def chance(high: int) -> int:
            return int(torch.randint(high, (), generator=draw))

        nearest = int(torch.searchsorted(self._sigmas, sigma)) + chance(2 * NEIGHBOURS + 1) - NEIGHBOURS
        residual = self._residuals[min(max(nearest, 0), len(self._residuals) - 1)]
        height, width = residual.shape[-2:]
        flipped = residual.flip([dim for dim in (-1, -2) if chance(2)])
        return flipped.roll((chance(height), chance(width)), (-2, -1)) * (1 - 2 * chance(2))


def _residuals(model: Any, tokens: TrainedTokens, batch: Batch) -> Tensor:
    sigmas = model.sample_sigmas(batch.quantiles)
    noised = model.add_noise(batch.latents, batch.noise, sigmas)
    denoised = model.denoise(noised, sigmas, model.encode_prompts(batch.prompts, *tokens.embeddings))
    scale = (model.loss_weights(sigmas).sqrt() / sigmas).view(-1, *[1] * (noised.ndim - 1))
    return (denoised.float() - batch.latents) * scale


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return vectors.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.change(gradients[0]), None


def harder(model: Any, level: Level, start: Embedding, dataset: Dataset, config: TrainConfig) -> Any:
    """``model`` at a level, measured with the vectors ``start`` on the pictures of ``dataset``."""
    tokens = new_image_tokens(model.vocabularies(), dataset.image_triggers, start, config.per_image_tokens)
    return HarderModel(model, level, TrainedTokens(start.trainable(), tokens), dataset, config)
