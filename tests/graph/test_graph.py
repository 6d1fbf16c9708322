"""The passes of resnet_fast.graph: patterns that must fuse, traps that must not, and random graphs of both."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fast.graph import OptimizedModule, Report, batching, optimize
from resnet_fast.graph.capture import capture
from resnet_fast.graph.guard import Guard
from resnet_fast.graph.optimize import _annotate as annotate
from resnet_fast.graph.plan import Fused
from tests.networks import Lambda, assert_same, conv_bn, leaves, randomise

EXAMPLE = torch.empty(1, 4, 12, 12)


def check(
    model: nn.Module, example: Tensor = EXAMPLE, batches: tuple[int, ...] = (1, 3, 0), **kwargs: Any
) -> OptimizedModule:
    """Optimise a randomised model, compare on several inputs, and return it."""
    randomise(model)
    fused = optimize(model, example_inputs=example, check=False, **kwargs)
    for batch, (height, width) in zip(batches, ((12, 12), (7, 9), (8, 8)), strict=False):
        assert_same(fused, model, torch.randn(batch, example.shape[1], height, width))
    return fused


def ops(fused: OptimizedModule) -> list[str]:
    """What runs, in order: fused modules as op/activation/+ where a residual is added, others by their name."""
    names: list[str] = []
    for node in fused.graph_module.graph.nodes:
        if node.op == "call_module":
            module = fused.graph_module.get_submodule(str(node.target))
            if isinstance(module, Fused) and module.op == "conv_bn_act":
                late = "late+" if module.options["residual_after_activation"] else "+"
                names.append(f"conv{late if len(node.args) > 1 else ''} {module.options['activation']}")
            elif not isinstance(module, Guard):
                names.append(module.op if isinstance(module, Fused) else type(module).__name__)
        elif node.op in ("call_function", "call_method"):
            names.append(getattr(node.target, "__name__", str(node.target)))
    return names


def reasons(report: Report) -> dict[str, str]:
    return {row.name: row.reason for row in report.not_fused}


def overwrites(fused: OptimizedModule) -> list[bool]:
    """For each convolution with a residual, in order, whether it writes into it."""
    return [
        fused.graph_module.get_submodule(str(node.target)).overwrites
        for node in fused.graph_module.graph.nodes
        if node.op == "call_module" and len(node.args) == 2
    ]


# ------------------------------------------------------------------------------------------------- what must be fused


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), None])
def test_conv_bn_relu_becomes_one_op(affine: bool, bias: bool, relu: nn.Module | None) -> None:
    conv, bn = nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=0.1)
    model = nn.Sequential(conv, bn, *([] if relu is None else [relu]))
    assert ops(check(model)) == ["conv none" if relu is None else "conv relu"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (3, 1), "padding": (1, 0), "stride": (1, 2)},
        {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": 2},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    ],
)
def test_every_geometry(kwargs: dict[str, Any]) -> None:
    assert ops(check(nn.Sequential(nn.Conv2d(4, 8, **kwargs), nn.BatchNorm2d(8)))) == ["conv none"]


def test_padding_that_is_not_zero_stays_before_the_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6), nn.ReLU())
    assert ops(check(model)) == ["pad", "conv relu"]


def test_functional_layers_are_understood_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight, stride=2, padding=(1, 1), bias=self.conv.bias)
        bn = self.bn
        y = F.batch_norm(y, bn.running_mean, bn.running_var, weight=bn.weight, bias=bn.bias, eps=bn.eps)
        y = F.max_pool2d(F.relu(y, inplace=True), 2)
        return F.linear(F.adaptive_avg_pool2d(y, 1).flatten(1), self.fc.weight, self.fc.bias)

    model = Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), fc=nn.Linear(6, 5))
    assert ops(check(model)) == ["conv relu", "max_pool2d", "head"]


RELU_METHOD: Callable[[Tensor], Tensor] = lambda x: x.relu()  # noqa: E731
RELU_METHOD_IN_PLACE: Callable[[Tensor], Tensor] = lambda x: x.relu_()  # noqa: E731
ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda a, b: a + b,
    "in place": operator.iadd,
    "torch.add": torch.add,
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
    "alpha=1": lambda a, b: torch.add(a, b, alpha=1),
}


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS.keys())
@pytest.mark.parametrize("relu", [torch.relu, F.relu, RELU_METHOD, RELU_METHOD_IN_PLACE, None])
def test_residual_goes_into_the_main_path(add: Any, relu: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = add(self.second(self.inner(x).relu()), x)
        return y if relu is None else relu(y)

    model = Lambda(forward, first=conv_bn(), inner=conv_bn(), second=conv_bn())
    fused = check(model)
    assert ops(fused) == ["conv relu", "conv relu", "conv+ relu" if relu else "conv+ none"]
    assert overwrites(fused) == [True]


@pytest.mark.parametrize("swap", [False, True])
def test_the_deeper_path_carries_the_residual(swap: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        main, shortcut = self.b(self.a(x).relu()), self.shortcut(x)
        return ((shortcut + main) if swap else (main + shortcut)).relu()

    fused = check(Lambda(forward, a=conv_bn(), b=conv_bn(), shortcut=conv_bn(kernel_size=1, padding=0)))
    last = [row for row in fused.report().rows if row.kind == "relu"][-1]
    assert last.fused == "conv_bn_act b.0"
    assert overwrites(fused) == [True]


def test_relu_before_the_addition_is_kept_before_it() -> None:
    model = Lambda(lambda self, x: self.a(x) + self.b(x).relu(), a=nn.AvgPool2d(3, 1, 1), b=conv_bn())
    assert ops(check(model)) == ["avg_pool2d", "convlate+ relu"]


def test_relu_on_both_sides_of_the_addition() -> None:
    model = Lambda(lambda self, x: (x + self.b(x).relu()).relu(), b=conv_bn())
    assert ops(check(model)) == ["conv relu", "resnet_fast.add_act.default"] or "add_act" in ops(check(model))[-1]


def test_add_relu_without_convolution() -> None:
    fused = check(Lambda(lambda self, x: (self.a(x) + x).relu(), a=nn.AvgPool2d(3, 1, 1)), backend="reference")
    assert ops(fused) == ["avg_pool2d", "add_act"]
    assert [row.fused for row in fused.report().rows][1:] == ["add_act add", "add_act add"]


def test_stem_and_head() -> None:
    class Net(nn.Module):
        def __init__(self, ceil_mode: bool) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 8, 7, 2, 3), nn.BatchNorm2d(8)
            self.pool = nn.MaxPool2d(3, 2, 0, ceil_mode=True) if ceil_mode else nn.MaxPool2d(3, 2, 1)
            self.fc = nn.Linear(8, 5, bias=not ceil_mode)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(F.relu(self.bn(self.conv(x)))).mean((2, 3))
            return self.fc(x)

    for ceil_mode in (False, True):
        assert ops(check(Net(ceil_mode))) == ["stem", "head"]


FLATTENS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(x.size(0), -1),
    "shape": lambda x: x.reshape(x.shape[0], -1),
    "size()": lambda x: x.view(x.size()[0], -1),
    "torch": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(start_dim=1),
}


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS.keys())
def test_all_ways_to_flatten(flatten: Any) -> None:
    model = Lambda(lambda self, x: self.fc(flatten(self.pool(x))), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(4, 5))
    fused = optimize(model.eval(), example_inputs=EXAMPLE)
    assert ops(fused)[-1:] == ["head"]
    assert_same(fused, model, torch.randn(3, 4, 5, 6))


def test_averages_over_parts_of_the_image_are_not_a_head() -> None:
    for pool in (nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((2, 1))):
        features = 4 * pool(EXAMPLE).shape[2] * pool(EXAMPLE).shape[3]
        fused = check(nn.Sequential(pool, nn.Flatten(), nn.Linear(features, 5)))
        assert ops(fused) == ["adaptive_avg_pool2d", "flatten", "linear"]
        assert reasons(fused.report())["2"] == "no global average pool feeds it alone"


@pytest.mark.parametrize("tap", [0, 1])
def test_a_tapped_average_is_not_a_head(tap: int) -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(x)
        flat = torch.flatten(pooled, 1)
        return (pooled, flat)[tap], self.fc(flat)

    fused = check(Lambda(forward, pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(4, 5)))
    assert ops(fused) == ["adaptive_avg_pool2d", "flatten", "linear"]


def test_dropout_and_identity_vanish() -> None:
    model = nn.Sequential(
        nn.Identity(), nn.Conv2d(4, 4, 1), nn.Dropout(0.5, inplace=True), nn.BatchNorm2d(4), nn.ReLU()
    )
    fused = check(model)
    assert ops(fused) == ["conv relu"]
    assert [row.kind for row in fused.report().rows if not row.fused] == ["Dropout"]
    assert not fused.report().not_fused


def test_sync_and_frozen_batch_norm() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, channels: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps = eps
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(channels) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4))
    assert ops(check(model)) == ["conv relu", "conv none"]


def test_frozen_batch_norm_that_was_traced_through() -> None:
    misc = pytest.importorskip("torchvision.ops.misc")
    norm = misc.FrozenBatchNorm2d(4)
    for name, buffer in norm.named_buffers():
        buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    model = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.ReLU()).eval()
    traced = fx.symbolic_trace(model)
    assert [node.name for node in traced.graph.nodes if node.op == "call_function"] == ["mul", "add"]
    fused = check(traced)
    assert ops(fused) == ["conv relu"]


def test_other_constants_per_channel_are_folded_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = (self.conv(x) - self.mean) * self.scale.reshape(4, 1, 1) / 2
        return torch.relu(self.bias + self.other(x)) * y

    model = Lambda(forward, conv=nn.Conv2d(4, 4, 3), other=nn.Conv2d(4, 4, 3))
    for name in ("mean", "scale", "bias"):
        setattr(model, name, nn.Parameter(torch.randn(1, 4, 1, 1)))
    assert ops(check(model)) == ["conv none", "truediv", "conv relu", "mul"]

    class Wide(nn.Module):  # constants along another dimension, of another dtype, or on the wrong side of a minus
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.columns = nn.Parameter(torch.randn(4))
            self.rows = nn.Parameter(torch.randn(1, 1, 4, 1))
            self.channels = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.conv(x) * self.columns, self.conv(x) + self.rows, self.channels - self.conv(x)

    model = randomise(Wide())
    fused = optimize(model, example_inputs=torch.empty(1, 4, 4, 4))
    assert_same(fused, model, torch.randn(3, 4, 4, 4))
    assert ops(fused).count("conv none") == 3


def test_shared_modules() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(self.act(self.bn(self.conv(x))))))

    model = Lambda(forward, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4), act=nn.ReLU(inplace=True))
    fused = check(model)
    assert ops(fused) == ["conv relu", "conv relu"]
    assert [name for name in fused.graph_module._modules if name != "resnet_fast_guard"] == ["conv", "conv_1"]


def test_views_of_fused_tensors_still_work() -> None:
    """Fused outputs are channels_last, where the author's ``view`` would fail."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        y = self.b(y).view(n, -1, 3)  # channels and rows together: no view of a channels_last tensor
        return y.view(y.size(0), -1)

    model = Lambda(forward, a=conv_bn(), b=conv_bn())
    assert ops(check(model, batches=(1, 3)))[-1] == "flatten"


