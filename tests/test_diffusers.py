"""DiffusersModel: against diffusers' own training script, against ComfyUI, against finite differences."""

import copy
import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyui_pack import weights_hash
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, EulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from small_models import randomise
from small_pipelines import WIDTH, WIDTH_G, WIDTH_T5, small_pipeline

from dev.in_process import ROOT
from textual_inversion import Embedding, TrainConfig, UserError, initial_embedding, train, training
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.adapters.diffusers_pipeline import DiffusersModel
from textual_inversion.dataset import Batch, Dataset
from textual_inversion.objective import batch_loss
from toy_model.export import text_tensors, unet_tensors
from toy_model.networks import pipeline_from_checkpoint

FAMILIES = ("SD1", "SDXL", "SD3", "Flux")
PROMPTS = ["a photo of S*", "A rendering of one (S*), in the STYLE of s*!"]
STEP = 3e-3  # of finite differences; larger: curvature; smaller: rounding


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def random_batches(count: int, channels: int = 4, side: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(count):
        latents, noise = torch.randn(2, 2, channels, side, side, generator=generator)
        timesteps = torch.randint(1000, (2,), generator=generator)
        batches.append(Batch(latents, None, PROMPTS, noise, (timesteps + 0.5) / 1000))
    return batches


def dataset_of(batch: Batch) -> Dataset:
    return Dataset([batch.latents[0]], [], [], [tuple(batch.prompts)], [""])


def channels_of(pipeline) -> int:
    return pipeline.vae.config.latent_channels


def word_for(model: DiffusersModel, count: int = 2, trigger: str = "S*") -> Embedding:
    generator = torch.Generator().manual_seed(5)
    return Embedding(
        trigger, {key: 0.3 * torch.randn(count, width, generator=generator) for key, width in model.keys.items()}
    )


# Against diffusers' examples/textual_inversion ---------------------------------------------------


class Script:
    """Drives diffusers' and transformers' classes the way textual_inversion.py and _sdxl.py do."""

    def __init__(self, pipeline, vectors: int):
        self.pipeline = pipeline
        names = ["<new>", *(f"<new>_{number}" for number in range(1, vectors))]
        self.text = " ".join(names)
        slots = [end for end in ("", "_2") if hasattr(pipeline, f"text_encoder{end}")]
        self.encoders = [getattr(pipeline, f"text_encoder{end}") for end in slots]
        self.tokenizers = [copy.deepcopy(getattr(pipeline, f"tokenizer{end}")) for end in slots]
        self.tables, self.originals, self.rows = [], [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            assert tokenizer.add_tokens(names) == vectors
            (initial,) = tokenizer.encode("toy", add_special_tokens=False)
            rows = tokenizer.convert_tokens_to_ids(names)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            table.data[rows] = table.data[initial].clone()
            table.requires_grad_(True)
            self.tables.append(table)
            self.originals.append(table.detach().clone())
            self.rows.append(rows)

    def loss(self, batch: Batch) -> torch.Tensor:
        scheduler, unet = self.pipeline.scheduler, self.pipeline.unet
        timesteps = (batch.quantiles * 1000).long()
        latents, noise = batch.latents.to(unet.dtype), batch.noise.to(unet.dtype)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        texts = [prompt.replace("S*", self.text).replace("s*", self.text) for prompt in batch.prompts]
        ids = [
            tokenizer(
                texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        if len(self.encoders) == 1:
            predicted = unet(noisy, timesteps, self.encoders[0](ids[0])[0]).sample
        else:
            outputs = [
                encoder(rows, output_hidden_states=True) for encoder, rows in zip(self.encoders, ids, strict=True)
            ]
            context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            size = (64, 64)  # of the picture: original size, corner of the crop, target size
            time_ids = torch.tensor([[*size, 0, 0, *size]] * len(texts))
            added = {"text_embeds": outputs[1][0], "time_ids": time_ids}
            predicted = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(predicted.float(), target.float())

    def train(self, batches: list[Batch], learning_rate: float) -> None:
        optimizer = torch.optim.AdamW(self.tables, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        for batch in batches:
            self.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            for table, original, rows in zip(self.tables, self.originals, self.rows, strict=True):
                original[rows] = table.detach()[rows]
                table.data.copy_(original)  # every other row

    def vectors(self) -> list[torch.Tensor]:
        return [table.detach()[rows] for table, rows in zip(self.tables, self.rows, strict=True)]


@pytest.mark.parametrize(
    ("family", "prediction", "vectors"),
    [("SD1", "epsilon", 1), ("SD1", "v_prediction", 3), ("SDXL", "epsilon", 3), ("SDXL", "v_prediction", 1)],
)
def test_parity_with_diffusers_script(family, prediction, vectors, monkeypatch):
    """In float64: in float32 the script's own gradient is 2e-5 off, by rounding."""
    pipeline = small_pipeline(family, prediction).to(torch.float64)
    model = DiffusersModel(pipeline)
    config = TrainConfig(
        optimizer="adamw",
        learning_rate=5e-3,
        schedule="constant",
        averaging=0,
        momentum=0.9,
        vectors=vectors,
        steps=20,
        batch_size=2,
        evaluate_every=1000,
    )
    batches = random_batches(20)
    start = initial_embedding(model.vocabularies(), "S*", "toy", vectors)

    word = start.trainable()
    gradients = torch.autograd.grad(batch_loss(model, [word], batches[0]), list(word.parameters()))
    monkeypatch.setattr(training, "training_batches", lambda *_args: iter(batches))
    *_, last = train(model, word, dataset_of(batches[0]), config)
    assert last.number == 20

    script = Script(pipeline, vectors)
    expected = torch.autograd.grad(script.loss(batches[0]), script.tables)
    script.train(batches, config.learning_rate)
    for gradient, theirs, rows in zip(gradients, expected, script.rows, strict=True):
        assert relative(gradient, theirs[rows]) < 1e-5
    for key, ours, theirs in zip(start.vectors, word.parameters(), script.vectors(), strict=True):
        assert relative(ours.detach(), theirs) < 1e-5
        assert relative(ours.detach() - start.vectors[key], theirs - start.vectors[key]) < 1e-4
        assert relative(theirs, start.vectors[key]) > 1e-2, "nothing was learned, so nothing was compared"


# What inference does -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_word_is_one_token_and_the_end_stays_the_end(family):
    """With the vectors of "dog" the word means what "dog" means, where CLIP pools at the largest id too."""
    pipeline = small_pipeline(family, eos_token_id=2)
    model = DiffusersModel(pipeline)
    word = initial_embedding(model.vocabularies(), "S*", "dog", 1)
    prompts = ["a photo of S* on grass", "S*", "a photo of S* on grass", "S* s*"]
    ours = model.encode_prompts(prompts, word)
    theirs = model.encode_prompts([prompt.replace("S*", "dog").replace("s*", "dog") for prompt in prompts], word)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert len(tensor) == len(prompts)
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)
        assert relative(tensor[0], tensor[1]) > 1e-2, "the rows must differ for the test to tell them apart"


@pytest.mark.parametrize(
    ("family", "prediction"), [("SD1", "epsilon"), ("SDXL", "v_prediction"), ("SD3", ""), ("Flux", "")]
)
def test_denoise_is_one_step_of_the_pipeline(family, prediction):
    """One Euler step of the pipeline's own loop from the highest noise level down to 0."""
    pipeline = small_pipeline(family, prediction)
    if prediction:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    model = DiffusersModel(pipeline)
    noise = torch.randn(1, channels_of(pipeline), 8, 12, generator=torch.Generator().manual_seed(2))
    highest = model.sample_sigmas(torch.tensor([0.9999]))
    with torch.no_grad():
        noised = model.add_noise(torch.zeros_like(noise), noise, highest)
        ours = model.denoise(noised, highest, model.encode_prompts(["a photo of a dog"], word_for(model)))
    given = pipeline._pack_latents(noise, *noise.shape) if family == "Flux" else noise
    guidance = 3.5 if family == "Flux" else 1.0
    theirs = pipeline(
        "a photo of a dog",
        height=64,
        width=96,
        num_inference_steps=1,
        guidance_scale=guidance,
        latents=given,
        output_type="latent",
    ).images
    if family == "Flux":
        theirs = pipeline._unpack_latents(theirs, 64, 96, 8)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_matches_finite_differences(family):
    pipeline = small_pipeline(family).to(torch.float64)
    batch = random_batches(1, channels_of(pipeline))[0]
    batch = dataclasses.replace(batch, latents=batch.latents.double())
    model = DiffusersModel(pipeline, gradient_checkpointing=True)
    assert model._network.is_gradient_checkpointing
    word = word_for(model).trainable()
    parameters = list(word.parameters())
    gradients = torch.autograd.grad(batch_loss(model, [word], batch), parameters)
    for vectors, gradient in zip(parameters, gradients, strict=True):
        # Along the gradient the difference is largest, and so least hidden by rounding.
        direction = gradient / gradient.norm()
        with torch.no_grad():
            start = vectors.clone()
            vectors.copy_(start + STEP * direction)
            above = batch_loss(model, [word], batch).item()
            vectors.copy_(start - STEP * direction)
            below = batch_loss(model, [word], batch).item()
            vectors.copy_(start)
        assert (above - below) / (2 * STEP) == pytest.approx(gradient.norm().item(), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_points_the_same_way(family):
    gradients = []
    for dtype in (torch.float32, torch.float16):
        pipeline = small_pipeline(family).to(dtype)
        model = DiffusersModel(pipeline)
        word = word_for(model).trainable()
        loss = batch_loss(model, [word], random_batches(1, channels_of(pipeline))[0])
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(word.parameters()))]))
    assert gradients[1].dtype == torch.float32
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


# Nothing of the pipeline changes -----------------------------------------------------------------


def state_of(pipeline) -> list:
    """Weights, tokenizers, scheduler and components. transformers leaves hooks of its own, we none."""
    parts = pipeline.components
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    for inner in (inner for part in modules for inner in part.modules()):
        for hook in [*inner._forward_pre_hooks.values(), *inner._forward_hooks.values()]:
            assert "textual_inversion" not in getattr(hook, "__module__", "")
    tokenizers = [json.loads(part.backend_tokenizer.to_str()) for name, part in parts.items() if "tokenizer" in name]
    for tokenizer in tokenizers:  # what the last call asked for, an inference's too
        del tokenizer["truncation"], tokenizer["padding"]
    scheduler = {name: str(value) for name, value in vars(pipeline.scheduler).items()}
    return [weights_hash(*modules), tokenizers, scheduler, {name: id(part) for name, part in parts.items()}]


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_is_unchanged_by_training_drawing_and_errors(family, monkeypatch):
    pipeline = small_pipeline(family)
    model = DiffusersModel(pipeline)
    before = state_of(pipeline)
    config = TrainConfig(steps=3, batch_size=2, vectors=2, initializer="dog", evaluate_every=100)
    start = initial_embedding(model.vocabularies(), "S*", "dog", 2)
    model.check_prompts(PROMPTS, start)
    shape = (channels_of(pipeline), 8, 8)
    plain = model.generate("a photo of S*", None, shape, 1, 2, 2.0)
    *_, last = train(model, start.trainable(), dataset_of(random_batches(1, shape[0], 7)[0]), config)  # odd sides
    assert last.number == 3
    word = word_for(model)
    picture = model.generate("a photo of S*", word, shape, 1, 2, 2.0)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert torch.equal(picture, model.generate("a photo of S*", word, shape, 1, 2, 2.0))
    assert not torch.equal(picture, plain)
    assert state_of(pipeline) == before

    def fail(*_args, **_kwargs):
        raise RuntimeError("the test's encoder fails here")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.text_encoder, "forward", fail)
        with pytest.raises(RuntimeError, match="the test's encoder"):
            model.encode_prompts(PROMPTS, word)
        with pytest.raises(RuntimeError, match="the test's encoder"):
            model.generate("a photo of S*", word, shape, 1, 2, 2.0)
    assert state_of(pipeline) == before


