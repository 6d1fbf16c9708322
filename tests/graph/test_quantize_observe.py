"""Ranges of activations against a search over both ends, scales of weights, and how far two results are apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from resnet_fast.backends.onednn_int8 import Affine
from resnet_fast.graph import quantize_layers
from resnet_fast.graph.quantize_observe import Observer
from resnet_fast.graph.quantize_report import LayerQuality, Noise, Quantization, Top1


def error(x: Tensor, way: Affine, largest: int = 255) -> float:
    return float((quantize_layers.fake(x, way, largest) - x).double().square().sum())


@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "shifted", "negative", "heavy"])
def test_the_range_has_the_least_squared_error(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 32, 32)
    x = {
        "normal": x,
        "relu": x.relu(),
        "outlier": torch.cat([torch.randn(200_000), torch.tensor([7.0])]),
        "shifted": x + 3,
        "negative": -x.abs() - 1,
        "heavy": x**5,
    }[kind]
    observer = Observer()
    for part in x.flatten().chunk(3):
        observer(part)
    found = error(x, observer.affine(255))
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    ends = [
        quantize_layers.affine_of(low * a, high * b, 255)
        for a in torch.linspace(0.04, 1, 25).tolist()
        for b in torch.linspace(0.04, 1, 25).tolist()
    ]
    assert found <= 1.1 * min(error(x, way) for way in ends)
    assert found <= 1.01 * error(x, quantize_layers.affine_of(low, high, 255))


def test_each_channel_has_its_own_scale() -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1e-30, 1e-3, 1.0, 1e3, 0.0]).double()
    weight = torch.randn(5, 4, 3, 3).double() * sizes.view(-1, 1, 1, 1)
    scale = quantize_layers.per_channel(weight)
    wanted = (weight.abs().amax((1, 2, 3)) / 127).float()
    assert torch.equal(scale[1:4], wanted[1:4]) and bool((scale > 0).all())


def test_ratios_and_agreement() -> None:
    noise, top1 = Noise(extremes=True), Top1()
    exact = torch.tensor([[3.0, 1.0, 0.0], [0.0, 5.0, 1.0]])
    found = torch.tensor([[2.9, 1.0, 0.0], [5.1, 5.0, 1.0]])
    for one, other in zip(exact, found, strict=True):
        noise.add(one, other)
    assert noise.sqnr == pytest.approx(10 * math.log10(36 / (0.01 + 26.01)), abs=1e-5)
    assert noise.largest == 5 and noise.largest_error == pytest.approx(5.1)
    top1.add(exact, found)
    top1.add(exact[:, :, None], found[:, :, None])  # no scores
    assert top1.agreement == 0.5 and Top1().agreement is None and Noise().sqnr is None
    same = Noise()
    same.add(exact, exact)
    table = str(Quantization((LayerQuality("a", "stem", "float32", "", None, same.sqnr),)))
    assert same.sqnr == math.inf and "equal" in table


def test_a_histogram_widens_without_loss() -> None:
    torch.manual_seed(0)
    observer, whole = Observer(), Observer()
    parts = [torch.randn(1000), 30 * torch.randn(1000), 0.5 * torch.randn(1000), 1000 * torch.randn(1000)]
    for part in parts:
        observer(part)
    whole(torch.cat(parts))
    assert observer.limit == whole.limit and observer.counts.sum() == whole.counts.sum() == 4000
    assert (observer.counts.cumsum(0) - whole.counts.cumsum(0)).abs().max() <= 4  # values on the border of two bins
    one, two = Observer(), Observer()
    one(parts[0])
    two(torch.cat(parts[1:]))
    for merged in (one.merged(two), two.merged(one)):
        assert merged.limit == whole.limit and (merged.counts.cumsum(0) - whole.counts.cumsum(0)).abs().max() <= 4
        assert (merged.low, merged.high) == (whole.low, whole.high)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-30, 1e30])
def test_a_constant_has_a_range(value: float) -> None:
    observer = Observer()
    observer(torch.full((10,), value))
    way = observer.affine(255)
    assert way.scale > 0 and 0 <= way.zero_point <= 255
    x = torch.full((10,), value)
    assert error(x, way) <= max(1e-30, 1e-4 * float(x.double().square().sum()))
