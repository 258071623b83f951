"""Embedding files of every tool: recognised by content, read without running code, written and read back.

docs/formats.md lists who writes what. ``read`` keeps the keys of the file;
``Embedding.for_encoders`` finds the text encoder that each belongs to.
"""

import base64
import io
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import Tensor

from .containers import (
    BUNDLE,
    FLOATS,
    INNER_NAME,
    MAX_JSON_NUMBERS,
    PNG_TEXT,
    Content,
    card_text,
    check_shape,
    open_file,
)
from .embedding import ENCODERS, Embedding, ordered, with_guessed_encoders
from .errors import UserError, listed
from .prompts import RESERVED_NAMES, usable_trigger

ENCODER_ALIASES = {"t5": "t5xxl"}
# Keys that are no word: the layouts of other programs.
MOST_PIXELS = 4096  # a side
USAGE = "Write embedding: and the name of this file in prompts."
# The names that ModelSpec has for families, by their text encoders.
ARCHITECTURES = {
    frozenset({"clip_l"}): "stable-diffusion-v1",
    frozenset({"clip_h"}): "stable-diffusion-v2-768-v",
    frozenset({"clip_l", "clip_g"}): "stable-diffusion-xl-v1-base",
    frozenset({"clip_l", "clip_g", "t5xxl"}): "stable-diffusion-3",
    frozenset({"clip_l", "t5xxl"}): "flux-1",
}
GENERIC_KEYS = {"", "*", "emb_params", "emp_params", "string_to_param.*"}
GENERIC_KEYS |= {"emb", "emb2", "text_encoders_0", "text_encoders_1", "text_encoders_2"}
MAX_NAME = 225  # bytes of a file name: with a number and a suffix, file systems take 255


# Reading -----------------------------------------------------------------------------------------


def read(path: Path, trigger: str = "", encoders: Collection[str] = ENCODERS) -> Embedding:
    """Reads an embedding; ``trigger`` chooses one where a file holds several.

    The word is that of the file's name, as in ComfyUI, A1111 and InvokeAI; what another program called it inside
    is in the metadata, ``inner name``. Files of this pack keep the word that they were trained with.
    Keys that are not among ``encoders`` are listed in ``unnamed``.
    The metadata key ``left out`` names vectors that are not token embeddings.

    Raises UserError, naming what is in the file, for a file that is not an embedding.
    """
    tensors, metadata = _content(path)
    words = _by_word(tensors, encoders)
    if trigger in words:
        word = trigger
    elif len(words) == 1:
        word = next(iter(words))
    else:
        raise UserError(f"{path.name} contains the embeddings {listed(words)}: choose one of them.")
    return _embedding(path, word, words[word], metadata, encoders)


def read_all(path: Path, encoders: Collection[str] = ENCODERS) -> list[Embedding]:
    """As ``read``, every embedding of a file: one, or several words in the order of the file."""
    tensors, metadata = _content(path)
    words = _by_word(tensors, encoders)
    return [_embedding(path, word, vectors, dict(metadata), encoders) for word, vectors in words.items()]


def _content(path: Path) -> Content:
    if path.exists() and not path.is_file():  # nobody may ever write to a pipe
        raise UserError(f"{path.name} is not a regular file: choose the file of an embedding.")
    return open_file(path)


def _embedding(
    path: Path, word: str, vectors: dict[str, Tensor], metadata: dict[str, str], encoders: Collection[str]
) -> Embedding:
    outputs = [key for key in vectors if _is_output(key, encoders)]
    if outputs:  # OneTrainer's vectors behind the text encoder: no prompt can carry them
        metadata["left out"] = ", ".join(outputs)
    vectors = {ENCODER_ALIASES.get(key, key): _matrix(key, t, path) for key, t in vectors.items() if key not in outputs}
    if not vectors:
        raise UserError(f"{path.name} contains no token vectors{', only ' + ', '.join(outputs) if outputs else ''}.")
    unnamed = [key for key in vectors if key not in encoders]
    inner = word or next((key for key in unnamed if key not in GENERIC_KEYS), "")
    if inner:
        metadata[INNER_NAME] = inner
    embedding = Embedding(_word(path, metadata, word), ordered(vectors), metadata, frozenset(unnamed))
    for key, value in _modelspec(embedding).items():  # written again with the file
        if metadata.get(key) == value:
            del metadata[key]
    return embedding


