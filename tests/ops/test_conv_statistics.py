"""conv_statistics: values, gradients, when its kernel is taken, and the training layers and blocks that call it."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import triton
from resnet_fast.kernels import _tables, gpus
from resnet_fast.models import resnet
from resnet_fast.nn import fused
from resnet_fast.ops import conv_statistics as op
from resnet_fast.ops import recompute
from resnet_fast.ops.batch_norm_act import Norm, from_moments, statistics
from tests.numerics import assert_obeys_error_rule
from tests.triton_device import DEVICE, FORMS, kernels

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of the interpreter
]

OPS = torch.ops.resnet_fast
ON_TRITON = [pytest.param(form, marks=pytest.mark.triton) for form in FORMS]
EPS = 1e-5


def _on(form: str) -> AbstractContextManager[None]:
    """The op by Triton, with launches chosen as for the GPU ``form``."""
    if triton.unavailable():
        pytest.skip(triton.unavailable())
    return kernels(form)


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table for an H100, which is not there yet."""
    monkeypatch.setattr(_tables, "_CHECKED_IN", tmp_path)
    monkeypatch.setenv("RESNET_FAST_TUNED", str(tmp_path))
    _tables.forget()
    yield tmp_path / "h100.json"
    _tables.forget()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that the op's kernel runs from now on, whether there was a norm in front of the convolution."""
    found: list[bool] = []

    def watching(a: op.Arguments) -> Any:
        found.append(a.before is not None)
        return run(a)

    run = op.run_kernel
    monkeypatch.setattr(op, "run_kernel", watching)
    return found


def image(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.3) -> Tensor:
    made = torch.randn(shape, device=DEVICE, dtype=torch.float64) + mean
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


def norm(x: Tensor) -> Norm:
    """A BatchNorm of x with the batch's statistics."""
    c = x.shape[1]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    gamma, beta = (torch.rand(c, device=DEVICE, dtype=wide) + 0.5 for _ in range(2))
    mean, invstd, total = statistics(x)
    return Norm(gamma, beta - 0.7, mean, invstd, True, total, "")


