"""The stages of a live ResNet as one call of the CPU engine: the same bits, and every change shows at once."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends import cpu, packing
from resnet_fast.models import stages
from resnet_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from resnet_fast.nn import FrozenBatchNorm2d, fused
from tests.networks import randomise
from tests.nn.twins import close

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable()), reason="without the CPU engine"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]


class Louder(Tensor):
    """Whose convolutions are half as much again."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 1.5 if func is torch.nn.functional.conv2d else out


def make(block: Any = Bottleneck, **settings: Any) -> Any:
    torch.manual_seed(0)
    return randomise(ResNet(block, [2, 1, 1, 1], num_classes=10, **settings)).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[cpu.Network]:
    """What stages have run as one call, in order."""
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
    "channels_last": lambda: make().to(memory_format=torch.channels_last),
    "timm": lambda: timms(),
}


def timms() -> Any:
    timm = pytest.importorskip("timm")
    rf.register_models("timm")
    return randomise(timm.create_model("resnet18_fast", num_classes=10)).eval()


def layer_by_layer(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer, its stages called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run", lambda net, names, x: None)
        scores: Tensor = model(x)
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_answers(name: str, dtype: torch.dtype, calls: list[cpu.Network]) -> None:
    model = MODELS[name]().to(dtype)
    model.fc = nn.Identity()  # torch's linear layer rounds an image alone in another way
    for n, h, w in ((1, 64, 64), (3, 97, 70), (2, 64, 64)):
        x = torch.randn(n, 3, h, w).to(dtype)
        want = layer_by_layer(model, x)
        calls.clear()
        found = model(x)
        assert len(calls) == (not cpu.slower(dtype, (64, 64, 3, 3), 1))
        assert found.dtype is dtype and found.is_contiguous()
        assert torch.equal(found, want)
        x = x.to(memory_format=torch.channels_last)
        assert torch.equal(model(x), layer_by_layer(model, x))
        assert torch.equal(model(x)[:1], model(x[:1])), "an image has the same bits alone"


@torch.no_grad()
def test_one_call_serves_every_size_until_something_changes(calls: list[cpu.Network]) -> None:
    model = make()
    model(torch.randn(1, 3, 64, 64))
    assert not calls, "nothing is packed at first"
    for n, size in ((1, 64), (2, 65), (1, 33), (1, 64)):
        model(torch.randn(n, 3, size, size))
    assert len(calls) == 4 and len(set(map(id, calls))) == 1
    model.layer1[0].bn1.bias.add_(1)
    model(torch.randn(1, 3, 64, 64))
    assert len(calls) == 4
    model(torch.randn(1, 3, 64, 64))
    assert len(calls) == 5 and calls[-1] is not calls[0]


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


def _attributes(model: Any) -> None:
    """Tensors that are no parameters any more, as some libraries leave them."""
    conv, bn = model.layer1[0].conv1, model.layer1[0].bn1
    for module, name in ((conv, "weight"), (bn, "weight")):
        tensor = 1.5 * getattr(module, name).detach()
        del module._parameters[name]
        setattr(module, name, tensor)


def _child_as_attribute(model: Any) -> None:
    block = model.layer1[0]
    del block._modules["conv2"]
    block.__dict__["conv2"] = nn.Conv2d(64, 64, 3, padding=1)


def _swapped_tensors(model: Any) -> None:
    torch.utils.swap_tensors(model.layer1[0].conv1.weight, nn.Parameter(torch.randn(64, 64, 1, 1)))


def _contents(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    tensor.data.copy_(change(tensor.detach()).clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "eps": _put(lambda m: m.layer1[0].bn1, eps=0.5),
    "eps of numpy's": _put(lambda m: m.layer1[0].bn1, eps=np.float64(0.5)),
    "stride": lambda m: [_put(lambda m: m.layer2[0].conv2, stride=(1, 1))(m),
                         _put(lambda m: m.layer2[0].downsample[0], stride=(1, 1))(m)],
    "dilation": _put(lambda m: m.layer1[1].conv2, dilation=(2, 2), padding=(2, 2)),
    "padding mode": _put(lambda m: m.layer1[0].conv2, padding_mode="reflect"),
    "pool": _put(lambda m: m.maxpool, kernel_size=2, padding=0),
    "average of quarters": lambda m: [_put(lambda m: m.avgpool, output_size=(2, 1))(m),
                                      setattr(m, "fc", nn.Linear(2 * 2048, 10))],
    "classifier": lambda m: setattr(m, "fc", nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, 3)).eval()),
    "activation": lambda m: setattr(m.layer3[0], "relu", nn.LeakyReLU(0.3)),
    "no activation": lambda m: setattr(m.layer3[0], "relu", None),
    "norms swapped": _swap,
    "another norm": _another_norm,
    "no norm": lambda m: setattr(m.layer2[0], "bn1", nn.Identity()),
    "the batch's statistics": lambda m: m.layer2[0].bn1.train(),
    "no statistics": lambda m: [setattr(m.layer2[0].bn1, name, None) for name in ("running_mean", "running_var")],
    "statistics of whole numbers": lambda m: [
        setattr(m.layer2[0].bn1, name, torch.full((128,), 3)) for name in ("running_mean", "running_var")],
    "another block": _another_block,
    "a block fewer": lambda m: m.layer1.__delitem__(1),
    "no stage": lambda m: setattr(m, "layer4", nn.Conv2d(1024, 2048, 1)),
    "stages swapped for one": lambda m: [setattr(m, "layer1", nn.Sequential(*m.layer1, *m.layer2)),
                                         setattr(m, "layer2", nn.Sequential(nn.Hardtanh(0, 0.3)))],
    "a block twice": lambda m: m.layer1.append(m.layer1[1]),
    "a shortcut": lambda m: setattr(m.layer1[1], "downsample", nn.Hardtanh(0, 0.3)),
    "a longer shortcut": lambda m: m.layer2[0].downsample.append(nn.Hardtanh(0, 0.3)),
    "a bias": lambda m: setattr(m.layer1[0].conv2, "bias", nn.Parameter(torch.randn(64))),
    "a weight of another size": lambda m: [setattr(m.layer1[0], "conv2", nn.Conv2d(64, 64, 5, padding=2))],
    "a weight in another order": lambda m: _contents(m.layer1[0].conv2.weight, lambda w: w.transpose(0, 1)),
    "another image": lambda m: _contents(m.conv1.weight, lambda w: w.flip(1)),
    "one statistic": lambda m: m.layer1[0].bn1.running_mean.detach().numpy().__setitem__(3, -9.0),
    "a hook": lambda m: m.layer2.register_forward_hook(lambda module, args, output: 1.5 * output),
    "a hook in front": lambda m: m.layer3[0].register_forward_pre_hook(lambda module, args: (1.5 * args[0],)),
    "a hook of a layer": lambda m: m.layer3[0].relu.register_forward_hook(lambda module, args, output: 1.5 * output),
    "a hook of a shortcut": lambda m: m.layer2[0].downsample.register_forward_hook(lambda _, args, out: 1.5 * out),
    "a block's forward": lambda m: setattr(m.layer4[0], "forward", lambda x: x.new_ones(len(x), 2048, 2, 2)),
    "a stage's forward": lambda m: setattr(m.layer4, "forward", lambda x: x.new_ones(len(x), 2048, 2, 2)),
    "the model's own part": lambda m: setattr(m, "_forward_impl", lambda x: x.mean((2, 3))),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.layer1[0].conv1) and _contents(
        m.layer1[0].conv1.parametrizations.weight.original0, lambda w: 2 * w),
    "attributes": _attributes,
    "a child as attribute": _child_as_attribute,
    "tensors swapped": _swapped_tensors,
    "a subclass of tensors": lambda m: setattr(
        m.layer1[0].conv1, "weight", nn.Parameter(torch.randn(64, 64, 1, 1).as_subclass(Louder))),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_shows_at_the_next_forward(change: str, calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(2, 3, 64, 64)
    before = model(x)
    assert torch.equal(model(x), before) and len(calls) == 1
    CHANGES[change](model)
    # Hooks and replaced methods refer to this very model: what is run by plain torch is no copy.
    with rf.backends.use("reference"):
        want = model(x)
    assert want.shape != before.shape or not close(before, want, 1e-3), "the change changes nothing"
    for _ in range(3):
        assert close(model(x), want)


@torch.no_grad()
def test_a_setting_that_changes_in_place(calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    convs = model.layer2[0].conv2, model.layer2[0].downsample[0]
    for conv in convs:
        conv.stride = [2, 2]
    before = model(x)
    assert torch.equal(model(x), before) and calls
    for conv in convs:
        conv.stride[:] = [1, 1]
    with rf.backends.use("reference"):
        want = model(x)
    assert not close(before, want, 1e-3)
    for _ in range(3):
        assert close(model(x), want)


@torch.no_grad()
def test_functions_that_were_replaced(calls: list[cpu.Network], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    before = model(x)
    assert torch.equal(model(x), before)
    calls.clear()
    for owner, name in (
        (Bottleneck, "forward"), (nn.Sequential, "forward"), (nn.BatchNorm2d, "forward"),
        (torch.nn.functional, "conv2d"), (fused, "shortcut"), (fused, "laid_out"), (ops, "conv_bn_act"),
    ):  # fmt: skip
        original = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, original=original, **kw: 1.5 * original(*args, **kw))
            assert not close(model(x), before, 1e-2) and not calls
    assert torch.equal(model(x), before) and calls


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a norm of fewer channels": lambda m: setattr(m.layer1[0], "bn1", nn.BatchNorm2d(32).eval()),
    "another number of channels": lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(32, 64, 3, padding=1)),
    "groups of a weight left as it is": lambda m: setattr(m.layer1[0].conv2, "groups", 2),
    "a stage missing": lambda m: setattr(m, "layer2", nn.Sequential()),
    "a weight of another dtype": lambda m: setattr(m.layer1[0].conv2, "weight", nn.Parameter(
        torch.randn(64, 64, 3, 3, dtype=torch.float64))),
    "no convolution": lambda m: delattr(m.layer1[0], "conv2"),
    "a weight without memory": lambda m: m.layer1[0].conv2.to("meta"),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
@torch.no_grad()
def test_errors_are_the_layers_own(change: str, calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    model(x)
    REFUSED[change](model)
    with pytest.raises(Exception) as want:  # noqa: PT011 - whatever they raise
        layer_by_layer(model, x)
    with pytest.raises(type(want.value)) as found:
        model(x)
    assert str(found.value) == str(want.value) and not calls


def test_stages_are_called_where_one_call_would_be_noticed(calls: list[cpu.Network]) -> None:
    model, x = make(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    model(x)  # gradients
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        with torch.profiler.profile():
            model(x)
        with FlopCounterMode(display=False):
            model(x)
        torch.func.vmap(lambda image: model(image[None])[0], randomness="error")(x)
        torch.jit.trace(model, x, check_trace=False)
        copy.deepcopy(model).train()(x)
        copy.deepcopy(model).double()(x.double())
        with rf.backends.use("onednn"):
            model(x)
        with pytest.raises(TypeError, match="bfloat16"):
            model(x.bfloat16())
        assert not model(x[:0]).numel()
        assert not calls
        model(x)
        assert calls


def test_parameters_without_gradients_need_no_mode(calls: list[cpu.Network]) -> None:
    model, x = make().requires_grad_(False), torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), model(x)) and len(calls) == 1
    model(x.requires_grad_()).sum().backward()
    assert len(calls) == 1 and x.grad is not None
    with torch.inference_mode():
        model(x)
    assert len(calls) == 2


def kept(model: Any) -> Any:
    """The convolution that the network is kept with: the first block's first."""
    entries = packing._cache[model.layer1[0].conv1.weight.untyped_storage()]
    ((_, conv),) = entries.values()
    return conv


@pytest.mark.parametrize("way", ["deleted", "moved", "cast", "a stage deleted", "a stage cast", "edited"])
@torch.no_grad()
def test_it_goes_with_the_weights(way: str) -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    model(x)
    assert kept(model).network is None
    model(x)
    model.fc.owner = [model]  # a cycle, which the collector frees
    gone = weakref.ref(kept(model).network.network)
    assert copy.deepcopy(model).layer1[0].conv1.weight.untyped_storage() not in packing._cache
    if way == "moved":
        model.to("meta")
    elif way == "cast":
        model.half()
    elif way == "a stage cast":
        model.layer3.half()
    elif way == "a stage deleted":
        model.layer4 = model.fc = nn.Identity()
    elif way == "edited":
        model.layer4[0].conv1.weight.data.mul_(2)
        model(x)
    else:
        del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_stages_that_a_hook_replaces() -> None:
    model, x = make(BasicBlock), torch.randn(1, 3, 64, 64)
    model.layer3 = model.layer4 = model.avgpool = model.fc = nn.Identity()
    model(x)
    model.layer1.register_forward_hook(lambda *_: setattr(model, "layer2", nn.Sequential(nn.Hardtanh(0, 0.3))))
    assert model(x).max() <= 0.3


@torch.no_grad()
def test_errors_come_when_the_stage_is_reached() -> None:
    model = make(BasicBlock).train()
    del model.layer4
    with pytest.raises(AttributeError, match="layer4"):
        model(torch.randn(2, 3, 64, 64))
    assert model.layer1[0].bn1.num_batches_tracked == 1


class Contiguous(nn.Module):
    """A pool that gives NCHW, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.max_pool2d(x, 3, 2, 1).contiguous()


@pytest.mark.parametrize("last", ["image", "weight", "neither"])
@torch.no_grad()
def test_memory_formats_are_those_of_layers(last: str) -> None:
    model, x, seen = make(), torch.randn(2, 3, 64, 64), []
    model.maxpool = Contiguous()
    model.avgpool.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()) and None)
    if last == "image":
        x = x.to(memory_format=torch.channels_last)
    elif last == "weight":
        model.conv1.to(memory_format=torch.channels_last)
    for _ in range(3):
        model(x)
    assert len(set(seen)) == 1


@torch.no_grad()
def test_why_layers_run_alone_is_said_once() -> None:
    model, x = make(), torch.randn(1, 3, 64, 64)
    model(x)
    model(x)
    model.layer2[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        noted: list[str] = []
        patch.setattr(backends, "fallback", lambda op, reason: noted.append(reason))
        model(x)
    assert len(noted) == 1 and "hook" in noted[0]


@torch.no_grad()
def test_models_share_weights(calls: list[cpu.Network]) -> None:
    one, x = make(), torch.randn(1, 3, 64, 64)
    two = make()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        b.data = a.data
    for name, buffer in one.named_buffers():
        two.get_buffer(name).set_(buffer)
    for _ in range(3):
        assert torch.equal(one(x), two(x))
    one.layer1[0].conv1.weight.data.mul_(1.5)
    want = layer_by_layer(one, x)
    assert torch.equal(one(x), want) and torch.equal(two(x), want)


@torch.no_grad()
def test_threads_that_edit_get_old_or_new_answers() -> None:
    model, x = make(), torch.randn(1, 3, 32, 32)
    weight = model.layer1[0].conv1.weight
    contents = weight.detach().clone(), 1.5 * weight.detach()
    answers = []
    for content in contents:
        weight.data.copy_(content)
        answers.append(model(x))
    assert not close(*answers, 1e-3)

    def edit(index: int) -> bool:
        weight.data.copy_(contents[index % 2])
        found = model(x)  # of one or the other: two threads edit
        return any(torch.equal(found, answer) for answer in answers)

    # A layer's weight is small enough to be copied between two others' hashes.
    with ThreadPoolExecutor(1) as pool:
        assert all(pool.map(edit, range(20)))


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_every_bit_is_hashed(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    convs = [nn.Conv2d(8, 8, size) for size in (1, 3, 5, 2, 7)]
    convs[1].to(memory_format=torch.channels_last)
    triples = [(conv.weight, torch.rand(8), torch.rand(8)) for conv in convs]
    layer: Any = None
    found = [packing.Found(triple, packing._digest(*triple), layer, layer) for triple in triples]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert packing.unchanged(found) and packing.unchanged([])
        for triple in triples:
            for tensor in triple:
                bits = tensor.data.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
                bits = (tensor.data if tensor.is_contiguous() else bits).view(-1).view(torch.int16)
                bits[len(bits) // 2] ^= 1
                assert not packing.unchanged(found)
                bits[len(bits) // 2] ^= 1
        assert packing.unchanged(found)

        def refuse(self: Any) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            assert packing.unchanged(found)
            triples[-1][1][0] += 1
            assert not packing.unchanged(found)
        broken = packing.Found((torch.empty(1, device="meta"),) * 3, b"", layer, layer)
        with pytest.raises(NotImplementedError):
            packing.unchanged([*found[:4], broken])
    finally:
        torch.set_num_threads(before)
