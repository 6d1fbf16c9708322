"""What a graph is made of: the same layers and blocks before and after lowering, at any batch and precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import models
from resnet_fast.graph import inventory, optimize
from resnet_fast.graph.capture import capture
from resnet_fast.graph.fold_bn import fold_bn
from resnet_fast.graph.fuse_act import fuse_act
from resnet_fast.graph.fuse_add import fuse_add
from resnet_fast.graph.ir import Notes
from resnet_fast.graph.normalize import normalize
from resnet_fast.graph.shapes import mark_equal_adds
from resnet_fast.kernels import gpus, problems
from resnet_fast.roofline import cost
from tests.networks import Lambda


def image(batch: int, size: int = 64) -> Tensor:
    return torch.empty(batch, 3, size, size, device="meta")


def build(arch: str) -> nn.Module:
    with torch.device("meta"):
        return models.get_model(arch).eval()


@pytest.mark.parametrize(
    ("arch", "blocks", "following"), [("resnet50", 16, 15), ("resnet18", 0, 0), ("resnext50_32x4d", 0, 0)]
)
def test_normal_form_and_modules_have_the_same_blocks(arch: str, blocks: int, following: int) -> None:
    model = build(arch)
    fused = optimize(model, example_inputs=image(2), backend="reference").graph_module
    after = inventory.layers(fused, (image(2),))
    gm = capture(model, (image(2),), {}).gm
    normalize(gm, Notes())
    fold_bn(gm, torch.float32)
    fuse_act(gm)
    mark_equal_adds(gm, (image(2),))
    fuse_add(gm)
    before = inventory.layers(gm)
    convolutions = [layer.problem for layer in after if layer.op == "conv_bn_act"]
    assert [layer.problem for layer in before][-len(convolutions) :] == convolutions
    found, same = inventory.blocks(after), inventory.blocks(before)
    assert len(found) == blocks and sum(block.following is not None for block in found) == following
    assert [block.problem for block in found] == [block.problem for block in same]


def test_layers_at_another_batch_and_precision() -> None:
    model, example = build("resnet50"), image(128, 224)
    fused = optimize(model, dtype=torch.float16, example_inputs=example, backend="reference", gpu="h100").graph_module
    layers = inventory.layers(fused, (image(1),))
    assert {layer.op for layer in layers} == {"conv_bn_act", "stem", "head", "bottleneck_tail"}
    for precision in gpus.PRECISIONS:
        moved = tuple(layer.at(6, precision) for layer in layers)
        assert moved == inventory.layers(fused, (image(6),), precision)
        assert {layer.problem.precision for layer in moved} == {precision}


def test_additions_are_layers_and_other_nodes_are_none() -> None:
    model = Lambda(lambda self, x: torch.sigmoid((self.a(x) + x).relu()), a=nn.AvgPool2d(3, 1, 1)).eval()
    x = torch.empty(3, 4, 6, 6)
    (layer,) = inventory.layers(optimize(model, example_inputs=x).graph_module, (x,), "bf16")
    assert layer.problem == problems.AddAct(3 * 4 * 36, "bf16") and len(layer.sources) == 2
    assert layer.at(5, "fp32").problem == problems.AddAct(5 * 4 * 36, "fp32")


@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_work_of_a_problem(precision: str) -> None:
    item = {"fp16": 2, "bf16": 2}.get(precision, 4)
    conv = problems.ConvBNAct(2, 9, 8, 6, 10, (3, 3), (2, 2), (1, 1), (1, 1), 2, precision, True)
    assert cost.work(conv) == cost.conv(
        2, 6, (9, 8), 10, (3, 3), (2, 2), (5, 4), groups=2, residual=True, itemsize=item
    )  # fmt: skip
    assert cost.work(conv, itemsize=8).activations * item == 8 * cost.work(conv).activations
    bytes_, floats = (problems.Stem(2, 32, 32, 3, 64, uint8, False, precision) for uint8 in (True, False))
    assert cost.work(floats) == cost.stem(2, 3, (32, 32), 64, (8, 8), itemsize=item)
    assert cost.work(floats).activations - cost.work(bytes_).activations == 2 * 3 * 32 * 32 * (item - 1)
    tail = problems.BottleneckTail(2, 8, 8, 64, 256, 2, (128, 8, 8, 2), 32, precision)
    assert cost.work(tail) == cost.bottleneck_tail(
        2, 64, (8, 8), 256, (2, 2), (4, 4), shortcut=(128, (8, 8), (2, 2)), following=32, itemsize=item
    )  # fmt: skip
    backward = problems.BatchNormAct(100, 8, precision, "backward", relu=True, residual=True)
    assert cost.work(backward) == cost.Work(
        (3 + 2) * 800 * item, 0, 6 * 800
    )  # grad, x, its gradient, y, the residual's
