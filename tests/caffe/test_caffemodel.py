"""Caffe's binary files against protobuf's own parser, and what is said of files that are broken or made to do harm.

Files are built and checked with classes that protobuf makes here from the public field numbers, so that neither the
reader nor the writer is compared with itself.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from resnet_fast.caffe import caffemodel, wire
from resnet_fast.caffe.caffemodel import StoredNet, read, read_mean, write, write_mean
from resnet_fast.caffe.errors import CaffeError
from resnet_fast.caffe.schema import build
from tests.caffe.files import peak_memory, write_layers

pytest.importorskip("google.protobuf")
from google.protobuf.message import DecodeError

_MESSAGES = {
    "BlobShape": "dim 1 int64+",
    "BlobProto": "num 1 int32; channels 2 int32; height 3 int32; width 4 int32; data 5 float+; diff 6 float+;"
    "shape 7 BlobShape; double_data 8 double+; double_diff 9 double+",
    "LayerParameter": "name 1 string; type 2 string; bottom 3 string*; top 4 string*; loss_weight 5 float+;"
    "blobs 7 BlobProto*",
    # type is an enum, but protobuf would put away a number it does not know
    "V1LayerParameter": "bottom 2 string*; top 3 string*; name 4 string; type 5 int32; blobs 6 BlobProto*",
    "NetParameter": "name 1 string; layers 2 V1LayerParameter*; input 3 string*; input_dim 4 int32*;"
    "input_shape 8 BlobShape*; layer 100 LayerParameter*",
}
_UNREAD = {"diff", "double_diff", "bottom", "top", "loss_weight", "input", "input_dim", "input_shape"}


CLASSES = build(_MESSAGES)
UNPACKED = build({name: fields.replace("+", "*") for name, fields in _MESSAGES.items()})
READ = build({
    name: ";".join(field for field in fields.split(";") if field.split()[0] not in _UNREAD)
    for name, fields in _MESSAGES.items()
})  # fmt: skip
"""protobuf's classes: as Caffe has them, with nothing packed, and without the fields that the reader skips."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caffe") / "net.caffemodel"


def make(message: str, *, packed: bool = True, **values: Any) -> Any:
    return (CLASSES if packed else UNPACKED)[message](**values)


def blob(values: list[float], shape: list[int], **others: Any) -> Any:
    return make("BlobProto", data=values, shape={"dim": shape}, **others)


def layer(name: str = "conv1", type: str = "Convolution", *blobs: Any) -> bytes:
    """A net of one layer, serialized: nets are concatenated. Blobs are messages, or what stands for them as bytes."""
    encoded = make("LayerParameter", name=name, type=type).SerializeToString()
    for each in blobs:
        encoded += message(7, each if isinstance(each, bytes) else each.SerializeToString())
    return message(100, encoded)


def message(number: int, content: bytes) -> bytes:
    """A field with `content`, by hand: for what protobuf would not write."""
    return wire.bytes_header(number, len(content)) + content


conv1 = functools.partial(layer, "conv1", "Convolution")


def bits(values: Any) -> list[int]:
    array = np.asarray(values)
    return array.view(f"u{array.dtype.itemsize}").tolist()


def outcome(path: Path) -> StoredNet | str:
    """What is read, or the error's text, which is one line and begins with the file."""
    try:
        return read(path)
    except CaffeError as error:
        text = str(error)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


def assert_same(net: StoredNet, expected: Any) -> None:
    """What was read is what protobuf reads: names, types, shapes, and values bit for bit."""
    assert net.name == expected.name
    theirs = expected.layers or expected.layer
    assert [stored.name for stored in net.layers] == [each.name for each in theirs]
    if not expected.layers:
        assert [stored.type for stored in net.layers] == [each.type for each in theirs]
    for stored, each in zip(net.layers, theirs, strict=True):
        assert len(stored.blobs) == len(each.blobs)
        for ours, proto in zip(stored.blobs, each.blobs, strict=True):
            legacy = any(proto.HasField(name) for name in ("num", "channels", "height", "width"))
            shape = (proto.num, proto.channels, proto.height, proto.width) if legacy else tuple(proto.shape.dim)
            assert ours.shape == shape and ours.legacy == legacy
            wanted = np.array(proto.double_data, "f8") if len(proto.double_data) else np.array(proto.data, "f4")
            if len(wanted):  # without values protobuf does not say which of the two fields there was
                assert ours.values.dtype == wanted.dtype
            assert bits(ours.values) == bits(wanted)
            assert not ours.values.flags.writeable
            assert ours.tensor().shape == shape