def _word(path: Path, metadata: dict[str, str], chosen: str) -> str:
    """The trigger of an embedding, usable in prompts; ``chosen`` is one of several words in a file."""
    inner = metadata.get(INNER_NAME, "")
    says_nothing = path.stem.startswith("learned_embeds")  # what diffusers' scripts call every file
    name = chosen or metadata.get("trigger") or (inner if says_nothing and inner not in GENERIC_KEYS else "")
    word = usable_trigger(name or path.stem)
    if metadata.get(INNER_NAME) in (word, *GENERIC_KEYS):
        metadata.pop(INNER_NAME)
    return word


def read_pair(first: Path, second: Path, encoders: Collection[str] = ENCODERS) -> Embedding:
    """The two files, one per text encoder, that diffusers' SDXL script writes for one trigger."""
    one, two = read(first, encoders=encoders), read(second, encoders=encoders)
    names = {key: f"{key} of {second.name}" if key in two.unnamed else key for key in two.vectors}
    others = {names[key]: tensor for key, tensor in two.vectors.items()}
    if one.vectors.keys() & others.keys():
        raise UserError(
            f"{first.name} and {second.name} have vectors for the same text encoder: choose the other file of the pair."
        )
    unnamed = one.unnamed.union(names[key] for key in two.unnamed)
    word = min(one.trigger, two.trigger, key=len)  # NAME, not NAME_2
    return Embedding(word, one.vectors | others, two.metadata | one.metadata, unnamed)


def read_whole(path: Path) -> Embedding:
    """As ``read``, with the second file beside it where diffusers' format wrote two."""
    second = path.with_name(f"{path.stem}_2{path.suffix}")
    return read_pair(path, second) if second.exists() and _are_pair(path, second) else read(path)


