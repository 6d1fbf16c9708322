"""The Triton kernels of batch_norm_act, pass by pass, against torch: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_obeys_error_rule
from tests.triton_device import DEVICE

pytest.importorskip("triton")
from resnet_fast.backends import triton as adapter
from resnet_fast.backends import triton_batch_norm_act as backend
from resnet_fast.kernels import batch_norm_act as kernel
from resnet_fast.kernels import gpus

EPS, MOMENTUM = 1e-5, 0.1
STEPS = ("statistics", "apply", "reduce", "backward")

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of the interpreter's NaN
]

#: Launches are chosen as for an H100 with two multiprocessors: a few slices, which the interpreter gets through.
SMALL = dataclasses.replace(gpus.known("h100"), name="small", multiprocessors=2)


@pytest.fixture(autouse=True)
def small_gpu() -> Iterator[None]:
    with adapter.assume(SMALL):
        yield


def image(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64) * std + mean
    return values.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def vector(c: int, of: float = 0.0) -> Tensor:
    return torch.randn(c, device=DEVICE) + of


def per_channel(values: Tensor | None) -> Tensor | float:
    return 0.0 if values is None else values.double()[:, None, None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in float64."""
    return x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)


def ours(x: Tensor, running: tuple[Tensor | None, Tensor | None] = (None, None), **options: bool) -> list[Tensor]:
    made = [torch.empty(x.shape[1], device=DEVICE) for _ in range(2)]
    backend.batch_norm_act_statistics(x, *made, *running, eps=EPS, momentum=MOMENTUM, **options)
    return made


def check_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd, compared with torch's; so are the running statistics and the variance."""
    c, rows = x.shape[1], x.numel() // x.shape[1]
    mean, variance = moments(x)
    running, theirs = (tuple(t.clone() for t in (vector(c), vector(c, 3.0))) for _ in range(2))
    for mine, its in zip(running, theirs, strict=True):
        its.copy_(mine)
    before = [t.double() for t in running]
    got = ours(x, running)
    _, *want = torch.native_batch_norm(x, None, None, *theirs, True, MOMENTUM, EPS)
    invstd = (variance + EPS).rsqrt()
    for name, mine, its, exact in zip(("mean", "invstd"), got, want, (mean, invstd), strict=True):
        assert_obeys_error_rule(mine, its.float(), exact, name)
    unbiased = variance * rows / (rows - 1) if rows > 1 else variance * float("nan")
    for name, mine, its, old, new in zip(("mean", "var"), running, theirs, before, (mean, unbiased), strict=True):
        assert_obeys_error_rule(mine, its, (1 - MOMENTUM) * old + MOMENTUM * new, f"running_{name}")
    again, raw = ours(x, variance=True)
    assert torch.equal(again, got[0]) or again.isnan().any()
    assert_obeys_error_rule(raw.sqrt(), x.float().std((0, 2, 3), unbiased=False), variance.sqrt(), "deviation")
    return got[0], got[1]


def check(x: Tensor, activation: str = "relu", residual: bool = False, affine: bool = True) -> None:
    """All passes, each on what the pass before it gave."""
    c, rows = x.shape[1], x.numel() // x.shape[1]
    mean, invstd = check_statistics(x)
    gamma, beta = (vector(c, 1.0), vector(c)) if affine else (None, None)
    added = image(*x.shape, dtype=x.dtype) if residual else None
    act = torch.relu if activation == "relu" else (lambda t: t)

    out = torch.empty_like(x)
    backend.batch_norm_act_apply(x, mean, invstd, gamma, beta, added, out, activation=activation)
    exact_mean, exact_variance = moments(x)
    xhat = (x.double() - per_channel(exact_mean)) * per_channel((exact_variance + EPS).rsqrt())
    exact = (1.0 if gamma is None else per_channel(gamma)) * xhat + per_channel(beta)
    torchs = torch.native_batch_norm(x, gamma, beta, None, None, True, MOMENTUM, EPS)[0]
    if added is not None:
        exact, torchs = exact + added.double(), torchs + added
    assert_obeys_error_rule(out, act(torchs), act(exact), "out")

    grad = image(*x.shape, dtype=x.dtype)
    output = out if activation == "relu" else None
    g = grad if output is None else torch.where(output <= 0, 0.0, grad)
    sums = [torch.empty(c, device=DEVICE) for _ in range(2)]
    backend.batch_norm_act_reduce(grad, x, output, mean, invstd, *sums)
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if residual else None
    backend.batch_norm_act_backward(grad, x, output, mean, invstd, gamma, *sums, grad_x, grad_residual)
    ones = torch.ones(c, device=DEVICE)
    want = torch.ops.aten.native_batch_norm_backward(
        g, x, ones if gamma is None else gamma, None, None, mean, invstd, True, EPS, [True, True, True]
    )
    exact_sums = g.double().sum((0, 2, 3)), (g.double() * xhat).sum((0, 2, 3))
    scale = per_channel((exact_variance + EPS).rsqrt()) * (1.0 if gamma is None else per_channel(gamma))
    exact_x = scale * (g.double() - per_channel(exact_sums[0]) / rows - xhat * per_channel(exact_sums[1]) / rows)
    assert_obeys_error_rule(sums[0], want[2].float(), exact_sums[0], "sum of g")
    assert_obeys_error_rule(sums[1], want[1].float(), exact_sums[1], "sum of g * xhat")
    assert_obeys_error_rule(grad_x, want[0], exact_x, "gradient of x")
    assert grad_residual is None or torch.equal(grad_residual, g)


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "residual", "affine"),
    [
        ((2, 17, 13, 11), torch.float32, "relu", True, True),
        ((2, 17, 13, 11), torch.bfloat16, "none", False, False),
        ((3, 64, 17, 9), torch.float16, "relu", False, True),
        ((3, 64, 17, 9), torch.float32, "none", True, True),
        ((3, 64, 17, 9), torch.bfloat16, "relu", True, False),
        ((1, 200, 5, 7), torch.float16, "relu", True, True),
        ((4, 3, 40, 31), torch.float32, "relu", False, True),
        ((5, 1, 3, 2), torch.float32, "relu", False, True),
    ],
    ids=str,
)
def test_all_passes(shape: tuple[int, ...], dtype: torch.dtype, activation: str, residual: bool, affine: bool) -> None:
    check(image(*shape, dtype=dtype), activation, residual, affine)


