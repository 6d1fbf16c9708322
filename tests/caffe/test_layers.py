"""Caffe's layers one by one and in small networks, against numpy written from Caffe's definitions; fused too.

The published networks are compared elsewhere, with OpenCV. Files are not the subject here.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import resnet_fast as rf
from resnet_fast import caffe
from resnet_fast.caffe import definition as d
from resnet_fast.caffe import layers
from tests.caffe import files as caffe_files
from tests.caffe.files import GRAPHS
from tests.numerics import assert_obeys_error_rule, unit_roundoff

pytestmark = pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")

SIZES = ((13, 29), (1, 1), (7, 4))
BATCHES = (0, 1, 3)


def accepted(net: caffe.Net) -> list[dict[str, Tensor]]:
    """Inputs of the declared shape, and of the batches and sizes above as far as the layers take them."""
    found = [caffe_files.feeds(net)]
    if len(net.definition.inputs) > 1:
        return found
    for batch in BATCHES:
        for size in SIZES:
            inputs = caffe_files.feeds(net, batch, size)
            try:
                net.shapes({name: tuple(value.shape) for name, value in inputs.items()})
            except caffe.CaffeError:
                continue
            found.append(inputs)
    return found


def tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value))


def joined(values: list[np.ndarray] | list[Tensor]) -> Tensor:
    """All elements of several results: of one small result alone, a rounding too few would break the error rule."""
    return torch.cat([torch.as_tensor(value).detach().flatten() for value in values])


@pytest.mark.parametrize("name", GRAPHS)
def test_every_blob(name: str) -> None:
    net = caffe_files.network(GRAPHS[name])
    ours, rounded, exact = [], [], []
    for inputs in accepted(net):
        ours.append(net.blobs(inputs, net.blob_names))
        rounded.append(caffe_files.reference(net, inputs, np.float32))
        exact.append(caffe_files.reference(net, inputs))
        shapes = net.shapes({key: tuple(value.shape) for key, value in inputs.items()})
        for blob in net.blob_names:
            assert tuple(ours[-1][blob].shape) == shapes[blob] == exact[-1][blob].shape, blob
    for blob in net.blob_names:
        found = ([run[blob] for run in runs] for runs in (ours, rounded, exact))
        assert_obeys_error_rule(*map(joined, found), blob)


@pytest.mark.parametrize("name", GRAPHS)
def test_double_precision(name: str) -> None:
    net = caffe_files.network(GRAPHS[name]).double()
    inputs = {key: value.double() for key, value in caffe_files.feeds(net).items()}
    ours, exact = net.blobs(inputs, net.blob_names), caffe_files.reference(net, inputs)
    for blob in net.blob_names:
        torch.testing.assert_close(ours[blob].detach(), tensor(exact[blob]), rtol=1e-13, atol=1e-13, msg=blob)


@pytest.mark.parametrize("name", ["difference", "norm first"])
def test_a_factor_of_zero_stands_for_no_statistics(name: str) -> None:
    net = caffe_files.network(GRAPHS[name])
    net.layer("norm").factor.zero_()
    inputs, output = caffe_files.feeds(net), net.definition.outputs[0]
    rounded, exact = (tensor(caffe_files.reference(net, inputs, kind)[output]) for kind in (np.float32, np.float64))
    with torch.no_grad():
        assert_obeys_error_rule(net(inputs["data"]), rounded, exact)
        assert_obeys_error_rule(rf.optimize(net)(inputs["data"]), rounded, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["difference", "norm first", "pools", "stem", "head", "concat", "scale alone"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Against the same layers from torch.nn.functional, whose BatchNorm takes statistics in float32 too."""
    net = caffe_files.network(GRAPHS[name])
    for layer in net.definition.layers:
        if layer.type == "BatchNorm":  # sums that float16 cannot hold
            module = net.layer(layer.name)
            for buffer in (module.mean, module.variance, module.factor):
                buffer.mul_(1e3)
    wide = copy.deepcopy(net)
    net.to(dtype)
    for parameter, rounded in zip(wide.parameters(), net.parameters(), strict=True):
        parameter.data = rounded.data.float()
    for buffer, kept in zip(wide.buffers(), net.buffers(), strict=True):
        assert kept.dtype is torch.float32 and torch.equal(buffer, kept)
    x = caffe_files.feeds(net)["data"].to(dtype)
    with torch.no_grad():
        ours = net(x)
        exact = tensor(caffe_files.reference(wide, {"data": x.float()})[net.definition.outputs[0]])
        optimized = rf.optimize(net, dtype=dtype)(x)
    assert ours.dtype is optimized.dtype is dtype
    # Every layer rounds its result once, and the input of the next by so much.
    error = ((ours.double() - exact).norm() / exact.norm()).item()
    assert error <= torch.finfo(dtype).eps / 2 * len(net.definition.layers)
    assert_obeys_error_rule(optimized, ours, exact)