def _by_word(tensors: Mapping[str, Tensor], encoders: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Vectors by word and key; the word is "" where the file holds one embedding."""
    found: dict[str, dict[str, Tensor]] = {}
    widths = [tensor.shape[-1] for key, tensor in tensors.items() if not _is_layout(key, encoders)]
    are_words = len(widths) > len(set(widths))  # two keys of one width are not two text encoders
    for key, tensor in tensors.items():
        word = ""
        if key.startswith(BUNDLE):
            word, key = _bundled(key)
        elif are_words and not _is_layout(key, encoders):
            word = key
        found.setdefault(word, {})[key] = tensor
    return found


def _bundled(key: str) -> tuple[str, str]:
    """Word and key of an embedding in a LoRA file. The word may have dots, a key has them in one layout only."""
    text = key.removeprefix(BUNDLE)
    layout = next((name for name in GENERIC_KEYS if "." in name and text.endswith(f".{name}")), "")
    word, _, key = (text.removesuffix(f".{layout}"), "", layout) if layout else text.rpartition(".")
    return word, key


def _is_layout(key: str, encoders: Collection[str]) -> bool:
    """Whether a key says which vectors they are, instead of being a word."""
    return key in encoders or key in ENCODER_ALIASES or key in GENERIC_KEYS or _is_output(key, encoders)


def _is_output(key: str, encoders: Collection[str]) -> bool:
    name = key.removesuffix("_out")
    return name != key and _is_layout(name, encoders)


def _matrix(key: str, tensor: Tensor, path: Path) -> Tensor:
    """(width,) or (vectors, width) as float32 (vectors, width), all numbers finite."""
    check_shape(key, tuple(tensor.shape), tensor.dtype in FLOATS.values(), path)
    matrix = tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", torch.float32, copy=True)
    if not torch.isfinite(matrix).all():
        raise UserError(f"{path.name} is not a usable embedding: {key} contains NaN or infinite values.")
    return matrix.contiguous()


# Writing -----------------------------------------------------------------------------------------


class File(NamedTuple):
    """One file of a format: what is appended to the given name, its bytes, and its vectors."""

    name_suffix: str
    data: bytes
    vectors: list[Tensor]


def _comfyui(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    metadata = {**_modelspec(embedding), **embedding.metadata, "trigger": embedding.trigger}
    return [File("", save(embedding.vectors, metadata), list(embedding.vectors.values()))]


def _modelspec(embedding: Embedding) -> dict[str, str]:
    """What model libraries show of a file: the keys of Stability AI's ModelSpec 1.0.1."""
    about = {"title": embedding.trigger, "trigger_phrase": embedding.trigger, "usage_hint": USAGE}
    if family := ARCHITECTURES.get(frozenset(embedding.vectors)):
        about["architecture"] = f"{family}/textual-inversion"
    if size := _size(embedding.metadata.get("settings", "")):
        about["resolution"] = f"{size}x{size}"
    vectors, (steps, model) = embedding.count, (embedding.metadata.get(key) for key in ("steps", "base_model"))
    about["description"] = f"A textual inversion embedding of {vectors} vector{'s' if vectors > 1 else ''}"
    about["description"] += f", {steps} steps" * bool(steps) + f" on {model}" * bool(model) + "."
    return {"modelspec.sai_model_spec": "1.0.1"} | {f"modelspec.{key}": value for key, value in about.items()}


def _size(settings: str) -> int:
    """Pixels a side of the pictures that were trained on; 0 where the settings, which a file may hold, do not say."""
    try:
        size = json.loads(settings)["size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return size if type(size) is int and 0 < size <= MOST_PIXELS else 0


def _a1111(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    return [File("", _pickled(_a1111_content(embedding)), list(embedding.vectors.values()))]


def _diffusers(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    """One key, the word. SDXL: one file per encoder. With T5: the keys of the advanced scripts."""
    if _has_diffusers_token(embedding):
        token = diffusers_token(embedding.trigger)
        return [
            File(name_suffix, save({token: tensor}), [tensor])
            for name_suffix, tensor in zip(("", "_2"), embedding.vectors.values(), strict=False)
        ]
    their_keys = {ours: theirs for theirs, ours in ENCODER_ALIASES.items()}
    named = {their_keys.get(key, key): tensor for key, tensor in embedding.vectors.items()}
    return [File("", save(named), list(named.values()))]


def _concepts_library(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    """``learned_embeds.bin``; a single vector is stored with one dimension."""
    tensor = _single_encoder_vectors(embedding, "A file of the concepts library")
    content = {diffusers_token(embedding.trigger): tensor[0] if len(tensor) == 1 else tensor}
    return [File("", _pickled(content), [tensor])]


def _png(embedding: Embedding, picture: Image.Image | None) -> list[File]:
    numbers = sum(tensor.numel() for tensor in embedding.vectors.values())
    if numbers > MAX_JSON_NUMBERS:
        raise UserError(f"A picture cannot hold {numbers:,} numbers: choose the format comfyui, or take fewer vectors.")

    def plain(value: Any) -> dict:
        # The shortest text that is the same float32 again: half as long as that of the float64.
        return {"TORCHTENSOR": value.numpy().astype(str).astype(float).tolist()}

    text = PngInfo()
    text.add_text(PNG_TEXT, base64.b64encode(json.dumps(_a1111_content(embedding), default=plain).encode()).decode())
    data = io.BytesIO()
    (picture or Image.new("RGB", (512, 512), "gray")).save(data, "PNG", pnginfo=text)
    return [File("", data.getvalue(), list(embedding.vectors.values()))]


def _a1111_content(embedding: Embedding) -> dict[str, Any]:
    """What A1111 takes: of several text encoders the vectors alone, since it calls a tensor's method on all entries."""
    if len(embedding.vectors) > 1:
        return dict(embedding.vectors)
    steps = embedding.metadata.get("steps", "")
    # 265 is the token of "*", the place holder that A1111 and the first script write.
    param = next(iter(embedding.vectors.values()))
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": param},
        "name": embedding.trigger,
        "step": int(steps) if steps.isdecimal() and len(steps) < 10 else None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": embedding.metadata.get("base_model") or None,
    }


def _single_encoder_vectors(embedding: Embedding, what: str) -> Tensor:
    if len(embedding.vectors) > 1:
        raise UserError(
            f"{what} has vectors for only one text encoder; this embedding has {listed(embedding.vectors)}."
        )
    return next(iter(embedding.vectors.values()))


def _pickled(content: Any) -> bytes:
    """Not as a zip archive: A1111 refuses the members that PyTorch puts into its archives today."""
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def diffusers_token(trigger: str) -> str:
    """The word as diffusers must know it: ``<cat>`` for ``Cat``, ``<s*>`` for ``S*``.

    Its tokenizer makes prompts lower case before it looks for words of several vectors, and its loader refuses words
    that are in the vocabulary, such as cat and *. None there is in angle brackets.
    """
    word = unicodedata.normalize("NFC", trigger.lower())
    return word if re.fullmatch(r"<[^<>]+>", word) else f"<{word.strip('<>')}>"


def _has_diffusers_token(embedding: Embedding) -> bool:
    return set(embedding.vectors) <= {"clip_l", "clip_g"} or len(embedding.vectors) == 1


class Format(NamedTuple):
    suffix: str
    make_files: Callable[[Embedding, Image.Image | None], list[File]]
    stock_reads_it: bool = True
    """Whether ``embedding:NAME`` works without this pack, where the format has one file."""


FormatName = Literal["comfyui", "diffusers", "a1111", "concepts-library", "png-card"]
FORMATS: dict[FormatName, Format] = {
    "comfyui": Format(".safetensors", _comfyui),  # A1111, Forge, kohya and InvokeAI take it too
    "diffusers": Format(".safetensors", _diffusers),
    "a1111": Format(".pt", _a1111),
    "concepts-library": Format(".bin", _concepts_library),
    "png-card": Format(".png", _png, stock_reads_it=False),
}
SUFFIXES = {format.suffix for format in FORMATS.values()}
STOCK_SUFFIXES = (".safetensors", ".pt", ".bin")  # in the order in which ComfyUI looks for them


def prompt_hint(embedding: Embedding, format: FormatName) -> str:
    """What to write in the prompts of the program that a format is for, where that is not the trigger."""
    token = diffusers_token(embedding.trigger)
    if format not in ("diffusers", "concepts-library") or token == embedding.trigger:
        return ""
    if not _has_diffusers_token(embedding):
        return ""
    return f"In diffusers, write {token} in prompts."


def write(
    embedding: Embedding, path: Path, format: FormatName = "comfyui", picture: Image.Image | None = None
) -> list[Path]:
    """Writes the file or files of a format, ``path`` being the first, and replaces it; each is complete or not there.

    Each is read back and its vectors are compared before it gets its name. ``picture`` is what a PNG card shows.

    Raises UserError when the format cannot hold the embedding, as ``check_pair``, or when a file reads back
    differently: it is kept as ``NAME-unchecked``. OSError when the disk cannot.
    """
    files = _make_files(embedding, format, picture)
    targets = _targets(files, path)
    check_pair(targets)
    with _read_back(files, targets) as temporary:
        for source, target in zip(temporary, targets, strict=True):
            source.replace(target)
    return targets


def write_new(
    embedding: Embedding,
    folder: Path,
    name: str,
    format: FormatName = "comfyui",
    picture: Image.Image | None = None,
    is_taken: Callable[[str], bool] | None = None,
) -> list[Path]:
    """As ``write``, under the first of ``NAME``, ``NAME-2`` ... that is free: it never replaces a file.

    ``is_taken`` says of a name, which may have folders in it, whether an embedding has it; by default in ``folder``.
    Several processes may save the same name at once: each gets its own.

    Raises what ``write`` raises.
    """
    files, suffix = _make_files(embedding, format, picture), FORMATS[format].suffix
    is_taken = is_taken or partial(_is_in, folder)
    with _read_back(files, _targets(files, folder / f"{name}{suffix}")) as temporary:
        for number in count(1):
            stem = f"{name}-{number}" if number > 1 else name
            targets = _targets(files, folder / f"{stem}{suffix}")
            if not any(is_taken(f"{stem}{file.name_suffix}") for file in files) and _claim(targets):
                break
        try:
            for source, target in zip(temporary, targets, strict=True):
                source.replace(target)
        except BaseException:
            for target in targets:
                if target.stat().st_size == 0:  # claimed only
                    target.unlink()
            raise
    return targets


def paths_of(embedding: Embedding, path: Path, format: FormatName) -> list[Path]:
    """The files that ``write`` would write. Raises UserError when the format cannot hold the embedding."""
    return _targets(_make_files(embedding, format, None), path)


def check_pair(targets: list[Path]) -> None:
    """Raises UserError where one of these files of an embedding is there, but belongs to another one."""
    if first := _first_of(targets[0]):
        raise UserError(f"{targets[0].name} belongs to {first.name}: choose another name, or move these two files.")
    for target in targets[1:]:
        if target.exists() and not is_empty(target) and not _are_pair(targets[0], target):
            raise UserError(f"{target.name} is another embedding: choose another name, or move that file.")


def _make_files(embedding: Embedding, format: FormatName, picture: Image.Image | None) -> list[File]:
    return FORMATS[format].make_files(with_guessed_encoders(embedding.snapshot()), picture)


def _targets(files: list[File], path: Path) -> list[Path]:
    return [path.with_name(f"{path.name.removesuffix(path.suffix)}{file.name_suffix}{path.suffix}") for file in files]


@contextmanager
def _read_back(files: list[File], targets: list[Path]) -> Iterator[list[Path]]:
    """The files under temporary names, each read back and compared. What was not renamed is removed.

    Raises UserError for a file that reads back differently, and keeps it.
    """
    folder = targets[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = [folder / f"ti-{uuid4().hex}.tmp" for _ in files]
    try:
        for file, path, target in zip(files, temporary, targets, strict=True):
            path.write_bytes(file.data)
            if problem := _difference(path, file.vectors):
                raise UserError(f"{target.name} does not read back as written ({problem}); {_keep(path, target)}.")
        yield temporary
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _difference(path: Path, vectors: list[Tensor]) -> str:
    """What the vectors in a file differ in, whatever their keys; empty if they are the same."""
    try:
        again = [_matrix(key, tensor, path) for key, tensor in open_file(path)[0].items()]
    except (UserError, OSError) as error:
        return str(error).removeprefix(f"{path.name} ").rstrip(".")
    return "" if sorted(map(_bytes, again)) == sorted(map(_bytes, vectors)) else "other numbers came back"


def _keep(path: Path, target: Path) -> str:
    """Gives a file that did not read back a name of its own; says which, and what to do."""
    for number in count(1):
        kept = target.with_name(f"{target.stem}-unchecked{f'-{number}' if number > 1 else ''}{target.suffix}")
        if _claim([kept]):
            path.replace(kept)
            return f"it is kept as {kept.name}: save it again, in another format or on another disk"
    raise AssertionError("count() ended")


def _bytes(tensor: Tensor) -> bytes:
    return str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes()


# Names -------------------------------------------------------------------------------------------


def _claim(targets: list[Path]) -> bool:
    """Creates empty files of these names, all or none. False if one of them exists."""
    claimed: list[Path] = []
    try:
        for target in targets:
            target.open("x").close()
            claimed.append(target)
    except FileExistsError:
        for target in claimed:
            target.unlink()
        return False
    return True


def _are_pair(first: Path, second: Path) -> bool:
    """Whether ``second`` is what diffusers' format wrote beside ``first``: one word, for encoders of two widths."""
    try:
        ((word, one),), ((other, two),) = (open_file(path)[0].items() for path in (first, second))
    except (UserError, ValueError):  # no embedding, or more than one tensor
        return False
    return word == other and not _is_layout(word, ENCODERS) and one.shape[-1] != two.shape[-1]


def _first_of(second: Path) -> Path | None:
    """The file of which ``second`` is the second one, or None."""
    first = second.with_name(f"{second.stem.removesuffix('_2')}{second.suffix}")
    return first if first != second and _are_pair(first, second) else None


def is_empty(path: Path) -> bool:
    """Whether this is only a name, which a killed process has left."""
    return path.exists() and path.stat().st_size == 0


def is_written(folder: Path, name: str) -> bool:
    """Whether ``folder`` has an embedding of this name: not an empty file, nor the second one of another."""
    path = find(folder, name)
    return path is not None and not is_empty(path) and _first_of(path) is None


def find(folder: Path, name: str) -> Path | None:
    """The embedding in ``folder`` that has this name. The suffix is not part of ``embedding:NAME``."""
    files = [path for suffix in STOCK_SUFFIXES if (path := folder / f"{name}{suffix}").exists()]
    card = folder / f"{name}.png"
    return files[0] if files else card if is_card(card) else None


def _is_in(folder: Path, name: str) -> bool:
    return find(folder, name) is not None


def is_card(path: Path) -> bool:
    """Whether a picture has an embedding in its text; others of the same name are previews of an embedding."""
    try:
        return path.suffix == ".png" and card_text(path) is not None
    except (UserError, OSError):
        return False


def file_name(name: str) -> str:
    """A file name, perhaps in folders, that every system and ComfyUI's ``embedding:NAME`` accept.

    Characters allowed in a trigger but not in a file name (``S*``, ``<cat>``) become ``_``; the suffix of a format
    is dropped. Raises UserError for a name that leads elsewhere, is reserved by Windows or is too long.
    """
    plain = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    plain = re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})$", "", plain)
    if ":" in plain or any(part in ("", ".", "..") for part in plain.split("/")):
        raise UserError(f"{name!r} cannot be the name of a file: write a plain name, or folder/name.")
    clean = "/".join(_file_part(part) for part in plain.split("/"))
    if len(clean.encode()) > MAX_NAME or any(map(_is_reserved, clean.split("/"))):
        raise UserError(f"{name[:80]!r} cannot be the name of a file: enter a short name of letters and digits.")
    return clean


def _file_part(part: str) -> str:
    """Letters of every script have marks, which are not letters themselves."""
    letters = [letter if letter in "-+." or unicodedata.category(letter)[0] in "LMN" else "_" for letter in part]
    while letters and (letters[0] in "_." or unicodedata.category(letters[0])[0] == "M"):  # a mark of what went
        del letters[0]
    return "".join(letters).rstrip("_.") or "embedding"


def _is_reserved(part: str) -> bool:
    return RESERVED_NAMES.fullmatch(part.partition(".")[0]) is not None
