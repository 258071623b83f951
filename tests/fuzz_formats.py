"""Reads thousands of damaged embedding files: `python tests/fuzz_formats.py [--examples 4000]`, examples of each kind.

Half have changed bytes; half are changed in their structure (opcodes of a pickle, members of an archive, a header,
parts of a picture) and put together again with right lengths and checksums. Each must give an embedding or one clear
error within 2 s of CPU and 300 MB, which the operating system enforces: no code run, no hang, no crash.
"""

import argparse
import io
import json
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from hostile_files import CPU_SECONDS, MEMORY, chunk
from test_formats import WRITERS, vectors

from textual_inversion import Embedding, UserError, formats

ALARMING = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.",
    "socket.",
    "shutil.",
    "exec",
)
NUMBERS = (0, 1, -1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1)
OPCODES = [
    *(b"(", b"t", b"l", b"d", b"}", b"]", b")", b"0", b"1", b"2", b"N", b".", b"R", b"b", b"\x81", b"Q", b"s", b"u"),
    *(
        b"a",
        b"e",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x90",
        b"\x91",
        b"\x93",
        b"\x94",
        b"h\0",
        b"h\1",
        b"h\2",
        b"q\0",
        b"q\1",
    ),
    *(b"cbuiltins\nbytearray\n", b"cbuiltins\neval\n", b"cos\nsystem\n", b"ccollections\nCounter\n"),
    *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"),
    *(
        b"c_codecs\nencode\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch.nn.modules.container\nParameterDict\n",
        b"cnumpy\ndtype\n",
    ),
    *(b"\x8a\x08" + struct.pack("<q", number) for number in NUMBERS),
    *(b"U\x04name", b"U\x04step", b"U\x0fstring_to_param", b"U\x01*", b"U\x08punycode"),
]


def kinds(folder: Path) -> dict[str, bytes]:
    """A small valid file of every kind: mostly structure, few numbers."""
    files = {}
    for name, (encoders, suffix, write) in WRITERS.items():
        path = folder / f"{len(files)}{suffix}"
        arguments = (20,) if name == "A1111 pixels" else ()
        write(path, vectors(dict.fromkeys(encoders, 4)), *arguments)
        files[name] = path.read_bytes()
    word = Embedding("w", {"clip_l": torch.ones(1, 4)})
    for format in formats.FORMATS:
        (path,) = formats.write(word, folder / f"{format}{formats.FORMATS[format].suffix}", format)
        files[f"our {format}"] = path.read_bytes()
    return files


# Damage ------------------------------------------------------------------------------------------


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start, length = draw.randrange(len(result) + 1), draw.randint(0, 8)
        match draw.choice(("change", "change", "cut", "insert", "repeat", "truncate")):
            case "change":
                result[start : start + length] = draw.randbytes(length)
            case "cut":
                del result[start : start + length]
            case "insert":
                result[start:start] = draw.randbytes(length)
            case "repeat":
                result[start:start] = result[start : start + length] * draw.randint(1, 50)
            case "truncate":
                del result[start:]
    return bytes(result)


def list_changed(parts: list, draw: random.Random, new: Callable[[], object]) -> list:
    """Some parts left out, doubled, exchanged, repeated very often, or replaced by new ones."""
    parts = list(parts)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(parts) + 1)
        match draw.choice(("cut", "double", "move", "many", "new", "replace")):
            case "cut":
                del parts[at : at + 1]
            case "double" | "many" as often:
                parts[at:at] = parts[at : at + draw.randint(1, 6)] * (draw.randint(10, 300) if often == "many" else 1)
            case "move":
                part = parts[at : at + 1]
                del parts[at : at + 1]
                to = draw.randrange(len(parts) + 1)
                parts[to:to] = part
            case "new":
                parts.insert(at, new())
            case "replace":
                parts[at : at + 1] = [new()]
    return parts


def pickle_changed(data: bytes, draw: random.Random) -> bytes:
    """The first pickle in ``data``, opcode by opcode; what follows stays."""
    starts = [position or 0 for _, _, position in pickletools.genops(data)]
    end = starts[-1] + 1  # behind STOP
    opcodes = [data[start:stop] for start, stop in zip(starts, [*starts[1:], end], strict=True)]
    changed = list_changed(opcodes[1:-1], draw, lambda: draw.choice(OPCODES))
    return opcodes[0] + b"".join(changed) + opcodes[-1] + data[end:]


def legacy_changed(data: bytes, draw: random.Random) -> bytes:
    """One of the five pickles of a file without an archive."""
    start = 0
    for _ in range(draw.choice((0, 1, 2, 3, 3, 3, 3, 4))):
        start += max(position or 0 for _, _, position in pickletools.genops(data[start:])) + 1
    return data[:start] + pickle_changed(data[start:], draw)