def test_half_precision_needs_no_further_word() -> None:
    """That BatchNorm keeps its sums in float32 is no mixture of dtypes to ask about."""
    net = caffe_files.network(GRAPHS["difference"]).bfloat16()
    x = caffe_files.feeds(net)["data"].bfloat16()
    assert torch.equal(rf.optimize(net)(x), rf.optimize(net, dtype=torch.bfloat16)(x))


# -------------------------------------------------------------------------------------------------------------- fusion


@pytest.mark.parametrize("name", [name for name in GRAPHS if len(GRAPHS[name].inputs) == 1])
def test_optimized(name: str) -> None:
    net = caffe_files.network(GRAPHS[name])
    fast = rf.optimize(net)
    ours, plain, exact = [], [], []
    for inputs in accepted(net):
        with torch.no_grad():
            ours.append(fast(inputs["data"]))
            plain.append(net(inputs["data"]))
        exact.append(caffe_files.reference(net, inputs)[net.definition.outputs[0]])
        assert ours[-1].shape == plain[-1].shape == exact[-1].shape
    assert_obeys_error_rule(joined(ours), joined(plain), joined(exact), name)


ALONE = "no fused form of this layer"
VIEW = "it moves no data"
FUSIONS = {
    "convolution": {name: f"conv_bn_act {name}" for name in ("groups", "dilated", "depthwise")},
    "sum with coefficients": {
        **dict.fromkeys(("a", "sum", "sum_relu"), "conv_bn_act a"),
        "b": "conv_bn_act b",
    },
    "difference": dict.fromkeys(("a", "norm", "scale", "difference"), "conv_bn_act a"),
    "product": {"a": "conv_bn_act a", "product": ALONE},
    "maximum": {"a": "conv_bn_act a", "maximum": ALONE},
    "scale alone": dict.fromkeys(("a", "scale", "relu"), "conv_bn_act a"),
    "scale without bias": dict.fromkeys(("a", "scale", "relu"), "conv_bn_act a"),
    "leaky": {**dict.fromkeys(("a", "norm"), "conv_bn_act a"), "leaky": ALONE},
    "norm first": {
        "norm": "there is no convolution before it",
        "scale": "it follows norm, no convolution that could take it along",
        "relu": "it follows scale, which cannot take it along",
        "a": "conv_bn_act a",
    },
    "concat": {
        **dict.fromkeys(("a", "a_relu"), "conv_bn_act a"),
        **dict.fromkeys(("b", "b_norm", "b_relu"), "conv_bn_act b"),
        "channels": ALONE,
        "rows": ALONE,
    },
    "pools": {
        "a": "conv_bn_act a",
        "average": "no linear layer alone reads the average over the whole image",
        "largest": "no fused form of this window",
        "all": "no linear layer alone reads the average over the whole image",
    },
    "stem": {**dict.fromkeys(("a", "norm", "scale", "relu", "pool"), "stem a"), "largest": ALONE},
    "head": {"a": "conv_bn_act a", "pool": "head pool", "drop": "", "score": "head pool", "prob": ALONE},
    "split": {
        "a": "conv_bn_act a",
        "left_relu": "the output of a is used elsewhere too",
        "norm": "the output of a is used elsewhere too",
    },
    "overwritten": {"norm": "the output of a is used elsewhere too"},
    "squeeze and excitation": {
        **dict.fromkeys(("a", "norm", "scale"), "conv_bn_act a"),
        "up": "conv_bn_act up",
        "gate": ALONE,
        "sum": ALONE,
    },
    "activations": {
        **{name: f"conv_bn_act {name}" for name in "abc"},
        **dict.fromkeys(("elu", "tanh", "prelu", "sigmoid"), ALONE),
    },
    "segmentation": {
        **dict.fromkeys(("a", "a_relu"), "conv_bn_act a"),
        "b": "conv_bn_act b",
        "skip": "conv_bn_act skip",
        **dict.fromkeys(("up2", "up4"), ALONE),
        **dict.fromkeys(("up2c", "score"), VIEW),
    },
    "slices": {"a": "conv_bn_act a", "b": "conv_bn_act b", "cut": VIEW, "together": ALONE},
    "shapes": {"a": "conv_bn_act a", "shuffled": VIEW, "middle": VIEW, "flat": ALONE},
    "norm of five blobs": {
        **dict.fromkeys(("a", "norm", "relu"), "conv_bn_act a"),
        "after": "it follows relu, no convolution that could take it along",
    },
    "dropout of any ratio": {"a": "conv_bn_act a", "none": "", "b": "conv_bn_act b", "all": VIEW, "more": VIEW},
}
"""For some networks what each layer became part of, or why it did not."""


