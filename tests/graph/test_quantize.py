"""``quantize``: int8 layers against exact arithmetic, whole networks against float, and what users feed it."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import cpu, onednn_int8
from resnet_fast.backends.onednn_int8 import Affine
from resnet_fast.graph import OptimizedModule, quantize_layers
from resnet_fast.graph.quantize_layers import Convolution, Dequantize, MaxPool, Quantize
from resnet_fast.graph.quantize_observe import Observer
from tests.networks import Lambda, conv_bn, randomise

X86 = platform.machine() in ("x86_64", "AMD64")
pytestmark = pytest.mark.skipif(not X86 and bool(onednn_int8.unavailable()), reason=onednn_int8.unavailable() or "-")


@pytest.fixture(autouse=True)
def probed() -> None:
    """What is found out once in a process is found out before a fault is planted."""
    assert not onednn_int8.unavailable()
    onednn_int8.saturates()


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes int8, as where the engine has no kernels for it."""
    monkeypatch.setattr(quantize_layers, "computed_by", lambda shape, groups: onednn_int8.NAME)


@pytest.fixture(params=["the engine", "oneDNN"])
def either(request: pytest.FixtureRequest) -> str:
    """Both of those that compute int8, one after the other; returns the name of the one that does."""
    if request.param == "oneDNN":
        request.getfixturevalue("onednn")
        return onednn_int8.NAME
    if cpu.without_uint8():
        pytest.skip(cpu.without_uint8())
    return quantize_layers.ENGINE


def seven_bits() -> bool:
    """Return whether activations have 7 bits, since oneDNN computes and saturates here."""
    return quantize_layers.computed_by((16, 16, 3, 3), 1) == onednn_int8.NAME and onednn_int8.saturates()


def block(channels: int, out: int, **kwargs: Any) -> nn.Sequential:
    return nn.Sequential(conv_bn(channels, out, **kwargs), nn.ReLU())


