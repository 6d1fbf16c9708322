"""conv_bn_act on the CUDA kernels alone: which of them runs, and what they do not compute.

The kernels' own cases are in tests/emulator/, what they have in common with Triton's in tests/ops/kernels/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends import cuda, triton
from resnet_fast.roofline.measure import tf32
from tests.cuda_device import doubled
from tests.kernel_kinds import DTYPES, KINDS, LAYOUTS, Kind
from tests.ops.kernels.test_conv_bn_act import check, judge, narrow
from tests.ops.test_conv_bn_act import plain, problem

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture
def kind() -> Iterator[Kind]:
    """The CUDA kernels, which the op runs throughout the test."""
    with KINDS["cuda"].kernels():
        yield KINDS["cuda"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "size", "kernel"), [(64, (7, 7), 1), (16, (5, 9), 3), (3, (9, 7), 7), (17, (4, 5), 3)])
def test_values(
    kind: Kind, dtype: torch.dtype, c: int, size: tuple[int, int], kernel: int, launched: list[str]
) -> None:
    check(kind, problem(2, c, *size, 24, kernel), dtype, launched, padding=kernel // 2)
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}[dtype]
    assert precision in launched[0] and ("masked" in launched[0]) == (c % 8 > 0)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"stride": 2, "padding": 1}, 3),
        ({"stride": 2}, 1),
        ({"stride": (2, 1), "padding": (1, 0)}, 3),
        ({"stride": (1, 3), "padding": (0, 2)}, 3),
        ({"dilation": (1, 2), "padding": (0, 2)}, 3),
        ({"dilation": (2, 1), "padding": (2, 1), "stride": 2}, 3),
        ({"padding": 2}, 1),
        ({"groups": 2, "padding": 1}, 3),
        ({"groups": 16, "padding": 1}, 3),
        ({"groups": 4}, 1),
    ],
    ids=str,
)
def test_geometry(kind: Kind, options: dict[str, Any], kernel: int, launched: list[str]) -> None:
    given = problem(1, 16, 7, 6, 32, kernel, groups=options.get("groups", 1))
    check(kind, given, torch.float16, launched, **options)


@pytest.mark.parametrize("odd", ["x", "weight", "residual"])
def test_one_address_that_allows_no_vectors(kind: Kind, odd: str, launched: list[str]) -> None:
    given = narrow(kind, problem(1, 16, 4, 5, 16, 3, residual=(4, 5)), torch.float16)
    there = kind.put(given)
    there[odd] = LAYOUTS["odd address"](there[odd])
    ours = rf.ops.conv_bn_act(**there, padding=1)
    assert "masked" in launched[0]
    judge(ours, given, padding=1)


def test_bound_for_cuda_alone_whatever_the_process_runs(kind: Kind, launched: list[str]) -> None:
    x, weight, scale, shift, _ = kind.put(narrow(kind, problem(1, 8, 3, 4, 8, 1), torch.float16)).values()
    conv = ops.ALL["conv_bn_act"].bind(weight, scale, shift, dtype=torch.float16, backend="cuda")
    with backends.use("reference"):
        conv(x)
        assert len(launched) == 1
        rf.ops.conv_bn_act(x, weight, scale, shift)
    assert len(launched) == 1


def test_float32_is_not_rounded_to_tf32_unasked(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    given = kind.put({n: t if t is None else t.float() for n, t in problem(2, 16, 5, 5, 16, 3).items()})
    said = "no CUDA convolution for this GPU computes float32 without tf32"
    with tf32(False):
        with pytest.warns(backends.FallbackWarning, match=said):
            y = rf.ops.conv_bn_act(**given, padding=1)
        conv = ops.ALL["conv_bn_act"].bind(given["weight"], given["scale"], given["shift"], padding=(1, 1))
        assert conv.backend_for(given["x"].to("meta")) == "reference"
    exact = plain(**doubled(given), padding=1)
    assert launched == [] and float((y.double() - exact).norm() / exact.norm()) < 1e-6


def test_a_launch_that_fails_is_an_error_with_the_shape(kind: Kind) -> None:
    op = ops.ALL["conv_bn_act"]
    assert op.problem is not None
    given = op.arguments(**kind.put(narrow(kind, problem(1, 8, 4, 4, 8, 3), torch.float16)))
    described, out = op.problem(given), op.empty(given)
    tensors = [t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last) for t in given[:5]]
    with pytest.raises((ValueError, RuntimeError), match="no_such_kernel"):
        cuda.conv_bn_act("no_such_kernel", *tensors, out, described)
    other, _ = cuda.supporting(described, triton.gpu_of(out.device))
    wrong = next(each.name for each in cuda.native().kernels if each.precision == "bf16")  # type: ignore[union-attr]
    assert wrong not in {each.name for each in other}
    with pytest.raises((ValueError, RuntimeError), match="bf16"):
        cuda.conv_bn_act(wrong, *tensors, out, described)