# What protobuf wrote


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("field", ["data", "double_data"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_reads_what_protobuf_writes(path: Path, version: int, legacy: bool, field: str, packed: bool) -> None:
    net = make("NetParameter", packed=packed, name="net", input=["data"], input_dim=[1, 3, 8, 8])
    each = net.layers.add(name="fc", type=14) if version == 1 else net.layer.add(name="fc", type="InnerProduct")
    each.bottom.append("data")
    each.top.append("fc")
    weight, bias = each.blobs.add(), each.blobs.add()
    getattr(weight, field).extend(np.linspace(-1, 1, 200).astype("f4").tolist())
    getattr(bias, field).extend([math.nan, -0.0, math.inf, 1e-45])
    weight.diff.extend([1.0] * 200)
    weight.double_diff.extend([1.0] * 200)
    if legacy:
        weight.num, weight.channels, weight.height, weight.width = 1, 1, 4, 50
        bias.num, bias.channels, bias.height, bias.width = 1, 1, 1, 4
    else:
        weight.shape.dim.extend([4, 50])
        bias.shape.dim.extend([4])
    path.write_bytes(net.SerializeToString())
    stored = read(path)
    assert_same(stored, net)
    assert stored.layers[0].type == "InnerProduct"
    assert path.read_bytes()[stored.layers[0].offset] == (0x12 if version == 1 else 0xA2)


def test_packed_values_are_not_copied(path: Path) -> None:
    path.write_bytes(layer("a", "Scale", blob([1.0] * 100_000, [100_000]), blob([2.0] * 100_000, [100_000])))
    tracemalloc.start()
    net = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000
    assert [each.values.sum() for each in net.layers[0].blobs] == [100_000, 200_000]
    assert net.layers[0].blobs[0].tensor().sum() == 100_000


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, ""), (4, "Convolution"), (14, "InnerProduct"), (18, "ReLU"), (21, "SoftmaxWithLoss"), (11, "Im2col"),
     (23, "TanH"), (9, "HDF5Data"), (39, "Deconvolution"), (77, "V1 type 77"), (-1, "V1 type -1")],
)  # fmt: skip
def test_v1_types(path: Path, number: int, name: str) -> None:
    path.write_bytes(make("NetParameter", layers=[{"type": number}]).SerializeToString())
    assert read(path).layers[0].type == name


def test_zero_sizes_and_no_dimensions(path: Path) -> None:
    empty = make("BlobProto", num=0, channels=3)
    path.write_bytes(layer("a", "X", blob([], [0, 5]), blob([7.0], []), empty, make("BlobProto", data=[3.0])))
    blobs = read(path).layers[0].blobs
    assert [each.shape for each in blobs] == [(0, 5), (), (0, 3, 0, 0), ()]
    assert [each.legacy for each in blobs] == [False, False, True, False]
    assert [each.values.tolist() for each in blobs] == [[], [7.0], [], [3.0]]


def test_caffe_prefers_legacy_dimensions_and_doubles(path: Path) -> None:
    proto = make("BlobProto", num=1, channels=1, height=1, width=2, shape={"dim": [9]}, data=[1.0], double_data=[2, 3])
    path.write_bytes(layer("a", "X", proto))
    (stored,) = read(path).layers[0].blobs
    assert stored.shape == (1, 1, 1, 2) and stored.legacy and stored.values.tolist() == [2, 3]


def test_numbers_are_cut_as_protobuf_cuts_them(path: Path) -> None:
    """Dimensions to 64 bits, the legacy ones and V1's types to 32; lengths not at all."""
    two = b"\x82" + b"\x80" * 8 + b"\x02"  # 2**64 + 2
    content = message(7, message(1, two)) + message(5, bytes(8))
    path.write_bytes(conv1(content))
    assert_same(read(path), CLASSES["NetParameter"].FromString(path.read_bytes()))
    assert read(path).layers[0].blobs[0].shape == (2,)
    four = wire.varint(2**32 + 4)
    legacy = b"".join(wire.tag(number, 0) + wire.varint(2**32 + 1) for number in (1, 2, 3)) + wire.tag(4, 0) + four
    path.write_bytes(message(2, wire.tag(5, 0) + four + message(6, legacy + message(5, bytes(16)))))
    assert_same(read(path), CLASSES["NetParameter"].FromString(path.read_bytes()))
    assert read(path).layers[0].blobs[0].shape == (1, 1, 1, 4)
    assert read(path).layers[0].type == "Convolution"
    path.write_bytes(b"\x12" + two + b"\x08\x00")
    with pytest.raises(DecodeError):
        CLASSES["NetParameter"].FromString(path.read_bytes())
    with pytest.raises(CaffeError, match="field 2 at byte 0 has 18446744073709551618 bytes, and 2 are left"):
        read(path)


def test_net_whose_name_looks_like_text(path: Path) -> None:
    path.write_bytes(make("NetParameter", name="name: abc").SerializeToString() + layer())
    assert path.read_bytes().startswith(b"\n\tname: abc")
    assert read(path).name == "name: abc"


def test_long_unpacked_runs(path: Path) -> None:
    """A run may be longer than the number of fields allowed; a packed or an unknown field ends it."""
    n = wire.MAX_FIELDS + 5
    values = np.arange(n, dtype="f4")
    run = np.zeros(n, [("tag", "u1"), ("value", "<f4")])
    run["tag"], run["value"] = 0x2D, values
    content = run.tobytes() + message(5, b"\0\0\x80\x3f") + b"\x98\x06\x01" + run[:100].tobytes()
    content += message(7, message(1, wire.varint(n + 101)))
    path.write_bytes(conv1(content + run.tobytes().replace(b"\x2d", b"\x35")[: 5 * 100]))
    (stored,) = read(path).layers[0].blobs
    assert np.array_equal(stored.values, np.concatenate([values, [1], values[:100]]))