@pytest.mark.parametrize("name", FUSIONS)
def test_report_says_what_is_fused(name: str) -> None:
    net = caffe_files.network(GRAPHS[name])
    report = rf.optimize(net, example_inputs=caffe_files.feeds(net)["data"]).report()
    found = {row.name: row.fused or row.reason for row in report.rows}
    assert {layer: found[layer] for layer in FUSIONS[name]} == FUSIONS[name]


def test_a_snapshot_keeps_what_its_parts_are_read_by() -> None:
    """Slices, crops and other shapes show the memory of the blob that they are of, which nothing may overwrite."""
    for name in ("slices", "slices of lines", "shapes", "segmentation", "dropout of any ratio"):
        net = caffe_files.network(GRAPHS[name])
        blobs = [blob for blob in net.blob_names if blob not in caffe_files.feeds(net)]
        watched = caffe.Net(net.definition, blobs)
        watched.load_state_dict(net.state_dict())
        inputs = caffe_files.feeds(net)
        ours, exact = rf.optimize(watched.eval())(inputs["data"]), caffe_files.reference(net, inputs)
        for blob in blobs:
            torch.testing.assert_close(ours[blob].double(), tensor(exact[blob]), rtol=1e-5, atol=1e-5, msg=blob)


def test_several_inputs() -> None:
    """They come as one dict, of which ``optimize`` keeps the form."""
    net = caffe_files.network(GRAPHS["scale by a blob"])
    inputs = caffe_files.feeds(net)
    with pytest.raises(TypeError, match="'data', 'gate'"):
        net(inputs["data"])
    exact = tensor(caffe_files.reference(net, inputs)["gated"])
    assert_obeys_error_rule(rf.optimize(net, example_inputs=[inputs])(inputs), net(inputs), exact)


# ------------------------------------------------------------------------------------------------------------- pooling


@st.composite
def windows(draw: st.DrawFn) -> tuple[d.Pooling, tuple[int, int]]:
    """Pooling layers that Caffe accepts, each with a size of image on which at least one window is left."""
    method = draw(st.sampled_from(("MAX", "AVE")))
    size = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    if draw(st.integers(0, 19)) == 0:
        return d.Pooling(method), size
    kernel = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    padding = draw(st.integers(0, kernel[0] - 1)), draw(st.integers(0, kernel[1] - 1))
    if draw(st.booleans()):
        padding = 0, 0
    p = d.Pooling(method, kernel, stride, padding, draw(st.sampled_from(("CEIL", "FLOOR"))))
    assume(min(caffe_files.window_counts(p, size)) > 0)
    return p, size


