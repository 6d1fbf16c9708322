"""head on each kind of kernel, through the op and bound: values, layouts, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends import triton
from resnet_fast.kernels import gpus
from resnet_fast.roofline.measure import tf32
from tests.kernel_kinds import DTYPES, LAYOUTS, Kind
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_head import plain
from tests.triton_device import DEVICE as TRITON_DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP = torch.ops.resnet_fast.head.default


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, ours: Tensor | None = None) -> None:
    """On the CPU: float32 is multiplied as such there, whatever a GPU is set to."""
    ours = rf.ops.head(x, weight, bias) if ours is None else ours
    there = [None if t is None else t.cpu() for t in (x, weight, bias)]
    exact = plain(*(None if t is None else t.double() for t in there))  # type: ignore[arg-type]
    assert_obeys_error_rule(ours.cpu(), plain(*there), exact)  # type: ignore[arg-type]
    assert ours.is_contiguous() and ours.device == x.device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("c", "size"), [(65, (1, 1)), (65, (7, 7)), (65, (13, 9)), (64, (1, 1)), (64, (7, 7)), (64, (5, 3))]
)
@pytest.mark.parametrize("n", [0, 1, 3, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values(
    kind: Kind, dtype: torch.dtype, c: int, size: tuple[int, int], n: int, with_bias: bool, launched: list[str]
) -> None:
    x, weight = kind.randn(n, c, *size, dtype=dtype), (kind.randn(10, c) / 8).to(dtype)
    compare(x, weight, kind.randn(10, dtype=dtype) if with_bias else None)
    assert launched == ["head"] * (n > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 1), (5, 17, 3), (3, 130, 65), (9, 64, 65), (33, 130, 33)])
def test_channels_and_outputs(kind: Kind, dtype: torch.dtype, n: int, c: int, k: int, launched: list[str]) -> None:
    weight, bias = (kind.randn(k, c) / c**0.5).to(dtype), kind.randn(k, dtype=dtype)
    for size in ((3, 2), (3, 5)):
        compare(kind.randn(n, c, *size, dtype=dtype), weight, bias)
    assert launched == ["head"] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(kind: Kind, dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    x, weight = kind.randn(3, 24, 4, 3, dtype=dtype), kind.randn(24, 7, dtype=dtype).t()
    moved, bias = LAYOUTS[layout](x), kind.randn(14, dtype=dtype)[::2]
    assert torch.equal(moved, x)
    compare(moved, weight / 5, bias)
    compare(moved[:, ::2, ::2], kind.randn(7, 24, dtype=dtype)[:, ::2] / 4, kind.randn(1, dtype=dtype).expand(7))
    assert launched == ["head"] * 2


@pytest.mark.parametrize("shape", [(1, 12, 1, 3), (1, 12, 4, 3)])
def test_expanded_images(kind: Kind, shape: tuple[int, ...], launched: list[str]) -> None:
    compare(kind.randn(*shape).expand(3, 12, 4, 3), kind.randn(7, 12), None)
    assert launched == ["head"]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_weight_and_bias_in_float32_beside_narrower_images(kind: Kind, dtype: torch.dtype) -> None:
    x, weight, bias = kind.randn(3, 17, 5, 5, dtype=dtype), kind.randn(9, 17), kind.randn(9)
    compare(x, weight.to(dtype), bias.to(dtype), rf.ops.head(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [6, 16])
def test_nan_and_infinities_stay_with_their_image(kind: Kind, dtype: torch.dtype, c: int) -> None:
    x, weight, bias = kind.randn(5, c, 3, 4, dtype=dtype), kind.randn(7, c, dtype=dtype), kind.randn(7, dtype=dtype)
    x[0, 0, 0, 0], x[1, 1, 1, 1], x[2, 1, 2, 2] = float("nan"), float("inf"), float("-inf")
    compare(x, weight, bias)
    bias[3] = float("nan")
    compare(x, weight, bias)


@pytest.mark.parametrize("c", [4, 8])
def test_large_values_do_not_overflow_on_the_way(kind: Kind, c: int) -> None:
    half = {"device": kind.device, "dtype": torch.float16}
    compare(torch.full((2, c, 7, 7), 6e4, **half), torch.eye(c, **half), None)


def test_float32_is_not_rounded_to_tf32(kind: Kind) -> None:
    x, weight = kind.randn(4, 64, 2, 2), kind.randn(8, 64)
    exact = plain(x.double(), weight.double(), None)
    for allowed in (False, True) if kind.name == "cuda" else (False,):
        with tf32(allowed):
            ours = rf.ops.head(x, weight)
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_references(kind: Kind, dtype: torch.dtype, with_bias: bool) -> None:
    values = kind.randn(3, 24, 3, 2, dtype=dtype), kind.randn(5, 24, dtype=dtype), kind.randn(5, dtype=dtype)
    gradients = []
    for backend in (kind.name, "reference"):
        leaves = [t.clone().requires_grad_() for t in values[: 2 + with_bias]]
        with backends.use(backend):
            rf.ops.head(*leaves).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))  # none depends on the output


def test_gradients_are_torchs(kind: Kind) -> None:
    gradients = []
    values = kind.randn(2, 6, 3, 4), kind.randn(5, 6), kind.randn(5)
    for run in (rf.ops.head, plain):
        leaves = [t.clone().requires_grad_() for t in values]
        with tf32(False):
            run(*leaves).square().sum().backward()
        gradients.append([t.grad for t in leaves])
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_opcheck_and_compile(kind: Kind) -> None:
    x, weight, bias = kind.randn(2, 6, 3, 4), kind.randn(5, 6), kind.randn(5)
    torch.library.opcheck(OP, (x.clone().requires_grad_(), weight.clone().requires_grad_(), bias))
    torch.library.opcheck(OP, (x.contiguous(memory_format=torch.channels_last), weight, None))
    compiled = torch.compile(rf.ops.head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), rf.ops.head(x, weight, bias))


def test_bound(kind: Kind, launched: list[str]) -> None:
    x, weight, bias = kind.randn(3, 24, 4, 5), kind.randn(7, 24) / 5, kind.randn(7)
    for dtype in DTYPES:
        for offset in (bias, None):
            head = ops.ALL["head"].bind(weight, offset, dtype=dtype)
            assert head.backend == kind.name and head.backend_for(x.to("meta", dtype)) == kind.name
            launched.clear()
            ours = head(x.to(dtype))
            assert launched == ["head"] and head(x[:0].to(dtype)).shape == (0, 7)
            compare(x.to(dtype), weight.to(dtype), None if offset is None else offset.to(dtype), ours)
    assert ops.ALL["head"].bind(weight, bias, backend="reference").backend == "reference"


def test_an_image_gives_the_same_bits_in_any_place(kind: Kind) -> None:
    x, weight, bias = kind.randn(1, 33, 5, 5), kind.randn(20, 33), kind.randn(20)
    if kind.name == "triton" and kind.device == "cpu":
        # As for the stem: sums of integers are the same in any order, and here so are the means.
        x, weight = (4 * x).round() * 25, (4 * weight).round()
    many = rf.ops.head(x.expand(5, 33, 5, 5), weight, bias)
    assert all(torch.equal(row, many[0]) for row in many)


def test_no_outputs_and_float64(kind: Kind, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    assert rf.ops.head(kind.randn(3, 4, 2, 2), kind.randn(0, 4)).shape == (3, 0)
    with pytest.warns(backends.FallbackWarning, match="not float64; the plain torch reference runs instead"):
        y = rf.ops.head(kind.randn(3, 4, 2, 2).double(), kind.randn(2, 4).double())
    assert y.shape == (3, 2) and launched == []


# --- Triton's choices


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_candidate_computes(dtype: torch.dtype) -> None:
    """Two blocks of images and of outputs, channels and pixels that no block divides."""
    from resnet_fast.kernels import head as kernel

    problem = kernel.Problem(5, 3, 5, 40, 37, triton.precision(dtype, "matmul"))
    a = ops.ALL["head"].example(problem, torch.device(TRITON_DEVICE))
    configs = [*kernel.candidates(problem, triton.gpu_of(a.x.device)), kernel.Config(2, 16, 16, 4, 4, 1)]
    assert len(configs) > 3
    for config in configs[:: 4 if triton.interpreted() else 1] + configs[-1:]:
        out = ops.ALL["head"].empty(a)
        with triton.on(a.x.device):
            kernel.launch(*a, out, problem, config)()
        compare(*a, out)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["a100", "h100", "b200", "l4"])
@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_choices(name: str, precision: str) -> None:
    from resnet_fast.kernels import head as kernel

    gpu = gpus.known(name)
    least = None
    for n in (1, 8, 32, 128, 256):
        problem = kernel.Problem(n, 7, 7, 2048, 1000, precision)
        configs = list(kernel.candidates(problem, gpu))
        chosen = kernel.heuristic(problem, gpu)
        assert chosen in configs and len(set(configs)) == len(configs)
        assert kernel.choose(problem, gpu) == chosen
        assert all(config.shared_memory(problem) <= gpu.shared_memory for config in configs)
        assert least is None or kernel.traffic(problem, chosen, gpu) >= least  # more images, never less work
        least = kernel.traffic(problem, chosen, gpu)
