"""The Triton kernel of head against torch: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytest.importorskip("triton")
from resnet_fast import ops
from resnet_fast.backends import triton as adapter
from resnet_fast.kernels import gpus
from resnet_fast.kernels import head as kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.resnet_fast.head.default

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.triton,
]


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    with rf.backends.use("triton"):
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, ours: Tensor | None = None) -> None:
    ours = rf.ops.head(x, weight, bias) if ours is None else ours
    exact = plain(x.double(), weight.double(), None if bias is None else bias.double())
    assert_obeys_error_rule(ours, plain(x, weight, bias), exact)
    assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 9)])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values(dtype: torch.dtype, size: tuple[int, int], n: int, with_bias: bool) -> None:
    x, weight = randn(n, 65, *size, dtype=dtype), (randn(10, 65) / 8).to(dtype)
    bias = randn(10, dtype=dtype) if with_bias else None
    for form in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., : size[1]]):
        compare(form, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 1), (5, 17, 3), (9, 64, 65), (33, 130, 33)])
def test_channels_and_outputs(dtype: torch.dtype, n: int, c: int, k: int) -> None:
    compare(randn(n, c, 3, 5, dtype=dtype), (randn(k, c) / c**0.5).to(dtype), randn(k, dtype=dtype))


def test_expanded_and_strided_arguments() -> None:
    x, weight, bias = randn(1, 12, 4, 3), randn(12, 7).t(), randn(14)[::2]
    compare(x.expand(3, 12, 4, 3), weight, bias)
    compare(x[:, :, ::2], randn(7, 24)[:, ::2], randn(1).expand(7))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_weight_and_bias_in_float32_beside_narrower_images(dtype: torch.dtype) -> None:
    x, weight, bias = randn(3, 17, 5, 5, dtype=dtype), randn(9, 17), randn(9)
    ours = rf.ops.head(x, weight, bias)
    assert_obeys_error_rule(
        ours, plain(x, weight.to(dtype), bias.to(dtype)), plain(x.double(), weight.double(), bias.double())
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_candidate_computes(dtype: torch.dtype) -> None:
    """Two blocks of images and of outputs, channels and pixels that no block divides."""
    n, c, h, w, k = 5, 40, 3, 5, 37
    x, weight, bias = randn(n, c, h, w, dtype=dtype), (randn(k, c) / 6).to(dtype), randn(k, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    precision = adapter.precision(dtype, "matmul")
    problem = kernel.Problem(n, h, w, c, k, precision)
    configs = [*kernel.candidates(problem, adapter.gpu_of(DEVICE)), kernel.Config(2, 16, 16, 4, 4)]
    assert len(configs) > 3
    for config in configs[:: 4 if adapter.interpreted() else 1] + configs[-1:]:
        out = torch.empty(n, k, dtype=dtype, device=DEVICE)
        with adapter.on(DEVICE):
            kernel.launch(x, weight, bias, out, problem, config)()
        compare(x, weight, bias, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_stay_with_their_image(dtype: torch.dtype) -> None:
    x, weight, bias = randn(5, 6, 3, 4, dtype=dtype), randn(7, 6, dtype=dtype), randn(7, dtype=dtype)
    x[0, 0, 0, 0], x[1, 1, 1, 1], x[2, 1, 2, 2] = float("nan"), float("inf"), float("-inf")
    compare(x, weight, bias)
    bias[3] = float("nan")
    compare(x, weight, bias)


def test_large_values_do_not_overflow_on_the_way() -> None:
    x = torch.full((2, 4, 7, 7), 6e4, device=DEVICE, dtype=torch.float16)
    compare(x, torch.eye(4, device=DEVICE, dtype=torch.float16), None)


def test_an_image_gives_the_same_bits_in_any_place() -> None:
    x, weight, bias = randn(1, 33, 5, 5), randn(20, 33), randn(20)
    if x.device.type == "cpu":  # as for the stem: sums of integers are the same in any order, and here so are the means
        x, weight = (4 * x).round() * 25, (4 * weight).round()
    many = rf.ops.head(x.expand(5, 33, 5, 5), weight, bias)
    assert all(torch.equal(row, many[0]) for row in many)


def test_prepared() -> None:
    x, weight, bias = randn(3, 12, 4, 5), randn(7, 12), randn(7)
    head = ops.ALL["head"].bind(weight, bias)
    assert head.backend == "triton"
    compare(x, weight, bias, head(x))
    assert head(x[:0]).shape == (0, 7)
    half = ops.ALL["head"].bind(weight, None, dtype=torch.float16)
    compare(x.half(), weight.half(), None, half(x.half()))
    assert ops.ALL["head"].bind(weight, bias, backend="reference").backend == "reference"


def test_no_outputs() -> None:
    assert rf.ops.head(randn(3, 4, 2, 2), randn(0, 4)).shape == (3, 0)


def test_opcheck_and_autograd() -> None:
    x, weight, bias = randn(2, 6, 3, 4), randn(5, 6), randn(5)
    torch.library.opcheck(OP, (x.clone().requires_grad_(), weight.clone().requires_grad_(), bias))
    torch.library.opcheck(OP, (x.contiguous(memory_format=torch.channels_last), weight, None))
    grads = []
    for run in (rf.ops.head, plain):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        run(*leaves).square().sum().backward()
        grads.append([t.grad for t in leaves])
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("name", ["a100", "h100", "b200", "l4"])
@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_choices(name: str, precision: str) -> None:
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
