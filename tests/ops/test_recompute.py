"""The ops that keep less for the backward, against their parts: values, gradients, opcheck, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.ops import recompute
from resnet_fast.ops.batch_norm_act import constant_statistics, statistics
from resnet_fast.ops.recompute import Norm
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = torch.ops.resnet_fast
GEOMETRIES = {
    "1x1": (1, [1, 1], [0, 0], [1, 1], 1),
    "3x3 stride 2": (3, [2, 2], [1, 1], [1, 1], 1),
    "grouped, dilated": (3, [1, 1], [2, 2], [2, 2], 2),
}


def norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, of_batch: bool) -> Norm:
    """A BatchNorm for x, from x or from some stored statistics."""
    if of_batch:
        mean, invstd, _ = statistics(x)
    else:
        c = x.shape[1]
        stored = torch.linspace(-1, 1, c, dtype=x.dtype), torch.linspace(0.5, 2, c, dtype=x.dtype)
        mean, invstd, _ = constant_statistics(
            *(t.to(torch.promote_types(x.dtype, torch.float32)) for t in stored), 1e-5
        )
    return Norm(gamma, beta, mean, invstd, of_batch, None, "")


def plain_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, of_batch: bool) -> Tensor:
    if of_batch:
        return F.batch_norm(x, None, None, gamma, beta, True)
    c, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    stored = (t.to(x.dtype).to(dtype) for t in (torch.linspace(-1, 1, c), torch.linspace(0.5, 2, c)))
    if x.dtype is torch.float64:
        stored = (torch.linspace(-1, 1, c, dtype=x.dtype), torch.linspace(0.5, 2, c, dtype=x.dtype))
    return F.batch_norm(x, *stored, gamma, beta, False)


def arguments(c: int, k: int, kernel: int, groups: int, dtype: torch.dtype, size: int = 6) -> dict[str, Tensor]:
    """Leaves that ask for gradients; positive betas, so that few ReLUs are near their kink."""
    made = {
        "x": torch.randn(2, c, size, size - 1, dtype=torch.float64),
        "gamma": torch.rand(c, dtype=torch.float64) + 0.5,
        "beta": torch.rand(c, dtype=torch.float64),
        "weight": torch.randn(k, c // groups, kernel, kernel, dtype=torch.float64) / kernel,
        "bias": torch.randn(k, dtype=torch.float64),
        "gamma1": torch.rand(k, dtype=torch.float64) + 0.5,
        "beta1": torch.randn(k, dtype=torch.float64),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def first(of_batch: bool, geometry: tuple[Any, ...], a: dict[str, Tensor], ours: bool) -> Tensor:
    """norm_act_conv, or its parts."""
    if ours:
        before = norm(a["x"], a["gamma"], a["beta"], of_batch)
        return recompute.norm_act_conv(a["x"], before, a["weight"], a["bias"], *geometry)
    h = plain_norm(a["x"], a["gamma"], a["beta"], of_batch).relu()
    return F.conv2d(h, a["weight"], a["bias"], *geometry)


def second(of_batch: bool, geometry: tuple[Any, ...], a: dict[str, Tensor], ours: bool) -> Tensor:
    """conv_norm_act behind a norm, or its parts."""
    if ours:
        before = norm(a["x"], a["gamma"], a["beta"], of_batch)
        with torch.no_grad():
            y = recompute.norm_act_conv(a["x"], before, a["weight"], a["bias"], *geometry)
        behind = norm(y, a["gamma1"], a["beta1"], of_batch)
        return recompute.conv_norm_act(
            y, a["x"], before, a["weight"], a["bias"], *geometry, behind, a.get("residual"), "relu"
        )
    z = plain_norm(first(of_batch, geometry, a, False), a["gamma1"], a["beta1"], of_batch)
    return (z if "residual" not in a else z + a["residual"]).relu()


def third(of_batch: bool, geometry: tuple[Any, ...], a: dict[str, Tensor], ours: bool) -> Tensor:
    """conv_norm_act of a plain input and without an activation, as a projection shortcut has it, or its parts."""
    if ours:
        with torch.no_grad():
            y = F.conv2d(a["x"], a["weight"], None, *geometry)
        behind = norm(y, a["gamma1"], a["beta1"], of_batch)
        return recompute.conv_norm_act(y, a["x"], None, a["weight"], None, *geometry, behind, None, "none")
    return plain_norm(F.conv2d(a["x"], a["weight"], None, *geometry), a["gamma1"], a["beta1"], of_batch)


def pooled(of_batch: bool, geometry: tuple[Any, ...], a: dict[str, Tensor], ours: bool) -> Tensor:
    if ours:
        return recompute.norm_act_pool(a["x"], norm(a["x"], a["gamma"], a["beta"], of_batch))
    return F.max_pool2d(plain_norm(a["x"], a["gamma"], a["beta"], of_batch).relu(), 3, 2, 1)


CASES = [first, second, third, pooled]


def made(
    name: str, dtype: torch.dtype, function: Callable[..., Tensor], c: int, k: int
) -> tuple[Any, dict[str, Tensor]]:
    kernel, *geometry = GEOMETRIES[name]
    a = arguments(c, k, kernel, geometry[3], dtype)
    if function is second:
        shape = F.conv2d(a["x"], a["weight"], None, *geometry).shape
        a["residual"] = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    return tuple(geometry), a


@pytest.mark.parametrize("function", CASES)
@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients(geometry: str, of_batch: bool, function: Callable[..., Tensor]) -> None:
    options, a = made(geometry, torch.float32, function, 32, 64)
    wide = {name: value.detach().double().requires_grad_() for name, value in a.items()}

    def run(given: dict[str, Tensor], ours: bool) -> list[Tensor]:
        given = {
            n: t.detach().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.detach()
            for n, t in given.items()
        }
        given = {name: value.requires_grad_() for name, value in given.items()}
        out = function(of_batch, options, given, ours)
        pattern = torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
        pattern = pattern.contiguous(memory_format=torch.channels_last)
        return [out.detach(), *torch.autograd.grad(out, list(given.values()), pattern, allow_unused=True)]

    found, same, exact = run(a, True), run(a, False), run(wide, False)
    largest = max(e.norm() for e in exact if e is not None)
    for name, x, y, z in zip(["out", *a], found, same, exact, strict=True):
        assert (x is None) == (z is None), name
        if x is None or z is None or y is None:
            continue
        if z.norm() < 1e-10 * largest:  # a bias in front of a norm of the batch: rounding alone
            assert x.norm() <= 1e-5 * largest, name
        else:
            assert_obeys_error_rule(x, y, z, name)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("function", CASES)
@pytest.mark.parametrize("of_batch", [True, False])
def test_gradcheck(of_batch: bool, function: Callable[..., Tensor]) -> None:
    options, a = made("3x3 stride 2" if function is second else "1x1", torch.float64, function, 2, 3)
    total = function(of_batch, options, a, False).sum()
    found = torch.autograd.grad(total, list(a.values()), allow_unused=True)
    used = [name for name, gradient in zip(a, found, strict=True) if gradient is not None]

    def call(*tensors: Tensor) -> Tensor:
        return function(of_batch, options, a | dict(zip(used, tensors, strict=True)), True)

    inputs = tuple(a[name] for name in used)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=function is not pooled)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("function", CASES)
def test_only_what_is_asked_for(function: Callable[..., Tensor]) -> None:
    """Each gradient alone has the bits that it has among all."""
    options, a = made("1x1", torch.float32, function, 4, 6)
    whole = torch.autograd.grad(function(True, options, a, True).square().sum(), list(a.values()), allow_unused=True)
    for name, wanted in zip(a, whole, strict=True):
        if wanted is None:
            continue
        alone = {other: value.detach().requires_grad_(other == name) for other, value in a.items()}
        function(True, options, alone, True).square().sum().backward()
        assert torch.equal(alone[name].grad, wanted), name
        assert all(value.grad is None for other, value in alone.items() if other != name)


def test_opcheck() -> None:
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    a = arguments(3, 4, 3, 1, torch.float32)
    before = norm(a["x"], a["gamma"], a["beta"], True)
    torch.library.opcheck(OPS.norm_act_conv.default, (a["x"], *before, a["weight"], a["bias"], *geometry))
    torch.library.opcheck(OPS.norm_act_pool.default, (a["x"], *before, False))
    torch.library.opcheck(
        OPS.conv_again.default, (a["x"].detach(), a["weight"].detach(), a["bias"].detach(), *geometry)
    )
    y = recompute.norm_act_conv(a["x"], before, a["weight"], a["bias"], *geometry).detach()
    behind, residual = norm(y, a["gamma1"], a["beta1"], True), torch.randn_like(y).requires_grad_()
    conv = (a["weight"], a["bias"], *geometry)
    torch.library.opcheck(OPS.conv_norm_act.default, (y, a["x"], *before, *conv, *behind, residual, "relu"))
    nothing = (None, None, None, None, False, None, "")
    torch.library.opcheck(OPS.conv_norm_act.default, (y, a["x"], *nothing, *conv, *behind, None, "none"))


@pytest.mark.parametrize(("function", "kept"), [(first, 1), (second, 2), (third, 1), (pooled, 1)])
def test_what_is_kept(function: Callable[..., Tensor], kept: int) -> None:
    """Of images the input, and the output where a ReLU's mask is read off it; never the convolution's result."""
    options, a = made("1x1", torch.float32, function, 4, 6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function(True, options, a, True)
    parameters = {a[name].data_ptr() for name in a if name not in ("x", "residual")}
    images = {t.data_ptr() for t in saved if t.dim() == 4} - parameters
    assert len(images) == kept
    assert images <= {a["x"].data_ptr(), out.data_ptr()}


def test_autocast() -> None:
    """The convolution runs in bfloat16, what is kept of the weight is the float32 parameter, gradients are float32."""
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    a = arguments(4, 6, 3, 1, torch.float32)
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        out = recompute.norm_act_conv(a["x"], norm(a["x"], a["gamma"], a["beta"], True), a["weight"], None, *geometry)
    assert out.dtype is torch.bfloat16
    assert [t.dtype for t in saved if t.shape == a["weight"].shape] == [torch.float32]
    out.float().square().sum().backward()
    assert all(a[name].grad.dtype is torch.float32 for name in ("x", "gamma", "beta", "weight"))


def test_one_tensor_in_two_places() -> None:
    """Gradients of gradients where both norms of an op share their parameters."""
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    a = {name: t.detach() for name, t in arguments(3, 3, 1, 1, torch.float64, 3).items()}

    def tied(gamma: Tensor, ours: bool) -> Tensor:
        before = norm(a["x"], gamma, a["beta"], True)
        with torch.no_grad():
            y = recompute.norm_act_conv(a["x"], before, a["weight"], None, *geometry)
        if ours:
            behind = norm(y, gamma, a["beta1"], True)
            return recompute.conv_norm_act(y, a["x"], before, a["weight"], None, *geometry, behind, None, "none")
        h = plain_norm(a["x"], gamma, a["beta"], True).relu()
        return plain_norm(F.conv2d(h, a["weight"]), gamma, a["beta1"], True)

    found = []
    for ours in (True, False):
        gamma = a["gamma"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(tied(gamma, ours).square().sum(), gamma, create_graph=True)
        found.append((gradient.detach(), torch.autograd.grad(gradient.square().sum(), gamma)[0]))
    torch.testing.assert_close(found[0], found[1])
