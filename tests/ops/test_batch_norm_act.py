"""batch_norm_act against torch's layers: values, gradients, running statistics, special values, errors, kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends
from tests import cuda_device, triton_device
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]

OPS = torch.ops.resnet_fast
MODES = list(itertools.product([True, False], [True, False], [True, False], ["relu", "none"]))


def problem(shape: tuple[int, ...], affine: bool = True, residual: bool = True, mean: float = 0.3) -> dict[str, Any]:
    """Random float64 arguments."""
    c = shape[1]
    made: dict[str, Any] = {"x": torch.randn(shape, dtype=torch.float64) + mean, "gamma": None, "beta": None}
    if affine:
        made |= {"gamma": torch.rand(c, dtype=torch.float64) + 0.5, "beta": torch.randn(c, dtype=torch.float64)}
    made |= {
        "running_mean": torch.randn(c, dtype=torch.float64),
        "running_var": torch.rand(c, dtype=torch.float64) + 0.5,
    }
    return made | {"residual": torch.randn(shape, dtype=torch.float64) if residual else None}


def plain(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None, training: bool, momentum: float, activation: str, after: bool = False,
) -> Tensor:  # fmt: skip
    """torch's layers, each rounding to x's dtype."""
    y = F.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, 1e-5)
    if residual is not None and not after:
        y = y + residual
    y = y.relu() if activation == "relu" else y
    return y + residual if residual is not None and after else y


def ours(*arguments: Any) -> Tensor:
    *first, training, momentum, activation, after = arguments
    return rf.ops.batch_norm_act(*first, training, momentum, 1e-5, activation, after)


def run(function: Any, arguments: dict[str, Any], grad: Tensor, *options: Any) -> dict[str, Tensor]:
    """The result, every gradient and the running statistics that ``function`` leaves behind."""
    given = {
        name: None if value is None else value.clone().requires_grad_("running" not in name)
        for name, value in arguments.items()
    }
    out = function(*given.values(), *options)
    differentiable = {name: value for name, value in given.items() if value is not None and value.requires_grad}
    gradients = torch.autograd.grad(out, list(differentiable.values()), grad)
    found = {"out": out.detach()} | {
        f"gradient of {name}": g for name, g in zip(differentiable, gradients, strict=True)
    }
    return found | {name: value for name, value in given.items() if value is not None and "running" in name}


def check(
    arguments: dict[str, Any], dtype: torch.dtype, training: bool = True, activation: str = "relu",
    momentum: float = 0.1, after: bool = False, memory_format: torch.memory_format = torch.channels_last,
    device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Ours and torch's in ``dtype`` (vectors in float32 beside halves) on the same rounded inputs, by the error rule.

    memory_format: of ours' images; torch's, whose float32 sums depend on it, are channels_last as ours' will be.
    """
    vector = dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def rounded(t: Tensor | None, layout: torch.memory_format) -> Tensor | None:
        if t is None:
            return None
        t = t.to(device)
        return t.to(vector) if t.dim() == 1 else t.to(dtype).contiguous(memory_format=layout)

    narrow, given = (
        {name: rounded(t, layout) for name, t in arguments.items()} for layout in (torch.channels_last, memory_format)
    )
    wide = {name: None if t is None else t.double() for name, t in narrow.items()}
    grad = rounded(torch.randn(arguments["x"].shape), torch.channels_last)
    assert grad is not None
    options = (training, momentum, activation, after)
    mine = run(ours, given, grad.contiguous(memory_format=memory_format), *options)
    same, exact = run(plain, narrow, grad, *options), run(plain, wide, grad.double(), *options)
    for name, value in mine.items():
        assert_obeys_error_rule(value, same[name], exact[name], f"{name} ({dtype}, {options})")
    assert mine["out"].is_contiguous(memory_format=torch.channels_last)
    return mine


@pytest.mark.parametrize(("training", "affine", "residual", "activation"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modes(dtype: torch.dtype, training: bool, affine: bool, residual: bool, activation: str) -> None:
    check(problem((3, 17, 13, 11), affine, residual), dtype, training, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 7, 7), (2, 3, 1, 1), (1, 64, 97, 131), (3, 48, 1, 9), (5, 2048, 2, 2)])
