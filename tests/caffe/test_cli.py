"""``resnet-fast convert`` and ``classify`` on Caffe networks: bits, answers computed by hand, and every refusal."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import resnet_fast as rf
from resnet_fast import caffe
from resnet_fast.caffe import caffemodel
from resnet_fast.inference.labels import read_labels
from resnet_fast.models.checkpoint import with_metadata
from tests.caffe import files as caffe_files
from tests.caffe.test_preprocessing import by_hand
from tests.command_line import run
from tests.numerics import assert_obeys_error_rule

TINY = """
name: "tiny [x]"
input: "data"
input_shape { dim: 10 dim: 3 dim: 32 dim: 32 }
layer { name: "conv1/7x7" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 8 kernel_size: 5 stride: 2 } }
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "scale1" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool.1" type: "Pooling" bottom: "conv1" top: "pool1" pooling_param { pool: AVE global_pooling: true } }
layer { name: "fc.3" type: "InnerProduct" bottom: "pool1" top: "fc" inner_product_param { num_output: 3 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of three classes as a.prototxt and a.caffemodel, two pictures, a mean image."""
    made = tmp_path_factory.mktemp("caffe_cli")
    net = small()
    caffe_files.write(made, net, "a")
    generator = torch.Generator().manual_seed(3)
    for index, (width, height) in enumerate(((41, 60), (90, 50))):
        coarse = torch.rand(3, 5, 5, generator=generator)[None]
        pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].mul(255).byte()
        Image.frombytes("RGB", (width, height), bytes(pixels.permute(1, 2, 0).flatten().tolist())).save(
            made / f"{index}.png"
        )
    caffe.write_mean(made / "mean.binaryproto", 100 + 40 * torch.rand(3, 40, 36, generator=generator))
    return made


def small(text: str = TINY) -> caffe.Net:
    """Random weights, of a size that tells pictures of 0 to 255 apart without being sure of anything."""
    net = caffe_files.network(text)
    with torch.no_grad():
        net.layer("fc.3").weight.mul_(0.02)
    return net


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(bits(a[key]), bits(b[key]))
        for key in a
    )


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def stored(path: Path) -> list[tuple[str, list[tuple[tuple[int, ...], bytes]]]]:
    """Names, shapes and bits of a caffemodel's blobs."""
    return [
        (layer.name, [(blob.shape, blob.values.tobytes()) for blob in layer.blobs])
        for layer in caffemodel.read(path).layers
    ]


# --- convert: Caffe's names


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_there_and_back_bit_for_bit(suffix: str, folder: Path, tmp_path: Path) -> None:
    net = caffe.load(folder / "a.prototxt", folder / "a.caffemodel")
    with torch.no_grad():  # a NaN with a payload, infinity, a denormal and -0 are bits too
        net.layer("scale1").bias[:4] = torch.tensor([0x7FC12345, 0x7F800000, 1, -(2**31)]).int().view(torch.float32)
    model, prototxt = (tmp_path / name for name in ("odd.caffemodel", "odd.prototxt"))
    caffe.save(net, prototxt, model)
    middle, back, definition = tmp_path / f"b{suffix}", tmp_path / "c.caffemodel", tmp_path / "c.prototxt"
    said = run("convert", model, middle, "--prototxt", prototxt).passed()
    assert said.startswith(
        f"{middle}: 9 tensors of 'tiny [x]' by Caffe's names, {middle.stat().st_size:,} bytes, sha256 "
    )
    read = load_file(middle) if suffix == ".safetensors" else torch.load(middle, weights_only=True)
    assert same_bits(read, net.state_dict())
    assert {"conv1/7x7.weight", "bn1.factor", "fc_3.bias"} < read.keys()

    run("convert", middle, back, "--write-prototxt", definition).passed()
    assert stored(back) == stored(model)
    assert caffe.read_prototxt(definition) == net.definition
    assert caffemodel.read(back).layers[0].name == "conv1/7x7"
    assert not list(tmp_path.glob(".*")), "temporary files"
    run("convert", model, tmp_path / "again.caffemodel", "--prototxt", prototxt).passed()
    assert stored(tmp_path / "again.caffemodel") == stored(model)
    plain = tmp_path / "plain.pth"
    torch.save(dict(read), plain)
    run("convert", plain, tmp_path / "d.caffemodel").failed("neither torchvision's names nor a definition")
    assert not (tmp_path / "d.caffemodel").exists()
    run("convert", plain, tmp_path / "d.caffemodel", "--prototxt", prototxt).passed()
    assert stored(tmp_path / "d.caffemodel") == stored(model)


def test_help() -> None:
    said = run("convert", "--help").passed()
    assert "SOURCE" in said and "--write-prototxt" in said
    assert "convert" in run("--help").passed()


def test_tensors_as_they_are(folder: Path, tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(4, 3).to(torch.bfloat16),
        "a.view": torch.randn(1000, 1000)[:2, :2],
        "counter": torch.tensor(7),
    }
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pth")
    run("convert", tmp_path / "a.pth", tmp_path / "b.safetensors").passed()
    assert same_bits(load_file(tmp_path / "b.safetensors"), state)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "c.safetensors", {"classes": "[]"})
    said = run("convert", tmp_path / "c.safetensors", tmp_path / "d.pt").passed()
    assert "3 tensors, " in said
    assert same_bits(torch.load(tmp_path / "d.pt", weights_only=True), state)
    run("convert", tmp_path / "d.pt", tmp_path / "g.safetensors").passed()
    assert same_bits(load_file(tmp_path / "g.safetensors"), state)
    assert metadata(tmp_path / "g.safetensors") == {"classes": "[]"}
    run("convert", tmp_path / "a.pth", tmp_path / "f.pth").passed()
    assert same_bits(torch.load(tmp_path / "f.pth", weights_only=True), state)
    assert (tmp_path / "f.pth").stat().st_size < 10_000 < (tmp_path / "a.pth").stat().st_size
    run("convert", tmp_path / "c.safetensors", tmp_path / "e.safetensors").passed()
    assert metadata(tmp_path / "e.safetensors") == {"classes": "[]"}


@pytest.mark.parametrize(
    "name", ["model_best.pth.tar", "pytorch_model.bin", "last.ckpt", "W.PTH", "weights", "a.caffemodel"]
)
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_the_content_decides(name: str, form: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(4, 3)}
    torch.save({"params": state}, tmp_path / name) if form == "torch" else save_file(state, tmp_path / name)
    for target in ("b.safetensors", "B.SAFETENSORS", "b.PT"):
        run("convert", tmp_path / name, tmp_path / target).passed()
        load = load_file if target != "b.PT" else torch.load
        assert same_bits(load(tmp_path / target), state)


def test_a_caffemodel_of_another_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes((folder / "a.caffemodel").read_bytes())
    run("convert", tmp_path / "weights.bin", tmp_path / "b.pth").failed("a caffemodel needs its definition")
    run("convert", tmp_path / "weights.bin", tmp_path / "b.pth", "-p", folder / "a.prototxt").passed()
    for content, mention in ((b"hello", "neither a caffemodel, nor safetensors"), (b"\x89HDF\r\n", "HDF5 is not read")):
        (tmp_path / "weights.bin").write_bytes(content)
        run("convert", tmp_path / "weights.bin", tmp_path / "c.pth").failed(mention)
    run("convert", tmp_path / "absent.bin", tmp_path / "c.pth").failed("absent.bin: no such file")


def test_one_of_several_networks(tmp_path: Path) -> None:
    state, path = NAMES | {"fc.weight": torch.ones(2, 2)}, tmp_path / "a.pth"
    torch.save({"student": state, "teacher": {name: 2 * tensor for name, tensor in state.items()}}, path)
    run("convert", path, tmp_path / "b.pth").failed("holds 2 ResNets ('student', 'teacher')")
    run("convert", f"{path}:teacher", tmp_path / "b.pth").passed()
    assert float(torch.load(tmp_path / "b.pth", weights_only=True)["bn1.running_mean"]) == 2
    run("convert", f"{path}:teacher", path).failed("would be written over")


@pytest.mark.skipif(os.name == "nt", reason="no limits on the size of files")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".caffemodel"])
def test_full_disk(suffix: str, folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses to write more in the same way."""
    import resource

    state = caffe.load(folder / "a.prototxt", folder / "a.caffemodel").state_dict()
    if suffix != ".caffemodel":
        state |= {"large": torch.randn(100_000)}  # torch hides the system's error behind one of its own then
    torch.save(state, tmp_path / "a.pth")
    (tmp_path / f"b{suffix}").write_text("old")
    given = [tmp_path / "a.pth", tmp_path / f"b{suffix}"]
    given += ["--prototxt", folder / "a.prototxt"] if suffix == ".caffemodel" else []
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if suffix == ".caffemodel" else 50_000, most))
    try:
        found = run("convert", *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    found.failed(f"b{suffix}: cannot be written (File too large); what was there before is whole")
    assert (tmp_path / f"b{suffix}").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", f"b{suffix}"]


def test_doubles_and_halves_are_kept(folder: Path, tmp_path: Path) -> None:
    """Half precision is widened, which is exact; float64 becomes a caffemodel's double_data."""
    for dtype, stored_as in ((torch.float64, "float64"), (torch.float16, "float32")):
        net = small().to(dtype)
        save_file(net.state_dict(), tmp_path / "a.safetensors")
        run("convert", tmp_path / "a.safetensors", tmp_path / "a.caffemodel", "-p", folder / "a.prototxt").passed()
        layer = caffemodel.read(tmp_path / "a.caffemodel").layers[0]
        assert str(layer.blobs[0].values.dtype) == stored_as
        assert torch.equal(layer.blobs[0].tensor().to(dtype), net.layer("conv1/7x7").weight)


# --- convert: torchvision's names


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-50 with random weights and ten classes as Caffe has it, and converted to torchvision's names."""
    made = tmp_path_factory.mktemp("resnet")
    text = caffe.deploy_prototxt(50).replace("num_output: 1000", "num_output: 10")
    caffe_files.write(made, caffe_files.network(text), "net")
    arguments = ["--prototxt", made / "net.prototxt", "--to", "torchvision"]
    (made / "said.txt").write_text(
        run("convert", made / "net.caffemodel", made / "tv.safetensors", *arguments).passed()
    )
    return made


def test_to_torchvision_names(resnet: Path) -> None:
    said = (resnet / "said.txt").read_text()
    assert "320 tensors of 'ResNet-50' by torchvision's names" in said
    assert "resnet_fast.resnet50(stride_in_1x1=True, unpadded_pool=True, num_classes=10)" in said
    assert metadata(resnet / "tv.safetensors") == {
        "names": "torchvision",
        "arch": "resnet50",
        "stride_in_1x1": "true",
        "unpadded_pool": "true",
    }
    model = rf.resnet50(stride_in_1x1=True, unpadded_pool=True, weights=resnet / "tv.safetensors").eval()
    net = caffe.load(resnet / "net.prototxt", resnet / "net.caffemodel")
    x = caffe_files.image(1, 3, 224, 224)
    with torch.no_grad():
        scores, fc = model(x), net.blobs(x, ["fc1000"])["fc1000"]
        wide = net.double().blobs(x.double(), ["fc1000"])["fc1000"]
    assert_obeys_error_rule(scores, fc, wide)


def test_torchvision_names_and_back(resnet: Path, tmp_path: Path) -> None:
    """The statistics are rounded once on the way there, nothing on the way back."""
    state = load_file(resnet / "tv.safetensors")
    torch.save(state, tmp_path / "b.pth")
    run(
        "convert", tmp_path / "b.pth", tmp_path / "b.caffemodel", "--v1", "--write-prototxt", tmp_path / "b.prototxt"
    ).passed()
    net = caffe.load(tmp_path / "b.prototxt", tmp_path / "b.caffemodel")
    assert same_bits(caffe.to_state_dict(net), state)


# The names of a ResNet, as far as it takes to be recognised.
NAMES = {name: torch.ones(1) for name in ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight")}
CAFFE = {"names": "torchvision", "arch": "resnet50", "stride_in_1x1": "true", "unpadded_pool": "true"}


@pytest.mark.parametrize(
    ("told", "flags", "mention"),
    [
        ({}, [], "names do not tell where the stride is"),
        ({}, ["--v1"], "its blocks are not those of ResNet-50, 101 or 152"),
        ({"names": "torchvision"}, [], "say so with --v1"),
        (CAFFE, [], "its blocks are not those of ResNet-50, 101 or 152"),
        (CAFFE, ["--prototxt", "a.prototxt"], "whose definition is known"),
        # What `train imagenet` writes:
        ({"arch": "resnet50", "classes": "[]"}, [], "calls it a 'resnet50' without stride_in_1x1"),
        ({"arch": "resnet50", "classes": "[]"}, ["--v1"], "calls it a 'resnet50' without stride_in_1x1"),
        (CAFFE | {"unpadded_pool": "false"}, ["--v1"], "calls it a 'resnet50' without stride_in_1x1 and unpadded_pool"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_whose_weights_they_are(
    told: dict[str, str], flags: list[str], mention: str, suffix: str, tmp_path: Path
) -> None:
    if suffix == ".safetensors":
        save_file(NAMES, tmp_path / "a.safetensors", told)
    else:
        torch.save(with_metadata(NAMES, told), tmp_path / "a.pth")
    run("convert", tmp_path / f"a{suffix}", tmp_path / "a.caffemodel", *flags).failed(mention)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_classify_refuses_torchvision_names_of_caffe(suffix: str, tmp_path: Path) -> None:
    save_file(NAMES, tmp_path / "a.safetensors", CAFFE)
    run("convert", tmp_path / "a.safetensors", tmp_path / f"b{suffix}").passed()
    found = run("classify", picture(tmp_path), "-w", tmp_path / f"b{suffix}")
    found.failed("weights of a Caffe ResNet", "--caffemodel")
    with pytest.raises(rf.models.WeightsError, match="made with stride_in_1x1=True, unpadded_pool=True"):
        rf.resnet50(weights=tmp_path / f"b{suffix}")


def picture(folder: Path) -> Path:
    Image.new("RGB", (40, 40)).save(folder / "picture.png")
    return folder / "picture.png"


def test_other_resnets_are_no_caffe_models(tmp_path: Path) -> None:
    """ResNet-34 has the block counts of ResNet-50."""
    save_file(rf.resnet34(num_classes=10).state_dict(), tmp_path / "34.safetensors")
    found = run("convert", tmp_path / "34.safetensors", tmp_path / "a.caffemodel", "--v1")
    found.failed("its blocks are not those of ResNet-50, 101 or 152")


def test_torchvision_names_of_another_network(folder: Path, tmp_path: Path) -> None:
    arguments = ["--prototxt", folder / "a.prototxt", "--to", "torchvision"]
    found = run("convert", folder / "a.caffemodel", tmp_path / "a.pth", *arguments)
    found.failed("a.prototxt", "layer 'conv1/7x7'", "ResNet-50, 101 and 152 as published are what can be converted")
    assert not (tmp_path / "a.pth").exists()


# --- convert: refusals


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["a.caffemodel", "b.onnx"], ["b.onnx", "its suffix", ".caffemodel, .safetensors, .pth, .pt"]),
        (["a.caffemodel", "b.pth"], ["a caffemodel needs its definition", "--prototxt"]),
        (["absent.caffemodel", "b.pth", "-p", "a.prototxt"], ["absent.caffemodel: no such file"]),
        (["a.caffemodel", "b.pth", "-p", "absent.prototxt"], ["absent.prototxt: no such prototxt"]),
        (["a.caffemodel", "b.pth", "-p", "other.prototxt"], ["'fc.3'", "4x8", "do not belong together"]),
        (["a.caffemodel", "b.pth", "-p", "a.caffemodel"], ["is it the caffemodel?"]),
        (["a.caffemodel", "a.caffemodel", "-p", "a.prototxt"], ["would be written over"]),
        (["a.caffemodel", "b.caffemodel", "-p", "a.prototxt", "--write-prototxt", "a.prototxt"], ["written over"]),
        (["a.caffemodel", "no/such/b.pth", "-p", "a.prototxt"], ["there is no folder"]),
        (["a.caffemodel", "b.pth", "-p", "a.prototxt", "--v1"], ["--v1 belongs to torchvision's names"]),
        (["a.caffemodel", "b.pth", "-p", "a.prototxt", "--write-prototxt", "b.prototxt"], ["--write-prototxt belongs"]),
        (["a.pth", "b.safetensors", "-p", "a.prototxt"], ["--prototxt belongs to a caffemodel", "pth to safetensors"]),
        (["a.pth", "b.safetensors", "--to", "caffe"], ["--to belongs to a caffemodel as SOURCE"]),
        (["a.pth", "b.caffemodel", "--to", "caffe"], ["--to belongs to a .safetensors or .pth file as TARGET"]),
        (["a.pth", "b.caffemodel", "-p", "a.prototxt", "--v1"], ["--v1 belongs to torchvision's names"]),
        (["a.pth", "b.caffemodel", "-p", "other.prototxt"], ["does not fit other.prototxt", "fc_3.weight"]),
        (["lacks.pth", "b.caffemodel", "-p", "a.prototxt"], ["does not fit a.prototxt", "1 missing", "fc_3.bias"]),
        (["counts.pth", "b.caffemodel", "-p", "a.prototxt"], ["1 of an unusable dtype", "bn1.mean: torch.int64"]),
        (["cut.caffemodel", "b.pth", "-p", "a.prototxt"], ["cut.caffemodel"]),
        (["noise.caffemodel", "b.pth", "-p", "a.prototxt"], ["noise.caffemodel"]),
        (["a.caffemodel", "b.pth", "-p", "cut.prototxt"], ["cut.prototxt", "missing"]),
        (["cut.pth", "b.safetensors"], ["cut.pth", "truncated"]),
        (["cut.safetensors", "b.pth"], ["cut.safetensors", "truncated"]),
        (["bomb.pth", "b.safetensors"], ["bomb.pth", "contains code"]),
        (["sparse.pth", "b.safetensors"], ["sparse.pth", "entry 'a' is a torch._utils._rebuild_sparse_tensor"]),
        (["definition.safetensors", "b.caffemodel"], ["definition.safetensors, its prototxt", "line 1"]),
    ],
)  # fmt: skip
def test_refusals(arguments: list[str], mentions: list[str], wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wrong)
    before = {path.name: path.read_bytes() for path in wrong.iterdir()}
    run("convert", *arguments).failed(*mentions)
    assert {path.name: path.read_bytes() for path in wrong.iterdir()} == before


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.fixture(scope="module")
def wrong(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network's files, and what can be wrong with such files."""
    made = tmp_path_factory.mktemp("wrong")
    for name in ("a.prototxt", "a.caffemodel"):
        (made / name).write_bytes((folder / name).read_bytes())
    content = (made / "a.caffemodel").read_bytes()
    (made / "cut.caffemodel").write_bytes(content[: len(content) // 2])
    (made / "noise.caffemodel").write_bytes(bytes(torch.randint(0, 256, (5000,)).tolist()))
    (made / "other.prototxt").write_text(TINY.replace("num_output: 3", "num_output: 4"))
    (made / "cut.prototxt").write_text(TINY[:400])
    state = small().state_dict()
    torch.save(state, made / "a.pth")
    torch.save({name: tensor for name, tensor in state.items() if name != "fc_3.bias"}, made / "lacks.pth")
    torch.save(state | {"bn1.mean": torch.ones(8, dtype=torch.long)}, made / "counts.pth")
    save_file(state, made / "whole.safetensors")
    save_file(state, made / "definition.safetensors", {"names": "caffe", "prototxt": "layers all the way down {"})
    for name in ("a.pth", "whole.safetensors"):
        whole = (made / name).read_bytes()
        (made / f"cut{Path(name).suffix}").write_bytes(whole[: len(whole) // 2])
    (made / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"a": torch.eye(3).to_sparse()}, made / "sparse.pth")
    return made


# --- classify


def expected(folder: Path, path: Path, mean: Tensor, scale: float = 1.0) -> Tensor:
    """Probabilities of a picture: resized to 37, cropped to 32, BGR, minus the mean, times the scale, through the
    unfused network."""
    x = (torch.from_numpy(by_hand(Image.open(path), 37, 32).copy()) - mean) * scale
    with torch.no_grad():
        return caffe.load(folder / "a.prototxt", folder / "a.caffemodel").double()(x[None].double())[0]


def assert_says(entry: dict[str, Any], probabilities: Tensor) -> None:
    """The predictions for an image are these probabilities, the largest first."""
    values, indices = probabilities.topk(3)
    assert [row["index"] for row in entry["predictions"]] == indices.tolist()
    assert [row["label"] for row in entry["predictions"]] == [f"class {index}" for index in indices.tolist()]
    assert [row["probability"] for row in entry["predictions"]] == pytest.approx(values.tolist(), rel=1e-4)


def with_data_layer(folder: Path, transform: str) -> str:
    """The definition with a data layer in place of its input."""
    layer = (
        'layer { name: "in" type: "MemoryData" top: "data" top: "label" memory_data_param { batch_size: 1 channels: 3 '
        f"height: 32 width: 32 }} transform_param {{ {transform} }} }}"
    )
    text, count = re.subn(
        r'input: "data"\s*input_shape {.*?}', layer, (folder / "a.prototxt").read_text(), flags=re.DOTALL
    )
    assert count == 1
    return text


PUBLISHED = torch.tensor([103.063, 115.903, 123.152]).view(3, 1, 1)


@pytest.mark.parametrize("mean", [None, "10,60.5,200", "mean.binaryproto"])
def test_classify_by_hand(mean: str | None, folder: Path) -> None:
    subtracted = PUBLISHED
    if mean == "10,60.5,200":
        subtracted = torch.tensor([10, 60.5, 200]).view(3, 1, 1)
    elif mean is not None:
        subtracted, mean = caffe.read_mean(folder / mean)[:, 4:36, 2:34], str(folder / mean)
    pictures = [folder / "0.png", folder / "1.png"]
    arguments = ["--prototxt", folder / "a.prototxt", "--caffemodel", folder / "a.caffemodel", "--json", "-"]
    found = run("classify", *arguments, *pictures, *([] if mean is None else ["--mean", mean]))
    data = json.loads(found.passed())
    assert set(data) == {"schema", "arch", "weights", "dtype", "images", "errors"}
    assert (data["arch"], data["weights"]) == ("tiny [x]", str(folder / "a.caffemodel"))
    assert ("note: no --mean given" in found.err and "103.063, 115.903, 123.152" in found.err) == (mean is None)
    answers = []
    for path, entry in zip(pictures, data["images"], strict=True):
        probabilities = expected(folder, path, subtracted)
        assert probabilities.max() < 0.999
        assert_says(entry, probabilities)
        answers.append(probabilities)
    assert not torch.allclose(answers[0], answers[1], rtol=0.01)


@pytest.mark.parametrize(
    ("transform", "options", "mean", "scale"),
    [
        ("", ["--mean", "10,60,200", "--scale", "0.017"], (10, 60, 200), 0.017),
        ("scale: 0.017 mean_value: 10 mean_value: 60 mean_value: 200", [], (10, 60, 200), 0.017),
        ("scale: 0.017 mean_value: 99", [], (99, 99, 99), 0.017),
        ("scale: 0.017", [], (0, 0, 0), 0.017),
        ("scale: 3 mean_value: 99", ["--mean", "1,2,3", "--scale", "0.5"], (1, 2, 3), 0.5),
        ("mean_file: 'x.binaryproto'", ["--mean", "1,2,3"], (1, 2, 3), 1.0),
    ],
)
def test_classify_with_a_scale(
    transform: str, options: list[str], mean: tuple[int, ...], scale: float, folder: Path, tmp_path: Path
) -> None:
    """By option, or as the definition's data layer says."""
    definition = tmp_path / "n.prototxt"
    definition.write_text(with_data_layer(folder, transform) if transform else (folder / "a.prototxt").read_text())
    found = run("classify", "--prototxt", definition, "--caffemodel", folder / "a.caffemodel", "--json", "-", *options,
                folder / "0.png")  # fmt: skip
    assert "note" not in found.err
    probabilities = expected(folder, folder / "0.png", torch.tensor(mean).view(3, 1, 1), scale)
    assert_says(json.loads(found.passed())["images"][0], probabilities)


def test_a_mean_image_that_the_definition_names_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """A path in a stranger's file is not opened."""
    (tmp_path / "n.prototxt").write_text(with_data_layer(folder, 'mean_file: "/etc/passwd"'))
    found = run("classify", "--prototxt", tmp_path / "n.prototxt", "--caffemodel", folder / "a.caffemodel",
                folder / "0.png")  # fmt: skip
    found.failed("subtracts the mean image /etc/passwd; give it with --mean FILE")


@pytest.mark.parametrize("ending", ["scores", "images of one pixel"])
def test_classify_scores(ending: str, folder: Path, tmp_path: Path) -> None:
    """Without the Softmax layer the scores become probabilities here; N x classes x 1 x 1 is as good as N x classes."""
    lines = TINY.strip().splitlines()
    if ending == "scores":
        text = "\n".join(lines[:-1])
    else:
        convolution = (
            lines[-2]
            .replace("InnerProduct", "Convolution")
            .replace("inner_product_param {", "convolution_param { kernel_size: 1")
        )
        text = "\n".join([*lines[:-2], convolution, lines[-1]])
    net = caffe.Net(caffe.parse_prototxt(text)).eval()
    for name, tensor in small().state_dict().items():
        net.state_dict()[name].copy_(tensor.view_as(net.state_dict()[name]))
    files = caffe_files.write(tmp_path, net, "b")
    found = run("classify", folder / "0.png", "--prototxt", files[0], "--caffemodel", files[1], "--json", "-")
    assert_says(json.loads(found.passed())["images"][0], expected(folder, folder / "0.png", PUBLISHED))


def test_labels(folder: Path, tmp_path: Path) -> None:
    arguments = ["--prototxt", folder / "a.prototxt", "--caffemodel", folder / "a.caffemodel", "-k", "3"]
    names = tmp_path / "synset_words.txt"
    names.write_bytes(b"n01440764 tench, Tinca tinca\r\nn01443537\tgold fish\r\n  nut 12  \r\n\r\n")
    assert read_labels(names, 3) == ("tench, Tinca tinca", "gold fish", "nut 12")
    said = run("classify", folder / "0.png", *arguments, "--labels", names).passed()
    assert "tiny [x]" in said and "tench, Tinca tinca" in said and "gold fish" in said and "n01440764" not in said
    torch.save(rf.resnet18(num_classes=3).state_dict(), tmp_path / "18.pth")
    weights = ["-a", "resnet18", "-w", tmp_path / "18.pth"]
    assert "gold fish" in run("classify", folder / "0.png", *weights, "--labels", names).passed()
    for content, mention in (
        (b"a\nb\n", "2 labels, the network has 3 classes"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\nn01440764 \n", "line 3 is empty"),
        (b"a\nb\x1b[2J\nc\n", "line 2 is not printable"),
        (b"a\n\xff\nc", "not UTF-8 text, at byte 2"),
        (b"a" * 2**21, "too large for labels"),
    ):
        names.write_bytes(content)
        run("classify", folder / "0.png", *arguments, "--labels", names).failed(str(names), mention, notes=True)
    run("classify", folder / "0.png", *arguments, "--labels", tmp_path).failed("no such file", notes=True)


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--prototxt", "a.prototxt"], "--caffemodel FILE"),
        (["--caffemodel", "a.caffemodel"], "--prototxt FILE"),
        (["--mean", "1,2,3"], "--mean belongs to a Caffe network"),
        (["--scale", "0.5"], "--scale belongs to a Caffe network"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "--scale", "0"], "scale is 0; a finite number"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "-a", "resnet50"], "--arch names one of the ten"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "-w", "x.pth"], "--weights names one of the ten"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "--mean", "1,2"], "three numbers B,G,R"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "--mean", "1,2,nan"], "finite"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "--mean", "absent.binaryproto"], "no such file"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "--mean", "a.prototxt"], "as text (.prototxt)"),
        (["--prototxt", "a.prototxt", "--caffemodel", "a.caffemodel", "--mean", "small.binaryproto"], "mean is 8x8"),
        (["--prototxt", "a.prototxt", "--caffemodel", "cut.caffemodel"], "cut.caffemodel"),
        (["--prototxt", "cut.prototxt", "--caffemodel", "a.caffemodel"], "cut.prototxt"),
        (["--prototxt", "other.prototxt", "--caffemodel", "a.caffemodel"], "do not belong together"),
        (["--prototxt", "a.prototxt", "--caffemodel", "nan.caffemodel"], "not finite"),
    ],
)  # fmt: skip
def test_classify_refuses(arguments: list[str], mention: str, wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wrong)
    picture(wrong)
    caffe.write_mean("small.binaryproto", torch.ones(3, 8, 8))
    net = small()
    with torch.no_grad():
        net.layer("fc.3").bias.fill_(float("nan"))
    caffe_files.write(wrong, net, "nan")
    run("classify", "picture.png", *arguments).failed(mention, notes=True)


