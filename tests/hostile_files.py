"""Small files that once took gigabytes, minutes or the next honest file with them; and what reading them takes.

`python tests/hostile_files.py FOLDER` writes them; `measured` reads one in a process of its own.
"""

import base64
import io
import os
import pickle
import resource
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch._utils import _rebuild_sparse_tensor

CPU_SECONDS, MEMORY = 2, 300 * 2**20
MAGIC = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def torch_zip(pickled: bytes, records: dict[str, bytes] = {}, comment: bytes = b"", compression=zipfile.ZIP_STORED):  # noqa: B006
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, record in records.items():
            archive.writestr(f"archive/data/{name}", record)
        archive.comment = comment
    return data.getvalue()


def legacy(pickled: bytes, rest: bytes = pickle.dumps([], 2)) -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in MAGIC) + pickled + rest


def dumped(content) -> bytes:
    return pickle.dumps(content, 2)


def nested_tuples(as_key: bool, depth: int = 40) -> bytes:
    """A dictionary with a tuple of a tuple of ... each holding the one before twice, as key or value."""
    code = b"\x80\x02}(U\x01x](K\x01\x85q\0"
    code += b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(depth)) + b"e"
    last = b"h%c" % depth
    return code + (last + b"K\x01" if as_key else b"U\x04name" + last) + b"u."


def storage(kind: str, key: str, count: int) -> bytes:
    """A persistent id of a storage, as opcodes."""
    number = b"\x8a\x08" + struct.pack("<q", count)
    return b"(U\x07storagectorch\n" + kind.encode() + b"\nU%c%sU\x03cpu" % (len(key), key.encode()) + number


def tensor(stored: bytes, offset: int, shape: tuple, strides: tuple) -> bytes:
    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    view = b"\x8a\x08" + struct.pack("<q", offset) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + view + b"\x89}tR"


def huge_views(shape: tuple, strides: tuple, count: int, tensors: int = 1) -> bytes:
    code = b"\x80\x02}("
    for number in range(tensors):
        code += b"U\x02w%c" % (65 + number)
        code += tensor(storage("FloatStorage", "0", count) + b"tQ", 0, shape, strides)
    return torch_zip(code + b"u.", {"0": bytes(4 * count)})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8, color: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def picture(width: int, height: int) -> bytes:
    return chunk(b"IDAT", zlib.compress(bytes((3 * width + 1) * height), 9))


def card(text: bytes) -> bytes:
    return png(chunk(b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(base64.b64encode(text), 9)), picture(8, 8))


def animated(frames: int) -> bytes:
    """Frames of a picture of 2000 x 2000 pixels, of which each is 12 MB."""
    pixels = zlib.compress(bytes(6001 * 2000), 9)
    parts = [chunk(b"acTL", struct.pack(">II", frames, 0)), chunk(b"IDAT", pixels)]
    for number in range(frames):
        parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * number, 2000, 2000, 0, 0, 1, 10, 0, 0)))
        parts.append(chunk(b"fdAT", struct.pack(">I", 2 * number + 1) + pixels))
    return png(*parts, chunk(b"tEXt", b"note\0x"), width=2000, height=2000)


def safetensors_with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def many_entries() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"a/{number}", b"")
    return data.getvalue()


