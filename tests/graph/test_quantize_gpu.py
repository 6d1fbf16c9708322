"""``quantize`` for a GPU: the layers that Triton's kernels compute, in the interpreter if there is no GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.graph import OptimizedModule, cuda_graphs, quantize_layers
from resnet_fast.graph.guard import looking_later
from resnet_fast.graph.quantize_layers import Convolution, Quantize
from resnet_fast.ops.conv_int8 import OP, reference
from tests.networks import Lambda, conv_bn, randomise
from tests.triton_device import DEVICE, FORMS, kernels, launch_anew

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})


def network(groups: int = 1) -> nn.Module:
    """A first layer, a block with a projection, a block without, one whose end a linear layer reads."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        x = (m.b1(m.a1(x).relu()) + m.p1(x)).relu()
        x = (m.b2(m.a2(x).relu()) + x).relu()
        result: Tensor = m.fc(m.last(x).relu().mean((2, 3)))
        return result

    torch.manual_seed(3)
    made = Lambda(
        forward,
        first=conv_bn(3, 32),
        a1=conv_bn(32, 32, kernel_size=1, padding=0),
        b1=conv_bn(32, 64, stride=2),
        p1=conv_bn(32, 64, kernel_size=1, padding=0, stride=2),
        a2=conv_bn(64, 64, groups=groups),
        b2=conv_bn(64, 64, kernel_size=1, padding=0),
        last=conv_bn(64, 32),
        fc=nn.Linear(32, 5),
    )
    return randomise(made)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5)).to(DEVICE)


def convolutions(fast: nn.Module) -> list[Convolution]:
    return [module for module in fast.modules() if isinstance(module, Convolution)]


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, OptimizedModule]:
    with kernels(FORMS[0]):
        model = network().to(DEVICE)
        return model, rf.quantize(model, [images()], float_dtype=torch.float32)


@pytest.fixture
def quantized(made: tuple[nn.Module, OptimizedModule]) -> Iterator[tuple[nn.Module, OptimizedModule]]:
    """A model and its snapshot, on the kernels."""
    with kernels(FORMS[0]):
        yield made


