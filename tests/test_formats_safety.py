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
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import folder_paths
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ti_pack.nodes.files import embedding_file  # pyright: ignore[reportMissingImports]  made by conftest.py
from torch._utils import _rebuild_parameter

from textual_inversion import UserError, formats
from textual_inversion.containers import PNG_TEXT


class Reduces:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def as_torch_zip(
    path: Path,
    pickled: bytes,
    compression: int = zipfile.ZIP_STORED,
    records: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, data in records.items():
            archive.writestr(f"archive/data/{name}", data)


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
@pytest.mark.parametrize("container", ["zip", "bare"])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_pickle_runs_code(name, container, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, pickled = tmp_path / "word.pt", pickle.dumps(ATTACKS[name], protocol)
    as_torch_zip(path, pickled) if container == "zip" else path.write_bytes(pickled)
    with pytest.raises(
        UserError, match=r"word\.pt (was not opened: it is broken, or contains more than numbers|cannot be read)"
    ):
        formats.read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["word.pt"]


def test_global_by_hand(tmp_path, monkeypatch):
    """``builtins.eval`` through GLOBAL and REDUCE, as no pickler would write it."""
    monkeypatch.chdir(tmp_path)
    opcodes = b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", 30) + b"open('%s', 'w') " % MARK.encode()[:13]
    as_torch_zip(tmp_path / "word.pt", opcodes.ljust(40) + b"\x85R.")
    with pytest.raises(UserError):
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
    as_torch_zip(tmp_path / "word.pt", pickled, records={"0": torch.ones(4, 4).numpy().tobytes()})
    with pytest.raises(UserError):
        formats.read(tmp_path / "word.pt")


def test_one_number_seen_as_terabytes(tmp_path):
    torch.save({"*": torch.ones(1, 1).expand(2**20, 2**20)}, tmp_path / "word.pt")
    with pytest.raises(UserError, match="not an embedding"):
        formats.read(tmp_path / "word.pt")


def test_compressed_and_escaping_archives_are_not_opened(tmp_path):
    as_torch_zip(tmp_path / "bomb.pt", pickle.dumps(bytes(50_000_000), 2), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        formats.read(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "slip.pt", "w") as archive:
        archive.writestr("../../outside", b"x")
    with pytest.raises(UserError, match=r"contains the path '\.\./\.\./outside'"):
        formats.read(tmp_path / "slip.pt")


def test_safetensors_header_that_lies(tmp_path):
    for length, header in (
        (2**60, b"{}"),
        (64, b'{"clip_l":{"dtype":"F32","shape":[1099511627776,768],"data_offsets":[0,4]}}'),
    ):
        (tmp_path / "word.safetensors").write_bytes(struct.pack("<Q", length) + header.ljust(80) + bytes(4))
        with pytest.raises(UserError, match="cannot be read"):
            formats.read(tmp_path / "word.safetensors")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


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
    folder, outside = tmp_path / "embeddings", tmp_path / "outside.safetensors"
    folder.mkdir()
    outside.write_bytes(b"secret")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "own.safetensors").write_bytes(b"own")
    (folder / "near.safetensors").symlink_to("own.safetensors")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(folder)])
    for name, cause in (("link.safetensors", "a link "), ("../outside.safetensors", ""), (str(outside), "")):
        with pytest.raises(UserError, match=f"is {cause}outside the embeddings folder; copy the file there"):
            embedding_file(name)
    with pytest.raises(UserError, match="There is no"):
        embedding_file("missing.safetensors")
    for name in ("own.safetensors", "near.safetensors"):
        assert embedding_file(name).read_bytes() == b"own"


def test_damaged_files():
    """A short run of fuzz_formats.py; docs/formats.md names the long one."""
    script = Path(__file__).with_name("fuzz_formats.py")
    command = [sys.executable, str(script), "--examples", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert "errors" in done.stdout
