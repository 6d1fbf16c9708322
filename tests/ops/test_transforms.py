"""The ops under torch.func: vmap, grad and jvp give what plain torch in float64 gives, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf

OPS = rf.ops


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def vectors(channels: int) -> dict[str, Tensor]:
    return {"scale": torch.rand(channels, dtype=torch.float64) + 0.5, "shift": rand(channels)}


def _conv(late: bool = False, **geometry: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    constants = {"weight": rand(6, 4, 3, 3), **vectors(6)}
    data = {"x": rand(3, 2, 4, 7, 5), "residual": rand(3, 2, 6, 7, 5)}
    return lambda x, residual: OPS.conv_bn_act(
        x, **constants, residual=residual, padding=1, residual_after_activation=late, **geometry
    ), data


def _stem(ceil_mode: bool) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    constants = {"weight": rand(6, 3, 7, 7), **vectors(6)}
    return lambda x: OPS.stem(x, **constants, ceil_mode=ceil_mode), {"x": rand(3, 2, 3, 17, 13)}


def _head() -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    weight, bias = rand(5, 8), rand(5)
    return lambda x: OPS.head(x, weight, bias), {"x": rand(3, 2, 8, 4, 3)}


def _norm(training: bool) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    gamma, beta, mean, var = torch.rand(4, 6, dtype=torch.float64) + 0.5
    running = {} if training else {"running_mean": mean, "running_var": var}
    return lambda x, residual: OPS.batch_norm_act(
        x, gamma, beta, **running, residual=residual, training=training
    ), {"x": rand(3, 2, 6, 4, 5), "residual": rand(3, 2, 6, 4, 5)}  # fmt: skip


def _tail(following: bool) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    constants = {"weight2": rand(4, 4, 3, 3), "weight3": rand(8, 4, 1, 1), "weight_shortcut": rand(8, 6, 1, 1)}
    for suffix, channels in (("2", 4), ("3", 8), ("_shortcut", 8)):
        constants |= {f"{name}{suffix}": vector for name, vector in vectors(channels).items()}
    if following:
        constants |= {"weight1": rand(4, 8, 1, 1), **{f"{name}1": vector for name, vector in vectors(4).items()}}

    def run(a: Tensor, residual: Tensor) -> Tensor:
        out = OPS.bottleneck_tail(a=a, residual=residual, **constants)
        return torch.cat(out, -3) if isinstance(out, tuple) else out

    return run, {"a": rand(3, 2, 4, 5, 5), "residual": rand(3, 2, 6, 5, 5)}


CASES: dict[str, Callable[[], tuple[Callable[..., Tensor], dict[str, Tensor]]]] = {
    "conv_bn_act": _conv,
    "conv_bn_act, residual after": lambda: _conv(late=True),
    "conv_bn_act without activation": lambda: _conv(activation="none"),
    "stem": lambda: _stem(False),
    "stem, ceil": lambda: _stem(True),
    "head": _head,
    "add_act": lambda: (OPS.add_act, {"x": rand(3, 2, 4, 5), "y": rand(3, 2, 4, 5)}),
    "batch_norm_act": lambda: _norm(False),
    "batch_norm_act, training": lambda: _norm(True),
    "bottleneck_tail": lambda: _tail(False),
    "bottleneck_tail and the next 1x1": lambda: _tail(True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    function, data = CASES[request.param]()
    return function, tuple(data.values())


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_vmap(case: tuple[Callable[..., Tensor], tuple[Tensor, ...]]) -> None:
    function, data = case
    expected = torch.stack([function(*each) for each in zip(*data, strict=True)])
    assert close(torch.func.vmap(function)(*data), expected)
    moved = tuple(each.movedim(0, 2) for each in data)
    assert close(torch.func.vmap(function, in_dims=2, out_dims=1)(*moved), expected.movedim(0, 1))


def test_grad_and_gradients_of_each_image(case: tuple[Callable[..., Tensor], tuple[Tensor, ...]]) -> None:
    function, data = case
    first = tuple(each[0].clone().requires_grad_() for each in data)
    expected = torch.autograd.grad(function(*first).square().sum(), first)
    found = torch.func.grad(lambda *each: function(*each).square().sum(), argnums=tuple(range(len(data))))
    assert all(close(a, b) for a, b in zip(found(*(each[0] for each in data)), expected, strict=True))
    of_each = torch.func.vmap(found)(*data)
    assert all(close(a[0], b) for a, b in zip(of_each, expected, strict=True))


def test_jvp(case: tuple[Callable[..., Tensor], tuple[Tensor, ...]]) -> None:
    """The derivative in a direction is the gradient's product with it."""
    function, data = case
    first = tuple(each[0] for each in data)
    tangents = tuple(torch.randn_like(each) for each in first)
    output, derivative = torch.func.jvp(function, first, tangents)
    assert close(output, function(*first))
    leaves = tuple(each.clone().requires_grad_() for each in first)
    weights = torch.randn_like(output)
    grads = torch.autograd.grad((function(*leaves) * weights).sum(), leaves)
    along = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True))
    assert torch.allclose((derivative * weights).sum(), torch.as_tensor(along), rtol=1e-10, atol=1e-10)
