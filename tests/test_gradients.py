"""Gradients of the vectors through ComfyUI's own CLIP and UNet, against central finite differences."""

import pytest
import torch
from ti_pack.textual_inversion import TrainConfig, initial_embedding
from ti_pack.textual_inversion.adapters.comfyui import ComfyModel
from ti_pack.textual_inversion.dataset import fixed_batches, make_dataset
from ti_pack.textual_inversion.objective import batch_loss

STEP = 3e-2  # larger: curvature; smaller: float32 rounding


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_matches_finite_differences(graph, pictures, checkpointing):
    config = TrainConfig(context_vectors=0, vectors=2, batch_size=2, gradient_checkpointing=checkpointing)
    model = ComfyModel(*graph, checkpointing)
    dataset = make_dataset(model.encode_images, pictures(2), [], [], config)
    batch = fixed_batches(dataset, config)[0]
    generator = torch.Generator().manual_seed(3)
    with model:
        embedding = initial_embedding(model.vocabularies(), "S*", "toy", 2).trainable()
        with torch.no_grad():
            for vectors in embedding.parameters():
                vectors += 0.1 * torch.randn(vectors.shape, generator=generator)
        parameters = list(embedding.parameters())
        gradients = torch.autograd.grad(batch_loss(model, [embedding], batch), parameters)
        for vectors, gradient in zip(parameters, gradients, strict=True):
            # Along the gradient the difference is largest, and so least hidden by rounding.
            direction = gradient / gradient.norm()
            with torch.no_grad():
                start = vectors.clone()
                vectors.copy_(start + STEP * direction)
                above = batch_loss(model, [embedding], batch).item()
                vectors.copy_(start - STEP * direction)
                below = batch_loss(model, [embedding], batch).item()
                vectors.copy_(start)
            difference = (above - below) / (2 * STEP)
            assert difference == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_checkpointing_changes_no_gradient(graph, pictures):
    found = []
    for checkpointing in (False, True):
        config = TrainConfig(batch_size=2, context_vectors=0)
        model = ComfyModel(*graph, checkpointing)
        dataset = make_dataset(model.encode_images, pictures(2), [], [], config)
        with model:
            embedding = initial_embedding(model.vocabularies(), "S*", "toy", 1).trainable()
            loss = batch_loss(model, [embedding], fixed_batches(dataset, config)[0])
            found.append(torch.autograd.grad(loss, list(embedding.parameters())))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-8)