@given(windows())
@example((d.Pooling("MAX", (1, 1), (2, 2)), (4, 4)))
@example((d.Pooling("AVE", (1, 1), (2, 2)), (4, 4)))  # 0 / 0
@example((d.Pooling("AVE", (1, 2), (4, 3)), (2, 3)))  # 0 / -1
@example((d.Pooling("MAX", (2, 2), (3, 3), (0, 1)), (6, 9)))
@example((d.Pooling("AVE", (4, 3), (2, 4), (3, 0)), (2, 12)))
@example((d.Pooling("AVE", (4, 7), (2, 4), (1, 0)), (1, 4)))
@example((d.Pooling("MAX", (3, 3), (1, 1), (2, 2)), (1, 1)))
@settings(max_examples=300, deadline=None)
def test_pooling(case: tuple[d.Pooling, tuple[int, int]]) -> None:
    p, size = case
    x = caffe_files.image(2, 2, *size)
    net = caffe.Net(caffe_files.definition({"data": tuple(x.shape)}, ("pool", p, "data")))
    ours = net(x)
    if p.method == "MAX":
        assert torch.equal(ours, tensor(caffe_files.pooled(p, x.numpy())))
        return
    exact, sizes = (tensor(caffe_files.pooled(p, value.double().numpy())) for value in (x, x.abs()))
    assert ours.shape == exact.shape and torch.equal(ours.isnan(), exact.isnan())
    # As many roundings as there are elements in a window, each at most of the sum of their sizes.
    count = p.kernel[0] * p.kernel[1] if p.kernel else size[0] * size[1]
    assert not ((ours - exact).abs() > (count + 1) * unit_roundoff(ours.dtype) * sizes.abs()).any()


@given(windows())
@example((d.Pooling("MAX", (1, 1), (2, 2)), (4, 4)))
@example((d.Pooling("MAX", (3, 3), (2, 2)), (6, 6)))
@settings(max_examples=25, deadline=None)
def test_pooling_behind_a_fused_convolution(case: tuple[d.Pooling, tuple[int, int]]) -> None:
    p, size = case
    x = caffe_files.image(2, 3, *size)
    net = caffe_files.network(
        caffe_files.definition(
            {"data": tuple(x.shape)},
            ("a", d.Convolution(4, (3, 3), padding=(1, 1)), "data"),
            ("relu", d.ReLU(), "a", "a"),
            ("pool", p, "a"),
        )
    )
    net, x = net.double(), x.double()
    with torch.no_grad():
        ours, exact = rf.optimize(net)(x), tensor(caffe_files.reference(net, {"data": x})["pool"])
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("method", ["MAX", "AVE"])
def test_pooling_hands_on_gradients(method: str) -> None:
    for p in (d.Pooling(method, (3, 2), (2, 2)), d.Pooling(method, (2, 3), (3, 2), (1, 2)), d.Pooling(method)):
        x = caffe_files.image(1, 2, 7, 8).double().requires_grad_()
        assert torch.autograd.gradcheck(layers.Pooling(p), (x,))


# ------------------------------------------------------------------------------------------------------------ training


def _small(use_global_stats: bool | None, fraction: float = 0.999) -> d.Definition:
    norm = d.BatchNorm(use_global_stats, fraction, 1e-3)
    return caffe_files.definition(
        {"data": (3, 2, 5, 4)},
        ("a", d.Convolution(3, (3, 3), padding=(1, 1)), "data"),
        ("norm", norm, "a", "a"),
        ("scale", d.Scale(bias_term=True), "a", "a"),
        ("relu", d.ReLU(0.1), "a", "a"),
        ("b", d.Convolution(3, (1, 1), bias_term=False), "data"),
        ("sum", d.Eltwise("SUM", (0.5, -1.0)), "a b"),
        ("pool", d.Pooling("AVE", (2, 2), (2, 2)), "sum"),
        ("score", d.InnerProduct(2), "pool"),
    )


def _blobs(net: caffe.Net) -> list[Tensor]:
    return [tensor.clone() for tensor in layers.blobs(net.layer("norm")).values()]


