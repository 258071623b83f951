"""Numbers that half precision has no room for: gradients that underflow or overflow, losses that are not a number."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import NAMED, build, prepared
from ti_pack.nodes.train import _single  # pyright: ignore[reportMissingImports]  made by conftest.py
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from textual_inversion import TrainConfig, TrainingError, TrainingStopped, initial_embedding, train
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.adapters.protocol import TrainableModel
from textual_inversion.dataset import fixed_batches
from textual_inversion.gradients import Share, compute_gradients
from textual_inversion.image_tokens import TrainedTokens
from textual_inversion.initializer import with_initializer
from textual_inversion.report import report
from textual_inversion.training import MOST_SKIPPED

SD1 = NAMED["SD1"]
CONFIG = TrainConfig(initializer="toy", steps=6, batch_size=2, per_image_tokens=0, patience=0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def graph():
    return build(SD1)


class _Half(torch.autograd.Function):
    """Passes gradients on in fp16, as a network in fp16 does; ``size`` stands for that of larger pictures."""

    @staticmethod
    def forward(ctx, x: Tensor, size: float) -> Tensor:
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return (gradients[0] * ctx.size).half().float() / ctx.size, None


def changed(graph, change):
    """The graph with a MODEL whose cross-attention has its values changed by ``change(values, number of the call)``."""
    count = iter(range(10**9))

    def patch(q, k, v, _options):
        number = next(count)
        return q, k, change(v, number)

    model = graph[0].clone()
    model.set_model_attn2_patch(patch)
    return (model, *graph[1:])


def spoilt(graph, when):
    return changed(graph, lambda values, number: values * float("nan") if when(number) else values)


def learn(graph, config=CONFIG):
    model = ComfyModel(*graph)
    dataset = prepared(SD1, model, config)
    with model.training() as trainable:
        start = initial_embedding(trainable.vocabularies(), config.trigger, config.initializer, 1)
        steps = list(train(trainable, start.trainable(), dataset, config))
        return steps, report(trainable, dataset, config, start, steps[-1], "'toy'")


@contextmanager
def sharing(graph) -> Iterator[tuple[TrainableModel, Share]]:
    """The model in training, and a batch for a word."""
    model = ComfyModel(*graph)
    batch = fixed_batches(prepared(SD1, model, CONFIG), CONFIG)[0]
    with model.training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1).trainable()
        yield trainable, Share(TrainedTokens(word), [batch])


def gradient_of(share: Share) -> Tensor:
    (found,) = (vectors.grad for vectors in share.tokens.parameters())
    assert found is not None
    return found.flatten()


def gradient(graph) -> Tensor:
    with sharing(graph) as (trainable, share):
        compute_gradients(trainable, share)
        return gradient_of(share)


@pytest.mark.parametrize("size", [2.0**-14, 2.0**-12, 1.0, 2.0**22])
def test_gradient_neither_underflows_nor_overflows(graph, size):
    """Without a scale its cosine with the exact one is .2 at the first size and .84 at the second."""
    found = gradient(changed(graph, lambda values, _number: _Half.apply(values, size)))
    assert torch.nn.functional.cosine_similarity(found, gradient(graph), dim=0) > 0.999


def test_the_scale_that_works_is_kept(graph):
    overflowing = changed(graph, lambda values, _number: _Half.apply(values, 2.0**20))
    halvings = []
    with sharing(overflowing) as (trainable, share):
        for _ in range(3):
            compute_gradients(trainable, share)
            halvings.append(share.halvings)
    assert halvings[0] > 0
    assert halvings == [halvings[0]] * 3


def test_a_gradient_that_no_scale_helps_leaves_the_scale(graph):
    """Otherwise all later ones would underflow."""
    size = [torch.nan]
    fragile = changed(graph, lambda values, _number: _Half.apply(values, size[0]))
    with sharing(fragile) as (trainable, share):
        compute_gradients(trainable, share)
        assert not share.finite
        size[0] = 2.0**-12
        compute_gradients(trainable, share)
        found = gradient_of(share)
    assert torch.nn.functional.cosine_similarity(found, gradient(graph), dim=0) > 0.999


def test_the_search_finds_the_same_word_in_half_precision(graph):
    """Its gradient once was that of a mean, which is nothing in fp16."""

    def found(graph) -> str:
        model, config = ComfyModel(*graph), replace(CONFIG, initializer="")
        dataset = prepared(SD1, model, config)
        with model.training() as trainable:
            return with_initializer(trainable, dataset, config).initializer

    halved = changed(graph, lambda values, _number: _Half.apply(values, 2.0**-12))
    assert found(halved) == found(graph)


def calls_before(graph, step: int) -> tuple[int, int]:
    """Attention calls before ``step``, and in it."""
    count = [0]

    def note(values: Tensor, number: int) -> Tensor:
        count[0] = number + 1
        return values

    counted = changed(graph, note)
    model = ComfyModel(*counted)
    dataset = prepared(SD1, model, CONFIG)
    with model.training() as trainable:
        start = initial_embedding(trainable.vocabularies(), "S*", "toy", 1)
        calls = [count[0] for _ in train(trainable, start.trainable(), dataset, CONFIG)]
    return calls[step - 1], calls[1] - calls[0]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("skipped", [1, MOST_SKIPPED - 1])
def test_batches_without_a_number_are_skipped(graph, step, skipped):
    first, per_step = calls_before(graph, step)
    spoil = spoilt(graph, lambda number: first <= number < first + skipped * per_step)
    steps, text = learn(spoil)
    assert [step.number for step in steps] == list(range(CONFIG.steps + 1))
    assert steps[-1].progress.skipped == skipped
    assert f"Skipped {skipped} steps" in text
    assert all(torch.isfinite(vectors).all() for vectors in steps[-1].best.vectors.values())


@pytest.mark.parametrize(("step", "error"), [(1, TrainingError), (3, TrainingStopped)])
def test_many_batches_without_a_number_end_it(graph, step, error):
    first, _ = calls_before(graph, step)
    with pytest.raises(error, match=rf"became NaN at step {step}.*8 batches in a row.*lower the learning rate.*bf16"):
        learn(spoilt(graph, lambda number: number >= first))


def test_a_run_with_skipped_batches_resumes_on_the_same_numbers(graph):
    first, per_step = calls_before(graph, 2)
    config = replace(CONFIG, evaluate_every=1000)

    def run(graph, saved=None, steps=CONFIG.steps):
        """The state after ``steps`` steps."""
        model = ComfyModel(*graph)
        dataset = prepared(SD1, model, config)
        with model.training() as trainable:
            start = initial_embedding(trainable.vocabularies(), config.trigger, config.initializer, 1)
            loop = train(trainable, start.trainable(), dataset, config, saved)
            return next(step.state.to_dict() for step in loop if step.number == steps)

    def spoiled():
        return spoilt(graph, lambda number: first <= number < first + 2 * per_step)

    whole, half = run(spoiled()), run(spoiled(), steps=4)
    resumed = run(graph, half)
    assert resumed["progress"]["skipped"] == whole["progress"]["skipped"] == 2
    assert torch.equal(resumed["tokens"][0]["clip_l"], whole["tokens"][0]["clip_l"])


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (2, 64, 64), (64, 64)], ids=["pictures", "masks", "mask"])
def test_pictures_and_masks_are_full_precision_on_the_cpu(shape):
    """With --fp16-intermediates they come in half precision, and with --gpu-only on the card."""
    given = torch.rand(shape).half()
    for rows in (_single([given]), _single([given.float()])):
        assert torch.equal(torch.cat(rows).reshape(shape), given.float())
        assert {(row.dtype, row.shape[0], row.ndim) for row in rows} == {(torch.float32, 1, max(3, len(shape)))}
    (kept,) = _single([plain := torch.rand(1, 64, 64)])
    assert kept.data_ptr() != plain.data_ptr()  # ComfyUI's own stays as it is
    with FakeTensorMode():
        assert {row.device.type for row in _single([torch.zeros(shape, device="cuda")])} == {"cpu"}