def test_convolutions_compute_in_int8(quantized: tuple[nn.Module, OptimizedModule]) -> None:
    model, fast = quantized
    found = convolutions(fast)
    assert len(found) == 6 and {module.backend for module in found} == {"triton int8"} and not backends.fallbacks()
    assert fast.quantization is not None and fast.quantization.bits == 8
    assert {row.backend for row in fast.report().rows if row.name.startswith(("a1", "b1", "p1", "a2", "b2"))} == {
        "triton int8"
    }
    y, exact = fast(images()), model(images())
    assert 0 < (y - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_gives_the_bits_of_its_reference(
    quantized: tuple[nn.Module, OptimizedModule], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_anew(monkeypatch)
    found: list[Any] = []
    by_kernel = OP.by_kernel

    def watching(among: Any, a: Any, bound: Any = None) -> Any:
        y = by_kernel(among, a, bound)
        found.append((a, y))
        return y

    monkeypatch.setattr(OP, "by_kernel", watching)
    with kernels(form):
        quantized[1](images())
    assert len(found) == 6
    for a, y in found:
        assert torch.equal(y, reference(a))
    assert {a.residual is not None for a, _ in found} == {True, False} and any(a.zero_point == 0 for a, _ in found)


def test_one_snapshot_gives_the_same_answers_on_both() -> None:
    """Quantized on the CPU, its kernels' and the definition's results are those of the CPU, up to one step a layer."""
    fast = rf.quantize(network(), [images().cpu()], check=False)
    here = fast(images().cpu())
    with kernels(FORMS[0]):
        there = pickle.loads(pickle.dumps(fast)).to(DEVICE)
        found = there(images()).cpu()
        assert {module.backend for module in convolutions(there)} == {"triton int8"} and not backends.fallbacks()
    assert (found - here).norm() < 0.01 * here.norm()
    with backends.use("reference"):
        assert (fast(images().cpu()) - found).norm() < 0.01 * here.norm()


def test_half_precision_stands_beside_it() -> None:
    with kernels(FORMS[0]):
        model = network().to(DEVICE)
        fast = rf.quantize(model, [images()], float_dtype=torch.float16, check=False)
        assert len(convolutions(fast)) == 6 and fast.dtype is torch.float16
        y, exact = fast(images()), model(images())
        assert y.dtype is torch.float32 and (y - exact).norm() < 0.05 * exact.norm()
    with pytest.warns(backends.FallbackWarning, match="was quantized for a GPU, and is on the CPU"):
        assert (fast.cpu()(images().cpu()) - y.cpu()).norm() < 0.01 * y.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_runs_by_the_definition(quantized: tuple[nn.Module, OptimizedModule], value: float) -> None:
    model, fast = quantized
    x = images(3)
    x[1, 0, 2, 2] = value
    with pytest.warns(backends.FallbackWarning, match="runs again, exactly"):
        y = fast(x)
    exact = model(x)
    assert torch.equal(y.isnan(), exact.isnan()) and y[1].isnan().all()
    assert (y[0] - exact[0]).norm() < 0.05 * exact[0].norm()


def test_groups_stay_in_float() -> None:
    with kernels(FORMS[0]):
        fast = rf.quantize(network(groups=2).to(DEVICE), [images()], float_dtype=torch.float32, check=False)
    assert fast.quantization is not None
    reasons = {layer.name: layer.reason for layer in fast.quantization.kept_float}
    assert reasons["a2.0"] == "the Triton kernel of int8 convolutions has no groups" and len(convolutions(fast)) == 5


def test_no_kernel_leaves_the_network_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_layers, "without_kernel", lambda *given: "there is no triton")
    with kernels(FORMS[0]), pytest.warns(UserWarning, match="nothing is quantized: .*there is no triton"):
        fast = rf.quantize(network().to(DEVICE), [images()], float_dtype=torch.float32, check=False)
    assert not convolutions(fast)


def test_a_snapshot_without_its_kernel_says_so(
    quantized: tuple[nn.Module, OptimizedModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast = quantized
    wanted = fast(images())
    monkeypatch.setattr(quantize_layers, "without_kernel", lambda *given: "there is no triton")
    with pytest.warns(backends.FallbackWarning, match="int8 is computed in float32, slowly: there is no triton"):
        assert (fast(images()) - wanted).norm() < 0.01 * wanted.norm()


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernel = OP.by_kernel
    monkeypatch.setattr(OP, "by_kernel", lambda *given: by_kernel(*given) + 3)
    with kernels(FORMS[0]), pytest.warns(UserWarning, match="nothing is quantized: .*Triton's int8 convolution gives"):
        rf.quantize(network().to(DEVICE), [images()], float_dtype=torch.float32, check=False)


def test_float_dtype_is_checked() -> None:
    with pytest.raises(ValueError, match=r"float_dtype is torch.float16; it must be None or one of torch.float32"):
        rf.quantize(network(), [images().cpu()], float_dtype=torch.float16)


def test_a_look_at_numbers_can_wait(quantized: tuple[nn.Module, OptimizedModule]) -> None:
    quantize = next(module for module in quantized[1].modules() if isinstance(module, Quantize))
    with looking_later() as outer:
        with looking_later() as kept:
            quantize(torch.full((1, 32, 2, 2), float("nan"), device=DEVICE))
            quantize(torch.zeros(1, 32, 2, 2, device=DEVICE))
        assert [bool(finite) for finite in kept] == [False, True] and not outer


def test_runs_are_recorded_without_a_look(quantized: tuple[nn.Module, OptimizedModule]) -> None:
    """As CUDA graphs, in which nothing can be read: what was NaN is seen behind the replay."""
    model, fast = quantized
    assert cuda_graphs.why_not_recordable(fast.graph_module) == ""
    recorded = copy.copy(fast)
    recorded._recorder = cuda_graphs.Recorder(recorded._unread, record=_recorded_by_running)
    x = images()
    for _ in range(3):
        assert torch.equal(recorded._recorded(x), fast(x))
    x[0, 0, 0, 0] = float("nan")
    with pytest.warns(backends.FallbackWarning, match="runs again, exactly"):
        y = recorded._recorded(x)
    assert torch.equal(y.isnan(), model(x).isnan())


def _recorded_by_running(function: Any) -> tuple[Any, Any]:
    """In the place of a CUDA graph: the function runs again, into the same results."""
    result = function()

    def replay() -> None:
        for kept, new in zip(
            torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(function()), strict=True
        ):
            kept.copy_(new)

    return result, replay
