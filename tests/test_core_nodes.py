"""Every node of ComfyUI that takes a MODEL and gives one: training goes through it, and sees what a sampler sees."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_hooks
import comfy_extras.nodes_hypernetwork
import comfy_extras.nodes_model_patch
import folder_paths
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfyui_pack import weights_hash
from families import NAMED, agrees, build, gradients, prepared
from safetensors.torch import save_file

import nodes
from dev.in_process import finished
from textual_inversion import TrainConfig, TrainingError, UserError, initial_embedding
from textual_inversion.adapters.comfyui import OF_THE_NETWORK, ComfyModel
from textual_inversion.dataset import fixed_batches
from textual_inversion.objective import batch_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("SD1", "Flux.1 dev", "AuraFlow", "SDXL")  # tried in this order until one takes the node
# What nodes ask for that is a model of its own, for a family of its own.
NOT_MADE = {"MODEL_PATCH", "CLIP_VISION_OUTPUT", "AUDIO", "AUDIO_ENCODER_OUTPUT", "COMFY_DYNAMICCOMBO_V3"}
# These fail themselves: made for other families, or without a file.
OF_OTHERS = {"TripoSplatSamplingPreview", "HypernetworkLoader"}
RANDOM = {"TomePatchModel"}  # which tokens it merges is drawn
SLOW = {"TorchCompileModel"}  # minutes; test_weights.py compiles with another backend
CONFIG = TrainConfig(per_image_tokens=0, batch_size=1)
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def core_nodes() -> dict[str, Any]:
    """All nodes of ComfyUI that take a MODEL and give one, by id, found through their schemas."""
    finished(nodes.init_builtin_extra_nodes())  # type: ignore[attr-defined]
    found = nodes.NODE_CLASS_MAPPINGS  # type: ignore[attr-defined]
    ours: dict[Any, tuple[str, Any]] = {}  # by what they call, which many that merge models share
    for name, node in sorted(found.items()):
        kinds = set(required(node).values())
        if "MODEL" in node.RETURN_TYPES and "MODEL" in kinds and not (kinds & NOT_MADE) and name not in SLOW:
            call = getattr(node, node.FUNCTION if "execute" not in vars(node) else "execute")
            ours.setdefault(getattr(call, "__func__", call), (name, node))
    return dict(ours.values())


@pytest.fixture(scope="module")
def graphs():
    found = {name: build(NAMED[name]) for name in FAMILIES}
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (model, _, _) in found.items():
        save_file(lora_of(model), folder / f"{name}.safetensors")
    return found


def lora_of(model) -> dict[str, torch.Tensor]:
    return lora_on(model.model.diffusion_model.state_dict(), "diffusion_model.")


def lora_on(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    generator, state = torch.Generator().manual_seed(0), {}
    for key, weight in weights.items():
        if key.endswith(".weight") and weight.ndim == 2:
            name = prefix + key.removesuffix(".weight")
            state[f"{name}.lora_up.weight"] = 0.2 * torch.randn(weight.shape[0], 2, generator=generator)
            state[f"{name}.lora_down.weight"] = 0.2 * torch.randn(2, weight.shape[1], generator=generator)
    return state


def required(node) -> dict[str, str]:
    """The types of a node's inputs; COMBO where it is a list of choices."""
    inputs = node.INPUT_TYPES()["required"].items()
    return {name: kind if isinstance(kind, str) else "COMBO" for name, (kind, *_) in inputs}


def values(node, family: str, graph) -> dict[str, Any]:
    """Something for every input: the defaults, and numbers that change something where the default does not."""
    clip = graph[1]
    made = {
        "MODEL": graph[0],
        "CLIP": clip,
        "VAE": graph[2],
        "IMAGE": torch.rand(1, 64, 64, 3),
        "MASK": torch.ones(1, 64, 64),
        "CONDITIONING": clip.encode_from_tokens_scheduled(clip.tokenize("")),
        "LATENT_OPERATION": lambda latent, **_options: latent,
        "LORA_MODEL": {},
    }
    found = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        choices = kind if isinstance(kind, list) else options[0].get("options") if kind == "COMBO" else None
        if name == "lora_name":
            found[name] = f"{family}.safetensors"
        elif choices is not None:
            found[name] = choices[0] if choices else None
        else:
            found[name] = made[kind] if kind in made else options[0].get("default", "")
    return found


