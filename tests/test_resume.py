"""Work survives: the server is killed, the graph is run again, and every bit is the same."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from kill_and_resume import graph, kill_at, learned, node
from ti_pack.nodes.concept_run import Notes, Request  # pyright: ignore[reportMissingImports]  made by conftest.py
from ti_pack.nodes.state_file import DAY, MOST_DAYS, MOST_STATES, StateFile, sweep  # pyright: ignore[reportMissingImports]
from ti_pack.nodes.train import _state_files  # pyright: ignore[reportMissingImports]
from ti_pack.nodes.training_run import remove_state  # pyright: ignore[reportMissingImports]

from demo.measure import CONCEPTS
from dev.comfyui_server import ComfyServer
from textual_inversion import Embedding, PreviewConfig, TrainConfig, UserError, formats
from textual_inversion.library import by_concept

OTHERS = "Started over: settings, pictures, the model or the node pack changed since the unfinished run, which is kept."


@pytest.fixture(scope="module")
def mortal() -> Iterator[ComfyServer]:
    """A server of one's own, to be killed, with pictures to learn from."""
    with ComfyServer() as running:
        shutil.copytree(CONCEPTS / "heart/train", running.base / "input/heart")
        yield running


@pytest.fixture(scope="module")
def reference(mortal) -> list[float]:
    found, message = learned(mortal)
    assert message.startswith("Ended at the upper bound")
    return found


def states(server):
    return list((server.base / "user/__textual_inversion").glob("*"))


def test_killed_run_goes_on_bit_for_bit(mortal, reference):
    kill_at(mortal, 15)
    assert len(states(mortal)) == 1
    found, message = learned(mortal)
    assert message.startswith("Resumed the unfinished run at step 10. Ended at the upper bound")
    assert found == reference


def test_more_steps_go_on_where_the_run_was_still_improving(mortal, reference):
    found, message = learned(mortal)
    assert found == reference
    assert message.startswith("Ended"), "as many steps as before are another run"
    further, message = learned(mortal, steps=45)
    assert message.startswith("Resumed the unfinished run at step 40.")
    assert further != reference


def test_changed_settings_start_over_and_the_unfinished_run_waits(mortal, reference):
    kill_at(mortal, 12, workflow="w")
    changed, message = learned(mortal, seed=1, workflow="w")
    assert message.startswith(OTHERS)
    assert changed != reference
    found, message = learned(mortal, workflow="w")
    assert message.startswith("Resumed the unfinished run at step 10.")
    assert found == reference


def cancelled(server: ComfyServer, prompt) -> None:
    def cancel(event):
        if event["type"] == "textual_inversion.run" and event["data"]["step"] > 0:
            server.interrupt()

    assert server.run(prompt, on_event=cancel, check=False).error is not None


def test_cancelled_run_goes_on_from_its_last_step(mortal, reference):
    cancelled(mortal, graph())
    found, message = learned(mortal)
    step = int(message.removeprefix("Resumed the unfinished run at step ").split(".")[0])
    assert 0 < step < 40
    assert found == reference


def test_run_cancelled_while_its_last_preview_is_drawn_goes_on(mortal, reference):
    def cancel(event):
        if event["type"] == "textual_inversion.run" and event["data"]["state"] == "finishing":
            mortal.interrupt()

    prompt = graph()
    prompt["learn"]["inputs"]["preview_every"] = 100
    assert mortal.run(prompt, on_event=cancel, check=False).error is not None
    found, message = learned(mortal)
    assert message.startswith("Resumed the unfinished run at step 40. Ended at the upper bound")
    assert found == reference


def test_unfinished_run_with_fewer_steps_ends_with_what_it_has(mortal):
    kill_at(mortal, 25, seed=7)
    _, message = learned(mortal, steps=15, seed=7)
    assert message.startswith("Resumed the unfinished run at step 20. Ended at the upper bound")


def test_a_damaged_state_starts_over_and_says_so(mortal, reference):
    cancelled(mortal, graph())
    path = max(states(mortal), key=os.path.getmtime)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found, message = learned(mortal)
    assert "The unfinished run of before cannot be read: its file is damaged, or of another version" in message
    assert found == reference


def test_another_model_of_the_same_name_gets_a_start_word_of_its_own(mortal):
    """A node behind the loader changes the model: the word that was found for the old one is not kept."""

    def changed(**settings):
        prompt = graph(**settings)
        prompt["changed"] = node("ModelSamplingDiscrete", model=["load", 0], sampling="x0", zsnr=False)
        prompt["learn"]["inputs"]["model"] = ["changed", 0]
        return prompt

    expected = mortal.run(changed(steps=12))
    cancelled(mortal, graph(steps=12))
    found = mortal.run(changed(steps=12))
    reports = [run.history["outputs"]["learn"]["text"][0].splitlines() for run in (expected, found)]
    (record,) = found.history["outputs"]["learn"]["textual_inversion"]
    assert record["message"].startswith("Started over: the model changed since the unfinished run.")
    assert reports[0][:-1] == reports[1][:-1]
    (of_the_old,) = mortal.run(graph(steps=12)).history["outputs"]["learn"]["text"]
    assert of_the_old.splitlines()[0] != reports[1][0], "the test needs models with different best words"


def test_embedding_can_be_trained_further(mortal, reference):
    longer = graph(seed=5)
    longer["given"] = node("TI_LoadEmbedding", file="learned.safetensors")
    longer["learn"]["inputs"]["resume"] = ["given", 0]
    longer["save"]["inputs"]["name"] = "further"
    run = mortal.run(longer)
    (text,) = run.history["outputs"]["learn"]["text"]
    assert "initialized from the given embedding" in text
    losses = run.history["outputs"]["learn"]["textual_inversion"][0]["fixed"]
    before = mortal.run(graph(seed=5)).history["outputs"]["learn"]["textual_inversion"][0]["fixed"]
    assert losses[0][1] < before[0][1], "it did not begin where the embedding had come to"


