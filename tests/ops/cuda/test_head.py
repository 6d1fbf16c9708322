"""head on the CUDA kernel, through the op and prepared: values, layouts, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.roofline.measure import tf32
from tests.cuda_device import DEVICE, DTYPES, assert_obeys_error_rule, kernels, watch

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]

OP = torch.ops.resnet_fast.head.default


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches, by the op's name."""
    return watch(monkeypatch)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, ours: Tensor | None = None) -> None:
    """On the CPU: float32 is multiplied as such there, whatever a GPU is set to."""
    if ours is None:
        with kernels():
            ours = rf.ops.head(x, weight, bias)
    there = [None if t is None else t.cpu() for t in (x, weight, bias)]
    exact = plain(*(None if t is None else t.double() for t in there))  # type: ignore[arg-type]
    assert_obeys_error_rule(ours.cpu(), plain(*there), exact)  # type: ignore[arg-type]
    assert ours.is_contiguous() and ours.device.type == DEVICE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 3)])
@pytest.mark.parametrize(("n", "with_bias"), [(0, True), (1, True), (3, False), (9, True)])
def test_values(dtype: torch.dtype, size: tuple[int, int], n: int, with_bias: bool, launched: list[str]) -> None:
    weight, bias = (randn(10, 64) / 8).to(dtype), randn(10, dtype=dtype) if with_bias else None
    compare(randn(n, 64, *size, dtype=dtype), weight, bias)
    assert launched == ["head"] * (n > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 1), (5, 17, 3), (3, 130, 65)])
def test_channels_and_outputs(dtype: torch.dtype, n: int, c: int, k: int, launched: list[str]) -> None:
    compare(randn(n, c, 3, 2, dtype=dtype), (randn(k, c) / c**0.5).to(dtype), randn(k, dtype=dtype))
    assert launched == ["head"]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "odd address": lambda x: (
        torch.cat([x.flatten()[:1], x.permute(0, 2, 3, 1).flatten()])[1:]
        .view(x.shape[0], *x.shape[2:], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    x, weight, bias = randn(3, 24, 4, 3, dtype=dtype), randn(24, 7, dtype=dtype).t(), randn(14, dtype=dtype)[::2]
    moved = LAYOUTS[layout](x)
    assert torch.equal(moved, x)
    compare(moved, weight / 5, bias)
    compare(moved[:, ::2], randn(7, 12, dtype=dtype) / 4, randn(1, dtype=dtype).expand(7))
    assert launched == ["head"] * 2


def test_expanded_images(launched: list[str]) -> None:
    compare(randn(1, 12, 1, 3).expand(3, 12, 4, 3), randn(7, 12), None)
    assert launched == ["head"]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_weight_and_bias_in_float32_beside_narrower_images(dtype: torch.dtype) -> None:
    x, weight, bias = randn(3, 17, 3, 3, dtype=dtype), randn(9, 17), randn(9)
    with kernels():
        ours = rf.ops.head(x, weight, bias)
    compare(x, weight.to(dtype), bias.to(dtype), ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_stay_with_their_image(dtype: torch.dtype) -> None:
    x, weight, bias = randn(5, 16, 3, 4, dtype=dtype), randn(7, 16, dtype=dtype), randn(7, dtype=dtype)
    x[0, 0, 0, 0], x[1, 1, 1, 1], x[2, 1, 2, 2] = float("nan"), float("inf"), float("-inf")
    compare(x, weight, bias)
    bias[3] = float("nan")
    compare(x, weight, bias)


def test_large_values_do_not_overflow_on_the_way() -> None:
    x = torch.full((2, 8, 7, 7), 6e4, device=DEVICE, dtype=torch.float16)
    compare(x, torch.eye(8, device=DEVICE, dtype=torch.float16), None)


def test_float32_is_not_rounded_to_tf32_whatever_is_allowed() -> None:
    x, weight = randn(4, 64, 2, 2), randn(8, 64)
    exact = plain(x.double(), weight.double(), None)
    for allowed in (False, True):
        with kernels(), tf32(allowed):
            ours = rf.ops.head(x, weight)
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_references(dtype: torch.dtype, with_bias: bool) -> None:
    values = randn(3, 24, 3, 2, dtype=dtype), randn(5, 24, dtype=dtype), randn(5, dtype=dtype)
    gradients = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in values[: 2 + with_bias]]
        with kernels(), backends.use(backend):
            rf.ops.head(*leaves).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))  # none depends on the output


def test_opcheck_and_compile() -> None:
    x, weight, bias = randn(2, 6, 3, 4), randn(5, 6), randn(5)
    with kernels():
        torch.library.opcheck(OP, (x.clone().requires_grad_(), weight.clone().requires_grad_(), bias))
        compiled = torch.compile(rf.ops.head, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight, bias), rf.ops.head(x, weight, bias))


def test_prepared(launched: list[str]) -> None:
    x, weight, bias = randn(3, 24, 4, 5), randn(7, 24) / 5, randn(7)
    with kernels():
        for dtype in DTYPES:
            for offset in (bias, None):
                head = ops.ALL["head"].bind(weight, offset, dtype=dtype)
                assert head.backend == "cuda" and head.backend_for(x.to("meta", dtype)) == "cuda"
                launched.clear()
                ours = head(x.to(dtype))
                assert launched == ["head"] and head(x[:0].to(dtype)).shape == (0, 7)
                compare(x.to(dtype), weight.to(dtype), None if offset is None else offset.to(dtype), ours)


def test_an_image_gives_the_same_bits_in_any_place() -> None:
    x, weight, bias = randn(1, 33, 5, 5), randn(20, 33), randn(20)
    with kernels():
        many = rf.ops.head(x.expand(5, 33, 5, 5), weight, bias)
    assert all(torch.equal(row, many[0]) for row in many)


def test_no_outputs_and_float64(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    with kernels():
        assert rf.ops.head(randn(3, 4, 2, 2), randn(0, 4)).shape == (3, 0)
        with pytest.warns(backends.FallbackWarning, match="not float64; the plain torch reference runs instead"):
            y = rf.ops.head(randn(3, 4, 2, 2).double(), randn(2, 4).double())
    assert y.shape == (3, 2) and launched == []
