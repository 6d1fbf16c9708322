"""Read files of `torch.save` as data: nothing that a pickle names is imported, and nothing is called.

A pickle is a program for a stack machine. The one here builds lists, tuples and dictionaries; whatever else a pickle
makes stays a `Made`: the name of what would be called, and with which arguments. `TorchFile.tensor` knows those that
stand for tensors. Which of them are wanted, and under which names, is not decided here.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

try:
    from lzma import LZMAError
except ImportError:  # an interpreter without it refuses such files by another error
    LZMAError = zlib.error  # type: ignore[misc, assignment]

__all__ = ["MAX_OPERATIONS", "MAX_PICKLE_BYTES", "Made", "NotATorchFile", "Refused", "TorchFile", "open_torch"]

MAX_PICKLE_BYTES = 256 * 2**20
"""Larger pickles are refused; tensors' data is outside them."""

MAX_OPERATIONS = 2_000_000
"""Longer pickles are refused. That of a ResNet-152 with an average and an optimizer has about 100,000."""

_MAX_NAME = 1000
_MAX_STORAGE_KEY = 100
_MAX_DIMENSIONS = 64
_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_NAMED_DTYPES = {f"torch.{name}": of for name, of in vars(torch).items() if isinstance(of, torch.dtype)}
_REBUILD = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_MARKS = frozenset({"conj", "neg"})
_DAMAGE = (RuntimeError, ValueError, OverflowError, LookupError, struct.error, zlib.error, LZMAError,
           zipfile.BadZipFile, zipfile.LargeZipFile)  # fmt: skip


class NotATorchFile(ValueError):
    """Raised for a damaged, truncated or different file; the message says which, without the file's name."""


class Refused(NotATorchFile):
    """Raised for a file that cannot be read as data alone, or is too large."""


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names. It may name one many times: the path is not kept."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class Made(dict[Any, Any]):
    """An object that a pickle would create by calling `maker`, with its items, such as those of an OrderedDict."""

    __slots__ = ("_maker", "arguments", "state")

    def __init__(self, maker: Any, arguments: Any) -> None:
        super().__init__()
        self._maker = maker if isinstance(maker, Name) else None
        self.arguments: tuple[Any, ...] = arguments if isinstance(arguments, tuple) else ()
        self.state: Any = None

    @property
    def maker(self) -> str:
        return "object" if self._maker is None else self._maker.path

    @property
    def is_dictionary(self) -> bool:
        return bool(self) or self.maker == "collections.OrderedDict"


@dataclass(frozen=True)
class _Storage:
    """Memory in the file: `size` elements from `begin` on of the one called `key`."""

    key: str
    dtype: torch.dtype
    begin: int
    size: int