_UNKNOWN = [
    b"\xc0\x3e\x96\x01", b"\xc5\x3e\x01\x02\x03\x04", b"\xc1\x3e\x01\x02\x03\x04\x05\x06\x07\x08",
    b"\xc2\x3e\x02\x08\x01",
    b"\xc3\x3e\x08\x01\xc3\x3e\xc4\x3e\x12\x01\x00\xc4\x3e", b"\xc3\x3e\xc4\x3e",
    b"\xc0\x3e\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xc5\x3eabcd\xc5\x3eefgh\xc5\x3eijkl",
]  # fmt: skip


@st.composite
def pieces(draw: DrawFn, parts: list[bytes], ordered: bool = False) -> bytes:
    """`parts` in any order, with unknown fields among them."""
    parts = [*parts, *draw(st.lists(st.sampled_from(_UNKNOWN), max_size=2))]
    return b"".join(parts if ordered else draw(st.permutations(parts)))


@st.composite
def blobs(draw: DrawFn) -> bytes:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    double = draw(st.booleans())
    values = draw(st.lists(st.floats(width=64 if double else 32), min_size=count, max_size=count))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    chunks = [values[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    name = "double_data" if double else "data"
    data = [make("BlobProto", packed=draw(st.booleans()), **{name: chunk}).SerializeToString() for chunk in chunks]
    parts = [draw(pieces(data, ordered=True)), make("BlobProto", diff=[1.0, 2.0]).SerializeToString()]
    if draw(st.booleans()):
        first = draw(st.integers(0, len(shape)))
        for dims in (shape[:first], shape[first:]):  # an embedded message that comes twice is merged
            parts.append(make("BlobProto", packed=draw(st.booleans()), shape={"dim": dims}).SerializeToString())
        if draw(st.booleans()):  # order matters between the two
            return b"".join(parts)
        return draw(pieces([b"".join(parts)]))
    shape = [1] * (4 - len(shape)) + shape
    legacy = dict(zip(("num", "channels", "height", "width"), shape, strict=True))
    wrong = make("BlobProto", num=99).SerializeToString()  # of a number that comes twice the last counts
    return wrong + draw(pieces([*parts, *(make("BlobProto", **{k: v}).SerializeToString() for k, v in legacy.items())]))


@st.composite
def nets(draw: DrawFn) -> bytes:
    version = draw(st.sampled_from([1, 2]))
    kind, number, number_of_blobs = ("V1LayerParameter", 2, 6) if version == 1 else ("LayerParameter", 100, 7)
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=4, unique=True))
    parts = [make("NetParameter", name=draw(st.text(max_size=4))).SerializeToString()]
    for name in names:
        type_ = draw(st.sampled_from([4, 14])) if version == 1 else "Convolution"
        fields = [make(kind, **{key: value}).SerializeToString() for key, value in (("name", name), ("type", type_))]
        stored = [message(number_of_blobs, content) for content in draw(st.lists(blobs(), max_size=2))]
        parts.append(message(number, draw(pieces([*fields, b"".join(stored)]))))
    parts.append(make("NetParameter", input=["data"], input_shape=[{"dim": [1, 3]}]).SerializeToString())
    return draw(pieces(parts))


