"""stem against conv2d + batch_norm + relu + max_pool2d: values, both poolings, images as bytes, gradients, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]

OP = torch.ops.resnet_fast.stem.default
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def problem(n: int, c: int, h: int, w: int, k: int = 24) -> dict[str, Tensor]:
    return {
        "x": torch.randn(n, c, h, w, dtype=torch.float64),
        "weight": torch.randn(k, c, 7, 7, dtype=torch.float64) / (c * 49) ** 0.5,
        "scale": torch.rand(k, dtype=torch.float64) + 0.5,
        "shift": torch.randn(k, dtype=torch.float64),
    }


def plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, ceil_mode: bool = False) -> Tensor:
    y = nn.functional.conv2d(x, weight, None, 2, 3)
    y = nn.functional.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 1e-30)
    return nn.functional.max_pool2d(y.relu(), 3, 2, 0 if ceil_mode else 1, ceil_mode=ceil_mode)


def check(a: dict[str, Tensor], dtype: torch.dtype, ceil_mode: bool = False) -> Tensor:
    narrow = {n: t.to(dtype) if n in ("x", "weight") else t.float() for n, t in a.items()}
    ours = rf.ops.stem(**narrow, ceil_mode=ceil_mode)
    exact = plain(**{n: t.double() for n, t in narrow.items()}, ceil_mode=ceil_mode)
    assert_obeys_error_rule(ours, plain(**narrow, ceil_mode=ceil_mode), exact, f"stem {dtype}")
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(5, 5), (7, 8), (13, 29), (97, 131), (64, 64)])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_sizes(dtype: torch.dtype, size: tuple[int, int], ceil_mode: bool) -> None:
    check(problem(2, 3, *size), dtype, ceil_mode)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("c", [1, 3, 17])
def test_batches_and_channels(n: int, c: int) -> None:
    check(problem(n, c, 33, 40), torch.float32)


def test_smallest_image() -> None:
    check(problem(1, 3, 1, 1), torch.float32)


@pytest.mark.parametrize(("dtype", "c"), [(torch.float32, 3), (torch.bfloat16, 4)])
def test_nan_and_infinities_pass_as_in_torch(dtype: torch.dtype, c: int) -> None:
    """bfloat16 with an even channel count: torch itself lets NaN spread to neighbours for an odd one."""
    a = problem(1, c, 33, 40)
    a["x"][0, 0, 0, 0] = float("nan")
    a["x"][0, 1, 20, 20] = float("inf")
    a["x"][0, 2, 10, 30] = float("-inf")
    assert check(a, dtype).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_are_normalised_before_the_zero_padding(dtype: torch.dtype) -> None:
    a = problem(2, 3, 0, 0)
    image = torch.randint(0, 256, (2, 31, 45, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    x = ((image.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    vectors = {n: a[n] if dtype is torch.float64 else a[n].float() for n in ("scale", "shift")}
    weight = a["weight"].to(dtype)
    ours = rf.ops.stem(image, weight, **vectors, mean=MEAN, std=STD)
    exact = plain(x, weight.double(), **{n: v.double() for n, v in vectors.items()})
    assert_obeys_error_rule(ours, plain(x.to(dtype), weight, **vectors), exact)


def test_opcheck_in_full() -> None:
    a = {n: t.float().requires_grad_() for n, t in problem(2, 3, 21, 18, 5).items()}
    torch.library.opcheck(OP, (*a.values(), None, None, False))
    torch.library.opcheck(OP, (*a.values(), None, None, True))
    image = torch.randint(0, 256, (2, 21, 18, 3), dtype=torch.uint8)
    torch.library.opcheck(OP, (image, *list(a.values())[1:], MEAN, STD, False))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_gradcheck(ceil_mode: bool) -> None:
    a = [t.requires_grad_() for t in problem(1, 2, 15, 12, 3).values()]
    assert torch.autograd.gradcheck(lambda *t: rf.ops.stem(*t, ceil_mode=ceil_mode), a)


def test_gradients_from_bytes_and_against_the_layers() -> None:
    a = problem(1, 3, 21, 30, 5)
    leaves = {n: t.clone().requires_grad_() for n, t in a.items()}
    other = {n: t.clone().requires_grad_() for n, t in a.items()}
    rf.ops.stem(**leaves).square().sum().backward()
    plain(**other).square().sum().backward()
    for name in a:
        assert torch.allclose(leaves[name].grad, other[name].grad), name
    image = torch.randint(0, 256, (1, 21, 30, 3), dtype=torch.uint8)
    weights = {n: t.detach().clone().requires_grad_() for n, t in a.items() if n != "x"}
    rf.ops.stem(image, **weights, mean=MEAN, std=STD).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in weights.values())


def test_autocast() -> None:
    a = {n: t.float() for n, t in problem(1, 3, 33, 40).items()}
    image = torch.randint(0, 256, (1, 33, 40, 3), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert rf.ops.stem(**a).dtype is torch.bfloat16
        assert rf.ops.stem(image, *list(a.values())[1:], mean=MEAN, std=STD).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(3, 9, 9)}, ValueError, "x must be 4-D"),
        ({"x": torch.randn(1, 1, 9, 9)}, ValueError, "x has 1 channels, weight expects 3"),
        ({"weight": torch.randn(5, 3, 3, 3)}, ValueError, r"weight must be \[K, C, 7, 7\]"),
        ({"x": torch.zeros(1, 9, 9, 3, dtype=torch.uint8)}, ValueError, "uint8 images need mean and std of 3"),
        ({"x": torch.zeros(1, 3, 9, 9, dtype=torch.uint8), "mean": MEAN, "std": STD}, ValueError, r"\[N, H, W, 3\]"),
        ({"mean": MEAN, "std": STD}, ValueError, "mean and std go with uint8"),
        ({"x": torch.randn(1, 3, 2, 9), "ceil_mode": True}, ValueError, "too small"),
        ({"scale": torch.rand(3)}, ValueError, "scale has shape"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    a: dict[str, Any] = {n: t.float() for n, t in problem(1, 3, 9, 9, 5).items()}
    with pytest.raises(error, match=message):
        rf.ops.stem(**{**a, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda(dtype: torch.dtype) -> None:
    check({n: t.cuda() for n, t in problem(2, 3, 97, 131).items()}, dtype)