def test_sizes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(problem(shape), dtype)
    check(problem(shape), dtype, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_behind_the_activation(dtype: torch.dtype) -> None:
    for training in (True, False):
        check(problem((2, 5, 9, 9)), dtype, training, after=True)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum(momentum: float) -> None:
    check(problem((2, 5, 9, 9)), torch.float32, momentum=momentum)


def test_without_running_statistics() -> None:
    arguments = problem((2, 5, 9, 9))
    check(arguments | {"running_mean": None, "running_var": None}, torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_batches_leave_running_statistics_alone(shape: tuple[int, ...]) -> None:
    arguments = {name: None if t is None else t.float() for name, t in problem(shape).items()}
    found = run(ours, arguments, torch.empty(shape), True, 0.1, "relu", False)
    assert found["out"].shape == shape
    assert torch.equal(found["running_mean"], arguments["running_mean"])
    assert torch.equal(found["running_var"], arguments["running_var"])
    assert torch.equal(found["gradient of gamma"], torch.zeros(3))


def test_running_statistics_in_half_precision() -> None:
    """A model that was converted as a whole, ``model.bfloat16()``: vectors and statistics are bfloat16 too."""
    arguments = {name: None if t is None else t.bfloat16() for name, t in problem((4, 6, 9, 9)).items()}
    grad = torch.randn(4, 6, 9, 9).bfloat16()
    mine, same = (run(f, arguments, grad, True, 0.1, "relu", *rest) for f, *rest in ((ours, False), (plain,)))
    wide = {name: None if t is None else t.double() for name, t in arguments.items()}
    exact = run(plain, wide, grad.double(), True, 0.1, "relu")
    for name, value in mine.items():
        assert_obeys_error_rule(value, same[name], exact[name], name)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 0.01), (1000.0, 0.01), (-50.0, 1.0)])
def test_a_mean_far_above_the_deviation(mean: float, deviation: float, memory_format: torch.memory_format) -> None:
    """No cancellation: statistics within 1e-3 of float64 (in fact 1e-6), the output at most twice torch's error."""
    x = (torch.randn(8, 16, 28, 28, dtype=torch.float64) * deviation + mean).float()
    x = x.contiguous(memory_format=memory_format)
    centre, invstd, _ = OPS.batch_norm_statistics(x, None, None, 0.1, 1e-5, "")
    var, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert (centre.double() - exact).abs().max() <= 6e-8 * abs(mean)
    assert (invstd.double() * (var + 1e-5).sqrt() - 1).abs().max() <= 1e-6
    out = rf.ops.batch_norm_act(x, training=True, activation="none")
    wanted = F.batch_norm(x.double(), None, None, training=True)
    for layout in (torch.channels_last, torch.contiguous_format):  # torch is not equally exact in both
        same = F.batch_norm(x.contiguous(memory_format=layout), None, None, training=True)
        assert_obeys_error_rule(out, same, wanted, f"{layout}")


def test_statistics_of_many_pixels_are_not_worse_than_torchs() -> None:
    x = torch.randn(16, 24, 56, 56).contiguous(memory_format=torch.channels_last)
    mean, invstd, _ = OPS.batch_norm_statistics(x, None, None, 0.1, 1e-5, "")
    var, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_obeys_error_rule(invstd, torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[2],
                            (var + 1e-5).rsqrt(), "invstd")  # fmt: skip
    assert (mean.double() - exact).norm() <= 1e-7 * var.sqrt().norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_special_values_go_where_torch_lets_them_go(value: float, training: bool) -> None:
    arguments = problem((2, 4, 5, 5))
    arguments["x"][1, 2, 3, 4] = value
    arguments["residual"][0, 1, 2, 3] = value
    if not training:
        arguments["running_mean"][3] = value
    grad = torch.randn(2, 4, 5, 5)
    narrow = {name: t.float() for name, t in arguments.items()}
    mine = run(ours, narrow, grad, training, 0.1, "relu", False)
    for name, expected in run(plain, narrow, grad, training, 0.1, "relu").items():
        assert torch.equal(mine[name].isnan(), expected.isnan()), name
        assert torch.equal(mine[name].isinf(), expected.isinf()), name
    assert mine["out"].isnan().any() or value == -float("inf") or not training