@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.01), (1000.0, 1.0), (-3.0, 30.0)])
def test_means_far_from_the_deviation(mean: float, std: float) -> None:
    check_statistics(image(3, 20, 25, 11, mean=mean, std=std))


@pytest.mark.parametrize("outlier", [30.0, 100.0])
def test_a_first_row_far_from_the_others(outlier: float) -> None:
    x = image(3, 20, 25, 11, mean=1.0)
    x[0, :, 0, 0] = outlier
    check_statistics(x)


def test_many_channels() -> None:
    x = image(1, 2048, 2, 2, dtype=torch.bfloat16)
    mean, variance = moments(x)
    _, *want = torch.native_batch_norm(x, None, None, None, None, True, MOMENTUM, EPS)
    for name, mine, its, exact in zip(("mean", "invstd"), ours(x), want, (mean, (variance + EPS).rsqrt()), strict=True):
        assert_obeys_error_rule(mine, its.float(), exact, name)


def test_one_row() -> None:
    x, (mean, invstd), var = image(1, 5, 1, 1), (torch.empty(5), torch.empty(5)), torch.zeros(5)
    mean, invstd, var = mean.to(DEVICE), invstd.to(DEVICE), var.to(DEVICE)
    backend.batch_norm_act_statistics(x, mean, invstd, None, var, eps=EPS, momentum=MOMENTUM)
    assert torch.equal(mean, x.flatten()) and bool(var.isnan().all())
    torch.testing.assert_close(invstd, torch.full_like(invstd, EPS**-0.5))


