"""The Triton kernels of add_act against torch: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytest.importorskip("triton")
from resnet_fast.backends import triton as adapter
from resnet_fast.kernels import add_act as kernel
from resnet_fast.kernels import gpus

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP, BACKWARD = torch.ops.resnet_fast.add_act.default, torch.ops.resnet_fast.add_act_backward.default

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


def compare(x: Tensor, y: Tensor, activation: str = "relu") -> None:
    act = torch.relu if activation == "relu" else (lambda t: t)
    ours = rf.ops.add_act(x, y, activation)
    assert_obeys_error_rule(ours, act(x + y), act(x.double() + y.double()))
    assert ours.stride() == torch.empty_like(x).stride()
    if activation == "none":
        return
    grad = randn(*x.shape, dtype=x.dtype)
    got = BACKWARD(grad, ours)
    assert torch.equal(got, torch.ops.aten.threshold_backward(grad, ours, 0))
    assert got.stride() == torch.empty_like(ours).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 1, 1, 1), (3, 17, 7, 7), (2, 8, 13, 29), (5,), ()])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_values_and_gradient(dtype: torch.dtype, shape: tuple[int, ...], activation: str) -> None:
    compare(randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), activation)


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2048, 4097])
def test_whole_and_broken_blocks(length: int) -> None:
    compare(randn(length, dtype=torch.float16), randn(length, dtype=torch.float16))


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
        (torch.cat([x, x], 0)[1:3], y),  # dense, begins anywhere
        (x.transpose(2, 3).contiguous().transpose(2, 3), y),
        (x[:, :1].expand(2, 6, 5, 7), y),
        (x, y[:, :1].expand(2, 6, 5, 7)),
        (x[..., ::2], y[..., 1:5]),
    ]
    for a, b in forms:
        keep = a.clone(), b.clone()
        compare(a, b)
        assert torch.equal(a, keep[0]) and torch.equal(b, keep[1])


def test_gradient_of_any_strides() -> None:
    output = rf.ops.add_act(randn(2, 6, 5, 7), randn(2, 6, 5, 7))
    grad = randn(2, 6, 5, 7)
    for g in (grad[:, :1].expand_as(output), grad.contiguous(memory_format=torch.channels_last), grad[:1, :1, :1, :1]):
        g = g.expand_as(output)
        assert torch.equal(BACKWARD(g, output), torch.ops.aten.threshold_backward(g, output, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: torch.dtype) -> None:
    # Triton's interpreter rounds some denormal sums to bfloat16 wrongly, so those are left to a GPU.
    tiny = 1e-30 if dtype is torch.bfloat16 and adapter.interpreted() else 1e-40
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, tiny, -tiny, 3.0, 6e4], device=DEVICE)
    x, y = values.repeat(9).to(dtype), values.repeat_interleave(9).to(dtype)
    got, want = rf.ops.add_act(x, y), torch.relu(x + y)
    assert got.isnan().any() and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))
    for grad in (torch.ones_like(x), y):
        ours, torchs = BACKWARD(grad, x), torch.ops.aten.threshold_backward(grad, x, 0)
        assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.nan_to_num(9), torchs.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd(dtype: torch.dtype) -> None:
    values = randn(3, 5, 7, 2, dtype=dtype), randn(3, 5, 7, 2, dtype=dtype), randn(3, 5, 7, 2, dtype=dtype)
    grads = []
    for run in (rf.ops.add_act, lambda a, b: torch.relu(a + b)):
        x, y = (t.clone().requires_grad_() for t in values[:2])
        run(x, y).backward(values[2])
        grads.append((x.grad, y.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_second_order_and_batched_gradients() -> None:
    x, y = randn(3, 4).requires_grad_(), randn(3, 4).requires_grad_()
    out = rf.ops.add_act(x, y)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2.0 * (x + y > 0))
    seeds = torch.eye(12, device=DEVICE).view(12, 3, 4)
    (rows,) = torch.autograd.grad(rf.ops.add_act(x, y), x, seeds, is_grads_batched=True)
    assert torch.equal(rows, seeds * (x + y > 0))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_opcheck(activation: str) -> None:
    for shape in ((0, 3), (2, 3, 5, 4)):
        torch.library.opcheck(OP, (*(randn(*shape).requires_grad_() for _ in range(2)), activation))
    x = randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OP, (x.requires_grad_(), randn(2, 1, 5, 4).expand(2, 3, 5, 4), activation))


def test_opcheck_backward() -> None:
    output = rf.ops.add_act(randn(2, 3, 5, 4), randn(2, 3, 5, 4))
    torch.library.opcheck(BACKWARD, (randn(2, 3, 5, 4).requires_grad_(), output))
    torch.library.opcheck(BACKWARD, (randn(1, 1, 1, 1).expand(2, 3, 5, 4), output))
    torch.library.opcheck(BACKWARD, (randn(0, 3), randn(0, 3)))


def test_compiled_twice_over() -> None:
    def block(a: Tensor, b: Tensor) -> Tensor:
        return rf.ops.add_act(rf.ops.add_act(a, b), b).square().sum()

    results = []
    values = randn(2, 3, 5, 4), randn(2, 3, 5, 4)
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        a, b = (t.clone().requires_grad_() for t in values)
        run(a, b).backward()
        results.append((a.grad, b.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_errors_of_the_gradient() -> None:
    with pytest.raises(ValueError, match=r"grad has shape \[3\], output has \[2, 3\]"):
        BACKWARD(randn(3), randn(2, 3))
    with pytest.raises(TypeError, match="one floating point dtype"):
        BACKWARD(randn(3), randn(3, dtype=torch.float16))


@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_choices(name: str, precision: str) -> None:
    gpu = gpus.known(name)
    small, large = (kernel.Problem(length, precision) for length in (100, 128 * 256 * 56 * 56))
    for problem in (small, large):
        configs = list(kernel.candidates(problem, gpu))
        assert kernel.heuristic(problem, gpu) in configs and len(set(configs)) == len(configs)
        assert kernel.choose(problem, gpu) in configs
    assert kernel.heuristic(small, gpu).block < kernel.heuristic(large, gpu).block


def test_every_candidate_computes() -> None:
    x, y = randn(3000, dtype=torch.float16), randn(3000, dtype=torch.float16)
    problem = kernel.Problem(3000, "fp16")
    for config in kernel.candidates(problem, adapter.gpu_of(DEVICE)):
        out = torch.empty_like(x)
        with adapter.on(DEVICE):
            kernel.launch(x, y, out, problem, config)()
        assert torch.equal(out, torch.relu(x + y)), config
