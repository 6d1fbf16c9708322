"""Planning bottleneck tails: what is formed and what not, the bytes it saves, and that answers stay what they were."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import resnet_fast as rf
from resnet_fast.graph import OptimizedModule, fuse_tail, inventory, optimize
from resnet_fast.graph.plan import Fused
from resnet_fast.kernels import bottleneck_tail_choice, gpus
from resnet_fast.kernels.problems import BottleneckTail, ConvBNAct
from resnet_fast.roofline import cost
from resnet_fast.tuning import shapes
from tests.networks import Lambda, assert_same, conv_bn, randomise, small
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")

BATCH = torch.empty(128, 3, 224, 224, device="meta")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return small()


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel took every dtype and number of channels; and a GPU "endless" on which arithmetic is free.

    With both, float32 graphs have every tail that the pattern allows.
    """
    monkeypatch.setattr(fuse_tail, "feasible", lambda *_: True)
    add_gpu(monkeypatch, "endless", bandwidth=1e12, flops=1e18)


def add_gpu(monkeypatch: pytest.MonkeyPatch, name: str, bandwidth: float, flops: float) -> None:
    rates = MappingProxyType(dict.fromkeys(gpus.PRECISIONS, flops))
    monkeypatch.setattr(
        gpus, "GPUS", (*gpus.GPUS, gpus.GPU(name, 90, 132, 227 * 1024, 228 * 1024, 1, bandwidth, rates))
    )


@pytest.fixture
def without_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no rate of the level-2 cache were known: nothing but device memory and arithmetic decides."""
    plain = tuple(dataclasses.replace(gpu, l2_bandwidth=None) for gpu in gpus.GPUS)
    monkeypatch.setattr(gpus, "GPUS", plain)


def tails(fused: OptimizedModule) -> dict[str, Fused]:
    modules = fused.graph_module.named_modules()
    return {name: module for name, module in modules if isinstance(module, Fused) and module.op == "bottleneck_tail"}


def forms(fused: OptimizedModule) -> dict[str, str]:
    """Each tail with p where it projects the shortcut and f where it computes the next block's 1x1."""
    return {
        name: ("p" if "weight_shortcut" in (held := tail.constants()) else "") + ("f" if "weight1" in held else "")
        for name, tail in tails(fused).items()
    }


# -------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("name", "separate", "planned"), [("resnet50", 52e6, 36e6), ("resnet152", 113.5e6, 93e6)])
def test_bytes_per_image(name: str, separate: float, planned: float) -> None:
    with torch.device("meta"):
        model = getattr(rf, name)().eval()
    one = optimize(model, dtype=torch.float16, example_inputs=BATCH).report()
    assert one.bytes_per_image == pytest.approx(separate, rel=0.01)
    report = optimize(model, dtype=torch.float16, gpu="h100", example_inputs=BATCH).report()
    assert report.bytes_per_image is not None and report.bytes_after is not None
    assert report.bytes_per_image == report.bytes_after / 128 <= planned
    assert len(report.fused) == len(report.rows)
    assert report.as_dict()["bytes_per_image"] == report.bytes_per_image
    assert f", {report.bytes_per_image / 1e6:.1f} MB per image" in str(report)


