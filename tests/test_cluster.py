"""A library on the command line, in one process and in many, started by the real launchers."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from kill_a_process import (
    ROOT,
    differences,
    kill_one,
    launched,
    learn,
    learned,
    make_library,
    one_thread,
    options,
)

QUICK = ["--steps", "4"]  # of several the last counts


@pytest.fixture(scope="module")
def alone(toy_folder, tmp_path_factory) -> Path:
    """What one process learns of a picture without captions, with uneven batches."""
    folder = tmp_path_factory.mktemp("alone")
    learn(single(toy_folder, folder), 1)
    return folder


@pytest.fixture(scope="module")
def whole(toy_folder, tmp_path_factory) -> Path:
    """A library, and in ``words`` what one process learns of it without a break."""
    folder = tmp_path_factory.mktemp("whole")
    make_library(folder / "library", linked=False)
    learn(options(toy_folder, folder / "library", folder / "words"), 1)
    return folder


def single(model: Path, output: Path) -> list[str]:
    pictures = output.parent / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        for number in range(3):
            (pictures / f"{number}.png").write_bytes((ROOT / f"demo/concepts/moon/train/{number}.png").read_bytes())
    return [*options(model, pictures, output / "word"), *QUICK]


def test_processes_that_split_batches_learn_the_same(toy_folder, alone, tmp_path):
    """One row of each batch in each; so are the per-image tokens."""
    said = learn(single(toy_folder, tmp_path / "split"), 2)
    assert "2 processes share the rows of every batch." in said
    assert said.count("Learned:") + said.count("Nothing was measurably learned") == 1
    (ours,), (theirs,) = learned(tmp_path / "split").values(), learned(alone).values()
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_concepts_are_shared_out(toy_folder, tmp_path):
    """Linked ones stay together, and each is the same as in one process. The first process tells of all."""
    library = tmp_path / "library"
    make_library(library, linked=True)
    make_library(library, linked=False, concepts=("moon",))
    learn([*options(toy_folder, library, tmp_path / "one"), *QUICK], 1)
    arguments = [*options(toy_folder, library, tmp_path / "two"), *QUICK]
    done = subprocess.run([*launched(2), *arguments], capture_output=True, text=True, timeout=600, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert "2 processes share out 3 concepts." in done.stderr
    head, *rows = done.stdout.splitlines()
    assert re.split(r"  +", head) == ["word", "loss before", "after", "pictures seen", "seconds", "file"]
    assert [row.split()[0] for row in rows] == ["<heart>", "<moon>", "<star>"]
    assert [row.split()[3] for row in rows] == ["8"] * 3
    assert not differences(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two/unfinished").exists()


def test_concepts_go_on_after_one_process_was_killed(toy_folder, whole, tmp_path):
    """It ends as without a break, bit for bit, and as in one process."""
    goes_on_after_a_kill(options(toy_folder, whole / "library", tmp_path / "words"), step=13, rank=1)
    assert not differences(whole / "words", tmp_path / "words")


def test_split_batches_go_on_after_one_process_was_killed(toy_folder, tmp_path):
    """It ends as without a break, bit for bit."""
    make_library(tmp_path / "library", linked=True)
    learn(options(toy_folder, tmp_path / "library", tmp_path / "whole"))
    goes_on_after_a_kill(options(toy_folder, tmp_path / "library", tmp_path / "words"), step=27, rank=0)
    assert not differences(tmp_path / "whole", tmp_path / "words")


def goes_on_after_a_kill(arguments: list[str], step: int, rank: int) -> None:
    assert "error: Another process of this run has ended" in kill_one(arguments, step, rank)
    assert "goes on after step" in learn(arguments)


def test_accelerate_launch(toy_folder, alone, tmp_path):
    """Of three processes one has no rows."""
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "3", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    start, *module = launched(1)
    arguments = [*single(toy_folder, tmp_path / "split"), "--device", "cpu"]
    done = subprocess.run(
        [start, *command, *module, *arguments], capture_output=True, text=True, timeout=600, env=one_thread()
    )
    assert done.returncode == 0, done.stderr
    assert "3 processes share the rows of every batch." in done.stderr
    (ours,), (theirs,) = learned(tmp_path / "split").values(), learned(alone).values()
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_an_interrupted_library_goes_on(toy_folder, whole, tmp_path):
    """Nothing is written of what has not ended, and the end is that without a break. Files that are there stay."""
    arguments = options(toy_folder, whole / "library", tmp_path / "words")
    with subprocess.Popen([*launched(1), *arguments], stderr=subprocess.PIPE, env=one_thread()) as process:
        assert process.stderr is not None
        seen = b""
        while b"1 of 2 learned, <star>:" not in seen:
            assert process.poll() is None, seen
            seen += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Run the same command again to go on." in rest
    assert learned(tmp_path / "words").keys() == {"heart.safetensors"}
    said = learn(arguments, 1)
    assert "Already in" in said
    assert "<star> goes on after step" in said
    assert not differences(whole / "words", tmp_path / "words")
    there = (tmp_path / "words/star.safetensors").stat().st_mtime_ns
    assert "step/s" not in learn(arguments, 1)
    assert (tmp_path / "words/star.safetensors").stat().st_mtime_ns == there
    (tmp_path / "words/heart.safetensors").unlink()
    learn([*arguments, "--existing", "replace", *QUICK], 1)
    assert (tmp_path / "words/star.safetensors").stat().st_mtime_ns > there


def test_what_a_library_lacks_is_told(toy_folder, tmp_path):
    """The rest is learned."""
    library = tmp_path / "library"
    make_library(library, linked=False)
    (library / "star/0.txt").write_text("{} beside <dog>")
    (library / "empty").mkdir()
    (library / "star/broken.png").write_bytes(b"no picture")
    make_library(tmp_path, linked=False, concepts=("moon",))
    (tmp_path / "moon").rename(library / "Heart!")
    (library / "heart").rename(library / "heart!")
    (library / "none").mkdir()
    for number in range(2):
        picture = library / f"none/{number}.png"
        picture.write_bytes((ROOT / "demo/concepts/moon/train/0.png").read_bytes())
        picture.with_suffix(".txt").write_text("a " * 80 + "{}")  # no room for the word
    done = subprocess.run(
        [*launched(1), *options(toy_folder, library, tmp_path / "words"), *QUICK],
        capture_output=True, text=True, timeout=600, env=one_thread(),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Left out empty/: There are no pictures" in done.stderr
    assert "Left out heart!/: its name makes the same word as that of 'Heart!'" in done.stderr
    assert "Left out star/broken.png" in done.stderr
    assert "Captions name <dog>, which no concept is called" in done.stderr
    assert re.search(r"^<none> .* has no room for 1 vectors", done.stdout, re.MULTILINE)
    assert learned(tmp_path / "words").keys() == {"Heart.safetensors", "star.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trigger", "<cat>"], "The words of a library are the names of its folders"),
        (["--output", "library/words"], "is in the library, where folders are concepts"),
        (["--images", "nothing"], "none of the 1 folders inside can be used"),
        (["--images", "library/heart", "--existing", "replace"], "--existing is for a library"),
    ],
)
def test_what_cannot_be_a_library(tmp_path, arguments, message):
    make_library(tmp_path / "library", linked=False)
    (tmp_path / "nothing/inside").mkdir(parents=True)
    command = [*launched(1), "--model", "nowhere", "--images", "library", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=one_thread())
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
