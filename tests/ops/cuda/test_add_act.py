"""add_act on the CUDA kernels, forward and backward: values, layouts, gradients of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends
from tests.cuda_device import DEVICE, DTYPES, assert_obeys_error_rule, kernels, watch

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]

OP, BACKWARD = torch.ops.resnet_fast.add_act.default, torch.ops.resnet_fast.add_act_backward.default


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches, by the op's name."""
    return watch(monkeypatch)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def compare(x: Tensor, y: Tensor, activation: str = "relu") -> None:
    act = torch.relu if activation == "relu" else (lambda t: t)
    kept = x.clone(), y.clone()
    with kernels():
        ours = rf.ops.add_act(x, y, activation)
    assert_obeys_error_rule(ours, act(x + y), act(x.double() + y.double()))
    assert ours.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    if activation == "relu":
        grad = randn(*x.shape, dtype=x.dtype)
        with kernels():
            got = BACKWARD(grad, ours)
        assert torch.equal(got, torch.ops.aten.threshold_backward(grad, ours, 0))
        assert got.stride() == torch.empty_like(ours).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 1, 1, 1), (3, 17, 7, 7), (2, 8, 13, 29), (5,), ()], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_values_and_gradient(dtype: torch.dtype, shape: tuple[int, ...], activation: str, launched: list[str]) -> None:
    compare(randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), activation)
    there = 0 not in shape
    assert launched == ["add_act"] * there + ["add_act_backward"] * (there and activation == "relu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    x, y = randn(2, 6, 5, 7, dtype=dtype), randn(2, 6, 5, 7, dtype=dtype)
    last = torch.channels_last
    forms = [
        (x, y.contiguous(memory_format=last)),
        (x.contiguous(memory_format=last), y),
        (x.contiguous(memory_format=last), y.contiguous(memory_format=last)),
        (torch.cat([x, x], 1)[:, :6], y),
        (torch.cat([x, x], 1)[:, :6], torch.cat([y, y], 1)[:, 6:]),
        (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), y),  # dense, at an odd address
        (x.transpose(2, 3).contiguous().transpose(2, 3), y),
        (x[:, :1].expand(2, 6, 5, 7), y),
        (x, y[:, :1].expand(2, 6, 5, 7)),
        (x[..., ::2], y[..., 1:5]),
    ]
    for a, b in forms:
        compare(a, b)


def test_gradient_of_any_strides() -> None:
    grad = randn(2, 6, 5, 7)
    with kernels():
        output = rf.ops.add_act(randn(2, 6, 5, 7), randn(2, 6, 5, 7))
        for g in (grad[:, :1], grad.contiguous(memory_format=torch.channels_last), grad[:1, :1, :1, :1]):
            g = g.expand_as(output)
            assert torch.equal(BACKWARD(g, output), torch.ops.aten.threshold_backward(g, output, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: torch.dtype) -> None:
    values = torch.tensor(
        [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 3.0, 6e4], device=DEVICE
    )
    x, y = values.repeat(9).to(dtype), values.repeat_interleave(9).to(dtype)
    with kernels():
        got, want = rf.ops.add_act(x, y), torch.relu(x + y)
        assert got.isnan().any() and torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))
        for grad in (torch.ones_like(x), y):
            ours, torchs = BACKWARD(grad, x), torch.ops.aten.threshold_backward(grad, x, 0)
            assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.nan_to_num(9), torchs.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_torchs(dtype: torch.dtype, launched: list[str]) -> None:
    values = [randn(3, 5, 7, 2, dtype=dtype) for _ in range(3)]
    gradients = []
    with kernels():
        for run in (rf.ops.add_act, lambda a, b: torch.relu(a + b)):
            x, y = (t.clone().requires_grad_() for t in values[:2])
            run(x, y).backward(values[2])
            gradients.append((x.grad, y.grad))
    assert launched == ["add_act", "add_act_backward"]
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_second_order() -> None:
    x, y = randn(3, 4).requires_grad_(), randn(3, 4).requires_grad_()
    with kernels():
        (first,) = torch.autograd.grad(rf.ops.add_act(x, y).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2.0 * (x + y > 0))


def test_opcheck() -> None:
    with kernels():
        torch.library.opcheck(OP, (*(randn(2, 3, 5, 4).requires_grad_() for _ in range(2)), "relu"))
        output = rf.ops.add_act(randn(2, 3, 5, 4), randn(2, 3, 5, 4))
        torch.library.opcheck(BACKWARD, (randn(2, 3, 5, 4).requires_grad_(), output))
        torch.library.opcheck(BACKWARD, (randn(1, 1, 1, 1).expand(2, 3, 5, 4), output))


def test_compiled_with_gradients(launched: list[str]) -> None:
    def block(a: Tensor, b: Tensor) -> Tensor:
        return rf.ops.add_act(rf.ops.add_act(a, b), b).square().sum()

    results = []
    values = randn(2, 3, 5, 4), randn(2, 3, 5, 4)
    with kernels():
        for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            a, b = (t.clone().requires_grad_() for t in values)
            run(a, b).backward()
            results.append((a.grad, b.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert len(launched) == 8


def test_errors_and_float64(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    with kernels():
        with pytest.raises(ValueError, match=r"x has shape \[3\], y has \[2, 3\]"):
            rf.ops.add_act(randn(3), randn(2, 3))
        with pytest.raises(TypeError, match="one floating point dtype"):
            BACKWARD(randn(3), randn(3, dtype=torch.float16))
        x = randn(3, 4).double()
        with pytest.warns(backends.FallbackWarning, match="not float64; the plain torch reference runs instead"):
            assert torch.equal(rf.ops.add_act(x, x), torch.relu(x + x))
    assert launched == []