def test_the_plan_of_a_whole_network(net: nn.Module, without_l2: None) -> None:
    fused = optimize(net, dtype=torch.bfloat16, gpu="h100", example_inputs=BATCH)
    assert forms(fused) == {
        "layer1_0_conv2": "pf", "layer1_1_conv2": "f", "layer2_0_conv2": "pf", "layer3_0_conv2": "p",
        "layer4_0_conv2": "p", "layer4_1_conv2": "",
    }  # fmt: skip
    report = fused.report()
    kinds = [row.fused for row in report.rows if row.name.startswith("layer1.0")]
    assert (
        kinds == ["conv_bn_act layer1.0.conv1"] * 3 + ["bottleneck_tail layer1.0.conv2"] * 8
    )  # its addition is "iadd"
    assert next(row for row in report.rows if row.name == "layer4.1.conv1").fused == "conv_bn_act layer4.1.conv1"
    counted = {row.name: row.bytes_after for row in report.rows}
    pixels, wide = 128 * 28 * 28, 128 * 56 * 56
    # a and its 3x3, the pixels of the shortcut's input that a stride of 2 touches, the block's output, the next 1x1.
    moved = 2 * (wide * 128 + pixels * (256 + 512 + 256))
    constants = 2 * (9 * 128**2 + 128 * 512 + 256 * 512 + 512 * 256) + 8 * (128 + 512 + 512 + 256)
    assert counted["layer2.0.conv2"] == moved + constants
    notes = [note for note in report.notes if note.startswith("h100: ")]
    assert len(notes) == 4
    assert notes[0].startswith("h100: layer1.0.conv2 to layer1.1.conv2, 2 blocks (mid 64, 56x56): bottleneck_tail with")
    assert " us in 2 kernels instead of " in notes[0] and notes[0].endswith(" us in 7 kernels")


def test_floors_in_the_notes_are_those_of_the_cost_model(net: nn.Module, without_l2: None) -> None:
    from resnet_fast.roofline import cost

    gpu, size = gpus.known("h100"), (28, 28)

    def separate(precision: str, itemsize: int) -> float:
        """Microseconds of the convolutions of layer2.0 from its 3x3 on, and of the next block's first."""
        single = [
            cost.conv(128, 128, (56, 56), 128, (3, 3), (2, 2), size, itemsize=itemsize),
            cost.conv(128, 256, (56, 56), 512, (1, 1), (2, 2), size, itemsize=itemsize),
            cost.conv(128, 128, size, 512, (1, 1), (1, 1), size, residual=True, itemsize=itemsize),
            cost.conv(128, 512, size, 256, (1, 1), (1, 1), size, itemsize=itemsize),
        ]
        return 1e6 * sum(work.floor(gpu, precision) for work in single)

    note = optimize(net, dtype=torch.float16, gpu="h100", example_inputs=BATCH).report().notes[1]
    fused = 1e6 * cost.bottleneck_tail(
        128, 128, (56, 56), 512, (2, 2), size, shortcut=(256, (56, 56), (2, 2)), following=256
    ).floor(gpu, "fp16")
    assert f"floor {fused:.1f} us in 1 kernel instead of {separate('fp16', 2):.1f} us in 4 kernels" in note
    assert "28x28" in note
    note = optimize(net, dtype=torch.float64, gpu="h100", example_inputs=BATCH).report().notes[1]
    assert (
        f"one kernel per convolution, floor {separate('fp32', 8):.1f} us in 4 kernels; bottleneck_tail is not" in note
    )


@pytest.mark.parametrize("form", ["meta", "fake", "real"])
def test_examples_without_data(net: nn.Module, form: str) -> None:
    example = torch.empty(2, 3, 64, 64, device="meta" if form == "meta" else "cpu")
    if form == "fake":
        with FakeTensorMode():
            example = torch.empty(2, 3, 64, 64)
    report = optimize(net, dtype=torch.bfloat16, gpu="h100", example_inputs=example).report()
    assert report.batch == 2 and report.example == ("[2x3x64x64 float32]",)
    whole = optimize(net, dtype=torch.bfloat16, gpu="h100", example_inputs=torch.zeros(2, 3, 64, 64)).report()
    assert report == whole


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_obeys_the_error_rule(net: nn.Module, dtype: torch.dtype, without_l2: None) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        same = copy.deepcopy(net).to(dtype)(x.to(dtype))
    fused = optimize(net, dtype=dtype, gpu="h100")
    assert len(tails(fused)) == 6
    assert_obeys_error_rule(fused(x).to(dtype), same, exact)


