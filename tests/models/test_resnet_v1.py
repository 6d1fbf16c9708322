"""ResNet v1 and Caffe's pool as options of the models, against torchvision's ResNet edited layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

import resnet_fast as rf
from resnet_fast.graph import optimize
from resnet_fast.models import BasicBlock, Bottleneck, ResNet
from tests.graph.test_graph import ops
from tests.networks import randomise, small, smooth, watch_ops
from tests.numerics import assert_obeys_error_rule
from tests.training.test_training_models import assert_obey_in_the_median, batches, train

LAYERS = (1, 1, 2, 1)
OPTIONS: dict[str, dict[str, bool]] = {
    "v1": {"stride_in_1x1": True},
    "pool": {"unpadded_pool": True},
    "both": {"stride_in_1x1": True, "unpadded_pool": True},
}


def edit(model: nn.Module, stride_in_1x1: bool = False, unpadded_pool: bool = False) -> nn.Module:
    """torchvision's model as the options are to make ours."""
    for block in model.modules():
        if stride_in_1x1 and isinstance(block, torchvision_models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    if unpadded_pool:
        model.maxpool = nn.MaxPool2d(3, 2, padding=0, ceil_mode=True)
    return model


def pair(option: str, **kwargs: Any) -> tuple[ResNet, nn.Module]:
    """Ours and torchvision's edited, with the same parameters and a few classes, in eval mode."""
    theirs = edit(small(LAYERS, num_classes=10, **kwargs), **OPTIONS[option])
    ours = ResNet(Bottleneck, LAYERS, num_classes=10, **OPTIONS[option], **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """This project's ops that run, by name and arguments."""
    return watch_ops(monkeypatch)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [(64, 64), (97, 97), (65, 71)])
def test_eval_and_optimized(option: str, size: tuple[int, int], called: list[tuple[str, Any]]) -> None:
    """The live model and what ``optimize`` makes of it; the stem is one op in both."""
    ours, theirs = pair(option)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        same, exact = theirs(x), copy.deepcopy(theirs).double()(x.double())
        assert_obeys_error_rule(ours(x), same, exact, option)
        assert (called[0][0], called[0][1].ceil_mode) == ("stem", OPTIONS[option].get("unpadded_pool", False))
        assert [name for name, _ in called[1:]] == ["conv_bn_act"] * (3 * sum(LAYERS) + 4) + ["head"]
        fused = optimize(ours)
        assert_obeys_error_rule(fused(x), same, exact, f"{option}, optimized")
    assert ops(fused).count("stem") == 1
    assert "MaxPool2d" not in ops(fused)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lean", [False, True])
def test_one_training_step(option: str, lean: bool, called: list[tuple[str, Any]]) -> None:
    """The loss, every gradient and every running statistic; nothing but rounding decides which ReLU is open."""
    draws = []
    for _ in range(5):
        ours, theirs = pair(option)
        smooth(theirs)
        ours.load_state_dict(theirs.state_dict())
        ours.memory_efficient = lean
        for model in (ours, theirs):
            model.train().to(memory_format=torch.channels_last)
        data, exact = batches(1, 4, 65), copy.deepcopy(theirs).double()
        draws.append((train(ours, data), train(theirs, data), train(exact, data)))
    assert_obey_in_the_median(draws)
    pooled = [a.ceil_mode for name, a in called if name == "norm_act_pool"]
    assert pooled == ([OPTIONS[option].get("unpadded_pool", False)] * 5 if lean else [])


def test_what_a_compiler_is_told_of_the_unpadded_pool() -> None:
    norm = torch.rand(4), torch.rand(4), torch.rand(4), torch.rand(4) + 0.5, True, None, ""
    x = torch.randn(2, 4, 8, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.resnet_fast.norm_act_pool.default, (x, *norm, True))


@pytest.mark.parametrize("lean", [False, True])
def test_smallest_images(lean: bool) -> None:
    """A pool of 2x2 values is one window that reaches over the edge, live, optimized and in training."""
    ours, theirs = pair("both")
    ours.memory_efficient = lean
    x = torch.randn(2, 3, 3, 4)
    with torch.no_grad():
        same, exact = theirs(x), copy.deepcopy(theirs).double()(x.double())
        for model in (ours, optimize(ours, example_inputs=x)):
            assert_obeys_error_rule(model(x), same, exact)
    assert ours.train()(x).shape == (2, 10)
    assert theirs.train()(x).shape == (2, 10)


def test_dilation_stays_in_the_3x3() -> None:
    """A stage whose stride became a dilation has no stride at all, and its 3x3 the dilation, as torchvision has it."""
    kwargs: dict[str, Any] = {"replace_stride_with_dilation": [False, True, True]}
    ours, theirs = pair("both", **kwargs)
    for stage, stride, dilation in ((2, 2, 1), (3, 1, 1), (4, 1, 2)):
        block = getattr(ours, f"layer{stage}")[0]
        assert (block.conv1.stride, block.conv2.stride, block.conv2.dilation) == (
            (stride, stride), (1, 1), (dilation, dilation),
        )  # fmt: skip
    x = torch.randn(1, 3, 65, 71)
    with torch.no_grad():
        assert_obeys_error_rule(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


def test_both_options_differ_from_torchvision() -> None:
    """Neither option can be lost unseen: each alone changes the result, and none the state_dict's keys."""
    plain = randomise(ResNet(Bottleneck, LAYERS, num_classes=10))
    x = torch.randn(1, 3, 64, 64)
    results: list[Tensor] = [plain(x).detach()]
    for options in OPTIONS.values():
        model = ResNet(Bottleneck, LAYERS, num_classes=10, **options).eval()
        assert list(model.state_dict()) == list(plain.state_dict())
        model.load_state_dict(plain.state_dict())
        results.append(model(x).detach())
    for index, result in enumerate(results):
        for other in results[index + 1 :]:
            assert (result - other).norm() > 1e-3 * result.norm()


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_builders_pass_the_options_on(name: str) -> None:
    with torch.device("meta"):
        model = getattr(rf, name)(stride_in_1x1=True, unpadded_pool=True)
    strides = [(block.conv1.stride[0], block.conv2.stride[0]) for block in (model.layer2[0], model.layer2[1])]
    assert strides == [(2, 1), (1, 1)]
    assert (model.maxpool.padding, model.maxpool.ceil_mode) == (0, True)


def test_blocks_without_a_1x1() -> None:
    with pytest.raises(ValueError, match="stride_in_1x1 must be False for BasicBlock"):
        ResNet(BasicBlock, LAYERS, stride_in_1x1=True)
    with pytest.raises(ValueError, match="stride_in_1x1"):
        rf.resnet18(stride_in_1x1=True)
    assert rf.resnet18(unpadded_pool=True).maxpool.ceil_mode