def test_a_ratio_that_cannot_be_trained_with() -> None:
    net = caffe_files.network(GRAPHS["dropout of any ratio"])
    x = caffe_files.feeds(net)["data"]
    assert torch.equal(net.blobs(x, ["b", "more"])["more"], net.blobs(x, ["b"])["b"])
    with pytest.raises(caffe.CaffeError, match="dropout_ratio is 1; in train mode it must be 0 or more and less than"):
        net.train()(x)


def test_five_blobs_are_for_stored_statistics() -> None:
    """In train mode too if the definition says so, as `norm` does; `after` does not."""
    net = caffe_files.network(GRAPHS["norm of five blobs"])
    x, before = caffe_files.feeds(net)["data"], net.blobs(caffe_files.feeds(net), ["a"])["a"]
    net.train()
    part = net.features(["a"])
    assert torch.equal(part(x), before)
    part(x).sum().backward()
    norm = net.layer("norm")
    assert norm.weight.grad is not None and norm.bias.grad is not None and norm.weight.grad.abs().max() > 0
    with pytest.raises(caffe.CaffeError, match="has no batch statistics here; in train mode it needs use_global_stats"):
        net(x)
    d_norm = d.BatchNorm(False, scale_bias=True)
    stored = caffe.Net(caffe_files.definition({"data": (2, 3, 4, 5)}, ("norm", d_norm, "data"))).eval()
    assert torch.isfinite(stored(caffe_files.image(2, 3, 4, 5))).all()  # in the TEST phase NVIDIA's does not ask


