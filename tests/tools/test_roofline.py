"""Floors: every number against arithmetic done by hand or other people's counts, and the command around them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import fx, nn

from resnet_fast import models
from resnet_fast.cli import roofline as command
from resnet_fast.graph import inventory, optimize
from resnet_fast.graph.inventory import Layer
from resnet_fast.graph.schedules import rotated
from resnet_fast.kernels import gpus
from resnet_fast.kernels.problems import BottleneckTail, ConvBNAct
from resnet_fast.roofline import LAUNCH, Kernel, Schedule, Work, cost, fits_on_chip, measure
from tests import command_line
from tests.command_line import Outcome

H100 = gpus.known("h100")
BATCH = torch.empty(128, 3, 224, 224, dtype=torch.float16, device="meta")
STAGES = {"resnet50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}


@cache
def made(arch: str, precision: str = "fp16", batch: int = 128, size: int = 224) -> tuple[Schedule, ...]:
    subject = command.Subject(arch, batch, size, command.Arithmetic(precision))
    return command.schedules(subject, H100)


def by_hand(arch: str, rotate: bool) -> int:
    """Elements that a bottleneck network at 224 px moves for an image, by the pictures in docs/roofline.md."""
    total = 3 * 224 * 224 + 64 * 56 * 56  # the stem
    side, channels = 56, 64
    middles = [m for m, blocks in zip((64, 128, 256, 512), STAGES[arch], strict=True) for _ in range(blocks)]
    for index, mid in enumerate(middles):
        first = index == 0 or middles[index - 1] != mid
        out = side // 2 if first and mid != 64 else side
        if not rotate or index == 0:
            total += (channels + mid) * side**2  # 1x1
        total += mid * side**2  # the 3x3's input
        if not rotate:
            total += 2 * mid * out**2  # its output, written and read
        if first:
            total += channels * out**2  # the pixels that the projection reads
        if first and not rotate:
            total += 2 * 4 * mid * out**2  # the projection, written and read
        if not first:
            total += 4 * mid * out**2  # the residual
        total += 4 * mid * out**2  # the block's output
        if rotate and index + 1 < len(middles):
            total += middles[index + 1] * out**2  # the next 1x1's output
        side, channels = out, 4 * mid
    return total + 2048 * 49 + 1000


# --- one op at a time


def test_a_pointwise_convolution_by_hand() -> None:
    work = cost.conv(2, 64, (56, 56), 256, (1, 1), (1, 1), (56, 56), residual=True)
    # 3136 pixels of 64 channels in, of 256 in and out; two bytes each
    assert work.activations == 2 * (64 + 256 + 256) * 3136 * 2 == 7_225_344
    assert work.weights == 64 * 256 * 2 + 2 * 256 * 4 == 34_816
    assert work.flops == 2 * 2 * 3136 * 256 * 64 == 205_520_896


def test_a_strided_pointwise_convolution_reads_a_quarter_of_the_pixels() -> None:
    work = cost.conv(1, 256, (56, 56), 512, (1, 1), (2, 2), (28, 28))
    assert work.activations == (256 + 512) * 28 * 28 * 2
    odd = cost.conv(1, 1, (7, 7), 1, (1, 1), (2, 2), (4, 4), itemsize=4)
    assert odd.activations == (16 + 16) * 4


def test_a_strided_3x3_reads_all_pixels() -> None:
    work = cost.conv(1, 8, (14, 14), 8, (3, 3), (2, 2), (7, 7), groups=2, itemsize=4)
    assert work == Work(4 * (8 * 196 + 8 * 49), 4 * 8 * 4 * 9 + 8 * 8, 2 * 8 * 49 * 4 * 9)


def test_the_floor_is_the_longer_of_the_two_times() -> None:
    assert Work(3_000_000, 0, 1000).floor(H100, "fp16") == pytest.approx(1e-6)
    assert Work(3_000_000, 3_000_000, 1000).floor(H100, "fp16") == pytest.approx(2e-6)
    assert Work(10, 0, 798_000_000).floor(H100, "fp16") == pytest.approx(1e-6)
    assert Work(10, 0, 798_000_000).floor(H100, "tf32") == pytest.approx(2e-6)


# --- whole networks


@pytest.mark.parametrize(("arch", "per_conv", "rotation"), [("resnet50", 51.48, 29.10), ("resnet152", 112.50, 67.24)])
def test_bytes_by_hand(arch: str, per_conv: float, rotation: float) -> None:
    _, straight, turned, _ = made(arch)
    for schedule, rotate, megabytes in ((straight, False, per_conv), (turned, True, rotation)):
        expected = 2 * by_hand(arch, rotate)
        assert schedule.work.activations == 128 * expected
        assert expected / 1e6 == pytest.approx(megabytes, abs=0.006)
        totals = schedule.totals(H100, "fp16")
        assert totals.activations == expected
        assert totals.bytes_seconds == pytest.approx((expected + schedule.work.weights / 128) / 3.0e12)


def test_weights_are_the_networks_parameters() -> None:
    _, straight, turned, _ = made("resnet50")
    network = torchvision.models.resnet50()
    parameters = sum(p.numel() for p in network.parameters())
    norms = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    # two bytes for each weight; the norms' two become scale and shift, four bytes each
    assert straight.work.weights == turned.work.weights == 2 * (parameters - 2 * norms) + 2 * 4 * norms


@pytest.mark.parametrize("arch", models.list_models())
def test_flops_are_those_that_torchvision_documents(arch: str) -> None:
    """Their ``_ops`` are 1e9 multiply-adds of convolutions and linear layers, to three digits, of one image."""
    documented = 2 * torchvision.models.get_model_weights(arch).DEFAULT.meta["_ops"]
    eager, straight, turned, _ = made(arch)
    channels = 512 if arch in ("resnet18", "resnet34") else 2048
    for schedule in (straight, turned):
        pooled = channels * 49
        assert schedule.work.flops / 128 == pytest.approx(documented * 1e9 + pooled, abs=1.1e6)
    plain = sum(kernel.work.flops for kernel in eager.kernels if kernel.op in ("Conv2d", "Linear"))
    assert plain == straight.work.flops - 128 * channels * 49


def test_the_flops_of_resnet50_and_152() -> None:
    assert made("resnet50")[1].work.flops / 128 == 2 * 4_089_184_256 + 2048 * 49  # 8.178e9
    assert made("resnet152")[1].work.flops / 128e9 == pytest.approx(23.03, abs=0.005)


def test_eager_moves_every_layer_by_itself() -> None:
    eager = made("resnet50")[0]
    counted: dict[str, int] = {}
    for kernel in eager.kernels:
        counted[kernel.op] = counted.get(kernel.op, 0) + 1
    assert counted == {
        "Conv2d": 53, "BatchNorm2d": 53, "ReLU": 49, "MaxPool2d": 1, "add": 16, "AdaptiveAvgPool2d": 1, "Linear": 1,
    }  # fmt: skip
    first = {kernel.op: kernel.work for kernel in reversed(eager.kernels)}
    stem = 64 * 112 * 112
    assert first["Conv2d"] == Work(128 * 2 * (3 * 224 * 224 + stem), 2 * 64 * 3 * 49, 128 * 2 * stem * 3 * 49)
    assert first["BatchNorm2d"] == Work(128 * 2 * 2 * stem, 4 * 64 * 2, 128 * 2 * stem)
    assert first["ReLU"] == Work(128 * 2 * 2 * stem, 0, 128 * stem)
    assert first["MaxPool2d"] == Work(128 * 2 * (stem + stem // 4), 0, 128 * 9 * stem // 4)
    assert first["add"] == Work(128 * 2 * 3 * 256 * 56 * 56, 0, 128 * 256 * 56 * 56)
    assert first["AdaptiveAvgPool2d"] == Work(128 * 2 * (2048 * 49 + 2048), 0, 128 * 2048 * 49)
    assert first["Linear"] == Work(128 * 2 * (2048 + 1000), 2 * 2049 * 1000, 128 * 2 * 2048 * 1000)
    assert eager.work.activations / 128 == pytest.approx(159.7e6, abs=0.05e6)


def test_floors_of_the_schedules_are_in_order() -> None:
    floors = [schedule.totals(H100, "fp16") for schedule in made("resnet50")]
    assert [round(1e6 * sums.floor_seconds, 1) for sums in floors] == [56.2, 20.1, 12.7, 14.3]
    for sums in floors:
        assert sums.floor_seconds >= max(sums.bytes_seconds, sums.math_seconds)
        assert sums.images_per_second == pytest.approx(1 / sums.floor_seconds)
    assert [sums.launches for sums in floors] == [174, 54, 19, 39]


def test_float32_moves_twice_as_much() -> None:
    half, full = made("resnet18", "bf16")[1].work, made("resnet18", "fp32")[1].work
    assert full.activations == 2 * half.activations and full.flops == half.flops
    assert made("resnet18", "tf32")[1].work == full


def test_image_size_and_batch_are_free() -> None:
    eager, straight, turned, _ = made("resnet50", "fp16", 3, 97)
    assert straight.kernels[0].shape == (3, 64, 25, 25)
    assert straight.kernels[0].work.activations == 3 * 2 * (3 * 97 * 97 + 64 * 25 * 25)
    assert turned.kernels[-2].shape == (3, 2048, 4, 4)
    assert eager.batch == straight.batch == turned.batch == 3


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX5090", "rtx5090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200 NVL", "h200_nvl"),
        ("NVIDIA GeForce RTX 4090 D", "rtx_4090_d"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx_4090_laptop_gpu"),
        ("NVIDIA A100-PCIE-40GB", "a100_pcie_40gb"),
        ("", "unknown"),
    ],
)
def test_names_that_drivers_give(driver: str, name: str) -> None:
    assert gpus.normalise(driver) == name


# --- what optimize() plans


def test_the_planned_schedule_is_optimizes_graph() -> None:
    _, straight, turned, planned = made("resnet50")
    assert {name for kernel in planned.kernels for name in kernel.parts} == {kernel.name for kernel in straight.kernels}
    assert straight.work.flops == planned.work.flops and straight.work.weights == planned.work.weights
    assert turned.work.activations <= planned.work.activations <= 1.22 * turned.work.activations
    same = {frozenset(kernel.parts): kernel.work for kernel in turned.kernels}
    compared = [kernel for kernel in planned.kernels if frozenset(kernel.parts) in same]
    assert len(compared) > 6 and all(same[frozenset(kernel.parts)] == kernel.work for kernel in compared)


# --- rotation


def test_the_rotated_schedule_of_resnet50() -> None:
    turned = made("resnet50")[2]
    assert [kernel.op for kernel in turned.kernels] == ["stem", "conv_bn_act", *["bottleneck_tail"] * 16, "head"]
    first, second, last = turned.kernels[2], turned.kernels[3], turned.kernels[-2]
    assert first.parts == ("layer1.0.conv2", "layer1.0.downsample.0", "layer1.0.conv3", "layer1.1.conv1")
    assert second.parts == ("layer1.1.conv2", "layer1.1.conv3", "layer1.2.conv1")
    assert last.parts == ("layer4.2.conv2", "layer4.2.conv3")
    # kernels.md's 10 mid a pixel: mid in, 4 mid of residual in, 4 mid out, mid out
    assert second.work.activations == 128 * 2 * 10 * 64 * 56 * 56
    parts = {name for kernel in turned.kernels for name in kernel.parts}
    assert parts == {kernel.name for kernel in made("resnet50")[1].kernels}


def test_rotation_keeps_to_what_is_feasible() -> None:
    straight = made("resnet50")[1]
    with torch.device("meta"):
        model = models.get_model("resnet50").half().eval()
    fused = optimize(model, example_inputs=BATCH, backend="reference")
    layers = inventory.layers(fused.graph_module, (BATCH,), "fp16")
    asked = []

    def small(problem: BottleneckTail) -> bool:
        asked.append((problem.mid, problem.following, problem.precision))
        return problem.mid <= 256 and problem.following <= 256

    kernels = rotated(straight, layers, H100, small).kernels
    tails = [kernel for kernel in kernels if kernel.op == "bottleneck_tail"]
    assert len(tails) == 13 and len(kernels) == 26
    assert tails[-1].parts == ("layer3.5.conv2", "layer3.5.conv3")  # what follows has 512 channels
    assert (256, 512, "fp16") in asked and (512, 0, "fp16") in asked
    assert rotated(straight, layers, H100, lambda problem: False).kernels == straight.kernels


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_basic_and_grouped_blocks_are_not_rotated(arch: str) -> None:
    _, straight, turned, _ = made(arch)
    assert turned.kernels == straight.kernels


def test_what_fits_on_chip() -> None:
    def fits(gpu: str, mid: int, following: int, precision: str) -> bool:
        problem = BottleneckTail(128, 14, 14, mid, 4 * mid, 1, None, following, precision)
        return fits_on_chip(gpus.known(gpu))(problem)

    # 64 pixels in 227 KiB
    assert fits("h100", 512, 512, "fp16") and fits("h100", 1024, 0, "fp16") and not fits("h100", 1024, 1024, "fp16")
    assert fits("h100", 512, 0, "fp32") and not fits("h100", 512, 512, "tf32")
    assert fits("rtx4090", 256, 512, "bf16") and not fits("rtx4090", 512, 512, "bf16")


def bottleneck(**changes: dict[str, Any]) -> tuple[Layer, ...]:
    """A 3x3, an expansion with a plain residual, and the next 1x1; ``changes`` are of a layer or its problem."""
    geometry: dict[str, Any] = {
        "n": 8, "h": 14, "w": 14, "c": 64, "k": 64, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0),
        "dilation": (1, 1), "groups": 1, "precision": "fp16",
    }  # fmt: skip
    layers: dict[str, dict[str, Any]] = {
        "spatial": {"sources": ("a",), "kernel": (3, 3), "padding": (1, 1)},
        "expand": {"sources": ("spatial", "x"), "k": 256},
        "next": {"sources": ("expand",), "c": 256},
        "end": {"sources": ("next", "expand"), "k": 256},
    }
    found = []
    for name, fields in layers.items():
        fields |= changes.get(name, {})
    for name, fields in layers.items():
        sources = fields.pop("sources")
        readers = tuple(other for other, given in layers.items() if name in given.get("sources", ()))
        kind = {key: fields.pop(key) for key in ("activation", "late") if key in fields}
        problem = ConvBNAct(**geometry | fields, residual=len(sources) > 1)
        found.append(Layer(name, sources, readers, (problem.n, problem.k, *problem.output), problem, **kind))
    return tuple(found)


def per_conv(layers: tuple[Layer, ...]) -> Schedule:
    kernels = (Kernel(each.name, each.op, each.shape, cost.work(each.problem), (each.name,)) for each in layers)
    return Schedule("per-conv", 8, tuple(kernels))


def turned(layers: tuple[Layer, ...], gpu: gpus.GPU = H100) -> list[tuple[str, ...]]:
    """The layers in each kernel of the rotated schedule."""
    return [kernel.parts for kernel in rotated(per_conv(layers), layers, gpu).kernels]


def test_a_block_is_fused_from_its_3x3_on() -> None:
    layers = bottleneck()
    assert turned(layers) == [("spatial", "expand", "next"), ("end",)]
    work, pixels = rotated(per_conv(layers), layers, H100).kernels[0].work, 8 * 14 * 14
    assert work.activations == 2 * pixels * (64 + 256 + 256 + 64)
    assert work.flops == 2 * pixels * (64 * 64 * 9 + 64 * 256 + 256 * 64)


@pytest.mark.parametrize(
    ("layer", "changes"),
    [
        ("spatial", {"groups": 2}),
        ("spatial", {"kernel": (1, 1), "padding": (0, 0)}),
        ("spatial", {"padding": (2, 2), "dilation": (2, 2)}),
        ("spatial", {"c": 32}),
        ("spatial", {"activation": "none"}),
        ("spatial", {"sources": ("a", "x")}),
        ("spatial", {"stride": (1, 2)}),
        ("expand", {"sources": ("spatial",)}),
        ("expand", {"sources": ("spatial", "spatial")}),
        ("expand", {"activation": "none"}),
        ("expand", {"late": True}),
        ("expand", {"groups": 2}),
        ("expand", {"stride": (2, 2)}),
        ("next", {"sources": ("spatial",)}),
    ],
)
def test_what_is_no_bottleneck_stays(layer: str, changes: dict[str, Any]) -> None:
    assert turned(bottleneck(**{layer: changes})) == [("spatial",), ("expand",), ("next",), ("end",)]


@pytest.mark.parametrize(
    "changes", [{"activation": "none"}, {"stride": (2, 2)}, {"sources": ("expand", "x")}, {"groups": 2}]
)
def test_what_follows_stays_apart_unless_it_is_a_plain_pointwise_convolution(changes: dict[str, Any]) -> None:
    assert turned(bottleneck(next=changes)) == [("spatial", "expand"), ("next",), ("end",)]


def test_a_launch_decides_where_floors_are_equal() -> None:
    slow = dataclasses.replace(H100, flops=dict.fromkeys(gpus.PRECISIONS, 1e9))  # everything is bound by math
    layers = bottleneck()
    assert len(turned(layers, slow)) == 2
    fused, apart = (each.totals(slow, "fp16") for each in (rotated(per_conv(layers), layers, slow), per_conv(layers)))
    assert fused.floor_seconds == pytest.approx(apart.floor_seconds)
    assert 0 < LAUNCH < 1e-4


# --- measuring


class FakeEvent:
    """Says that the n-th recording happened at n*n milliseconds."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at**2 - self.at**2)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda's part in measuring, without a GPU; the list is what was called."""
    calls: list[str] = []
    FakeEvent.recorded = 0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(f"sleep {cycles > 0}"))
    return calls


