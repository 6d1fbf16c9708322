"""Pickles read as data: tensors come back as torch.load gives them, and nothing that a file says is done."""

from __future__ import annotations

import builtins
import importlib
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fast.models import WeightsError, checkpoint, torchfile
from tests.models.test_weights import same

WITH_ATTRIBUTE = torch.arange(3.0)
WITH_ATTRIBUTE.note = "x"  # type: ignore[attr-defined]
BASE = torch.arange(24.0).reshape(4, 6)

TENSORS: dict[str, Tensor] = {
    **{str(dtype): torch.tensor([[0, 1], [2, 3]]).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.float8_e4m3fn)},
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "view": BASE.t()[1:3, ::2],
    "same storage": BASE[1:],
    "expanded": torch.ones(1).expand(3, 4),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": nn.Parameter(torch.arange(2.0)),
    "attribute": WITH_ATTRIBUTE,
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_of_torch_load(protocol: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    # Of newer dtypes torch cannot read what it writes in the old format.
    tensors = {name: of for name, of in TENSORS.items() if zipped or not re.search(r"uint16|uint32|float8", name)}
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=False)
    with torchfile.open_torch(path) as file:
        found = {name: file.tensor(value) for name, value in file.content.items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert type(tensor) is Tensor and not tensor.requires_grad
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert tensor.stride() == expected[name].stride() or not tensor.numel()
        assert torch.equal(tensor.to(torch.complex128), expected[name].detach().to(torch.complex128))
    assert found["view"].untyped_storage().data_ptr() == found["same storage"].untyped_storage().data_ptr()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": {"state": {0: {"b": torch.ones(10_000_000)}}}}, path)
    tracemalloc.start()
    try:
        assert same(checkpoint.read_checkpoint(path), {"a": torch.ones(2)})
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


# What a hostile pickle consists of.


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def dictionary(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


A_TENSOR = text("a") + b"".join([
    glob("torch._utils", "_rebuild_tensor_v2"), b"((", text("storage"), glob("torch", "FloatStorage"), text("0"),
    text("cpu"), b"K\x02tQK\x00K\x02\x85K\x01\x85\x89}tR",
])  # fmt: skip


class Exploded(Exception):
    pass


CALLS = {
    "os.system": glob("posix", "system") + b"(" + text("touch exploded") + b"tR",
    "os.system, protocol 0": b"cposix\nsystem\n(S'touch exploded'\ntR",
    "os.mkdir, STACK_GLOBAL": text("os") + text("mkdir") + b"\x93" + text("exploded") + b"\x85R",
    "os.mkdir, INST": b"(" + text("exploded") + b"ios\nmkdir\n",
    "os.mkdir, OBJ": b"(" + glob("os", "mkdir") + text("exploded") + b"o",
    "eval": glob("builtins", "eval") + text("open('exploded', 'w')") + b"\x85R",
    "__import__": glob("builtins", "__import__") + text("antigravity") + b"\x85R",
    "NEWOBJ": glob("subprocess", "Popen") + text("touch exploded") + b"\x85\x81",
    "NEWOBJ_EX": glob("subprocess", "Popen") + text("touch exploded") + b"\x85}\x92",
    "a module that is imported": glob("exploding", "anything") + b")R",
    "__setstate__": glob("argparse", "Namespace") + b")\x81"
        + dictionary(text("__setstate__"), glob("posix", "system")) + b"b" + text("touch exploded") + b"b",
    "BUILD of a class": glob("torch._utils", "_rebuild_tensor_v2")
        + b"N" + dictionary(text("__defaults__"), b")") + b"\x86b",
    "an extension's code": b"\x82\x01",
    "a persistent id": b"(" + text("module") + glob("os", "system") + text("a") + text("b") + b"tQ",
    "getattr": glob("builtins", "getattr") + glob("os", "") + text("system") + b"\x86R" + text("exploded") + b"\x85R",
    "torch.load": glob("torch.hub", "load_state_dict_from_url") + text("file:///exploded") + b"\x85R",
}  # fmt: skip


def write_zip(path: Path, content: bytes) -> None:
    """A torch file with the storage "0", of two float32."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("w/data/0", struct.pack("<2f", 1, 2))


def write_old(path: Path, content: bytes) -> None:
    head = b"".join(pickle.dumps(part, 2) for part in (torchfile._MAGIC, 1001, {}))
    keys = pickle.dumps(["0"], 2)
    path.write_bytes(head + b"\x80\x02" + content + b"." + keys + struct.pack("<q2f", 2, 1, 2))


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and an interpreter in which nothing can be imported or started."""

    def explode(*_: Any, **__: Any) -> Any:
        raise Exploded

    checkpoint.read_checkpoint(_harmless(tmp_path))  # whatever is imported late
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exploding.py").write_text("open('exploded', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for owner, name in ((os, "system"), (os, "mkdir"), (builtins, "eval"), (importlib, "import_module")):
        monkeypatch.setattr(owner, name, explode)
    return tmp_path


def _harmless(folder: Path) -> Path:
    torch.save({"a": torch.ones(1)}, folder / "harmless.pth")
    return folder / "harmless.pth"


@pytest.mark.parametrize("write", [write_zip, write_old])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_called(call: str, write: Callable[[Path, bytes], None], guarded: Path) -> None:
    """Beside tensors it is passed over; in their place, or as the whole, it is refused."""
    path = guarded / "w.pth"
    write(path, dictionary(text("model"), dictionary(A_TENSOR), text("x"), CALLS[call]))
    assert same(checkpoint.read_checkpoint(path), {"a": torch.tensor([1.0, 2.0])})
    for content in (CALLS[call], dictionary(A_TENSOR, text("b"), CALLS[call])):
        write(path, content)
        with pytest.raises(WeightsError) as caught:
            checkpoint.read_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert not {"exploding", "antigravity"} & sys.modules.keys()
    assert not (guarded / "exploded").exists()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little")


EMPTY = b"K\x00" + number(2**62) * 2 + b"\x87" + b"K\x01" * 3 + b"\x87"
WRAPPED = number(2**62) + b"\x85" + b"K\x00\x85"
SQUARE = number(2**32) * 2 + b"\x86" + b"K\x00" * 2 + b"\x86"

ODD = {
    "nothing on the stack": b"",
    "no mark": b"}u",
    "a memo that is not there": b"h\x07",
    "a huge memo index": b"]r\xff\xff\xff\xffj\xff\xff\xff\xff0",
    "unhashable keys": b"}]K\x01s",
    "nested tuples as a key": b"}" + b")" + b"\x85" * 20_000 + b"K\x01s",
    "nested lists": b"]" * 5_000 + b"a" * 4_999,
    "nested dictionaries": (b"}" + text("a")) * 12_000 + b"N" + b"s" * 12_000,
    "a long string that is not there": b"\x8d" + struct.pack("<Q", 2**40) + b"x",
    "a long bytearray that is not there": b"\x96" + struct.pack("<Q", 2**40) + b"x",
    "a long number": b"L" + b"9" * 100_000 + b"L\n",
    "a dictionary in itself": b"}q\x00" + text("a") + b"h\x00s",
    "many paths": b"".join(b"}q" + bytes([i]) + b"(" + (b"" if not i else b"".join(
        text(str(j)) + b"h" + bytes([i - 1]) for j in range(50))) + b"u" for i in range(30)),
    "a string that is no text": b"X\x01\x00\x00\x00\xff",
    "another dtype's storage": text("a") + b"0" + A_TENSOR.replace(b"FloatStorage", b"QInt8Storage"),
    "a larger tensor than its storage": b"}(" + A_TENSOR.replace(b"K\x02\x85K\x01", b"K\x03\x85K\x01") + b"u",
    "a tensor beyond all memory": b"}(" + A_TENSOR.replace(
        b"K\x02\x85K\x01\x85", b"\x8a\x08" + struct.pack("<q", 2**60) + b"\x85K\x00\x85") + b"u",
    "negative strides": b"}(" + A_TENSOR.replace(b"K\x01\x85", b"J\xff\xff\xff\xff\x85") + b"u",
    "a storage that is not there": b"}(" + A_TENSOR.replace(text("0"), text("1")) + b"u",
    "a storage called by a tuple, doubled many times": b"(" + text("storage") + glob("torch", "FloatStorage") + b")"
        + b"2\x86" * 26 + text("cpu") + b"K\x01tQ",
    "a storage called by a deep tuple": b"(" + text("storage") + glob("torch", "FloatStorage") + b")"
        + b"\x85" * 20_000 + text("cpu") + b"K\x01tQ",
    "a storage with a long key, named many times": b"]((" + text("storage") + glob("torch", "FloatStorage")
        + b"B" + struct.pack("<I", 2**20) + b"0" * 2**20 + text("cpu") + b"K\x01tq\x00Q" + b"h\x00Q" * 4000 + b"e",
    "a long name, made many times": b"](" + text("m" * 2**20) + b"q\x00" + b"h\x00h\x00\x93" * 4000 + b"e",
    "a name that is a number": text("torch") + b"K\x01\x93",
    "a long number as a key": b"}\x8b" + struct.pack("<I", 5000) + b"\x7f" * 5000 + b"Ns",
    "an empty tensor beyond all numbers": b"}(" + A_TENSOR.replace(b"K\x02\x85K\x01\x85", EMPTY) + b"u",
    "a tensor whose size is 0 for torch": b"}(" + A_TENSOR.replace(b"K\x02\x85K\x01\x85", WRAPPED) + b"u",
    "a square whose size is 0 for torch": b"}(" + A_TENSOR.replace(b"K\x02\x85K\x01\x85", SQUARE) + b"u",
    "more dimensions than torch has": b"}(" + A_TENSOR.replace(
        b"K\x02\x85K\x01\x85", b"(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t") + b"u",
    "a view of another dtype": b"}(" + A_TENSOR.replace(b"_v2", b"_v3").replace(b"FloatStorage", b"UntypedStorage")
        .replace(b"K\x02tQ", b"K\x07tQ").replace(b"\x89}tR", b"\x89}" + glob("torch", "uint32") + b"tR") + b"u",
    "other metadata of a tensor": b"}(" + A_TENSOR.replace(b"}tR", b"}}" + text("zero") + b"\x88stR") + b"u",
    "metadata of a tensor that is a number": b"}(" + A_TENSOR.replace(b"}tR", b"}K\x01tR") + b"u",
    "a class's name in red, on three lines": text("os\x1b[31m\n\n") + text("b" * 500) + b"\x93)R",
    "the same beside tensors": dictionary(A_TENSOR, text("b"), text("os\x1b[31m\n\n") + text("b" * 500) + b"\x93)R"),
    "a storage with a path": b"}(" + A_TENSOR.replace(text("0"), text("../../../etc/passwd")) + b"u",
}  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_old])
@pytest.mark.parametrize("name", ODD)
def test_damaged_and_hostile_pickles(name: str, write: Callable[[Path, bytes], None], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    write(path, ODD[name])
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as caught:
            checkpoint.read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("zipped", [True, False])
def test_each_flipped_bit(zipped: bool, tmp_path: Path) -> None:
    """Of a damaged file there is an error that names it, if it is one."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    messages = []
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x80]) + content[position + 1 :])
        try:
            checkpoint.read_checkpoint(path)
        except WeightsError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith(f"{path}: ") and message.isprintable() for message in messages)


@pytest.mark.parametrize(("position", "value", "message"), [
    (6, b"\x01", "encrypted"), (8, b"\x63", "damaged")
])  # fmt: skip
def test_zip_files_that_torch_does_not_write(position: int, value: bytes, message: str, tmp_path: Path) -> None:
    """Encrypted ones, and an unknown method, by the fields of both headers."""
    path = tmp_path / "w.pth"
    write_zip(path, dictionary(A_TENSOR))
    content = bytearray(path.read_bytes())
    for start, field in ((b"PK\x03\x04", position), (b"PK\x01\x02", position + 2)):
        at = content.index(start) + field
        content[at : at + 1] = value
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        checkpoint.read_checkpoint(path)


def test_damaged_lzma(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + dictionary(A_TENSOR) + b".")
    begin = path.read_bytes().index(b"w/data.pkl") + len("w/data.pkl")
    content = bytearray(path.read_bytes())
    content[begin + 9 : begin + 40] = b"\xff" * 31  # behind the method's parameters
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged \(LZMAError\)"):
        checkpoint.read_checkpoint(path)


def test_a_storage_of_an_old_file_beyond_all_files(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    write_old(path, dictionary(A_TENSOR))
    content = path.read_bytes()
    path.write_bytes(content[:-16] + struct.pack("<q", 2**62) + content[-8:])
    with pytest.raises(WeightsError, match="damaged"):
        checkpoint.read_checkpoint(path)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(torchfile, "_bytes", fail)
    with pytest.raises(WeightsError, match="too large for the memory"):
        checkpoint.read_checkpoint(_harmless(tmp_path))


def test_a_dtype_is_not_looked_up_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its attributes are modules, imported when they are asked for."""

    def explode(name: str) -> Any:
        raise Exploded

    path = tmp_path / "w.pth"
    of = A_TENSOR.replace(b"_v2", b"_v3").replace(b"\x89}tR", b"\x89}" + glob("torch", "_a_module") + b"tR")
    write_zip(path, dictionary(of))
    monkeypatch.setattr(torch, "__getattr__", explode)
    with pytest.raises(WeightsError, match="refused: contains code"):
        checkpoint.read_checkpoint(path)


def test_numbers_of_one_hash_are_no_keys(tmp_path: Path) -> None:
    """A dictionary of many would take hours."""
    numbers = [0, 5, -(2**31), 2**31 - 1, *(i * (2**61 - 1) for i in range(1, 9)), -(2**31) - 1, 2**31]
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps(dict.fromkeys(numbers), 2))
    with torchfile.open_torch(tmp_path / "w.pth") as file:
        assert list(file.content) == numbers[:4]


def test_names_are_kept_once(tmp_path: Path) -> None:
    """A pickle of 0.4 MB that says 80,000 times a name of 1,000 characters."""
    path = tmp_path / "w.pth"
    name = text("m" * 500) + b"q\x00"
    write_zip(path, dictionary(A_TENSOR, text("b"), b"](" + name + b"h\x00h\x00\x93" * 80_000 + b"e"))
    tracemalloc.start()
    try:
        with torchfile.open_torch(path) as file:
            assert len(file.content["b"]) == 80_001
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


COMPLEX = torch.complex(torch.arange(4.0), torch.arange(4.0) + 1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("tensor", [
    COMPLEX.conj(), COMPLEX.conj().imag, torch._neg_view(COMPLEX.conj()), torch._neg_view(COMPLEX),
    torch._neg_view(BASE.t()[1:3, ::2]), torch._neg_view(torch.ones(1).expand(3, 4)),
], ids=["conj", "imag of conj", "neg of conj", "neg of complex", "neg of a view", "neg, expanded"])  # fmt: skip
def test_marks_are_resolved(tensor: Tensor, zipped: bool, tmp_path: Path) -> None:
    """torch keeps a conjugate, and the imaginary part of one, as the data and a mark."""
    path = tmp_path / "w.pth"
    torch.save({"a": tensor}, path, _use_new_zipfile_serialization=zipped)
    found = checkpoint.read_checkpoint(path)["a"]
    assert torch.equal(found, torch.load(path)["a"]) and torch.equal(found, tensor)
    assert not found.is_neg() and not found.is_conj()


def test_views_of_old_files(tmp_path: Path) -> None:
    """Before 1.0 torch shared storages by views of them: a key of its own, where it begins, how long it is."""
    path = tmp_path / "w.pth"
    view = A_TENSOR.replace(b"K\x02tQ", b"K\x02(" + text("1") + b"K\x01K\x01ttQ").replace(
        b"K\x02\x85K\x01", b"K\x01\x85K\x01"
    )
    write_old(path, dictionary(view))
    assert same(checkpoint.read_checkpoint(path), {"a": torch.tensor([2.0])})
    write_old(path, dictionary(view.replace(b"K\x01\x85K\x01", b"K\x02\x85K\x01")))
    with pytest.raises(WeightsError, match="larger than its data"):
        checkpoint.read_checkpoint(path)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    for write in (write_zip, write_old):
        write(path, b"N0" * 600 + dictionary(A_TENSOR))
        assert same(checkpoint.read_checkpoint(path), {"a": torch.tensor([1.0, 2.0])})
        for limit, message in (("MAX_OPERATIONS", "1,000 operations"), ("MAX_PICKLE_BYTES", "1,000 bytes")):
            with monkeypatch.context() as patched:
                patched.setattr(torchfile, limit, 1000)
                with pytest.raises(WeightsError, match=f"refused: a pickle of more than {message}"):
                    checkpoint.read_checkpoint(path)


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(WeightsError, match="refused: a tar archive, as torch wrote"):
        checkpoint.read_checkpoint(path)
    for names, message in ((["a.npy"], "a zip file, but not a PyTorch checkpoint"),
                           (["a/data.pkl", "b/data.pkl"], "a zip file, but not"),
                           (["w/data.pkl", "w/code/constants.pkl"], "TorchScript"),
                           (["data.pkl", "constants.pkl"], "TorchScript")):  # fmt: skip
        with zipfile.ZipFile(path, "w") as zipped:
            for name in names:
                zipped.writestr(name, b"\x80\x02}.")
        with pytest.raises(WeightsError, match=message):
            checkpoint.read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("w/data.pkl", b"\x80\x02" + dictionary(A_TENSOR) + b".")
        zipped.writestr("w/byteorder", {"little": "big", "big": "little"}[sys.byteorder])
    with pytest.raises(WeightsError, match="another byte order"):
        checkpoint.read_checkpoint(path)
