"""add_act on each kind of kernel, forward and backward: values, layouts, gradients of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import triton
from resnet_fast.kernels import gpus
from tests.kernel_kinds import DTYPES, Kind
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP, BACKWARD = torch.ops.resnet_fast.add_act.default, torch.ops.resnet_fast.add_act_backward.default


def compare(x: Tensor, y: Tensor, activation: str = "relu") -> None:
    act = torch.relu if activation == "relu" else (lambda t: t)
    kept = x.clone(), y.clone()
    ours = rf.ops.add_act(x, y, activation)
    assert_obeys_error_rule(ours, act(x + y), act(x.double() + y.double()))
    assert ours.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    if activation == "relu":
        grad = torch.randn_like(ours)
        got = BACKWARD(grad, ours)
        assert torch.equal(got, torch.ops.aten.threshold_backward(grad, ours, 0))
        assert got.stride() == torch.empty_like(ours).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 1, 1, 1), (3, 17, 7, 7), (2, 8, 13, 29), (5,), ()], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_values_and_gradient(
    kind: Kind, dtype: torch.dtype, shape: tuple[int, ...], activation: str, launched: list[str]
) -> None:
    compare(kind.randn(*shape, dtype=dtype), kind.randn(*shape, dtype=dtype), activation)
    there = 0 not in shape
    assert launched == ["add_act"] * there + ["add_act_backward"] * (there and activation == "relu")


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2048, 4097])
def test_whole_and_broken_blocks(kind: Kind, length: int) -> None:
    compare(kind.randn(length, dtype=torch.float16), kind.randn(length, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(kind: Kind, dtype: torch.dtype) -> None:
    x, y = kind.randn(2, 6, 5, 7, dtype=dtype), kind.randn(2, 6, 5, 7, dtype=dtype)
    last = torch.channels_last
    forms = [
        (x, y.contiguous(memory_format=last)),
        (x.contiguous(memory_format=last), y),
        (x.contiguous(memory_format=last), y.contiguous(memory_format=last)),
        (torch.cat([x, x], 1)[:, :6], y),
        (torch.cat([x, x], 1)[:, :6], torch.cat([y, y], 1)[:, 6:]),
        (torch.cat([x, x], 0)[1:3], y),  # dense, begins anywhere
        (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), y),  # dense, at an odd address
        (x.transpose(2, 3).contiguous().transpose(2, 3), y),
        (x[:, :1].expand(2, 6, 5, 7), y),
        (x, y[:, :1].expand(2, 6, 5, 7)),
        (x[..., ::2], y[..., 1:5]),
    ]
    for a, b in forms:
        compare(a, b)


def test_gradient_of_any_strides(kind: Kind) -> None:
    output, grad = rf.ops.add_act(kind.randn(2, 6, 5, 7), kind.randn(2, 6, 5, 7)), kind.randn(2, 6, 5, 7)
    for g in (grad[:, :1], grad.contiguous(memory_format=torch.channels_last), grad[:1, :1, :1, :1]):
        g = g.expand_as(output)
        assert torch.equal(BACKWARD(g, output), torch.ops.aten.threshold_backward(g, output, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(kind: Kind, dtype: torch.dtype) -> None:
    # Triton's interpreter rounds some denormal sums to bfloat16 wrongly, so those are left to a GPU.
    tiny = 1e-30 if kind.name == "triton" and dtype is torch.bfloat16 and triton.interpreted() else 1e-40
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, tiny, -tiny, 3.0, 6e4])
    x, y = (t.to(kind.device, dtype) for t in (values.repeat(9), values.repeat_interleave(9)))
    got, want = rf.ops.add_act(x, y), torch.relu(x + y)
    assert got.isnan().any() and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))
    for grad in (torch.ones_like(x), y):
        ours, torchs = BACKWARD(grad, x), torch.ops.aten.threshold_backward(grad, x, 0)
        assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.nan_to_num(9), torchs.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_torchs(kind: Kind, dtype: torch.dtype, launched: list[str]) -> None:
    values = [kind.randn(3, 5, 7, 2, dtype=dtype) for _ in range(3)]
    gradients = []
    for run in (rf.ops.add_act, lambda a, b: torch.relu(a + b)):
        x, y = (t.clone().requires_grad_() for t in values[:2])
        run(x, y).backward(values[2])
        gradients.append((x.grad, y.grad))
    assert launched == ["add_act", "add_act_backward"]
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_second_order_and_batched_gradients(kind: Kind) -> None:
    x, y = kind.randn(3, 4).requires_grad_(), kind.randn(3, 4).requires_grad_()
    (first,) = torch.autograd.grad(rf.ops.add_act(x, y).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2.0 * (x + y > 0))
    seeds = torch.eye(12, device=kind.device).view(12, 3, 4)
    (rows,) = torch.autograd.grad(rf.ops.add_act(x, y), x, seeds, is_grads_batched=True)
    assert torch.equal(rows, seeds * (x + y > 0))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_opcheck(kind: Kind, activation: str) -> None:
    for shape in ((0, 3), (2, 3, 5, 4)):
        torch.library.opcheck(OP, (*(kind.randn(*shape).requires_grad_() for _ in range(2)), activation))
    x = kind.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OP, (x.requires_grad_(), kind.randn(2, 1, 5, 4).expand(2, 3, 5, 4), activation))


def test_opcheck_backward(kind: Kind) -> None:
    output = rf.ops.add_act(kind.randn(2, 3, 5, 4), kind.randn(2, 3, 5, 4))
    torch.library.opcheck(BACKWARD, (kind.randn(2, 3, 5, 4).requires_grad_(), output))
    torch.library.opcheck(BACKWARD, (kind.randn(1, 1, 1, 1).expand(2, 3, 5, 4), output))
    torch.library.opcheck(BACKWARD, (kind.randn(0, 3), kind.randn(0, 3)))


def test_compiled_with_gradients(kind: Kind, launched: list[str]) -> None:
    def block(a: Tensor, b: Tensor) -> Tensor:
        return rf.ops.add_act(rf.ops.add_act(a, b), b).square().sum()

    results = []
    values = kind.randn(2, 3, 5, 4), kind.randn(2, 3, 5, 4)
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        a, b = (t.clone().requires_grad_() for t in values)
        run(a, b).backward()
        results.append((a.grad, b.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert len(launched) == 8


def test_errors_and_float64(kind: Kind, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    with pytest.raises(ValueError, match=r"x has shape \[3\], y has \[2, 3\]"):
        rf.ops.add_act(kind.randn(3), kind.randn(2, 3))
    with pytest.raises(ValueError, match=r"grad has shape \[3\], output has \[2, 3\]"):
        BACKWARD(kind.randn(3), kind.randn(2, 3))
    with pytest.raises(TypeError, match="one floating point dtype"):
        BACKWARD(kind.randn(3), kind.randn(3, dtype=torch.float16))
    x = kind.randn(3, 4).double()
    with pytest.warns(backends.FallbackWarning, match="not float64; the plain torch reference runs instead"):
        assert torch.equal(rf.ops.add_act(x, x), torch.relu(x + x))
    assert launched == []


# --- Triton's choices


@pytest.mark.triton
@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_choices(name: str, precision: str) -> None:
    from resnet_fast.kernels import add_act as kernel

    gpu = gpus.known(name)
    small, large = (kernel.Problem(length, precision) for length in (100, 128 * 256 * 56 * 56))
    for problem in (small, large):
        configs = list(kernel.candidates(problem, gpu))
        assert kernel.heuristic(problem, gpu) in configs and len(set(configs)) == len(configs)
        assert kernel.choose(problem, gpu) in configs
    assert kernel.heuristic(small, gpu).block < kernel.heuristic(large, gpu).block


@pytest.mark.triton
def test_every_candidate_computes() -> None:
    from resnet_fast.kernels import add_act as kernel
    from tests.triton_device import DEVICE

    x, y = (torch.randn(3000, dtype=torch.float16).to(DEVICE) for _ in range(2))
    problem = kernel.Problem(3000, "fp16")
    for config in kernel.candidates(problem, triton.gpu_of(x.device)):
        out = torch.empty_like(x)
        with triton.on(x.device):
            kernel.launch(x, y, out, problem, config)()
        assert torch.equal(out, torch.relu(x + y)), config
