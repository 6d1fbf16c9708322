"""Whole networks on the CUDA kernels: every kind of block, live and optimized, against torchvision."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import resnet_fast as rf
from resnet_fast import backends, models
from resnet_fast.graph import cuda_graphs
from tests.cuda_device import DEVICE, kernels, watch
from tests.models.test_on_triton import NETS, Tap, nets, seeded
from tests.numerics import assert_obeys_error_rule

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches: convolutions by their kernels' names, the rest by the op's."""
    return watch(monkeypatch)


def counted(launched: list[str]) -> Counter[str]:
    return Counter("conv_bn_act" if name.startswith("sm") else name for name in launched)


def compare(ours: nn.Module, net: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Of float32 tf32 products are expected, each of whose factors is rounded to 2^-11: bfloat16's rule, eight times
    wider, contains that."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", backends.FallbackWarning)
        got = ours(x.to(dtype).to(DEVICE)).to(dtype).cpu()
        exact = copy.deepcopy(net).double()(x.to(dtype).double())
        rule = torch.bfloat16 if dtype is torch.float32 else dtype
        same = copy.deepcopy(net).to(rule)(x.to(rule))
    assert_obeys_error_rule(got.to(rule), same, exact)
    if dtype is torch.float32:
        assert (got.double() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in NETS] + [("bottlenecks", torch.bfloat16), ("basic blocks", torch.float32)],
)
def test_optimized_networks_equal_torchvision(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    net, x = nets(name)
    with kernels():
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=dtype)
        assert {row.backend for row in fused.report().fused} == {"cuda"}
        assert cuda_graphs.why_not_recordable(fused.graph_module) == ""
        compare(fused, net, x[:1], dtype)
    counts = counted(launched)
    assert counts["stem"] == counts["head"] == 1 and counts["conv_bn_act"] >= 7


def test_asked_of_optimize_alone(launched: list[str]) -> None:
    """The choice for one network outlives the process's; nothing is planned that CUDA has no kernel of."""
    net, x = nets("bottlenecks")
    with kernels(), backends.use("auto"):
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=torch.float16, backend="cuda", gpu="h100")
        assert "no bottleneck_tail is planned, there is no CUDA kernel of it" in fused.report().notes
        compare(fused, net, x[:1], torch.float16)
    assert counted(launched)["conv_bn_act"] >= 7


@pytest.mark.parametrize("block", ["Bottleneck", "BasicBlock"])
def test_live_networks_equal_torchvision(block: str, launched: list[str]) -> None:
    net, live = (seeded(library, block) for library in (torchvision.models.resnet, models.resnet))
    with kernels():
        compare(live.half().to(DEVICE), net, torch.randn(1, 3, 32, 32), torch.float16)
    counts = counted(launched)
    assert counts["stem"] == counts["head"] == 1 and counts["conv_bn_act"] >= 7


def test_a_live_network_sees_other_weights_at_once() -> None:
    live = seeded(models.resnet, "BasicBlock", 1).half().to(DEVICE)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float16, device=DEVICE)
    with kernels(), torch.no_grad():
        before = live(x)
        live.fc.weight.mul_(2)
        live.fc.bias.mul_(2)
        assert torch.allclose(live(x), 2 * before, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_an_addition_that_no_convolution_can_carry(asked: str, launched: list[str]) -> None:
    net = Tap().eval()
    with kernels():
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, backend=asked, dtype=torch.float16)
        assert {row.backend for row in fused.report().fused} == {"cuda"}
        assert "add_act" in {getattr(module, "op", "") for module in fused.graph_module.children()}
        assert cuda_graphs.why_not_recordable(fused.graph_module) == ""
        compare(fused, net, torch.randn(2, 3, 9, 12), torch.float16)
    assert counted(launched) == {"conv_bn_act": 1, "add_act": 1}


def test_gradients_through_a_live_network(launched: list[str]) -> None:
    """Frozen statistics, gradients to the image and to every parameter."""
    live = seeded(models.resnet, "BasicBlock", 1).to(DEVICE)
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    found: list[dict[str, torch.Tensor]] = []
    for backend in ("cuda", "reference"):
        image = x.clone().requires_grad_()
        with kernels(), backends.use(backend):
            live.zero_grad()
            live(image).square().sum().backward()
        assert image.grad is not None
        found.append(
            {"image": image.grad} | {n: p.grad.clone() for n, p in live.named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, ours in found[0].items():
        relative = float((ours - found[1][name]).norm() / found[1][name].norm())
        assert relative < 2e-2, (name, relative)  # products of tf32 beside float32, through every layer
    assert counted(launched)["conv_bn_act"] >= 5


def test_lazily_negated_images() -> None:
    net, _ = nets("basic blocks")
    lazy = torch.conj(torch.randn(1, 3, 32, 32, dtype=torch.complex64)).imag
    assert lazy.is_neg()
    with kernels():
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=torch.float16)
        with torch.no_grad():
            ours = fused(lazy.to(DEVICE).half()), fused(lazy.resolve_neg().to(DEVICE).half())
    assert torch.equal(*ours)


def test_an_optimized_network_compiles() -> None:
    net, x = nets("basic blocks")
    with kernels():
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=torch.float16, cuda_graphs=False)
        compiled: Any = torch.compile(fused.graph_module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            compare(compiled, net, x[:1], torch.float16)


def test_a_bottleneck_is_computed_by_its_convolutions(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Asked of CUDA alone the op composes, and says so."""
    monkeypatch.setattr(backends, "_fallbacks", {})
    one, zero = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    a, x = (torch.randn(1, c, 5, 5, dtype=torch.float16, device=DEVICE) for c in (8, 32))
    weight2 = torch.randn(8, 8, 3, 3, dtype=torch.float16, device=DEVICE) / 8
    weight3 = torch.randn(32, 8, 1, 1, dtype=torch.float16, device=DEVICE) / 3
    arguments = (a, weight2, one[:8], zero[:8], weight3, one, zero, x)
    with kernels():
        with pytest.warns(backends.FallbackWarning, match="bottleneck_tail: there is no CUDA kernel of it"):
            ours = rf.ops.bottleneck_tail(*arguments)
        with backends.use("reference"):
            want = rf.ops.bottleneck_tail(*arguments)
    assert len(launched) == 2 and torch.allclose(ours.float(), want.float(), rtol=5e-3, atol=5e-3)  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU that resnet_fast._C runs on")
def test_recorded_and_on_another_stream(launched: list[str]) -> None:
    """Launches go to the current stream, synchronize nothing and can be captured, workspaces and all."""
    net, x = nets("bottlenecks")
    x = x.half().to(DEVICE)
    with kernels(), torch.no_grad():
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=torch.float16, cuda_graphs=True)
        first = fused(x)
        recorded = [fused(x), fused(x)]
        count = len(launched)
        assert torch.equal(fused(x), first) and len(launched) == count  # replayed
        assert all(torch.equal(each, first) for each in recorded)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = fused.graph_module(x)
        stream.synchronize()
    assert torch.equal(other.to(first.dtype), first)
