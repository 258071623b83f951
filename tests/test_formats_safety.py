"""Files made to harm: nothing in them runs, none of them fills the memory, none leads out of the folder."""

import base64
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import folder_paths
import pytest
import torch
from hostile_files import CPU_SECONDS, MAKERS, MEMORY, chunk, legacy, measured, torch_zip
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ti_pack.nodes.files import embedding_file  # pyright: ignore[reportMissingImports]  made by conftest.py
from torch._utils import _rebuild_parameter

from textual_inversion import Embedding, UserError, formats
from textual_inversion.containers import PNG_TEXT


class Reduces:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


MARK = "touched-by-a-pickle"
ATTACKS = {
    "os.system": Reduces(os.system, f"touch {MARK}"),
    "eval": Reduces(eval, f"open({MARK!r}, 'w')"),
    "nested": {"string_to_param": {"*": [Reduces(getattr, Reduces(__import__, "os"), "system")]}},
    "in a tensor": {"*": Reduces(_rebuild_parameter, Reduces(os.system, f"touch {MARK}"), False, {})},
    "subprocess": Reduces(subprocess.Popen, ["touch", MARK]),
    "open": Reduces(open, MARK, "w"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("container", ["zip", "bare", "legacy"])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_pickle_runs_code(name, container, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, pickled = tmp_path / "word.pt", pickle.dumps(ATTACKS[name], protocol)
    path.write_bytes({"zip": torch_zip, "bare": bytes, "legacy": legacy}[container](pickled))
    with pytest.raises(
        UserError, match=r"word\.pt (was not opened: (it asks for '|its pickle has|PyTorch did)|is not an embedding)"
    ):
        formats.read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["word.pt"]


def test_global_by_hand(tmp_path, monkeypatch):
    """``builtins.eval`` through GLOBAL and REDUCE, as no pickler would write it."""
    monkeypatch.chdir(tmp_path)
    opcodes = b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", 30) + b"open('%s', 'w') " % MARK.encode()[:13]
    (tmp_path / "word.pt").write_bytes(torch_zip(opcodes.ljust(40) + b"\x85R."))
    with pytest.raises(UserError, match=r"it asks for 'builtins\.eval', which no embedding needs"):
        formats.read(tmp_path / "word.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["word.pt"]


def torch_file(content) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def test_storage_that_claims_more_than_there_is(tmp_path):
    """The pickle says 2^20 numbers, the archive holds 16: torch.load alone would read beyond them."""
    data = torch_file({"*": torch.ones(4, 4)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    for old, new in ((b"K\x10", b"J\0\0\x10\0"), (b"K\x04K\x04\x86", b"J\0\4\0\0J\0\4\0\0\x86")):
        assert old in pickled
        pickled = pickled.replace(old, new)
    (tmp_path / "word.pt").write_bytes(torch_zip(pickled, {"0": torch.ones(4, 4).numpy().tobytes()}))
    with pytest.raises(UserError, match="has 4194304 bytes, but holds 64"):
        formats.read(tmp_path / "word.pt")


def test_one_number_seen_as_terabytes(tmp_path):
    torch.save({"*": torch.ones(1, 1).expand(2**20, 2**20)}, tmp_path / "word.pt")
    with pytest.raises(UserError, match="not an embedding"):
        formats.read(tmp_path / "word.pt")


def test_compressed_and_escaping_archives_are_not_opened(tmp_path):
    bomb = torch_zip(pickle.dumps(bytes(50_000_000), 2), compression=zipfile.ZIP_DEFLATED)
    (tmp_path / "bomb.pt").write_bytes(bomb)
    with pytest.raises(UserError, match="compressed"):
        formats.read(tmp_path / "bomb.pt")
    for name in ("../../outside", "archive/../../outside", "/etc/outside", "archive\\..\\outside"):
        (tmp_path / "slip.pt").write_bytes(torch_file({"*": torch.ones(1, 8)}))
        with zipfile.ZipFile(tmp_path / "slip.pt", "a") as archive:
            archive.writestr(name, b"x")
        with pytest.raises(UserError, match="another program could find other content in its archive"):
            formats.read(tmp_path / "slip.pt")


def test_safetensors_header_that_lies(tmp_path):
    for length, header, message in (
        (2**60, b"{}", "is none of"),
        (2**20, b"{}", "ends in the middle"),
        (64, b'{"clip_l":{"dtype":"F32","shape":[1099511627776,768],"data_offsets":[0,4]}}', "cannot be read"),
    ):
        (tmp_path / "word.safetensors").write_bytes(struct.pack("<Q", length) + header.ljust(80) + bytes(4))
        with pytest.raises(UserError, match=message):
            formats.read(tmp_path / "word.safetensors")


def test_pictures_that_swell(tmp_path):
    path = tmp_path / "word.png"
    head = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(head + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""))
    with pytest.raises(UserError):
        formats.read(path)
    text = PngInfo()
    text.add_text(PNG_TEXT, "A" * 200_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UserError):
        formats.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        json.dumps({"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}}),
        json.dumps({"string_to_param": {"*": {"TORCHTENSOR": [[10**400]]}}}),
        json.dumps({"string_to_param": {"*": {"TORCHTENSOR": "rows"}}}),
        '{"string_to_param": {"*": {"TORCHTENSOR": [[NaN]]}}}',
        "1",
        "",
    ],
)
def test_json_that_is_no_embedding(text, tmp_path):
    info = PngInfo()
    info.add_text(PNG_TEXT, base64.b64encode(text.encode()).decode())
    Image.new("RGB", (8, 8)).save(tmp_path / "word.png", pnginfo=info)
    with pytest.raises(UserError, match=r"word\.png"):
        formats.read(tmp_path / "word.png")


def test_no_name_leads_out_of_the_embeddings_folder(tmp_path, monkeypatch):
    """The same words for a file outside and for one that is not there. Links are the owner's: core reads them."""
    folder, outside = tmp_path / "embeddings", tmp_path / "outside.safetensors"
    (folder / "inside").mkdir(parents=True)
    outside.write_bytes(b"secret")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "own.safetensors").write_bytes(b"own")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(folder)])
    for name in (
        *("../outside.safetensors", str(outside), "inside/../../outside.safetensors", "missing.safetensors"),
        *("inside", "", "..", "../embeddings2/x.pt"),
    ):
        with pytest.raises(UserError, match=r"There is no .* in the embeddings folder: choose another file"):
            embedding_file(name)
    for name, content in (
        ("own.safetensors", b"own"),
        ("inside/../own.safetensors", b"own"),
        ("link.safetensors", b"secret"),
    ):
        assert embedding_file(name).read_bytes() == content


def test_damaged_files():
    """A short run of fuzz_formats.py; docs/formats.md names the long one."""
    script = Path(__file__).with_name("fuzz_formats.py")
    command = [sys.executable, str(script), "--examples", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert "errors" in done.stdout


@pytest.mark.parametrize("name", MAKERS)
def test_hostile_files_take_neither_time_nor_memory(name, tmp_path):
    """With limits that the operating system enforces; the memory is what the reading process had at most."""
    path = tmp_path / "word.pt"
    path.write_bytes(MAKERS[name]())
    found = measured(path, formats.read, UserError)
    assert found.said == "read" or found.said.startswith("word.pt "), found.said
    assert "\n" not in found.said
    assert len(found.said) < 400
    assert found.seconds < CPU_SECONDS
    assert found.memory < MEMORY * 2 // 3


def test_an_honest_file_after_a_bad_one(tmp_path):
    """torch.load once kept what it forgave in a file that then failed, and the next file failed for it."""
    (tmp_path / "good.pt").write_bytes(torch_file({"*": torch.ones(1, 8)}))
    for name in ("sparse tensor", "bytearray(8 GiB)", "name is nested tuples"):
        (tmp_path / "bad.pt").write_bytes(MAKERS[name]())
        with pytest.raises(UserError):
            formats.read(tmp_path / "bad.pt")
        assert formats.read(tmp_path / "good.pt").vectors["*"].eq(1).all()


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, ("x",), None, True, 10**400, float("inf"), "x" * 5000, b"abc"])
def test_only_short_notes_are_taken(value, tmp_path):
    content = {"string_to_param": {"*": torch.ones(1, 8)}, "name": value, "step": value, "sd_checkpoint_name": value}
    torch.save(content, tmp_path / "word.pt")
    try:
        found = formats.read(tmp_path / "word.pt")
    except UserError as error:
        assert "LONG4" in str(error) or isinstance(value, bytes | int)  # noqa: PT017
        return
    assert found.trigger == "word"
    assert all(len(note) < 1000 for note in found.metadata.values())


def test_damaged_card(tmp_path):
    """One changed digit is found by the checksum of the chunk."""
    (path,) = formats.write_new(Embedding("w", {"clip_l": torch.rand(1, 8)}), tmp_path, "word", "png-card")
    data = bytearray(path.read_bytes())
    data[data.index(PNG_TEXT.encode()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged, and its embedding with it"):
        formats.read(path)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt, packed", "behind the picture"])
def test_every_kind_of_text_in_a_picture(kind, tmp_path):
    text = base64.b64encode(json.dumps({"*": {"TORCHTENSOR": [[1.0, 2.0]]}}).encode()).decode()
    info, path = PngInfo(), tmp_path / "word.png"
    if kind.startswith("iTXt"):
        info.add_itxt(PNG_TEXT, text, "en", "translated", zip=kind.endswith("packed"))
    else:
        info.add_text(PNG_TEXT, text, zip=kind == "zTXt")
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    if kind.startswith("behind"):
        data = path.read_bytes()
        start, end = data.index(b"tEXt") - 4, data.index(b"IDAT") - 4
        path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert torch.equal(formats.read(path).vectors["*"], torch.tensor([[1.0, 2.0]]))