def test_float32(net: nn.Module, any_size: None, poisoned_memory: None) -> None:
    fused = optimize(net, gpu="endless")
    assert len(tails(fused)) == 6
    for shape in ((2, 3, 64, 64), (1, 3, 65, 97), (0, 3, 64, 64)):
        assert_same(fused, net, torch.randn(shape))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        assert_obeys_error_rule(fused(x), net(x), exact)


def test_our_models(net: nn.Module, any_size: None) -> None:
    ours = rf.resnet50().eval()
    fused = optimize(ours, gpu="endless")
    assert len(tails(fused)) == 16
    assert_same(fused, ours, torch.randn(1, 3, 64, 64))


def test_nothing_is_planned_on_a_cpu(net: nn.Module) -> None:
    assert not tails(optimize(net, dtype=torch.bfloat16))
    assert not any("kernel" in note for note in optimize(net, dtype=torch.bfloat16).report().notes)


def test_float32_follows_torchs_choice_of_tf32(net: nn.Module, without_l2: None) -> None:
    """With tf32 the blocks up to 128 channels have a tile; without it no matrix unit would work on any."""
    assert list(forms(optimize(net, gpu="h100"))) == ["layer1_0_conv2", "layer1_1_conv2", "layer2_0_conv2"]
    with torch.backends.cudnn.flags(allow_tf32=False):
        fused = optimize(net, gpu="h100")
    assert not tails(fused)
    notes = [note for note in fused.report().notes if note.startswith("h100: ")]
    assert len(notes) == 4 and all("bottleneck_tail is not planned for this size in" in n for n in notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_comes_out_as_in_torch(net: nn.Module, any_size: None, value: float) -> None:
    """No tail is certified: its ReLUs pass NaN on, and what reads a tail is measured anew."""
    fused = optimize(net, gpu="endless")
    x = torch.randn(2, 3, 64, 64)
    x[1, 0, 32, 32] = value
    with torch.no_grad():
        want = net(x)
    got = fused(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    if value != value:
        assert want[1].isnan().all() and got[0].isfinite().all()
    assert all(not tail.no_nan for tail in tails(fused).values())


def test_what_reads_a_tail_is_not_certified_by_what_came_before(any_size: None) -> None:
    """A tail that overflows: the 1x1 behind it sees infinity minus infinity, which is NaN in torch too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return torch.relu(self.c(y))

    model = randomise(Lambda(forward, a=conv_bn(8), b=conv_bn(8, kernel_size=1, padding=0), c=conv_bn(8)))
    with torch.no_grad():
        model.a[0].weight.mul_(1e15)
        model.b[0].weight.mul_(1e30)
    fused = optimize(model, gpu="endless", example_inputs=torch.empty(1, 8, 6, 6))
    assert len(tails(fused)) == 1
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        want = model(x)
    assert want.isnan().any()
    assert torch.equal(fused(x).isnan(), want.isnan())


def test_copies_pickles_and_loads(net: nn.Module) -> None:
    fused = optimize(net, dtype=torch.bfloat16, gpu="h100")
    x = torch.randn(1, 3, 64, 64)
    want = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), want)
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    assert "graph_module.layer1_0_conv2.weight_shortcut" in state
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for buffer in other.parameters():
            buffer.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), want)


# ------------------------------------------------------------------------------------- what is formed, and what is not


def test_feature_taps(net: nn.Module, any_size: None, poisoned_memory: None) -> None:
    """Block outputs are outputs of the tails; a tap inside a block keeps that block in pieces."""
    names = ["layer1.0", "layer1.1.conv1", "layer1.1", "layer2.0.relu_1", "layer4"]
    features = create_feature_extractor(net, names)
    fused = optimize(features, gpu="endless")
    assert forms(fused) == {
        "layer1_0_conv2": "p", "layer1_1_conv2": "f", "layer3_0_conv2": "pf", "layer4_0_conv2": "pf",
        "layer4_1_conv2": "",
    }  # fmt: skip
    x = torch.randn(2, 3, 64, 64)
    assert_same(fused, features, x)
    assert set(fused(x)) == set(names)


@pytest.mark.parametrize(
    "build",
    [
        lambda: small((1, 1, 1, 1), BasicBlock),
        lambda: small((1, 1, 1, 1), groups=2, width_per_group=32),
        lambda: small((1, 1, 1, 1), replace_stride_with_dilation=[False, False, True], groups=1, width_per_group=48),
    ],
    ids=["basic", "grouped", "width 48"],
)
def test_networks_without_tails(build: Callable[[], nn.Module]) -> None:
    model = build()
    fused = optimize(model, dtype=torch.bfloat16, gpu="h100", example_inputs=torch.empty(2, 3, 64, 64))
    assert not tails(fused)
    (first, *_) = fused.report().notes
    assert first.startswith("h100: ") and ("no bottleneck block" in first or "not planned for this size" in first)


def test_dilated_blocks_stay(any_size: None) -> None:
    model = small((1, 1, 1, 2), replace_stride_with_dilation=[False, False, True])
    fused = optimize(model, gpu="endless")
    assert list(tails(fused)) == ["layer1_0_conv2", "layer2_0_conv2", "layer3_0_conv2", "layer4_0_conv2"]
    assert_same(fused, model, torch.randn(1, 3, 64, 64))


def block(function: Callable[..., Any], **changes: Any) -> nn.Module:
    """A bottleneck block on 8 channels (mid 4) and the next block's first convolution, with other layers on request."""
    narrow, wide = {"kernel_size": 1, "padding": 0}, {"kernel_size": 1, "padding": 0}
    layers: dict[str, nn.Module] = {
        "a": conv_bn(8, 4, **narrow), "b": conv_bn(4), "c": conv_bn(4, 8, **wide), "d": conv_bn(8, **wide),
        "e": conv_bn(8, 4, **narrow), "f": conv_bn(8, 4, **narrow),
    }  # fmt: skip
    return randomise(Lambda(function, **{**layers, **changes}))


def planned(model: nn.Module, example: Tensor | None = None) -> OptimizedModule:
    fused = optimize(model, gpu="endless", example_inputs=torch.empty(2, 8, 6, 6) if example is None else example)
    for shape in ((2, 8, 6, 6), (1, 8, 9, 5)):
        assert_same(fused, model, torch.randn(shape))
    return fused


def _plain(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x)
    return torch.relu(self.e(y)) + y.mean()


def _other_order(self: Any, x: Tensor) -> Any:
    y = (x + self.c(self.b(self.a(x).relu()).relu())).relu()
    return self.e(y).relu()


def _projected(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + self.d(x))
    return torch.relu(self.e(y))


def _projection_first(self: Any, x: Tensor) -> Any:
    shortcut = self.d(x)
    y = torch.relu(shortcut + self.c(torch.relu(self.b(torch.relu(self.a(x))))))
    return torch.relu(self.e(y)), y


def _tapped_projection(self: Any, x: Tensor) -> Any:
    shortcut = self.d(x)
    y = torch.relu(shortcut + self.c(torch.relu(self.b(torch.relu(self.a(x))))))
    return torch.relu(self.e(y)), shortcut


def _activated_projection(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + torch.relu(self.d(x)))
    return torch.relu(self.e(y))


def _two_followers(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x)
    return torch.relu(self.f(y)), torch.relu(self.e(y)), y


def _follower_used_twice(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x)
    z = torch.relu(self.e(y))
    return z, z * 2


def _no_activation_behind(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x)
    return self.e(y), y


def _tapped_inside(self: Any, x: Tensor) -> Any:
    b = torch.relu(self.b(torch.relu(self.a(x))))
    return torch.relu(self.c(b) + x), b


def _late_residual(self: Any, x: Tensor) -> Any:
    return torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))) + x


