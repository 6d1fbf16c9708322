"""Caffe's binary files: the weights of a net (.caffemodel) and mean images (.binaryproto), read and written.

Reading maps the file and walks it with `wire`, not with protobuf's parser, for the reasons given there; values that are
packed in the file are not copied. Layers are given as they stand in the file, nothing is checked against a definition.
Writing makes Caffe's current format (V2), one layer after the other, so that no message of the file's size is built.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from resnet_fast._files import write_whole
from resnet_fast.caffe.errors import CaffeError
from resnet_fast.caffe.schema import V1_TYPE_NUMBERS
from resnet_fast.caffe.wire import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    Field,
    Reader,
    WireError,
    bytes_header,
    signed,
    tag,
    varint,
)

MAX_FILE_BYTES = 2**31 - 1
"""No protobuf message may be larger; Caffe and OpenCV cannot read a larger file."""

MAX_LAYERS = 100_000
"""In one file. ResNet-152 has 515; an empty layer takes two bytes, and an object of some hundred here."""

MAX_BLOBS = 100_000
"""In one file, for the same reason. ResNet-152 has 917."""

MAX_BLOBS_PER_LAYER = 64
"""Caffe's own layers have at most 9 (LSTM's net within a layer)."""

MAX_DIMENSIONS = 32
"""Of one blob: Caffe's kMaxBlobAxes."""

MAX_DIMENSION = 2**31 - 1
"""Caffe keeps dimensions in an int."""

MAX_NAME_BYTES = 1024
"""Of the name of a net or a layer, and of a layer's type."""

_SHOWN_NAME = 80
_NET_NAME, _NET_LAYERS, _NET_LAYER = 1, 2, 100
_LAYER_NAME, _LAYER_TYPE, _LAYER_BLOBS = 1, 2, 7
_V1_LAYER, _V1_NAME, _V1_TYPE, _V1_BLOBS = 1, 4, 5, 6
_BLOB_DATA, _BLOB_SHAPE, _BLOB_DOUBLE_DATA, _BLOB_RAW_DATA = 5, 7, 8, 12
_SHAPE_DIM = 1
_LEGACY = ("num", "channels", "height", "width")  # fields 1 to 4 of BlobProto

_Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, eq=False, slots=True)
class Blob:
    """One array of numbers, as a file has it (BlobProto)."""

    shape: tuple[int, ...]
    """Empty for a blob without dimensions, which has one value, as in Caffe."""
    legacy: bool
    """Whether the shape was given as num, channels, height, width: then it has four dimensions, the first of them 1s
    that the layer's own shape may lack."""
    values: np.ndarray[Any, Any]
    """One-dimensional, float32 or float64, little-endian, read-only; a view of the mapped file if they are packed
    there, then perhaps not aligned."""

    def tensor(self) -> Tensor:
        """Return a copy, of `shape`, float32 or float64 as stored."""
        return torch.from_numpy(_native(self.values)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer of a file: what it is, and its blobs. Its parameters and connections are not read."""

    name: str
    type: str
    """As Caffe's current format calls it ("InnerProduct"); "V1 type 77" for a number that Caffe never had."""
    blobs: tuple[Blob, ...]
    offset: int
    """Where it begins in the file, in bytes."""


@dataclass(frozen=True, slots=True)
class StoredNet:
    """What `read` found."""

    name: str
    layers: tuple[StoredLayer, ...]


def read(path: str | os.PathLike[str]) -> StoredNet:
    """The layers of a caffemodel with their blobs: V2 (`layer`) or V1 (`layers`), as caffe.proto (BVLC/caffe) has them.

    The file stays mapped while any of the blobs' values are in use, and must not be cut meanwhile.

    Raises:
        FileNotFoundError: if there is no such file.
        CaffeError: if it is no caffemodel, damaged, or larger than the limits of this module allow.
    """
    path = Path(path)
    data = _map(path, "a caffemodel")
    with _named(path):
        return _net(Reader(data), len(data))


def read_mean(path: str | os.PathLike[str]) -> Tensor:
    """The mean image in a .binaryproto (one BlobProto): float32 [C, H, W] on the CPU, channels as in the file (BGR).

    Raises:
        FileNotFoundError: if there is no such file.
        CaffeError: if it is damaged, or holds anything but one image.
    """
    path = Path(path)
    data = _map(path, "a mean file (.binaryproto)")
    with _named(path), _worded("", "; one image, a BlobProto, is expected"):
        blob = _blob(Reader(data), 0, len(data), "the mean")
    shape = blob.shape
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 3 or 0 in shape:
        raise CaffeError(
            f"{_file(path)}: the mean is {_shape(blob.shape)}, one image of [C, H, W] or [1, C, H, W] is expected"
        )
    return blob.tensor().to(torch.float32).reshape(shape)


def write(path: str | os.PathLike[str], net: Any, blobs: Sequence[Sequence[Tensor | _Array]]) -> None:
    """Writes a caffemodel in Caffe's current format (V2), under a temporary name until it is complete.

    Args:
        net: a NetParameter message (V2) without weights: the definition, which the file holds too, as Caffe's own do.
        blobs: of each of its layers: tensors on any device or arrays of any floating dtype. float64 becomes
            `double_data`, everything else float32 `data`, bit for bit if it was float32.

    Raises:
        FileNotFoundError: if the folder does not exist.
        CaffeError: before anything is written: if a blob is no strided floating array, or a limit of this module would
            be passed.
    """
    path = Path(path)
    with _named(path):
        _write(path, _plan(net, blobs))


def write_mean(path: str | os.PathLike[str], mean: Tensor | _Array) -> None:
    """Writes a mean image [C, H, W], channels in the order B, G, R, as Caffe's tools do: a BlobProto of 1 x C x H x W.

    Raises:
        FileNotFoundError: if the folder does not exist.
        CaffeError: if `mean` is no floating [C, H, W].
    """
    path = Path(path)
    with _named(path):
        _, size, shape = _blob_header(mean, "the mean")
        if len(shape) != 3 or 0 in shape:
            raise WireError(f"the mean is {_shape(shape)}, one image of [C, H, W] is expected")
        size = 4 * math.prod(shape)
        header = b"".join(tag(number, VARINT) + varint(n) for number, n in enumerate((1, *shape), 1))
        header += bytes_header(_BLOB_DATA, size)
        if len(header) + size > MAX_FILE_BYTES:
            raise WireError(_too_large(len(header) + size))
        image = mean.to(torch.float32) if isinstance(mean, Tensor) else mean.astype("<f4")
        _write(path, [(header, [(b"", image)])])


# Reading


def _map(path: Path, expected: str) -> mmap.mmap:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, {expected} is expected")
    if not path.is_file():
        raise CaffeError(f"{_file(path)}: is a {'folder' if path.is_dir() else 'device'}, {expected} is expected")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CaffeError(f"{_file(path)}: the file is empty, {expected} is expected")
        if size > MAX_FILE_BYTES:
            raise CaffeError(f"{_file(path)}: {_too_large(size)}")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    other = _seems_to_be(data[:4096])
    if other:
        raise CaffeError(f"{_file(path)}: seems to be {other}, {expected} is expected")
    return data


_BEGINNINGS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (.caffemodel.h5)"),
    (b"PK\x03\x04", "a zip archive (.zip, .npz, .pth)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x80\x02", "a Python pickle (.pth, .pkl)"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
_HTML = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_TEXT = re.compile(rb"(\s|#[^\n]*\n)*(name|input|input_dim|input_shape|layers?|state|force_backward|debug_info)\s*[:{]")
_SAFETENSORS = re.compile(rb".{3}\x00{5}\{\"", re.DOTALL)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")  # in every caffemodel with a layer, in no text


def _seems_to_be(head: bytes) -> str | None:
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    if _HTML.match(head):
        return "a web page"
    if _SAFETENSORS.match(head):
        return "a safetensors file"
    if _TEXT.match(head) and not _CONTROL.search(head):
        return "a definition as text (.prototxt)"
    return None


def _file(path: Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))


@contextmanager
def _worded(before: str, after: str = "", kind: type[ValueError] = WireError) -> Iterator[None]:
    """Raise what went wrong as a ``kind``, with the text around it that says where."""
    try:
        yield
    except WireError as error:
        raise kind(f"{before}{error}{after}") from None


def _named(path: Path) -> AbstractContextManager[None]:
    return _worded(f"{_file(path)}: ", kind=CaffeError)


def _net(reader: Reader, size: int) -> StoredNet:
    name, blobs = "", 0
    layers: list[StoredLayer] = []
    version = 0  # the field's number
    with_blobs: dict[str, StoredLayer] = {}
    for field in reader.fields(0, size):
        if field.number == _NET_NAME:
            name = _text(reader, field, "the net's name")
        elif field.number in (_NET_LAYER, _NET_LAYERS):
            field.expect("a layer", BYTES)
            version = version or field.number
            if field.number != version:
                raise WireError(
                    f"{field.describe()} is {'`layers` (V1)' if field.number == _NET_LAYERS else '`layer` (V2)'}, and "
                    "those before are of the other format; a net has one of them"
                )
            if len(layers) == MAX_LAYERS:
                raise WireError(f"more than {MAX_LAYERS:,} layers until byte {field.offset}, no net has so many")
            layer = _layer(reader, field, len(layers), MAX_BLOBS - blobs)
            layers.append(layer)
            blobs += len(layer.blobs)
            if layer.blobs:
                first = with_blobs.setdefault(layer.name, layer)
                if first is not layer:
                    raise WireError(
                        f"two layers are named {_quoted(layer.name)} and have blobs, at bytes {first.offset} and "
                        f"{layer.offset}; Caffe finds weights by name, so names must differ"
                    )
    if not layers:
        raise WireError("holds no layers, a net with weights (.caffemodel) is expected")
    return StoredNet(name, tuple(layers))


def _layer(reader: Reader, layer: Field, index: int, blobs_left: int) -> StoredLayer:
    v1 = layer.number == _NET_LAYERS
    name_number, type_number, blobs_number = (
        (_V1_NAME, _V1_TYPE, _V1_BLOBS) if v1 else (_LAYER_NAME, _LAYER_TYPE, _LAYER_BLOBS)
    )
    # The name may come last, and the blobs' errors should have it: first all fields, then the blobs.
    name, kind, found = "", V1_TYPE_NUMBERS[0] if v1 else "", []
    with _worded(f"layer {index} at byte {layer.offset}: "):
        for field in reader.fields(layer.start, layer.stop):
            if field.number == name_number:
                name = _text(reader, field, "the layer's name")
            elif field.number == type_number:
                if v1:
                    field.expect("the layer's type", VARINT)
                    number = signed(field.value, 32)
                    kind = V1_TYPE_NUMBERS.get(number, f"V1 type {number}")
                else:
                    kind = _text(reader, field, "the layer's type")
            elif field.number == blobs_number:
                field.expect("a blob", BYTES)
                found.append((field.start, field.stop))
                if len(found) > MAX_BLOBS_PER_LAYER:
                    raise WireError(f"more than {MAX_BLOBS_PER_LAYER} blobs until byte {field.offset}")
                if len(found) > blobs_left:
                    raise WireError(f"more than {MAX_BLOBS:,} blobs in the file until byte {field.offset}")
            elif v1 and field.number == _V1_LAYER:
                raise WireError(
                    f"{field.describe()} is a layer of the V0 format; convert the file with Caffe's "
                    "upgrade_net_proto_binary"
                )
    with _worded(f"{_called(name, index)} at byte {layer.offset}: "):
        blobs = tuple(_blob(reader, *place, f"blob {number}") for number, place in enumerate(found))
    return StoredLayer(name, kind, blobs, layer.offset)


def _blob(reader: Reader, start: int, stop: int, what: str) -> Blob:
    legacy: dict[int, int] = {}
    dimensions: list[int] = []
    # Places of values: start, count and stride, flat, since a hostile file can have one chunk per value.
    floats, doubles = array("q"), array("q")
    raw = False
    for field in reader.fields(start, stop):
        if 1 <= field.number <= 4:
            field.expect(f"a blob's {_LEGACY[field.number - 1]}", VARINT)
            legacy[field.number] = signed(field.value, 32)
        elif field.number == _BLOB_SHAPE:
            field.expect("a blob's shape", BYTES)
            _dimensions(reader, field, dimensions, what)
        elif field.number == _BLOB_DATA:
            _chunk(field, "a blob's data", FIXED32, floats)
        elif field.number == _BLOB_DOUBLE_DATA:
            _chunk(field, "a blob's double_data", FIXED64, doubles)
        elif field.number == _BLOB_RAW_DATA and field.wire_type == BYTES:
            raw = True
    # As Blob::FromProto in Caffe: any legacy dimension outweighs the shape, and any double the floats.
    shape = tuple(legacy.get(number, 0) for number in range(1, 5)) if legacy else tuple(dimensions)
    double = bool(doubles) and (sum(doubles[1::3]) > 0 or sum(floats[1::3]) == 0)
    places = doubles if double else floats
    count = sum(places[1::3])
    expected = _count(shape, what)
    if count != expected:
        hint = "; it has raw_data, which only NVIDIA's Caffe writes and reads" if raw else ""
        raise WireError(f"{what} declares {_shape(shape)} = {expected} values and holds {count}{hint}")
    return Blob(shape, bool(legacy), _values(reader, places, count, "<f8" if double else "<f4"))


def _dimensions(reader: Reader, shape: Field, dimensions: list[int], what: str) -> None:
    for field in reader.fields(shape.start, shape.stop):
        if field.number != _SHAPE_DIM:
            continue
        field.expect("a dimension", VARINT, BYTES)
        position = field.start
        while position < field.stop:
            if field.wire_type == BYTES:
                reader.spend(1, position)
            value, position = reader.varint(position, field.stop)
            dimensions.append(signed(value))
            if len(dimensions) > MAX_DIMENSIONS:
                raise WireError(f"{what} has more than {MAX_DIMENSIONS} dimensions")


def _chunk(field: Field, meaning: str, unpacked: int, places: array[int]) -> None:
    field.expect(meaning, BYTES, unpacked)
    if field.wire_type == unpacked:
        places.extend((field.start, field.repeats, field.stride))
        return
    itemsize = 4 if unpacked == FIXED32 else 8
    size = field.stop - field.start
    if size % itemsize:
        raise WireError(f"{field.describe()} has {size} bytes; {meaning} is numbers of {itemsize} bytes")
    places.extend((field.start, size // itemsize, itemsize))


def _values(reader: Reader, places: array[int], count: int, dtype: str) -> _Array:
    itemsize = np.dtype(dtype).itemsize
    if len(places) == 3 and places[2] == itemsize:
        return reader.numbers(places[0], count, itemsize, dtype)
    values = np.empty(count, f"<u{itemsize}")  # integers: NaN keeps its payload on every processor
    filled = 0
    for i in range(0, len(places), 3):
        start, n, stride = places[i : i + 3]
        values[filled : filled + n] = reader.numbers(start, n, stride, f"<u{itemsize}")
        filled += n
    values = values.view(dtype)
    values.flags.writeable = False
    return values


def _count(shape: tuple[int, ...], what: str) -> int:
    for n in shape:
        if not 0 <= n <= MAX_DIMENSION:
            raise WireError(f"{what} declares {_shape(shape)}; dimensions are from 0 to {MAX_DIMENSION}")
    return math.prod(shape)


def _text(reader: Reader, field: Field, what: str) -> str:
    field.expect(what, BYTES)
    size = field.stop - field.start
    if size > MAX_NAME_BYTES:
        raise WireError(f"{what} at byte {field.offset} has {size} bytes, at most {MAX_NAME_BYTES} are read")
    try:
        return str(reader.data[field.start : field.stop], "utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"{what} at byte {field.offset} is not UTF-8 (byte {field.start + error.start})") from None


def _called(name: str, index: int) -> str:
    return f"layer {_quoted(name)}" if name else f"layer {index}"


def _quoted(name: str) -> str:
    return repr(name if len(name) <= _SHOWN_NAME else name[: _SHOWN_NAME - 3] + "...")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "no dimensions"


def _too_large(size: int) -> str:
    return f"{size:,} bytes, the format allows {MAX_FILE_BYTES:,}"


def _native(values: _Array) -> _Array:
    """Return an aligned, writable copy in the machine's byte order; NaN keeps its payload."""
    itemsize = values.dtype.itemsize
    return values.view(f"<u{itemsize}").astype(f"=u{itemsize}", copy=True).view(f"=f{itemsize}")


# Writing

_Values: TypeAlias = "Tensor | _Array"
_Part: TypeAlias = tuple[bytes, list[tuple[bytes, _Values]]]


def _plan(net: Any, blobs: Sequence[Sequence[_Values]]) -> list[_Part]:
    """What stands in the file: for each layer the bytes before its blobs, and those before each blob's values."""
    if len(net.layer) > MAX_LAYERS:
        raise WireError(f"layers has {len(net.layer):,} entries, at most {MAX_LAYERS:,} can be read back")
    if not net.layer:
        raise WireError("layers is empty, a net with at least one layer is expected")
    _check_size(net.name, "the net's name")
    head = type(net)()
    head.CopyFrom(net)
    head.ClearField("layer")
    plan: list[_Part] = [(head.SerializeToString(), [])]
    for index, (layer, own) in enumerate(zip(net.layer, blobs, strict=True)):
        where = _called(layer.name, index)
        _check_size(layer.name, f"{where}: the name")
        _check_size(layer.type, f"{where}: the type")
        plan.append(_layer_part(layer.SerializeToString(), where, own))
    count = sum(len(own) for own in blobs)
    if count > MAX_BLOBS:
        raise WireError(f"layers has {count:,} blobs, at most {MAX_BLOBS:,} can be read back")
    size = sum(len(head) + sum(len(header) + _bytes(values) for header, values in parts) for head, parts in plan)
    if size > MAX_FILE_BYTES:
        raise WireError(_too_large(size))
    return plan


def _layer_part(message: bytes, where: str, blobs: Sequence[_Values]) -> _Part:
    if len(blobs) > MAX_BLOBS_PER_LAYER:
        raise WireError(f"{where}: {len(blobs)} blobs, at most {MAX_BLOBS_PER_LAYER} can be read back")
    encoded, size = [], len(message)
    for number, values in enumerate(blobs):
        header, data_bytes, _ = _blob_header(values, f"{where}: blob {number}")
        header = bytes_header(_LAYER_BLOBS, len(header) + data_bytes) + header
        encoded.append((header, values))
        size += len(header) + data_bytes
    return bytes_header(_NET_LAYER, size) + message, encoded


def _blob_header(values: _Values, what: str) -> tuple[bytes, int, tuple[int, ...]]:
    """Return all of a BlobProto but the values' bytes, the number of those, and the shape."""
    if isinstance(values, Tensor):
        right = values.is_floating_point() and values.layout == torch.strided and not values.is_meta
        double = values.dtype == torch.float64
    else:
        right = values.dtype.kind == "f" and values.dtype.itemsize <= 8
        double = values.dtype.itemsize == 8
    if not right:
        layout = f", {values.layout} on {values.device}" if isinstance(values, Tensor) else ""
        raise WireError(f"{what} is {values.dtype}{layout}; a dense floating tensor or array is expected")
    shape = tuple(values.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise WireError(f"{what} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} can be read back")
    size = _count(shape, what) * (8 if double else 4)
    dimensions = b"".join(varint(n) for n in shape)
    message = bytes_header(_SHAPE_DIM, len(dimensions)) + dimensions if shape else b""
    header = bytes_header(_BLOB_SHAPE, len(message)) + message
    return header + bytes_header(_BLOB_DOUBLE_DATA if double else _BLOB_DATA, size), size, shape


def _check_size(text: str, what: str) -> None:
    size = len(text.encode())
    if size > MAX_NAME_BYTES:
        raise WireError(f"{what} has {size} bytes, at most {MAX_NAME_BYTES} can be read back")


def _bytes(values: _Values) -> int:
    return math.prod(values.shape) * (8 if values.dtype in (torch.float64, np.float64) else 4)


def _little_endian(values: _Values) -> _Array:
    if isinstance(values, Tensor):
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        values = values.detach().resolve_neg().to("cpu", dtype).contiguous().numpy()
    return np.ascontiguousarray(values, "<f8" if values.dtype.itemsize == 8 else "<f4")


def _write(path: Path, plan: Iterable[_Part]) -> None:
    if path.is_dir():
        raise WireError("is a folder, the name of a file to write is expected")

    def parts(name: str) -> None:
        with open(name, "wb") as file:
            for head, blobs in plan:
                file.write(head)
                for header, values in blobs:
                    file.write(header)
                    _write_values(file, values)

    write_whole(path, parts)


def _write_values(file: IO[bytes], values: _Values) -> None:
    numbers = _little_endian(values)
    if numbers.size:
        file.write(numbers.reshape(-1).view(np.uint8).data)
