"""Work survives: the server is killed, the graph is run again, and every bit is the same."""

from collections.abc import Iterator

import pytest
from kill_and_resume import graph, kill_at, learned, node

from dev.comfyui_server import ComfyServer


@pytest.fixture(scope="module")
def mortal() -> Iterator[ComfyServer]:
    """A server of one's own, to be killed."""
    with ComfyServer() as running:
        yield running


@pytest.fixture(scope="module")
def reference(mortal) -> list[float]:
    found, message = learned(mortal)
    assert message == ""
    return found


def states(server):
    return list((server.base / "user/__textual_inversion").glob("*"))


def test_killed_run_goes_on_bit_for_bit(mortal, reference):
    kill_at(mortal, 15)
    assert len(states(mortal)) == 1
    found, message = learned(mortal)
    assert message == "Resumed the unfinished run at step 10."
    assert found == reference


def test_more_steps_go_on_where_the_run_was_still_improving(mortal, reference):
    found, message = learned(mortal)
    assert (found, message) == (reference, ""), "as many steps as before are another run"
    further, message = learned(mortal, steps=45)
    assert message == "Resumed the unfinished run at step 40."
    assert further != reference


def test_changed_settings_start_over(mortal, reference):
    kill_at(mortal, 12, workflow="w")
    changed, message = learned(mortal, seed=1, workflow="w")
    assert message == "Started over: settings, pictures or the node pack changed since the unfinished run."
    assert changed != reference


def test_cancelled_run_goes_on_from_its_last_step(mortal, reference):

    def cancel(event):
        if event["type"] == "textual_inversion.run" and event["data"]["step"] > 0:
            mortal.interrupt()

    cancelled = mortal.run(graph(), on_event=cancel, check=False)
    assert cancelled.error is not None
    found, message = learned(mortal)
    step = int(message.removeprefix("Resumed the unfinished run at step ").removesuffix("."))
    assert 0 < step < 40
    assert found == reference


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