def apply(node, inputs: dict[str, Any], graph):
    """The graph with the node's MODEL, and with its CLIP where it gives one."""
    with torch.inference_mode():
        run = node if hasattr(node, "GET_SCHEMA") else node()
        outputs = getattr(run, node.FUNCTION)(**inputs)
    outputs = dict(zip(node.RETURN_TYPES, getattr(outputs, "result", outputs), strict=False))
    return outputs["MODEL"], outputs.get("CLIP", graph[1]), graph[2]


def train_once(graph, family) -> None:
    """What the node does before its first step, and the gradient of that step."""
    model = ComfyModel(*graph)
    batch = fixed_batches(prepared(family, model, CONFIG), CONFIG)[0]
    with model.training():
        word = initial_embedding(model.vocabularies(), "S*", "toy", 1).trainable()
        model.check_compatible(batch.latents[0], "S*", word)
        gradients = torch.autograd.grad(batch_loss(model, [word], batch), list(word.parameters()), allow_unused=True)
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)


def denoised_in_training(graph, x: torch.Tensor, sigma: float) -> torch.Tensor:
    model = ComfyModel(*graph)
    with model.training(), torch.no_grad():
        found = model.denoise(x, torch.full((1,), sigma), model.encode_prompts([PROMPT]))
        return model._patcher.model.process_latent_out(found)


def denoised_in_a_sampler(graph, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """One step of Euler's method from ``sigma`` to 0 ends at what the model denoises."""
    model, clip, _ = graph
    sampling = model.get_model_object("model_sampling")
    scaled = sampling.noise_scaling(torch.tensor(sigma), torch.ones(1), torch.zeros(1), False)
    with torch.inference_mode():
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
        sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([sigma, 0.0])
        latent = torch.zeros_like(x)
        return comfy.sample.sample_custom(
            model, x / scaled, 1.0, sampler, sigmas, positive, negative, latent, disable_pbar=True
        )


def guides(graph) -> bool:
    """Whether the node changes how a sampler puts predictions together, and not the predictions."""
    options = graph[0].model_options
    wrappers = [graph[0].wrappers, options["transformer_options"].get("wrappers", {})]
    kinds = {kind for by_kind in wrappers for kind, by_key in by_kind.items() if any(by_key.values())}
    return bool(kinds - OF_THE_NETWORK) or any("cfg" in key or "sampler" in key for key in options)


def test_every_node_trains_as_it_samples_or_is_refused_with_a_sentence(core_nodes, graphs):
    trained, refused, differ = set(), {}, []
    before = {family: weights_hash(graph[0].model) for family, graph in graphs.items()}
    for name, node in core_nodes.items():
        for family, graph in graphs.items():
            try:
                changed = apply(node, values(node, family, graph), graph)
            except (AttributeError, KeyError, TypeError):  # made for another family
                continue
            try:
                train_once(changed, NAMED[family])
            except (UserError, TrainingError) as error:
                refused[name] = str(error)
                continue
            trained.add(name)
            x = torch.randn(1, changed[0].model.latent_format.latent_channels, 8, 8)
            if not guides(changed) and name not in RANDOM:
                pair = (denoised_in_training(changed, x, 0.5), denoised_in_a_sampler(changed, x, 0.5))
                differ += [] if torch.allclose(*pair, atol=1e-3) else [name]
            break
    assert trained == set(core_nodes) - OF_OTHERS, refused
    assert not differ
    comfy.model_management.unload_all_models()
    assert {family: weights_hash(graph[0].model) for family, graph in graphs.items()} == before
    assert len(trained) > 50


def handed(graph, run) -> dict[str, Any]:
    """The transformer options that reach the network while ``run`` is called with a graph."""
    found: dict[str, Any] = {}

    def look(executor, *args, **kwargs):
        (options,) = (value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "sigmas" in value)
        found.update(options)
        return executor(*args, **kwargs)

    model = graph[0].clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "look", look)
    run((model, *graph[1:]), torch.randn(1, 4, 8, 8), 0.5)
    return found


def test_patches_are_handed_what_samplers_hand(graphs):
    ours, theirs = (handed(graphs["SD1"], run) for run in (denoised_in_training, denoised_in_a_sampler))
    assert ours.keys() >= theirs.keys()
    assert [type(ours[key]) for key in theirs] == [type(value) for value in theirs.values()]
    assert ours["sample_sigmas"].diff().max() < 0 == ours["sample_sigmas"][-1]


