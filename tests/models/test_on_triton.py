"""Whole networks on the Triton kernels: every kind of block, live and optimized, against torchvision."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import resnet_fast as rf
from resnet_fast import backends, models
from resnet_fast.backends import triton
from resnet_fast.graph import fuse_tail
from resnet_fast.kernels import gpus
from tests.networks import small
from tests.numerics import assert_obeys_error_rule
from tests.triton_device import DEVICE, FORMS, count_launches, kernels

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("form", FORMS)]

NETS: dict[str, dict[str, Any]] = {
    "bottlenecks": {},
    "basic blocks": {"block": torchvision.models.resnet.BasicBlock},
    "groups": {"groups": 8, "width_per_group": 8},
    "dilated": {"replace_stride_with_dilation": [True, False, False]},
}
SIZES = {"bottlenecks": (33, 47), "basic blocks": (32, 32), "groups": (32, 48), "dilated": (40, 32)}


def without_the_wide_stages(net: nn.Module) -> nn.Module:
    """The stem, two stages and the head: every kind of block, and not the widths that an interpreter crawls through."""
    net.layer3 = net.layer4 = nn.Identity()
    block = net.layer2[-1]
    channels = (block.bn3 if hasattr(block, "bn3") else block.bn2).num_features
    net.fc = nn.Linear(channels, 10)
    return net


def nets(name: str, layers: tuple[int, ...] = (2, 1, 1, 1)) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return without_the_wide_stages(small(layers, **NETS[name])).eval(), torch.randn(2, 3, *SIZES[name])


def seeded(library: Any, block: str, first: int = 2) -> nn.Module:
    """A network of torchvision's or of ours, which the same seed gives the same parameters.

    first: blocks of the first stage.
    """
    torch.manual_seed(0)
    return without_the_wide_stages(library.ResNet(getattr(library, block), [first, 1, 1, 1])).eval()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op's kernel was launched."""
    return count_launches(monkeypatch, "conv_bn_act", "stem", "head", "bottleneck_tail", "add_act")


def compare(ours: nn.Module, net: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.to(dtype).double())
        same = copy.deepcopy(net).to(dtype)(x.to(dtype))
        got = ours(x.to(dtype).to(DEVICE)).to(dtype).cpu()
    assert_obeys_error_rule(got, same, exact)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in NETS] + [("bottlenecks", torch.bfloat16), ("basic blocks", torch.float16)],
)
def test_optimized_networks_equal_torchvision(form: str, name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    net, x = nets(name)
    with kernels(form):
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=dtype, backend="triton")
        assert {row.backend for row in fused.report().fused} == {"triton"}
        compare(fused, net, x, dtype)
    assert launched["stem"] == launched["head"] == 1 and launched["conv_bn_act"] >= 7


def test_planned_networks_equal_torchvision(form: str, launched: Counter[str]) -> None:
    """With bottleneck_tail, on a GPU of one multiprocessor, whose tiles a few pixels fill."""
    net, x = nets("bottlenecks", (2, 2, 1, 1))
    gpu = replace(triton.gpu_of(torch.device(DEVICE)) if DEVICE == "cuda" else gpus.known(form), multiprocessors=1)
    with triton.assume(gpu), backends.use("triton"):
        fused = rf.optimize(
            copy.deepcopy(net).to(DEVICE),
            dtype=torch.float16,
            backend="triton",
            gpu=None if DEVICE == "cuda" else form,
            check=False,
        )
        compare(fused, net, x, torch.float16)
    assert launched["bottleneck_tail"] >= 3, fused.report()
    assert launched["stem"] == launched["head"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_live_networks_equal_torchvision(form: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    net, live = (seeded(library, "BasicBlock") for library in (torchvision.models.resnet, models.resnet))
    x = torch.randn(1, 3, 32, 32)
    with kernels(form):
        compare(live.to(dtype).to(DEVICE), net, x, dtype)
    assert launched["stem"] == launched["head"] == 1 and launched["conv_bn_act"] == 7


class Tap(nn.Module):
    """An addition that no convolution can carry."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        return torch.relu(y + torch.max_pool2d(y, 3, 1, 1))


def test_features_under_the_residual_after_the_activation(form: str, launched: Counter[str]) -> None:
    """An addition that no convolution can carry runs as add_act."""
    net = Tap().eval()
    with kernels(form):
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, backend="triton")
        compare(fused, net, torch.randn(2, 3, 9, 12), torch.float32)
    assert launched["add_act"] == 1 and launched["conv_bn_act"] == 1


def test_lazily_negated_images(form: str) -> None:
    net, _ = nets("basic blocks")
    lazy = torch.conj(torch.randn(1, 3, 32, 32, dtype=torch.complex64)).imag
    assert lazy.is_neg()
    with kernels(form):
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, backend="triton")
        compare(fused, net, lazy, torch.float32)


def test_an_optimized_network_compiles(form: str) -> None:
    """A launch cannot be traced; the ops can."""
    net, x = nets("basic blocks")
    with kernels(form):
        fused = rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, backend="triton", cuda_graphs=False)
        compiled = torch.compile(fused.graph_module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            compare(compiled, net, x, torch.float32)


def test_the_planner_and_the_kernel_agree(form: str) -> None:
    """What the plan calls feasible is what the op then launches."""
    assert (
        fuse_tail.bottleneck_tail_choice.heuristic
        is importlib.import_module("resnet_fast.kernels.bottleneck_tail").heuristic
    )
