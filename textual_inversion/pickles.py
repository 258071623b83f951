"""Reads the tensors in a pickle as data: nothing that the pickle names is imported or called.

``torch.load(weights_only=True)`` runs no foreign code either, but 100 bytes can make it take gigabytes or hours,
and it does not read a zip archive as Python does. Embeddings need few opcodes and names; all others are refused.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file that torch.save wrote before its zip archives
MAX_OPCODES = 50_000  # an embedding has some 30 for each tensor
MAX_ENTRIES = 200  # of an archive

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,  # A1111 and the original script keep a token's number beside the vectors
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch.storage UntypedStorage": torch.uint8,
}
_TYPES = {
    f"torch {name}": getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
}
# What notes beside the vectors are made of, such as a step that is a numpy number. They become OTHER, uncalled.
_NOTES = {
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy dtype",
    "numpy ndarray",
    "_codecs encode",
    "__builtin__ set",
    "builtins set",
    "torch Size",
    "torch device",
}
_PARAMETER_DICT = "torch.nn.modules.container ParameterDict"  # the first embeddings were saved in one
OTHER = object()


class PickleError(ValueError):
    """Says why a pickle was not opened, in words that go on after "FILE was not opened: "."""


class Name(NamedTuple):
    """A class or function that a pickle names: ``module name``."""

    text: str


class Storage:
    """The numbers that tensors are views of; in a file without an archive they come after the pickle."""

    def __init__(self, dtype: torch.dtype, key: str, count: int) -> None:
        self.dtype, self.key, self.size = dtype, key, count * dtype.itemsize  # size in bytes
        self.data = bytearray()


class View(NamedTuple):
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Raises PickleError where the description reaches beyond the storage, or repeats its numbers."""
        count, held = math.prod(self.shape), self.storage.size // self.dtype.itemsize
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if last >= held or count > held:
            raise PickleError(f"a tensor of shape {self.shape[:8]} reaches beyond the {held} numbers that are there.")
        numbers = torch.frombuffer(self.storage.data, dtype=self.dtype, count=held)
        return numbers.as_strided(self.shape, self.strides, self.offset)


Find = Callable[[Storage], Storage]  # gives the storage of a description: the same one for the same key


# Containers --------------------------------------------------------------------------------------


def read_archive(data: bytes) -> Any:
    """The content of a zip archive by torch.save, with a View for each tensor. Raises PickleError."""
    if data.count(b"PK\x01\x02") > MAX_ENTRIES:
        raise PickleError(f"it is an archive of more than {MAX_ENTRIES} files.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            root, storages = _checked_root(archive, len(data)), {}

            def find(described: Storage) -> Storage:
                storage = storages.setdefault(described.key, described)
                if storage is described:
                    storage.data = bytearray(archive.read(f"{root}data/{storage.key}"))
                held = len(storage.data)
                if described.dtype != storage.dtype or not described.size == storage.size == held:
                    raise PickleError(f"it says that a tensor has {described.size} bytes, but holds {held}.")
                return storage

            return _load(io.BytesIO(archive.read(f"{root}data.pkl")), find)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise PickleError("the archive is cut or damaged: download or copy it again.") from error


def _checked_root(archive: zipfile.ZipFile, size: int) -> str:
    """The folder of data.pkl. Raises PickleError for what torch.save does not write: others may read it differently."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise PickleError("it is a zip archive, not an embedding: unpack it and use the file inside.")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise PickleError("it is compressed, and embeddings never are.")
    outside = not all(name.startswith(roots[0]) and ".." not in name for name in names)
    repeated = len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > size
    if outside or repeated or archive.comment or min(entry.header_offset for entry in entries) > 0:
        raise PickleError("another program could find other content in its archive.")
    if f"{roots[0]}byteorder" in names and archive.read(f"{roots[0]}byteorder") != b"little":
        raise PickleError("its numbers are stored for another kind of computer.")
    return roots[0]


def read_legacy(data: bytes) -> Any:
    """What torch.save wrote without an archive, with a View for each tensor. Raises PickleError."""
    file, storages = io.BytesIO(data), {}

    def find(described: Storage) -> Storage:
        storage = storages.setdefault(described.key, described)
        if described.size > len(data) or (storage.dtype, storage.size) != (described.dtype, described.size):
            raise PickleError("it is cut or damaged: a tensor has more numbers than the file.")
        return storage

    magic, version, system = (_load(file, _no_storage) for _ in range(3))
    if magic != LEGACY_MAGIC or version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise PickleError("PyTorch did not write it, or on another kind of computer.")
    content, keys = _load(file, find), _load(file, _no_storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != storages.keys():
        raise PickleError("it does not hold the tensors that it names.")
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        storage.data = bytearray(file.read(storage.size))
        if count * storage.dtype.itemsize != storage.size or len(storage.data) < storage.size:
            raise PickleError("it is cut or damaged: download or copy it again.")
    return content


def _no_storage(described: Storage) -> Storage:
    raise PickleError("it has a tensor where none belongs.")


# Opcodes -----------------------------------------------------------------------------------------

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: OTHER}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _load(file: io.BytesIO, find: Find) -> Any:
    """Runs one pickle's opcodes; ``file`` is behind it afterwards. Raises PickleError."""
    try:
        return _run(file, find)
    except PickleError:
        raise
    except Exception as error:  # the stack is empty, an argument is cut, a value has another type ...
        raise PickleError("it is cut or damaged: download or copy it again.") from error


def _run(file: io.BytesIO, find: Find) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # what was on the stack before each mark
    memo: dict[int, Any] = {}
    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number > MAX_OPCODES:
            raise PickleError("it is far longer than the pickle of an embedding.")
        name, last = opcode.name, len(stack) - 1
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(_shared(memo[argument]))
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "LIST"):
            items, stack = stack, below.pop()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in _TUPLES:
            start = last + 1 - _TUPLES[name]
            stack[start:] = [tuple(stack[start:])]
        elif name == "APPEND":
            _add(stack[last - 1], [stack.pop()])
        elif name == "SETITEM":
            _add(stack[last - 2], [stack.pop(last - 1), stack.pop()])
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            items, stack = stack, below.pop()
            _add(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Parameters):
                stack[-1].update(state.get("_parameters") or {})
        elif name == "BINPERSID":
            stack.append(_persistent(stack.pop(), find))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"its pickle has the opcode {name}, which no embedding needs.")
    raise PickleError("it is cut or damaged: download or copy it again.")


