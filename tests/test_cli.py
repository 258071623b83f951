"""The command line as a user types it, on the demo model as a diffusers folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_pipelines import small_pipeline

from textual_inversion import Embedding, TrainConfig, formats, train_command
from textual_inversion.adapters.diffusers_pipeline import DiffusersModel
from textual_inversion.config import field_help
from textual_inversion.devices import usable_device
from textual_inversion.errors import UserError
from textual_inversion.formats import FormatName
from textual_inversion.processes import ALONE
from textual_inversion.train_command import Existing, Order, train_order
from textual_inversion.unfinished import DAY, UnfinishedFiles

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "demo/concepts/heart/train"
COMMAND = [sys.executable, "-m", "textual_inversion"]


@pytest.fixture
def model(toy_folder) -> Path:
    return toy_folder


def call(*arguments, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_train_then_draw(model, tmp_path):
    done = call("train", "--model", model, "--images", PICTURES, "--token", "<toy>", "--init", "heart", "--steps", 4,
                "--seed", 3, "--output", "words/toy", folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.strip()
    assert path == tmp_path / "words/toy.safetensors"
    word = formats.read(path)
    assert word.trigger == "<toy>"
    assert word.vectors["clip_l"].shape == (1, 96)
    assert word.metadata["base_model"] == model.name
    assert '"seed": 3' in word.metadata["settings"]
    assert "4/4" in done.stderr
    assert re.search(r"learned from 4 pictures \(.*\), initialized from 'heart'", done.stderr)
    assert "Ended at the upper bound" in done.stderr
    assert re.search(r"a batch of 4 takes about \d+\.\d GB beside the model's \d+\.\d GB", done.stderr)

    done = call("generate", "--model", model, "--embedding", path, "--prompt", "a photo of {} in the snow",
                "--width", 64, "--height", 64, "--steps", 4, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(tmp_path / "with_and_without.png"))
    assert pixels.shape == (64, 128, 3)
    assert not np.array_equal(pixels[:, :64], pixels[:, 64:])


def test_large_pictures_without_a_size(model, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "photos/photo.jpg")
    done = call("train", "--model", model, "--images", "photos", "--init", "heart", "--steps", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 pictures are scaled down to the model's own size, about 64 x 64 pixels." in done.stderr
    assert "all scaled down to the model's 64 x 64)" in done.stderr


TRAINING = b"at step 0"  # on the progress bar after the first step
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def disturbed(model, folder, until: bytes, act: Callable[[subprocess.Popen], object], *more: str):
    """Exit code and output of a training that something is done to once ``until`` is on its progress bar."""
    command = [*COMMAND, "train", "--model", model, "--images", PICTURES, *more]
    # Programs started in the background of a script inherit an ignored SIGINT; this one is in the foreground.
    foreground = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, preexec_fn=foreground, stdout=pipe, stderr=pipe) as process:
        assert process.stderr is not None
        try:
            seen = b""
            while until not in seen:
                assert process.poll() is None, seen
                seen += os.read(process.stderr.fileno(), 4096)
            act(process)
            out, error = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, out.decode().strip(), error.decode()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_keeps_what_was_learned_until_then(model, tmp_path, number):
    """No evaluation was due by then: it is made up for, as with *Stop and keep*."""
    options = ("--init", "heart", "--evaluate-every", "10000", "--steps", "100000")
    code, out, error = disturbed(model, tmp_path, TRAINING, lambda process: process.send_signal(number), *options)
    assert code == SIGNALS[number]
    (step,) = re.findall(r"Interrupted at step (\d+)\.", error)
    assert formats.read(tmp_path / out).metadata["steps"] == step
    assert int(step) > 0
    assert "whether more steps would help" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("until", "options"), [(b"looking for a word", ()), (b"looking for words", ("--init", "heart"))]
)
def test_a_signal_before_training_ends_the_program(model, tmp_path, tmp_path_factory, until, options):
    """While it looks for the initializer, or for words of the pictures without captions."""
    pictures = tmp_path_factory.mktemp("pictures")
    for picture in PICTURES.glob("*.png"):
        shutil.copy(picture, pictures)
    options = [*options, "--images", str(pictures)]
    code, out, error = disturbed(model, tmp_path, until, lambda p: p.send_signal(signal.SIGINT), *options)
    assert (code, out) == (130, "")
    assert "Interrupted." in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_inspect_and_convert(tmp_path):
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "word.safetensors")
    done = call("inspect", "word.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "word: 2 vectors, SDXL: CLIP-L 768 + CLIP-G 1280" in done.stdout
    done = call("convert", "word.safetensors", "--to", "diffusers", "--output", "pair.safetensors", folder=tmp_path)
    first, second = (tmp_path / line for line in done.stdout.split())
    assert load_file(first).keys() == {"<word>"}
    assert load_file(second)["<word>"].shape == (2, 1280)
    assert done.stderr == "In diffusers, write <word> in prompts.\n"
    done = call("convert", first, "--partner", second, "--to", "png-card", "--output", "card.png", folder=tmp_path)
    assert formats.read(tmp_path / "card.png").vectors.keys() == {"clip_l", "clip_g"}
    for output in ("my_v1.3", "my_v1.3.safetensors", "my_v1.3.pt"):
        done = call("convert", "word.safetensors", "--to", "comfyui", "--output", output, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("my*")} == {f"my_v1.3{n}.safetensors" for n in ("", "-2", "-3")}


def test_converting_to_where_nothing_can_be_written(tmp_path):
    save_file({"clip_l": torch.ones(2, 768)}, tmp_path / "word.safetensors")
    (tmp_path / "file").touch()
    done = call("convert", "word.safetensors", "--to", "a1111", "--output", "file/word", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: file cannot be written to (File exists): choose another --output.\n"


def test_a_slash_at_the_end_means_a_folder(tmp_path):
    """Also one that is not there; without the slash it is the file's name."""
    save_file({"<s1>": torch.ones(2, 768), "<s2>": torch.ones(2, 768)}, tmp_path / "words.safetensors")
    done = call("convert", "words.safetensors", "--to", "a1111", "--output", "new/", folder=tmp_path)
    assert done.stdout.split() == ["new/s1.pt", "new/s2.pt"], done.stderr
    one = ("--word", "<s1>", "--output", "more/in/")
    done = call("convert", "words.safetensors", "--to", "a1111", *one, folder=tmp_path)
    assert done.stdout.split() == ["more/in/words.pt"], done.stderr
    done = call("convert", "words.safetensors", "--to", "a1111", "--output", "words.safetensors/", folder=tmp_path)
    assert done.stderr == "error: words.safetensors cannot be written to (File exists): choose another --output.\n"


