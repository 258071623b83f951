"""The training loop on ComfyUI's own SD1 and SDXL classes at small width."""

import pickle

import comfy.model_management
import psutil
import pytest
import torch
from comfyui_pack import weights_hash

from textual_inversion import TrainConfig, TrainingError, TrainingStopped, UserError, initial_embedding, train
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.dataset import (
    Dataset,
    fixed_batches,
    make_dataset,
    training_batches,
)
from textual_inversion.image_tokens import IMAGE_TEMPLATES
from textual_inversion.objective import batch_loss, denoising_losses
from textual_inversion.optimizers import OPTIMIZERS
from textual_inversion.report import pictures_used
from textual_inversion.state import load_state, save_state
from textual_inversion.training import check_prompts


def learn(graph, images, config, captions=(), masks=(), on_step=lambda step: None, saved=None):
    model = ComfyModel(*graph, gradient_checkpointing=config.gradient_checkpointing)
    dataset = make_dataset(model.encode_images, images, masks, captions, config)
    with model.training():
        embedding = initial_embedding(
            model.vocabularies(), config.trigger, config.initializer, config.vectors
        ).trainable()
        steps = []
        for step in train(model, embedding, dataset, config, saved):
            steps.append(step)
            on_step(step)
    return steps, embedding.snapshot()


def test_learns(graph, pictures):
    config = TrainConfig(steps=20, evaluate_every=5, batch_size=2, patience=0, per_image_tokens=0)
    steps, _ = learn(graph, pictures(1), config)
    assert [step.number for step in steps] == list(range(21))
    assert steps[0].fixed_loss is not None
    assert steps[-1].best_loss < steps[0].fixed_loss
    assert steps[-1].best_step == 20, "a running mean gets better, so the last is kept"


def test_every_encoder_is_trained(graph, pictures):
    before = ComfyModel(*graph)
    with before.training():
        start = initial_embedding(before.vocabularies(), "S*", "toy", 2)
    config = TrainConfig(initializer="toy", vectors=2, steps=2, batch_size=1)
    _, learned = learn(graph, pictures(1), config)
    assert learned.vectors.keys() == start.vectors.keys()
    for key, vectors in learned.vectors.items():
        assert vectors.dtype == torch.float32
        assert (vectors != start.vectors[key]).any(dim=1).all(), f"a vector of {key} has not moved"


def test_same_graph_twice_is_bit_identical(graph, pictures):
    config = TrainConfig(steps=5, batch_size=2, flip_probability=0.5, accumulation=2)
    _, first = learn(graph, pictures(3), config)
    torch.rand(1000)  # whatever ran before
    _, second = learn(graph, pictures(3), config)
    _, other = learn(graph, pictures(3), TrainConfig(steps=5, batch_size=2, flip_probability=0.5, seed=1))
    for key in first.vectors:
        assert torch.equal(first.vectors[key], second.vectors[key])
        assert not torch.equal(first.vectors[key], other.vectors[key])


def test_weights_are_shared_and_put_back(graph):
    modules = (graph.model.model, graph.clip.cond_stage_model)
    before = {id(module): dict(module.named_parameters()) for module in modules}
    model = ComfyModel(*graph, gradient_checkpointing=True)
    with model.training():
        for module in modules:
            for name, parameter in module.named_parameters():
                assert not parameter.is_inference()
                assert parameter.data_ptr() == before[id(module)][name].data_ptr(), f"{name} was copied"
    assert any(p.is_inference() for p in graph.model.model.parameters()), "the test must load as ComfyUI does"
    for module in modules:
        assert all(p is before[id(module)][name] for name, p in module.named_parameters())
        for part in module.modules():
            assert not part._forward_pre_hooks
            assert "forward" not in vars(part)
    assert comfy.model_management.in_training is False
    assert not torch.is_inference_mode_enabled()