class Residual(nn.Module):
    """An image's convolution, a block with a projected shortcut, one without, global pool and scores."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = block(3, width)
        self.a, self.b = block(width, width), conv_bn(width, 2 * width, stride=2)
        self.shortcut = conv_bn(width, 2 * width, kernel_size=1, padding=0, stride=2)
        self.c, self.d = block(2 * width, 2 * width), conv_bn(2 * width, 2 * width)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.b(self.a(x)) + self.shortcut(x))
        x = F.relu(self.d(self.c(x)) + x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def made(model: nn.Module | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Residual() if model is None else model)


def images(count: int = 2, size: int = 24, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, channels, size, size, generator=generator) for _ in range(count)]


def kinds(fast: OptimizedModule) -> dict[str, int]:
    found = [type(module).__name__ for module in fast.graph_module.modules()]
    return {name: found.count(name) for name in ("Quantize", "Dequantize", "Convolution", "MaxPool")}


def sqnr(exact: Tensor, found: Tensor) -> float:
    noise = float((exact.double() - found.double()).square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / noise) if noise else math.inf


# --- one layer, exactly

CASES = [
    # channels, out, kernel, stride, padding, dilation, groups, zero points of x and out, size, residual
    (16, 32, 3, 1, 1, 1, 1, 0, 0, 9, ""),
    (16, 32, 3, 2, 1, 1, 1, 100, 30, 9, ""),
    (64, 64, 1, 1, 0, 1, 1, 0, 9, 7, "last"),
    (64, 128, 1, 2, 0, 1, 1, 3, 0, 8, "last"),
    (32, 32, 3, 1, 1, 1, 32, 7, 0, 9, ""),
    (32, 64, 3, 1, 1, 1, 4, 0, 128, 7, "last"),
    (17, 5, 3, 1, 2, 2, 1, 3, 9, 8, ""),
    (8, 24, 5, 3, 4, 1, 2, 11, 0, 13, ""),
    (64, 64, 1, 1, 0, 1, 1, 0, 0, 1, "last"),
    (3, 7, 7, 2, 3, 1, 1, 120, 0, 20, ""),
    (256, 64, 3, 1, 1, 1, 1, 0, 0, 14, "last"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("relu", ["", "last"])
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("largest", [255, 127])
@pytest.mark.usefixtures("either")
def test_a_layer_is_exact(case: tuple[Any, ...], relu: str, floating: bool, largest: int) -> None:
    """Sums are exact in int32; only where the real value lies on the border of two steps may float32 take the other."""
    channels, out, kernel, stride, padding, dilation, groups, x_zero, y_zero, size, added = case
    generator = torch.Generator().manual_seed(channels + size)
    if largest == 255 and seven_bits():
        pytest.skip("this processor needs 7 bits")
    weight = torch.randn(out, channels // groups, kernel, kernel, generator=generator).double()
    bias = torch.randn(out, generator=generator)
    x_way, residual_way = Affine(0.0125, min(x_zero, largest)), Affine(0.5, 11)
    x = torch.randint(0, largest + 1, (2, channels, size, size), generator=generator, dtype=torch.uint8)
    real_x = (x.double() - x_way.zero_point) * float(torch.tensor(x_way.scale))
    scale = quantize_layers.per_channel(weight)
    integers = (weight / scale.double().view(-1, 1, 1, 1)).round()
    real_weight = integers * scale.double().view(-1, 1, 1, 1)
    exact = F.conv2d(real_x, real_weight, bias.double(), stride, padding, dilation, groups)
    y_way = Affine(float(torch.tensor(float(exact.abs().max()) / 100)), min(y_zero, largest))
    given = [x.contiguous(memory_format=torch.channels_last)]
    if added:
        residual = torch.randint(0, largest + 1, exact.shape, generator=generator, dtype=torch.uint8)
        real_residual = (residual.double() - residual_way.zero_point) * residual_way.scale
        exact = exact + real_residual
        given.append(real_residual.float() if floating else residual)
        given[1] = given[1].contiguous(memory_format=torch.channels_last)
    exact = exact.relu() if relu else exact
    window = [padding] * 2, [stride] * 2, [dilation] * 2, groups
    ways = (None, None) if floating else (y_way, residual_way)
    layer = Convolution("layer", weight, bias, window, x_way, *ways, relu, largest)
    assert torch.equal(layer.weight.double(), integers)
    before = [tensor.clone() for tensor in given]
    found = layer(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "what it is given is not its own"
    assert found.is_contiguous(memory_format=torch.channels_last) and found.shape == exact.shape
    if floating:
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
        return
    steps = exact / y_way.scale
    wanted = (steps.round() + y_way.zero_point).clamp(0, largest)
    border = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    difference = (found.double() - wanted).abs()
    assert found.dtype is torch.uint8
    assert float(difference.max()) <= 1 and not bool((difference[~border] > 0).any())
    # The definition gives the same.
    meant = layer.defined(
        *(quantize_layers.real(tensor, way) for tensor, way in zip(given, (x_way, residual_way), strict=False))
    )
    assert float((quantize_layers.real(found, y_way) - meant).abs().max()) <= 1.001 * y_way.scale


def test_quantize_and_back() -> None:
    way = Affine(0.5, 10)
    x = torch.tensor([-100.0, -5.1, -5.0, -0.25, 0.0, 0.25, 0.26, 0.75, 122.5, 1e9]).view(1, 10, 1, 1)
    found = quantize_layers.stored(x, way, 255)
    assert found.flatten().tolist() == [0, 0, 0, 10, 10, 10, 11, 12, 255, 255]  # halves to even
    assert torch.equal(Dequantize(way, 255)(found), quantize_layers.fake(x, way, 255))
    assert Quantize(way, 127)(x).max() == 127 and Quantize(way, 127)(x).dtype is torch.uint8


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
def test_the_max_pool_of_bytes(window: tuple[int, int, int]) -> None:
    kernel, stride, padding = window
    x = torch.randint(0, 256, (2, 24, 41, 37), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for ceil in (False, True):
        pool = MaxPool((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), ceil)
        assert torch.equal(pool(x).float(), F.max_pool2d(x.float(), kernel, stride, padding, ceil_mode=ceil))
        assert pool(x).dtype is torch.uint8 and pool(x[:0]).shape[0] == 0


# --- whole networks


def test_a_network_stays_in_int8(either: str) -> None:
    model = made()
    fast = rf.quantize(model, images())
    assert isinstance(fast, OptimizedModule) and not fast.training and fast.train() is fast
    report = fast.quantization
    assert report is not None and report is fast.report().quantization
    assert [layer.name for layer in report.int8] == ["a.0.0", "b.0", "shortcut.0", "c.0.0", "d.0"]
    assert {layer.reason for layer in report.kept_float} == {
        "it reads the image", "the scores are computed in float32",
    }  # fmt: skip
    # In once behind the first convolution, out once for the last block's float result.
    assert kinds(fast) == {"Quantize": 1, "Dequantize": 1, "Convolution": 5, "MaxPool": 0}
    assert {row.backend for row in fast.report().rows if row.fused.endswith("a.0.0")} == {either}
    assert report.images == 4 and report.bits == (7 if seven_bits() else 8)
    x = images(3)[2]
    with torch.no_grad():
        exact = model(x)
    assert sqnr(exact, fast(x)) > 28 and report.sqnr is not None and report.sqnr > 28
    with backends.use("reference"):
        assert sqnr(fast(x), model(x)) > 28
    assert all(layer.alone is not None and layer.alone > 30 for layer in report.int8)
    assert all(layer.sqnr is not None and layer.sqnr > 28 for layer in report.layers[1:])


def test_the_report_says_what_is_true(either: str) -> None:
    model, calibration = made(), images(3)
    fast = rf.quantize(model, calibration)
    report, plain = fast.quantization, rf.optimize(model)
    assert report is not None
    exact, found = (torch.cat([each(x) for x in calibration]) for each in (plain, fast))
    assert report.sqnr == pytest.approx(sqnr(exact, found), abs=0.01)
    assert report.largest_error == pytest.approx(float((exact - found).abs().max()), rel=1e-3)
    assert report.largest_output == pytest.approx(float(exact.abs().max()), rel=1e-4)
    assert report.top1_agreement == pytest.approx(float((exact.argmax(1) == found.argmax(1)).double().mean()))
    text = str(fast.report())
    assert either in text and "here, dB" in text and f"{report.sqnr:.1f} dB" in text
    assert json.loads(json.dumps(fast.report().as_dict(), allow_nan=False))["quantization"]["bits"] == report.bits
    assert rf.optimize(model).quantization is None and "dB" not in str(rf.optimize(model).report())
    before, after = rf.optimize(model, example_inputs=calibration[0]).report().bytes_after, fast.report().bytes_after
    assert before is not None and after is not None and after < 0.7 * before


@pytest.mark.parametrize("shape", [(0, 3, 24, 24), (1, 3, 24, 24), (5, 3, 24, 24), (2, 3, 33, 97), (1, 3, 7, 5)])
@pytest.mark.usefixtures("either")
def test_other_sizes(shape: tuple[int, ...]) -> None:
    model = made()
    fast = rf.quantize(model, images())
    x = torch.randn(shape)
    with torch.no_grad():
        exact = model(x)
    found = fast(x)
    assert found.shape == exact.shape and found.dtype is torch.float32
    assert not len(x) or sqnr(exact, found) > 20
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 1)[:, :3],
        x.double(),
    ):
        torch.testing.assert_close(fast(same), found, rtol=0, atol=0.05 * float(exact.abs().max()) if len(x) else 0)


@pytest.mark.usefixtures("onednn")
def test_each_size_has_its_packed_weights() -> None:
    """oneDNN would pack them at each call, which takes several times as long as the convolution."""
    fast = rf.quantize(made(), images())
    layers = [module for module in fast.graph_module.modules() if isinstance(module, Convolution)]
    for size in (24, 40, 24):
        fast(torch.randn(3, 3, size, size))
    for layer in layers:
        assert layer._packed is not None
        shapes = layer._packed[1].by_shape
        assert {shape[0] for shape in shapes} >= {3} and len(shapes) <= 4  # fewer if each wants a layout
        assert len({id(weight) for weight in shapes.values()}) <= 2
    for size in range(8, 300):
        layers[0].prepare((1, 16, size, size))
    packed = layers[0]._packed
    assert packed is not None and len(packed[1].by_shape) <= 256


@pytest.mark.usefixtures("either")
def test_a_batch_gives_each_image_its_own_answer() -> None:
    fast = rf.quantize(made(), images())
    x = torch.randn(5, 3, 24, 24)
    together = fast(x)
    for index in range(5):
        torch.testing.assert_close(fast(x[index : index + 1])[0], together[index], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("either")
def test_nan_and_infinity_pass_as_in_float() -> None:
    fast = rf.quantize(made(), images())
    for value in (math.nan, math.inf):
        x = torch.randn(2, 3, 24, 24)
        x[1, 0, 3, 3] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", backends.FallbackWarning)
            found = fast(x)
        assert bool(found[0].isfinite().all()) and not bool(found[1].isfinite().any())


@pytest.mark.usefixtures("either")
def test_threads_share_a_snapshot() -> None:
    fast = rf.quantize(made(), images())
    inputs = [torch.randn(1 + index % 3, 3, 24 + index, 24) for index in range(8)]
    wanted = [fast(x) for x in inputs]
    fresh = copy.deepcopy(fast)  # packs at its first run, in whichever thread that is
    found: list[Tensor | None] = [None] * 8

    def run(index: int) -> None:
        for _ in range(5):
            found[index] = fresh(inputs[index])

    workers = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for mine, other in zip(found, wanted, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("either")
def test_a_residual_that_is_read_later_is_not_written_over() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        y = F.relu(self.b(self.a(x)) + x)  # x is not read again
        z = F.relu(self.d(self.c(y)) + y)  # y is
        return self.e(torch.cat([z, y], 1))

    parts = {"a": block(16, 16), "b": conv_bn(16, 16), "c": block(16, 16), "d": conv_bn(16, 16)}
    model = made(Lambda(forward, first=block(3, 16), e=conv_bn(32, 16), **parts))
    fast = rf.quantize(model, images())
    assert fast.quantization is not None and len(fast.quantization.int8) == 5
    x = images()[0]
    with torch.no_grad():
        exact = model(x)
    assert sqnr(exact, fast(x)) > 25
    with backends.use("reference"):
        assert sqnr(fast(x), exact) > 25
    with backends.use("reference"):
        meant = fast(x)
    assert sqnr(meant, fast(x)) > 35
    writes = [m.overwrites for m in fast.graph_module.modules() if isinstance(m, Convolution) and m.affine("residual")]
    assert writes == [True, False]


@pytest.mark.usefixtures("either")
def test_pools_and_concatenations_stay_uint8() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.max_pool2d(self.a(x), 3, 2, 1)
        x = torch.cat([self.b(x), self.c(x), self.d(F.max_pool2d(x, 3, 1, 1))], 1)
        return self.e(F.max_pool2d(x, 2)).mean((2, 3))

    branches = {name: block(16, 8) for name in "bcd"}
    model = made(Lambda(forward, first=block(3, 16), a=block(16, 16), e=block(24, 16), **branches))
    fast = rf.quantize(model, images())
    assert kinds(fast) == {"Quantize": 1, "Dequantize": 0, "Convolution": 5, "MaxPool": 3}
    x = images()[1]
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 28


@pytest.mark.usefixtures("either")
def test_addition_behind_the_relu_keeps_its_stream_in_float() -> None:
    model = randomise(rf.residual_network(10, 1))
    fast = rf.quantize(model, images(1, 28, 1))
    assert fast.quantization is not None and len(fast.quantization.int8) > 30
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 25


def test_foreign_layers_stay_as_they_are() -> None:
    model = made(
        nn.Sequential(
            block(3, 8),
            block(8, 8),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            block(8, 16),
            nn.ConvTranspose2d(16, 8, 2, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            block(8, 8),
            nn.Conv2d(8, 4, 1, padding_mode="reflect"),
        )
    )
    fast = rf.quantize(model, images())
    report = fast.quantization
    assert report is not None and len(report.int8) >= 3
    reasons = {layer.name: layer.reason for layer in report.kept_float}
    assert reasons["5"] == "no int8 form of this layer"
    x = images()[0]
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 30


def test_a_network_in_parts() -> None:
    class ByValue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.tail = nn.Sequential(block(3, 16), block(16, 16)), block(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.tail(y) if y.mean() > 0 else y

    model = made(ByValue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = rf.quantize(model, images())
    report = fast.quantization
    assert report is not None and [layer.name for layer in report.int8] == ["body.1.0.0", "tail.0.0"]
    x = images()[0]
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 30 and not torch.equal(model(x), fast(x))


def test_a_trained_network_keeps_its_answers() -> None:
    """A small ResNet that has learned to tell digits apart: what training does to weights and ranges is in it."""
    from resnet_fast.training import digits

    pytest.importorskip("sklearn")
    data = digits.load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(block(1, 16, stride=2), Residual(16))
    model[1].first = block(16, 16, stride=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    mean, std = data.train.images.mean(), data.train.images.std()
    for step in range(110):
        picked = slice(step * 50 % 1350, step * 50 % 1350 + 50)
        loss = F.cross_entropy(model((data.train.images[picked] - mean) / std), data.train.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    fast = rf.quantize(model, ((data.train.images[:200] - mean) / std).split(50))
    held_out = (data.held_out.images - mean) / std
    with torch.no_grad():
        exact = model(held_out)
    found = fast(held_out)
    correct = [float((scores.argmax(1) == data.held_out.labels).double().mean()) for scores in (exact, found)]
    assert correct[0] > 0.9, "it has learned nothing, the test says nothing"
    assert correct[1] > correct[0] - 0.01
    assert float((exact.argmax(1) == found.argmax(1)).double().mean()) > 0.985
    assert sqnr(exact, found) > 25


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnets(arch: str) -> None:
    from resnet_fast.benchmarking.compare import fresh_model

    model = fresh_model(arch, image_size=64)
    x = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    fast = rf.quantize(model, x[:2], check=False)
    assert fast.quantization is not None and len(fast.quantization.kept_float) == 2
    assert kinds(fast)["Quantize"] == kinds(fast)["Dequantize"] == 1
    with torch.no_grad():
        exact = model(x[2])
    missing = 6 if seven_bits() else 0  # dB of the eighth bit
    assert sqnr(exact, fast(x[2])) > (25 if arch == "resnet18" else 18) - missing


def test_a_layer_that_is_called_twice() -> None:
    model = made(Lambda(lambda self, x: self.a(self.a(self.first(x))), first=block(3, 16), a=block(16, 16)))
    fast = rf.quantize(model, images())
    assert fast.quantization is not None and [layer.name for layer in fast.quantization.int8] == ["a.0.0"]
    with torch.no_grad():
        assert sqnr(model(images()[0]), fast(images()[0])) > 28
    with pytest.warns(UserWarning, match="nothing is quantized"):
        rf.quantize(model, images(), min_sqnr=500)


def test_a_result_that_nobody_knows() -> None:
    class Box:
        def __init__(self, scores: Tensor) -> None:
            self.scores = scores

    model = made(Lambda(lambda self, x: Box(self.inner(x)), inner=Residual()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = rf.quantize(model, images(), check=False)
    report = fast.quantization
    assert report is not None and len(report.int8) == 5 and report.sqnr is None and "dB" in str(report)
    with torch.no_grad():
        assert sqnr(model(images()[0]).scores, fast(images()[0]).scores) > 28


# --- what stays float on request


def test_keep_float() -> None:
    fast = rf.quantize(made(), images(), keep_float=["c.*", "shortcut.0"])
    report = fast.quantization
    assert report is not None and [layer.name for layer in report.int8] == ["a.0.0", "b.0", "d.0"]
    assert {layer.name for layer in report.kept_float if layer.reason == "kept by keep_float"} == {
        "c.0.0",
        "shortcut.0",
    }
    with torch.no_grad():
        assert sqnr(made()(images()[0]), fast(images()[0])) > 28
    with pytest.raises(ValueError, match=r"keep_float has 'layer9\.\*', which matches no layer"):
        rf.quantize(made(), images(), keep_float=["layer9.*"])
    with pytest.raises(TypeError, match="keep_float is 'a'; it must be a list"):
        rf.quantize(made(), images(), keep_float="a")


def test_min_sqnr() -> None:
    plain = rf.quantize(made(), images()).quantization
    assert plain is not None and plain.sqnr is not None
    aim = plain.sqnr + 2
    fast = rf.quantize(made(), images(), min_sqnr=aim)
    report = fast.quantization
    assert report is not None and report.sqnr is not None and report.sqnr >= aim
    assert 0 < len(report.int8) < len(plain.int8)
    kept = [layer for layer in report.kept_float if layer.reason.startswith(f"float32 for min_sqnr={aim:g}")]
    assert kept and min(each.alone or 0.0 for each in report.int8) >= max(each.alone or 0.0 for each in kept)
    with pytest.warns(UserWarning, match=r"nothing is quantized: .*min_sqnr=500"):
        nothing = rf.quantize(made(), images(), min_sqnr=500)
    x = images()[0]
    assert torch.equal(nothing(x), rf.optimize(made())(x)) and nothing.quantization is not None
    with pytest.raises(TypeError, match="min_sqnr is 'good'"):
        rf.quantize(made(), images(), min_sqnr="good")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.bfloat16, "computes in bfloat16"), (torch.float64, "computes in float64")]
)
def test_other_precisions_stay(dtype: torch.dtype, reason: str) -> None:
    model = made().to(dtype)
    with pytest.warns(UserWarning, match=f"quantize: nothing is quantized: the model {reason}") as caught:
        fast = rf.quantize(model, [x.to(dtype) for x in images()])
    assert len([each for each in caught if "quantized" in str(each.message)]) == 1
    assert fast(images()[0].to(dtype)).dtype is dtype
    assert fast.quantization is not None and not fast.quantization.int8 and "nothing is" in str(fast.report())


def test_a_model_without_convolutions() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    with pytest.warns(UserWarning, match="nothing is quantized"):
        fast = rf.quantize(model, [torch.randn(2, 3, 2, 2)])
    assert fast(torch.randn(5, 3, 2, 2)).shape == (5, 4)


@pytest.mark.usefixtures("onednn")
def test_without_the_functions_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qconv2d_pointwise'")

    with monkeypatch.context() as patch:
        patch.setattr(onednn_int8, "_functions", gone)
        patch.setattr(onednn_int8, "_probe", onednn_int8._probe.__wrapped__)
        with pytest.warns(
            UserWarning, match="does not offer oneDNN's int8 convolutions as expected .*qconv2d_pointwise"
        ):
            fast = rf.quantize(made(), images())
        assert fast.quantization is not None and not fast.quantization.int8


# --- planted faults


@pytest.mark.usefixtures("onednn")
def test_wrong_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that is off by two steps, as on a processor that nobody has tried."""
    right = onednn_int8.conv

    def wrong(x: Tensor, packed: Any, of: Any, out: Any, *, relu: bool) -> Tensor:
        y = right(x, packed, of, out, relu=relu)
        return y.clamp(2) if y.dtype is torch.uint8 and x.shape[1] == 16 and y.shape[1] == 16 else y

    monkeypatch.setattr(onednn_int8, "conv", wrong)
    fast = rf.quantize(made(), images())
    report = fast.quantization
    assert report is not None
    assert {layer.name: layer.reason for layer in report.kept_float}["a.0.0"] == (
        "oneDNN's int8 convolution gives other numbers than its definition"
    )
    assert len(report.int8) == 4 and report.sqnr is not None and report.sqnr > 28