def _shared(value: Any) -> Any:
    """Forty tuples that each hold the one before twice are 2^40 things to whoever looks into them."""
    if type(value) is tuple and any(isinstance(part, tuple | list | dict) for part in value):
        raise PickleError("it uses one tuple of tuples in several places, and no embedding needs that.")
    return value


def _add(target: Any, items: list[Any]) -> None:
    """Items to a list, or keys and values by turns to a dictionary."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, dict):
        keys, values = items[::2], items[1::2]
        if not all(isinstance(key, str | int) for key in keys):
            raise PickleError("it has a dictionary whose keys are not text.")
        target.update(zip(keys, values, strict=True))
    elif target is not OTHER:
        raise PickleError("it adds to a thing that holds nothing.")


def _named(text: str) -> Name:
    if text not in {*_CALLED, *_STORAGES, *_TYPES, *_NOTES}:
        raise PickleError(f"it asks for {text[:80].replace(' ', '.')!r}, which no embedding needs.")
    return Name(text)


def _called(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise PickleError("it calls a thing that is not a function.")
    if function.text in _NOTES:
        return OTHER
    if function.text not in _CALLED:
        raise PickleError(f"it calls {function.text.replace(' ', '.')!r}, which no embedding needs.")
    return _CALLED[function.text](*arguments)


def _persistent(described: Any, find: Find) -> Any:
    """A storage, or the class of a module, of which old files have the source text too."""
    match described:
        case ("storage", Name(kind), str(key), str(), int(count), *rest) if kind in _STORAGES and not any(rest):
            if count >= 0:
                return find(Storage(_STORAGES[kind], key, count))
        case ("module", Name(kind), *_) if kind == _PARAMETER_DICT:
            return Name(kind)
    raise PickleError("it describes its numbers in a way that PyTorch does not.")


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> View:
    numbers = [offset, *shape, *strides]
    fits = isinstance(storage, Storage) and isinstance(shape, tuple) and len(shape) == len(strides) <= 8
    if not fits or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise PickleError("it describes a tensor in a way that PyTorch does not.")
    return View(storage, offset, shape, strides, storage.dtype)


def _view_of_type(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    return _view(storage, offset, shape, strides)._replace(dtype=_TYPES[dtype.text])


def _parameter(view: Any, *_: Any) -> View:
    if not isinstance(view, View):
        raise PickleError("it has a parameter that is not a tensor.")
    return view


class Parameters(dict):
    """A ParameterDict: the names and tensors in it."""


def _ordered_dictionary(pairs: Any = ()) -> dict:
    content: dict = {}
    _add(content, [part for pair in pairs for part in pair])
    return content


_CALLED: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _view,
    "torch._utils _rebuild_tensor_v2": _view,
    "torch._utils _rebuild_tensor_v3": _view_of_type,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "collections OrderedDict": _ordered_dictionary,
    _PARAMETER_DICT: lambda *_: Parameters(),
}
