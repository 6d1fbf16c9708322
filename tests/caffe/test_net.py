"""Caffe networks as modules: blobs, features, inputs, weights from files, and what optimize makes of them."""

from __future__ import annotations

import copy
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import resnet_fast as rf
from resnet_fast import caffe
from resnet_fast.caffe import caffemodel, layers
from tests.caffe import files as caffe_files
from tests.caffe.files import image, network
from tests.numerics import assert_obeys_error_rule

SMALL = """
name: "small" input: "data" input_shape { dim: 1 dim: 3 dim: 32 dim: 32 }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 8 kernel_size: 7 pad: 3 stride: 2 } }
layer { name: "bn_conv1" type: "BatchNorm" bottom: "conv1" top: "conv1" batch_norm_param { use_global_stats: true } }
layer { name: "scale_conv1" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "conv1_relu" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "a/1x1" type: "Convolution" bottom: "pool1" top: "a" convolution_param { num_output: 8 kernel_size: 1 } }
layer { name: "bn.a" type: "BatchNorm" bottom: "a" top: "a" batch_norm_param { use_global_stats: true eps: 1e-3 } }
layer { name: "scale.a" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "sum" type: "Eltwise" bottom: "pool1" bottom: "a" top: "sum" }
layer { name: "forward" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "drop" type: "Dropout" bottom: "sum" top: "sum" }
layer { name: "pool5" type: "Pooling" bottom: "sum" top: "pool5" pooling_param { kernel_size: 8 stride: 1 pool: AVE } }
layer { name: "fc5" type: "InnerProduct" bottom: "pool5" top: "fc5" inner_product_param { num_output: 5 } }
layer { name: "prob" type: "Softmax" bottom: "fc5" top: "prob" }
"""


@pytest.fixture
def net() -> caffe.Net:
    return network(SMALL)


# --------------------------------------------------------------------------------------------------------- the module


def test_every_blob_by_name(net: caffe.Net) -> None:
    x = image(2, 3, 32, 32)
    found = net.blobs(x, net.blob_names)
    assert net.blob_names == ("data", "conv1", "pool1", "a", "sum", "pool5", "fc5", "prob")
    assert found["data"] is x
    torch.testing.assert_close(found["prob"], net(x), rtol=0, atol=0)
    assert {name: tuple(blob.shape) for name, blob in found.items()} == net.shapes((2, 3, 32, 32))