def test_weights_take_no_memory_twice(checkpoints, load):
    """Resident memory, beside the addresses above: a copy of these 14 MB would show."""
    graph = load(checkpoints["SmallSDXL"])
    tensors = [*graph.model.model.parameters(), *graph.clip.cond_stage_model.parameters()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert weights > 10 * 2**20
    with ComfyModel(*graph).training():
        pass  # whatever ComfyUI loads the first time
    process = psutil.Process()
    before = process.memory_info().rss
    with ComfyModel(*graph).training():
        grown = process.memory_info().rss - before
    assert grown < weights / 2


class Interrupt(BaseException):
    """ComfyUI's interrupt is no Exception either."""


@pytest.mark.parametrize("failure", [None, RuntimeError, Interrupt])
def test_graph_is_unchanged_after_success_error_and_interrupt(graph, pictures, failure):
    modules = (graph.model.model, graph.clip.cond_stage_model, graph.vae.first_stage_model)
    image = ComfyModel(*graph)
    with image.training():
        word = initial_embedding(image.vocabularies(), "S*", "toy", 1)
    shape = (4, 8, 8)
    picture, digest = image.generate("a photo of S*", word, shape, 1, 3, 4.0), weights_hash(*modules)

    def fail(step):
        if failure and step.number == 2:
            raise failure

    config = TrainConfig(steps=3, batch_size=1, gradient_checkpointing=True)
    if failure is None:
        learn(graph, pictures(1), config)
    else:
        with pytest.raises(failure):
            learn(graph, pictures(1), config, on_step=fail)
    assert weights_hash(*modules) == digest
    assert torch.equal(image.generate("a photo of S*", word, shape, 1, 3, 4.0), picture)


def test_loss_is_the_noise_error(graph, pictures):
    """Against the definition: the UNet's own output compared with the noise."""
    config = TrainConfig(batch_size=3, per_image_tokens=0)
    model = ComfyModel(*graph)
    dataset = make_dataset(model.encode_images, pictures(3), [], [], config)
    batch = fixed_batches(dataset, config)[0]
    network = graph.model.model
    with model.training(), torch.no_grad():
        embedding = initial_embedding(model.vocabularies(), "S*", "toy", 1)
        ours = batch_loss(model, [embedding], batch)
        timesteps = (batch.quantiles * 1000).long()
        alphas = 1 / (1 + network.model_sampling.sigmas[timesteps] ** 2)
        alphas = alphas.view(-1, 1, 1, 1)
        noised = alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * batch.noise  # DDPM's own form
        errors = []
        for row, conditioning in enumerate(model.encode_prompts(batch.prompts, embedding)):
            extra = network.extra_conds(**conditioning, device="cpu", width=64, height=64, noise=noised[:1])
            predicted = network.diffusion_model(
                noised[row : row + 1],
                timesteps[row : row + 1].float(),
                context=conditioning["cross_attn"],
                y=extra["y"].cond if "y" in extra else None,
            )
            errors.append((predicted - batch.noise[row]).square().mean())
    assert ours.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_distinct_prompts_cost_one_forward_pass(graph, pictures):
    calls = []
    handle = graph.model.model.diffusion_model.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
    config = TrainConfig(batch_size=4)
    model = ComfyModel(*graph)
    captions = ["one {}", "two {} " + "and more " * 60, "three {}", "four {}"]  # the second needs 154 tokens
    dataset = make_dataset(model.encode_images, pictures(4), [], captions, config)
    try:
        with model.training(), torch.no_grad():
            batch = next(training_batches(dataset, config, torch.Generator().manual_seed(0)))
            assert len(set(batch.prompts)) == 4
            batch_loss(model, [initial_embedding(model.vocabularies(), "S*", "toy", 1)], batch)
    finally:
        handle.remove()
    assert calls == [4]


def test_prompts_of_many_pictures_are_checked_in_a_moment(graph, monkeypatch):
    """It took ten seconds, in which nothing could be cancelled."""
    images, config, calls = [torch.rand(1, 64, 64, 3)] * 200, TrainConfig(per_image_tokens=2), []
    model = ComfyModel(*graph)
    dataset = make_dataset(lambda _: [torch.zeros(4, 8, 8)] * 200, images, [], ["one {}", "a {}"] + [""] * 198, config)
    plain = ComfyModel.check_prompts
    monkeypatch.setattr(ComfyModel, "check_prompts", lambda *given: calls.append(given[1:]) or plain(*given))
    with model.training() as trainable:
        check_prompts(trainable, initial_embedding(trainable.vocabularies(), "S*", "toy", 2), dataset, config)
        assert [len(embeddings) for _, *embeddings in calls] == [1, 1] + [2] * len(IMAGE_TEMPLATES["object"])
        with pytest.raises(UserError, match=r"on a \.\.\. background' has no room for"):
            check_prompts(trainable, initial_embedding(trainable.vocabularies(), "S*", "toy", 70), dataset, config)


def test_several_shapes_in_one_run(graph):
    shapes = [(64, 96), (64, 96), (96, 64), (70, 65)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, *shape, 3, generator=generator) for shape in shapes]
    config = TrainConfig(batch_size=2)
    model = ComfyModel(*graph)
    dataset = make_dataset(model.encode_images, images, [], [], config)
    assert [tuple(latent.shape[1:]) for latent in dataset.latents] == [(8, 12), (8, 12), (12, 8), (8, 8)]
    batches = training_batches(dataset, config, torch.Generator().manual_seed(0))
    seen = {tuple(next(batches).latents.shape) for _ in range(50)}
    assert seen == {(2, 4, 8, 12), (2, 4, 12, 8), (2, 4, 8, 8)}
    steps, _ = learn(graph, images, TrainConfig(steps=8, batch_size=2, patience=0))
    assert steps[-1].number == 8


