"""head against adaptive_avg_pool2d + linear: values, gradients, special values, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]

OP = torch.ops.resnet_fast.head.default


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 29)])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values(dtype: torch.dtype, size: tuple[int, int], n: int, with_bias: bool) -> None:
    x, weight = torch.randn(n, 65, *size).to(dtype), (torch.randn(10, 65) / 8).to(dtype)
    bias = torch.randn(10).to(dtype) if with_bias else None
    exact = plain(x.double(), weight.double(), None if bias is None else bias.double())
    for form in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., : size[1]]):
        ours = rf.ops.head(form, weight, bias)
        assert_obeys_error_rule(ours, plain(x, weight, bias), exact)
        assert ours.is_contiguous()


def test_opcheck_and_gradcheck() -> None:
    for n in (0, 2):
        x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((n, 6, 3, 4), (5, 6), (5,)))
        torch.library.opcheck(OP, (x, weight, bias))
        torch.library.opcheck(OP, (x, weight, None))
    a = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 5), (4, 3), (4,))]
    assert torch.autograd.gradcheck(rf.ops.head, a)
    assert torch.autograd.gradcheck(rf.ops.head, a[:2])


def test_nan_and_infinities_pass_as_in_torch() -> None:
    x, weight, bias = torch.randn(3, 6, 3, 4), torch.randn(5, 6), torch.randn(5)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("nan"), float("inf")
    assert_obeys_error_rule(
        rf.ops.head(x, weight, bias), plain(x, weight, bias), plain(x.double(), weight.double(), bias.double())
    )


def test_autocast() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 6, 3, 4), (5, 6), (5,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = rf.ops.head(x, weight, bias)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype is weight.grad.dtype is bias.grad.dtype is torch.float32


def test_errors() -> None:
    x, weight, bias = torch.randn(2, 6, 3, 4), torch.randn(5, 6), torch.randn(5)
    with pytest.raises(ValueError, match="x must be 4-D"):
        rf.ops.head(x[0], weight, bias)
    with pytest.raises(ValueError, match="x has 6 channels, weight expects 7"):
        rf.ops.head(x, torch.randn(5, 7), bias)
    with pytest.raises(ValueError, match=r"bias has shape \[6\]"):
        rf.ops.head(x, weight, torch.randn(6))
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        rf.ops.head(x, weight.double(), bias)


@pytest.mark.gpu
def test_cuda() -> None:
    x, weight, bias = (torch.randn(s, device="cuda") for s in ((2, 64, 7, 7), (10, 64), (10,)))
    exact = plain(x.double(), weight.double(), bias.double())
    assert_obeys_error_rule(rf.ops.head(x, weight, bias), plain(x, weight, bias), exact)
