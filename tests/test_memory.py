"""Training in little memory: the estimate, what happens when it runs out, and models that are not wholly loaded."""

import weakref
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from families import NAMED, build, prepared

from textual_inversion import TrainConfig, TrainingError, TrainingStopped, UserError, initial_embedding, train
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.dataset import fixed_batches, training_batches
from textual_inversion.initializer import with_initializer
from textual_inversion.memory import kept_bytes, step_bytes
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


# What PyTorch and the libraries below it say on CUDA, Macs, AMD and Intel cards, and a CPU.
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("Allocation on device"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.80 GB, other allocations: 288.00 MB)"),
    RuntimeError("HIP out of memory. Tried to allocate 512.00 MiB."),
    RuntimeError("XPU out of memory. Tried to allocate 512.00 MiB"),
    RuntimeError("UR error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY): out_of_memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: error 12 (Cannot allocate memory)"),
    RuntimeError("exp(): functions with out=... arguments don't support automatic differentiation, but one of the"),
    MemoryError(),
]


def runs_out(graph, calls, error: BaseException = ERRORS[0]):
    """The graph with a MODEL that runs out of memory in these calls of its attention."""
    count = iter(range(10**9))

    def patch(q, k, v, _options):
        if next(count) in calls:
            raise error
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


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_out_of_memory_is_known_on_every_device(graph, calls, error):
    _, steps, _ = learn(SD1, runs_out(graph, {calls[0]}, error))
    assert steps[-1].number == CONFIG.steps


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("memory")])
def test_other_errors_are_not_taken_for_it(graph, calls, error):
    with pytest.raises(type(error), match=str(error)):
        learn(SD1, runs_out(graph, {calls[0]}, error))


def test_the_retry_has_the_memory_of_the_try_that_failed(graph, calls):
    kept, alive = [], []

    def patch(q, k, v, _options):
        alive.append(sum(one() is not None for one in kept))
        if len(alive) == calls[1]:  # the last of the first step
            raise ERRORS[0]
        kept.append(weakref.ref(one := torch.ones_like(v)))
        return q, k, v * one  # autograd keeps it

    model = graph[0].clone()
    model.set_model_attn2_patch(patch)
    learn(SD1, (model, *graph[1:]))
    assert alive[calls[1] - 1 :][:2] == [3, 0]


def test_out_of_memory_in_the_search_for_a_word(graph):
    def search(graph):
        model, config = ComfyModel(*graph), replace(CONFIG, initializer="")
        dataset = prepared(SD1, model, config)
        with model.training() as trainable:
            return with_initializer(trainable, dataset, config).initializer

    per_pass = attention_calls(graph)[1] - attention_calls(graph)[0]
    assert search(runs_out(graph, {3 * per_pass})) == search(graph)
    with pytest.raises(TrainingError, match=r"Out of memory before the first step.*Reduce size"):
        search(runs_out(graph, range(3 * per_pass, 10**9)))


def test_out_of_memory_in_an_evaluation_keeps_what_was_learned(graph, calls):
    with pytest.raises(TrainingStopped, match="Out of memory at step 4"):  # it is evaluated after the last step
        learn(SD1, runs_out(graph, range(calls[3] + calls[3] - calls[2], 10**9)))


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


def test_estimate_is_what_a_step_keeps():
    """With weights that are cast once for all rows, and prompts that are encoded each on its own."""
    family = replace(FLUX, unet=FLUX.unet | {"hidden_size": 512, "num_heads": 4})
    graph = build(family, encoder_dtype=torch.float16)
    graph[0].set_model_compute_dtype(torch.float32)
    graph[0].model.diffusion_model.to(torch.bfloat16)
    model = ComfyModel(*graph)
    batch = next(training_batches(prepared(family, model, CONFIG), replace(CONFIG, batch_size=4), torch.Generator()))
    batch = replace(batch, prompts=["S*", "a photo of S*", "S* at night", "the S*"])
    with model.training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1).trainable()
        for rows in (1, 2, 4):
            part = batch.rows(slice(rows))
            true = kept_bytes(lambda part=part: batch_loss(trainable, [word], part), trainable.weights())
            assert step_bytes(trainable, [word], [batch], rows) == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize("name", ["SD1", "SDXL", "SD3, SD3.5", "Flux.1 dev", "Z-Image", "Qwen-Image"])
def test_text_encoders_alone_are_checkpointed_first(name):
    """ComfyUI computes them in float32, and autograd would keep a copy of every weight that it casts."""
    family = NAMED[name]
    graph = build(family, encoder_dtype=torch.float16)
    model = ComfyModel(*graph)
    prompts = ["S*", "a photo of S*", "S* at night"]
    with model.training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1).trainable()

        def loss() -> torch.Tensor:
            outputs = (value for encoded in trainable.encode_prompts(prompts, word) for value in encoded.values())
            parts = [value.square().mean() for value in outputs if getattr(value, "requires_grad", False)]
            return torch.stack(parts).sum()

        plain = torch.autograd.grad(loss(), list(word.parameters()))
        kept = kept_bytes(loss, trainable.weights())
        assert trainable.enable_gradient_checkpointing()
        assert kept_bytes(loss, trainable.weights()) < kept * 0.7  # of two or three layers, one at a time is there
        for one, other in zip(torch.autograd.grad(loss(), list(word.parameters())), plain, strict=True):
            assert one.any()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert trainable.enable_gradient_checkpointing()
        assert not trainable.enable_gradient_checkpointing()


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
    other = torch.randn(7, device="meta", requires_grad=True)
    assert kept_bytes(lambda: ((x * x).exp(), other.exp()), [], other.device) == other.nbytes


def test_estimate_keeps_nothing_itself():
    made, alive = [], []

    def run() -> torch.Tensor:
        y = torch.randn(10, requires_grad=True)
        for _ in range(5):
            made.append(weakref.ref(y := y.exp()))
            alive.append(sum(tensor() is not None for tensor in made))
        return y

    assert kept_bytes(run, []) == 5 * 10 * 4
    assert max(alive) <= 2


@pytest.mark.parametrize(("free", "checkpointed"), [(2**40, False), (1000, True)])
def test_little_memory_means_checkpointing_from_the_first_step(graph, monkeypatch, free, checkpointed):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_args, **_options: free)
    model, _, _ = learn(SD1, graph)
    assert model.enable_gradient_checkpointing() != checkpointed


@pytest.mark.parametrize(("device", "free"), [("meta", [3e9, 0]), ("cpu", [5e9, 1e9])], ids=["card", "cpu"])
def test_what_comfyui_reserves_on_a_card_is_not_free(graph, monkeypatch, device, free):
    monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 2e9)
    model = ComfyModel(*graph)
    model._patcher.load_device = torch.device(device)
    for total, expected in zip((5e9, 1e9), free, strict=True):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda _device, total=total: total)
        assert model.free_memory() == expected


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