# --------------------------------------------------------------------------------------------- what must not be fused


def test_tapped_convolution_is_not_folded_across() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, self.bn(y).relu()

    fused = check(Lambda(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))
    assert ops(fused) == ["conv none", "batch_norm", "relu"]
    assert reasons(fused.report())["bn"] == "the output of conv is used elsewhere too"


def test_batch_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    fused = optimize(model, example_inputs=EXAMPLE)
    assert ops(fused) == ["conv none", "batch_norm", "relu"]
    assert "statistics of the batch" in reasons(fused.report())["1"]
    assert_same(fused, model, torch.randn(3, 4, 12, 12))

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), None, None, training=True)

    fused = check(Lambda(forward, conv=nn.Conv2d(4, 4, 3)), EXAMPLE)
    assert "statistics of the batch" in reasons(fused.report())["batch_norm"]


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), "1", "no fused form"),
        (nn.Sequential(nn.Conv2d(4, 4, 2, padding="same")), "0", "same on both sides"),
        (nn.Sequential(nn.BatchNorm2d(4)), "0", "no convolution before it"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU(inplace=True)), "1", "no fused form"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)), "1", "no fused form of this window"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), "2", "7x7"),
        (nn.Sequential(nn.Conv2d(4, 4, 7, 2, 3), nn.MaxPool2d(3, 2, 1)), "1", "ReLU"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(2)), "1", "no linear layer"),
    ],
)
def test_what_is_not_fused_is_listed_with_the_reason(model: nn.Module, name: str, reason: str) -> None:
    assert reason in reasons(check(model).report())[name]


