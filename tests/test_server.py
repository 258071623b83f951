"""A real ComfyUI over HTTP and websocket: learn, save, use; interrupt; fail; and nothing else changes."""

import io
import json
import math
import re
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import websocket
from families import NAMED, build
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from ti_pack.nodes.concept_run import preview_interval  # pyright: ignore[reportMissingImports]
from ti_pack.nodes.live import EVENT, Record  # pyright: ignore[reportMissingImports]  made by conftest.py
from ti_pack.nodes.train import _check_no_list_as_text  # pyright: ignore[reportMissingImports]

from dev.comfyui_server import ComfyError, ComfyServer
from dev.in_process import ROOT
from textual_inversion.picture_files import NOTHING_OPAQUE

NODE_IDS = {
    "TI_LoadImages",
    "TI_Train",
    "TI_TrainingSettings",
    "TI_SaveEmbedding",
    "TI_LoadEmbedding",
    "TI_ApplyEmbedding",
    "TI_InspectEmbedding",
    "TI_BlendEmbeddings",
}


def learning_graph(model="SmallSD1", **settings):
    """Checkpoint -> Train -> Save, Apply -> picture; node ids are names."""
    widgets = {
        "trigger": "S*",
        "initializer": "toy",
        "kind": "object",
        "template": "",
        "vectors": 1,
        "steps": 6,
        "editability": 0.1,
        "batch_size": 2,
        "size": 0,
        "seed": 0,
        "gradient_checkpointing": False,
        "preview_prompt": "a photo of {}",
        "preview_every": 3,
        **settings,
    }
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=f"{model}.safetensors"),
        "images": node("TI_LoadImages", folder="pictures", path="", crop="square", size=64),
        "settings": node(
            "TI_TrainingSettings",
            learning_rate=0.3,
            optimizer="sphere",
            momentum=0.8,
            context_vectors=1,
            averaging=0.9,
            patience=0,
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=0,
            accumulation=1,
            flip_probability=0.0,
            evaluate_every=2,
            preview_steps=2,
            preview_cfg=4.0,
        ),
        "train": node(
            "TI_Train",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            images=["images", 0],
            masks=["images", 1],
            captions=["images", 2],
            settings=["settings", 0],
            **widgets,
        ),
        "save": node("TI_SaveEmbedding", embedding=["train", 0], name="learned", overwrite=False),
        "plot": node("LossGraphNode", loss=["train", 1], filename_prefix="loss"),
        "previews": node("PreviewImage", images=["train", 2]),
        "report": node("PreviewAny", source=["train", 3]),
        "apply": node("TI_ApplyEmbedding", clip=["load", 1], embedding=["train", 0], trigger="", strength=1.0),
        **sampling_graph("load", "apply", "a photo of S* in the snow"),
    }


def sampling_graph(loader, clip, prompt):
    """An ordinary picture with a fixed seed, and a hash of the weights after it."""
    return {
        "positive": node("CLIPTextEncode", clip=[clip, 0 if clip == "apply" else 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=[loader, 1], text=""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": node(
            "KSampler",
            model=[loader, 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=7,
            steps=4,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=[loader, 2]),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix="picture"),
        "hash": node("TIT_HashWeights", model=[loader, 0], clip=[loader, 1], vae=[loader, 2]),
    }


def ordinary_graph(model, prompt="a photo"):
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=f"{model}.safetensors"),
        **sampling_graph("load", "load", prompt),
    }


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def test_comfyui_in_this_process_stays_on_the_cpu():
    """The other tests' ComfyUI: on the CPU, with ComfyUI's own ``nodes`` and in temporary folders."""
    import comfy.model_management
    import folder_paths

    import nodes

    assert comfy.model_management.get_torch_device().type == "cpu"
    assert "KSampler" in nodes.NODE_CLASS_MAPPINGS  # type: ignore[attr-defined]
    assert "comfyui-tests-" in folder_paths.get_folder_paths("embeddings")[0]


def picture_of(server, run):
    (entry,) = run.history["outputs"]["picture"]["images"]
    return Image.open(server.base / "output" / entry["subfolder"] / entry["filename"]).convert("RGB").tobytes()


def embeddings(server):
    return {file.name for file in (server.base / "models/embeddings").iterdir()}


def test_pack_loads_without_a_warning(server):
    """All of ComfyUI's lines that name the pack, its nodes or a deprecation because of it."""
    assert set(server.object_info()) >= NODE_IDS
    loading = server.log.split("Starting server")[0]
    suspicious = [line for line in loading.splitlines() if re.search(r"(?i)textual|TI_", line)]
    assert not [line for line in suspicious if re.search(r"(?i)warn|error|fail|deprecat|traceback", line)], loading


def test_every_input_and_output_has_a_tooltip(server):
    for node_id in NODE_IDS:
        info = server.object_info(node_id)[node_id]
        assert info["category"] == "textual inversion"
        assert info["description"]
        assert info["search_aliases"]
        for group in ("required", "optional"):
            for name, (_, options, *_) in info["input"].get(group, {}).items():
                assert options.get("tooltip"), f"{node_id}.{name} has no tooltip"
        assert len(info["output_tooltips"]) == len(info["output"])
        assert all(info["output_tooltips"])


