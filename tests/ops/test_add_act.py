"""add_act against torch's add and relu: values, gradients, layouts, special values, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP = torch.ops.resnet_fast.add_act.default
SHAPES = [(0, 3, 5, 5), (1, 1, 1, 1), (3, 17, 7, 7), (2, 64, 13, 29), (2, 3, 97, 131), (5,), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_values(dtype: torch.dtype, shape: tuple[int, ...], activation: str) -> None:
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    act = torch.relu if activation == "relu" else (lambda t: t)
    ours = rf.ops.add_act(x, y, activation)
    assert_obeys_error_rule(ours, act(x + y), act(x.double() + y.double()))
    assert ours.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 6, 5, 7).to(dtype), torch.randn(2, 6, 5, 7).to(dtype)
    want = torch.relu(x + y)
    last = torch.channels_last
    forms: list[tuple[Tensor, Tensor]] = [
        (x, y.contiguous(memory_format=last)),
        (x.contiguous(memory_format=last), y),
        (torch.cat([x, x], 1)[:, :6], y),
        (x.transpose(2, 3).contiguous().transpose(2, 3), y),
    ]
    for a, b in forms:
        got = rf.ops.add_act(a, b)
        assert torch.equal(got, want) and got.stride() == torch.empty_like(a).stride()
    wide = x[:, :1].expand(2, 6, 5, 7)
    assert torch.equal(rf.ops.add_act(wide, y), torch.relu(wide + y))
    assert torch.equal(rf.ops.add_act(y, wide), torch.relu(wide + y))


def test_special_values_and_inputs_untouched() -> None:
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-40, -1e-40, 3.0])
    x, y = values.repeat(7), values.repeat_interleave(7)
    keep = x.clone(), y.clone()
    got, want = rf.ops.add_act(x, y), torch.relu(x + y)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(9), want.nan_to_num(9))
    assert torch.equal(x.view(torch.int32), keep[0].view(torch.int32))
    assert torch.equal(y.view(torch.int32), keep[1].view(torch.int32))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_opcheck_and_gradcheck(activation: str) -> None:
    for shape in SHAPES[:4]:
        x, y = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        torch.library.opcheck(OP, (x, y, activation))
    x, y = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(OP, (x.detach()[:, :1].expand(2, 3, 4, 5), y, activation))
    assert torch.autograd.gradcheck(lambda a, b: rf.ops.add_act(a, b, activation), (x, y))
    assert torch.autograd.gradcheck(lambda a: rf.ops.add_act(a, a, activation), (x,))


def test_gradient_at_zero_and_nan_is_torchs() -> None:
    values = torch.tensor([0.0, -1.0, 2.0, float("nan")])
    grads = []
    for run in (rf.ops.add_act, lambda a, b: torch.relu(a + b)):
        x = values.clone().requires_grad_()
        run(x, torch.zeros(4)).backward(torch.ones(4))
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_autocast_takes_the_wider_type() -> None:
    x, y = torch.randn(4), torch.randn(4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert rf.ops.add_act(x, y).dtype is (x + y).dtype is torch.float32
        assert rf.ops.add_act(y, y).dtype is torch.bfloat16


def test_errors() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], y has \[3\]"):
        rf.ops.add_act(x, torch.randn(3))
    with pytest.raises(TypeError, match="one floating point dtype"):
        rf.ops.add_act(x, x.double())
    with pytest.raises(TypeError, match="one floating point dtype"):
        rf.ops.add_act(x.int(), x.int())
    with pytest.raises(ValueError, match="activation"):
        rf.ops.add_act(x, x, "gelu")


@pytest.mark.gpu
def test_cuda() -> None:
    x, y = torch.randn(2, 64, 13, 29, device="cuda"), torch.randn(2, 64, 13, 29, device="cuda")
    assert torch.equal(rf.ops.add_act(x, y), torch.relu(x + y))
