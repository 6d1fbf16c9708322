"""Whatever somebody does to torch's layers is honoured, or makes that part run plain."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast as rf
from tests.networks import watch_ops
from tests.nn.twins import Edit, close, put, same_gradients, small_twins

pytestmark = pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 0.9


REPLACED = [
    (nn.BatchNorm2d, "forward"), (nn.modules.batchnorm._BatchNorm, "forward"), (nn.BatchNorm2d, "_call_impl"),
    (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Conv2d, "__call__"), (nn.ReLU, "forward"),
    (nn.MaxPool2d, "forward"), (nn.AdaptiveAvgPool2d, "forward"), (nn.Linear, "forward"), (nn.Sequential, "forward"),
    (F, "conv2d"), (F, "batch_norm"), (F, "relu"), (F, "max_pool2d"), (F, "adaptive_avg_pool2d"), (F, "linear"),
    (torch, "batch_norm"), (torch, "relu_"), (torch, "max_pool2d"), (torch._C._nn, "adaptive_avg_pool2d"),
    (torch, "flatten"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_functions_of_torchs_that_were_replaced(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live models and snapshots call what stands there now, and are fused again when it is put back."""
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = theirs(x)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, _scaled(getattr(owner, name)))
            want = theirs(x)
            assert not close(before, want, 1e-2), "the replacement changes nothing"
            assert close(ours(x), want)
            if (owner, name) != (torch, "flatten"):  # it is in the model's own forward, which is traced
                assert close(rf.optimize(theirs, example_inputs=x)(x), want)
        assert close(ours(x), before)


INSTANCES: dict[str, Edit] = {
    "_conv_forward": lambda m: setattr(m.conv1, "_conv_forward", _scaled(m.conv1._conv_forward)),
    "the stem's forward": lambda m: setattr(m.bn1, "forward", _scaled(m.bn1.forward)),
    "_call_impl": lambda m: setattr(m.layer1[0].bn1, "_call_impl", _scaled(m.layer1[0].bn1._call_impl)),
    "_check_input_dim": lambda m: setattr(m.layer2[0].bn1, "_check_input_dim", lambda x: x.mul_(0.9)),
    "a shortcut's norm": lambda m: setattr(m.layer2[0].downsample, "forward", _scaled(m.layer2[0].downsample.forward)),
    "compile": lambda m: setattr(m.layer1[0].conv2, "_compiled_call_impl", _scaled(m.layer1[0].conv2._call_impl)),
    "the classifier": lambda m: setattr(m.fc, "forward", _scaled(m.fc.forward)),
    "the pool": lambda m: setattr(m.avgpool, "_slow_forward", None) or setattr(m.avgpool, "forward", _half_pool),
}


def _half_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True) / 2


@pytest.mark.parametrize("change", INSTANCES)
def test_methods_of_one_layer_that_were_replaced(change: str) -> None:
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = theirs(x)
        for model in (ours, theirs):
            INSTANCES[change](model)
        want = theirs(x)
        assert not close(before, want, 1e-3), "the replacement changes nothing"
        assert close(ours(x), want)


def test_a_replaced_module_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers do it for every module of the process."""
    ours, theirs = small_twins()
    x = torch.randn(1, 3, 40, 40)
    seen: list[str] = []
    call = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    counts = []
    for model in (ours, theirs):
        seen.clear()
        model(x)
        counts.append(sorted(seen))
    assert counts[0] == counts[1] and counts[0].count("Conv2d") == 12


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_modes_see_torchs_own_calls(training: bool) -> None:
    """A function mode sees every layer, a FlopCounterMode counts what it counts for torchvision's model."""
    x = torch.randn(2, 3, 40, 40)
    called, flops = [], []
    for model in small_twins():
        model.train(training)
        with _Counting() as mode:
            model(x)
        called.append({name: n for name, n in mode.calls.items() if name in ("conv2d", "batch_norm", "relu", "linear")})
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert called[0] == called[1] and called[0]["conv2d"] == 12
    assert flops[0] == flops[1] > 0


def test_a_mode_that_changes_results_counts() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is torch.conv2d else out

    ours, theirs = small_twins()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        before = theirs(x)
        with Doubling():
            want = theirs(x)
            assert close(ours(x), want) and not close(want, before, 1e-2)
        assert close(ours(x), before)