@pytest.mark.parametrize("model", ["SmallSD1", "SmallSDXL"])
def test_learning_workflow(server, model):
    reference = server.run(ordinary_graph(model))
    run = server.run(learning_graph(model))
    outputs = run.history["outputs"]
    prompt, told = outputs["save"]["text"]
    assert told.startswith(f"Saved {prompt.removeprefix('embedding:')}.safetensors in the embeddings folder.")
    name = prompt.removeprefix("embedding:")

    # The file has every key of the family, and says where it comes from.
    path = server.base / "models/embeddings" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        widths = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118 (no dict)
        metadata = file.metadata()
    assert widths == {"clip_l": (1, 32)} | ({"clip_g": (1, 48)} if model == "SmallSDXL" else {})
    assert metadata["trigger"] == "S*"
    assert metadata["base_model"] == f"{model}.safetensors"
    assert json.loads(metadata["settings"])["steps"] == 6
    assert {"steps", "seed", "version"} <= metadata.keys()

    # Previews at steps 0, 3 and of the result, once; progress with pictures on the way; a loss graph.
    assert len(outputs["previews"]["images"]) == 3
    (record,) = outputs["train"]["textual_inversion"]
    assert [picture["step"] for picture in record["pictures"]] == [0, 3, 6]
    assert "Ended at the upper bound" in record["message"]
    assert outputs["plot"]["images"]
    assert "S*: 1 vector" in outputs["report"]["text"][0]
    steps = [event["data"] for event in run.events if event["type"] == "progress" and event["data"]["max"] == 6]
    assert steps[-1]["value"] == 6

    # The stock CLIPTextEncode knows the file at once and draws the very picture that Apply drew.
    stock = server.run(ordinary_graph(model, f"a photo of {prompt} in the snow"))
    assert picture_of(server, stock) == picture_of(server, run)
    assert f"{prompt} does not exist" not in server.log

    # The file can be loaded and applied under another word.
    graph = ordinary_graph(model, "a photo of Zorp in the snow")
    graph["file"] = node("TI_LoadEmbedding", file=path.name)
    graph["apply"] = node("TI_ApplyEmbedding", clip=["load", 1], embedding=["file", 0], trigger="Zorp", strength=1.0)
    graph["positive"]["inputs"]["clip"] = ["apply", 0]
    assert picture_of(server, server.run(graph)) == picture_of(server, run)

    # The graph's own model is what it was.
    again = server.run(ordinary_graph(model))
    assert again.history["outputs"].get("hash") == reference.history["outputs"]["hash"] == outputs["hash"]
    server.free()
    assert picture_of(server, server.run(ordinary_graph(model))) == picture_of(server, reference)


def test_separate_loaders(server):
    """Flux at small width in fp8, network, text encoders and VAE each from a loader of its own."""
    family = NAMED["Flux.1 dev"]
    network, _, vae = build(family)
    parts = {"diffusion_models/flux": network.model.diffusion_model.state_dict(), "vae/flux": vae.get_sd()}
    for name, state in parts.items():
        (server.base / "models" / name).parent.mkdir(exist_ok=True)
        save_file({key: value.clone() for key, value in state.items()}, server.base / f"models/{name}.safetensors")
    graph = learning_graph(steps=4)
    graph["load"] = node("UNETLoader", unet_name="flux.safetensors", weight_dtype="fp8_e4m3fn")
    graph["clip"] = node("TIT_FluxClip")
    graph["vae"] = node("VAELoader", vae_name="flux.safetensors")
    graph["latent"]["class_type"] = "EmptySD3LatentImage"
    own = {"clip": ["clip", 0], "vae": ["vae", 0]}
    for part in graph.values():
        part["inputs"] |= {name: link for name, link in own.items() if part["inputs"].get(name, ["", 0])[0] == "load"}
    outputs = (run := server.run(graph)).history["outputs"]
    prompt, *_ = outputs["save"]["text"]
    with safe_open(server.base / f"models/embeddings/{prompt.removeprefix('embedding:')}.safetensors", "pt") as file:
        assert {key: tuple(file.get_tensor(key).shape) for key in file.keys()} == {"clip_l": (1, 32), "t5xxl": (1, 64)}  # noqa: SIM118
        assert file.metadata()["base_model"] == "flux.safetensors"
    for name in ("images", "settings", "train", "save", "plot", "previews", "report", "apply"):
        del graph[name]
    graph["positive"]["inputs"] |= {"clip": ["clip", 0], "text": f"a photo of {prompt} in the snow"}
    stock = server.run(graph)
    assert picture_of(server, stock) == picture_of(server, run)
    assert stock.history["outputs"]["hash"] == outputs["hash"]


def test_a_connected_path_is_read_again_only_where_pictures_change(server):
    folder = server.base / "input/connected"
    folder.mkdir()

    def loaded(colour: str = "") -> bool:
        if colour:
            Image.new("RGB", (64, 64), colour).save(folder / "a.png")
        graph = {
            "path": node("PrimitiveString", value=str(folder)),
            "images": node("TI_LoadImages", folder="", path=["path", 0], crop="square", size=64),
            "shown": node("PreviewImage", images=["images", 0]),
        }
        (cached,) = (
            event["data"]["nodes"] for event in server.run(graph).events if event["type"] == "execution_cached"
        )
        return "images" not in cached

    assert loaded("red")
    assert not loaded()
    assert loaded("blue")
    assert not loaded()


def test_of_several_pictures_the_last_is_the_thumbnail(server):
    """One embedding is saved once, however many pictures are connected."""
    graph = learning_graph(seed=31, preview_every=0)
    saved = {"name": "once", "overwrite": True, "picture": ["images", 0]}
    graph["save"] = node("TI_SaveEmbedding", embedding=["train", 0], **saved)
    assert server.run(graph).history["outputs"]["save"]["text"][-1] == "Its thumbnail is once.preview.png."
    assert len(list((server.base / "models/embeddings").glob("once*"))) == 2


def test_a_scaled_thumbnail_has_the_colours_of_its_picture(server):
    """Scaling gives numbers beyond white and black, which must not come out as their opposites."""
    Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((32, 32))).astype(np.uint8)).save(
        server.base / "input/checked.png"
    )
    save_file({"clip_l": torch.ones(1, 768)}, server.base / "models/embeddings/plain.safetensors")
    scaled = {"upscale_method": "bicubic", "width": 256, "height": 256, "crop": "disabled"}
    saved = {"name": "scaled", "overwrite": True, "picture": ["scaled", 0]}
    graph = {
        "picture": node("LoadImage", image="checked.png"),
        "scaled": node("ImageScale", image=["picture", 0], **scaled),
        "embedding": node("TI_LoadEmbedding", file="plain.safetensors", partner="none", word=""),
        "save": node("TI_SaveEmbedding", embedding=["embedding", 0], **saved),
    }
    server.run(graph)
    with Image.open(server.base / "models/embeddings/scaled.preview.png") as picture:
        line = np.asarray(picture)[8, :, 0]
    assert (line > 127).tolist() == [False] * 128 + [True] * 128