@dataclass(frozen=True)
class _Dense:
    """A dense tensor: `shape` and `strides` in elements of `dtype`, from `offset` on."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    marks: frozenset[Any]
    """Pending operations on the data: "conj" and "neg"."""


class TorchFile:
    """An open file: `content` is what was saved, made of dict, list, tuple, str, numbers, and `Made` for the rest."""

    def __init__(
        self, content: Any, read: Callable[[_Storage], Tensor], check_size: Callable[[int], None] = lambda size: None
    ) -> None:
        self.content = content
        self._read = read
        self._check_size = check_size
        self._bytes = 0
        self._storages: dict[str, Tensor] = {}

    def is_tensor(self, value: Any) -> bool:
        return _dense(value) is not None

    def same(self, one: Any, other: Any) -> bool:
        """Return whether two tensors share memory in the file."""
        return _dense(one) == _dense(other)

    def tensor(self, value: Any) -> Tensor:
        """Return the dense tensor of `value`; those of one storage share it, unless marked.

        Raises:
            NotATorchFile: if its data is missing, or lies outside its storage.
        """
        found = _dense(value)
        if found is None:
            raise NotATorchFile("damaged: no tensor")
        if found.marks - _MARKS:
            raise Refused("refused: a tensor with metadata other than conj and neg")
        self._bytes += math.prod(found.shape) * found.dtype.itemsize  # torch's own product overflows
        self._check_size(self._bytes)
        with _named_damage():
            return self._tensor(found)

    def _tensor(self, of: _Dense) -> Tensor:
        storage = of.storage
        if storage.key not in self._storages:
            self._storages[storage.key] = self._read(storage)
        if self._storages[storage.key].numel() % math.lcm(storage.dtype.itemsize, of.dtype.itemsize):
            raise NotATorchFile("damaged: data of another dtype")
        data = self._storages[storage.key].view(storage.dtype)[storage.begin :][: storage.size].view(of.dtype)
        last = of.offset + sum((size - 1) * stride for size, stride in zip(of.shape, of.strides, strict=True))
        if math.prod(of.shape) and last >= len(data):
            raise NotATorchFile("damaged: a tensor is larger than its data")
        if not math.prod(of.shape):
            return torch.empty(of.shape, dtype=of.dtype)
        tensor = data.as_strided(of.shape, of.strides, data.storage_offset() + of.offset)
        if "conj" in of.marks:
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if "neg" in of.marks else tensor


@contextmanager
def open_torch(path: Path, check_size: Callable[[int], None] = lambda size: None) -> Iterator[TorchFile]:
    """Open the file at `path`, in either format of `torch.save`.

    Args:
        check_size: called with the size of a zip file's content, unpacked, before anything is, and with that of the
            tensors made so far and the next one, before it is made. Its errors are passed on.

    Raises:
        NotATorchFile: Refused for TorchScript, tar archives and pickles of more than MAX_OPERATIONS.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(262)
        if start[257:] == b"ustar" and not start.startswith(b"PK"):
            raise Refused("refused: a tar archive, as torch wrote before 0.2; load it there and save it again")
        archive = None
        if start.startswith(b"PK\x03\x04"):
            with _named_damage():
                if not zipfile.is_zipfile(file):  # its directory is at the end
                    raise NotATorchFile("the file is truncated")
                archive = zipfile.ZipFile(file)
            check_size(sum(entry.file_size for entry in archive.infolist()))
        with _named_damage():
            content, read = _open_zip(archive) if archive else _open_old(file, path.stat().st_size)
        yield TorchFile(content, read, check_size)


@contextmanager
def _named_damage() -> Iterator[None]:
    try:
        yield
    except NotATorchFile:
        raise
    except EOFError as error:
        raise NotATorchFile("the file is truncated") from error
    except MemoryError as error:
        raise NotATorchFile("damaged, or too large for the memory") from error
    except _DAMAGE as error:
        raise NotATorchFile(f"damaged ({type(error).__name__})") from error


def _open_zip(archive: zipfile.ZipFile) -> tuple[Any, Callable[[_Storage], Tensor]]:
    if any(entry.flag_bits & 1 for entry in archive.infolist()):
        raise Refused("refused: an encrypted zip file")
    names = archive.namelist()
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise Refused("refused: contains code, not just tensors (a TorchScript archive)")
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise NotATorchFile("a zip file, but not a PyTorch checkpoint")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
        raise Refused("refused: written by a machine with another byte order")

    def read(storage: _Storage) -> Tensor:
        return _bytes(archive.read(f"{folder}data/{storage.key}"))

    if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
        raise Refused(f"refused: a pickle of more than {MAX_PICKLE_BYTES:,} bytes")
    return _run(io.BytesIO(archive.read(pickles[0]))), read