def test_a_name_that_no_file_can_have(tmp_path):
    """Windows reserves some, which others have."""
    save_file({"clip_l": torch.ones(2, 768)}, tmp_path / "con.safetensors")
    save_file({"nul": torch.ones(2, 768), "dog": torch.ones(2, 768)}, tmp_path / "words.safetensors")
    for name, said in (("con", "'con.safetensors'"), ("words", "'nul'")):
        done = call("convert", f"{name}.safetensors", "--to", "a1111", folder=tmp_path)
        one = "--word nul and " if name == "words" else ""
        assert done.stderr == (
            f"error: {said} cannot be the name of a file: choose another name with {one}--output.\n"
        )  # fmt: skip


def test_several_words_of_one_file(tmp_path):
    words = {f"bundle_emb.<s{n}>.clip_l": torch.full((n, 768), float(n)) for n in (1, 2)}
    save_file(words, tmp_path / "lora.safetensors")
    shown = call("inspect", "lora.safetensors", folder=tmp_path).stdout
    assert re.findall("^<s.>: . vectors?", shown, re.MULTILINE) == ["<s1>: 1 vector", "<s2>: 2 vectors"]
    assert "<s1>" not in call("inspect", "lora.safetensors", "--word", "<s2>", folder=tmp_path).stdout
    done = call("convert", "lora.safetensors", "--to", "comfyui", folder=tmp_path)
    assert done.stdout.split() == ["s1.safetensors", "s2.safetensors"]
    for n in (1, 2):
        assert load_file(tmp_path / f"s{n}.safetensors")["clip_l"].tolist() == [[n] * 768] * n
    done = call("convert", "lora.safetensors", "--to", "comfyui", "--output", "one.safetensors", folder=tmp_path)
    assert done.stderr == (
        "error: lora.safetensors contains <s1>, <s2>: choose one with --word, or a folder, NAME/, as --output.\n"
    )