@pytest.mark.parametrize("name", ["thumbnail", "thumbnail_v1.5"])
def test_a_picture_becomes_the_thumbnail(server, name):
    """ComfyUI's own model library shows it, Load Embedding does not take it for an embedding."""
    graph = learning_graph(seed=31)
    graph["save"] = node("TI_SaveEmbedding", embedding=["train", 0], name=name, overwrite=True, picture=["train", 2])
    told = server.run(graph).history["outputs"]["save"]["text"]
    assert told[-1] == f"Its thumbnail is {name}.preview.png."
    shown = server.http.get(f"{server.url}/experiment/models/preview/embeddings/0/{name}.safetensors", timeout=60)
    with Image.open(io.BytesIO(shown.content)) as picture:
        assert picture.size == (64, 64)
    files = server.object_info("TI_LoadEmbedding")["TI_LoadEmbedding"]["input"]["required"]["file"][1]["options"]
    assert [file for file in files if file.startswith(f"{name}.")] == [f"{name}.safetensors"]


def test_formats_of_other_tools(server):
    """A card with a preview on it, and the pair for diffusers: both are loaded again and draw the same picture."""
    graph = learning_graph("SmallSDXL", seed=31)
    card = {"name": "card", "overwrite": True, "format": "png-card", "picture": ["train", 2]}
    graph["save"] = node("TI_SaveEmbedding", embedding=["train", 0], **card)
    pair = {"name": "pair", "overwrite": True, "format": "diffusers"}
    graph["pair"] = node("TI_SaveEmbedding", embedding=["train", 0], **pair)
    run = server.run(graph)
    assert run.history["outputs"]["save"]["text"] == ["card.png"]
    pair_told = run.history["outputs"]["pair"]["text"]
    assert pair_told == ["pair.safetensors and pair_2.safetensors", "In diffusers, write <s*> in prompts."]
    for file in ({"file": "card.png"}, {"file": "pair_2.safetensors", "partner": "pair.safetensors"}):
        graph = ordinary_graph("SmallSDXL", "a photo of S* in the snow")
        graph["file"] = node("TI_LoadEmbedding", **file)
        graph["apply"] = node("TI_ApplyEmbedding", clip=["load", 1], embedding=["file", 0], trigger="S*", strength=1.0)
        graph["positive"]["inputs"]["clip"] = ["apply", 0]
        assert picture_of(server, server.run(graph)) == picture_of(server, run)


def test_all_words_of_a_file(server):
    """One Apply puts them into one CLIP, as a chain of two would; Save writes each by its own name."""
    folder = server.base / "models/embeddings"
    words = {f"bundle_emb.<s{n}>.clip_l": torch.full((n, 32), 0.1 * n) for n in (1, 2)}
    save_file(words, folder / "lora.safetensors")

    def applied(name: str, word: str, clip: list) -> dict:
        file, apply = f"file {name}", f"apply {name}"
        connected = {"clip": clip, "embedding": [file, 0], "trigger": "", "strength": 1.0}
        return {
            file: node("TI_LoadEmbedding", file="lora.safetensors", partner="none", word=word),
            apply: node("TI_ApplyEmbedding", **connected),
        }

    runs = []
    for parts in (
        applied("all", "", ["load", 1]),
        applied("one", "<s1>", ["load", 1]) | applied("two", "<s2>", ["apply one", 0]),
    ):
        graph = ordinary_graph("SmallSD1", "<s1> beside <s2>") | parts
        graph["positive"]["inputs"]["clip"] = [list(parts)[-1], 0]
        graph["save"] = node("TI_SaveEmbedding", embedding=[next(iter(parts)), 0], name="", overwrite=True)
        runs.append(server.run(graph))
    one, two = (picture_of(server, run) for run in runs)
    assert one == two != picture_of(server, server.run(ordinary_graph("SmallSD1", "<s1> beside <s2>")))
    assert runs[0].history["outputs"]["save"]["text"][::2] == ["embedding:s1", "embedding:s2"]
    for n in (1, 2):
        assert (folder / f"s{n}.safetensors").exists()
    graph = ordinary_graph("SmallSD1") | applied("all", "", ["load", 1])
    graph["apply all"]["inputs"]["trigger"] = "Zorp"
    graph["positive"]["inputs"]["clip"] = ["apply all", 0]
    with pytest.raises(RuntimeError, match="'trigger' renames one embedding, but <s1>, <s2> are connected"):
        server.run(graph)


def test_result_of_a_finished_run_is_on_disk(server):
    before = set((server.base / "temp").rglob("textual_inversion/*.safetensors"))
    server.run(learning_graph(seed=11))
    after = set((server.base / "temp").rglob("textual_inversion/*.safetensors"))
    assert len(after - before) == 1


def test_same_graph_twice_gives_the_same_bytes(server):
    digests = []
    for _ in range(2):
        server.free()
        run = server.run(learning_graph(seed=21))
        name = run.history["outputs"]["save"]["text"][0].removeprefix("embedding:")
        with safe_open(server.base / "models/embeddings" / f"{name}.safetensors", "pt") as file:
            digests.append(file.get_tensor("clip_l").numpy().tobytes())
        server.run(ordinary_graph("SmallSDXL"))  # something else in between
    assert digests[0] == digests[1]


def test_the_report_tells_what_was_left_out_also_of_cached_pictures(server):
    folder = server.base / "input/pictures"
    (folder / "broken.png").write_bytes(b"no picture")
    Image.new("RGBA", (64, 64), "#ff000000").save(folder / "clear.png")
    try:
        for seed in (32, 33):
            run = server.run(learning_graph(seed=seed, preview_every=0))
            first, *left_out = report_of(run).splitlines()[:3]
            assert "learned from 2 pictures (none with captions, all with masks)" in first
            assert left_out[0].startswith("Left out broken.png: it is damaged, or no picture of a kind that is read")
            assert left_out[1] == f"Left out clear.png: {NOTHING_OPAQUE}."
        assert "images" not in executed(run)
    finally:
        (folder / "broken.png").unlink()
        (folder / "clear.png").unlink()
    assert "Left out" not in report_of(server.run(learning_graph(seed=32, preview_every=0)))