def test_every_node_gets_its_own_median(fake_cuda: list[str]) -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    seconds = measure.node_seconds(graph_module, torch.ones(2), runs=3, warmup=1)
    # A forward records 4 events. The first two do not count; the median of the other three is the fourth forward's.
    assert seconds == {"_0": pytest.approx(1e-3 * (14**2 - 13**2)), "_1": pytest.approx(1e-3 * (16**2 - 15**2))}
    assert fake_cuda == ["synchronize", "synchronize", *["sleep True", "synchronize"] * 3]


def test_tf32_is_allowed_for_the_time_being() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for allowed, precision in ((True, "high"), (False, "highest")):
        with measure.tf32(allowed):
            assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (allowed, precision)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_measured_nodes_are_found_in_the_per_conv_schedule(fake_cuda: list[str]) -> None:
    subject = command.Subject("resnet18", 1, 64, command.Arithmetic.float32)
    seconds, backends = command.measure(subject, "cpu")
    straight = command.schedules(subject, H100)[1]
    assert {frozenset(kernel.parts) for kernel in straight.kernels} == set(seconds)
    assert backends and all(value > 0 for value in seconds.values())


@pytest.mark.gpu
def test_measured_times_are_no_less_than_their_floors() -> None:
    known = command._is_known(torch.cuda.get_device_name())
    subject = command.Subject("resnet50", 128, 224, command.Arithmetic.float16)
    seconds, _ = command.measure(subject, "cuda")
    fastest = known or H100
    for schedule in command.schedules(subject, fastest)[1:]:
        for kernel in schedule.kernels:
            taken = seconds.get(frozenset(kernel.parts))
            # A part of the inputs may still be in the level-2 cache: that much less comes from memory.
            if taken is not None:
                assert taken > kernel.work.floor(fastest, "fp16") - fastest.l2 / fastest.bandwidth