# Against ComfyUI ---------------------------------------------------------------------------------


@pytest.fixture(params=["SD1", "SDXL", "toy", "wild"])
def both(request, checkpoints, load) -> tuple[DiffusersModel, ComfyModel]:
    """The same weights through diffusers and through ComfyUI: random ones, and the demo models."""
    if request.param in ("toy", "wild"):
        import demo.comfyui_pack  # noqa: F401  lets ComfyUI recognise the checkpoint

        path = ROOT / f"demo/models/{request.param}.safetensors"
        pipeline = pipeline_from_checkpoint(path)
    else:
        path = checkpoints[f"Small{request.param}"]
        pipeline = small_pipeline(request.param, checkpoint=path)
    return DiffusersModel(pipeline), ComfyModel(*load(path))


def test_agrees_with_comfyui(both):
    """Prompts without brackets, which weigh words in ComfyUI, and without "!", which pads for SDXL in diffusers."""
    ours, theirs = both
    assert ours.keys == theirs.keys
    batch = dataclasses.replace(random_batches(1)[0], prompts=["a photo of S*", "One S*, in the STYLE of s*."])
    prompts = ["S*", "A photo of S*, THE one S*? s*", "a\nS*\nb", 'S*\'s hat, a s*-like S*. "S*"']
    word = word_for(ours, 3).trainable()
    loss = batch_loss(ours, [word], batch)
    gradients = torch.autograd.grad(loss, list(word.parameters()))
    with theirs.training(), torch.no_grad():
        encoded = ours.encode_prompts(prompts, word)
        for row, condition in enumerate(theirs.encode_prompts(prompts, word)):
            assert relative(encoded["context"][row], condition["cross_attn"][0]) < 1e-4
            if "pooled" in encoded:
                assert relative(encoded["pooled"][row], condition["pooled_output"][0]) < 1e-4
        start, other = (initial_embedding(model.vocabularies(), "S*", "red toy", 3) for model in both)
        for key, vectors in start.vectors.items():
            assert relative(vectors, other.vectors[key]) < 1e-3  # ComfyUI keeps text encoders in fp16
    with theirs.training():
        expected = batch_loss(theirs, [word], batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        for gradient, other in zip(gradients, torch.autograd.grad(expected, list(word.parameters())), strict=True):
            assert relative(gradient, other) < 1e-4


@pytest.mark.parametrize("name", ["toy", "wild"])
def test_demo_pictures_become_the_same_latents(name, load, pictures):
    import demo.comfyui_pack  # noqa: F401  lets ComfyUI recognise the checkpoint

    path = ROOT / f"demo/models/{name}.safetensors"
    (ours,) = DiffusersModel(pipeline_from_checkpoint(path)).encode_images(pictures(1))
    (theirs,) = ComfyModel(*load(path)).encode_images(pictures(1))
    assert relative(ours, theirs) < 1e-4


# Bad input ---------------------------------------------------------------------------------------


def test_errors_are_those_of_comfyui(checkpoints, load):
    ours, theirs = DiffusersModel(small_pipeline("SDXL")), ComfyModel(*load(checkpoints["SmallSDXL"]))
    fits, tears, lost = "S* " + "red " * 70, "red " * 73 + "S*", "red " * 80 + "S*"
    narrow = Embedding("S*", {"clip_l": torch.zeros(1, WIDTH + 1)})  # fits neither encoder

    def message(call) -> str:
        with pytest.raises(UserError) as caught:
            call()
        return str(caught.value)

    with theirs.training():
        for call in (
            lambda model: initial_embedding(model.vocabularies(), "dog", "", 1),
            lambda model: initial_embedding(model.vocabularies(), "S*", " ", 1),
            lambda model: model.encode_prompts(PROMPTS, narrow),
        ):
            assert message(lambda call=call: call(ours)) == message(lambda call=call: call(theirs))
        word = word_for(ours, 4)
        ours.check_prompts([fits], word)
        for prompt in (tears, lost, "no word"):
            assert "has no room" in message(lambda prompt=prompt: ours.check_prompts([prompt], word))
        assert message(lambda: ours.check_prompts(["no"], word)) == message(lambda: theirs.check_prompts(["no"], word))


def test_names_of_the_encoders():
    assert DiffusersModel(small_pipeline("SD3")).keys == {"clip_l": WIDTH, "clip_g": WIDTH_G, "t5xxl": WIDTH_T5}
    without_t5 = small_pipeline("SD3")
    without_t5.text_encoder_3 = without_t5.tokenizer_3 = None
    assert DiffusersModel(without_t5).keys == {"clip_l": WIDTH, "clip_g": WIDTH_G}
    assert DiffusersModel(small_pipeline("Flux")).keys == {"clip_l": WIDTH, "t5xxl": WIDTH_T5}


def test_scheduler_that_predicts_something_else():
    pipeline = small_pipeline("SD1")
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample")
    with pytest.raises(UserError, match="prediction type sample"):
        DiffusersModel(pipeline)


# Pictures and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pictures_become_latents_of_the_model(dtype, pictures):
    pipeline = small_pipeline("SD3")
    pipeline.vae.to(dtype)
    weights = weights_hash(pipeline.vae)
    (image,) = pictures(1)
    (latent,) = DiffusersModel(pipeline).encode_images([image])
    assert weights_hash(pipeline.vae) == weights
    mean = copy.deepcopy(pipeline.vae).float().encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mean[0]
    assert latent.dtype == torch.float32
    torch.testing.assert_close(latent, (mean - 0.0609) * 1.5305)

    pipeline.vae = vae = AutoencoderTiny(latent_channels=16, scaling_factor=0.5)
    (latent,) = DiffusersModel(pipeline).encode_images([image])
    torch.testing.assert_close(latent, vae.encode(image.movedim(-1, 1) * 2 - 1)[0][0] * 0.5)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_loads_folders_and_single_files_without_network(tmp_path, offline):
    from comfy.ldm.models.autoencoder import AutoencoderKL as OriginalAutoencoder

    layout = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3}
    layout |= {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    original = OriginalAutoencoder(ddconfig=layout, embed_dim=4)
    randomise(original)
    vae = {f"first_stage_model.{name}": value for name, value in original.state_dict().items()}
    pipeline = small_pipeline("SD1", "v_prediction")
    blocks: dict[str, Any] = {"block_out_channels": (32, 32)}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    pipeline.vae = AutoencoderKL(**blocks)
    pipeline.vae.load_state_dict(convert_ldm_vae_checkpoint(vae, dict(pipeline.vae.config)))
    folder, configs, file = tmp_path / "pipeline", tmp_path / "configs", tmp_path / "model.safetensors"
    pipeline.save_pretrained(folder)
    pipeline.save_pretrained(configs)
    for weights in configs.rglob("*.safetensors"):
        weights.unlink()
    weights = unet_tensors(pipeline.unet) | text_tensors(pipeline.text_encoder) | vae
    save_file({name: value.contiguous() for name, value in weights.items()}, file)

    batch, image = random_batches(1)[0], torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    expected = DiffusersModel(pipeline)
    word = word_for(expected)
    for loaded in (DiffusersModel.load(folder), DiffusersModel.load(file, configs)):
        assert loaded.keys == {"clip_l": WIDTH}
        assert batch_loss(loaded, [word], batch).item() == pytest.approx(
            batch_loss(expected, [word], batch).item(), rel=1e-6
        )
        torch.testing.assert_close(loaded.encode_images([image]), expected.encode_images([image]))
    half = DiffusersModel.load(folder, dtype=torch.float16)
    assert {part.dtype for part in (half._pipeline.unet, half._pipeline.vae, half._pipeline.text_encoder)} == {
        torch.float16
    }

    with pytest.raises(UserError, match="give a diffusers folder of the same family"):
        DiffusersModel.load(file)
    with pytest.raises(UserError, match=r"There is no model at .*: give a diffusers folder, or a \.safetensors"):
        DiffusersModel.load(tmp_path / "missing", configs)
    with pytest.raises(UserError, match="cannot be loaded"):
        DiffusersModel.load(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        DiffusersModel.load(configs)
    with pytest.raises(UserError, match="is not a folder"):
        DiffusersModel.load(file, tmp_path / "missing")
    index = json.loads((configs / "model_index.json").read_text())
    (configs / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    with pytest.raises(UserError, match="KolorsPipeline is not supported: use StableDiffusionPipeline"):
        DiffusersModel.load(file, configs)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="The files of tokenizer are missing"):
        DiffusersModel.load(folder)


def test_encoders_with_different_numbers_of_vectors():
    """ComfyUI keeps rows for each text encoder. Where a model takes only one of the two, nothing is wrong."""
    word = Embedding("S*", {"clip_l": torch.ones(1, WIDTH), "clip_g": torch.ones(2, WIDTH_G)})
    model = DiffusersModel(small_pipeline("SDXL"))
    for use in (
        lambda: model.check_prompts(["a S*"], word),
        lambda: model.encode_prompts(["a S*"], word),
        lambda: model.generate("a S*", word, (4, 8, 8), 0, 1, 1.0),
    ):
        with pytest.raises(UserError, match=r"not as many vectors .*\(1 for clip_l, 2 for clip_g\), .* ComfyUI"):
            use()
    sd1 = DiffusersModel(small_pipeline("SD1"))
    sd1.check_prompts(["a S*"], word)
    alone = Embedding("S*", {"clip_l": word.vectors["clip_l"]})
    ours, theirs = (sd1.encode_prompts(["a S*"], one)["context"] for one in (word, alone))
    assert torch.equal(ours, theirs)


def test_an_index_that_is_a_list(tmp_path):
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model_index\.json in .* names no parts of a pipeline: download it again"):
        DiffusersModel.load(tmp_path)


def test_a_picture_that_is_too_small_for_the_model():
    with pytest.raises(UserError, match="draws no picture that small: choose at least 16 pixels a side"):
        DiffusersModel(small_pipeline("SD3")).generate("a", None, (16, 1, 8), 0, 1, 1.0)