def test_new_pictures_run_the_node_again(server):
    server.run(learning_graph(seed=31))
    cached = server.run(learning_graph(seed=31))
    assert "train" not in executed(cached)
    caption = server.base / "input/pictures/0.txt"
    caption.write_text("a photo of {} on the floor")
    try:
        assert "train" in executed(server.run(learning_graph(seed=31)))
    finally:
        caption.unlink()


def executed(run):
    return {event["data"]["node"] for event in run.events if event["type"] == "executing"}


def at_once(graph):
    """The embedding moves from the first step on, since there are no per-image tokens to wait for."""
    graph["settings"]["inputs"]["context_vectors"] = 0
    return graph


@pytest.mark.parametrize("checkpointing", [False, True])
def test_interrupt_in_the_middle(server, checkpointing):
    reference = server.run(ordinary_graph("SmallSD1"))
    before = embeddings(server)

    def stop(event):
        data = event["data"]
        if event["type"] == "progress" and data["max"] == 5000 and data["value"] >= 8:
            server.interrupt()

    graph = at_once(learning_graph(steps=5000, seed=41, preview_every=0, gradient_checkpointing=checkpointing))
    run = server.run(graph, on_event=stop, check=False)
    assert run.error is not None
    assert "execution_interrupted" in [event["type"] for event in run.events]
    (partial,) = embeddings(server) - before
    assert partial.startswith("S-partial")
    with safe_open(server.base / "models/embeddings" / partial, "pt") as file:
        assert file.get_tensor("clip_l").shape == (1, 32)
    healthy(server, reference)


def test_stop_before_the_first_step_takes_one(server):
    """*Stop and keep* while the initializer is searched for: the rest of the graph runs, Plot Loss Graph included."""

    def stop(event):
        if event["type"] == "textual_inversion.run" and event["data"]["state"] == "encoding":
            server.http.post(f"{server.url}/textual_inversion/runs/{event['data']['run']}/stop", timeout=60)

    outputs = server.run(learning_graph(initializer="", seed=41), on_event=stop).history["outputs"]
    (report,) = outputs["train"]["text"]
    assert "1 steps of 2 pictures. Stopped by hand. " in report
    assert "It ended before the word began to learn" in report
    assert outputs["save"]["text"]
    assert outputs["plot"]["images"]


@pytest.mark.parametrize(
    ("state", "settings", "told"),
    [
        ("searching", {"initializer": ""}, "Looking for a word to start from: "),
        ("learning", {"steps": 200}, "Looking for words for what else the pictures show: "),
    ],
)
def test_searches_for_words_are_shown_and_cancelled_at_once(server, state, settings, told):
    """Of the embedding's initializer, and of where per-image tokens start."""
    shown = []

    def cancel(event):
        data = event["data"]
        if event["type"] == EVENT and data["state"] == state and "%" in data["message"]:
            shown.append((data["message"], data["step"]))
            server.interrupt()

    before = embeddings(server)
    run = server.run(learning_graph(seed=42, **settings), on_event=cancel, check=False)
    assert "execution_interrupted" in [event["type"] for event in run.events]
    assert shown[0][0].startswith(told)
    last = [event["data"] for event in run.events if event["type"] == EVENT][-1]
    assert (last["state"], last["step"]) == ("cancelled", 0)
    assert embeddings(server) == before


def test_error_in_the_middle(server):
    reference = server.run(ordinary_graph("SmallSD1"))
    before = embeddings(server)
    graph = at_once(learning_graph(steps=200, seed=51, preview_every=0))
    graph["fail"] = node("TIT_FailingModel", model=["load", 0], calls=120, error="the test's model fails here")
    graph["train"]["inputs"]["model"] = ["fail", 0]
    run = server.run(graph, check=False)
    assert "the test's model fails here" in run.error["exception_message"]
    assert any(name.startswith("S-partial") for name in embeddings(server) - before)
    healthy(server, reference)


MPS = "MPS backend out of memory (MPS allocated: 17.80 GB, other allocations: 288.00 MB)"
FIRST_PASS = 4  # calls of the attention in the pass that checks the wiring; then the search begins


@pytest.mark.parametrize(
    ("calls", "error", "told", "state"),
    [
        (0, MPS, "Out of memory before the first step", "encoding"),
        (FIRST_PASS, MPS, "Out of memory before the first step", "searching"),
        (FIRST_PASS + 12, "can't allocate memory", "Out of memory before the first step", "searching"),
        (0, "a patch fails", "ti_test_pack fails before the first step: RuntimeError: a patch fails", "encoding"),
        (FIRST_PASS, "a patch fails", "a patch fails", "searching"),
    ],
)
def test_an_error_in_the_search_for_a_word_names_its_cause(server, calls, error, told, state):
    """In its first pass and in later ones; the weights stay bit for bit, and there is nothing yet to keep."""
    reference, before = server.run(ordinary_graph("SmallSD1")), embeddings(server)
    graph = learning_graph(initializer="", seed=43)
    graph["fail"] = node("TIT_FailingModel", model=["load", 0], calls=calls, error=error)
    graph["train"]["inputs"]["model"] = ["fail", 0]
    run = server.run(graph, check=False)
    assert told in run.error["exception_message"]
    records = [event["data"] for event in run.events if event["type"] == EVENT]
    assert told in records[-1]["message"]
    assert (records[-2]["state"], records[-1]["state"]) == (state, "failed")
    assert embeddings(server) == before
    healthy(server, reference)