@given(nets())
@settings(max_examples=60, deadline=None)
def test_any_encoding_is_read_as_protobuf_reads_it(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert_same(read(path), CLASSES["NetParameter"].FromString(data))


# What is written


def test_protobuf_reads_what_is_written(path: Path) -> None:
    weight = np.linspace(-1, 1, 24).astype("f4").reshape(2, 3, 4)
    layers: list[tuple[str, str, list[Any]]] = [
        ("data", "Input", []),
        ("conv1", "Convolution", [torch.from_numpy(weight).permute(2, 0, 1), torch.tensor([1.5, math.nan])]),
        ("ü\n", "Scale", [np.array([-0.0, 1e300]), np.float32([2.0])[:, None][:0], torch.tensor(3.0)]),
        ("half", "Scale", [torch.tensor([1.5, 2.0], dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]),
        ("grad", "Scale", [torch.nn.Parameter(torch.ones(2)), weight[:, ::2], np.float16([0.5]), weight.astype(">f4")]),
    ]
    write_layers(path, layers, "net")
    proto = CLASSES["NetParameter"].FromString(path.read_bytes())
    assert_same(read(path), proto)
    assert proto.name == "net"
    assert [(each.name, each.type) for each in proto.layer] == [(name, kind) for name, kind, _ in layers]
    for each, (_, _, given_blobs) in zip(proto.layer, layers, strict=True):
        for stored, values in zip(each.blobs, given_blobs, strict=True):
            if getattr(values, "dtype", None) == np.float64:
                assert list(stored.double_data) == values.tolist() and not len(stored.data)
                continue
            wanted = torch.as_tensor(np.array(values, "=f4") if isinstance(values, np.ndarray) else values)
            assert list(stored.shape.dim) == list(wanted.shape)
            assert bits(np.array(stored.data, "f4")) == bits(wanted.detach().float().contiguous().reshape(-1).numpy())


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.lists(st.integers(0, 2**64 - 1), max_size=20))
@example([0x7FA00001, 0xFFC12345, 0x80000000, 0x7F800000, 1], [0x7FF0000000000001, 1 << 63])
@settings(max_examples=40, deadline=None)
def test_round_trip_is_bit_exact(path: Path, singles: list[int], doubles: list[int]) -> None:
    single = torch.from_numpy(np.array(singles, "u4").view("f4"))
    double = np.array(doubles, "u8").view("f8")
    write_layers(path, [("a", "Scale", [single, double])])
    first, second = read(path).layers[0].blobs
    assert bits(first.values) == singles and bits(second.values) == doubles
    assert second.values.dtype == np.float64
    assert bits(first.tensor().numpy()) == singles and bits(second.tensor().numpy()) == doubles
    unpacked = b"".join(b"\x2d" + struct.pack("<I", value) for value in singles)
    path.write_bytes(conv1(unpacked + message(7, message(1, wire.varint(len(singles))))))
    assert bits(read(path).layers[0].blobs[0].values) == singles


def test_the_definition_is_written_too(path: Path) -> None:
    net = make("NetParameter", name="net", input=["data"], input_dim=[1, 3, 8, 8])
    net.layer.add(name="conv1", type="Convolution", bottom=["data"], top=["conv1"])
    net.layer.add(name="relu", type="ReLU", bottom=["conv1"], top=["conv1"])
    write(path, net, [[np.float32([1, 2])], []])
    net.layer[0].blobs.add().CopyFrom(blob([1.0, 2.0], [2]))
    assert CLASSES["NetParameter"].FromString(path.read_bytes()) == net
    assert [len(each.blobs) for each in read(path).layers] == [1, 0]


def test_one_layer_at_a_time(path: Path) -> None:
    n = 250_000
    half = np.ones(n, np.float16)
    tracemalloc.start()
    write_layers(path, [(str(i), "Scale", [half]) for i in range(12)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 12 * 4 * n
    assert peak < 3 * 4 * n


@pytest.mark.parametrize("before", [None, b"old"])
def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None) -> None:
    target = tmp_path / "net.caffemodel"
    if before:
        target.write_bytes(before)
    calls = iter([np.float32([1])])
    monkeypatch.setattr(caffemodel, "_little_endian", lambda _: next(calls))
    with pytest.raises(StopIteration):
        write_layers(target, [("a", "Scale", [np.float32([1]), np.float32([1])])])
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == ({target.name: before} if before else {})


_ONE = np.float32([1])


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "layers is empty, a net with at least one layer is expected"),
        ([("a", "X", [np.int32([1])])], "layer 'a': blob 0 is int32; a dense floating tensor or array is expected"),
        ([("a", "X", [_ONE, torch.ones(2, dtype=torch.int64)])],
         "layer 'a': blob 1 is torch.int64, torch.strided on cpu; a dense floating tensor or array is expected"),
        ([("a", "X", [torch.ones(2, device="meta")])],
         "layer 'a': blob 0 is torch.float32, torch.strided on meta; a dense floating tensor or array is expected"),
        ([("", "X", [torch.ones([1] * 33)])], "layer 0: blob 0 has 33 dimensions, at most 32 can be read back"),
        ([("a", "X", [torch.empty(2**40, 0)])],
         "layer 'a': blob 0 declares 1099511627776x0; dimensions are from 0 to 2147483647"),
        ([("a", "X", [_ONE] * 65)], "layer 'a': 65 blobs, at most 64 can be read back"),
        ([("a" * 1025, "X", [])], f"layer '{'a' * 77}...': the name has 1025 bytes, at most 1024 can be read back"),
        ([("a", "X" * 1025, [])], "layer 'a': the type has 1025 bytes, at most 1024 can be read back"),
        ([("a", "X", [torch.ones(1).expand(2**29)])], "2,147,483,687 bytes, the format allows 2,147,483,647"),
        ([("a", "X", [np.broadcast_to(np.float64(1), (2**28,))])],
         "2,147,483,687 bytes, the format allows 2,147,483,647"),
    ],
)  # fmt: skip
def test_what_is_not_written(tmp_path: Path, layers: list[Any], text: str) -> None:
    target = tmp_path / "net.caffemodel"
    with pytest.raises(CaffeError) as error:
        write_layers(target, layers)
    assert str(error.value) == f"{target}: {text}"
    assert not list(tmp_path.iterdir())