def _open_old(file: IO[bytes], size: int) -> tuple[Any, Callable[[_Storage], Tensor]]:
    """Read several pickles in a row (a magic number, a version, the machine, the content, the storages' keys),
    and then each storage: its length in elements and its data."""
    file.seek(0)
    dtypes: dict[str, torch.dtype] = {}
    magic = _run(file)
    if magic != _MAGIC:
        if isinstance(magic, Made):
            raise Refused(f"refused: contains code, not just tensors (a pickled {magic.maker})")
        raise NotATorchFile("a pickle, but not a PyTorch checkpoint; detectron2's and Caffe2's .pkl files are such")
    _, _, content, keys = _run(file), _run(file), _run(file, dtypes), _run(file)
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else ():
        length = int.from_bytes(_exactly(file, 8), "little", signed=True)
        if not isinstance(key, str) or key not in dtypes or length < 0:
            raise NotATorchFile("damaged: a storage that nothing belongs to")
        places[key] = file.tell(), length * dtypes[key].itemsize
        file.seek(places[key][1], io.SEEK_CUR)
        if file.tell() > size:
            raise EOFError

    def read(storage: _Storage) -> Tensor:
        begin, length = places[storage.key]
        file.seek(begin)
        return _bytes(_exactly(file, length))

    return content, read