@pytest.mark.usefixtures("onednn")
def test_a_layer_that_fails_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("could not create a primitive descriptor\nlong story")

    monkeypatch.setattr(onednn_int8, "conv_sum_", fails)
    report = rf.quantize(made(), images()).quantization
    assert report is not None and len(report.int8) == 3
    reasons = {layer.reason for layer in report.kept_float}
    assert "oneDNN's int8 convolution fails: could not create a primitive descriptor" in reasons


def test_poor_results_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Observer, "affine", lambda self, largest: Affine(4.0, 0))
    with pytest.warns(UserWarning, match=r"quantize: the outputs have .* dB only"):
        rf.quantize(made(), images())


# --- calibration batches


class _Loader:
    """Images and labels, as a DataLoader gives them."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([[x, torch.zeros(len(x), dtype=torch.long)] for x in images()])


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert pixel_values is not None and labels is None
        return {"logits": self.inner(pixel_values)}


class _Mapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["image"])


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(3, 8), block(16, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(left), self.b(right)], 1))


def _same_buffer() -> Iterator[Tensor]:
    buffer = torch.empty(2, 3, 24, 24)
    for x in images():
        yield buffer.copy_(x)


@pytest.mark.parametrize("kind", ["list", "generator", "loader", "same_buffer", "tuples", "dataloader"])
def test_batches_of_every_kind(kind: str) -> None:
    batches: Any = {
        "list": images(),
        "generator": (x for x in images()),
        "loader": _Loader(),
        "same_buffer": _same_buffer(),
        "tuples": [(x, "a.jpg", 3) for x in images()],
        "dataloader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.cat(images()), torch.arange(4)), batch_size=2
        ),
    }[kind]
    fast, wanted = rf.quantize(made(), batches), rf.quantize(made(), images())
    x = images(3)[2]
    assert torch.equal(fast(x), wanted(x))


def test_mappings_and_several_arguments() -> None:
    x = images()
    named = rf.quantize(made(_Named()), [{"pixel_values": each, "labels": torch.zeros(2)} for each in x])
    assert named.quantization is not None and len(named.quantization.int8) == 5
    assert named(pixel_values=x[0])["logits"].shape == (2, 10) and named.quantization.top1_agreement is not None
    mapping = rf.quantize(made(_Mapping()), [{"image": each} for each in x])
    assert mapping.quantization is not None and len(mapping.quantization.int8) == 5
    two = rf.quantize(made(_Two()), [(each, each.flip(3), None) for each in x])
    assert two.quantization is not None and [layer.name for layer in two.quantization.int8] == ["c.0.0"]
    with pytest.raises(
        TypeError, match=r"calibration_batches\[0\] has the entries picture; the model takes left, right"
    ):
        rf.quantize(made(_Two()), [{"picture": x[0]}])
    with pytest.raises(TypeError, match=r"calibration_batches\[0\] has 1 entries; the model takes left, right"):
        rf.quantize(made(_Two()), [(x[0],)])


def test_a_model_that_writes_into_its_images() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x.mul_(2).add_(0.5)
        return self.inner(x) if x.sum() < 1e9 else x  # its own code runs, since it decides by values

    model, batches = made(Lambda(forward, inner=Residual())), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, plain = rf.quantize(model, batches), rf.optimize(model)
    assert all(torch.equal(a, b) for a, b in zip(batches, images(), strict=True))
    assert fast.quantization is not None and fast.quantization.sqnr is not None and fast.quantization.int8
    exact, found = (torch.cat([each(x.clone()) for x in batches]) for each in (plain, fast))
    assert sqnr(exact, found) == pytest.approx(fast.quantization.sqnr, abs=0.01)


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        ([], ValueError, "calibration_batches holds no image"),
        (iter(()), ValueError, "calibration_batches holds no image"),
        ([torch.zeros(0, 3, 24, 24)], ValueError, "calibration_batches holds no image"),
        (torch.zeros(2, 3, 24, 24), TypeError, "calibration_batches is a Tensor; it must be an iterable of batches"),
        (None, TypeError, "calibration_batches is a NoneType"),
        (["cat.jpg"], TypeError, r"calibration_batches\[0\] is a str"),
        ([("cat.jpg", 1)], TypeError, r"calibration_batches\[0\] is a tuple that holds no tensor"),
        ([torch.zeros(1, 3, 24, 24), torch.full((1, 3, 24, 24), math.nan)], ValueError, r"\[1\] holds NaN or infinity"),
        ([torch.zeros(1, 4, 24, 24)], ValueError, r"quantize: .* not accept calibration_batches\[0\] \[1x4x24"),
        ([images()[0][0]], ValueError, r"quantize: .* not accept calibration_batches\[0\] \[3x24x24"),
        ([images()[0], torch.zeros(1, 4, 24, 24)], ValueError, r"not accept calibration_batches\[1\]: expected"),
        ([torch.full((1, 3, 24, 24), 3e38)], ValueError, r"calibration_batches\[0\] makes NaN or infinity at"),
    ],
)  # fmt: skip
def test_bad_batches(batches: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rf.quantize(made(), batches)


def test_endless_batches_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.graph import quantize

    module: Any = sys.modules[quantize.__module__]
    monkeypatch.setattr(module, "_LARGEST_CALIBRATION", 1 << 16)
    with pytest.raises(ValueError, match=r"calibration_batches are more than .* after 5 batches"):
        rf.quantize(made(), itertools.repeat(images()[0]))


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"quantize: model must be a torch\.nn\.Module, got str"):
        rf.quantize("resnet50", images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"quantize: this module is a snapshot already"):
        rf.quantize(rf.optimize(made()), images())
    with pytest.raises(ValueError, match="quantize: the model is in training mode"):
        rf.quantize(made().train(), images())


def test_constant_and_dead_activations() -> None:
    model = made()
    with torch.no_grad():
        for part in (model.a[0][1], model.shortcut[1]):
            part.weight.zero_()
            part.bias.fill_(-1.0)  # behind the ReLU nothing is left of the first
        model.d[0].weight[3].zero_()
    fast = rf.quantize(model, images())
    x = images()[0]
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 28
    zero = rf.quantize(made(), [torch.zeros(1, 3, 24, 24)])
    assert bool(zero(x).isfinite().all())


def test_tiny_and_huge_numbers() -> None:
    for factor in (1e-20, 1e15):
        model = made()
        with torch.no_grad():
            for part in (model.a[0][1], model.first[0][1]):
                part.weight.mul_(factor)
                part.bias.mul_(factor)
        fast = rf.quantize(model, images(), check=False)
        x = images()[0]
        with torch.no_grad():
            assert sqnr(model(x), fast(x)) > 25, factor


# --- the snapshot as a module


def test_copies_and_state() -> None:
    fast = rf.quantize(made(), images())
    x = images(3)[2]
    wanted = fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), wanted) and str(other.report()) == str(fast.report())
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    another = rf.quantize(made(seed=5), images())
    assert not torch.equal(another(x), wanted)
    another.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(another(x), wanted), "scales and zero points are part of the state"
    assert fast.to("cpu") is fast and torch.equal(fast.float()(x), wanted)
    with pytest.raises(RuntimeError, match=r"frozen snapshot in torch\.float32"):
        fast.half()
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_exports() -> None:
    fast = rf.quantize(made(), images())
    x = images()[0]
    with pytest.raises(TypeError, match="a snapshot cannot be"):
        torch.jit.trace(fast, x)
    plain = rf.exportable(fast)
    program = torch.export.export(plain, (x,))
    assert not [node for node in program.graph.nodes if "onednn" in str(node.target)]
    assert sqnr(fast(x), program.module()(x)) > 30
    assert len([node for node in program.graph.nodes if "fake_quantize_per_channel" in str(node.target)]) == 5


@pytest.mark.parametrize("largest", [255, 127])
@pytest.mark.usefixtures("onednn")
def test_onnx_runtime_runs_the_export_in_int8(tmp_path: Path, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if largest == 255 and seven_bits():
        pytest.skip("this processor needs 7 bits")
    monkeypatch.setattr(onednn_int8, "saturates", lambda: largest == 127)
    fast, x = rf.quantize(made(), images()), images(3)[2]
    file, optimized = str(tmp_path / "qdq.onnx"), str(tmp_path / "optimized.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(rf.exportable(fast), (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 10  # 5 weights, 5 activations
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = optimized, 3
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert sqnr(fast(x), found) > 35
    assert "QLinearConv" in [node.op_type for node in onnx.load(optimized).graph.node]


def test_compilers_and_transforms_see_the_definition() -> None:
    fast = rf.quantize(made(), images())
    x = images()[0]
    assert sqnr(fast(x), torch.func.vmap(lambda image: fast(image[None])[0])(x)) > 30
    around = rf.optimize(nn.Sequential(fast, nn.ReLU()).eval())
    assert sqnr(fast(x).relu(), around(x)) > 30
    compiled = torch.compile(fast, backend="eager")
    assert sqnr(fast(x), compiled(x)) > 30
    torch._dynamo.reset()


# --- processors without VNNI

_ELSEWHERE = """
import pathlib, pickle, sys, warnings
import torch
torch.set_num_threads(1)
from tests.graph.test_quantize import images, made, sqnr
import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import onednn_int8
if not onednn_int8.saturates():
    print("no saturation")
    sys.exit()