@pytest.mark.parametrize("error", [MPS, "the test's VAE fails here"])
def test_a_vae_that_cannot_encode_is_the_cause_that_is_told(server, error):
    reference = server.run(ordinary_graph("SmallSD1"))
    graph = learning_graph(initializer="", seed=44)
    graph["broken"] = node("TIT_FailingVae", vae=["load", 2], error=error, where="encode")
    graph["train"]["inputs"]["vae"] = ["broken", 0]
    run = server.run(graph, check=False)
    assert error in run.error["exception_message"]
    assert run.error["node_id"] == "train"
    healthy(server, reference)


def healthy(server, reference):
    """The next ordinary generation gives the same picture from the same weights."""
    run = server.run({**ordinary_graph("SmallSD1"), "fresh": node("TIT_HashWeights", **links("load"))})
    assert run.history["outputs"]["fresh"] == reference.history["outputs"]["hash"]
    server.free()
    assert picture_of(server, server.run(ordinary_graph("SmallSD1"))) == picture_of(server, reference)


def links(loader):
    return {"model": [loader, 0], "clip": [loader, 1], "vae": [loader, 2]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": "cat"}, "already knows the word 'cat'"),
        ({"trigger": "a/b"}, "contains '/'"),
        ({"kind": "custom", "template": "nothing"}, "does not contain {} or 'S*'"),
        ({"vectors": 75}, "use fewer vectors or a shorter prompt"),
        ({"vectors": 75, "initializer": ""}, "use fewer vectors or a shorter prompt"),
    ],
)
def test_bad_input_reaches_the_user_as_a_sentence(server, settings, message):
    run = server.run(learning_graph(**settings), check=False)
    assert message in run.error["exception_message"]
    assert run.error["node_type"] == "TI_Train"
    states = [event["data"]["state"] for event in run.events if event["type"] == "textual_inversion.run"]
    assert not {"searching", "learning"} & set(states), "it is told before anything takes time"


@pytest.mark.parametrize("file", ["pictures/0.png", "pictures/0.png [input]"])
def test_an_empty_mask_of_load_image_is_named_by_its_file(server, file):
    """An opaque picture has an empty mask there: ComfyUI makes white what is transparent."""
    graph = learning_graph(seed=34)
    graph["images"] = node("LoadImage", image=file)
    del graph["train"]["inputs"]["captions"]
    run = server.run(graph, check=False)
    assert f"Nothing is white in the mask of '{file}'" in run.error["exception_message"]
    assert "invert it" in run.error["exception_message"]
    graph["invert"] = node("InvertMask", mask=["images", 1])
    graph["train"]["inputs"]["masks"] = ["invert", 0]
    assert "1 picture (none with captions, all with masks)" in report_of(server.run(graph))


@pytest.mark.parametrize("name", ["seed", "steps", "model", "vae", "settings"])
def test_a_list_where_one_value_is_needed(server, name):
    graph = learning_graph()
    graph["list"] = node("TIT_Twice", value=graph["train"]["inputs"][name])
    graph["train"]["inputs"][name] = ["list", 0]
    run = server.run(graph, check=False)
    assert f"2 values are connected to '{name}', but a run takes one" in run.error["exception_message"]


@pytest.mark.parametrize(
    ("captions", "told"),
    [
        (["on grass", "on sand"], "2 pictures (all with captions"),
        (["on grass"], "2 pictures (all with captions"),
        (["", "on grass"], "2 pictures (1 with captions"),
        (["on grass", 2, "on sand"], "Caption 2 is 2, which is no text"),
        ([None], "Caption 1 is None, which is no text"),
        ([["a", "b"]], "Caption 1 is ['a', 'b'], which is no text"),
        (["a", "b", "c"], "3 captions for 2 pictures"),
    ],
)
def test_captions_of_other_nodes(server, captions, told):
    graph = learning_graph(steps=2, preview_every=0, seed=91)
    graph["list"] = node("TIT_List", values={"__value__": captions})
    graph["train"]["inputs"]["captions"] = ["list", 0]
    run = server.run(graph, check=False)
    assert told in (run.error["exception_message"] if run.error else report_of(run))


@pytest.mark.parametrize("captions", [["on grass", "on sand"], ['it\'s "grass"'], [1, 2], [None, None], []], ids=str)
def test_a_list_of_captions_through_the_api_is_no_caption(server, captions):
    """ComfyUI makes a text of it before the node sees it."""
    graph = learning_graph(steps=2, preview_every=0, seed=91)
    graph["train"]["inputs"]["captions"] = {"__value__": captions}
    run = server.run(graph, check=False)
    assert "The captions are a list that has become one text" in run.error["exception_message"]


def test_a_long_caption_is_checked_at_once():
    """One of blanks behind a bracket took hours, in which the server answered nobody."""
    began = time.perf_counter()
    _check_no_list_as_text(["[" + " " * 2000 + "x", "[" + " " * 60_000 + "]x"])
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "info", [{"workflow": None}, {"workflow": {"id": None}}, {"workflow": []}, {"workflow": {"id": 7}}, {}], ids=str
)
def test_whatever_callers_of_the_api_send_as_the_workflow(server, info):
    graph = learning_graph(steps=2, preview_every=0, seed=92, preview_prompt=str(info))
    graph = {name: graph[name] for name in ("load", "images", "settings", "train")}
    data = {"prompt": graph, "client_id": "x", "extra_data": {"extra_pnginfo": info}}
    number = server.http.post(f"{server.url}/prompt", json=data, timeout=60).json()["prompt_id"]
    while not (history := server.http.get(f"{server.url}/history/{number}", timeout=60).json()):
        time.sleep(0.1)
    assert history[number]["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("prompt", "vectors", "told"),
    [
        ("a cat", 1, "Previews do not show the word: write {} or 'S*' into the preview prompt."),
        ("a " + "very " * 70 + "{}", 20, "Previews will not show the word as it is: The prompt"),
    ],
)
def test_a_preview_prompt_that_does_not_show_the_word_is_told_before_training(server, prompt, vectors, told):
    run = server.run(learning_graph(seed=93, preview_prompt=prompt, vectors=vectors))
    messages = [event["data"] for event in run.events if event["type"] == "textual_inversion.run"]
    assert any(told in data["message"] for data in messages if data["state"] == "learning" and data["step"] == 0)
    assert told in report_of(run)