def test_every_picture_has_its_turn():
    latents = [torch.full((1, 2, 2), float(index)) for index in range(5)]
    dataset = Dataset(latents, [], [], [("a",)] * 5, [""] * 5)
    batches = training_batches(dataset, TrainConfig(batch_size=2), torch.Generator().manual_seed(0))
    seen = [int(value) for _ in range(10) for value in next(batches).latents[:, 0, 0, 0]]
    assert all(sorted(seen[start : start + 5]) == list(range(5)) for start in range(0, 20, 5))


def test_masks_weigh_the_loss():
    latents, sigmas = torch.zeros(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    denoised = torch.ones(2, 4, 8, 8)
    denoised[..., 4:] = 3.0  # error 9 in the right half, 1 in the left
    ones, mask = torch.ones(2), torch.zeros(2, 1, 8, 8)
    mask[0, ..., :4] = 1
    mask[1, ..., 6:] = 0.5
    # Row 0: 1 / 1^2; row 1: 9 / 2^2. However small or grey a mask is, its picture counts the same.
    assert denoising_losses(denoised, latents, sigmas, ones, mask).mean().item() == pytest.approx((1 + 9 / 4) / 2)
    everywhere = torch.ones(2, 1, 8, 8)
    plain = denoising_losses(denoised, latents, sigmas, ones).mean()
    assert denoising_losses(denoised, latents, sigmas, ones, everywhere).mean().item() == pytest.approx(plain.item())


@pytest.mark.parametrize("alphas", [(1, 1), (0.5, 1), (0, 1), (None, 0.25), (1, None)])
def test_transparency_is_a_mask(graph, alphas):
    """The fourth channel of other nodes' pictures, as if its mask were connected; opaque ones need none."""
    images, masks = [], []
    for alpha in alphas:
        image = torch.rand(1, 64, 64, 3)
        mask = torch.ones(1, 64, 64)
        if alpha is not None:
            mask[:, 16:48, :32] = alpha
            image = torch.cat([image, mask[..., None]], dim=-1)
        images.append(image)
        masks.append(mask)
    model, config = ComfyModel(*graph), TrainConfig()
    found = make_dataset(model.encode_images, images, [], [], config).masks
    expected = make_dataset(model.encode_images, [image[..., :3] for image in images], masks, [], config).masks
    opaque = all(alpha in (1, None) for alpha in alphas)
    assert len(found) == (0 if opaque else 2)
    for ours, theirs in zip(found, expected, strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("side", "size", "native_size", "trained"),
    [
        ((3000, 4000), 0, 512, (440, 584)),  # a photo
        ((3000, 4000), 0, 1024, (880, 1176)),
        ((1024, 1024), 0, 512, (512, 512)),
        ((512, 512), 0, 512, (512, 512)),
        ((416, 632), 0, 512, (416, 632)),  # what Load Images makes of 512
        ((64, 200), 0, 1024, (64, 200)),
        ((1024, 1024), 768, 512, (768, 768)),
        ((64, 64), 512, 512, (512, 512)),
        ((20, 3000), 0, 512, (20 // 8 * 8, 3000)),  # long, but not large
    ],
)
def test_size_0_is_at_most_the_models_own(side, size, native_size, trained):
    seen = []

    def encode(images):
        seen.extend(image.shape for image in images)
        return [torch.zeros(4, image.shape[1] // 8, image.shape[2] // 8) for image in images]

    image, mask = torch.ones(1, *side, 3), torch.ones(1, *side)
    dataset = make_dataset(encode, [image], [mask], [], TrainConfig(size=size), native_size)
    assert seen == [(1, *trained, 3)]
    assert dataset.masks[0].shape == (1, trained[0] // 8, trained[1] // 8)
    told = f"all scaled down to the model's {native_size} x {native_size}"
    assert (told in pictures_used(dataset)) == (size == 0 and trained != tuple(n // 8 * 8 for n in side))


def test_masks_follow_their_pictures(graph):
    """A mask takes the same way as its picture: resized, cropped and mirrored with it."""
    image = torch.rand(1, 128, 200, 3)
    mask = torch.zeros(1, 128, 200)
    mask[:, :, :100] = 1  # the left half
    model = ComfyModel(*graph)
    config = TrainConfig(size=64, flip_probability=1.0)
    dataset = make_dataset(model.encode_images, [image], [mask], [], config)
    (height, width) = dataset.latents[0].shape[1:]
    assert dataset.masks
    assert dataset.masks[0].shape == (1, height, width)
    assert dataset.masks[0][..., : width // 2].mean() > 0.95
    assert dataset.masks[0][..., -(width // 2) :].mean() < 0.05
    flipped = fixed_batches(dataset, config)[0]
    assert flipped.masks is not None
    assert flipped.masks[0][..., : width // 2].mean() < 0.05


def test_loss_that_becomes_nan_keeps_the_good_vectors(graph, pictures):
    steps = []

    def spoil(q, k, v, _options):
        return q, k, v * float("nan") if len(steps) > 5 else v

    broken = graph.model.clone()
    broken.set_model_attn2_patch(spoil)
    config = TrainConfig(steps=100, batch_size=1, evaluate_every=1)
    with pytest.raises(TrainingStopped, match=r"became NaN at step \d+"):
        learn(graph._replace(model=broken), pictures(1), config, on_step=steps.append)
    assert steps[-1].number == 5
    assert all(torch.isfinite(vectors).all() for vectors in steps[-1].best.vectors.values())


def test_missing_gradient_names_the_attention(graph, pictures):
    def cut(q, k, v, _options):
        return q, k.detach(), v.detach()

    broken = graph.model.clone()
    broken.set_model_attn2_patch(cut)
    with pytest.raises(TrainingError, match=r"No gradient reached the vectors of clip_l.*attention"):
        learn(graph._replace(model=broken), pictures(1), TrainConfig(steps=2, batch_size=1))


def test_lora_on_the_graph_is_part_of_the_model(graph, pictures):
    """A patched MODEL gives another loss than the plain one, and the patch survives training."""
    key = next(key for key in graph.model.model.state_dict() if key.endswith("attn2.to_k.weight"))
    shape = graph.model.model.state_dict()[key].shape
    patched = graph.model.clone()
    patched.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(1)),)}, 1.0)
    config = TrainConfig(steps=2, batch_size=1)
    plain, _ = learn(graph, pictures(1), config)
    with_lora, _ = learn(graph._replace(model=patched), pictures(1), config)
    again, _ = learn(graph, pictures(1), config)
    assert with_lora[0].fixed_loss != plain[0].fixed_loss
    assert again[0].fixed_loss == plain[0].fixed_loss


@pytest.mark.parametrize("stopped", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_training_resumes_bit_for_bit(graph, pictures, tmp_path, optimizer, stopped):
    settings = {"evaluate_every": 2, "patience": 0, "accumulation": 2, "flip_probability": 0.5}
    config = TrainConfig(optimizer=optimizer, steps=8, **settings)

    def save(step):
        if step.number == stopped:
            save_state(tmp_path / "run.state", step.state.to_dict())

    steps, whole = learn(graph, pictures(3), config, on_step=save)
    later, resumed = learn(graph, pictures(3), config, saved=load_state(tmp_path / "run.state"))
    assert [step.number for step in later] == list(range(stopped, 9))
    assert [step.loss for step in later] == [step.loss for step in steps[stopped:]]
    assert (later[-1].best_step, later[-1].best_loss) == (steps[-1].best_step, steps[-1].best_loss)
    for key, vectors in whole.vectors.items():
        assert torch.equal(vectors, resumed.vectors[key])
        assert torch.equal(steps[-1].best.vectors[key], later[-1].best.vectors[key])


def test_state_of_another_model_is_left_alone(graph, pictures):
    config = TrainConfig(steps=2)
    steps, _ = learn(graph, pictures(1), config)
    saved = steps[-1].state.to_dict()
    saved["evaluations"][0]["learned"] = saved["evaluations"][0]["learned"] * 1.01
    again, _ = learn(graph, pictures(1), config, saved=saved)
    assert again[0].number == 0


def test_damaged_state_is_no_state(tmp_path):
    path = tmp_path / "run.state"
    save_state(path, {"training": {"number": 3, "words": [torch.zeros(2)]}})
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a state", pickle.dumps(print)):
        path.write_bytes(content)
        assert load_state(path) is None