def archive_changed(data: bytes, draw: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    root = members[0][0].partition("/")[0]
    if draw.random() < 0.7:
        members = [(n, pickle_changed(d, draw) if n.endswith("data.pkl") else d) for n, d in members]
    else:
        names = [f"{root}/data/0", f"{root}/data.pkl", "../x", f"{root}/data/../../x", "/x", f"{root}2/data.pkl"]
        members = list_changed(members, draw, lambda: (draw.choice(names), draw.randbytes(draw.randint(0, 64))))
    result = io.BytesIO()
    kind = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(result, "w", kind) as archive:
        for name, member in members:
            archive.writestr(name, member)
        archive.comment = draw.choice((b"", b"", b"", b"x", b"PK\5\6" + bytes(6), b"PK\5\6" + bytes(18)))
    return result.getvalue()


def value_changed(value, draw: random.Random):
    """Some place in a JSON value."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.2:
            return {draw.choice(("*", "clip_l", "TORCHTENSOR", "string_to_param", "x" * 300)): value[key], **value}
        return {**value, key: value_changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], value_changed(value[at], draw), *value[at + 1 :]]
    return draw.choice(
        (None, True, "", "F32", "x" * 5000, [], {}, [[]], {"a": 1}, 1e308, float("nan"), [value] * 50, *NUMBERS)
    )


def header_changed(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(value_changed(json.loads(data[8 : 8 + length]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def picture_changed(data: bytes, draw: random.Random) -> bytes:
    chunks, position = [], 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += length + 12
    kinds = (b"IHDR", b"IDAT", b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fdAT", b"IEND", b"PLTE", b"iCCP")
    texts = (
        b"",
        b"sd-ti-embedding\0",
        b"sd-ti-embedding\0\0",
        b"sd-ti-embedding\0\1\0\0\0" + zlib.compress(b"[" * 999),
    )

    def new() -> tuple[bytes, bytes]:
        return draw.choice(kinds), draw.choice(texts) + draw.randbytes(draw.randint(0, 30))

    if draw.random() < 0.3:
        at = draw.randrange(len(chunks))
        kind, inside = chunks[at]
        chunks[at] = draw.choice((kind, draw.choice(kinds))), bytes_changed(inside, draw)
    else:
        chunks = list_changed(chunks, draw, new)
    return data[:8] + b"".join(chunk(kind, inside) for kind, inside in chunks)


def structure_changed(data: bytes, draw: random.Random) -> bytes:
    if data.startswith(b"PK"):
        return archive_changed(data, draw)
    if data.startswith(b"\x89PNG"):
        return picture_changed(data, draw)
    return header_changed(data, draw) if data[8:9] == b"{" else legacy_changed(data, draw)


# Reading -----------------------------------------------------------------------------------------


class Examiner:
    """Counts what reading damaged files led to; raises what it must never lead to."""

    def __init__(self, path: Path) -> None:
        self.path, self.reading, self.embeddings, self.errors, self.slowest = path, False, 0, 0, 0.0
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple) -> None:
        # Python's own modules, a rare text encoding for one, may be imported while a file is read.
        imported = event == "exec" and arguments[0].co_filename.startswith(sys.base_prefix)
        if self.reading and event.startswith(ALARMING) and not imported:
            raise SystemExit(f"reading a file led to {event}{arguments}")

    def examine(self, content: bytes) -> None:
        self.path.write_bytes(content)
        began = time.process_time()
        limit_cpu(began + CPU_SECONDS)
        self.reading = True
        try:
            word = formats.read(self.path)
        except UserError as error:
            self.errors += 1
            if isinstance(error.__cause__, MemoryError):
                raise SystemExit(f"more than {MEMORY} bytes of memory: see {self.path}") from error
            if self.path.name not in str(error) or len(str(error)) > 1000:
                raise SystemExit(f"an error without the file's name, or too long: {error}") from error
            return
        finally:
            self.reading = False
            self.slowest = max(self.slowest, time.process_time() - began)
        self.embeddings += 1
        for matrix in word.vectors.values():
            assert matrix.ndim == 2
            assert torch.isfinite(matrix).all()


def limit_cpu(seconds: float) -> None:
    """The operating system ends this process when it has used more, rounded up to whole seconds."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Duplicate name")
    with tempfile.TemporaryDirectory() as folder:
        files = kinds(Path(folder))
        examiner = Examiner(Path(folder) / "damaged")
        for data in files.values():  # imports what reading needs
            examiner.path.write_bytes(data)
            formats.read(examiner.path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for name, data in files.items():
            draw, embeddings, began = random.Random(f"{args.seed} {name}"), examiner.embeddings, time.monotonic()
            for number in range(args.examples):
                examiner.examine((bytes_changed if number % 2 else structure_changed)(data, draw))
            read = examiner.embeddings - embeddings
            print(f"{name}: {args.examples} in {time.monotonic() - began:.1f} s, {read} read", flush=True)
    seen = examiner.embeddings + examiner.errors
    print(f"{seen} files: {examiner.embeddings} embeddings, {examiner.errors} errors, slowest {examiner.slowest:.2f} s")


if __name__ == "__main__":
    main()