def test_inspect_imports_no_diffusers_and_is_quiet_in_a_pipe(tmp_path):
    save_file({"clip_l": torch.ones(1000, 768)}, tmp_path / "word.safetensors")
    code = (
        "import sys; from textual_inversion import cli; sys.argv = ['x', 'inspect', 'word.safetensors']; cli.main()\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'diffusers', 'transformers', 'accelerate'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    shell = f"set -o pipefail; '{sys.executable}' -m textual_inversion inspect word.safetensors | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "word: 1000 vectors, SD1: CLIP-L 768\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "missing.pt"], 1, "error: missing.pt cannot be read"),
        (["train", "--model", "nowhere", "--images", PICTURES, "--trigger", "a/b"], 1, "contains '/'"),
        (["train", "--model", "nowhere", "--images", "nothing"], 1, "'nothing' cannot be read (no such file or"),
        (["train", "--model", "nowhere", "--images", __file__], 1, "cannot be read (not a directory): choose another"),
        (["train", "--model", "nowhere", "--images", PICTURES, "--vectors", "0"], 2, "choose a value from 1 to 75"),
        (["train", "--model", "nowhere", "--images", PICTURES], 1, "nowhere"),
        (["train", "--images", PICTURES], 2, "--model"),
        (["fly"], 2, "fly"),
    ],
)
def test_errors_are_a_sentence_and_an_exit_code(arguments, code, message, tmp_path):
    done = call(*arguments, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "file/word"], "file cannot be written to (File exists): choose another --output"),
        (["--output", "a:b.pt"], "cannot be the name of a file: write a plain name"),
        (["--output", "con.pt"], "cannot be the name of a file: enter a short name"),
        (["--output", "\u732b" * 90], "File name too long"),
        (["--vectors", "75"], "has no room for 75 vectors"),
    ],
)
def test_what_would_lose_the_result_is_told_before_training(model, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    done = call("train", "--model", model, "--images", PICTURES, "--steps", 4, *arguments, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert "step/s" not in done.stderr
    assert "looking for a word" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_may_be_a_folder(model, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/toy.pt").touch()
    options = ("--token", "<toy>", "--init", "heart", "--steps", 2, "--output", "words")
    done = call("train", "--model", model, "--images", PICTURES, *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "words/toy-2.safetensors"
    done = call("train", "--model", model, "--images", PICTURES, *options[:-1], "new/", folder=tmp_path)
    assert done.stdout.strip() == "new/toy.safetensors", done.stderr


def test_a_folder_that_goes_away_meanwhile_loses_nothing(model, tmp_path):
    """The result goes to the next folder that takes it."""
    words = tmp_path / "words"

    def replace_by_a_file(_process):
        words.rmdir()
        words.touch()

    options = ("--token", "<toy>", "--init", "heart", "--steps", "60", "--output", "words/toy")
    code, out, error = disturbed(model, tmp_path, TRAINING, replace_by_a_file, *options)
    assert code == 0, error
    assert "words cannot be written to (File exists)" in error
    assert out == "toy.safetensors"
    assert formats.read(tmp_path / out).trigger == "<toy>"


def generated(model: Path, folder: Path, *arguments) -> subprocess.CompletedProcess:
    formats.write(Embedding("<toy>", {"clip_l": torch.ones(75, 96)}), folder / "toy.safetensors")
    return call("generate", "--model", model, "--embedding", "toy.safetensors", *arguments, folder=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "toy.xyz"], "'toy.xyz' is not the name of a picture: choose an --output that ends in .png"),
        (["--output", "toy"], "'toy' is not the name of a picture"),
        (["--output", "toy.safetensors/toy.png"], "toy.safetensors cannot be written to (File exists)"),
        (["--prompt", "a photo"], "The prompt 'a photo' does not contain {} or '<toy>': add one of them."),
        (["--prompt", "a \udcff {}"], "has bytes that are no text: type it again in UTF-8"),
        (["--steps", 0], "steps is 0; choose 1 or more"),
        (["--width", 7], "width is 7; choose 8 or more"),
        (["--seed", 2**64], "seed is 18446744073709551616; choose a value from 0 to"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_the_model_is_loaded(tmp_path, arguments, message):
    done = generated(tmp_path / "nowhere", tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_embedding_that_is_cut_off_is_not_drawn(model, tmp_path):
    done = generated(model, tmp_path, "--prompt", "a photo of {}", "--output", "new/toy.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no room for 75 vectors" in done.stderr
    assert not list((tmp_path / "new").iterdir())


def test_a_terminal_without_the_letters(tmp_path, monkeypatch):
    """What it has not is written as its number."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    save_file({"clip_l": torch.ones(1, 768)}, tmp_path / "\u732b.safetensors", {"note": "\u00e9\x1b[2J"})
    done = call("inspect", "\u732b.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\u732b: 1 vector" in done.stdout
    assert "note: \\xe9\\ufffd[2J" in done.stdout
    done = call("convert", "\u732b.safetensors", "--to", "a1111", folder=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["\\u732b-2.pt"]), done.stderr


def test_words_that_are_no_text(tmp_path):
    for option in ("--token", "--init"):
        done = call("train", "--model", "nowhere", "--images", PICTURES, option, "cat\udcff", folder=tmp_path)
        assert (done.returncode, done.stderr) == (
            1, "error: 'cat\\udcff' has bytes that are no text: type it again in UTF-8.\n"
        )  # fmt: skip


def test_a_pipe_is_no_embedding(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        done = call("inspect", name, folder=tmp_path)
        assert done.returncode == 1
        assert "is not a regular file: choose the file of an embedding" in done.stderr


def test_picture_of_a_card(tmp_path):
    """Turned as the camera says; what cannot be a picture is a sentence."""
    save_file({"clip_l": torch.ones(1, 768)}, tmp_path / "word.safetensors")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    chunks = {b"IHDR": (50_000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0", b"IDAT": zlib.compress(b"\0"), b"IEND": b""}
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in chunks.items():
            checksum = zlib.crc32(kind + data).to_bytes(4, "big")
            file.write(len(data).to_bytes(4, "big") + kind + data + checksum)
    convert = ("convert", "word.safetensors", "--to", "png-card", "--picture")
    done = call(*convert, "turned.jpg", folder=tmp_path)
    with Image.open(tmp_path / done.stdout.strip()) as card:
        assert card.size == (32, 64)
    done = call(*convert, "huge.png", folder=tmp_path)
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: huge\.png cannot be the picture of a card: it has .* pixels.*: scale it down\.$", line)
    done = call(*convert, "none.png", folder=tmp_path)
    assert done.stderr == "error: There is no picture none.png: choose another --picture.\n"


def test_help_is_the_settings_own(tmp_path):
    text = " ".join(call("train", "--help", folder=tmp_path).stdout.replace("\u2502", " ").split())
    for name, explanation in field_help(TrainConfig).items():
        assert f"--{name.replace('_', '-')}" in text
        assert explanation.split(".")[0] in text


@pytest.mark.parametrize("device", ["cuda:99", "cuda7", "xyz"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match=f"This machine has no device '{device}' that PyTorch can use: choose from cpu"):
        usable_device(device)


def test_a_device_that_is_not_there_is_told_in_one_line(model, tmp_path):
    done = call("train", "--model", model, "--images", PICTURES, "--device", "cuda:99", folder=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: This machine has no device 'cuda:99'")


# A library, in this process ----------------------------------------------------------------------


def library(folder: Path, *words: str) -> Path:
    for number, word in enumerate(words):
        (folder / word).mkdir(parents=True)
        Image.new("RGB", (32, 32), ["red", "green", "blue"][number]).save(folder / word / "1.png")
        (folder / word / "1.txt").write_text("a photo of {}")  # without it the words of the picture are looked for
    return folder


def learn(
    images: Path,
    output: Path,
    format: FormatName = "comfyui",
    existing: Existing = "skip",
    family: str = "SDXL",
    **settings,
) -> int:
    config = TrainConfig(**{"initializer": "toy", "steps": 2, "batch_size": 8, **settings})
    load = lambda: DiffusersModel(small_pipeline(family))  # noqa: E731
    return train_order(Order(load, family, images, config, output, format, existing), ALONE)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replacing_in_another_format_does_not_leave_the_old_file_in_front(tmp_path, capsys):
    """It is told before the model is loaded. Behind the new one an old file may stay."""
    images, words = library(tmp_path / "library", "cat", "dog"), tmp_path / "words"
    formats.write(Embedding("<cat>", {"clip_l": torch.ones(1, 32)}), words / "cat.safetensors")
    formats.write(Embedding("<dog>", {"clip_l": torch.ones(1, 32)}), words / "dog.pt", "a1111")
    before = contents(words)
    with pytest.raises(UserError, match=r"already, cat\.safetensors, instead of the new .* a1111: delete or move"):
        learn(images, words, "a1111", "replace", "no model")
    assert contents(words) == before
    assert learn(images, words, "comfyui", "replace") == 0
    assert contents(words).keys() == {"cat.safetensors", "dog.pt", "dog.safetensors"}
    assert formats.read(words / "cat.safetensors").vectors.keys() == {"clip_l", "clip_g"}


def test_words_whose_files_collide(tmp_path, capsys):
    """The second file of <cat> is called as the first one of <cat_2>, where a model has two text encoders."""
    images, words = library(tmp_path / "library", "cat", "cat_2", "dog"), tmp_path / "words"
    assert learn(images, words, "diffusers") == 1
    (line,) = re.findall("^<cat_2> .*", capsys.readouterr().out, re.MULTILINE)
    assert "cat_2.safetensors would also be a file of <cat>: rename one of the two folders" in line
    before = contents(words)
    assert before.keys() == {f"{name}.safetensors" for name in ("cat", "cat_2", "dog", "dog_2")}
    for existing in ("skip", "replace"):
        assert learn(images, words, "diffusers", existing) == 1
        out, error = capsys.readouterr()
        assert ("Already in" in error) == (existing == "skip")
        assert re.search("^<cat_2> .*: rename one of the two folders", out, re.MULTILINE)
        assert contents(words).keys() == before.keys()
    shutil.rmtree(images / "cat")
    assert learn(images, words, "diffusers") == 1
    assert "cat_2.safetensors belongs to cat.safetensors: choose another name" in capsys.readouterr().out
    assert learn(images, tmp_path / "sd1", "diffusers", family="SD1") == 0
    assert contents(tmp_path / "sd1").keys() == {"cat_2.safetensors", "dog.safetensors"}


def test_an_unrelated_second_file_is_told_before_training(tmp_path, capsys):
    """The same command does not learn the word again each time, under another name."""
    images, words = library(tmp_path / "library", "cat", "dog"), tmp_path / "words"
    formats.write(Embedding("other", {"clip_l": torch.ones(1, 32)}), words / "cat_2.safetensors")
    for existing in ("skip", "replace"):
        assert learn(images, words, "diffusers", existing) == 1
        (line,) = re.findall("^<cat> +- +- .*", capsys.readouterr().out, re.MULTILINE)
        assert "cat_2.safetensors is another embedding" in line
        assert contents(words).keys() == {f"{name}.safetensors" for name in ("cat_2", "dog", "dog_2")}


def test_a_word_that_cannot_be_written_ends_no_library(tmp_path, capsys, monkeypatch):
    images, words, write_new = library(tmp_path / "library", "cat", "dog"), tmp_path / "words", formats.write_new

    def one_cannot(embedding, folder, name, *rest):
        if name == "cat" and folder == words:
            raise UserError("cat.safetensors does not read back as written.")
        return write_new(embedding, folder, name, *rest)

    monkeypatch.setattr(formats, "write_new", one_cannot)
    assert learn(images, words) == 1
    assert re.search("^<cat> .*does not read back as written", capsys.readouterr().out, re.MULTILINE)
    assert contents(words).keys() == {"dog.safetensors"}


def test_an_empty_file_is_not_what_was_learned(tmp_path, capsys):
    """A killed process may leave one."""
    images, words = library(tmp_path / "library", "cat"), tmp_path / "words"
    words.mkdir()
    for name in ("cat.safetensors", "cat_2.safetensors"):
        (words / name).touch()
    assert learn(images, words, "diffusers") == 0
    first, second = (words / name for name in ("cat.safetensors", "cat_2.safetensors"))
    assert formats.read_pair(first, second).count == 1
    assert contents(words).keys() == {first.name, second.name}
    assert learn(images, words, "diffusers", family="no model") == 0
    assert "Already in" in capsys.readouterr().err


def test_an_unfinished_run_waits_while_others_run_with_other_settings(tmp_path, capsys, monkeypatch):
    """It goes on when they are set back. A run that ends removes its own file only."""
    images, words = library(tmp_path / "pictures", "cat") / "cat", tmp_path / "words"
    (words / "unfinished").mkdir(parents=True)
    show = train_command.Bar.show

    def killed(bar, word, step):
        show(bar, word, step)
        if step.number == 3:
            raise RuntimeError("killed")

    def run(seed: int, kill: bool = False) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(train_command, "SAVE_EVERY", 1)
            if kill:
                patched.setattr(train_command.Bar, "show", killed)
                with pytest.raises(RuntimeError, match="killed"):
                    learn(images, words, family="SD1", steps=4, seed=seed)
            else:
                learn(images, words, family="SD1", steps=4, seed=seed)
        return capsys.readouterr().err

    assert "starts over" not in run(1, kill=True)
    assert "S* starts over: settings," in run(2, kill=True)
    assert len(list((words / "unfinished").iterdir())) == 2
    assert "S* goes on after step 2." in run(1)
    assert "S* goes on after step 2." in run(2)
    assert contents(words).keys() == {"S.safetensors", "S-2.safetensors"}


def test_old_unfinished_runs_are_removed(tmp_path):
    """The newest 20 stay, for 30 days, and the run at hand; each with the files of all its processes."""
    own, other = (UnfinishedFiles(tmp_path, "word", 0, {"word": name}) for name in "ab")
    other.folder.mkdir()
    ages = {f"my.word.{number:016x}": number * DAY for number in range(1, 20)}
    ages |= {other.own.name.removesuffix(".0.state"): 0, f"my.word.{99:016x}": 20 * DAY, own.own.name[:-8]: 40 * DAY}
    for name, age in ages.items():
        for rank in range(2):
            path = other.folder / f"{name}.{rank}.state"
            path.touch()
            os.utime(path, (time.time() - age, time.time() - age))
    own.sweep()
    assert {path.name[:-8] for path in other.folder.iterdir()} == set(ages) - {f"my.word.{99:016x}"}
    for path in other.folder.iterdir():
        os.utime(path, (0, 0))
    own.sweep()
    assert {path.name for path in other.folder.iterdir()} == {f"{own.own.name[:-8]}.{rank}.state" for rank in range(2)}
    own.remove()
    assert not other.folder.exists()