@dataclasses.dataclass(frozen=True)
class Conv:
    c: int
    k: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        weight = torch.randn(self.k, self.c // self.groups, self.kernel, self.kernel, device=DEVICE, dtype=dtype)
        bias = torch.randn(self.k, device=DEVICE, dtype=dtype) if self.bias else None
        pairs = [[self.stride] * 2, [self.kernel // 2] * 2, [1, 1]]
        return weight / weight[0].numel() ** 0.5, bias, *pairs, self.groups


CONVS = [Conv(16, 24), Conv(16, 40, 3, 2), Conv(24, 16, 3, groups=2), Conv(3, 8, 7, 2)]
HALVES = [torch.float32, torch.float16, torch.bfloat16]


# --- the op


def assert_moments_of(y: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Beside those of torch's BatchNorm in float32, as they are used: y less its mean, and the root of the variance."""
    _, center, invstd = torch.native_batch_norm(y.float(), None, None, None, None, True, 0.0, 0.0)
    mine, same, exact = (y.to(m.dtype) - m.view(1, -1, 1, 1) for m in (mean, center, y.double().mean((0, 2, 3))))
    assert_obeys_error_rule(mine, same, exact, "y less its mean")
    deviation = y.double().std((0, 2, 3), unbiased=False)
    assert_obeys_error_rule(variance.sqrt(), invstd.reciprocal(), deviation, "deviation")


@pytest.mark.triton
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_values(conv: Conv, before: bool, form: str, launched: list[bool]) -> None:
    """y beside torch's convolution; mean and variance are those of y as it is stored."""
    dtype = HALVES[CONVS.index(conv) % 3]
    x, (weight, *rest) = image(2, conv.c, 9, 8, dtype=dtype), conv.arguments(torch.float32)
    given = norm(x) if before else None
    with _on(form):
        y, mean, variance = op.conv_statistics(x, given, weight, *rest)
    assert launched == [before] and y.is_contiguous(memory_format=torch.channels_last)
    same, *_ = op.plain(op.Arguments(x, *(recompute.NO_NORM if given is None else given), weight, *rest))
    a = x.double()
    if given is not None:
        vectors = [t.double() for t in given[:4] if t is not None]
        gamma, beta, center, invstd = (t.view(1, -1, 1, 1) for t in vectors)
        a = ((a - center) * invstd * gamma + beta).relu().to(dtype).double()  # what is multiplied is rounded
    stride, padding, dilation, groups = rest[1:]
    exact = nn.functional.conv2d(a, weight.to(dtype).double(), None, stride, padding, dilation, groups)
    assert_obeys_error_rule(y, same, exact, "y")
    assert not (mean.requires_grad or variance.requires_grad)
    assert_moments_of(y, mean, variance)


def test_the_plain_way_is_the_ops_that_it_stands_for() -> None:
    x, arguments = image(2, 16, 7, 5), Conv(16, 24, 3, bias=True).arguments(torch.float32)
    for given, y in (
        (None, recompute.convolve(x, *arguments)),
        (norm(x), recompute.norm_act_conv(x, norm(x), *arguments)),
    ):
        if given is not None:
            y = recompute.norm_act_conv(x, given, *arguments)
        made, mean, variance = op.conv_statistics(x, given, *arguments)
        assert torch.equal(made, y)
        assert_moments_of(y, mean, variance)


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("form", ["plain", *ON_TRITON])
def test_running_statistics_and_inverse_deviation(form: str, rows: int) -> None:
    mean, variance = torch.randn(300, device=DEVICE), torch.rand(300, device=DEVICE)
    variance[0 if rows > 1 else slice(None)] = 0.0
    running = torch.randn(300, device=DEVICE), torch.rand(300, device=DEVICE)
    before = [each.double() for each in running]
    with backends.use("reference") if form == "plain" else _on(form):
        same, invstd, total = from_moments(mean, variance, rows, *running, momentum=0.3, eps=EPS)
    assert same is mean and total is None and [each._version for each in running] == [1, 1]
    exact = (variance.double() + EPS).rsqrt()
    assert_obeys_error_rule(invstd, (variance + EPS).rsqrt(), exact, "invstd")
    unbiased = variance.double() * rows / (rows - 1) if rows > 1 else torch.full_like(exact, torch.nan)
    for name, mine, old, new in zip(("mean", "var"), running, before, (mean.double(), unbiased), strict=True):
        right = 0.7 * old + 0.3 * new
        assert_obeys_error_rule(mine, 0.7 * old.float() + 0.3 * new.float(), right, f"running_{name}")
    halves = torch.zeros(300, device=DEVICE).half(), torch.ones(300, device=DEVICE).half()
    with backends.use("reference") if form == "plain" else _on(form):
        from_moments(mean, variance, 30, *halves, momentum=1.0)
    assert torch.equal(halves[0], mean.half()) and halves[1].dtype is torch.float16


@pytest.mark.parametrize("form", ["plain", *ON_TRITON])
@pytest.mark.parametrize("before", [False, True])
def test_gradients(form: str, before: bool) -> None:
    """Those of norm_act_conv; of mean and variance there are none."""
    x, (weight, bias, *geometry) = image(2, 16, 9, 8), Conv(16, 24, 3, 2, bias=form == "plain").arguments(torch.float32)
    known = norm(x)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias, *known[:2])]
        statistics = [t.to(dtype) for t in known[2:4]]
        first = Norm(given[3], given[4], statistics[0], statistics[1], True, None, "") if before else None
        wanted = [t for t in given[: 5 if before else 3] if t is not None]
        y = function(given[0], first, given[1], given[2], *geometry)
        pattern = torch.arange(y.numel(), device=DEVICE, dtype=torch.float64).sin().view(y.shape)
        return list(torch.autograd.grad((y * pattern.to(dtype)).sum(), wanted))

    def ours(*arguments: Any) -> Tensor:
        y, mean, variance = op.conv_statistics(*arguments)
        assert y.requires_grad and not (mean.requires_grad or variance.requires_grad)
        return y

    def parts(x: Tensor, first: Norm | None, *conv: Any) -> Tensor:
        return recompute.convolve(x, *conv) if first is None else recompute.norm_act_conv(x, first, *conv)

    with backends.use("auto") if form == "plain" else _on(form):
        mine = gradients(ours, torch.float32)
    for got, same, exact in zip(mine, gradients(parts, torch.float32), gradients(parts, torch.float64), strict=True):
        assert_obeys_error_rule(got, same, exact)


def test_each_gradient_alone() -> None:
    x, (weight, *rest) = image(2, 16, 9, 8), Conv(16, 24, 3, bias=True).arguments(torch.float32)
    known = norm(x)
    tensors = [x, known.gamma, known.beta, weight, rest[0]]

    def gradients(*wanted: int) -> list[Tensor]:
        given: list[Any] = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors) if t is not None]
        first = known._replace(gamma=given[1], beta=given[2])
        y, *_ = op.conv_statistics(given[0], first, *given[3:], *rest[1:])
        return list(torch.autograd.grad(y.square().sum(), [given[i] for i in wanted]))

    together = gradients(*range(5))
    for i, whole in enumerate(together):
        torch.testing.assert_close(gradients(i)[0], whole)