# --- the command


def run(*arguments: str | Path) -> Outcome:
    return command_line.run("roofline", *arguments)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_device_name", lambda: None)


@pytest.mark.usefixtures("no_gpu")
def test_the_tables() -> None:
    found = run("--arch", "resnet18", "--gpu", "l4", "--dtype", "bf16", "--batch-size", "4")
    out = found.passed()
    assert not found.err
    lines = out.splitlines()
    assert lines[0].strip() == "per-conv: resnet18, bfloat16, batch 4, 224 px, l4"
    stem = next(line for line in lines if " stem " in line)
    cells = [cell.strip() for cell in stem.strip("│ ").split("│")]
    moved, weights = 2 * (3 * 224 * 224 + 64 * 56 * 56), 2 * 64 * 147 + 8 * 64
    seconds = (4 * moved + weights) / 300e9, 4 * 2 * 64 * 112 * 112 * 147 / 121e12
    assert cells == [
        "conv1", "stem", "64x56x56", f"{(moved + weights / 4) / 1e6:.3f}", "236.0",
        f"{1e6 * seconds[0]:.2f}", f"{1e6 * seconds[1]:.2f}", f"{1e6 * max(seconds):.2f}", "bytes",
    ]  # fmt: skip
    assert "measured us" not in out and "nothing measured: torch sees no CUDA GPU here" in out
    assert "0.3 TB/s, 121 TFLOP/s in bfloat16" in out
    assert [line.split()[1] for line in lines if line.startswith("│ ") and "│" in line][-4:] == [
        "eager", "per-conv", "rotated", "planned",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_gpu")
def test_json_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("-a", "resnet50", "-b", "128", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg").passed()
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) == {"schema", "kind", "setting", "gpu", "measured", "schedules"}
    assert found["setting"] == {"arch": "resnet50", "batch": 128, "image_size": 224, "dtype": "float16"}
    assert found["gpu"]["name"] == "h100" and found["measured"]["device"] is None
    eager, straight, turned, _ = found["schedules"]
    assert [schedule["name"] for schedule in found["schedules"]] == ["eager", "per-conv", "rotated", "planned"]
    assert straight["per_image"]["activations"] == 2 * by_hand("resnet50", rotate=False)
    row = straight["rows"][3]
    assert (row["layer"], row["op"], row["shape"]) == ("layer1.0.downsample.0", "conv_bn_act", [128, 256, 56, 56])
    assert row["activations"] == 128 * 2 * (64 + 256) * 56 * 56 and row["flops"] == 128 * 2 * 64 * 256 * 56 * 56
    assert row["floor_seconds"] == row["bytes_seconds"] > row["math_seconds"] and row["bound"] == "bytes"
    assert row["measured_seconds"] is None
    assert turned["rows"][2]["parts"][1] == "layer1.0.downsample.0" and len(eager["rows"]) == 174
    svg = (tmp_path / "a.svg").read_text()
    assert svg.startswith("<?xml")
    for words in ("per-conv", "rotated", "eager", "266 flops per byte", "resnet50, float16, batch 128, 224 px; h100"):
        assert words in svg
    assert "hollow" not in svg
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.svg"]


def test_json_alone_on_stdout() -> None:
    assert run("-a", "resnet18", "-b", "1", "--gpu", "a100", "--json", "-").json()["gpu"]["bandwidth"] == 2.039e12


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_by_numbers() -> None:
    numbers = ["--bandwidth", "3.0", "--tflops", "798"]
    built_in, found = (run("-a", "resnet50", "--json", "-", *given).json() for given in ((), numbers))
    assert found["gpu"]["name"] == "given" and "as given" in found["gpu"]["source"]
    assert found["schedules"] == built_in["schedules"][:3]  # optimize() plans for built-in GPUs only
    found = run("-a", "resnet50", "--json", "-", *numbers, "--capability", "86", "--gpu", "a6000").json()
    assert (found["gpu"]["name"], found["gpu"]["capability"]) == ("a6000", 86)
    tails = [row for row in found["schedules"][2]["rows"] if row["op"] == "bottleneck_tail"]
    assert tails[-3]["parts"][-1] == "layer4.0.conv3"  # 512 + 512 channels do not fit into 99 KiB


@pytest.mark.usefixtures("no_gpu")
def test_int8_moves_a_byte_and_multiplies_at_twice_the_rate() -> None:
    arguments = ["-a", "resnet18", "-b", "4", "--gpu", "h100", "--json", "-"]
    found, half = (run(*arguments, "--dtype", dtype).json()["schedules"] for dtype in ("int8", "float16"))
    assert [schedule["name"] for schedule in found] == ["eager", "per-conv", "int8"] and found[1] == half[1]
    floats = {row["layer"]: row for row in found[1]["rows"]}
    by_op: dict[str, list[dict[str, Any]]] = {}
    for row in found[2]["rows"]:
        by_op.setdefault(row["op"], []).append(row)
    assert {op: len(rows) for op, rows in by_op.items()} == {"stem": 1, "quantize": 1, "conv_int8": 19, "head": 1}
    for row in by_op["conv_int8"]:
        other, k = floats[row["layer"]], row["shape"][1]
        assert row["math_seconds"] == pytest.approx(other["math_seconds"] / 2)
        # The last one's output and residual are in half precision, as its reader is.
        wider = 2 * 4 * 512 * 7 * 7 if row["layer"] == "layer4.1.conv2" else 0
        assert row["activations"] == other["activations"] / 2 + wider
        assert row["weights"] == (other["weights"] - 8 * k) / 2 + 12 * k
    (rounding,) = by_op["quantize"]
    assert rounding["bytes_seconds"] == pytest.approx(3 * 4 * 64 * 56 * 56 / H100.bandwidth)
    assert half[1]["per_image"]["floor_seconds"] > 1.7 * found[2]["per_image"]["floor_seconds"]


@pytest.mark.usefixtures("no_gpu")
def test_int8_at_a_given_rate() -> None:
    numbers = ["--bandwidth", "3.0", "--tflops", "1596", "-a", "resnet18", "--json", "-"]
    given, built_in = run(*numbers, "--dtype", "int8"), run(*numbers[4:], "--gpu", "h100", "--dtype", "int8")
    assert given.json()["schedules"] == built_in.json()["schedules"]
    refused = run("-a", "resnet18", "--dtype", "int8", "--plot", "a.svg")
    refused.failed("--plot draws one rate of products")


def test_measured_times_stand_beside_the_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    straight = command.schedules(command.Subject("resnet18", 2, 64, command.Arithmetic.float16), H100)[1]
    seconds = {frozenset(kernel.parts): 3 * kernel.work.floor(H100, "fp16") for kernel in straight.kernels}
    monkeypatch.setattr(command, "_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(command, "measure", lambda subject, device: (seconds, ("triton",)))
    arguments = ["-a", "resnet18", "-b", "2", "--image-size", "64"]
    out = run(*arguments, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg").passed()
    lines = [line for line in out.splitlines() if "layer2.0.conv1" in line]
    assert all("3.00x" in line for line in lines) and lines
    assert "measured on NVIDIA H100 80GB HBM3, random weights, triton: optimize()'s 21 fused ops take" in out
    rows = json.loads((tmp_path / "a.json").read_text())["schedules"][1]["rows"]
    assert all(row["measured_seconds"] == pytest.approx(3 * row["floor_seconds"]) for row in rows)
    assert "hollow: measured" in (tmp_path / "a.svg").read_text()

    assert "3.00x" in run(*arguments, "--gpu", "h100").out  # the same one, by name
    out = run(*arguments, "--gpu", "l4").out
    assert "3.00x" not in out
    assert "nothing measured: this machine's GPU is NVIDIA H100 80GB HBM3, the floors are l4's" in out


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--arch", "vgg16"], "unknown arch 'vgg16'"),
        (["--gpu", "h1000"], "unknown GPU 'h1000'; built in are h100, h200"),
        (["--bandwidth", "2"], "--tflops is missing"),
        (["--tflops", "2"], "--bandwidth is missing"),
        (["--tflops", "2", "--bandwidth", "0"], "--bandwidth is 0.0; it must be a positive number"),
        (["--tflops", "nan", "--bandwidth", "1"], "--tflops is nan"),
        (["--capability", "90"], "give --bandwidth and --tflops too"),
        (["--tflops", "2", "--bandwidth", "1", "--capability", "52"], "--capability is 52; known are 80, 86"),
        (["--plot", "a.txt"], ".svg"),
        (["--json", "/no/such/folder/a.json"], "there is no folder /no/such/folder"),
    ],
)
@pytest.mark.usefixtures("no_gpu")
def test_errors_are_one_line(arguments: list[str], mention: str) -> None:
    found = run(*arguments)
    found.failed(mention)
    assert not found.out


def test_a_gpu_that_is_not_built_in_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_device_name", lambda: "NVIDIA RTX A6000")
    run("-a", "resnet18").failed("this machine's GPU, NVIDIA RTX A6000, is not built in", "--bandwidth")


@pytest.mark.usefixtures("no_gpu")
def test_wrong_options_exit_with_2() -> None:
    for arguments in (["--dtype", "int4"], ["--batch-size", "0"], ["--image-size", "0"]):
        run(*arguments).failed(code=2)
