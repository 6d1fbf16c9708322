"""The memory format of feature maps: torch's own rule, whatever the ops inside return."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast as rf
from resnet_fast.nn import pristine
from tests.nn.twins import close, put, randomise, small_twins
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")


def _cut(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model.children())[:-2]).train(model.training)


class _Viewing(nn.Module):
    """Old code that takes its input for NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1).mean(2)[..., None, None]


def _maps_of_a_getter(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(IntermediateLayerGetter(model, {"layer1": "a", "layer3": "b"})(x).values())


def _maps_of_hooks(model: nn.Module, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out))
        for name in ("layer2", "layer3.0", "avgpool")
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


MAPS: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "cut off": lambda model, x: [_cut(model)(x)],
    "a block": lambda model, x: [model.layer2[0](model.maxpool(model.conv1(x)))],
    "a getter": _maps_of_a_getter,
    "hooks": _maps_of_hooks,
    "an extractor": lambda model, x: list(create_feature_extractor(model, ["layer1", "layer4"])(x).values()),
    "no head": lambda model, x: [put(model, avgpool=nn.Identity(), fc=nn.Unflatten(1, (512, 2, 3))) or model(x)],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_have_torchvisions_strides(name: str, training: bool) -> None:
    """NCHW from NCHW images, channels_last from channels_last ones and from models converted to it."""
    for weights in (torch.contiguous_format, torch.channels_last):
        for images in (torch.contiguous_format, torch.channels_last):
            ours, theirs = (model.train(training).to(memory_format=weights) for model in small_twins())
            x = torch.randn(2, 3, 64, 96).contiguous(memory_format=images)
            for a, b in zip(MAPS[name](ours, x), MAPS[name](theirs, x), strict=True):
                assert a.stride() == b.stride() and close(a, b, 1e-4)
                if not training and name == "cut off":
                    assert rf.optimize(_cut(theirs))(x).stride() == b.stride()


@pytest.mark.parametrize("name", ["layer2", "layer4", "avgpool"])
def test_layers_that_view_their_input(name: str) -> None:
    """A layer of somebody's in the middle of a model is given what torch's layers would give it."""
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 64, 96)
    for model in (ours, theirs):
        before = {"layer2": nn.Conv2d(64, 128, 1), "layer4": nn.Conv2d(256, 512, 1), "avgpool": nn.Identity()}[name]
        nn.init.ones_(before.weight) if name != "avgpool" else None
        setattr(model, name, nn.Sequential(_Viewing(), before) if name != "avgpool" else _Viewing())
        if name != "avgpool":
            nn.init.zeros_(before.bias)
    with torch.no_grad():
        assert close(ours(x), theirs(x))


def test_modules_of_ours_answer_in_the_format_of_their_input() -> None:
    norm = nn.BatchNorm2d(8)
    modules = [
        (rf.nn.ConvBNAct2d(8, 8, 3), lambda m, x: m.act(m.bn(m.conv(x)))),
        (rf.nn.ConvBNAct2d(8, 8, 1), lambda m, x: m.act(m.bn(m.conv(x)))),
        (rf.nn.BNAct2d(8), lambda m, x: m.act(m.bn(x))),
        (rf.nn.FrozenBatchNorm2d.convert(norm), lambda m, x: norm.eval()(x)),
    ]
    x = torch.randn(2, 8, 6, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        for module, plain in modules:
            module.to(memory_format=layout).eval()
            nhwc, expanded = x.contiguous(memory_format=torch.channels_last), x[:, :1].expand(-1, 8, -1, -1)
            for given in (x, nhwc, x[:, :, ::2], expanded, x.transpose(2, 3), torch.randn(2, 8, 1, 1)):
                got, want = module(given), plain(module, given)
                assert close(got, want)
                assert want.is_contiguous() <= got.is_contiguous(), type(module)


_BEFORE_THE_IMPORT = """
import functools, torch
from torch import nn
forward, relu = nn.BatchNorm2d.forward, nn.functional.relu
nn.BatchNorm2d.forward = lambda self, x: forward(self, x) * 0.9
nn.functional.relu = functools.wraps(relu)(lambda x, inplace=False: relu(x, inplace) * 0.9)
import resnet_fast as rf
model = rf.models.BasicBlock(8, 8).eval()
x = torch.randn(2, 8, 6, 6)
plain = model.relu(model.bn2(model.conv2(model.relu(model.bn1(model.conv1(x))))) + x)
for got in (model(x), rf.optimize(model)(x)):
    assert torch.allclose(got, plain, atol=1e-6), (got - plain).abs().max()
print("well")
"""


def test_functions_replaced_before_the_import() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _BEFORE_THE_IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "well"), done.stderr[-500:]


class _Flattens(nn.Module):
    """As old code does, on what is NCHW in torchvision's networks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x.view(x.size(0), -1)).all()
        return self.inner(x)


class _OneImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "maxpool", _Flattens(m.maxpool)),
        lambda m: m.maxpool.register_forward_pre_hook(lambda _, args: (args[0].view(-1).view(args[0].shape),)),
        lambda m: setattr(m.layer1[0], "downsample", nn.AdaptiveAvgPool2d(1)),
        lambda m: setattr(m.layer1[0], "downsample", nn.AdaptiveAvgPool2d((None, 1))),
        lambda m: setattr(m.layer1[0], "downsample", _OneImages()),
        lambda m: setattr(m.layer2[0], "downsample", nn.Sequential(m.layer2[0].downsample, nn.AdaptiveMaxPool2d(1))),
    ],
    ids=["pool", "pool's hook", "mean", "column means", "one image's", "projected maximum"],
)
def test_what_torch_adds_and_pools(change: Callable[[nn.Module], Any], lean: bool, training: bool) -> None:
    """A pool of somebody's that flattens, and shortcuts that torch's addition broadcasts."""
    ours, theirs = rf.resnet18(memory_efficient=lean), torchvision.models.resnet18()
    randomise(theirs)
    for model in (ours, theirs):
        change(model)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 3, 64, 96)
    found = [model.train(training)(x.to(model.fc.weight.dtype)).detach() for model in (ours, theirs, exact)]
    assert_obeys_error_rule(*found)


def test_a_frozen_norm_that_was_replaced_at_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's class becomes known when a model first has one, which may be while somebody's patch is in place."""
    norm = FrozenBatchNorm2d(4)
    monkeypatch.delitem(pristine._known, FrozenBatchNorm2d, raising=False)
    forward = FrozenBatchNorm2d.forward
    FrozenBatchNorm2d.forward = lambda self, x: x
    try:
        assert pristine.is_frozen_batch_norm(norm) and pristine.changed(norm)
    finally:
        FrozenBatchNorm2d.forward = forward
    assert pristine.is_frozen_batch_norm(norm) and not pristine.changed(norm)