@pytest.mark.parametrize(("training", "affine", "residual", "activation"), MODES)
def test_gradcheck(training: bool, affine: bool, residual: bool, activation: str) -> None:
    arguments = problem((2, 2, 2, 2), affine, residual)
    running = arguments.pop("running_mean"), arguments.pop("running_var")
    names = [name for name, value in arguments.items() if value is not None]
    for after in (False, True) if residual else (False,):

        def function(*tensors: Tensor, after: bool = after) -> Tensor:
            given = dict.fromkeys(arguments) | dict(zip(names, tensors, strict=True))
            statistics = (None, None) if training else running
            return ours(given["x"], given["gamma"], given["beta"], *statistics, given["residual"], training, 0.1,
                        activation, after)  # fmt: skip

        inputs = tuple(arguments[name].requires_grad_() for name in names)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("needed", ["x", "gamma", "beta", "residual"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_part(needed: str, training: bool) -> None:
    """What is not asked for is not computed, and what is is the same."""
    arguments = {name: t.float() for name, t in problem((2, 4, 6, 6)).items()}
    grad = torch.randn(2, 4, 6, 6)
    options = (training, 0.1, "relu", False)
    wanted = run(ours, arguments, grad, *options)[f"gradient of {needed}"]
    arguments[needed].requires_grad_()
    ours(*arguments.values(), *options).backward(grad)
    assert torch.equal(arguments[needed].grad, wanted)
    assert all(t.grad is None for name, t in arguments.items() if name != needed)


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool) -> None:
    for dtype, residual, activation in ((torch.float32, True, "relu"), (torch.float32, False, "none"),
                                        (torch.bfloat16, True, "relu")):  # fmt: skip
        x = torch.randn(2, 3, 5, 4).to(dtype).requires_grad_()
        gamma, beta = (torch.rand(3, requires_grad=True) for _ in range(2))
        mean, invstd = torch.randn(3), torch.rand(3) + 0.5
        added = torch.randn(2, 3, 5, 4).to(dtype).requires_grad_() if residual else None
        torch.library.opcheck(
            OPS.batch_norm_act.default, (x, gamma, beta, mean, invstd, added, activation, training, None, "")
        )
        output = x.detach().relu() if activation == "relu" else None
        torch.library.opcheck(
            OPS.batch_norm_act_backward.default,
            (
                x.detach() + 1,
                x.detach(),
                output,
                gamma.detach(),
                mean,
                invstd,
                training,
                None,
                "",
                True,
                True,
                residual,
            ),
        )
    running = torch.zeros(3), torch.ones(3)
    torch.library.opcheck(OPS.batch_norm_statistics.default, (torch.randn(2, 3, 5, 4), *running, 0.1, 1e-5, ""))
    torch.library.opcheck(OPS.batch_norm_statistics.default, (torch.randn(2, 3, 5, 4), None, None, 0.1, 1e-5, ""))


def test_running_statistics_count_as_changed() -> None:
    running = torch.zeros(3), torch.ones(3)
    OPS.batch_norm_statistics(torch.randn(2, 3, 5, 4), *running, 0.1, 1e-5, "")
    assert [t._version for t in running] == [1, 1]


def test_autocast_leaves_x_and_casts_the_residual() -> None:
    x, residual = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = rf.ops.batch_norm_act(x, residual=residual.bfloat16(), training=True)
        assert out.dtype is torch.bfloat16
        cast = OPS.batch_norm_act(x, None, None, torch.zeros(3), torch.ones(3), residual, "relu", True, None, "")
        assert cast.dtype is torch.bfloat16
        assert rf.ops.batch_norm_act(x.float(), residual=residual, training=True).dtype is torch.float32


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 4, 1, 1), (2, 4, 3, 3)])
def test_results_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = rf.ops.batch_norm_act(x, training=True, activation="none")
    out += 1
    out.sum().backward()
    weight, vector = torch.randn(3, shape[1], 1, 1, requires_grad=True), torch.ones(3)
    out = rf.ops.conv_bn_act(x, weight, vector, vector, activation="none")
    out += 1
    out.sum().backward()
    assert weight.grad is not None