# The files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Where ComfyUI's user folder is, for one test."""
    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    yield tmp_path / "__textual_inversion"
    folder_paths.set_user_directory(before)


CONTENT = {"training": {"numbers": torch.arange(3.0)}, "initializer": "toy", "losses": [1.0], "fixed": [(0, 1.0)]}


def saved(name: str, days_ago: float = 0.0) -> Path:
    """The state of a run with settings of its own."""
    StateFile("owner", name).write(CONTENT)
    (path,) = Path(folder_paths.get_system_user_directory("textual_inversion")).glob(f"*-{name}.state")
    os.utime(path, times=(time.time() - days_ago * DAY,) * 2)
    return path


def test_any_damage_means_start_over(folder):
    whole = saved("run").read_bytes()
    pieces = [
        b"",
        whole[:10],
        whole[:-1],
        whole[1:],
        whole + b"!",
        whole.replace(b"state 1", b"state 0"),
        b"PK" + whole,
    ]
    flipped = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(0, len(whole), 17)]
    for content in [*pieces, *flipped]:
        path = saved("run")
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged, or of another version, so training starts over"):
            StateFile("other", "run").read()
        assert not path.exists()
        assert StateFile("other", "run").read() is None
    saved("run")
    found = StateFile("other", "run").read()
    assert found is not None
    assert torch.equal(found["training"]["numbers"], torch.arange(3.0))


def test_a_whole_state_beside_a_damaged_one_is_found(folder):
    saved("run")
    (folder / "other-run.state").write_bytes(b"damaged")
    for _ in range(2):
        assert StateFile("owner", "run").read() is not None


def test_states_that_nobody_goes_on_with_are_swept(folder, caplog):
    caplog.set_level("INFO")
    many = [saved(f"many{number}", days_ago=number / 10) for number in range(MOST_STATES + 4)]
    library = [folder / f"library.{number}-a.state" for number in range(MOST_STATES)]  # of one run
    for path in library:
        path.write_bytes(many[0].read_bytes())
    old, own = saved("old", MOST_DAYS + 1), saved("own", MOST_DAYS + 100)
    sweep([StateFile("owner", "own")], [])
    assert [path.exists() for path in many] == [True] * (MOST_STATES - 1) + [False] * 5
    assert all(path.exists() for path in library)
    assert (old.exists(), own.exists()) == (False, True)
    assert f"removed 6 unfinished runs; the newest {MOST_STATES} are kept, for {MOST_DAYS} days" in caplog.text
    caplog.clear()
    sweep([StateFile("owner", "own")], [])
    assert caplog.text == ""


@pytest.mark.parametrize("stopped", ["", "Stopped by hand."])
def test_a_run_stopped_in_its_last_step_does_not_wait_for_more(folder, stopped):
    """It would end at once however often steps are raised."""
    progress, kept = SimpleNamespace(step=12, flat=0), []
    live = SimpleNamespace(record=SimpleNamespace(state="done"))
    run = SimpleNamespace(
        notes=Notes(live),  # pyright: ignore[reportArgumentType]
        state_file=StateFile("owner", "run"),
        last=SimpleNamespace(progress=progress),
        config=TrainConfig(steps=12),
        stopped=stopped,
        save=lambda last, done: kept.append(done),
    )
    remove_state(run)
    assert kept == ([] if stopped else [True])


def test_a_run_beside_others_is_another_run():
    """Their words in its captions are vectors there, and text where they are not learned."""
    images, request = [torch.zeros(1, 8, 8, 3)] * 2, Request(TrainConfig(), PreviewConfig(), None, "model")
    captions = ["{} next to <cat>", ""]
    words = (["<dog>", "<cat>"], ["<dog>", "<fox>"])
    both, other = (by_concept(some, images, [], captions, "object") for some in words)
    alone = by_concept(["<dog>"], images[:1], [], captions[:1], "object")
    prints = [_state_files("", "1", concepts, request)[0].fingerprint for concepts in (both, other, alone)]
    assert prints[0] != prints[1] == prints[2]


def test_finishing_one_run_leaves_the_others(folder):
    first, second = saved("first"), saved("second")
    StateFile("owner", "second").remove()
    assert (first.exists(), second.exists()) == (True, False)
    assert StateFile("owner", "third").has_others


def test_what_killed_processes_left_is_swept(folder, tmp_path):
    """Of our names and older than a day: nothing of anybody else's, and nothing that is being written."""
    folder.mkdir()
    word = Embedding("S*", {"clip_l": torch.rand(1, 768)})
    with formats._read_back(formats._make_files(word, "comfyui", None), [tmp_path / "S.safetensors"]) as written:
        ours = [folder / "a-b.partial", *written]
    others = [folder / "a.txt", tmp_path / "S.tmp", tmp_path / "S.safetensors", tmp_path / f"S-{written[0].name}"]
    for path in [*ours, *others]:
        path.touch()
    sweep([StateFile("owner", "own")], [tmp_path, tmp_path / "not there"])
    assert all(path.exists() for path in [*ours, *others])
    for path in [*ours, *others]:
        os.utime(path, times=(time.time() - 2 * DAY,) * 2)
    sweep([StateFile("owner", "own")], [tmp_path, tmp_path / "not there"])
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)