@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
def test_y_can_be_changed_in_place(size: tuple[int, int]) -> None:
    x, arguments = image(2, 4, *size), Conv(4, 6).arguments(torch.float32)
    y, *_ = op.conv_statistics(x.requires_grad_(), None, *arguments)
    y += 1
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("before", [False, True])
def test_gradients_of_gradients(before: bool) -> None:
    x, (weight, bias, *geometry) = (
        image(2, 2, 4, 3, dtype=torch.float64),
        Conv(2, 3, 3, bias=True).arguments(torch.float64),
    )
    known = norm(x)._replace(of_batch=False)

    def function(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        first = known._replace(gamma=gamma, beta=beta) if before else None
        return op.conv_statistics(x, first, weight, bias, *geometry)[0]

    given = [t.clone().requires_grad_() for t in (x, weight, bias, known.gamma, known.beta) if t is not None]
    assert torch.autograd.gradgradcheck(function, given, atol=1e-6)


def test_opcheck() -> None:
    x = image(2, 4, 5, 4).requires_grad_()
    wide, half = torch.float32, torch.bfloat16
    for dtype, before, bias in ((wide, True, True), (wide, False, False), (half, True, False)):
        weight, *rest = Conv(4, 6, 3, bias=bias).arguments(torch.float32)
        given = norm(x.detach()) if before else None
        weight.requires_grad_()
        image_of = x.detach().to(dtype).requires_grad_()
        arguments = (image_of, *(recompute.NO_NORM if given is None else given), weight, *rest)
        torch.library.opcheck(OPS.conv_statistics.default, arguments)
    vectors = torch.randn(6, device=DEVICE), torch.rand(6, device=DEVICE)
    running = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    for each in (running, (None, None)):
        torch.library.opcheck(OPS.batch_norm_from_moments.default, (*vectors, *each, 40, 0.1, EPS))


@pytest.mark.triton
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_kernel(form: str) -> None:
    x, arguments = image(2, 16, 5, 4).requires_grad_(), Conv(16, 24).arguments(torch.float32)
    with _on(form):
        for given in (recompute.NO_NORM, norm(x.detach())):
            torch.library.opcheck(OPS.conv_statistics.default, (x, *given, *arguments))
        running = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
        vectors = torch.randn(6, device=DEVICE), torch.rand(6, device=DEVICE)
        torch.library.opcheck(OPS.batch_norm_from_moments.default, (*vectors, *running, 40, 0.1, EPS))


def test_autocast_casts_x_and_rounds_the_weight() -> None:
    x, arguments = image(2, 4, 5, 4), Conv(4, 6).arguments(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, mean, _ = op.conv_statistics(x, None, *arguments)
    assert y.dtype is torch.bfloat16 and mean.dtype is torch.float32
    assert torch.equal(y, op.conv_statistics(x.bfloat16(), None, *arguments)[0])


def test_errors_name_the_argument() -> None:
    x, (weight, *rest) = image(2, 4, 5, 4), Conv(4, 6, 3).arguments(torch.float32)
    with pytest.raises(ValueError, match="x has 3 channels, weight expects 4"):
        op.conv_statistics(x[:, :3], None, weight, *rest)
    with pytest.raises(ValueError, match=r"weight has shape \[6, 4, 3, 3\], groups is 4"):
        op.conv_statistics(x, None, weight, *rest[:-1], 4)
    with pytest.raises(TypeError, match="floating point"):
        op.conv_statistics(x.int(), None, weight, *rest)
    with _on(FORMS[0]), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        op.conv_statistics(x[:, :, :1], None, weight, None, [1, 1], [0, 0], [1, 1], 1)


# --- which way


def on_a_gpu(dtype: torch.dtype = torch.float16) -> Any:
    """What ``chosen`` asks of an image on a GPU that is not there."""
    shape = torch.Size((8, 64, 14, 14))
    return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape, numel=shape.numel)


def test_the_kernel_is_taken_where_a_table_says_that_it_takes_less_time(
    no_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton.unavailable():
        pytest.skip(triton.unavailable())
    conv = Conv(64, 64, 3).arguments(torch.float32)
    x = on_a_gpu()
    with triton.assume(gpus.known("h100")):
        key = op.problem_of(x, torch.float16, conv[0], conv[2:], False).key()
        for times, first in (
            ({}, False),
            ({"ms": 1.0, "plain_ms": 1.5}, True),
            ({"ms": 1.5, "plain_ms": 1.0}, False),
            ({"ms": 1.0}, False),
            ({"plain_ms": 1.0}, False),
            ({"ms": True, "plain_ms": 2.0}, False),
            ({"ms": 0, "plain_ms": 2.0}, False),
        ):
            _tables.write(no_tables, "h100", {}, {"conv_statistics": {key: times}})
            assert op.chosen(x, False, *conv) is first, times
            assert not op.chosen(x, True, *conv)  # another problem
            assert not op.chosen(on_a_gpu(torch.bfloat16), False, *conv)
        _tables.write(no_tables, "h100", {}, {"conv_statistics": {key: {"ms": 1.0, "plain_ms": 1.5}}})
        assert op.chosen(x, False, *conv)
        assert not op.chosen(x, False, conv[0], torch.zeros(64), *conv[2:])
        for other in ("reference", "onednn"):
            with backends.use(other):
                assert not op.chosen(x, False, *conv)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
        assert op.chosen(on_a_gpu(torch.float32), False, *conv)
        assert not op.chosen(on_a_gpu(torch.float64), False, *conv)
        assert not op.chosen(image(8, 64, 14, 14).cpu().half(), False, *conv)


def test_a_bias_under_triton_is_a_fallback(launched: list[bool]) -> None:
    x, arguments = image(2, 4, 5, 4), Conv(4, 6, bias=True).arguments(torch.float32)
    with _on(FORMS[0]), pytest.warns(backends.FallbackWarning, match="no bias"):
        y, *_ = op.conv_statistics(x, None, *arguments)
    assert not launched
    assert torch.equal(y, recompute.convolve(x, *arguments))


# --- layers and blocks


class Chain(nn.Module):
    """Layers one behind the other, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = rf.nn.ConvBNAct2d(3, 16, 3, stride=2)
        self.second = rf.nn.ConvBNAct2d(16, 24, 1, bias=True)
        self.third = rf.nn.ConvBNAct2d(24, 16, 3, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.third(self.second(x), x)


def _block(kind: type[nn.Module], c: int, planes: int, lean: bool) -> nn.Module:
    width: int = planes * kind.expansion  # type: ignore[operator, assignment]
    shortcut = nn.Sequential(nn.Conv2d(c, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    made = kind(c, planes, 2, shortcut)
    made.memory_efficient = lean  # type: ignore[assignment]
    return made


MODELS: dict[str, tuple[Callable[[], nn.Module], int, list[bool]]] = {
    "layers": (Chain, 3, [False, False]),  # the one with a bias goes the plain way
    "basic": (lambda: _block(resnet.BasicBlock, 8, 8, False), 8, [False] * 3),
    "basic, lean": (lambda: _block(resnet.BasicBlock, 8, 8, True), 8, [False, False, True]),
    "bottleneck": (lambda: _block(resnet.Bottleneck, 16, 8, False), 16, [False] * 4),
    "bottleneck, lean": (lambda: _block(resnet.Bottleneck, 16, 8, True), 16, [False, False, True, True]),
}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, the gradients of x and of all parameters, and the buffers."""
    x = x.clone().requires_grad_()
    y = model(x)
    pattern = torch.arange(y.numel(), device=y.device, dtype=torch.float64).sin().view(y.shape)
    (y * pattern.to(y.dtype) + y.square() * 0.1).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")
@pytest.mark.triton
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(MODELS))
def test_training_through_the_kernel(name: str, form: str, launched: list[bool]) -> None:
    """Values, gradients and running statistics equal the plain way's; every convolution that can be is the kernel's."""
    make, channels, calls = MODELS[name]
    model = make().to(DEVICE)
    x = image(4, channels, 9, 8)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with _on(form):
        mine = step(model, x)
    assert sorted(launched) == sorted(calls)
    same, right = step(plain, x), step(exact, x.double())
    assert len(launched) == len(calls)  # by itself no kernel runs here
    assert list(mine) == list(same) == list(right)
    for key, value in mine.items():
        if not value.is_floating_point():
            assert torch.equal(value, same[key]), key
        elif key != "gradient of second.conv.bias":  # 0 but for rounding: a BatchNorm follows
            assert_obeys_error_rule(value, same[key], right[key], key)


def test_the_stem_of_a_lean_network_goes_through_the_kernel(launched: list[bool]) -> None:
    layers = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    layers[0].to(DEVICE), layers[1].to(DEVICE)
    with _on(FORMS[0]):
        y = fused.stem(image(2, 3, 17, 16), *layers, lean=True)
    assert launched == [False] and y.shape == (2, 8, 5, 4)


def test_synchronised_statistics_go_the_plain_way(monkeypatch: pytest.MonkeyPatch, launched: list[bool]) -> None:
    known: list[Any] = []
    monkeypatch.setattr(fused, "_group", lambda bn: "a group")
    monkeypatch.setattr(fused, "_norm", lambda x, bn, moments=None: known.append(moments))
    with _on(FORMS[0]):
        fused._convolved(image(2, 16, 5, 4), nn.Conv2d(16, 8, 1, bias=False).to(DEVICE), nn.SyncBatchNorm(8))
    assert known == [None] and not launched


def test_one_value_per_channel_is_refused() -> None:
    model = rf.nn.ConvBNAct2d(16, 8, 1).to(DEVICE)
    with _on(FORMS[0]), pytest.raises(ValueError, match="more than 1 value per channel"):
        model(image(1, 16, 1, 1))