def test_broadcasting_additions_are_not_fused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y + F.adaptive_avg_pool2d(y, 1)).relu() + self.a(x) + self.position

    model = Lambda(forward, conv=nn.Conv2d(4, 4, 3, padding=1), a=conv_bn(4, 1))
    model.position = nn.Parameter(torch.randn(1, 4, 1, 1))
    fused = check(model)
    assert sum("broadcasts" in reason for reason in reasons(fused.report()).values()) == 3


def test_shapes_equal_by_chance_are_not_taken_for_equal() -> None:
    """At the example (a batch of one, 1x1 maps) these operands have one shape, at other inputs they broadcast."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y + F.adaptive_avg_pool2d(x, 1)).relu(), (self.other(x) + self.constant).relu()

    model = Lambda(forward, conv=conv_bn(), other=nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn()))
    model.constant = nn.Parameter(torch.randn(1, 4, 1, 1))
    fused = optimize(randomise(model), example_inputs=torch.empty(1, 4, 1, 1))
    assert sum("broadcasts" in reason for reason in reasons(fused.report()).values()) == 1
    assert ops(fused)[-1] == "conv relu"  # the constant is part of the second one's shift
    assert_same(fused, model, torch.randn(3, 4, 5, 6))


def test_scaled_and_scalar_additions_are_not_taken_for_residuals() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.add(self.a(x), x, alpha=2)
        y += 1
        return (self.b(y) + 0.5).relu() * 2

    fused = check(Lambda(forward, a=conv_bn(), b=conv_bn()))
    assert ops(fused)[0] == "conv none"
    assert reasons(fused.report())["add"] == "it scales one operand"


def test_a_value_added_to_itself() -> None:
    fused = check(Lambda(lambda self, x: (lambda y: (y + y).relu())(self.a(x)), a=conv_bn()))
    assert ops(fused)[0] == "conv none"
    assert "add_act" in ops(fused)[1]


def test_weights_computed_in_the_graph() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight * x.mean())

    fused = check(Lambda(forward, conv=nn.Conv2d(4, 4, 3)), torch.empty(1, 4, 12, 12))
    assert "computed in the graph" in reasons(fused.report())["conv2d"]


# ------------------------------------------------------------------------------------------------- in-place and memory


def test_later_readers_of_an_overwritten_value_see_the_change() -> None:
    def preactivation(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.relu(x)  # in place: the shortcut below is the activated value
        return self.conv(y) + x

    model = Lambda(preactivation, first=conv_bn(), relu=nn.ReLU(inplace=True), conv=nn.Conv2d(4, 4, 3, padding=1))
    assert ops(check(model)) == ["conv relu", "conv+ none"]


def test_in_place_addition_changes_the_tapped_value() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        a = self.a(x)
        b = before = self.b(a)
        b += a
        c = self.c(b)
        b.relu_()
        return a, b, c, before * 1

    check(Lambda(forward, a=conv_bn(), b=conv_bn(), c=conv_bn()))


def test_the_callers_tensor_is_left_unchanged_and_noted() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)).eval()
    fused = optimize(model, example_inputs=EXAMPLE)
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    fused(x)
    assert torch.equal(x, before)
    assert any("caller's tensor" in note for note in fused.report().notes)
    assert_same(fused, model, x)


def _write_through_slice(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y[:, :2].relu_()
    return self.b(y)


def _write_through_flatten(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y.flatten(1).mul_(2)
    return y + self.b(y)


def _view_taken_before_the_write(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    v = y.view(y.shape[0], -1)
    y.relu_()
    return v * 2


@pytest.mark.parametrize("forward", [_write_through_slice, _write_through_flatten, _view_taken_before_the_write])
@pytest.mark.filterwarnings("ignore:optimize")
def test_writes_through_views_keep_the_code_that_writes_as_it_is(forward: Any) -> None:
    fused = check(Lambda(forward, a=conv_bn(), b=conv_bn()), batches=(1, 3))
    assert {row.kind for row in fused.report().fused} == {"Conv2d", "BatchNorm2d"}
    assert "in-place writes are kept as they are" in fused.report().notes[0]


def test_assignment_to_a_value_of_its_own() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0] = 3
        z = self.b(x)
        z[:, 1] = y[:, 0]
        return (self.c(y) + z).relu()

    fused = check(Lambda(forward, a=conv_bn(), b=conv_bn(), c=conv_bn()))
    assert ops(fused).count("setitem") == 2


def test_a_convolution_is_not_moved_behind_a_write_to_its_input() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        main = self.b(y)
        y[:, 0] = 3
        return (main + self.pool(y)).relu()

    check(Lambda(forward, a=conv_bn(), b=conv_bn(), pool=nn.AvgPool2d(3, 1, 1)))


def test_dtype_of_an_in_place_operation_is_kept() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        y += torch.ones(1, dtype=torch.float64)
        y *= torch.full((4, 1, 1), 2.0, dtype=torch.float64)
        return y

    check(Lambda(forward, a=conv_bn()))


RESIDUAL_HAZARDS: dict[str, tuple[Callable[[Any, Tensor], Any], list[bool]]] = {}


def hazard(expected: list[bool]) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        RESIDUAL_HAZARDS[function.__name__.strip("_").replace("_", " ")] = (function, expected)
        return function

    return register


@hazard([False])
def _residual_is_an_output_too(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    return [y, (self.b(y) + y).relu()]


@hazard([False])
def _residual_is_read_later(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    z = (self.b(y) + y).relu()
    return self.c(y) * z


@hazard([False])
def _residual_is_the_input(self: Any, x: Tensor) -> Any:
    return (self.a(x) + x).relu(), x * 1


@hazard([False])
def _convolution_reads_its_residual(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    return (self.b(y) + y).relu()


@hazard([False])
def _convolution_reads_a_view_of_its_residual(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    return (self.b(y.transpose(2, 3).transpose(2, 3)) + y).relu()


@hazard([False])
def _view_of_the_residual_is_an_output(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    v = y[:, 1:]
    return (self.b(self.c(y)) + y).relu(), v


@hazard([False])
def _view_of_the_residual_is_read_later(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    v = y.permute(0, 2, 3, 1)
    z = (self.b(self.c(y)) + y).relu()
    return z, v * 2


@hazard([False])
def _residual_is_a_view(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    v = y.transpose(2, 3).transpose(2, 3)
    return (self.b(self.c(y)) + v).relu(), y


@hazard([False, True])
def _residual_of_two_blocks(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    z = self.b(self.c(y)) + y
    return (self.c(self.b(z)) + y).relu()


@hazard([True, True])
def _residual_after_an_overwriting(self: Any, x: Tensor) -> Any:
    y = self.a(x).relu()
    y = (self.b(self.c(y)) + y).relu()
    return (self.b(self.c(y)) + y).relu()


@pytest.mark.parametrize(("forward", "expected"), RESIDUAL_HAZARDS.values(), ids=RESIDUAL_HAZARDS.keys())
def test_residuals_are_overwritten_only_when_dead(forward: Any, expected: list[bool], poisoned_memory: None) -> None:
    fused = check(Lambda(forward, a=conv_bn(), b=conv_bn(), c=conv_bn()))
    assert overwrites(fused) == expected


# ------------------------------------------------------------------------------------------------------------- batches


def pieces(fused: OptimizedModule, x: Tensor, monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
    """The batch sizes that run when memory is limited to ``images`` images; the module's cache is cleared."""
    seen: list[int] = []
    largest = batching.largest_tensor(fused.graph_module, x)
    assert largest is not None
    monkeypatch.setattr(batching, "LARGEST_TENSOR", largest * images)
    fused._pieces.clear()
    running = fused._engine() or fused.graph_module
    handle = running.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    fused(x)
    handle.remove()
    return seen


