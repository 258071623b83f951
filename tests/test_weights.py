"""Weights as people have them: every precision ComfyUI loads, and models that other nodes have changed."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.sd
import comfy_extras.nodes_freelunch
import comfy_extras.nodes_model_advanced
import comfy_extras.nodes_model_merging
import comfy_extras.nodes_tomesd
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import PatcherInjection
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfyui_pack import weights_hash
from families import NAMED, agrees, build, gradients
from safetensors.torch import load_file
from small_models import write_checkpoint
from torch import nn

from textual_inversion import UserError
from textual_inversion.adapters.comfyui import ComfyModel, _differentiable_attention, _sliced_attention
from textual_inversion.adapters.comfyui_autograd import mutable_saved_tensors, ordinary_weights
from textual_inversion.adapters.comfyui_tokens import vocabularies

FLUX = NAMED["Flux.1 dev"]
WIDE = FLUX.unet | {"hidden_size": 256, "num_heads": 2}  # some formats take blocks of 256

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flux():
    family = replace(FLUX, unet=WIDE)
    return family, build(family)


@pytest.fixture(scope="module")
def state(flux) -> dict[str, torch.Tensor]:
    return flux[1][0].model.diffusion_model.state_dict()


def matrices(state) -> list[str]:
    """Names of the layers that quantised checkpoints have quantised."""
    return [
        key[: -len(".weight")]
        for key, value in state.items()
        if "blocks" in key and key.endswith("weight") and value.ndim == 2
    ]


def load(state, metadata=None, **options):
    with torch.inference_mode():
        state = {key: value.clone() for key, value in state.items()}
        return comfy.sd.load_diffusion_model_state_dict(state, model_options=options, metadata=metadata)


def quantised(state, format: str):
    """A checkpoint of ComfyUI's mixed precision."""
    state, layers = dict(state), {}
    layout = QUANT_ALGOS[format]["comfy_tensor_layout"]
    for layer in matrices(state):
        weight = state.pop(f"{layer}.weight").to(torch.bfloat16)
        state |= QuantizedTensor.from_float(weight, layout, scale="recalculate").state_dict(f"{layer}.weight")
        layers[layer] = {"format": format}
    return load(state, {"_quantization_metadata": json.dumps({"layers": layers})})


def scaled(state):
    """A checkpoint of scaled fp8, as they came before."""
    state = dict(state) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for layer in matrices(state):
        weight = state[f"{layer}.weight"]
        state[f"{layer}.scale_weight"] = weight.abs().max().reshape(1) / 448
        state[f"{layer}.weight"] = (weight / state[f"{layer}.scale_weight"]).to(torch.float8_e4m3fn)
    return load(state)


KINDS: dict[str, Callable[..., Any]] = {
    "float16": lambda state: load({key: value.half() for key, value in state.items()}),
    "bfloat16": lambda state: load({key: value.bfloat16() for key, value in state.items()}),
    "weights float8_e4m3fn": lambda state: load(state, dtype=torch.float8_e4m3fn),
    "weights float8_e5m2": lambda state: load(state, dtype=torch.float8_e5m2),
    "scaled float8": scaled,
} | {format: lambda state, format=format: quantised(state, format) for format in QUANT_ALGOS}


