"""The declaration of an op: schemas, and when a call goes to the implementation without torch's dispatcher."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
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
from resnet_fast.kernels import problems
from resnet_fast.ops import Op, _op
from resnet_fast.roofline.measure import tf32

add_act, bottleneck_tail, conv_int8 = (
    importlib.import_module(f"resnet_fast.ops.{name}") for name in ("add_act", "bottleneck_tail", "conv_int8")
)

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
    "conv_int8": "Tensor x, Tensor weight, Tensor scale, Tensor shift, SymInt zero_point, str out, "
    "SymInt out_zero_point, SymInt largest, Tensor? residual, float residual_scale, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, str activation, bool residual_after_activation) -> Tensor",
    "conv_fp8": "Tensor x, Tensor weight, Tensor scale, Tensor shift, str out, Tensor? residual, float residual_scale, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, str activation, bool residual_after_activation) -> Tensor",
    "conv_again": f"Tensor x, {_CONV}) -> Tensor",
    "conv_statistics": f"Tensor x, {_BEFORE}, {_CONV}) -> (Tensor, Tensor, Tensor)",
    "norm_act_conv": f"Tensor x, {_NORM}, {_CONV}) -> Tensor",
    "conv_norm_act": f"Tensor y, Tensor x, {_BEFORE.replace(',', '0,')}0, {_CONV}, {_NORM}, Tensor? residual, "
    "str activation) -> Tensor",
    "norm_act_pool": f"Tensor x, {_NORM}, bool ceil_mode) -> Tensor",
}


_CONVOLUTION = problems.ConvBNAct(2, 7, 6, 8, 12, (3, 1), (2, 1), (1, 0), (1, 2), 4, "bf16", residual=True)
PROBLEMS: list[tuple[Op[Any], Any]] = [
    (ops.ALL["conv_bn_act"], _CONVOLUTION),
    (ops.ALL["conv_bn_act"], dataclasses.replace(_CONVOLUTION, residual=False, precision="fp32")),
    (ops.ALL["stem"], problems.Stem(2, 13, 12, 3, 5, uint8=False, ceil_mode=True, precision="fp16")),
    (ops.ALL["stem"], problems.Stem(2, 13, 12, 4, 5, uint8=True, ceil_mode=False, precision="fp32")),
    (ops.ALL["head"], problems.Head(2, 3, 4, 17, 5, "bf16")),
    (ops.ALL["add_act"], problems.AddAct(77, "fp16")),
    (add_act.BACKWARD, problems.AddAct(77, "fp32")),
    (conv_int8.OP, problems.ConvInt8(2, 7, 6, 8, 12, (3, 1), (2, 1), (1, 0), (1, 2), 1, "int8", True, "fp16", True)),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "problem"), PROBLEMS)
def test_an_example_is_of_its_problem(op: Op[Any], problem: Any, device: str) -> None:
    a = op.example(problem, torch.device(device))
    with tf32(False):
        assert op.problem is not None and op.problem(a) == problem
    op.check(a)
    assert all(value.device.type == device for value in a if isinstance(value, Tensor))


@pytest.mark.parametrize("following", [0, 6])
@pytest.mark.parametrize("shortcut", [None, (5, 9, 7, 2)])
def test_an_example_of_a_block_is_of_its_problem(shortcut: Any, following: int) -> None:
    problem = problems.BottleneckTail(2, 9, 7, 4, 12, 2, shortcut, following, "fp16")
    a = ops.ALL["bottleneck_tail"].example(problem, torch.device("cpu"))
    assert bottleneck_tail.kernel_problem(a) == problem
    ops.ALL["bottleneck_tail"].check(a)


def test_an_example_follows_from_its_generator() -> None:
    first, second, other = (
        ops.ALL["conv_bn_act"].example(_CONVOLUTION, torch.device("cpu"), torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(one, same) for one, same in zip(first[:5], second[:5], strict=True))
    assert not any(torch.equal(one, same) for one, same in zip(first[:5], other[:5], strict=True))


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


def test_a_profiler_of_another_thread_sees_the_call() -> None:
    x, found = torch.rand(2, 3), []
    with profile():
        thread = threading.Thread(target=lambda: found.append(_op.unobserved((x,))))
        thread.start()
        thread.join()
    assert found == [False] and _op.unobserved((x,))


def test_live_layers_call_an_op_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = rf.nn.ConvBNAct2d(3, 4, 1).eval(), torch.randn(1, 3, 5, 5)
    public = rf.ops.conv_bn_act
    with torch.no_grad():
        expected = module(x)
        monkeypatch.setattr(rf.ops, "conv_bn_act", lambda *a, **k: public(*a, **k) + 1)
        assert torch.equal(module(x), expected + 1)


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


def _conv(x: Tensor | None = None, **how: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight, x0 = torch.randn(4, 3, 3, 3, generator=generator), torch.randn(2, 3, 8, 8, generator=generator)
    given: dict[str, Any] = {
        "x": x0 if x is None else x,
        "weight": weight,
        "scale": torch.ones(4),
        "shift": torch.zeros(4),
    }
    return rf.ops.conv_bn_act(**{**given, **how})


BAD: dict[str, dict[str, Any]] = {
    "floats as stride": {"stride": (1.0, 1.0)},
    "a float as groups": {"groups": 1.0},
    "a word as flag": {"residual_after_activation": "no"},
    "no activation": {"activation": None},
    "an array": {"x": torch.zeros(2, 3, 8, 8).numpy()},
    "an array as residual": {"residual": torch.zeros(2, 4, 6, 6).numpy()},
    "no x": {"weight": None},
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_of_other_types_are_the_schemas_affair(name: str) -> None:
    """What equals a right value, as 1.0 does 1, is refused as well, and leaves nothing behind for the next call."""
    for _ in range(2):
        with pytest.raises((RuntimeError, AttributeError)) as first:
            _conv(**BAD[name])
        expected = _conv(padding=1)
        with pytest.raises((RuntimeError, AttributeError)) as second:
            _conv(**BAD[name])
        assert type(first.value) is type(second.value) and torch.equal(_conv(padding=1), expected)
    module = rf.nn.ConvBNAct2d(8, 8, 3).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        expected = module(x)
        module.conv.groups = 1.0  # type: ignore[assignment]
        with pytest.raises((RuntimeError, TypeError)):
            module(x)
        module.conv.groups = 1
        assert torch.equal(module(x), expected)


def test_arguments_that_the_schema_converts() -> None:
    import numpy as np

    weight, vectors = torch.randn(4, 3, 7, 7), (torch.ones(4), torch.zeros(4))
    pixels = torch.zeros(1, 20, 20, 3, dtype=torch.uint8)
    mean, std = [0.25, 0.5, 0.75], [0.25, 0.5, 0.5]
    given = rf.ops.stem(pixels, weight, *vectors, mean=np.array(mean), std=np.array(std), ceil_mode=1)  # type: ignore[arg-type]
    assert torch.equal(given, rf.ops.stem(pixels, weight, *vectors, mean=mean, std=std, ceil_mode=True))
    assert torch.equal(_conv(stride=True), _conv(stride=1))


class _Calling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.register_buffer("one", torch.ones(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = rf.ops.conv_bn_act(x, self.weight, self.one, self.one, y)  # type: ignore[arg-type]
        return rf.ops.head(rf.ops.add_act(x, y), self.weight[:, :, 0, 0])


def test_networks_that_call_ops_are_traced_and_optimised() -> None:
    model, x = _Calling().eval().requires_grad_(False), torch.randn(2, 3, 4, 4)
    graph = torch.fx.symbolic_trace(model)
    called = [str(node.target) for node in graph.graph.nodes if "resnet_fast" in str(node.target)]
    assert called == [f"resnet_fast.{name}.default" for name in ("conv_bn_act", "add_act", "head")]
    assert torch.equal(graph(x, x), model(x, x))
    assert torch.allclose(rf.optimize(model, example_inputs=(x, x))(x, x), model(x, x), atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_a_bound_op_checks_what_is_no_constant(backend: str) -> None:
    with rf.backends.use(backend):
        bound, x = ops.ALL["add_act"].bind(), torch.randn(2, 3, 4, 4)
        for y in (x[:1], torch.randn(2, 3, 1, 1), torch.randn(2, 3, 8, 2)):
            for pair in ((x, y), (y, x)):
                with pytest.raises((ValueError, RuntimeError), match="they must be the same"):
                    bound(*pair)
        with pytest.raises((TypeError, RuntimeError)):
            bound(x, x.long())
        wide = bound(x.double(), x.double())
        assert wide.dtype is torch.float64 and torch.equal(wide, (2 * x.double()).relu())


def test_a_bound_op_computes_in_its_own_dtype() -> None:
    weight, one, zero = torch.randn(4, 3, 3, 3), torch.ones(4), torch.zeros(4)
    x = torch.randn(2, 3, 8, 8)
    exact = torch.relu(torch.conv2d(x, weight, None, 1, 1))
    for first in (x.bfloat16(), x.double(), x):
        bound = ops.ALL["conv_bn_act"].bind(weight, one, zero, padding=(1, 1), dtype=torch.float32)
        assert bound(first).dtype is torch.float32
        assert torch.allclose(bound(x), exact, atol=1e-5)


@pytest.mark.triton
def test_what_a_bound_op_keeps_is_whole_when_other_threads_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("resnet_fast.ops.conv_bn_act")
    bound = ops.ALL["conv_bn_act"].bind(torch.randn(8, 8, 1, 1), torch.ones(8), torch.zeros(8), backend="triton")
    seen: list[dict[Any, Any]] = []
    for name in ("kernel_weight", "kernel_vector"):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, made=made: seen.append(dict(bound.kept)) or made(*a))
    x = torch.randn(1, 8, 3, 3)
    with rf.backends.use("triton"):
        first, second = bound(x), bound(x)
    assert len(seen) >= 3 and seen[:3] == [{}, {}, {}] and torch.equal(first, second)


def test_a_snapshot_without_constants_moves_and_casts() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x + y)

    x = torch.randn(2, 3, 4, 4)
    fused = rf.optimize(Two().eval(), example_inputs=(x, x))
    assert dict(fused.named_buffers()) == {}
    assert torch.equal(fused.double().cpu()(x, x), (2 * x).relu())


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