def test_blobs_stop_at_the_last_layer_needed(net: caffe.Net) -> None:
    wide = image(1, 3, 50, 71)  # fc5 does not take it
    assert net.blobs(wide, ["sum"])["sum"].shape == (1, 8, 12, 18)
    features = net.features(["pool1", "sum"])
    found = features(wide)
    assert list(found) == ["pool1", "sum"]
    torch.testing.assert_close(found["sum"], net.blobs(wide, ["sum"])["sum"], rtol=0, atol=0)
    assert features.layer("conv1") is net.layer("conv1")
    fused = rf.optimize(features, example_inputs=wide)
    for name, value in fused(wide).items():
        assert_obeys_error_rule(value, found[name], copy.deepcopy(features).double()(wide.double())[name])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda net: net.blobs(image(1, 3, 32, 32), ["pool"]), KeyError, "'pool' is no blob of small; it has pool"),
        (lambda net: net.blobs(image(1, 3, 32, 32), "pool1"), TypeError, "a list of names was expected"),
        (lambda net: net.blobs(image(1, 3, 32, 32), []), ValueError, "names is empty"),
        (lambda net: net.features(["data"]), ValueError, "inputs only"),
        (lambda net: net.layer("conv"), KeyError, "'conv' is no layer of small"),
        (lambda net: net(image(1, 4, 32, 32)), caffe.CaffeError, "layer 'conv1' (Convolution, line 3): its bottom"),
        (lambda net: net(image(3, 32, 32)), caffe.CaffeError, "input 'data' is 3x32x32; Nx3x32x32 was expected"),
        (lambda net: net(image(1, 3, 64, 64)), caffe.CaffeError, "layer 'fc5' (InnerProduct, line 16): its bottom"),
        (lambda net: net(image(1, 3, 4, 4)), caffe.CaffeError, "layer 'pool5' (Pooling, line 15): its window 8x8"),
        (lambda net: net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), TypeError, "input 'data' is torch.uint8"),
        (lambda net: net([1]), TypeError, "input 'data' is a list"),
        (lambda net: net(np.zeros((1, 3, 32, 32))), TypeError, "is a ndarray; a tensor, as torch.from_numpy"),
        (lambda net: net.shapes("data"), TypeError, "the shape of 'data' is 'data'; a tuple of integers"),
        (lambda net: caffe.Net("x.prototxt"), TypeError, "definition is a str; load(prototxt, caffemodel) reads files"),
        (lambda net: caffe.load(SMALL), ValueError, "prototxt_file is a text; give its path"),
        (lambda net: caffe.to_state_dict(torch.nn.ReLU()), TypeError, "expected the module that load() gives"),
        (lambda net: caffe.from_state_dict("x.pth", 50), TypeError, "state is a str; a dict of tensors"),
        (lambda net: rf.optimize(net)(torch.zeros(1, 3, 32, 32).byte()), TypeError, "prepare images as the"),
        (lambda net: net({"x": image(1, 3, 32, 32)}), TypeError, "inputs are 'x'; the network takes 'data'"),
    ],
)  # fmt: skip
def test_wrong_calls(net: caffe.Net, call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call(net)


def test_the_batch_is_looked_at_too() -> None:
    """Whether a call is right does not depend on earlier calls."""
    text = """
input: "a" input: "b" input_shape { dim: 2 dim: 1 } input_shape { dim: 2 dim: 1 }
layer { name: "e" type: "Eltwise" bottom: "a" bottom: "b" top: "e" }
"""
    net = caffe.Net(caffe.parse_prototxt(text)).eval()
    for _ in range(2):
        net({"a": image(2, 1), "b": image(2, 1)})
        with pytest.raises(caffe.CaffeError, match="bottoms 2x1, 1x1 are not of one shape"):
            net({"a": image(2, 1), "b": image(1, 1)})
    fixed = 'input: "x" input_shape { dim: 2 dim: 3 } layer { name: "f" type: "InnerProduct" bottom: "x" top: "f" '
    net = caffe.Net(caffe.parse_prototxt(fixed + "inner_product_param { num_output: 4 axis: 0 } }")).eval()
    torch.testing.assert_close(rf.optimize(net)(image(2, 3)), net(image(2, 3)))  # it takes no other batch
    with pytest.raises(caffe.CaffeError, match="takes parameters of shape 4x9"):
        net(image(3, 3))


def test_a_module_of_somebody_s_own(net: caffe.Net) -> None:
    """Its shapes are still the layer's, and its errors its own."""
    net.add_module("conv1", torch.nn.Sequential(net.layer("conv1")))
    assert net(image(1, 3, 32, 32)).shape == (1, 5)
    assert set(net.shapes((2, 3, 32, 32))) == set(net.blob_names)


def test_blobs_go_as_soon_as_nobody_reads_them(net: caffe.Net) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(module: torch.nn.Module, args: Any, result: torch.Tensor) -> None:
        made.append(weakref.ref(result))
        alive.append(len({id(tensor) for entry in made if (tensor := entry()) is not None}))

    for module in net.children():
        module.register_forward_hook(watch)
    with torch.no_grad():
        net(image(1, 3, 32, 32))
    assert max(alive) == 3  # the shortcut, and what a layer reads and makes


def test_names_of_the_module_itself() -> None:
    names = ["_accepted", "_outputs", "_output_plan", "definition", "training", "_modules", "forward", "T_destination"]
    layer = 'layer {{ name: "{0}" type: "ReLU" bottom: "data" top: "{0}" }}'.format
    text = 'input: "data" input_shape { dim: 1 dim: 3 }' + "".join(map(layer, names))
    net = caffe.Net(caffe.parse_prototxt(text)).eval()
    assert sorted(net(image(1, 3))) == sorted(names)
    assert len(list(net.children())) == len(names)


def test_names_that_a_module_cannot_have(net: caffe.Net) -> None:
    assert [name for name, _ in net.named_children()][5:9] == ["a/1x1", "bn_a", "scale_a", "sum"]
    assert isinstance(net.layer("forward"), torch.nn.ReLU)
    assert "forward_1" in dict(net.named_children())
    state = net.state_dict()
    assert {"a/1x1.weight", "bn_a.mean", "bn_a.factor", "scale_a.bias", "fc5.weight"} <= set(state)
    again = caffe.Net(net.definition).eval()
    again.load_state_dict(state)
    x = image(1, 3, 32, 32)
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


def test_copies(net: caffe.Net) -> None:
    x = image(1, 3, 32, 32)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    fused = rf.optimize(net)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fused))(x), fused(x), rtol=0, atol=0)