def test_every_row_has_a_condition_of_its_own(graphs):
    """What packs count: as many entries as rows, also for those that wrap the whole network."""
    seen: list[int] = []

    def count(apply, given):
        options = given["c"]["transformer_options"]
        seen.extend(map(len, (given["input"], given["cond_or_uncond"], options["cond_or_uncond"], options["uuids"])))
        assert len(set(options["uuids"])) == len(given["input"])
        return apply(given["input"], given["timestep"], **given["c"])

    model = graphs["SD1"][0].clone()
    model.set_model_unet_function_wrapper(count)
    with ComfyModel(model, *graphs["SD1"][1:]).training() as trainable, torch.no_grad():
        trainable.denoise(torch.randn(3, 4, 8, 8), torch.ones(3), trainable.encode_prompts([PROMPT] * 3))
    assert seen == [3] * 4


def test_hooks_on_the_clip_are_refused(graphs):
    model, clip, vae = graphs["SD1"]
    hooks = comfy_extras.nodes_hooks.CreateHookLora().create_hook("SD1.safetensors", 1.0, 1.0)[0]
    for schedule in (False, True):
        (hooked,) = comfy_extras.nodes_hooks.SetClipHooks().apply_hooks(clip, schedule, False, hooks)
        with pytest.raises(UserError, match=r"Set CLIP Hooks.*Load LoRA"):
            ComfyModel(model, hooked, vae)
    (plain,) = comfy_extras.nodes_hooks.SetClipHooks().apply_hooks(clip, False, True)
    ComfyModel(model, plain, vae)


def test_a_lora_in_bypass_mode_works_in_every_pass(graphs):
    """On the text encoder as on the network, also after a preview, and as a merged one does."""
    model, clip, vae = graphs["SD1"]
    weights = {key: weight for key, weight in clip.cond_stage_model.state_dict().items() if ".layers." in key}
    lora = lora_of(model) | lora_on(weights, "text_encoders.")

    def losses(load) -> list[float]:
        with torch.inference_mode():
            changed, changed_clip = load(model, clip, dict(lora), 0.5, 0.5)
        ours = ComfyModel(changed, changed_clip, vae)
        batch = fixed_batches(prepared(NAMED["SD1"], ours, CONFIG), CONFIG)[0]
        with ours.training() as trainable, torch.no_grad():
            word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1)
            found = [batch_loss(trainable, [word], batch).item() for _ in range(3)]
            with trainable.paused() as paused:
                paused.generate(PROMPT, word, (4, 8, 8), 0, 1, 2.0)
            return [*found, batch_loss(trainable, [word], batch).item()]

    bypassed = losses(comfy.sd.load_bypass_lora_for_models)
    assert bypassed == pytest.approx(losses(comfy.sd.load_lora_for_models), rel=1e-4)
    assert bypassed != pytest.approx(losses(lambda model, clip, *_: (model, clip)), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_through_a_hypernetwork(graphs, tmp_path, checkpointing):
    """A network that a patch has brought along, made under inference mode as every node's."""
    generator = torch.Generator().manual_seed(0)

    def layers(width: int) -> dict[str, torch.Tensor]:
        weight = 0.2 * torch.randn(width, width, generator=generator)
        return {"linear.0.weight": weight, "linear.0.bias": torch.zeros(width)}

    torch.save({width: [layers(width), layers(width)] for width in (32, 64, 128)}, tmp_path / "small.pt")
    model = graphs["SD1"][0].clone()
    with torch.inference_mode():
        patch = comfy_extras.nodes_hypernetwork.load_hypernetwork_patch(str(tmp_path / "small.pt"), 1.0)
    assert patch is not None
    model.set_model_attn2_patch(patch)
    changed = (model, *graphs["SD1"][1:])
    found, word, batch = gradients(NAMED["SD1"], changed, checkpointing)
    assert agrees(changed, word, batch, found)
    plain = gradients(NAMED["SD1"], graphs["SD1"])[0]
    assert not any(torch.allclose(one, other, rtol=1e-2) for one, other in zip(found, plain, strict=True))
    assert all(weight.is_inference() for part in patch.hypernet.values() for weight in part.parameters())


def test_a_patch_that_follows_a_picture_of_its_own_is_refused():
    model, clip, vae = build(NAMED["Qwen-Image"])
    network = comfy_extras.nodes_model_patch.QwenImageBlockWiseControlNet(1, dim=8, operations=comfy.ops.manual_cast)
    cpu = torch.device("cpu")
    patch = comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    apply = comfy_extras.nodes_model_patch.QwenImageDiffsynthControlnet().diffsynth_controlnet
    with torch.inference_mode():
        (changed,) = apply(model, patch, vae, torch.rand(1, 64, 64, 3))
    with pytest.raises(UserError, match=r"patch from Load Model Patch.*connect the MODEL from before the node"):
        ComfyModel(changed, clip, vae)


def raising(error: Exception):
    """A patch of an attention, as packs have them."""

    def a_patch(q, k, v, extra_options):
        raise error

    return a_patch


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Expected all tensors to be on the same device"),
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        KeyError("uuids"),
        ValueError("no reference picture"),
        AssertionError(),
        AttributeError("'NoneType' object has no attribute 'shape'"),
        ZeroDivisionError("division by zero"),
    ],
    ids=repr,
)
def test_an_error_of_a_patch_keeps_its_text_and_names_the_patch(graphs, error):
    model = graphs["SD1"][0].clone()
    model.set_model_attn2_patch(raising(error))
    with ComfyModel(model, *graphs["SD1"][1:]).training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1)
        with pytest.raises(TrainingError) as caught:
            trainable.check_compatible(torch.zeros(4, 8, 8), "S*", word)
    assert f"a_patch of tests/test_core_nodes.py fails before the first step: {type(error).__name__}" in str(
        caught.value
    )
    assert str(error) in str(caught.value)
    assert "belong together" not in str(caught.value)