def _no_relu_at_the_end(self: Any, x: Tensor) -> Any:
    return self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x


def _no_relu_inside(self: Any, x: Tensor) -> Any:
    return torch.relu(self.c(self.b(torch.relu(self.a(x)))) + x)


def _no_residual(self: Any, x: Tensor) -> Any:
    return torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))


@pytest.mark.parametrize(
    ("function", "changes", "form"),
    [
        (_plain, {}, "f"),
        (_other_order, {}, "f"),
        (_projected, {}, "pf"),
        (_projection_first, {}, "pf"),
        (_projected, {"d": conv_bn(8, kernel_size=3)}, "f"),
        (_projected, {"d": conv_bn(8, kernel_size=1, padding=0, groups=2)}, "f"),
        (_tapped_projection, {}, "f"),
        (_activated_projection, {}, "f"),
        (_two_followers, {}, "f"),
        (_follower_used_twice, {}, "f"),
        (_no_activation_behind, {}, ""),
        (_plain, {"e": conv_bn(8, 4, kernel_size=1, padding=0, stride=2)}, ""),
        (_plain, {"e": conv_bn(8, 4)}, ""),
        (_plain, {"e": conv_bn(8, 4, kernel_size=1, padding=0, groups=2)}, ""),
        (_tapped_inside, {}, None),
        (_late_residual, {}, None),
        (_no_relu_at_the_end, {}, None),
        (_no_relu_inside, {}, None),
        (_no_residual, {}, None),
        (_plain, {"b": conv_bn(4, dilation=2, padding=2)}, None),
        (_plain, {"b": conv_bn(4, groups=2)}, None),
        (_plain, {"a": conv_bn(8, 2, kernel_size=1, padding=0), "b": conv_bn(2, 4)}, None),
        (_plain, {"b": conv_bn(4, kernel_size=5, padding=2)}, None),
        (_plain, {"b": conv_bn(4, padding=0), "c": conv_bn(4, 8, kernel_size=1, padding=1)}, None),
    ],
)
def test_patterns(
    function: Any, changes: dict[str, Any], form: str | None, any_size: None, poisoned_memory: None
) -> None:
    fused = planned(block(function, **copy.deepcopy(changes)))
    assert list(forms(fused).values()) == ([] if form is None else [form])