@pytest.mark.parametrize("name", ["../up", "nul", "a//b", "x" * 300])
def test_a_name_that_no_file_can_have_is_told_before_training(server, name):
    save_file({"clip_l": torch.ones(1, 32)}, server.base / "models/embeddings/there.safetensors")
    try:
        graph = {"load": node("TI_LoadEmbedding", file="there.safetensors")}
        graph["save"] = node("TI_SaveEmbedding", embedding=["load", 0], name=name, overwrite=False)
        with pytest.raises(ComfyError, match="cannot be the name of a file"):  # when it is queued
            server.submit(graph)
    finally:
        (server.base / "models/embeddings/there.safetensors").unlink()


def test_a_word_in_the_negative_prompt_is_shown_without_and_with_it(server):
    graph = learning_graph(seed=94, preview_prompt="a cat")
    graph["settings"]["inputs"]["preview_negative"] = "blurry, {}"
    run = server.run(graph)
    assert "Previews do not show" not in report_of(run)
    shown = [server.http.get(f"{server.url}/view", params=file, timeout=60).content for file in
             run.history["outputs"]["previews"]["images"]]  # fmt: skip
    pairs = [np.split(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")), 2, axis=1) for picture in shown]
    assert len(pairs) == 3
    for without, with_word in pairs:
        assert without.shape == (64, 64, 3)
        assert np.array_equal(without, pairs[0][0])
        assert not np.array_equal(without, with_word)


def test_batch_of_images_and_one_caption(server):
    """Core's nodes give batches; a caption may come as one text for all."""
    graph = learning_graph(seed=61)
    graph["batch"] = node("ImageBatch", image1=["one", 0], image2=["two", 0])
    graph["one"] = node("LoadImage", image="pictures/0.png")
    graph["two"] = node("LoadImage", image="pictures/1.png")
    graph["text"] = node("PrimitiveString", value="on the floor")
    inputs = graph["train"]["inputs"]
    inputs["images"], inputs["captions"] = ["batch", 0], ["text", 0]
    del inputs["masks"]
    report = server.run(graph).history["outputs"]["report"]["text"][0]
    assert "learned from 2 pictures" in report


@pytest.mark.parametrize("folder", ["my päck-with spaces", "x.y"])
def test_folder_may_have_any_name(folder):
    """With its nodes and with what the browser loads."""
    with ComfyServer(pack_name=folder) as renamed:
        assert set(renamed.object_info()) >= NODE_IDS
        assert "IMPORT FAILED" not in renamed.log
        scripts = renamed.http.get(f"{renamed.url}/extensions", timeout=60).json()
        for name in ("train_panel.js", "load_images.js"):
            (script,) = [script for script in scripts if script.endswith(f"/{name}")]
            assert renamed.http.get(renamed.url + script, timeout=60).text == (ROOT / "web" / name).read_text()


def test_only_the_browser_that_queued_a_run_hears_of_it(server):
    """As of ComfyUI's own progress; previews are nobody else's business on a shared server."""
    other = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=somebody-else", timeout=60)
    run = server.run(learning_graph(seed=95))
    assert any(event["type"] == EVENT for event in run.events)
    other.settimeout(1)
    heard = []
    with suppress(websocket.WebSocketTimeoutException):
        while True:
            message = other.recv()
            heard.append(json.loads(message)["type"] if isinstance(message, str) else "picture")
    other.close()
    assert heard
    assert EVENT not in heard
    (told,) = [event["data"]["run"] for event in run.events if event["type"] == EVENT and event["data"]["step"] == 6][
        -1:
    ]
    assert told in {record["run"] for record in server.training_runs()}
    for stranger in ("", "?client_id=", "?client_id=somebody-else", "?client_id[]=", f"?client={server.client_id}"):
        answer = server.http.get(f"{server.url}/textual_inversion/runs{stranger}", timeout=60)
        assert answer.json() == []


def test_a_run_that_no_browser_queued_is_told_to_none(server):
    other = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=somebody-else", timeout=60)
    prompt = {name: learning_graph(seed=96)[name] for name in ("load", "images", "settings", "train")}
    server.http.post(f"{server.url}/prompt", json={"prompt": prompt}, timeout=60).raise_for_status()
    queued, heard = 1, []
    while queued:
        message = other.recv()
        event = json.loads(message) if isinstance(message, str) else {}
        heard.append(event.get("type"))
        if heard[-1] == "status":
            queued = event["data"]["status"]["exec_info"]["queue_remaining"]
    other.close()
    assert EVENT not in heard
    assert server.http.get(f"{server.url}/textual_inversion/runs?client_id=", timeout=60).json() == []


def test_the_latest_hundred_runs_are_remembered(server):
    """Each of another workflow; they fail at once, before any picture is encoded."""
    graph = learning_graph(kind="custom", template="no word", seed=97)
    for number in range(101):
        assert server.run(graph, check=False, workflow_id=f"workflow-{number}").error is not None
    known = [record["workflow"] for record in server.training_runs()]
    assert known == [f"workflow-{number}" for number in range(1, 101)]


def test_a_preview_that_is_chosen_while_a_run_ends_is_kept_or_refused(server):
    """After *Stop and keep* the last evaluation takes a while: what is chosen meanwhile must not be forgotten."""
    graph = at_once(learning_graph(steps=5000, seed=98, size=192, preview_every=0))
    graph["settings"]["inputs"]["evaluate_every"] = 5000
    asked = {}

    def click(event):
        record = event["data"]
        if event["type"] != EVENT or record["state"] != "learning" or not record["rate"] or "keep" in asked:
            return
        address = f"{server.url}/textual_inversion/runs/{record['run']}"
        if "preview" not in asked:
            asked["preview"] = server.http.post(f"{address}/preview", timeout=60)
        elif record["pictures"]:
            asked["stop"] = server.http.post(f"{address}/stop", timeout=60)
            time.sleep(1.5 * 2 / record["rate"])  # a step takes 2 / rate seconds, the evaluation many times as much
            asked["keep"] = server.http.post(f"{address}/keep/{record['pictures'][0]['step']}", timeout=60)

    run = server.run(graph, on_event=click)
    accepted = asked["keep"].ok and asked["keep"].json()["saved"] == ""
    assert accepted == ("Stopped by hand to keep what the preview of step" in report_of(run))


def test_a_record_is_json_that_browsers_read():
    record = Record("workflow", "3", losses=[(0, math.nan), (1, 0.5)], seconds_left=math.inf, rate=-math.inf)
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert json.loads(text)["losses"] == [[0, None], [1, 0.5]]


# Side jobs: what fails beside training does not end it -----------------------------------------------


@contextmanager
def in_place_of(folder: Path):
    """A file where ComfyUI wants to have a folder: nothing in it can be read or written."""
    aside = folder.with_name(f"{folder.name}-aside")
    if folder.exists():
        folder.rename(aside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)


@contextmanager
def small_disk(folder: Path):
    """A disk of 64 KiB as ``folder``, and what fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk here")

    def fill() -> None:
        with suppress(OSError), (folder / "rest").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 512)

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def report_of(run) -> str:
    return run.history["outputs"]["train"]["text"][0]


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize(
    ("error", "told"),
    [("the test's VAE fails here", "No preview: the test's VAE fails here"),
     ("MPS backend out of memory", "No preview: out of memory.")],
)  # fmt: skip
def test_a_preview_that_fails_costs_no_result(server, every, error, told):
    graph = learning_graph(seed=61, preview_every=every)
    graph["broken"] = node("TIT_FailingVae", vae=["load", 2], error=error, where="decode")
    graph["train"]["inputs"]["vae"] = ["broken", 0]
    run = server.run(graph)
    assert told in report_of(run)
    assert run.history["outputs"]["save"]["text"]
    assert any(told in event["data"]["message"] for event in run.events if event["type"] == "textual_inversion.run")


@pytest.mark.parametrize(
    ("every", "steps", "least", "most"), [(50, 2500, 50, 50), (50, 3000, 55, 55), (1, 10**5, 200, 600)]
)
def test_many_previews_get_fewer(every, steps, least, most):
    """They are in memory until the run ends: as many as are asked for first, and a few hundred in the longest run."""
    drawn = 0
    for step in range(steps):
        drawn += step % preview_interval(every, drawn) == 0
    assert least <= drawn <= most


@pytest.mark.parametrize("folder", ["user/__textual_inversion", "temp/textual_inversion", "both"])
def test_folders_that_cannot_be_written_to_cost_no_result(server, folder):
    folders = ["user/__textual_inversion", "temp/textual_inversion"] if folder == "both" else [folder]
    before = embeddings(server)
    with ExitStack() as stack:
        for name in folders:
            stack.enter_context(in_place_of(server.base / name))
        run = server.run(learning_graph(steps=12, seed=62 + len(folder)))
    text = report_of(run)
    assert run.history["outputs"]["save"]["text"]
    if "user/__textual_inversion" in folders:
        assert "This run cannot be resumed, since its state cannot be saved" in text
    if "temp/textual_inversion" in folders:
        assert "temp/textual_inversion cannot be written to" in text
        (path,) = re.findall(r"The embedding is in (.*)\.$", text, re.MULTILINE)
        assert safe_open(path, "pt").get_tensor("clip_l").shape == (1, 32)
        assert len(embeddings(server) - before) == 2  # the one saved, and the one put there


@pytest.mark.parametrize("state_too", [False, True])
def test_a_cancel_keeps_the_vectors_where_there_is_room(server, state_too):
    """The state is written after them: where it cannot be, they are there already."""
    found = server.base / "output/textual_inversion"
    before = set(found.glob("*")) if found.exists() else set()

    def stop(event):
        data = event["data"]
        if event["type"] == "progress" and data["max"] == 5000 and data["value"] >= 8:
            server.interrupt()

    with ExitStack() as stack:
        stack.enter_context(in_place_of(server.base / "models/embeddings"))
        if state_too:
            stack.enter_context(in_place_of(server.base / "user/__textual_inversion"))
        graph = at_once(learning_graph(steps=5000, seed=71 + state_too, preview_every=0))
        run = server.run(graph, on_event=stop, check=False)
    assert "execution_interrupted" in [event["type"] for event in run.events]
    (partial,) = set(found.glob("*")) - before
    assert partial.name.startswith("S-partial")
    assert safe_open(partial, "pt").get_tensor("clip_l").shape == (1, 32)
    (message,) = [record["message"] for record in server.training_runs() if record["state"] == "cancelled"][-1:]
    assert partial.name in message
    assert ("Queue the workflow again to go on." in message) != state_too, "it says what is so"


def test_a_cancel_before_anything_was_learned_leaves_no_copy_of_the_initializer(server):
    before = embeddings(server)

    def stop(event):
        if event["type"] == "textual_inversion.run" and event["data"]["state"] == "learning":
            server.interrupt()

    run = server.run(learning_graph(steps=5000, seed=81, preview_every=0), on_event=stop, check=False)
    assert run.error is not None
    assert embeddings(server) == before


@pytest.mark.parametrize("at_step", [0, 15])
@pytest.mark.parametrize("disk", ["user/__textual_inversion", "temp/textual_inversion", "models/embeddings"])
def test_a_full_disk_costs_no_result(server, disk, at_step):
    """From the start, or filled while training runs. In the end the embedding is in a file, and the note names both."""
    before = set(server.base.rglob("S*.safetensors"))
    with small_disk(server.base / disk) as fill:

        def watch(event):
            if event["type"] == "textual_inversion.run" and event["data"]["step"] >= at_step:
                fill()

        if not at_step:
            fill()
        graph = learning_graph(steps=30, seed=100 + at_step + len(disk), preview_every=0)
        graph = {name: graph[name] for name in ("load", "images", "settings", "train", "report")}
        run = server.run(graph, on_event=watch)
        (path,) = set(server.base.rglob("S*.safetensors")) - before
        assert safe_open(path, "pt").get_tensor("clip_l").shape == (1, 32)
    told = [line for line in report_of(run).splitlines() if "No space left on device" in line]
    assert bool(told) == (disk != "models/embeddings"), "which is not needed while temp has room"


@pytest.mark.parametrize("disk", ["models/embeddings", "user/__textual_inversion"])
def test_a_cancel_on_a_full_disk_keeps_the_vectors(server, disk):
    before = set(server.base.rglob("S-partial*.safetensors"))

    def stop(event):
        data = event["data"]
        if event["type"] == "progress" and data["max"] == 5000 and data["value"] >= 8:
            server.interrupt()

    with small_disk(server.base / disk) as fill:
        fill()
        graph = at_once(learning_graph(steps=5000, seed=130 + len(disk), preview_every=0))
        run = server.run(graph, on_event=stop, check=False)
        (path,) = set(server.base.rglob("S-partial*.safetensors")) - before
        assert safe_open(path, "pt").get_tensor("clip_l").shape == (1, 32)
    assert "execution_interrupted" in [event["type"] for event in run.events]


# Several concepts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(server):
    """Folders of pictures inside the input folder; one has nothing."""
    for folder, colours in {"cat": ["red", "blue"], "my dog": ["lime"]}.items():
        place = server.base / "input/library" / folder
        place.mkdir(parents=True, exist_ok=True)
        for colour in colours:
            Image.new("RGB", (64, 64), colour).save(place / f"{colour}.png")
    (server.base / "input/library/empty").mkdir()
    (server.base / "input/library/my dog/lime.txt").write_text("a {} next to <fox>")
    return "library"


def library_graph(library, **settings):
    graph = learning_graph(**settings)
    graph["images"]["inputs"] |= {"folder": library, "size": 0, "crop": "keep shape"}
    graph["train"]["inputs"] |= {"trigger": ["images", 3], "captions": ["images", 2]}
    graph["save"]["inputs"]["name"] = ""
    for name in set(graph) - {"load", "images", "settings", "train", "save"}:
        del graph[name]
    return graph


def records_of(run) -> dict[str, dict]:
    """The last record of each concept."""
    events = [event["data"] for event in run.events if event["type"] == EVENT]
    return {record["concept"]: record for record in events}


def test_a_folder_of_folders_gives_a_word_each(server, library):
    """What cannot be learned is named, and the others are learned, saved and told."""
    run = server.run(library_graph(library, seed=51))
    outputs = run.history["outputs"]
    assert [line for line in outputs["save"]["text"] if line.startswith("embedding:")] == [
        "embedding:cat",
        "embedding:my_dog",
    ]
    assert {"cat.safetensors", "my_dog.safetensors"} <= {
        file.name for file in (server.base / "models/embeddings").iterdir()
    }
    (summary,) = outputs["train"]["text"]
    assert re.fullmatch(r"<cat>: .*, 6 steps, \d+ s\.\n<my_dog>: .*, 6 steps, \d+ s\.", summary)
    assert [file["name"] for file in outputs["images"]["left_out"]] == ["empty/"]
    last = records_of(run)
    assert {concept: record["state"] for concept, record in last.items()} == {
        "<cat>": "done",
        "<my_dog>": "done",
    }
    assert "<fox> in the captions is no concept of this run" in last["<my_dog>"]["message"]
    assert len({record["group"] for record in last.values()}) == 1


def test_several_embeddings_never_replace_one_another(server, library):
    graph = library_graph(library, seed=51)
    graph["save"]["inputs"] |= {"name": "both", "overwrite": True}
    run = server.run(graph, check=False)
    assert "2 embeddings would replace one another as 'both': leave 'name' empty" in run.error["exception_message"]
    graph["save"]["inputs"]["overwrite"] = False
    told = server.run(graph).history["outputs"]["save"]["text"]
    assert [line for line in told if line.startswith("embedding:")] == ["embedding:both", "embedding:both-2"]


def test_a_cancelled_library_goes_on(server, library):
    """Of those that are done nothing is learned again, and all come out as without a break."""

    def cancel(event):
        data = event["data"]
        if event["type"] == EVENT and data["concept"] == "<my_dog>" and data["step"] == 12:
            server.interrupt()

    graph = library_graph(library, seed=52, steps=20)
    run = server.run(graph, on_event=cancel, check=False)
    assert records_of(run)["<cat>"]["state"] == "done"
    assert records_of(run)["<my_dog>"]["state"] == "cancelled"
    again = server.run(graph)
    last = records_of(again)
    assert "Resumed the unfinished run at step 20." in last["<cat>"]["message"]
    assert re.search(r"Resumed the unfinished run at step 1\d\.", last["<my_dog>"]["message"])
    assert {record["state"] for record in last.values()} == {"done"}


def test_one_concept_or_all_can_be_stopped(server, library):
    def stop(event):
        data = event["data"]
        if event["type"] == EVENT and data["concept"] == "<cat>" and data["step"] == 2:
            server.http.post(f"{server.url}/textual_inversion/runs/{data['run']}/stop", timeout=60)
        if event["type"] == EVENT and data["concept"] == "<my_dog>" and data["step"] == 3:
            server.http.post(f"{server.url}/textual_inversion/runs/{data['group']}/stop", timeout=60)

    run = server.run(library_graph(library, seed=53, steps=2000), on_event=stop)
    last = records_of(run)
    assert {record["state"] for record in last.values()} == {"done"}
    assert all("Stopped by hand." in record["message"] for record in last.values())


def test_trigger_words_must_fit_the_pictures(server, library):
    graph = library_graph(library, seed=54)
    graph["train"]["inputs"]["images"] = ["other", 0]
    graph["other"] = node("TI_LoadImages", folder="pictures", path="", crop="square", size=64)
    run = server.run(graph, check=False)
    assert re.search(r"There are 3 trigger words for \d pictures of several concepts", run.error["exception_message"])