@pytest.mark.parametrize("kind", ["LRN", "LRN within", "PReLU", "PReLU shared", "Power", "Axpy", "Deconvolution"])
def test_gradients_of_single_layers(kind: str) -> None:
    p: d.Parameters = {
        "LRN": d.LRN(3, 0.7),
        "LRN within": d.LRN(3, 0.7, norm_region="WITHIN_CHANNEL"),
        "PReLU": d.PReLU(),
        "PReLU shared": d.PReLU(True),
        "Power": d.Power(3.0, 0.5, 2.0),
        "Axpy": d.Axpy(),
        "Deconvolution": d.Deconvolution(4, (3, 2), (2, 1), group=2),
    }[kind]
    shapes = [(2, 4, 1, 1), (2, 4, 3, 4), (2, 4, 3, 4)] if kind == "Axpy" else [(2, 4, 3, 4)]
    module = p.module(shapes, 1)
    assert module is not None
    inputs = [caffe_files.image(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(module.double(), inputs)


def test_responses_cost_no_more_than_the_blob_is_wide() -> None:
    """A window of 2 billion channels or pixels is that of the blob."""
    x = caffe_files.image(2, 3, 4, 5)
    for region, wide, axes in (("ACROSS_CHANNELS", 7, 1), ("WITHIN_CHANNEL", 11, 2)):
        ours, exact = (
            layers.LRN(d.LRN(size, float(size) ** axes, 0.75, region))(x) for size in (2**31 - 1, wide)
        )  # alpha and the number of elements cancel
        torch.testing.assert_close(ours, exact)


def test_half_precision_sums_are_wide() -> None:
    """Squares that float16 cannot hold."""
    x = torch.full((1, 2, 3, 3), 300.0, dtype=torch.float16)
    for region in ("ACROSS_CHANNELS", "WITHIN_CHANNEL"):
        module = layers.LRN(d.LRN(3, 1e-4, norm_region=region))
        torch.testing.assert_close(module(x).float(), module(x.float()), rtol=1e-3, atol=0)


def test_a_constant_power_does_not_look_at_its_bottom() -> None:
    x = torch.tensor([float("nan"), float("inf"), 1.0])
    assert layers.Power(d.Power(2.0, 0.0, 3.0))(x).tolist() == [9, 9, 9]
    assert layers.Power(d.Power(0.0, 2.0, 3.0))(x).tolist() == [1, 1, 1]
    assert layers.Power(d.Power(-1.0, 0.0, 0.0))(x).tolist() == [float("inf")] * 3  # as pow gives it
    assert layers.Power(d.Power(0.5))(-torch.ones(1)).isnan().all()


def test_training_with_stored_statistics_leaves_them_alone() -> None:
    net = caffe_files.network(_small(True))
    x, before = caffe_files.image(3, 2, 5, 4), _blobs(net)
    expected = net(x)
    net.train()
    assert torch.equal(net(x), expected)
    net(x).square().sum().backward()
    assert all(map(torch.equal, _blobs(net), before))
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("zero", [False, True])
def test_an_eps_of_zero_is_caffe_s(zero: bool) -> None:
    """Some torch versions refuse it; without a scale behind it and with, fused and not."""
    nets = caffe_files.definition(
        {"data": (3, 2, 5, 4)},
        ("alone", d.BatchNorm(True, 0.999, 0.0), "data"),
        ("conv", d.Convolution(3, (3, 3)), "alone"),
        ("norm", d.BatchNorm(True, 0.999, 0.0), "conv", "conv"),
        ("scale", d.Scale(bias_term=True), "conv", "conv"),
    )
    net, x = caffe_files.network(nets).double(), caffe_files.image(3, 2, 5, 4).double()
    if zero:
        net.layer("norm").variance[1] = 0
    alone, norm, scale = (net.layer(name) for name in ("alone", "norm", "scale"))
    wide = alone.statistics()
    inner = (x - wide[0][:, None, None]) / wide[1][:, None, None].sqrt()
    torch.testing.assert_close(net.blobs(x, ["alone"])["alone"], inner)
    mean, variance = (value[:, None, None] for value in norm.statistics())
    expected = (net.layer("conv")(inner) - mean) / variance.sqrt()
    expected = expected * scale.weight[:, None, None] + scale.bias[:, None, None]
    finite, plain = expected.isfinite(), net(x)
    torch.testing.assert_close(plain[finite], expected[finite])
    assert torch.equal(plain.isfinite(), finite) and finite.all() != zero
    fast = rf.optimize(net, example_inputs=x)
    torch.testing.assert_close(fast(x), plain, equal_nan=True)
    reasons = {row.name: row.reason for row in fast.report().rows}
    assert ("divides by 0" in reasons["norm"]) == zero


@pytest.mark.parametrize("use_global_stats", [True, None])
def test_gradients(use_global_stats: bool | None) -> None:
    net = caffe_files.network(_small(use_global_stats)).double().train()
    x = caffe_files.image(3, 2, 5, 4).double().requires_grad_()
    names = [name for name, _ in net.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *net.parameters()))


def test_training_with_the_batch_s_statistics() -> None:
    """Each run shrinks the sums by the fraction and adds its own mean, its unbiased variance, and 1."""
    net = caffe_files.network(_small(None, 0.9)).train()
    sums = [blob.double().numpy() for blob in _blobs(net)]
    for seed in range(3):
        x = caffe_files.image(3, 2, 5, 4, seed=seed)
        a = copy.deepcopy(net.layer("a")).double()(x.double()).detach().numpy()
        found = net.blobs(x, ["score"])["score"]
        mean, variance = a.mean((0, 2, 3)), a.var((0, 2, 3))
        sums[0] = 0.9 * sums[0] + mean
        sums[1] = 0.9 * sums[1] + variance * 60 / 59
        sums[2] = 0.9 * sums[2] + 1
        for ours, exact in zip(_blobs(net), sums, strict=True):
            np.testing.assert_allclose(ours.numpy(), exact, rtol=2e-6, atol=1e-6)
        exact_net = copy.deepcopy(net)
        norm = exact_net.layer("norm")
        norm.factor.fill_(1)
        norm.mean.copy_(torch.from_numpy(mean))
        norm.variance.copy_(torch.from_numpy(variance))
        exact = tensor(caffe_files.reference(exact_net, {"data": x})["score"])
        rounded = tensor(caffe_files.reference(exact_net, {"data": x}, np.float32)["score"])
        assert_obeys_error_rule(found.detach(), rounded, exact)
    x = caffe_files.image(1, 2, 5, 4, seed=9)
    before = _blobs(net)
    exact, rounded = (
        tensor(caffe_files.reference(net, {"data": x}, kind)["score"]) for kind in (np.float64, np.float32)
    )
    assert_obeys_error_rule(net.eval()(x).detach(), rounded, exact)
    assert all(map(torch.equal, _blobs(net), before))


def test_statistics_begin_as_caffe_s_do_after_one_run() -> None:
    """From a factor of 0 the first run's mean and unbiased variance are the statistics."""
    norm = layers.BatchNorm(3, d.BatchNorm()).train()
    for blob in (norm.mean, norm.variance, norm.factor):
        blob.zero_()
    x = caffe_files.image(4, 3, 5)
    norm(x)
    mean, variance = norm.statistics()
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(variance, x.transpose(0, 1).flatten(1).var(1))


def test_a_batch_norm_told_not_to_use_its_statistics_uses_the_batch_s_in_inference_too() -> None:
    """Caffe's use_global_stats decides in both phases if it is given; only its default depends on the phase."""
    net = caffe_files.network(
        caffe_files.definition({"data": (3, 2, 5, 4)}, ("norm", d.BatchNorm(use_global_stats=False), "data"))
    )
    x = caffe_files.image(3, 2, 5, 4) * 3 + 1
    x64 = x.double().numpy()
    exact = (x64 - x64.mean((0, 2, 3), keepdims=True)) / np.sqrt(x64.var((0, 2, 3), keepdims=True) + 1e-5)
    for run in (net, rf.optimize(net)):
        np.testing.assert_allclose(run(x).numpy(), exact, rtol=1e-5, atol=1e-6)


def test_training_on_one_value_per_channel() -> None:
    """It is its own mean, so that the result is 0, or a rounding of x over the root of eps; m / (m - 1) is 1."""
    norm = layers.BatchNorm(3, d.BatchNorm()).train()
    x = caffe_files.image(1, 3, 1, 1)
    mean, variance, factor = 0.999 * norm.mean + x.flatten(), 0.999 * norm.variance, 0.999 * norm.factor + 1
    assert (norm(x).abs() <= 4 * unit_roundoff(x.dtype) * x.abs() / norm.eps**0.5).all()
    torch.testing.assert_close((norm.mean, norm.variance, norm.factor), (mean, variance, factor))


def test_dropout_acts_in_training_only() -> None:
    net = caffe_files.network(GRAPHS["head"])
    x = caffe_files.image(40, 6, 7, 5)
    kept = net.blobs(x, ["pool"])["pool"]
    net.train()
    ratio = (net.blobs(x, ["pool"])["pool"] / kept).flatten()
    assert set(ratio.mul(0.6).round(decimals=3).tolist()) == {0.0, 1.0}
    assert 0.4 < (ratio > 0).float().mean() < 0.8  # 200 elements, of which 0.6 are kept


def test_windows_far_larger_than_the_image() -> None:
    """They cost what the image costs; sums that float16 cannot hold are averaged all the same."""
    x = caffe_files.image(1, 1, 8, 8)
    for method in ("MAX", "AVE"):
        pool = layers.Pooling(d.Pooling(method, (1_000_001,) * 2, (1_000_000,) * 2, (1_000_000,) * 2))
        assert pool(x).shape == (1, 1, 2, 2)
    assert layers.Pooling(d.Pooling("MAX", (99, 99), (98, 98), (98, 98)))(x)[0, 0, 1, 1] == x.max()
    full = torch.full((1, 1, 8, 8), 10_000.0, dtype=torch.float16)
    assert layers.Pooling(d.Pooling("AVE", (3, 3), (4, 4)))(full)[:, :, :2, :2].eq(10_000).all()


def test_training_on_no_image_changes_no_statistics() -> None:
    norm = layers.BatchNorm(3, d.BatchNorm()).train()
    assert norm(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert torch.equal(norm.factor, torch.ones(1))
    assert norm.mean.eq(0).all()
