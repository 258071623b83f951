"""The loss of a batch: how far the embedding is from explaining the pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapters.protocol import TrainableModel
from .dataset import Batch
from .devices import is_out_of_memory, to_device
from .embedding import Embedding
from .processes import ALONE, Processes


def denoising_losses(
    denoised: Tensor, latents: Tensor, sigmas: Tensor, weights: Tensor, masks: Tensor | None = None
) -> Tensor:
    """Of each row the mean of weight ((denoised - latents) / sigma)^2, weighted by the masks as well: (B,).

    For models that predict the noise this is ||eps - eps_theta||^2 of Gal et al. 2022 (arXiv
    2208.01618, equation 2), since denoised = x - sigma eps_theta and x = latents + sigma eps; for
    flow models it is the velocity loss. The weights make it the loss of models that predict v.

    Args:
        denoised: the model's estimate of the clean latents, (B, C, h, w), or (B, C, 1, h, w) of a video model.
        latents: the clean latents, of the same shape.
        sigmas: noise levels, (B,).
        weights: ``TrainableModel.loss_weights(sigmas)``, (B,).
        masks: weights in 0..1, one channel; every picture counts the same, however much its mask covers.
    """
    per_row = (-1, *[1] * (latents.ndim - 1))
    error = ((denoised.float() - latents) / sigmas.view(per_row)).square() * weights.view(per_row)  # (B, C, h, w)
    if masks is None:
        return error.flatten(1).mean(1)
    return (error.mean(1, keepdim=True) * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)


def batch_loss(model: TrainableModel, embeddings: Sequence[Embedding], batch: Batch) -> Tensor:
    """The loss of one batch, a scalar, differentiable by the vectors of ``embeddings``."""
    return row_losses(model, embeddings, batch).mean()


def row_losses(model: TrainableModel, embeddings: Sequence[Embedding], batch: Batch) -> Tensor:
    """The loss of each row of a batch, (B,), differentiable by the vectors of ``embeddings``."""
    latents, noise = (to_device(tensor, model.device) for tensor in (batch.latents, batch.noise))
    masks = None if batch.masks is None else to_device(batch.masks, model.device)
    sigmas = model.sample_sigmas(batch.quantiles)
    noised = model.add_noise(latents, noise, sigmas)
    conditioning = model.encode_prompts(batch.prompts, *embeddings)
    denoised = model.denoise(noised, sigmas, conditioning)
    return denoising_losses(denoised, latents, sigmas, model.loss_weights(sigmas), masks)


@torch.no_grad()
def fixed_losses(
    model: TrainableModel, embeddings: Sequence[Embedding], batches: Sequence[Batch], processes: Processes = ALONE
) -> Tensor:
    """The loss of each row of several batches, on the CPU."""
    losses, full = [torch.zeros(len(batch.prompts)) for batch in batches], torch.zeros(1)
    try:
        for batch, found in zip(batches, losses, strict=True):
            if (mine := processes.rows_of(batch)) is not None:
                found[processes.rank :: processes.count] = row_losses(model, embeddings, mine).cpu()
    except Exception as error:
        if processes.count == 1 or not is_out_of_memory(error):
            raise
        full.fill_(1)  # the others are told with the sums
    sums = processes.sum(torch.cat([*losses, full]))
    if sums[-1]:
        raise MemoryError("a process is out of memory")
    return sums[:-1]


def mean_loss(model: TrainableModel, embeddings: Sequence[Embedding], batches: Sequence[Batch]) -> float:
    """The loss over fixed batches, every row counting the same."""
    return fixed_losses(model, embeddings, batches).mean().item()