def layer_of_another_width(q, k, v, extra_options):
    return q, comfy.ops.manual_cast.Linear(7, 7)(k), v


def attention_of_another_shape(q, k, v, extra_options):
    optimized_attention(q, k[..., :-1], v, extra_options["n_heads"], transformer_options=extra_options)
    return q, k, v


with torch.inference_mode():
    MADE_BY_A_NODE = torch.ones(1)


def not_saved_for_backward(q, k, v, extra_options):
    return q, k * MADE_BY_A_NODE, v


@pytest.mark.parametrize("patch", [layer_of_another_width, attention_of_another_shape, not_saved_for_backward])
def test_a_patch_that_fails_in_comfyui_is_named(graphs, patch):
    model = graphs["SD1"][0].clone()
    model.set_model_attn2_patch(patch)
    with ComfyModel(model, *graphs["SD1"][1:]).training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1)
        with pytest.raises(TrainingError, match=f"{patch.__name__} of tests/test_core_nodes.py fails before the first"):
            trainable.check_compatible(torch.zeros(4, 8, 8), "S*", word)


OF_OTHER_SHAPES = ("SD1", "SDXL", "Flux.1 dev")


@pytest.mark.parametrize("clip", OF_OTHER_SHAPES)
@pytest.mark.parametrize("model", OF_OTHER_SHAPES)
def test_only_wrong_wiring_is_called_so(graphs, clip, model):
    with ComfyModel(graphs[model][0], graphs[clip][1], graphs[model][2]).training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1)
        latent = torch.zeros(graphs[model][0].model.latent_format.latent_channels, 8, 8)
        if clip == model:
            trainable.check_compatible(latent, "S*", word)
            return
        with pytest.raises(UserError, match="CLIP and MODEL do not belong together"):
            trainable.check_compatible(latent, "S*", word)


def test_an_error_of_the_model_itself_keeps_its_text(graphs):
    model, clip, vae = graphs["SD1"]
    with ComfyModel(model, clip, vae).training() as trainable:
        word = initial_embedding(trainable.vocabularies(), "S*", "toy", 1)
        block = model.model.diffusion_model.middle_block[0]
        hook = block.register_forward_pre_hook(lambda *_: torch.linalg.inv(torch.zeros(2, 2)))
        try:
            with pytest.raises(TrainingError, match=r"before the first step: .*singular"):
                trainable.check_compatible(torch.zeros(4, 8, 8), "S*", word)
        finally:
            hook.remove()
