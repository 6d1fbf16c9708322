"""The declaration of an op: schemas, and when a call goes to the implementation without torch's dispatcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast as rf
from resnet_fast import ops
from resnet_fast.ops import _op

_NORM = "Tensor? gamma, Tensor? beta, Tensor mean, Tensor invstd, bool of_batch, Tensor? count, str group"
_BEFORE = _NORM.replace("Tensor m", "Tensor? m").replace("Tensor i", "Tensor? i")
_CONV = "Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
SCHEMAS = {
    "conv_bn_act": "Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, bool residual_after_activation) -> Tensor",
    "stem": "Tensor x, Tensor weight, Tensor scale, Tensor shift, float[]? mean, float[]? std, bool ceil_mode) "
    "-> Tensor",
    "head": "Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "add_act": "Tensor x, Tensor y, str activation) -> Tensor",
    "add_act_backward": "Tensor grad, Tensor output) -> Tensor",
    "bottleneck_tail": "Tensor a, Tensor weight2, Tensor scale2, Tensor shift2, Tensor weight3, Tensor scale3, "
    "Tensor shift3, Tensor residual, Tensor? weight_shortcut, Tensor? scale_shortcut, Tensor? shift_shortcut, "
    "Tensor? weight1, Tensor? scale1, Tensor? shift1, SymInt[] stride, SymInt[] shortcut_stride) -> (Tensor, Tensor)",
    "batch_norm_statistics": "Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, "
    "str group) -> (Tensor, Tensor, Tensor)",
    "batch_norm_from_moments": "Tensor mean, Tensor variance, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "SymInt rows, float momentum, float eps) -> Tensor",
    "batch_norm_act": "Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor invstd, Tensor? residual, "
    "str activation, bool of_batch, Tensor? count, str group) -> Tensor",
    "batch_norm_act_backward": "Tensor grad, Tensor x, Tensor? output, Tensor? gamma, Tensor mean, Tensor invstd, "
    "bool of_batch, Tensor? count, str group, bool need_x, bool need_sums, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "conv_again": f"Tensor x, {_CONV}) -> Tensor",
    "conv_statistics": f"Tensor x, {_BEFORE}, {_CONV}) -> (Tensor, Tensor, Tensor)",
    "norm_act_conv": f"Tensor x, {_NORM}, {_CONV}) -> Tensor",
    "conv_norm_act": f"Tensor y, Tensor x, {_BEFORE.replace(',', '0,')}0, {_CONV}, {_NORM}, Tensor? residual, "
    "str activation) -> Tensor",
    "norm_act_pool": f"Tensor x, {_NORM}, bool ceil_mode) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_what_exported_programs_hold(name: str) -> None:
    assert str(getattr(torch.ops.resnet_fast, name).default._schema) == f"resnet_fast::{name}({SCHEMAS[name]}"


def test_the_declarations_are_listed_by_their_names() -> None:
    assert {"conv_bn_act", "stem", "head", "add_act", "bottleneck_tail"} <= set(ops.ALL)
    assert all(op.name == name and op.overload.name() == f"resnet_fast::{name}" for name, op in ops.ALL.items())


# --- the dispatcher, and doing without it


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class _Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Own(Tensor):
    pass


OBSERVERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": _Watching,
    "a function mode": _Passing,
    "a default device": lambda: torch.device("meta"),
    "a profiler": profile,
    "autocast on the CPU": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward-mode AD": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("guard", [nullcontext, torch.no_grad, torch.inference_mode])
def test_who_watches_sees_the_call(name: str, guard: Callable[[], AbstractContextManager[Any]]) -> None:
    x = torch.rand(2, 3)
    with guard():
        assert _op.unobserved((x, None, x.bfloat16()))
        with OBSERVERS[name]():
            assert not _op.unobserved((x,))
        assert _op.unobserved((x,))


def test_tensors_that_are_more_than_memory_go_through_the_dispatcher() -> None:
    x = torch.rand(2, 3)
    assert _op.unobserved((x, nn.Parameter(x, requires_grad=False), x.t(), x.expand(4, 2, 3)))
    for other in (
        torch._neg_view(x), x.to_sparse(), x.as_subclass(_Own), x.to("meta"), x.clone().requires_grad_(),
        torch.complex(x, x).conj(),
    ):  # fmt: skip
        assert not _op.unobserved((x, other))
    with torch.no_grad():
        assert _op.unobserved((x.clone().requires_grad_(),))
    seen = torch.func.vmap(lambda each: torch.tensor(_op.unobserved((each,))))(x)
    assert not seen.any()
    torch.jit.trace(lambda each: each * _record(_op.unobserved((each,))), x, check_trace=False)
    assert _recorded == [False]


_recorded: list[bool] = []


def _record(value: bool) -> int:
    _recorded.append(value)
    return 1


def test_modes_and_profilers_see_the_op() -> None:
    x, y = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
    with _Watching() as watching:
        rf.ops.add_act(x, y)
    assert "resnet_fast::add_act" in watching.seen
    with profile() as watching_too:
        rf.ops.add_act(x, y)
    assert "resnet_fast::add_act" in {event.key for event in watching_too.key_averages()}


def test_lazily_negated_inputs() -> None:
    x, y = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    assert torch.equal(rf.ops.add_act(torch._neg_view(x), y), (y - x).relu())
    assert torch.equal(ops.ALL["add_act"].bind()(torch._neg_view(x), y), (y - x).relu())


def test_checks_are_remembered_by_all_that_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.ALL["head"]
    checked: list[Any] = []
    monkeypatch.setattr(op, "check", checked.append)
    monkeypatch.setattr(op, "_passed", set())
    x, weight, bias = torch.rand(2, 3, 4, 4), torch.rand(5, 3), torch.rand(5)
    for arguments in ((x, weight), (x, weight, bias), (x[:1], weight), (x.double(), weight.double())):
        for _ in range(2):
            rf.ops.head(*arguments)
    assert len(checked) == 4
    monkeypatch.setattr(_op, "_CHECKS_KEPT", 4)
    for n in range(1, 10):
        rf.ops.head(x[:1].expand(n, -1, -1, -1), weight)
    assert len(op._passed) <= 5


def test_python_frames_of_a_live_network() -> None:
    """Decisions are made once: at most 15 calls of this project's Python functions for each fused op of ResNet-50."""
    model, x = rf.resnet50().eval(), torch.rand(1, 3, 64, 64)
    count = 0

    def counting(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and "resnet_fast" in frame.f_globals.get("__name__", "").split(".")

    with torch.no_grad():
        for _ in range(2):
            model(x)
        sys.setprofile(counting)
        try:
            model(x)
        finally:
            sys.setprofile(None)
    assert 0 < count <= 15 * 54