def test_several_inputs_and_outputs() -> None:
    text = """
input: "a" input: "b" input_shape { dim: 1 dim: 2 } input_shape { dim: 1 dim: 2 }
layer { name: "s" type: "Split" bottom: "a" top: "a1" top: "a2" }
layer { name: "e" type: "Eltwise" bottom: "a1" bottom: "b" top: "e" eltwise_param { operation: PROD } }
layer { name: "c" type: "Concat" bottom: "a2" bottom: "e" top: "c" }
layer { name: "m" type: "Eltwise" bottom: "e" bottom: "b" top: "m" eltwise_param { operation: MAX } }
"""
    net = caffe.Net(caffe.parse_prototxt(text)).eval()
    a, b = image(3, 2), image(3, 2) + 1
    found = net({"b": b, "a": a})
    assert list(found) == ["c", "m"]
    torch.testing.assert_close(found["c"], torch.cat([a, a * b], 1))
    torch.testing.assert_close(found["m"], torch.maximum(a * b, b))
    fused = rf.optimize(net, example_inputs=({"a": a, "b": b},))
    torch.testing.assert_close(fused({"a": a, "b": b})["c"], found["c"])
    with pytest.raises(TypeError, match="the network has the inputs 'a', 'b'; give a dict"):
        net(a)


def test_compiled_and_exported(net: caffe.Net) -> None:
    x = image(2, 3, 32, 32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=0)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    y = image(5, 3, 32, 32)
    torch.testing.assert_close(exported.module()(y), net(y))


# -------------------------------------------------------------------------------------------------------------- files