@pytest.mark.parametrize("training", [False, True])
def test_a_default_device_changes_nothing(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a function mode too, but only of calls that make tensors: the models stay fused."""
    ours, theirs = (model.double() for model in small_twins())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    ran = watch_ops(monkeypatch)
    with torch.device("meta"):
        got, want = (model.train(training)(x) for model in (ours, theirs))
        counted = [name for name, _ in ran if name in ("conv_bn_act", "head")]
        assert got.device.type == "cpu" and close(got, want) and len(counted) == (1 if training else 12)
        for out in (got, want):
            out.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert close(p.grad, q.grad, 1e-10), name


class _Scaled(Tensor):
    """A weight stored as a tensor and a factor, as quantised ones are; it knows how torch's layers compute with it."""

    factor: float

    @staticmethod
    def __new__(cls, stored: Tensor, factor: float) -> Any:
        made = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=stored.device)  # type: ignore[attr-defined]
        made.stored, made.factor = stored, factor
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].factor)
        plain = [a.stored * a.factor if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


SUBCLASSED = ["fc.weight", "fc.bias", "conv1.weight", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight",
              "layer2.0.bn1.weight", "bn1.running_var", "layer3.0.bn2.running_mean"]  # fmt: skip


@pytest.mark.parametrize("name", SUBCLASSED)
def test_weights_that_are_tensor_subclasses(name: str) -> None:
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 40, 40)
    for model in (ours, theirs):
        layer = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        value = _Scaled(getattr(layer, last).detach(), 0.5)
        setattr(layer, last, nn.Parameter(value, requires_grad=False) if last in ("weight", "bias") else value)
    with torch.no_grad():
        assert close(ours(x), theirs(x))