def test_no_rows() -> None:
    x = image(0, 5, 3, 3)
    assert all(bool(t.isnan().all()) for t in ours(x))
    sums = [torch.empty(5, device=DEVICE) for _ in range(2)]
    backend.batch_norm_act_reduce(x, x, None, vector(5), vector(5), *sums)
    assert all(bool((t == 0).all()) for t in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(dtype: torch.dtype) -> None:
    x = image(2, 9, 8, 9, dtype=dtype)
    x[0, 0, 0, 0] = x[1, 1, 3, 3] = float("nan")
    x[0, 2, 0, 0] = x[1, 3, 5, 5] = float("inf")
    x[0, 4, 0, 0] = -float("inf")
    mean, invstd = ours(x)
    assert mean[:2].isnan().all() and torch.equal(mean[2:5].cpu(), torch.tensor([1.0, 1, -1]) * float("inf"))
    assert invstd[:5].isnan().all() and invstd[5:].isfinite().all()
    # Apply and the gradient, on statistics that are finite.
    mean, invstd, gamma = vector(9), vector(9).abs(), vector(9)
    for activation, act in (("relu", torch.relu), ("none", lambda t: t)):
        out = torch.empty_like(x)
        backend.batch_norm_act_apply(x, mean, invstd, gamma, None, None, out, activation=activation)
        exact = act((x.double() - per_channel(mean)) * per_channel(invstd) * per_channel(gamma))
        assert_obeys_error_rule(out, exact.to(dtype), exact, activation)
    grad, grad_residual = image(2, 9, 8, 9, dtype=dtype), torch.empty_like(x)
    grad[0, 5, 0, 0] = float("nan")
    backend.batch_norm_act_backward(grad, x, x, mean, invstd, None, None, None, None, grad_residual)
    want = torch.ops.aten.threshold_backward(grad, x, 0)
    assert want.isnan().any() and torch.equal(grad_residual.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("over", ["x", "residual"])
def test_in_place(over: str) -> None:
    tensors = {name: image(2, 24, 9, 7, dtype=torch.float16) for name in ("x", "residual", "out")}
    mean, invstd, gamma, beta = vector(24), vector(24), vector(24), vector(24)

    def run(out: Tensor) -> Tensor:
        backend.batch_norm_act_apply(tensors["x"], mean, invstd, gamma, beta, tensors["residual"], out)
        return out

    assert torch.equal(run(tensors["out"]), run(tensors[over]))


@pytest.mark.parametrize("relu", [True, False])
def test_statistics_that_do_not_depend_on_x(relu: bool) -> None:
    x, grad, output = (image(2, 24, 9, 7) for _ in range(3))
    mean, invstd, gamma = vector(24), vector(24).abs(), vector(24)
    grad_x = torch.empty_like(x)
    backend.batch_norm_act_backward(
        grad, x, output if relu else None, mean, invstd, gamma, None, None, grad_x, None
    )  # fmt: skip
    g = torch.where(output <= 0, 0.0, grad) if relu else grad
    exact = g.double() * per_channel(invstd) * per_channel(gamma)
    assert_obeys_error_rule(grad_x, g * (invstd * gamma)[:, None, None], exact)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "WIDE_FROM", 0)
    check(image(2, 20, 9, 11, dtype=torch.float16), residual=True)
    problem = kernel.Problem(198, 20, "fp16", "apply")
    assert kernel.apply(*[None] * 7, problem, kernel.heuristic(problem, SMALL))[0].options["WIDE"]


def test_which_problems_need_64_bits() -> None:
    for rows, wide in ((2**23 - 2**14, False), (2**23, True)):
        problem = kernel.Problem(rows, 128, "fp16", "apply")
        (launch,) = kernel.apply(*[None] * 7, problem, kernel.heuristic(problem, SMALL))
        assert launch.options["WIDE"] is wide


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_choices(name: str, step: str) -> None:
    gpu = gpus.known(name)
    for rows, c in ((1, 1), (0, 0), (49, 2048), (3000, 17), (128 * 112 * 112, 64), (10**8, 64)):
        for precision in gpus.PRECISIONS:
            problem = kernel.Problem(rows, c, precision, step)
            configs = list(kernel.candidates(problem, gpu))
            assert kernel.heuristic(problem, gpu) in configs and len(set(configs)) == len(configs)
            assert kernel.choose(problem, gpu) in configs
            for config in configs:
                assert config.rows % (config.accesses * config.lanes(problem)) == 0
                assert kernel.slices(problem, config) * config.rows >= rows
    sizes = [kernel.workspace_size(kernel.Problem(128 * 112 * 112, 64, "fp16", step), c) for c in configs]
    assert 4 * max(sizes) < 2**22


def test_every_candidate_computes() -> None:
    """Lanes, accesses and slices in all their proportions, whole and broken tiles."""
    x, grad = image(2, 40, 23, 11, dtype=torch.float16, mean=2.0), image(2, 40, 23, 11, dtype=torch.float16)
    problems = [kernel.Problem(506, 40, "fp16", step) for step in STEPS]
    mean, variance = moments(x)
    invstd = (variance + EPS).rsqrt()
    xhat = (x.double() - per_channel(mean)) * per_channel(invstd)
    sums = grad.double().sum((0, 2, 3)), (grad.double() * xhat).sum((0, 2, 3))
    grad_x = per_channel(invstd) * (grad.double() - per_channel(sums[0]) / 506 - xhat * per_channel(sums[1]) / 506)
    exact = (mean, invstd, *sums, xhat, grad_x)
    out, *of_torch = torch.native_batch_norm(x, torch.ones(40, device=DEVICE), None, None, None, True, MOMENTUM, EPS)
    gradients = torch.ops.aten.native_batch_norm_backward(
        grad, x, torch.ones(40, device=DEVICE), None, None, *of_torch, True, EPS, [True, True, True]
    )
    torchs = (*of_torch, gradients[2], gradients[1], out, gradients[0])
    configs = dict.fromkeys(
        dataclasses.replace(config, rows=rows)
        for config in kernel.candidates(problems[0], SMALL)
        for rows in (config.accesses * config.lanes(problems[0]), config.rows)
    )
    assert len({kernel.slices(problems[0], config) for config in configs}) >= 3
    for config in configs:
        vectors = [torch.empty(40, device=DEVICE) for _ in range(4)]
        images = [torch.empty_like(x) for _ in range(2)]
        workspace = torch.empty(kernel.workspace_size(problems[0], config), device=DEVICE)
        of_batch, of_grad = vectors[:2], vectors[2:]
        launches = [
            *kernel.statistics(
                x, *of_batch, None, None, workspace, problems[0], config, eps=EPS, momentum=MOMENTUM
            ),
            *kernel.apply(x, *of_batch, None, None, None, images[0], problems[1], config, activation="none"),
            *kernel.reduce(grad, x, None, *of_batch, *of_grad, workspace, problems[2], config),
            *kernel.backward(grad, x, None, *of_batch, None, *of_grad, images[1], None, problems[3], config),
        ]  # fmt: skip
        with adapter.on(torch.device(DEVICE)):
            for launch in launches:
                launch()
        for got, its, right in zip((*vectors, *images), torchs, exact, strict=True):
            assert_obeys_error_rule(got, its.to(got.dtype), right, str(config))