def test_saved_and_loaded_bit_by_bit(net: caffe.Net, tmp_path: Path) -> None:
    with torch.no_grad():
        net.layer("conv1").weight.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    caffe.save(net, tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    again = caffe.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    assert again.definition == net.definition
    assert not again.training
    for (name, ours), (other, theirs) in zip(net.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), name
    caffe.save(again, tmp_path / "m.prototxt", tmp_path / "m.caffemodel")
    for suffix in ("prototxt", "caffemodel"):
        assert (tmp_path / f"n.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m.caffemodel",
        "m.prototxt",
        "n.caffemodel",
        "n.prototxt",
    ]


def blobs_of(net: caffe.Net) -> list[tuple[str, str, list[Any]]]:
    return [
        (layer.name, layer.type, [tensor.detach() for tensor in layers.blobs(net.layer(layer.name)).values()])
        for layer in net.definition.layers
    ]


def edited(name: str, change: Any) -> Any:
    def edit(stored: list[Any]) -> list[Any]:
        return [(n, kind, change(blobs) if n == name else blobs) for n, kind, blobs in stored]

    return edit


MISMATCHES = {
    "a blob missing": (edited("conv1", lambda blobs: blobs[:1]), "holds 1 blobs, the layer has 2 (weight, bias)"),
    "a blob more": (edited("bn_conv1", lambda blobs: [*blobs, blobs[0]]), "holds 4 blobs, the layer has 3 (mean, "),
    "another shape": (
        edited("fc5", lambda blobs: [blobs[0].t().contiguous(), blobs[1]]),
        "its weight is 8x5, the prototxt makes it 5x8; caffemodel and prototxt do not belong together",
    ),
    "no axis more": (edited("conv1", lambda blobs: [blobs[0], blobs[1][None]]), "its bias is 1x8, the prototxt makes"),
    "blobs of a layer that has none": (
        lambda stored: [*stored, ("conv1_relu", "ReLU", [torch.ones(3)])] ,
        "layer 'conv1_relu' (ReLU, line 7) at byte",
    ),
    "layers missing": (
        lambda stored: [entry for entry in stored if entry[0] not in ("conv1", "fc5")],
        "holds no weights for 2 of the layers (conv1, fc5); do caffemodel and prototxt belong together?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_weights_of_another_network(net: caffe.Net, tmp_path: Path, case: str) -> None:
    change, message = MISMATCHES[case]
    (tmp_path / "n.prototxt").write_text(SMALL)
    caffe_files.write_layers(tmp_path / "n.caffemodel", change(blobs_of(net)))
    with pytest.raises(caffe.CaffeError, match=re.escape(message)) as error:
        caffe.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    assert "n.caffemodel" in str(error.value)
    if case != "layers missing":
        assert re.search(r"layer '\w+' \(\w+, line \d+\) at byte \d+", str(error.value)), error.value


def test_not_strict(net: caffe.Net, tmp_path: Path) -> None:
    """As for finetuning in Caffe: what the file lacks is initialised, what the network lacks is left out; both said."""
    (tmp_path / "n.prototxt").write_text(SMALL)
    stored = [entry for entry in blobs_of(net) if entry[0] != "fc5"]
    caffe_files.write_layers(tmp_path / "n.caffemodel", [*stored, ("fc1000", "InnerProduct", [torch.ones(2, 2)])])
    with pytest.warns(UserWarning, match="n.caffemodel: ") as said:
        again = caffe.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel", strict=False)
    messages = sorted(str(warning.message).partition("n.caffemodel: ")[2] for warning in said)
    assert messages == ["no weights for fc5: left as initialised",
                        "weights of layers that the prototxt does not have: fc1000"]  # fmt: skip
    assert torch.equal(again.layer("conv1").weight, net.layer("conv1").weight)
    assert again.layer("fc5").weight.std() > 0.1


def test_doubles_and_legacy_shapes(net: caffe.Net, tmp_path: Path) -> None:
    """Old files: four dimensions for every blob, a fully connected layer's 1x1xNxK among them."""
    (tmp_path / "n.prototxt").write_text(SMALL)
    stored = [(name, kind, [blob.double() for blob in blobs]) for name, kind, blobs in blobs_of(net)]
    caffe_files.write_layers(tmp_path / "n.caffemodel", stored)
    again = caffe.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.layer("conv1").weight.dtype == torch.float32
    blob = caffemodel.Blob((1, 1, 5, 8), True, np.zeros(40, np.float32))
    from resnet_fast.caffe.files import _same_shape

    assert _same_shape(blob, (5, 8))
    assert not _same_shape(blob, (8, 5))
    assert not _same_shape(caffemodel.Blob((1, 1, 5, 8), False, np.zeros(40, np.float32)), (5, 8))


def test_pruned_and_normed_weights_are_saved_as_they_compute(net: caffe.Net, tmp_path: Path) -> None:
    from torch.nn.utils import parametrizations, prune

    prune.l1_unstructured(net.layer("conv1"), "weight", 0.5)
    parametrizations.weight_norm(net.layer("a/1x1"))
    caffe.save(net, tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    again = caffe.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    assert (again.layer("conv1").weight == 0).sum() == 8 * 3 * 49 // 2
    x = image(1, 3, 32, 32)
    torch.testing.assert_close(again(x), net(x))


def test_what_save_refuses(net: caffe.Net, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected the module that load\(\) gives, got Linear"):
        caffe.save(torch.nn.Linear(1, 1), tmp_path / "a", tmp_path / "b")  # type: ignore[arg-type]
    prototxt, weights = tmp_path / "a.prototxt", tmp_path / "a.caffemodel"
    weights.write_bytes(b"old")
    with pytest.raises(ValueError, match="the order is net, prototxt, caffemodel"):
        caffe.save(net, weights, prototxt)
    with pytest.raises(ValueError, match="they are two files"):
        caffe.save(net, tmp_path / "a", tmp_path / ".." / tmp_path.name / "a")
    with pytest.raises(IsADirectoryError, match="the name of the prototxt was expected"):
        caffe.save(net, tmp_path, weights)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        caffe.save(net, tmp_path / "none" / "a.prototxt", weights)
    other = copy.deepcopy(net)
    other.layer("fc5").weight = torch.nn.Parameter(torch.zeros(6, 8))  # type: ignore[assignment]
    with pytest.raises(caffe.CaffeError, match=r"layer 'fc5' .* has blobs of 6x8, 5; its definition says 5x8, 5"):
        caffe.save(other, prototxt, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["a.caffemodel"]
    assert weights.read_bytes() == b"old"
    weights.unlink()
    with pytest.raises(caffe.CaffeError, match=r"layer 'conv1' .* on the meta device"):
        caffe.save(net.to("meta"), tmp_path / "a", tmp_path / "b")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- optimize


def left(report: rf.graph.Report, *kinds: str) -> list[str]:
    """Layers of these kinds that run by themselves."""
    return [row.name for row in report.rows if row.kind in kinds and not row.fused]


def launches(report: rf.graph.Report) -> int:
    """Fused ops with a convolution, and convolutions that are none."""
    fused = {row.fused for row in report.rows if row.kind == "Conv2d" and row.fused}
    return len(fused) + len(left(report, "Conv2d"))


def test_optimized(net: caffe.Net) -> None:
    fused = rf.optimize(net)
    report = fused.report()
    assert left(report, "BatchNorm", "Scale", "Eltwise", "ReLU", "Pooling", "InnerProduct") == []
    assert launches(report) == 2
    rows = {row.name: row for row in report.rows}
    assert rows["pool1"].fused == "stem conv1"
    assert rows["sum"].fused == rows["bn_a"].fused == rows["forward_1"].fused == "conv_bn_act a/1x1"
    for batch in (0, 1, 3):
        x = image(batch, 3, 32, 32)
        assert_obeys_error_rule(fused(x), net(x), copy.deepcopy(net).double()(x.double()))


@pytest.mark.parametrize(("depth", "convolutions"), [(50, 53), (152, 155)])
def test_resnets_run_as_convolutions_alone(depth: int, convolutions: int) -> None:
    """From the report: at most 54 convolution launches for ResNet-50, nothing between them."""
    definition = caffe.parse_prototxt(caffe.deploy_prototxt(depth))
    report = rf.optimize(caffe.Net(definition).eval(), check=False).report()  # no answer is looked at
    assert launches(report) == convolutions
    assert left(report, "BatchNorm", "Scale", "Eltwise", "ReLU", "Pooling", "InnerProduct") == []
    assert {row.fused.split()[0] for row in report.rows if row.fused} == {"stem", "conv_bn_act", "head"}
    assert [row.name for row in report.rows if not row.fused] == ["prob"]


def test_an_optimized_classifier_refuses_other_sizes(net: caffe.Net) -> None:
    """The average over an 8x8 window is the whole image only if that is 8x8; else Caffe's own error is kept."""
    fused = rf.optimize(net)
    fused(image(1, 3, 31, 32))
    net(image(1, 3, 31, 32))
    for shape in ((1, 3, 64, 64), (1, 3, 36, 32)):
        with pytest.raises(caffe.CaffeError, match="fc5"):
            net(image(*shape))
        with pytest.raises(ValueError, match="the average pool and linear layer at the end take 8x8 pixels"):
            fused(image(*shape))


def test_the_declared_size_is_where_shapes_are_found() -> None:
    """Sizes that nobody would guess; without shapes the classifier would not be part of the head."""
    text = SMALL.replace("dim: 32 dim: 32", "dim: 41 dim: 19").replace(
        "kernel_size: 8 stride: 1 pool: AVE", "kernel_h: 10 kernel_w: 5 stride: 1 pool: AVE"
    )
    net = network(text)
    fused = rf.optimize(net)
    assert left(fused.report(), "Pooling", "InnerProduct") == []
    x = image(2, 3, 41, 19)
    assert_obeys_error_rule(fused(x), net(x), copy.deepcopy(net).double()(x.double()))


def test_an_average_that_other_sizes_may_have_is_not_the_head() -> None:
    """With a stride, 8 to 15 pixels a side give one window of 8x8 rounded down, which is not their average."""
    text = SMALL.replace("kernel_size: 8 stride: 1 pool: AVE", "kernel_size: 8 stride: 8 pool: AVE round_mode: FLOOR")
    net = network(text)
    fused = rf.optimize(net)
    for size in (32, 40):
        torch.testing.assert_close(fused(image(1, 3, size, size)), net(image(1, 3, size, size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_double_to_half(net: caffe.Net, dtype: torch.dtype) -> None:
    x = image(1, 3, 32, 32)
    exact = net(x)
    half = copy.deepcopy(net).double().to(dtype)
    assert half.layer("bn_conv1").mean.dtype == torch.float32
    torch.testing.assert_close(half(x.to(dtype)).float(), exact, rtol=0.1, atol=0.02)
    text = SMALL.replace('type: "ReLU" bottom: "sum" top: "sum"', 'type: "BatchNorm" bottom: "sum" top: "sum"')
    unfolded = network(text).double()
    assert rf.optimize(unfolded, dtype=dtype)(x.double()).isfinite().all()


def test_a_model_s_own_attributes_are_its_own() -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 1)
            self.declared_inputs = self._optimize_inputs = {"x": 1}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    model = Other().eval()
    torch.testing.assert_close(rf.optimize(model)(image(1, 3, 4, 4)), model(image(1, 3, 4, 4)))


def test_statistics_of_the_batch_are_not_folded() -> None:
    text = SMALL.replace("use_global_stats: true }", "use_global_stats: false }", 1)
    net = network(text)
    x = image(4, 3, 32, 32)
    fused = rf.optimize(net)
    (row,) = (row for row in fused.report().rows if row.name == "bn_conv1")
    assert row.reason == "it normalises with the statistics of the batch (use_global_stats: false)"
    torch.testing.assert_close(fused(x), net(x))
    assert not torch.allclose(net(x)[:1], net(x[:1]))
    assert torch.equal(net.layer("bn_conv1").factor, torch.tensor([999.98]))


@pytest.mark.parametrize("name", caffe_files.GRAPHS)
def test_every_kind_is_saved_and_loaded_bit_for_bit(name: str, tmp_path: Any) -> None:
    """As prototxt and caffemodel, and through the state_dict in a safetensors file."""
    net = network(caffe_files.GRAPHS[name])
    loaded = caffe.load(*caffe_files.write(tmp_path, net))
    state = net.state_dict()
    assert loaded.definition == net.definition
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    if state:
        safetensors.torch.save_file(state, tmp_path / "net.safetensors")
        other = caffe.Net(net.definition)
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "net.safetensors"))
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_old_dimensions_of_a_shared_slope(tmp_path: Any) -> None:
    """1x1x1x1 stands for a blob without axes."""
    net = network(caffe_files.GRAPHS["prelu of one slope"])
    prototxt, caffemodel = caffe_files.write(tmp_path, net)
    content = Path(caffemodel).read_bytes()
    modern = b"\x3a\x08\x3a\x00\x2a\x04"  # blobs { shape {} data: 4 bytes }
    assert content.count(modern) == 1
    legacy = content.replace(modern, b"\x3a\x0e\x08\x01\x10\x01\x18\x01\x20\x01\x2a\x04")
    old, new = net.definition.layers[1], legacy.index(b"prelu")
    assert old.name == "prelu"
    length = legacy.rindex(b"\xa2\x06", 0, new)  # the layer's length grows by as much
    legacy = legacy[: length + 2] + bytes([legacy[length + 2] + 6]) + legacy[length + 3 :]
    Path(caffemodel).write_bytes(legacy)
    loaded = caffe.load(prototxt, caffemodel).layer("prelu").weight
    assert loaded.shape == () and torch.equal(loaded, net.layer("prelu").weight)