def test_strides_of_version_1_blocks(any_size: None) -> None:
    """Caffe's blocks have the stride in the first 1x1, so that one stays by itself and the projection has a stride."""
    function: Any = _projected
    strided = {"kernel_size": 1, "padding": 0, "stride": 2}
    fused = planned(block(function, a=conv_bn(8, 4, **strided), d=conv_bn(8, 8, **strided)))
    assert list(forms(fused).values()) == ["pf"]
    (tail,) = tails(fused).values()
    assert tail.options == {"stride": (1, 1), "shortcut_stride": (2, 2)}


def test_a_projection_may_stay_outside(any_size: None, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """If the kernel has no tile for it, the tail adds its result as a residual."""
    monkeypatch.setattr(fuse_tail, "feasible", lambda problem, _: problem.shortcut is None)
    for function in (_projected, _projection_first):
        fused = planned(block(function))
        assert list(forms(fused).values()) == ["f"]
        left = [m for m in fused.graph_module.modules() if isinstance(m, Fused) and m.op == "conv_bn_act"]
        assert len(left) == 2  # the block's first 1x1, and the projection


def test_a_wide_projection_stays_outside() -> None:
    """Its input is read for each slice of the output: of 256 channels that takes longer than a launch of its own."""
    found = [each for each in shapes.fused_ops("resnet50", 224) if isinstance(each, inventory.Block)]
    gpu = gpus.known("h200")
    ways = [fuse_tail.decide(each.at(128, "fp16"), gpu)[0] for each in found if each.project is not None]
    narrow, wide = (way.tail for way in ways[:2])
    assert narrow is not None and narrow.project is not None and ways[0].launches == 1
    assert wide is not None and wide.project is None and wide.following is not None and ways[1].launches == 2
    block = next(each for each in found if each.spatial.name == wide.spatial.name).at(128, "fp16")
    assert block.project is not None and isinstance(block.project.problem, ConvBNAct)
    work = max(cost.work(block.project.problem).floor(gpu, "fp16"), fuse_tail.l2_seconds(block.project.problem, gpu))
    assert wide.problem is not None
    assert ways[1].floor == pytest.approx(work + fuse_tail.l2_seconds(wide.problem, gpu))


def test_graphs_that_write_in_place_are_not_planned(any_size: None) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = _projected(self, x).clone()
        result[:, 0] = 0
        return result

    fused = planned(block(forward))
    assert not tails(fused)
    assert any("writes in place" in note for note in fused.report().notes)


def test_two_inputs_without_an_example(any_size: None) -> None:
    """No addition is fused where shapes are unknown, so no block is there to plan."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = _projected(self, x + y)
        return result

    class Two(Lambda):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return forward(self, x, y)

    layers = dict(block(_projected).named_children())
    model = randomise(Two(forward, **layers))
    fused = optimize(model, gpu="endless")
    assert tails(fused)
    x, y = torch.randn(2, 1, 8, 6, 6).unbind(0)
    with torch.no_grad():
        assert torch.allclose(fused(x, y), model(x, y), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ decision


def test_what_is_bound_by_arithmetic_stays_separate(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpu(monkeypatch, "slow", bandwidth=1e18, flops=1e12)
    fused = optimize(net, dtype=torch.float16, gpu="slow", example_inputs=BATCH)
    assert not tails(fused)
    notes = [note for note in fused.report().notes if note.startswith("slow: ")]
    assert len(notes) == 4
    assert all(
        "one kernel per convolution, floor " in n and "would be no faster" in n and "; bottleneck_tail" in n
        for n in notes
    )


def test_weights_read_too_often_through_the_l2_cache_keep_blocks_separate(net: nn.Module) -> None:
    """A program of a fused block reads all its weights for 64 or 128 pixels: too much from 256 channels on."""
    for name in ("h100", "h200"):
        fused = optimize(net, dtype=torch.float16, gpu=name, example_inputs=BATCH)
        assert list(forms(fused)) == ["layer1_0_conv2", "layer1_1_conv2", "layer2_0_conv2"]
        notes = [note for note in fused.report().notes if note.startswith(f"{name}: ")]
        assert all(f"mid {mid}, " in note for mid, note in zip((64, 128, 256, 512), notes, strict=True))
        assert all("would be no faster: " in note for note in notes[2:])


@pytest.mark.parametrize(
    ("problem", "block_m", "weights", "per_pixel"),
    [
        (BottleneckTail(128, 56, 56, 64, 256, 1, None, 64, "fp16"), 128, 9 * 64**2 + 2 * 64 * 256, 9 * 64 + 256),
        (BottleneckTail(128, 14, 14, 256, 1024, 1, None, 256, "bf16"), 64, 9 * 256**2 + 2 * 256 * 1024, 9 * 256 + 1024),
        (BottleneckTail(128, 7, 7, 512, 2048, 1, None, 0, "fp16"), 64, 9 * 512**2 + 512 * 2048, 9 * 512 + 2048),
        # The projection's input is read for each of 1024 / 32 slices, its weights by every program.
        (BottleneckTail(128, 28, 28, 256, 1024, 2, (512, 28, 28, 2), 0, "fp16"), 64,
         9 * 256**2 + 256 * 1024 + 512 * 1024, 9 * 256 + 32 * 512),
    ],
)  # fmt: skip
def test_what_a_fused_block_reads_through_the_l2_cache(
    problem: BottleneckTail, block_m: int, weights: int, per_pixel: int
) -> None:
    gpu = gpus.known("h200")
    config = bottleneck_tail_choice.choose(problem, gpu)
    assert config is not None and config.block_m == block_m
    pixels = problem.pixels
    assert config.l2_reads(problem) == 2 * (-(-pixels // block_m) * weights + pixels * per_pixel)
    assert fuse_tail.l2_seconds(problem, gpu) == config.l2_reads(problem) / 8.5e12
    assert fuse_tail.l2_seconds(problem, gpus.known("b200")) == 0.0


def test_what_a_convolution_reads_through_the_l2_cache() -> None:
    problem = ConvBNAct(128, 14, 14, 256, 256, (3, 3), (1, 1), (1, 1), (1, 1), 1, "fp16", False)
    tiles = 196 * 2
    assert cost.l2_reads(problem) == 2 * tiles * 256 * 9 * 256
    assert cost.l2_reads(problem, 256, 128) == 2 * tiles // 2 * 384 * 9 * 256
    narrow = dataclasses.replace(problem, n=1, h=4, w=4, k=64, groups=4, residual=True)
    # Four tiles of 16 pixels by 16 channels of 64 inputs at nine taps, and the residual once.
    assert cost.l2_reads(narrow) == 2 * (4 * 32 * 9 * 64 + 16 * 64)


def test_what_the_kernel_has_a_tile_for() -> None:
    """The kernel's own limits, for 56x56, 28x28, ... pixels of 128 images; one image gives no GPU enough to do."""
    from resnet_fast.kernels.bottleneck_tail_choice import Problem, supports

    def takes(gpu: str, mid: int, following: int, precision: str, n: int = 128) -> bool:
        size = 56 * 64 // mid if mid >= 64 else 56
        return supports(Problem(n, size, size, mid, 4 * mid, 1, None, following, precision), gpus.known(gpu))

    assert all(takes("h100", *case) for case in ((64, 64, "fp16"), (256, 512, "bf16"), (512, 0, "fp16")))
    assert all(takes("h100", *case) for case in ((64, 0, "tf32"), (128, 256, "tf32"), (64, 64, "fp32")))
    for case in ((512, 512, "fp16"), (96, 0, "fp16"), (8, 0, "fp16"), (1024, 0, "fp16"), (64, 96, "fp16")):
        assert not takes("h100", *case)
    assert not takes("h100", 256, 0, "tf32") and not takes("h100", 128, 0, "fp32")
    assert takes("b200", 256, 256, "fp16") and not takes("b200", 512, 0, "fp16")
    assert takes("a100", 256, 256, "fp16") and not takes("a100", 256, 512, "fp16")
    assert not takes("h100", 256, 256, "fp16", n=1)


def test_the_gpu_to_plan_for(net: nn.Module) -> None:
    assert not tails(optimize(net, dtype=torch.bfloat16))
    assert tails(optimize(net, dtype=torch.bfloat16, gpu="NVIDIA H100 80GB HBM3"))


@pytest.mark.parametrize(
    ("gpu", "error", "message"),
    [
        ("h1000", ValueError, r"optimize: gpu is 'h1000': unknown GPU .* built in are h100, .*a100"),
        (100, TypeError, "optimize: gpu is 100; it must be None or a GPU's name"),
    ],
)
def test_gpus_that_are_not_known(net: nn.Module, gpu: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize(net, gpu=gpu)


def test_graph_modules_and_their_originals_are_left_alone(any_size: None) -> None:
    model = fx.symbolic_trace(block(_projected))
    before = model.code
    assert len(tails(planned(model))) == 1
    assert model.code == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda(net: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        same = copy.deepcopy(net).to("cuda", dtype)(x.to("cuda", dtype)).cpu()
    fused = optimize(copy.deepcopy(net).cuda(), dtype=dtype, gpu="h100")
    assert len(tails(fused)) == 6
    assert_obeys_error_rule(fused(x.cuda()).cpu().to(dtype), same, exact)