ROUNDS_ITS_INPUT = {"int8_tensorwise"}  # a staircase, of which differences say nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_through_the_weights_of(kind, flux, state):
    """Right for the network as it is, and near that of the exact weights. What is loaded stays as it is."""
    family, graph = flux
    changed = (KINDS[kind](state), *graph[1:])
    before = weights_hash(changed[0].model)
    found, word, batch = gradients(family, changed)
    assert kind in ROUNDS_ITS_INPUT or agrees(changed, word, batch, found)
    for one, other in zip(found, gradients(family, graph)[0], strict=True):
        nearness = F.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert nearness > (0.99 if kind in ROUNDS_ITS_INPUT else 0.85)
    assert weights_hash(changed[0].model) == before


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2", "nvfp4"])
def test_gradient_where_the_device_multiplies_quantised_numbers(format, flux, state, monkeypatch):
    """ComfyUI then quantises what comes in as well and has its own backward pass."""
    for support in ("supports_fp8_compute", "supports_nvfp4_compute"):
        monkeypatch.setattr(comfy.model_management, support, lambda *_args, **_options: True)
    family, graph = flux
    found = gradients(family, (quantised(state, format), *graph[1:]))[0]
    for one, other in zip(found, gradients(family, graph)[0], strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95


def test_gradient_with_fast_fp8(flux, state, monkeypatch, caplog):
    """Load Diffusion Model's fp8_e4m3fn_fast, without a line of log for every layer."""
    caplog.set_level("INFO")
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda *_args, **_options: True)
    family, graph = flux
    fast = load(state, dtype=torch.float8_e4m3fn, fp8_optimizations=True)
    exact = load(state, dtype=torch.float8_e4m3fn)
    for one, other in zip(*(gradients(family, (model, *graph[1:]))[0] for model in (fast, exact)), strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    assert "fp8 op" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_gradient_through_text_encoders_of(dtype, flux):
    family, graph = flux
    changed = (graph[0], build(family, encoder_dtype=dtype)[1], graph[2])
    before = weights_hash(changed[1].cond_stage_model)
    found, word, batch = gradients(family, changed)
    assert agrees(changed, word, batch, found)
    assert weights_hash(changed[1].cond_stage_model) == before
    for vocabulary in vocabularies(changed[1]).values():
        assert torch.isfinite(vocabulary.mean()).all()
        assert vocabulary.nearest(vocabulary.vectors[vocabulary.encode("dog")[:1]], 1)[0][0][0] == "dog"


def with_lora(model):
    """A LoRA on every matrix of the blocks."""
    model, generator, patches = model.clone(), torch.Generator().manual_seed(1), {}
    for layer in matrices(model.model.diffusion_model.state_dict()):
        part = model.model.diffusion_model.get_submodule(layer)
        up = torch.randn(part.out_features, 2, generator=generator) * 0.2
        down = torch.randn(2, part.in_features, generator=generator) * 0.2
        patches[f"diffusion_model.{layer}.weight"] = LoRAAdapter(set(), (up, down, 1.0, None, None, None))
    assert set(model.add_patches(patches)) == set(patches)
    return model


@pytest.mark.parametrize("kind", ["float16", "weights float8_e4m3fn", "scaled float8", "float8_e4m3fn"])
def test_gradient_with_a_lora_on_weights_of(kind, flux, state):
    family, graph = flux
    plain = KINDS[kind](state)
    before = weights_hash(plain.model)
    changed = (with_lora(plain), *graph[1:])
    found, word, batch = gradients(family, changed)
    assert agrees(changed, word, batch, found)
    without = gradients(family, (plain, *graph[1:]))[0]
    assert all(
        F.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.999 for a, b in zip(found, without, strict=True)
    )
    comfy.model_management.unload_all_models()
    assert weights_hash(plain.model) == before


def freeu(model):
    return comfy_extras.nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0]


def attention_in_place(model):
    """A patch that changes what the attention in it has saved for the backward pass."""

    def patch(q, k, v, options):
        out = optimized_attention(q, k, v, options["n_heads"], transformer_options=options)
        out *= 0.9
        return out

    model = model.clone()
    for part, number in itertools.product(("input", "middle", "output"), range(12)):
        model.set_model_attn2_replace(patch, part, number)
    return model


def merged_tokens(model):
    """By random numbers."""
    torch.manual_seed(0)
    return comfy_extras.nodes_tomesd.TomePatchModel.execute(model, 0.3)[0]


def sampling(kind: str, zsnr: bool):
    return lambda model: comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, kind, zsnr)[0]


def compiled(model):
    """What the torch.compile node does, with a backend that needs no C++ compiler and no minute."""
    model = model.clone()
    set_torch_compile_wrapper(model, backend="aot_eager")
    return model


def merged(model):
    other = build(NAMED["SD1"], seed=7)[0]
    return comfy_extras.nodes_model_merging.ModelMergeSimple().merge(model, other, 0.5)[0]


def wrapped(model):
    """A node that changes what the network predicts."""
    model = model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, given: 1.1 * apply(given["input"], given["timestep"], **given["c"])
    )
    return model


NODES = {
    "FreeU": freeu,
    "ModelSamplingDiscrete, v, zsnr": sampling("v_prediction", True),
    "ModelSamplingDiscrete, lcm": sampling("lcm", False),
    "ModelSamplingDiscrete, x0": sampling("x0", False),
    "torch.compile": compiled,
    "ModelMergeSimple": merged,
    "a function around the network": wrapped,
}


@pytest.mark.parametrize("node", NODES)
def test_gradient_after_the_node(node):
    """Of the model as the node has changed it: another loss, and its gradient."""
    family = NAMED["SD1"]
    graph = build(family)
    changed = (NODES[node](graph[0]), *graph[1:])
    found, word, batch = gradients(family, changed)
    assert agrees(changed, word, batch, found)
    plain = gradients(family, graph)[0]
    alike = all(torch.allclose(one, other, rtol=1e-3) for one, other in zip(found, plain, strict=True))
    assert alike == (node == "torch.compile")