def test_limits_of_writing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caffemodel, "MAX_LAYERS", 2)
    with pytest.raises(CaffeError, match="layers has 3 entries, at most 2 can be read back"):
        write_layers(path, [("a", "X", [])] * 3)
    monkeypatch.setattr(caffemodel, "MAX_BLOBS", 3)
    with pytest.raises(CaffeError, match="layers has 4 blobs, at most 3 can be read back"):
        write_layers(path, [("a", "X", [_ONE] * 2), ("b", "X", [_ONE] * 2)])


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CaffeError, match="is a folder, the name of a file to write is expected"):
        write_layers(tmp_path, [("a", "X", [])])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_layers(tmp_path / "no" / "net.caffemodel", [("a", "X", [])])


# Mean images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("as_array", [True, False])
def test_mean(path: Path, dtype: torch.dtype, as_array: bool) -> None:
    mean = torch.arange(24.0).reshape(3, 2, 4).to(dtype)
    write_mean(path, mean.numpy() if as_array else mean)
    proto = CLASSES["BlobProto"].FromString(path.read_bytes())
    assert (proto.num, proto.channels, proto.height, proto.width) == (1, 3, 2, 4) and not proto.HasField("shape")
    assert list(proto.data) == list(range(24))
    stored = read_mean(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # the same file: what was read does not change
    assert stored.dtype == torch.float32 and torch.equal(stored, mean.float())
    stored += 1


@pytest.mark.parametrize("shape", [[3, 2, 4], [1, 3, 2, 4], [1, 1, 3, 2, 4]])
@pytest.mark.parametrize("field", ["data", "double_data"])
def test_mean_with_a_shape(path: Path, shape: list[int], field: str) -> None:
    path.write_bytes(make("BlobProto", shape={"dim": shape}, **{field: range(24)}).SerializeToString())
    assert torch.equal(read_mean(path), torch.arange(24.0).reshape(3, 2, 4))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (make("BlobProto", data=[1], shape={"dim": [1]}),
         "the mean is 1, one image of [C, H, W] or [1, C, H, W] is expected"),
        (make("BlobProto", data=[1] * 6, num=2, channels=3, height=1, width=1),
         "the mean is 2x3x1x1, one image of [C, H, W] or [1, C, H, W] is expected"),
        (make("BlobProto", num=1, channels=3, height=0, width=0),
         "the mean is 1x3x0x0, one image of [C, H, W] or [1, C, H, W] is expected"),
        (make("BlobProto", data=[1] * 5, num=1, channels=3, height=1, width=1),
         "the mean declares 1x3x1x1 = 3 values and holds 5; one image, a BlobProto, is expected"),
        (make("NetParameter", name="net"),
         "field 1 at byte 0 is bytes; a blob's num is a varint; one image, a BlobProto, is expected"),
    ],
)  # fmt: skip
def test_no_mean(path: Path, data: Any, text: str) -> None:
    path.write_bytes(data.SerializeToString())
    with pytest.raises(CaffeError) as error:
        read_mean(path)
    assert str(error.value) == f"{path}: {text}"


def test_no_mean_to_write(tmp_path: Path) -> None:
    for shape, shown in (((3, 2), "3x2"), ((1, 3, 2, 2), "1x3x2x2"), ((3, 0, 2), "3x0x2")):
        with pytest.raises(CaffeError, match=re.escape(f"the mean is {shown}, one image of [C, H, W] is expected")):
            write_mean(tmp_path / "mean.binaryproto", torch.ones(shape))
    with pytest.raises(CaffeError, match=r"2,147,483,6.. bytes, the format allows 2,147,483,647"):
        write_mean(tmp_path / "mean.binaryproto", torch.ones(1).expand(1, 1, 2**29))
    assert not list(tmp_path.iterdir())


# Hostile files


def _groups(depth: int) -> bytes:
    return b"\xc3\x3e" * depth + b"\xc4\x3e" * depth


