"""Training in little memory: the estimate, what happens when it runs out, and models that are not wholly loaded."""

import weakref
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from families import NAMED, build, prepared

from textual_inversion import TrainConfig, TrainingError, TrainingStopped, UserError, initial_embedding, train
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.dataset import fixed_batches
from textual_inversion.memory import kept_bytes
from textual_inversion.objective import batch_loss
from textual_inversion.report import report

FLUX = NAMED["Flux.1 dev"]
SD1 = NAMED["SD1"]
CONFIG = TrainConfig(initializer="toy", steps=4, batch_size=2, per_image_tokens=0)


def learn(family, graph, config=CONFIG):
    model = ComfyModel(*graph)
    dataset = prepared(family, model, config)
    with model.training():
        start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, 1)
        steps = list(train(model, start.trainable(), dataset, config))
        return model, steps, report(model, dataset, config, start, steps[-1], "'toy'")


def runs_out(graph, calls):
    """The graph with a MODEL that runs out of memory in these calls of its attention."""
    count = iter(range(10**9))

    def patch(q, k, v, _options):
        if next(count) in calls:
            raise torch.OutOfMemoryError("the test's memory ends here")
        return q, k, v

    model = graph[0].clone()
    model.set_model_attn2_patch(patch)
    return (model, *graph[1:])


def attention_calls(graph) -> list[int]:
    """Calls of the attention by the end of each step of a run; the first is what comes before it."""
    count = [0]

    def patch(q, k, v, _options):
        count[0] += 1
        return q, k, v

    model = graph[0].clone()
    model.set_model_attn2_patch(patch)
    ours = ComfyModel(model, *graph[1:])
    dataset = prepared(SD1, ours, CONFIG)
    with ours.training():
        start = initial_embedding(ours.vocabularies(), CONFIG.trigger, CONFIG.initializer, 1)
        return [count[0] for _ in train(ours, start.trainable(), dataset, CONFIG)]


@pytest.fixture(scope="module")
def graph():
    return build(SD1)


@pytest.fixture(scope="module")
def calls(graph):
    return attention_calls(graph)


@pytest.mark.parametrize("step", [1, 3])
def test_out_of_memory_is_retried_with_checkpointing(graph, calls, step):
    plain = learn(SD1, graph)[1][-1]
    model, steps, _ = learn(SD1, runs_out(graph, {calls[step - 1]}))
    assert not model.enable_gradient_checkpointing()  # it does already
    assert [step.number for step in steps] == list(range(CONFIG.steps + 1))
    torch.testing.assert_close(steps[-1].best.vectors, plain.best.vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("step", "error"), [(1, TrainingError), (3, TrainingStopped)])
def test_out_of_memory_for_good_says_what_to_do(graph, calls, step, error):
    with pytest.raises(
        error, match=rf"Out of memory at step {step}.*even with gradient checkpointing.*Reduce size.*accumulation"
    ):
        learn(SD1, runs_out(graph, range(calls[step - 1], 10**9)))


def kept(family, graph, rows: int, checkpointing: bool = False) -> int:
    model = ComfyModel(*graph, gradient_checkpointing=checkpointing)
    batch = fixed_batches(prepared(family, model, CONFIG), CONFIG)[0]
    batch = batch.rows([0] * rows)
    with model.training():
        word = initial_embedding(model.vocabularies(), "S*", "toy", 1).trainable()
        return kept_bytes(lambda: batch_loss(model, [word], batch), model.weights())


@pytest.mark.parametrize("family", [SD1, FLUX], ids=lambda family: family.name)
def test_estimate_counts_what_grows_with_the_batch(family):
    graph = build(family)
    one, two, four = (kept(family, graph, rows) for rows in (1, 2, 4))
    assert 0 < one < two < four
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    assert kept(family, graph, 4, checkpointing=True) < four / 2


def test_estimate_holds_the_weights_for_there_already():
    weight = torch.nn.Parameter(torch.randn(100, 100), requires_grad=False)
    x = torch.randn(1, 100, requires_grad=True)
    assert kept_bytes(lambda: (x @ weight).sum(), []) == weight.nbytes
    assert kept_bytes(lambda: (x @ weight).sum(), [weight]) == 0
    assert kept_bytes(lambda: (x * x).exp(), []) == 2 * x.nbytes  # x once, and the result


def test_estimate_leaves_nothing_behind():
    made = []

    def run() -> torch.Tensor:
        made.append(weakref.ref(y := torch.randn(10, requires_grad=True).exp()))
        return y

    assert kept_bytes(run, [])
    assert made[0]() is None


@pytest.mark.parametrize(("free", "checkpointed"), [(2**40, False), (1000, True)])
def test_little_memory_means_checkpointing_from_the_first_step(graph, monkeypatch, free, checkpointed):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_args, **_options: free)
    model, _, _ = learn(SD1, graph)
    assert model.enable_gradient_checkpointing() != checkpointed


def test_a_model_that_is_not_wholly_loaded_is_refused(graph, monkeypatch):
    """As with --novram: weights would come and go under the backward pass."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda _device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    comfy.model_management.unload_all_models()
    with (
        pytest.raises(UserError, match=r"MODEL and CLIP must fit on cpu completely.*without --novram"),
        ComfyModel(*graph).training(),
    ):
        pass
    monkeypatch.undo()
    comfy.model_management.unload_all_models()
    assert learn(SD1, graph)[1]


def test_an_encoder_that_the_model_ignores_keeps_its_vectors():
    """Flux's network without its input for CLIP's pooled output: the file still has to have CLIP's vectors."""
    family = replace(FLUX, unet=FLUX.unet | {"vec_in_dim": None})
    _, steps, text = learn(family, build(family))
    moved = {key: not torch.equal(rows, steps[0].best.vectors[key]) for key, rows in steps[-1].best.vectors.items()}
    assert moved == {"clip_l": False, "t5xxl": True}
    assert "clip_l has no influence on this model's pictures: its vectors are still those of 'toy'." in text