@pytest.mark.parametrize("node", [freeu, attention_in_place, merged_tokens])
def test_gradient_of_recomputed_blocks_after_the_node(node):
    """The second run of a block sees what the first one saw."""
    family = NAMED["SD1"]
    graph = build(family)
    found = [gradients(family, (node(graph[0]), *graph[1:]), checkpointing)[0] for checkpointing in (False, True)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("size", [100, 1000, 2000])
def test_saved_tensors_that_change_are_told_apart(size):
    """Also where a later one has the memory and the number of one that was freed."""
    weight = torch.ones(size, requires_grad=True)
    with mutable_saved_tensors():
        losses = []
        for number in range(20):
            changing = weight * number
            losses.append(changing.square().sum())
            changing.zero_()
            del changing
        (found,) = torch.autograd.grad(torch.stack(losses).sum(), [weight])
    assert found.unique().tolist() == [2 * sum(number**2 for number in range(20))]


class Described(torch.Tensor):
    """Bytes with attributes that say what they mean, as the loaders of GGUF files have them."""

    meaning: str

    def detach(self):
        return self


def test_weights_with_attributes_keep_them():
    with torch.inference_mode():
        weight = torch.arange(6, dtype=torch.uint8).as_subclass(Described)
        weight.meaning = "Q8_0"
        layer = nn.Module()
        layer.weight = nn.Parameter(weight, requires_grad=False)
    before = layer.weight
    with ordinary_weights(layer):
        assert isinstance(layer.weight, Described)
        assert layer.weight.meaning == "Q8_0"
        assert not layer.weight.is_inference()
        assert layer.weight.data_ptr() == before.data_ptr()
    assert layer.weight is before


@pytest.mark.parametrize("name", ["SD1", "SDXL", "Flux.1 dev", "Z-Image"])
def test_gradient_where_weights_are_moved_to_the_device(name):
    """As on every card without dynamic VRAM: here to a second name of the CPU. Afterwards the graph still draws."""
    family = NAMED[name]
    graph = build(family)
    before = weights_hash(graph[0].model, graph[1].cond_stage_model)
    for patcher in (graph[0], graph[1].patcher):
        patcher.detach()
        patcher.load_device, patcher.offload_device = torch.device("cpu", 0), torch.device("cpu")
    found, word, batch = gradients(family, graph)
    assert agrees(graph, word, batch, found)
    assert weights_hash(graph[0].model, graph[1].cond_stage_model) == before
    shape = batch.latents.shape[1:]
    assert torch.isfinite(ComfyModel(*graph).generate("a photo of S*", word.snapshot(), shape, 0, 1, 2.0)).all()


@pytest.mark.parametrize(("made", "moved_in"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("kind", ["float32", "float8_e4m3fn", "buffer"])
def test_weights_that_were_moved_can_be_saved_for_backward(kind, made, moved_in):
    """Made under inference mode and moved outside of it, they have no version; the other way round, they have one."""
    layer = nn.Linear(4, 4).requires_grad_(False)
    with torch.inference_mode(made):
        if kind == "buffer":
            layer.register_buffer("weight_2", torch.randn(4, 4))
        layer.weight = nn.Parameter(torch.randn(4, 4).to(getattr(torch, kind, torch.float32)), requires_grad=False)
    with torch.inference_mode(moved_in):
        moved = torch.randn(4, 4).to(layer.weight.dtype)
    layer.weight.data = moved
    pointers = [tensor.data_ptr() for tensor in layer.state_dict().values()]
    with ordinary_weights(layer):
        assert [tensor.data_ptr() for tensor in layer.state_dict().values()] == pointers
        assert all(tensor._version >= 0 for tensor in [*layer.parameters(), *layer.buffers()])
        x = torch.randn(2, 4, requires_grad=True)
        (F.linear(x, layer.weight.float()) if kind.startswith("float8") else layer(x)).sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_vram_trains_on_the_precision_that_the_graph_computes_in(monkeypatch, tmp_path, dtype):
    """While it is on, ComfyUI leaves linear layers in the precision of the file, here float32."""
    write_checkpoint("SmallSD1", tmp_path / "small.safetensors")
    state = load_file(tmp_path / "small.safetensors")

    def loaded(disable_dynamic=False) -> Any:
        options = {"model_options": {"dtype": dtype}, "disable_dynamic": disable_dynamic}
        return comfy.sd.load_state_dict_guess_config(dict(state), **options)

    with torch.inference_mode():
        graph: Any = loaded()[:3]
    expected, *_ = gradients(NAMED["SD1"], graph)
    graph[0].cached_patcher_init = (loaded, (), 0)
    graph[1].patcher.cached_patcher_init = (lambda disable_dynamic: loaded(disable_dynamic)[1].patcher, ())
    originals = graph[0], graph[1].patcher
    monkeypatch.setattr(type(graph[0]), "is_dynamic", lambda patcher: patcher in originals)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    found, *_ = gradients(NAMED["SD1"], graph)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_attention_that_a_device_needs_stays(monkeypatch):
    """Sub-quadratic on Macs, and on AMD cards without PyTorch's kernels; flash and sage have no backward pass."""
    family = NAMED["SD1"]
    graph = build(family)
    plain = gradients(family, graph)[0]
    used = []

    def look(chosen, *args, **kwargs):
        used.append(chosen.__name__)
        return chosen(*args, **kwargs)

    monkeypatch.setattr("textual_inversion.adapters.comfyui._differentiable_attention", look)
    for one, other in zip(gradients(family, graph)[0], plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert set(used) == {"attention_sub_quad"}
    card = torch.zeros(1, device="meta")
    chosen = []
    for name in ("attention_sub_quad", "attention_split", "attention_flash", "attention_sage", "attention_pytorch"):

        def attention(_q, name=name):
            chosen.append(name)

        attention.__name__ = name
        monkeypatch.setattr("comfy.ldm.modules.attention.attention_pytorch", lambda _q: chosen.append("pytorch"))
        _differentiable_attention(attention, card)
    assert chosen == ["attention_sub_quad", "attention_split", "pytorch", "pytorch", "pytorch"]


@pytest.mark.parametrize("free", [[60_000], [2**40, 60_000, 2**40, 200_000]], ids=["little", "more or less"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_that_a_device_needs_trains_in_little_memory(monkeypatch, checkpointing, free):
    """Sub-quadratic attention has no backward pass there, and what is free changes until a block is recomputed."""
    graph = build(NAMED["SD1"])
    plain = gradients(NAMED["SD1"], graph)[0]
    monkeypatch.setattr("textual_inversion.adapters.comfyui._differentiable_attention", _sliced_attention)
    told = itertools.cycle(free)

    def free_memory(_device=None, torch_free_too=False):
        size = next(told)
        return (size, size) if torch_free_too else size

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)
    for _ in free:
        found = gradients(NAMED["SD1"], graph, checkpointing)[0]
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_dynamic_vram_without_a_way_to_load_again_is_refused(monkeypatch):
    """As with the loaders of other packs."""
    graph = build(NAMED["SD1"])
    monkeypatch.setattr(type(graph[0]), "is_dynamic", lambda _patcher: True)
    with pytest.raises(UserError, match=r"MODEL and CLIP cannot be loaded a second time.*--disable-dynamic-vram"):
        ComfyModel(*graph)


@pytest.mark.parametrize("part", ["MODEL", "CLIP"])
def test_dynamic_vram_with_a_lora_in_bypass_mode_is_refused(monkeypatch, part):
    """The LoRA is tied to the modules of the model that is there, and training would load another one."""
    model, clip, vae = build(NAMED["SD1"])
    patcher = model if part == "MODEL" else clip.patcher
    patcher.set_injections("bypass_lora", [PatcherInjection(lambda _patcher: None, lambda _patcher: None)])
    ComfyModel(model, clip, vae)  # as with --disable-dynamic-vram
    monkeypatch.setattr(type(model), "is_dynamic", lambda _patcher: True)
    with pytest.raises(UserError, match=rf"LoRA in bypass mode adds to {part}: use Load LoRA.*--disable-dynamic-vram"):
        ComfyModel(model, clip, vae)


def test_a_preview_loads_nothing_again(monkeypatch):
    """That would empty the cache of the allocator, and move what still fits."""
    graph = build(NAMED["SD1"])
    plain, loads = comfy.model_management.load_models_gpu, []

    def look(models, *args, **kwargs):
        loads.append(kwargs.get("force_full_load", False))
        return plain(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", look)
    with ComfyModel(*graph).training() as model:
        for _ in range(2):
            with model.paused() as paused:
                paused.generate("a photo", None, (4, 8, 8), 0, 1, 2.0)
    assert loads.count(True) == 1