_AT = "layer 'conv1' at byte 0"
_GOOD = blob([1.0], [1])
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty, a caffemodel is expected"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "seems to be an HDF5 file (.caffemodel.h5), a caffemodel is expected"),
    "zip": (b"PK\x03\x04" + bytes(50), "seems to be a zip archive (.zip, .npz, .pth), a caffemodel is expected"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "seems to be a gzip archive, a caffemodel is expected"),
    "pickle": (b"\x80\x02}q\x00.", "seems to be a Python pickle (.pth, .pkl), a caffemodel is expected"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{\"a\":", "seems to be a safetensors file, a caffemodel is expected"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n",
            "seems to be a Git LFS pointer, not the file itself, a caffemodel is expected"),
    "html": (b"<!DOCTYPE html><html>", "seems to be a web page, a caffemodel is expected"),
    "prototxt": (b'# a net\nname: "ResNet-50"\nlayer {\n}\n',
                 "seems to be a definition as text (.prototxt), a caffemodel is expected"),
    "prototxt after a blank line": (b'\n\tlayer {\n\tname: "a" }\n',
                                    "seems to be a definition as text (.prototxt), a caffemodel is expected"),
    "no layers": (b"\x0a\x03net", "holds no layers, a net with weights (.caffemodel) is expected"),
    "mean file": (blob([1.0], [1], num=1, channels=1, height=1, width=1).SerializeToString(),
                  "field 1 at byte 0 is a varint; the net's name is bytes"),
    "zeros": (bytes(10), "no field begins at byte 0: damaged, or no protobuf message"),
    "wire type 7": (b"\x0f\x00", "no field begins at byte 0: damaged, or no protobuf message"),
    "field number too large": (b"\x80\x80\x80\x80\x10\x00",
                               "no field begins at byte 0: damaged, or no protobuf message"),
    "tag of 11 bytes": (b"\xff" * 11, "the number at byte 0 has more than the 10 bytes of a varint"),
    "varint of 11 bytes": (b"\x20" + b"\xff" * 10 + b"\x01",
                           "the number at byte 1 has more than the 10 bytes of a varint"),
    "varint cut off": (b"\x20\xff", "the number at byte 1 is cut off at byte 2: truncated or damaged"),
    "huge layer": (b"\xa2\x06\xff\xff\xff\xff\x07ab",
                   "field 100 at byte 0 has 2147483647 bytes, and 2 are left of its message: truncated or damaged"),
    "length of 2**64 - 1": (
        b"\xa2\x06" + b"\xff" * 9 + b"\x01",
        "field 100 at byte 0 has 18446744073709551615 bytes, and 0 are left of its message: truncated or damaged"),
    "huge blob": (
        message(100, b"\x0a\x05conv1\x3a\xff\xff\x7f"),
        "layer 0 at byte 0: field 7 at byte 10 has 2097151 bytes, and 0 are left of its message: truncated or damaged"),
    "huge data": (conv1(b"\x2a\x80\x01abcd"),
                  f"{_AT}: field 5 at byte 25 has 128 bytes, and 4 are left of its message: "
                  "truncated or damaged"),
    "double cut off": (conv1(b"\x41abcd"), f"{_AT}: field 8 at byte 25 has 8 bytes, and 4 are left of its message: "
                       "truncated or damaged"),
    "data of 7 bytes": (conv1(message(5, bytes(7))),
                        f"{_AT}: field 5 at byte 25 has 7 bytes; a blob's data is numbers of 4 bytes"),
    "double_data of 12 bytes": (conv1(message(8, bytes(12))),
                                f"{_AT}: field 8 at byte 25 has 12 bytes; a blob's double_data is numbers of 8 bytes"),
    "one value too few": (conv1(blob([0.0] * 9407, [64, 3, 7, 7])),
                          f"{_AT}: blob 0 declares 64x3x7x7 = 9408 values and holds 9407"),
    "second blob": (conv1(_GOOD, blob([1.0, 2.0], [3])), f"{_AT}: blob 1 declares 3 = 3 values and holds 2"),
    "legacy mismatch": (conv1(make("BlobProto", num=2, channels=2, data=[1.0] * 4)),
                        f"{_AT}: blob 0 declares 2x2x0x0 = 0 values and holds 4"),
    "neither shape nor values": (conv1(b""), f"{_AT}: blob 0 declares no dimensions = 1 values and holds 0"),
    "values without a shape": (conv1(make("BlobProto", data=[1.0, 2.0])),
                               f"{_AT}: blob 0 declares no dimensions = 1 values and holds 2"),
    "huge dimensions": (conv1(blob([1.0], [2**31 - 1] * 3)),
                        f"{_AT}: blob 0 declares 2147483647x2147483647x2147483647 = {(2**31 - 1) ** 3} values and "
                        "holds 1"),
    "product overflows to the count": (conv1(blob([], [2**30, 2**30, 16])),
                                       f"{_AT}: blob 0 declares 1073741824x1073741824x16 = {2**64} values and holds 0"),
    "dimension of 2**31": (conv1(blob([], [2**31, 0])),
                           f"{_AT}: blob 0 declares 2147483648x0; dimensions are from 0 to 2147483647"),
    "negative dimension": (conv1(blob([1.0], [-1, -1])),
                           f"{_AT}: blob 0 declares -1x-1; dimensions are from 0 to 2147483647"),
    "smallest int64": (conv1(blob([1.0], [-(2**63)])),
                       f"{_AT}: blob 0 declares -9223372036854775808; dimensions are from 0 to 2147483647"),
    "negative legacy": (conv1(make("BlobProto", num=-3, channels=-1, height=1, width=1)),
                        f"{_AT}: blob 0 declares -3x-1x1x1; dimensions are from 0 to 2147483647"),
    "33 dimensions": (conv1(blob([1.0], [1] * 33)), f"{_AT}: blob 0 has more than 32 dimensions"),
    "65 blobs": (conv1(*[_GOOD] * 65), "layer 0 at byte 0: more than 64 blobs until byte 856"),
    "name not UTF-8": (message(100, message(1, b"ab\xff")),
                       "layer 0 at byte 0: the layer's name at byte 3 is not UTF-8 (byte 7)"),
    "name of 2 kB": (message(100, message(1, b"a" * 2000)),
                     "layer 0 at byte 0: the layer's name at byte 4 has 2000 bytes, at most 1024 are read"),
    "line break in a name": (layer("a\nb", "X", blob([1.0], [2])),
                             "layer 'a\\nb' at byte 0: blob 0 declares 2 = 2 values and holds 1"),
    "same name twice": (conv1(_GOOD) * 2,
                        "two layers are named 'conv1' and have blobs, at bytes 0 and 36; "
                        "Caffe finds weights by name, so names must differ"),
    "both versions": (b"\x12\x00" + layer(),
                      "field 100 at byte 2 is `layer` (V2), and those before are of the other format; a net has one of "
                      "them"),
    "V0": (message(2, message(1, b"")),
           "layer 0 at byte 0: field 1 at byte 2 is a layer of the V0 format; convert the file "
           "with Caffe's upgrade_net_proto_binary"),
    "groups 101 deep": (_groups(102), "groups nested more than 100 deep at byte 200"),
    "groups without end": (b"\xc3\x3e" * 50, "the group 1000 at byte 0 never ends: truncated or damaged"),
    "group that never began": (b"\xc4\x3e", "field 1000 at byte 0 ends a group that never began"),
    "group with another's end": (b"\xc3\x3e\xcc\x3e", "field 1001 at byte 2 ends a group that never began"),
    "name as a varint": (message(100, b"\x08\x01"),
                         "layer 0 at byte 0: field 1 at byte 3 is a varint; the layer's name is bytes"),
    "type as a float": (message(100, b"\x15abcd"),
                        "layer 0 at byte 0: field 2 at byte 3 is a 4-byte number; the layer's type is bytes"),
    "V1 type as bytes": (message(2, b"\x2a\x00"),
                         "layer 0 at byte 0: field 5 at byte 2 is bytes; the layer's type is a varint"),
    "blob as a varint": (message(100, b"\x38\x01"),
                         "layer 0 at byte 0: field 7 at byte 3 is a varint; a blob is bytes"),
    "layer as a group": (b"\xa3\x06\xa4\x06", "field 100 at byte 0 is a group; a layer is bytes"),
    "data as a varint": (conv1(b"\x28\x01"),
                         f"{_AT}: field 5 at byte 25 is a varint; a blob's data is bytes or a 4-byte number"),
    "data as doubles": (conv1(b"\x29abcdefgh"),
                        f"{_AT}: field 5 at byte 25 is an 8-byte number; a blob's data is bytes or a 4-byte number"),
    "double_data as floats": (
        conv1(b"\x45abcd"),
        f"{_AT}: field 8 at byte 25 is a 4-byte number; a blob's double_data is bytes or an 8-byte number"),
    "shape as a varint": (conv1(b"\x38\x01"), f"{_AT}: field 7 at byte 25 is a varint; a blob's shape is bytes"),
    "dim as a float": (conv1(b"\x3a\x05\x0dabcd"),
                       f"{_AT}: field 1 at byte 27 is a 4-byte number; a dimension is a varint or bytes"),
    "height as bytes": (conv1(b"\x1a\x00"), f"{_AT}: field 3 at byte 25 is bytes; a blob's height is a varint"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(path: Path, case: str) -> None:
    data, text = HOSTILE[case]
    path.write_bytes(data)
    with pytest.raises(CaffeError) as error:
        read(path)
    assert str(error.value) == f"{path}: {text}"
    assert "\n" not in str(error.value)


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, a caffemodel is expected"):
        read(tmp_path / "net.caffemodel")
    with pytest.raises(CaffeError, match="is a folder, a caffemodel is expected"):
        read(tmp_path)
    with pytest.raises(CaffeError, match=r"is a device, a mean file \(.binaryproto\) is expected"):
        read_mean(os.devnull)
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(CaffeError, match="2,147,483,648 bytes, the format allows 2,147,483,647"):
        read(tmp_path / "big")


_MB = 1 << 20
_FILLED: dict[str, tuple[Callable[[int], bytes], str]] = {
    "empty V1 layers": (lambda n: b"\x12\x00" * (n // 2), "more than 100,000 layers until byte 200000"),
    "empty V2 layers": (lambda n: b"\xa2\x06\x00" * (n // 3), "more than 100,000 layers until byte 300000"),
    "empty blobs": (lambda n: message(100, b"\x3a\x00" * (n // 2)), "more than 64 blobs until byte"),
    "layers of blobs": (lambda n: message(100, b"\x3a\x02\x08\x00" * 60) * (n // 245), r"two layers are named ''"),
    "named layers of blobs": (
        lambda n: b"".join(message(100, message(1, b"%d" % i) + b"\x3a\x02\x08\x00" * 60) for i in range(n // 245)),
        "more than 100,000 blobs in the file",
    ),
    "names": (lambda n: message(100, b"\x0a\x00" * (n // 2)), "more than 1,000,000 fields until byte"),
    "unknown varints": (lambda n: b"\x48\x00" * (n // 2), "more than 1,000,000 fields until byte 2000000"),
    "unknown pairs": (lambda n: b"\x4dabcd\x4dabcd\x48\x00" * (n // 12), "more than 1,000,000 fields until byte"),
    "one unknown run": (lambda n: b"\x4dabcd" * (n // 5), "holds no layers"),
    "groups": (lambda n: b"\x4b" + b"\x53\x54" * (n // 2) + b"\x4c", "more than 1,000,000 fields until byte"),
    "packed dimensions": (lambda n: conv1(message(7, message(1, b"\x00" * n))), "more than 32 dimensions"),
    "dimensions of many blobs": (
        lambda n: b"".join(
            message(100, message(1, b"%d" % i) + message(7, message(7, message(1, b"\xff\xff\x7f" * 31 + b"\0"))) * 60)
            for i in range(n // 6000)
        ),
        "more than 1,000,000 fields until byte",
    ),
    "empty chunks": (lambda n: conv1(b"\x2a\x00" * (n // 2)), "more than 1,000,000 fields until byte"),
    "chunks of one": (lambda n: conv1(b"\x2dabcd\x48\x00" * (n // 7)), "more than 1,000,000 fields until byte"),
    "one long name": (lambda n: message(1, b"a" * n), "the net's name at byte 0 has"),
}


@pytest.mark.parametrize("case", _FILLED)
def test_memory_of_hostile_files(path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """With a hundredth of the limits, as Python is slow under tracemalloc; a file of twice the size needs no more."""
    make_bytes, text = _FILLED[case]
    for module, name in ((wire, "MAX_FIELDS"), (caffemodel, "MAX_LAYERS"), (caffemodel, "MAX_BLOBS")):
        monkeypatch.setattr(module, name, getattr(module, name) // 100)
        text = text.replace(f"{getattr(module, name) * 100:,}", f"{getattr(module, name):,}")
    peaks = []
    for size in (_MB // 8, _MB // 4):
        path.write_bytes(make_bytes(size))
        tracemalloc.start()
        error = outcome(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert isinstance(error, str)
        assert text.split(" until byte")[0] in error
    assert peaks[0] < _MB // 2, f"{peaks[0]:,} bytes"
    assert peaks[1] < 1.1 * peaks[0] + 20_000, f"{peaks[0]:,} and {peaks[1]:,} bytes"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_peak_memory_of_60_megabytes(tmp_path: Path) -> None:
    cases = ["empty V1 layers", "named layers of blobs"]
    paths = [tmp_path / f"{index}.caffemodel" for index in range(len(cases))]
    for path, case in zip(paths, cases, strict=True):
        path.write_bytes(_FILLED[case][0](_MB) * 60)
    for case, (grown, text) in zip(cases, peak_memory(*paths), strict=True):
        assert grown < 80, text  # MiB
        assert _FILLED[case][1] in text


def small() -> bytes:
    net = make("NetParameter", name="net", input=["data"], input_dim=[1, 3, 2, 2])
    net.layer.add(name="data", type="Input", top=["data"])
    stored = [blob([1.0, 2.0], [2, 1]), make("BlobProto", double_data=[1])]
    net.layer.add(name="conv1", type="Convolution", blobs=stored)
    encoded: bytes = net.SerializeToString() + _groups(2)
    return encoded


def small_v1() -> bytes:
    stored = make("BlobProto", packed=False, num=1, channels=1, height=1, width=3, data=[1.0, 2.0, 3.0], diff=[1.0])
    net = make("NetParameter", packed=False, name="net", layers=[{"name": "fc", "type": 14, "blobs": [stored]}])
    encoded: bytes = net.SerializeToString()
    return encoded


SMALL, SMALL_V1 = small(), small_v1()


@pytest.mark.parametrize("data", [SMALL, SMALL_V1], ids=["V2", "V1"])
def test_truncated_at_every_byte(path: Path, data: bytes) -> None:
    boundaries = {field.stop for field in wire.Reader(data).fields(0, len(data))}
    layers_seen = 0
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        net = outcome(path)
        if isinstance(net, str):
            assert size not in boundaries or "holds no layers" in net
        else:
            assert size in boundaries
            assert len(net.layers) >= layers_seen
            layers_seen = len(net.layers)
    assert layers_seen == (2 if data == SMALL else 1)


def assert_read_as_protobuf_or_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    net = outcome(path)
    if isinstance(net, str):
        return
    try:
        expected = READ["NetParameter"].FromString(data)
    except DecodeError:
        pytest.fail("was read, and protobuf refuses it")
    assert_same(net, expected)


@given(
    st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda data: b"\xa2\x06" + bytes([len(data)]) + data))
)
@settings(max_examples=200, deadline=None)
def test_random_bytes(path: Path, data: bytes) -> None:
    assert_read_as_protobuf_or_refused(path, data)


@st.composite
def mutated(draw: DrawFn, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(changed) - 1))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat"]))
        if kind == "flip":
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            changed[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "delete" and len(changed) > 4:
            del changed[at : at + draw(st.integers(1, 3))]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + draw(st.integers(1, 20))]
    return bytes(changed)


@given(st.one_of(mutated(SMALL), mutated(SMALL_V1)))
@settings(max_examples=300, deadline=None)
def test_mutated_files(path: Path, data: bytes) -> None:
    assert_read_as_protobuf_or_refused(path, data)