def overlapping() -> bytes:
    """Sixteen names for one record of 8 MB."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(8 * 2**20))
        for number in range(1, 64):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            whole = archive.getinfo("archive/data/0")
            entry.header_offset, entry.CRC = whole.header_offset, whole.CRC
            entry.file_size = entry.compress_size = whole.file_size
            archive.filelist.append(entry)
    return data.getvalue()


HUGE, LARGE = 8 * 2**30, 2 * 2**30
MAKERS: dict[str, Callable[[], bytes]] = {
    "comment that hides an archive": lambda: torch_zip(dumped(bytes(2**20)), comment=b"PK\5\6" + b"\0" * 6),
    "comment and a deflated bomb": lambda: torch_zip(
        dumped(bytes(2**27)), comment=b"PK\5\6" + b"\0" * 6, compression=zipfile.ZIP_DEFLATED
    ),
    "deflated": lambda: torch_zip(dumped(bytes(2**27)), compression=zipfile.ZIP_DEFLATED),
    "bytearray(8 GiB)": lambda: torch_zip(dumped(Call(bytearray, HUGE))),
    "bytearray(8 GiB), legacy": lambda: legacy(dumped(Call(bytearray, HUGE))),
    "Counter(bytearray(2 GiB))": lambda: torch_zip(dumped(Call(Counter, Call(bytearray, LARGE)))),
    "OrderedDict(bytearray)": lambda: torch_zip(dumped(Call(OrderedDict, Call(bytearray, LARGE)))),
    "codecs punycode": lambda: torch_zip(dumped(Call(__import__("_codecs").encode, "é" * 40_000, "punycode"))),
    "codecs idna": lambda: torch_zip(dumped({"a": Call(__import__("_codecs").encode, "é" * 40_000, "idna")})),
    "name is nested tuples": lambda: torch_zip(nested_tuples(False)),
    "key is nested tuples": lambda: torch_zip(nested_tuples(True)),
    "nested tuples, legacy": lambda: legacy(nested_tuples(True)),
    "sparse tensor": lambda: torch_zip(dumped({"*": Call(_rebuild_sparse_tensor, torch.sparse_coo, ((), (), 1))})),
    "storage of 8 GiB, legacy": lambda: legacy(
        b"\x80\x02" + tensor(storage("FloatStorage", "0", LARGE) + b"NtQ", 0, (1, 768), (768, 1)) + b".",
        dumped(["0"]) + struct.pack("<q", LARGE),
    ),
    "one number seen as terabytes": lambda: huge_views((2**20, 2**20), (0, 0), 1),
    "one number seen as 128 MB": lambda: huge_views((1024, 32_768), (0, 0), 1),
    "16 views of 8 MB": lambda: huge_views((1024, 2048), (2048, 1), 2**21, 16),
    "a view behind the end": lambda: huge_views((1, 768), (2**40, 2**40), 768),
    "memo 2^32": lambda: torch_zip(b"\x80\x02}r\xff\xff\xff\xff."),
    "long text that is not there": lambda: torch_zip(b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x."),
    "bytearray8": lambda: torch_zip(b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"x."),
    "four million opcodes": lambda: torch_zip(b"\x80\x02" + b"N" * 2**22 + b"."),
    "four million marks": lambda: torch_zip(b"\x80\x02" + b"(" * 2**22 + b"."),
    "a number of four million bytes": lambda: torch_zip(b"\x80\x02}U\x04step\x8b\0\0\x40\0" + b"\x7f" * 2**22 + b"s."),
    "20,000 entries": many_entries,
    "64 names for one record": overlapping,
    "animated picture": lambda: animated(100),
    "animated picture without end": lambda: animated(1000),
    "picture of 60000 x 60000": lambda: png(chunk(b"IDAT", zlib.compress(bytes(10**6))), width=60_000, height=60_000),
    "picture of 9 megapixels": lambda: png(picture(3000, 3000), width=3000, height=3000),
    "picture of 60 megapixels": lambda: png(picture(10_000, 6), width=10_000, height=6_000),
    "text of 100 MB": lambda: png(
        chunk(b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(b"A" * 100 * 2**20, 9)), picture(8, 8)
    ),
    "100,000 chunks": lambda: png(*[chunk(b"tEXt", b"") for _ in range(10**5)]),
    "a card of brackets": lambda: card(b"[" * 10**7),
    "a card of empty lists": lambda: card(b"[" + b"[]," * 10**7 + b"1]"),
    "a card of empty objects": lambda: card(b"[" + b"{}," * 10**7 + b"1]"),
    "a card of numbers": lambda: card(b'{"string_to_param":{"*":{"TORCHTENSOR":[[' + b"1," * 10**7 + b"1]]}}}"),
    "a card of one long number": lambda: card(b'{"string_to_param":{"*":{"TORCHTENSOR":[[' + b"1" * 10**7 + b"]]}}}"),
    "header of 2^60 bytes": lambda: struct.pack("<Q", 2**60) + b"{}" + bytes(100),
    "header of 8 MB of notes": lambda: safetensors_with_header(
        b'{"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(500_000)) + b"}}"
    ),
    "header of 100,000 tensors": lambda: safetensors_with_header(
        b"{" + b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(100_000)) + b"}"
    ),
    "200,000 notes": lambda: save({"clip_l": torch.ones(1, 8)}, {f"{n:x}": "" for n in range(200_000)}),
    "16 tensors of 8 MB": lambda: save({f"a{n}": torch.zeros(1024, 2048) for n in range(16)}),
}


class Measured(NamedTuple):
    seconds: float
    """of the CPU"""
    memory: int
    """Bytes beyond what the process had before."""
    said: str
    """The error, or "read"."""


def measured(path: Path, read: Callable[[Path], object], error: type[Exception], limited: bool = True) -> Measured:
    """Reads a file in a fork of this process, which the operating system stops at the limits."""
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins now
            before = peak()
            if limited:
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            try:
                read(path)
                said = "read"
            except error as known:
                said = str(known)
                if isinstance(known.__cause__, MemoryError):
                    said = "MemoryError"
            except BaseException:
                said = traceback.format_exc()[-500:]
            os.write(into, f"{peak() - before} {said}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(into)
    started = time.monotonic()
    with os.fdopen(out, "rb") as pipe:
        memory, _, said = pipe.read().decode().partition(" ")
    _, status, usage = os.wait4(child, 0)
    if status:
        said = f"killed by signal {os.WTERMSIG(status)} after {time.monotonic() - started:.1f} s"
    return Measured(usage.ru_utime + usage.ru_stime, int(memory or 0), said)


def peak() -> int:
    """The most memory that this process had at a time, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    for file_name, make in MAKERS.items():
        (Path(sys.argv[1]) / file_name.replace("/", "-")).write_bytes(make())