model = made()
fast, x = rf.quantize(model, images()), images(3)[2]
with torch.no_grad():
    exact = model(x)
with backends.use("reference"):
    meant = fast(x)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    brought = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
    answer = brought(x)
print(fast.quantization.bits, sqnr(exact, fast(x)), sqnr(meant, fast(x)), sqnr(exact, answer))
print(len(fast.quantization.int8), [str(each.message) for each in caught])
"""


@pytest.mark.skipif(not X86, reason="other processors add in 32 bits")
def test_without_vnni(tmp_path: Path) -> None:
    """oneDNN then adds pairs of products in 16 bits, so activations get 7 bits; a snapshot with 8 is not trusted.

    The engine has no kernels for uint8 there.
    """
    if onednn_int8.saturates():
        pytest.skip("this processor has no VNNI itself: the tests of oneDNN are of that case")
    file = tmp_path / "snapshot"
    file.write_bytes(pickle.dumps(rf.quantize(made(), images())))
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "RESNET_FAST_ISA": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(file)], env=environment, capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("no saturation"):
        pytest.skip("this oneDNN does not let its instruction set be limited")
    first, second = done.stdout.splitlines()[-2:]
    bits, own, defined, brought = map(float, first.split())
    assert bits == 7 and own > 22 and defined > 35 and brought > 28
    assert second.startswith("5 ") and "sums of two products saturate" in second