def test_torch_func_and_forward_mode() -> None:
    arguments = problem((2, 3, 4, 4))
    x, gamma, beta = (arguments[name] for name in ("x", "gamma", "beta"))

    def loss(x: Tensor, gamma: Tensor, beta: Tensor, function: Any = rf.ops.batch_norm_act) -> Tensor:
        return function(x, gamma, beta, training=True).square().sum()

    def layers(x: Tensor, gamma: Tensor, beta: Tensor, training: bool) -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training).relu()

    mine = torch.func.grad(loss, (0, 1, 2))(x, gamma, beta)
    theirs = torch.func.grad(lambda *a: loss(*a, layers), (0, 1, 2))(x, gamma, beta)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    tangents = tuple(torch.randn_like(t) for t in (x, gamma, beta))
    _, mine_jvp = torch.func.jvp(loss, (x, gamma, beta), tangents)
    torch.testing.assert_close(mine_jvp, sum((g * t).sum() for g, t in zip(theirs, tangents, strict=True)))


def _bad(change: dict[str, Any]) -> dict[str, Any]:
    return {name: None if t is None else t.float() for name, t in problem((2, 4, 5, 5)).items()} | change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(4, 5)}, ValueError, "x must be 4-D"),
        ({"x": torch.ones(2, 4, 5, 5, dtype=torch.int64)}, TypeError, "floating point"),
        ({"gamma": torch.ones(3)}, ValueError, r"gamma has shape \[3\], x has 4 channels"),
        ({"beta": torch.ones(4, dtype=torch.float64)}, TypeError, "beta is torch.float64"),
        ({"residual": torch.randn(2, 4, 5, 6)}, ValueError, "residual is"),
        ({"residual": torch.randn(2, 4, 5, 5).double()}, ValueError, "residual is torch.float64"),
        ({"running_var": None}, ValueError, "both"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "needs running_mean"),
        ({"x": torch.randn(1, 4, 1, 1), "residual": None}, ValueError, "more than 1 value"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"gamma": torch.ones(4, device="meta")}, ValueError, "gamma is on meta"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"training": True} | _bad(change)
    with pytest.raises(error, match=words):
        rf.ops.batch_norm_act(**arguments)


# --- on kernels


def _forms() -> Iterator[Any]:
    yield pytest.param("reference", id="reference")
    for form in triton_device.FORMS[:1]:
        yield pytest.param(form, marks=pytest.mark.triton, id="triton")
    yield pytest.param("cuda", marks=pytest.mark.cuda, id="cuda")


@contextmanager
def _on(form: str) -> Iterator[None]:
    """The ops run this form, and nothing falls back to another."""
    kinds = {"reference": lambda: backends.use("reference"), "cuda": cuda_device.kernels}
    before = backends.fallbacks()
    with kinds[form]() if form in kinds else triton_device.kernels(form):
        yield
    assert backends.fallbacks() == before


DEVICES = {"reference": "cpu", "cuda": cuda_device.DEVICE}