def test_large_batches_run_in_even_pieces(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        y = self.a(x).relu()
        z = torch.cat([self.b(y), y], dim=1)
        gate = torch.sigmoid(F.adaptive_avg_pool2d(z, 1))
        return {"maps": (y, z * gate), "flat": [z.view(z.size(0), -1), self.norm(z)]}

    model = Lambda(forward, a=conv_bn(), b=conv_bn(), norm=nn.GroupNorm(2, 8))
    fused = check(model, batches=(1, 3))
    x = torch.randn(7, 4, 6, 5)
    assert pieces(fused, x, monkeypatch, 3) == [2, 2, 3]
    assert_same(fused, model, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert fused(x.contiguous(memory_format=layout))["maps"][0].is_contiguous(memory_format=layout)
    assert pieces(fused, x, monkeypatch, 7) == [7]
    assert pieces(fused, x[:1], monkeypatch, 1) == [1]
    assert pieces(fused, x, monkeypatch, 0) == [1] * 7


NOT_SEPARABLE: dict[str, Callable[[Any, Tensor], Any]] = {
    "flatten from 0": lambda self, x: torch.flatten(self.a(x), 0),
    "mean over the batch": lambda self, x: self.a(x) - self.a(x).mean(0, keepdim=True),
    "cat along the batch": lambda self, x: torch.cat([self.a(x), x]),
    "cat along a negative dimension": lambda self, x: torch.cat([self.a(x), x], -4),
    "softmax": lambda self, x: torch.softmax(self.a(x), 0),
    "batch as channels": lambda self, x: self.a(x).view(1, -1, x.shape[2], x.shape[3]),
    "batch statistics": lambda self, x: F.batch_norm(self.a(x), None, None, training=True),
    "constant output": lambda self, x: (self.a(x), self.a[1].weight),
    "number as output": lambda self, x: (self.a(x), x.shape[0]),
    "indexing": lambda self, x: self.a(x)[0],
    "shallower operand": lambda self, x: self.a(x) * torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "transpose": lambda self, x: self.a(x).transpose(0, 1),
    "constant operand": lambda self, x: self.a(x) * self.a[1].weight.view(1, 4, 1, 1).relu(),
}


@pytest.mark.parametrize("forward", NOT_SEPARABLE.values(), ids=NOT_SEPARABLE.keys())
def test_graphs_that_mix_images_run_whole(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Lambda(forward, a=conv_bn()))
    fused = optimize(model, example_inputs=torch.empty(1, 4, 4, 4))
    monkeypatch.setattr(batching, "LARGEST_TENSOR", 1)
    x = torch.randn(4, 4, 4, 4)
    if "output" in forward.__code__.co_consts or not isinstance(fused(x), Tensor):
        assert leaves(fused(x))[0].shape[0] == 4
    else:
        assert_same(fused, model, x)
    assert not fused._separable


# -------------------------------------------------------------------------------------------------------- graph modules


def test_graph_modules_are_copied_not_changed() -> None:
    model = randomise(nn.Sequential(*conv_bn(), nn.ReLU(inplace=True)))
    traced = fx.symbolic_trace(model)
    before, code = copy.deepcopy(traced.state_dict()), traced.code
    fused = optimize(traced, example_inputs=EXAMPLE)
    assert ops(fused) == ["conv relu"]
    assert traced.code == code
    assert all(torch.equal(a, b) for a, b in zip(traced.state_dict().values(), before.values(), strict=True))
    assert traced.get_submodule("2").inplace is True
    assert all(node.meta == other.meta for node, other in zip(traced.graph.nodes, traced.graph.nodes, strict=True))
    assert_same(fused, model, torch.randn(2, 4, 6, 6))


def test_optimizing_twice_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="the result of optimize"):
        optimize(optimize(nn.Sequential(*conv_bn()).eval(), example_inputs=EXAMPLE))


def test_the_graph_is_not_walked_once_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Any] = []
    walk = fx.graph._node_list.__iter__
    monkeypatch.setattr(fx.graph._node_list, "__iter__", lambda nodes: (walks.append(nodes), walk(nodes))[1])

    def walks_of(count: int) -> int:
        model = nn.Sequential(*(layer for _ in range(count) for layer in conv_bn())).eval()
        gm = capture(model, (EXAMPLE,), {}).gm
        walks.clear()
        assert len(annotate(gm)) == 2 * count
        return len(walks)

    assert walks_of(1) == walks_of(20)
