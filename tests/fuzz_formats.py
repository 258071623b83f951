"""Reads thousands of damaged embedding files: `python tests/fuzz_formats.py [--examples 10000]`, examples of each kind.

Each must give an embedding or one clear error: no code run, no hang, no crash, no memory taken.  Runs
in a process of its own, so that a crash and the memory limit show.
"""

import argparse
import resource
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import WRITERS, vectors

from textual_inversion import Embedding, UserError, formats

MEMORY = 1 << 30  # bytes beyond what the process has when it starts
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


@st.composite
def damaged(draw, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(result) - 1)))
        length = draw(st.integers(0, 8))
        match draw(st.sampled_from(("change", "change", "cut", "insert", "repeat", "truncate"))):
            case "change":
                result[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del result[start : start + length]
            case "insert":
                result[start:start] = draw(st.binary(max_size=8))
            case "repeat":
                result[start:start] = result[start : start + length] * draw(st.integers(1, 50))
            case "truncate":
                del result[start:]
    return bytes(result)


class Examiner:
    """Counts what reading damaged files led to; raises what it must never lead to."""

    def __init__(self, path: Path) -> None:
        self.path, self.reading, self.embeddings, self.errors = path, False, 0, 0
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple) -> None:
        # Python's own modules, a rare text encoding for one, may be imported while a file is read.
        imported = event == "exec" and arguments[0].co_filename.startswith(sys.base_prefix)
        if self.reading and event.startswith(ALARMING) and not imported:
            raise SystemExit(f"reading a file led to {event}{arguments}")

    def examine(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.reading = True
        try:
            word = formats.read(self.path)
        except UserError as error:
            self.errors += 1
            if self.path.name not in str(error):
                raise SystemExit(f"an error without the file's name: {error}") from error
            return
        finally:
            self.reading = False
        self.embeddings += 1
        for matrix in word.vectors.values():
            assert matrix.ndim == 2
            assert torch.isfinite(matrix).all()


def fuzz(examiner: Examiner, data: bytes, examples: int, seconds: float) -> None:
    end = time.monotonic() + seconds

    @settings(
        max_examples=examples,
        deadline=timedelta(seconds=5),
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]  an enum by its own metaclass
    )
    @given(damaged(data))
    def examine(content: bytes) -> None:
        if time.monotonic() < end:
            examiner.examine(content)

    examine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3600, help="of each kind at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = kinds(Path(folder))
        examiner = Examiner(Path(folder) / "damaged")
        for data in files.values():  # imports what reading needs
            examiner.path.write_bytes(data)
            formats.read(examiner.path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for name, data in files.items():
            before, started = examiner.embeddings + examiner.errors, time.monotonic()
            fuzz(examiner, data, args.examples, args.seconds)
            seen = examiner.embeddings + examiner.errors - before
            print(f"{name}: {seen} in {time.monotonic() - started:.1f} s", flush=True)
    print(f"{examiner.embeddings} embeddings, {examiner.errors} errors")


if __name__ == "__main__":
    main()