@pytest.mark.parametrize("form", list(_forms()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_kernels(form: str, dtype: torch.dtype) -> None:
    device = DEVICES.get(form, triton_device.DEVICE)
    with _on(form):
        for mode in ((True, True, True, "relu"), (True, False, False, "none"), (False, True, True, "relu")):
            training, affine, residual, activation = mode
            check(problem((2, 24, 7, 9), affine, residual), dtype, training, activation, device=device)
        check(problem((3, 37, 4, 3)), dtype, memory_format=torch.contiguous_format, device=device)
        x = torch.randn(1, 6, 8, 4).to(device, dtype)
        running = torch.zeros(6, device=device), torch.ones(6, device=device)
        torch.library.opcheck(OPS.batch_norm_statistics.default, (x, *running, 0.1, 1e-5, ""))


@pytest.mark.parametrize("form", list(_forms()))
def test_on_kernels_with_running_statistics_in_half_precision(form: str) -> None:
    """Kernels update float32 only; the variance then comes back out of the inverse deviation, also if it is 0."""
    device = DEVICES.get(form, triton_device.DEVICE)
    x = torch.randn(2, 48, 8, 8).bfloat16()
    x[:, 1] = 3.0
    mine, same = ((torch.zeros(48).bfloat16(), torch.ones(48).bfloat16()) for _ in range(2))
    exact = torch.zeros(48).double(), torch.ones(48).double()
    on_device = tuple(t.to(device) for t in mine)
    with _on(form):
        rf.ops.batch_norm_act(x.to(device), None, None, *on_device, training=True)
    F.batch_norm(x.double(), *exact, training=True)
    F.batch_norm(x, *same, training=True)
    for a, b, e in zip(on_device, same, exact, strict=True):
        assert_obeys_error_rule(a.cpu(), b, e)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.5, "eps": 1e-3}],
)
def test_modules(options: dict[str, Any]) -> None:
    """BNAct2d, three steps in train mode, then eval mode: results, running statistics and counters."""
    mine, theirs, exact = (
        rf.nn.BNAct2d(96, **options),
        nn.BatchNorm2d(96, **options),
        nn.BatchNorm2d(96, **options).double(),
    )
    for training in (True, True, True, False):
        for module in (mine, theirs, exact):
            module.train(training)
        x, residual = (torch.randn(2, 96, 5, 5).add(0.5).to(memory_format=torch.channels_last) for _ in range(2))
        results = [mine(x, residual), (theirs(x) + residual).relu(), (exact(x.double()) + residual.double()).relu()]
        assert_obeys_error_rule(*results)
    for name, value in theirs.state_dict().items():
        ours_now = mine.state_dict()[f"bn.{name}"]
        if value.is_floating_point():
            assert_obeys_error_rule(ours_now, value, exact.state_dict()[name], name)
        else:
            assert torch.equal(ours_now, value)


def test_modules_show_what_they_skip() -> None:
    """A hook fires; a frozen norm is fused; a norm of another kind is called."""
    module, seen = rf.nn.BNAct2d(4), []
    module.bn.register_forward_hook(lambda *_: seen.append("bn"))
    before = sum(backends.fallbacks().values())
    module(torch.randn(2, 4, 3, 3))
    assert seen == ["bn"] and sum(backends.fallbacks().values()) > before
    module = rf.nn.BNAct2d(4, norm_layer=lambda channels: nn.GroupNorm(2, channels))
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(module(x), nn.functional.group_norm(x, 2, torch.ones(4), torch.zeros(4)).relu())
    with pytest.raises(ValueError, match="norm_layer"):
        rf.nn.BNAct2d(4, eps=1.0, norm_layer=nn.BatchNorm2d)


def test_frozen_batch_norm() -> None:
    """By itself, from a BatchNorm2d, with the state of one, beside torchvision's."""
    from torchvision.ops import FrozenBatchNorm2d

    bn = nn.BatchNorm2d(4)
    bn(torch.randn(8, 4, 3, 3) * 2 + 1)
    nn.init.normal_(bn.weight)
    frozen = rf.nn.FrozenBatchNorm2d.convert(nn.Sequential(bn))[0]
    theirs = FrozenBatchNorm2d(4)
    theirs.load_state_dict(bn.state_dict())
    loaded = rf.nn.FrozenBatchNorm2d(4)
    loaded.load_state_dict(bn.state_dict())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    wanted = theirs(x)
    for module in (frozen, loaded, rf.nn.BNAct2d(4, activation=False, norm_layer=lambda _: theirs)):
        module.train()
        torch.testing.assert_close(module(x), wanted, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(module(x).square().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(theirs(x).square().sum(), x)[0], rtol=1e-5, atol=1e-5)
    assert not list(frozen.parameters()) and set(frozen.state_dict()) == set(theirs.state_dict())
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1), rf.nn.BNAct2d(4)))
    assert {type(module) for module in traced.modules()} >= {nn.BatchNorm2d, nn.ReLU}
    with pytest.raises(ValueError, match="running statistics"):
        rf.nn.FrozenBatchNorm2d.convert(nn.BatchNorm2d(4, track_running_stats=False))
