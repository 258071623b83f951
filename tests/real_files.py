"""Reads a folder of other people's embeddings: `python tests/real_files.py FOLDER`.

Each file is compared with an independent reader (PyTorch's or safetensors' own), written in every format that can hold
it, read back and compared again. Prints what failed, and counts.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from textual_inversion import Embedding, UserError, formats
from textual_inversion.embedding import with_guessed_encoders

SUFFIXES = (".pt", ".bin", ".safetensors", ".png")


def tensors_in(content) -> list[torch.Tensor]:
    """Every matrix of floats in nested dictionaries and lists."""
    if torch.is_tensor(content):
        rows = content.detach().float()
        return [rows.reshape(-1, rows.shape[-1])] if content.is_floating_point() and content.ndim else []
    if isinstance(content, torch.nn.ParameterDict):
        content = content.__dict__["_parameters"] or dict(content.items())  # the first as PyTorch 1 saved it
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [rows for value in values for rows in tensors_in(value)]


def by_others(path: Path) -> list[torch.Tensor] | None:
    """The vectors by the libraries themselves; None where only A1111 has a reader."""
    try:
        return tensors_in(dict(load_file(path)))
    except Exception:
        try:
            allowed = [torch.nn.ParameterDict, torch.nn.modules.container.ParameterDict, set]
            with torch.serialization.safe_globals(allowed):
                return tensors_in(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception:
            return None


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(any(torch.equal(one, other) for other in others) for one in ours)


def converted(word: Embedding, folder: Path) -> str:
    """The formats that gave back other vectors."""
    failed = []
    word = with_guessed_encoders(word)
    for format in formats.FORMATS:
        try:
            files = formats.write_new(word, folder, "word", format)
        except UserError:  # a format for one text encoder
            continue
        again = [rows for file in files for rows in formats.read(file).vectors.values()]
        if len(again) != len(word.vectors) or not same(again, list(word.vectors.values())):
            failed.append(format)
    return ", ".join(failed)


def result(path: Path) -> str:
    """In a few words; "equal" where all is well."""
    others = by_others(path)
    try:
        words = formats.read_all(path)
    except UserError as error:
        readable = others and all(len(rows) <= 1024 for rows in others)
        return f"{'REFUSED, others read it' if readable else 'refused'}: {str(error).removeprefix(path.name)}"
    if others is not None and not all(same(list(word.vectors.values()), others) for word in words):
        return "DIFFERENT from the independent reader"
    with tempfile.TemporaryDirectory() as folder:
        failed = ", ".join(filter(None, (converted(word, Path(folder)) for word in words)))
    return f"DIFFERENT after conversion: {failed}" if failed else "equal" if others else "equal, no other reader"


def main() -> None:
    counts: Counter[str] = Counter()
    for path in sorted(Path(sys.argv[1]).rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found = result(path)
            counts[found.partition(":")[0]] += 1
            if not found.startswith("equal"):
                print(f"{path.relative_to(sys.argv[1])}: {found}")
    print(", ".join(f"{number} {what}" for what, number in counts.most_common()))


if __name__ == "__main__":
    main()