@pytest.mark.parametrize(
    ("old", "new", "mention"),
    [
        ("dim: 3 dim: 32", "dim: 1 dim: 32", "'data' 10x1x32x32; square images of three channels"),
        ("dim: 32 }", "dim: 30 }", "'data' 10x3x32x30; square images"),
        ("dim: 32 dim: 32 }", "dim: 5000 dim: 5000 }", "at most 4096x4096"),
        ("dim: 32 dim: 32 }", 'dim: 32 dim: 32 } input: "more" input_shape { dim: 1 }', "has 2 inputs"),
        ('bottom: "fc" top: "prob"', 'bottom: "conv1" top: "prob"', "has the outputs 'fc', 'prob'"),
        ('type: "Softmax"', 'type: "Softmax" softmax_param { axis: 0 }', "its axis is 0"),
        ('bottom: "fc" top: "prob" }', 'bottom: "fc" top: "prob" }'
         'layer { name: "all" type: "Concat" bottom: "prob" bottom: "prob" top: "all" concat_param { axis: 0 } }',
         "its output 'all' is 4x3"),
    ],
)  # fmt: skip
def test_networks_that_do_not_classify(old: str, new: str, mention: str, folder: Path, tmp_path: Path) -> None:
    assert old in TINY
    files = caffe_files.write(tmp_path, caffe.Net(caffe.parse_prototxt(TINY.replace(old, new))))
    found = run("classify", folder / "0.png", "--prototxt", files[0], "--caffemodel", files[1])
    found.failed("net.prototxt", mention)