def _exactly(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise EOFError
    return data


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _dense(value: Any) -> _Dense | None:
    """Return the dense tensor or parameter that `value` describes, else None."""
    for _ in range(8):  # a parameter is made of a tensor, and a tensor with attributes of another call
        if not isinstance(value, Made) or not value.arguments:
            return None
        if value.maker in _PARAMETER:
            value = value.arguments[0]
        elif value.maker == _SUBCLASS and len(value.arguments) > 2:
            value = Made(value.arguments[0], value.arguments[2])
        else:
            break
    if not isinstance(value, Made) or value.maker not in _REBUILD or len(value.arguments) < 4:
        return None
    storage, offset, shape, strides = value.arguments[:4]
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        return None
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        return None
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        return None
    dtype: torch.dtype | None = storage.dtype
    rest = value.arguments[6:]
    if value.maker.endswith("_v3"):
        dtype = _NAMED_DTYPES.get(rest[0].path) if rest and isinstance(rest[0], Name) else None
        rest = rest[1:]
    marks: frozenset[Any] = frozenset()
    if rest and rest[0]:  # keys alone count, as for torch
        known = isinstance(rest[0], dict) and len(rest[0]) <= len(_MARKS)
        marks = frozenset(dict.keys(rest[0])) if known else frozenset({None})
    return None if dtype is None else _Dense(storage, dtype, offset, shape, strides, marks)


# ------------------------------------------------------------------------------------------------------------- pickles

_MARK = object()
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME"}


def _run(file: IO[bytes], dtypes: dict[str, torch.dtype] | None = None) -> Any:
    """Return what the pickle at the file's position describes, and move the position to its end.

    Args:
        dtypes: is filled with those of the storages, by key.

    Raises:
        EOFError: if it is truncated. NotATorchFile: if it is not a pickle, or damaged; Refused if it is too long.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    operations = pickletools.genops(cast(IO[bytes], _Bounded(file)))
    for _ in range(MAX_OPERATIONS):
        try:
            operation, argument, _position = next(operations)
        except NotATorchFile:
            raise
        except ValueError as error:
            if any(words in str(error) for words in ("exhausted", "not enough data", "but only", "no newline")):
                raise EOFError from error
            raise NotATorchFile("damaged, or not a PyTorch checkpoint") from error
        try:
            if operation.name == "STOP":
                return stack.pop()
            _step(operation, argument, stack, memo)
        except (TypeError, KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
            raise NotATorchFile("damaged, or not a PyTorch checkpoint") from error
        if dtypes is not None and stack and isinstance(stack[-1], _Storage):
            dtypes[stack[-1].key] = stack[-1].dtype
    raise Refused(f"refused: a pickle of more than {MAX_OPERATIONS:,} operations")


class _Bounded:
    """A pickle's bytes, read without allocating as much memory as a length in it claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise Refused(f"refused: a pickle of more than {MAX_PICKLE_BYTES:,} bytes")
        return self._counted(self._file.read(size))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(MAX_PICKLE_BYTES))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _step(operation: Any, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    name: str = operation.name
    if name in _TUPLES:
        count = _TUPLES[name]
        stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
        stack.append({} if name == "EMPTY_DICT" else [])
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("TUPLE", "LIST", "FROZENSET"):
        items = _above_mark(stack)
        stack.append(tuple(items) if name == "TUPLE" else items)
    elif name in ("APPENDS", "ADDITEMS", "APPEND"):
        items = [stack.pop()] if name == "APPEND" else _above_mark(stack)
        if isinstance(stack[-1], list):
            stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS", "DICT"):
        if name == "SETITEM":
            items = [stack.pop(), stack.pop()][::-1]
        else:
            items = _above_mark(stack)
        if name == "DICT":
            stack.append({})
        if isinstance(stack[-1], dict):
            # Other keys are hashed by their own code, many larger numbers share a hash, and tensors have no such names.
            pairs = zip(items[::2], items[1::2], strict=False)
            stack[-1].update((key, value) for key, value in pairs if isinstance(key, str) or _is_short(key))
    elif name == "GLOBAL":
        stack.append(_name(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
        last, module = stack.pop(), stack.pop()
        stack.append(_name(module, last))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, maker = stack.pop(), stack.pop()
        stack.append(Made(maker, arguments))
    elif name == "NEWOBJ_EX":
        _, arguments, maker = stack.pop(), stack.pop(), stack.pop()
        stack.append(Made(maker, arguments))
    elif name in ("OBJ", "INST"):
        items = _above_mark(stack)
        maker = _name(*argument.split(" ", 1)) if name == "INST" else items.pop(0)
        stack.append(Made(maker, tuple(items)))
    elif name == "BUILD":
        state = stack.pop()
        if isinstance(stack[-1], Made):
            stack[-1].state = state
    elif name == "BINPERSID":
        stack.append(_persistent(stack.pop()))
    elif name in ("POP", "POP_MARK"):
        _above_mark(stack) if name == "POP_MARK" else stack.pop()
    elif name == "DUP":
        stack.append(stack[-1])
    elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif argument is not None and not operation.stack_before and len(operation.stack_after) == 1:
        stack.append(argument)  # a number or a string
    elif name not in _NOTHING:
        raise Refused(f"refused: a pickle with the operation {name}")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _is_short(key: Any) -> bool:
    return isinstance(key, int) and -(2**31) <= key < 2**31


def _name(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise NotATorchFile("damaged, or not a PyTorch checkpoint")
    if len(module) + len(name) > _MAX_NAME:
        raise Refused(f"refused: the name of a class or function has more than {_MAX_NAME:,} characters")
    return Name(module, name)


def _above_mark(stack: list[Any]) -> list[Any]:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is _MARK:
            items = stack[index + 1 :]
            del stack[index:]
            return items
    raise IndexError("no mark")


def _persistent(identity: Any) -> Any:
    """Return the storage of a persistent id: ("storage", class, key, device, size), in the old format with a view,
    and there also ("module", class, file, source text)."""
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        return identity[1]
    if not isinstance(identity, tuple) or len(identity) < 5:
        raise NotATorchFile("damaged, or not a PyTorch checkpoint")
    kind, of, key, _, size, *view = identity
    if not isinstance(key, str | bytes) or len(key) > _MAX_STORAGE_KEY:  # before it is copied
        raise NotATorchFile("damaged: the key of a storage")
    text = key.decode("ascii") if isinstance(key, bytes) else key
    dtype = _DTYPES.get(of.path.rpartition(".")[2]) if isinstance(of, Name) else None
    if kind not in ("storage", b"storage") or dtype is None or type(size) is not int or size < 0:
        raise Refused("refused: data of an unknown kind")
    if view and view[0] is not None:
        _, begin, size = view[0] if isinstance(view[0], tuple) and len(view[0]) == 3 else (None, -1, -1)
        if type(begin) is not int or type(size) is not int or begin < 0 or size < 0:
            raise NotATorchFile("damaged: a view of a storage")
        return _Storage(text, dtype, begin, size)
    return _Storage(text, dtype, 0, size)