@pytest.mark.parametrize("training", [False, True])
def test_images_that_are_tensor_subclasses(training: bool) -> None:
    """torchvision's images, and a subclass of somebody's that watches every call."""

    class Logged(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    ours, theirs = (model.train(training) for model in small_twins())
    x = torch.randn(2, 3, 40, 40)
    assert close(ours(tv_tensors.Image(x)), theirs(tv_tensors.Image(x)))
    counts = []
    for model in (ours, theirs):
        Logged.seen.clear()
        out = model(x.as_subclass(Logged))
        assert type(out) is Logged
        counts.append(Counter(name for name in Logged.seen if name in ("conv2d", "batch_norm", "linear", "relu_")))
    assert counts[0] == counts[1] and counts[0]["conv2d"] == 12


def test_why_a_layer_runs_plain_is_recorded() -> None:
    ours, _ = small_twins()
    ours.layer1[0].conv1._conv_forward = ours.layer1[0].conv1._conv_forward
    before = Counter(rf.backends.fallbacks())
    ours(torch.randn(1, 3, 33, 33))
    new = Counter(rf.backends.fallbacks()) - before
    assert any("_conv_forward of a Conv2d" in reason for _, reason in new)


class _Frozen(nn.Module):
    """A frozen norm of somebody's own, whose eps is for show: the statistics contain it already."""

    def __init__(self, channels: int, eps: float = 0.5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class _FrozenOurs(rf.nn.FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _FrozenTheirs(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [_Frozen, _FrozenOurs, _FrozenTheirs])
@pytest.mark.parametrize("training", [False, True])
def test_frozen_norms_of_others_run_by_their_own_forward(kind: type[nn.Module], training: bool) -> None:
    """Whatever they are called: nothing is decided by a name."""
    kind = type("FrozenBatchNorm2d", (kind,), {})
    ours, theirs = (model.train(training) for model in small_twins(norm_layer=kind))
    x = torch.randn(2, 3, 40, 40)
    before = Counter(rf.backends.fallbacks())
    with torch.no_grad():
        want = theirs(x)
        assert close(ours(x), want)
        assert close(rf.optimize(theirs.eval())(x), want)
    assert any("FrozenBatchNorm2d" in reason for _, reason in Counter(rf.backends.fallbacks()) - before)


@pytest.mark.parametrize("kind", [rf.nn.FrozenBatchNorm2d, FrozenBatchNorm2d])
def test_known_frozen_norms_with_another_forward(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = small_twins(norm_layer=kind)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert close(ours(x), theirs(x))
        monkeypatch.setattr(kind, "forward", _scaled(kind.forward))
        want = theirs(x)
        assert close(ours(x), want)
        assert close(rf.optimize(theirs)(x), want)


GEOMETRIES: dict[str, Edit] = {
    "stride 1": lambda m: (
        put(m.layer4[0].conv1, stride=1),
        put(m.layer4[0].downsample[0], stride=1),
    ),
    "stride (1,)": lambda m: (
        put(m.layer4[0].conv1, stride=(1,)),
        put(m.layer4[0].downsample[0], stride=[1]),
    ),
    "a list": lambda m: put(m.conv1, stride=[2, 2], padding=[3, 3]),
    "padding 1": lambda m: put(m.layer1[0].conv1, padding=1),
    "same": lambda m: put(m.layer1[0].conv2, padding="same"),
    "same, dilated": lambda m: put(m.layer1[0].conv2, padding="same", dilation=2),
    "valid": lambda m: put(m.conv1, padding="valid"),
    "no padding at the stem": lambda m: put(m.conv1, padding=0),
    "dilation 2": lambda m: put(m.layer3[0].conv2, padding=2, dilation=2),
    "same, uneven": lambda m: put(m.conv1, stride=1, padding="same", weight=nn.Parameter(m.conv1.weight[..., 1:])),
    "a 5x5 stem": lambda m: put(m.conv1, weight=nn.Parameter(m.conv1.weight[..., 1:-1, 1:-1].detach().clone())),
    "kernel_size of no meaning": lambda m: put(m.conv1, kernel_size=3),
    "circular": lambda m: put(m.layer1[0].conv1, padding_mode="circular"),
    "pairs for the pool": lambda m: put(m.maxpool, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
    "an uneven pool": lambda m: put(m.maxpool, kernel_size=(3, 2), stride=[2, 1], padding=(1, 0), dilation=(1, 2)),
    "the pool's own stride": lambda m: put(m.maxpool, stride=None),
    "a list of outputs": lambda m: put(m.avgpool, output_size=[1, 1]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry_in_any_form(name: str) -> None:
    """Ints, one int for both directions, lists and strings, as torch's layers take them; also for optimize()."""
    ours, theirs = (model.double() for model in small_twins())
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    for model in (ours, theirs):
        GEOMETRIES[name](model)
    with torch.no_grad():
        want = theirs(x)
        assert close(ours(x), want, 1e-12)
        assert close(rf.optimize(theirs)(x), want, 1e-12) and close(rf.optimize(ours)(x), want, 1e-12)
    for lean in (False, True):
        ours.memory_efficient = lean
        ours.train(), theirs.train()
        ours.zero_grad(), theirs.zero_grad()
        same_gradients(ours, theirs, x)


class _First(nn.Module):
    """A first layer that prepares what it is given and calls the convolution on it."""

    def __init__(self, conv: nn.Module, prepare: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.conv, self.prepare = conv, prepare

    def forward(self, x: Any) -> Tensor:
        return self.conv(self.prepare(x))


class _Reading(nn.Conv2d):
    """A subclass of Conv2d that reads bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


def _reading(conv: Any) -> nn.Module:
    made = _Reading(3, 64, 7, 2, 3, bias=False)
    made.load_state_dict(conv.state_dict())
    return made


def _bytes_before(conv: Any) -> nn.Module:
    conv.register_forward_pre_hook(lambda module, args: (args[0].float() / 255,))
    return conv


def _bytes_inside(conv: Any) -> nn.Module:
    forward = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: forward(x.float() / 255, weight, bias)
    return conv


_BYTES = torch.arange(2 * 3 * 40 * 40).remainder(251).byte().view(2, 3, 40, 40)
_FLOATS = _BYTES / 255 - 0.5

FIRST: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "4 channels": (lambda conv: nn.Sequential(nn.Conv2d(4, 3, 1), conv), torch.randn(2, 4, 40, 40)),
    "bytes": (lambda conv: _First(conv, lambda x: x.float() / 255), _BYTES),
    "bytes, a subclass": (_reading, _BYTES),
    "bytes, a hook": (_bytes_before, _BYTES),
    "bytes, a replaced method": (_bytes_inside, _BYTES),
    "features": (lambda conv: nn.Identity(), torch.randn(2, 64, 20, 20)),
    "video": (lambda conv: _First(conv, lambda x: x.flatten(0, 1)), _FLOATS[None]),
    "one image": (lambda conv: _First(conv, lambda x: x[None]), _FLOATS[0]),
    "flat": (lambda conv: _First(conv, lambda x: x.unflatten(1, (3, 40, 40))), _FLOATS.flatten(1)),
    "NHWC": (lambda conv: _First(conv, lambda x: x.permute(0, 3, 1, 2)), _FLOATS.permute(0, 2, 3, 1).contiguous()),
    "a dict": (lambda conv: _First(conv, lambda x: x["pixel_values"]), {"pixel_values": _FLOATS}),
    "a list": (lambda conv: _First(conv, torch.stack), list(_FLOATS)),
    "float64": (lambda conv: _First(conv, lambda x: x.float()), _FLOATS.double()),
    "complex": (lambda conv: _First(conv, lambda x: x.abs()), torch.complex(_FLOATS, _FLOATS)),
    "labels": (lambda conv: nn.Sequential(nn.Embedding(7, 64), nn.Unflatten(2, (64, 1)), _Last()), _BYTES[:, 0, 0] % 7),
    "padded by hand": (lambda conv: nn.Sequential(nn.ZeroPad2d(3), put(conv, padding=0) or conv), _FLOATS),
    "a larger window": (lambda conv: nn.Conv2d(6, 64, 3), torch.randn(2, 6, 40, 40)),
    "grouped": (lambda conv: nn.Conv2d(4, 64, 3, groups=2), torch.randn(2, 4, 40, 40)),
    "in_channels of no meaning": (lambda conv: put(conv, in_channels=1) or conv, _FLOATS),
}  # fmt: skip


class _Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).expand(-1, -1, -1, 40)


@pytest.mark.parametrize("name", FIRST)
def test_another_first_layer_takes_what_it_takes(name: str) -> None:
    ours, theirs = small_twins()
    change, x = FIRST[name]
    if name == "labels":
        x = x.long()
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.conv1 = change(model.conv1).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert close(ours(x), theirs(x))


def test_a_convolution_in_front_still_says_what_it_takes() -> None:
    model, _ = small_twins()
    for x, said in ((_BYTES, "x.float\\(\\) / 255"), (_FLOATS[0], "x.unsqueeze"), (_FLOATS[:, :2], "\\[N, 3, H, W\\]"),
                    (_FLOATS.permute(0, 2, 3, 1), "NHWC"), ("cat.jpg", "got str")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=said):
            model(x)
    model.conv1 = nn.Conv2d(4, 64, 3, groups=2)
    with pytest.raises(ValueError, match="\\[N, 4, H, W\\]"):
        model(_FLOATS)


class _Act(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


UNFREEZABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: _Act(8), "_Act"),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), "no running statistics"),
    "a hook": (lambda: _hooked(nn.BatchNorm2d(8), "register_forward_hook"), "_forward_hooks"),
    "a hook in front": (lambda: _hooked(nn.BatchNorm2d(8), "register_forward_pre_hook"), "_forward_pre_hooks"),
    "a hook of the gradient": (lambda: _hooked(nn.SyncBatchNorm(8), "register_full_backward_hook"), "_backward_hooks"),
    "a hook of loading": (lambda: _hooked(nn.BatchNorm2d(8), "register_load_state_dict_pre_hook"), "load_state_dict"),
    "pruned": (lambda: prune.l1_unstructured(nn.BatchNorm2d(8), "weight", 2), "_forward_pre_hooks"),
    "parametrized": (
        lambda: torch.nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(8), "weight", nn.Tanh()),
        "ParametrizedBatchNorm2d",
    ),
    "another forward": (lambda: put(bn := nn.BatchNorm2d(8), forward=bn.forward) or bn, "forward"),
    "lazy": (nn.LazyBatchNorm2d, "LazyBatchNorm2d"),
}


def _hooked(module: nn.Module, register: str) -> nn.Module:
    getattr(module, register)(lambda *args: None)
    return module


@pytest.mark.parametrize("name", UNFREEZABLE)
def test_a_norm_that_cannot_be_frozen_is_an_error(name: str) -> None:
    make, said = UNFREEZABLE[name]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(make()))
    before = list(net.modules())
    with pytest.raises(ValueError, match=f"2.0 cannot be frozen: .*{said}"):
        rf.nn.FrozenBatchNorm2d.convert(net)
    assert list(net.modules()) == before
    with pytest.raises(ValueError, match="the module itself"):
        rf.nn.FrozenBatchNorm2d.convert(make())


def test_a_shared_norm_is_frozen_once() -> None:
    """Under two names of one module, in two modules, and beside others."""
    shared, other = nn.BatchNorm2d(3, eps=0.1), nn.SyncBatchNorm(3, affine=False)
    net = nn.Sequential(shared, nn.Sequential(other, shared), shared, nn.BatchNorm1d(3)).eval()
    net.alias = net[1]
    for norm in (shared, other):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 5, 4)
    want = shared(net[1](shared(x)))
    assert rf.nn.FrozenBatchNorm2d.convert(net) is net
    assert close(net[:3](x), want)
    assert net[0] is net[2] is net[1][1] is net.alias[1] and type(net[0]) is rf.nn.FrozenBatchNorm2d
    assert type(net[1][0]) is rf.nn.FrozenBatchNorm2d and type(net[3]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="4D input"):
        net[0](x[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kind", "images"),
    [("train", torch.contiguous_format), ("train", torch.channels_last), ("lean", torch.contiguous_format),
     ("eval", torch.contiguous_format), ("frozen", torch.channels_last)],
)  # fmt: skip
def test_gradients_have_the_strides_of_their_weights(
    kind: str, layout: torch.memory_format, images: torch.memory_format
) -> None:
    """Exactly, as DistributedDataParallel wants them; 1x1 and one-channel weights too, whose layout is ambiguous."""
    norm = rf.nn.FrozenBatchNorm2d if kind == "frozen" else nn.BatchNorm2d
    model = rf.models.ResNet(rf.models.Bottleneck, [1, 1, 1, 1], num_classes=5, norm_layer=norm)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.layer3[0].conv2 = nn.Conv2d(256, 256, 3, 2, 1, groups=256, bias=False)
    model.memory_efficient = kind == "lean"
    model.train(kind != "eval").to(memory_format=layout)
    x = torch.randn(2, 1, 48, 48).contiguous(memory_format=images)
    model(x).square().sum().backward()
    wrong = {
        name: (p.stride(), p.grad.stride()) for name, p in model.named_parameters() if p.grad.stride() != p.stride()
    }
    assert not wrong


def test_feature_extractors_are_saved_and_scripted() -> None:
    ours, _ = small_twins()
    x = torch.randn(1, 3, 40, 40)
    extractor = create_feature_extractor(ours, ["layer2", "flatten"])
    want = extractor(x)
    buffer = io.BytesIO()
    torch.save(extractor, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(extractor)),
        torch.load(buffer, weights_only=False),
        torch.jit.script(extractor),
    ):
        got = other(x)
        assert list(got) == ["layer2", "flatten"] and all(close(got[name], want[name]) for name in got)


PUBLIC: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BasicBlock": (lambda: rf.models.BasicBlock(8, 8), (2, 8, 6, 6)),
    "Bottleneck": (lambda: rf.models.Bottleneck(16, 4), (2, 16, 6, 6)),
    "ResidualNetwork": (rf.residual_network, (2, 1, 20, 20)),
    "FrozenBatchNorm2d": (lambda: rf.nn.FrozenBatchNorm2d(3), (2, 3, 4, 4)),
    "ConvBNAct2d": (lambda: nn.Sequential(rf.nn.ConvBNAct2d(3, 4, 3)), (2, 3, 4, 4)),
    "BNAct2d": (lambda: nn.Sequential(rf.nn.BNAct2d(3)), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_traced_modules_are_saved_and_scripted(name: str) -> None:
    make, shape = PUBLIC[name]
    traced = torch.fx.symbolic_trace(make().eval())
    x = torch.randn(shape)
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), traced(x))
    assert torch.equal(torch.jit.script(traced)(x), traced(x))
