"""A live ResNet as one call of the CPU engine: the same answers, and whatever is changed shows at the next forward."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.backends import cpu, packing
from resnet_fast.models import whole
from resnet_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from resnet_fast.nn import FrozenBatchNorm2d
from tests.networks import randomise
from tests.nn.twins import close
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable()), reason="without the CPU engine"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]


def make(block: Any = Bottleneck, **settings: Any) -> Any:
    torch.manual_seed(0)
    return randomise(ResNet(block, [2, 1, 1, 1], num_classes=10, **settings)).eval()


def reference(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The layers as they stand in the model, by plain torch."""
    with rf.backends.use("reference"):
        scores: Tensor = copy.deepcopy(model).to(dtype)(x.to(dtype))
    return scores


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[cpu.Network]:
    """What models have run as one call, in order."""
    seen: list[cpu.Network] = []
    run = cpu.Network.run

    def noted(self: cpu.Network, inputs: Any) -> list[Tensor]:
        seen.append(self)
        return run(self, inputs)

    monkeypatch.setattr(cpu.Network, "run", noted)
    return seen


MODELS: dict[str, Callable[[], Any]] = {
    "basic": lambda: make(BasicBlock),
    "bottleneck": make,
    "groups": lambda: make(groups=4, width_per_group=16),
    "dilated": lambda: make(replace_stride_with_dilation=[False, True, True]),
    "v1": lambda: make(stride_in_1x1=True, unpadded_pool=True),
    "frozen": lambda: make(norm_layer=FrozenBatchNorm2d),
    "lean": lambda: make(memory_efficient=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_answers(name: str, dtype: torch.dtype, calls: list[cpu.Network]) -> None:
    model = MODELS[name]().to(dtype)
    for n, h, w in ((1, 64, 64), (3, 97, 70), (2, 64, 64)):
        x = torch.randn(n, 3, h, w).to(dtype)
        calls.clear()
        found = model(x)
        assert len(calls) == (not cpu.slower(dtype, (64, 64, 3, 3), 1))
        assert found.dtype is dtype and found.is_contiguous()
        assert_obeys_error_rule(found, reference(model, x, dtype), reference(model, x))
        assert torch.equal(found, model(x.to(memory_format=torch.channels_last)))
        assert torch.equal(found[:1], model(x[:1])), "an image has the same bits alone"


@torch.no_grad()
def test_one_call_serves_every_size_until_something_changes(calls: list[cpu.Network]) -> None:
    model = make()
    for n, size in ((1, 64), (2, 65), (1, 33), (1, 64)):
        model(torch.randn(n, 3, size, size))
    assert len(calls) == 4 and len(set(map(id, calls))) == 1
    model.bn1.bias.add_(1)
    model(torch.randn(1, 3, 64, 64))
    assert calls[-1] is not calls[0]


def _put(find: Callable[[Any], Any], **values: Any) -> Callable[[Any], None]:
    return lambda model: [setattr(find(model), name, value) for name, value in values.items()] and None


def _swap(model: Any) -> None:
    model.layer1[0].bn1, model.layer1[0].bn2 = model.layer1[0].bn2, model.layer1[0].bn1


def _another_norm(model: Any) -> None:
    model.layer3[0].bn2 = randomise(nn.BatchNorm2d(256, eps=0.5)).eval()


def _another_block(model: Any) -> None:
    class Louder(Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = Louder(2048, 512)
    model.layer4.append(block.eval())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "eps": _put(lambda m: m.layer1[0].bn1, eps=0.5),
    "stride": lambda m: [_put(lambda m: m.layer2[0].conv2, stride=(1, 1))(m),
                         _put(lambda m: m.layer2[0].downsample[0], stride=(1, 1))(m)],
    "dilation": _put(lambda m: m.layer1[1].conv2, dilation=(2, 2), padding=(2, 2)),
    "padding mode": _put(lambda m: m.layer1[0].conv2, padding_mode="reflect"),
    "pool": _put(lambda m: m.maxpool, kernel_size=2, padding=0),
    "pool, rounded up": _put(lambda m: m.maxpool, ceil_mode=True, padding=0),
    "average of quarters": lambda m: [_put(lambda m: m.avgpool, output_size=(2, 1))(m),
                                      setattr(m, "fc", nn.Linear(2 * 2048, 10))],
    "no classifier": lambda m: setattr(m, "fc", nn.Identity()),
    "classifier": lambda m: setattr(m, "fc", nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, 3)).eval()),
    "classifier without bias": lambda m: setattr(m, "fc", nn.Linear(2048, 3, bias=False)),
    "activation": lambda m: setattr(m.layer3[0], "relu", nn.LeakyReLU(0.3)),
    "activation of the stem": lambda m: setattr(m, "relu", nn.Hardtanh(0, 0.4)),
    "norms swapped": _swap,
    "another norm": _another_norm,
    "no norm": lambda m: setattr(m.layer2[0], "bn1", nn.Identity()),
    "the batch's statistics": lambda m: m.layer2[0].bn1.train(),
    "no statistics": lambda m: [setattr(m.layer2[0].bn1, name, None) for name in ("running_mean", "running_var")],
    "another block": _another_block,
    "a block fewer": lambda m: m.layer1.__delitem__(1),
    "no stage": lambda m: setattr(m, "layer4", nn.Conv2d(1024, 2048, 1)),
    "a block twice": lambda m: m.layer1.append(m.layer1[1]),
    "a shortcut": lambda m: setattr(m.layer1[1], "downsample", nn.Hardtanh(0, 0.3)),
    "a bias": lambda m: setattr(m.layer1[0].conv2, "bias", nn.Parameter(torch.randn(64))),
    "a weight of another size": lambda m: [setattr(m.layer1[0], "conv2", nn.Conv2d(64, 64, 5, padding=2))],
    "a weight in another order": lambda m: _contents(m.layer1[0].conv2.weight, lambda w: w.transpose(0, 1)),
    "one statistic": lambda m: m.bn1.running_mean.detach().numpy().__setitem__(3, -3.0),
    "a hook": lambda m: m.layer2.register_forward_hook(lambda module, args, output: 1.5 * output),
    "a hook in front": lambda m: m.layer3[0].register_forward_pre_hook(lambda module, args: (1.5 * args[0],)),
    "a hook of a layer": lambda m: m.layer3[0].relu.register_forward_hook(lambda module, args, output: 1.5 * output),
    "a block's forward": lambda m: setattr(m.layer4[0], "forward", lambda x: x.new_ones(len(x), 2048, 2, 2)),
    "the model's own part": lambda m: setattr(m, "_forward_impl", lambda x: x.mean((2, 3))),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.layer1[0].conv1) and _contents(
        m.layer1[0].conv1.parametrizations.weight.original0, lambda w: 2 * w),
}  # fmt: skip


def _contents(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    tensor.data.copy_(change(tensor.detach()).clone())


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_shows_at_the_next_forward(change: str, calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(2, 3, 64, 64)
    before = model(x)
    assert len(calls) == 1
    CHANGES[change](model)
    # Hooks and replaced methods refer to this very model: what is run by plain torch is no copy.
    with rf.backends.use("reference"):
        want = model(x)
    assert want.shape != before.shape or not close(before, want, 1e-3), "the change changes nothing"
    assert close(model(x), want)
    assert close(model(x), want)


@torch.no_grad()
def test_a_setting_that_changes_in_place(calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    for conv in (model.layer2[0].conv2, model.layer2[0].downsample[0]):
        conv.stride = [2, 2]
    before = model(x)
    for conv in (model.layer2[0].conv2, model.layer2[0].downsample[0]):
        conv.stride[:] = [1, 1]
    with rf.backends.use("reference"):
        want = model(x)
    assert calls and not close(before, want, 1e-3)
    assert close(model(x), want)


@torch.no_grad()
def test_a_function_that_was_replaced(calls: list[cpu.Network], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    before = model(x)
    calls.clear()
    for owner, name in ((Bottleneck, "forward"), (ResNet, "_forward_impl"), (nn.Sequential, "forward")):
        original = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda self, x, original=original: 1.5 * original(self, x))
            assert not close(model(x), before, 1e-2) and not calls
    assert torch.equal(model(x), before) and calls


def test_layers_run_where_a_call_would_be_noticed(calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(2, 3, 64, 64)
    model(x)  # gradients
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        with torch.profiler.profile():
            model(x)
        torch.func.vmap(lambda image: model(image[None])[0], randomness="error")(x)
        torch.jit.trace(model, x, check_trace=False)
        copy.deepcopy(model).train()(x)
        copy.deepcopy(model).double()(x.double())
        with rf.backends.use("onednn"):
            model(x)
        assert not calls
        with pytest.raises(TypeError, match="bfloat16"):
            model(x.bfloat16())
        assert not model(x[:0]).numel()
    assert not calls


@torch.no_grad()
def test_it_goes_with_the_model() -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    model(x)
    assert model in whole._kept and copy.deepcopy(model) not in whole._kept
    gone, count = weakref.ref(whole._kept[model].network), len(whole._kept)
    del model
    gc.collect()
    assert gone() is None and len(whole._kept) < count


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_bit_is_hashed(threads: int) -> None:
    tensors = [torch.randn(size) for size in (1, 7, 64, 3000, 5)] + [torch.randn(2, 3, 4, 5).bfloat16()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        digests = {packing.digest(tensors)}
        for tensor in tensors:
            bits = tensor.view(-1).view(torch.int16)
            bits[len(bits) // 2] ^= 1
            digests.add(packing.digest(tensors))
    finally:
        torch.set_num_threads(before)
    assert len(digests) == len(tensors) + 1
