"""Quantized snapshots by the CPU engine: one call, layers as their definitions say, and what is left to others."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import cpu, onednn_int8
from resnet_fast.graph import OptimizedModule, engine, guard, optimize, quantize_layers
from resnet_fast.graph.quantize_layers import Convolution, MaxPool, Quantize, Quantized, real
from tests.graph.test_quantize import Residual, block, images, made, sqnr
from tests.networks import Lambda, conv_bn, randomise

pytestmark = pytest.mark.skipif(bool(cpu.without_uint8()), reason=cpu.without_uint8() or "-")


def calls(fast: OptimizedModule) -> int:
    planned = fast._engine()
    return 0 if planned is None else sum(isinstance(part, engine.Segment) for part in planned.modules())


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """Count from now on how often methods of the engine's networks are called."""
    counts = dict.fromkeys(names, 0)

    def spied(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: cpu.Network, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return method(self, *args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(cpu.Network, name, spied(name, getattr(cpu.Network, name)))
    return counts


class Odd(nn.Module):
    """Channels that fill no vector, unlike strides, dilation, wide groups, pools, a stream added behind the ReLU."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first = block(channels, 17)
        self.a, self.b = block(17, 33, dilation=2, padding=2), conv_bn(33, 33, kernel_size=(1, 3), padding=(0, 1))
        self.c, self.d = block(33, 64, kernel_size=5, stride=(3, 1), padding=2), conv_bn(64, 64, groups=4)
        self.e, self.f = conv_bn(64, 64, kernel_size=1, padding=0), conv_bn(64, 40)
        self.fc = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x), 2, 1, 1)
        x = F.relu(self.b(self.a(x)))
        x = self.c(F.max_pool2d(x, 3, 2, 1))
        x = F.relu(self.d(x)) + x
        x = F.relu(self.e(x) + x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.f(x), 1), 1))


class Compared(fx.Interpreter):
    """Runs a quantized graph layer by layer, and each by its definition of the same inputs too."""

    different = count = 0

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module: Any = self.fetch_attr(target)
        found = super().call_module(target, args, kwargs)
        if isinstance(module, Quantized) and found.dtype is torch.uint8:
            with guard.without_integers():
                if isinstance(module, Convolution):
                    ways = module.affine("x"), module.affine("residual")
                    meant = module.defined(*(real(each, way) for each, way in zip(args, ways, strict=False)))
                    meant = quantize_layers.stored(meant, module.affine("out"), module.largest)  # type: ignore[arg-type]
                elif isinstance(module, Quantize):
                    meant = quantize_layers.stored(module(*args), module.stored_as, module.largest)
                else:
                    meant = module(args[0].float()).to(torch.uint8)
            difference = (found.int() - meant.int()).abs()
            assert not difference.numel() or int(difference.max()) <= 1, target
            assert not isinstance(module, MaxPool | Quantize) or not bool(difference.any())
            self.different, self.count = self.different + int((difference > 0).sum()), self.count + found.numel()
        return found


@pytest.mark.parametrize("kind", ["residual", "odd", "odd, one channel", "odd, 7 bits"])
def test_every_layer_is_its_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "odd, 7 bits":
        monkeypatch.setattr(quantize_layers, "LARGEST", 127)
        monkeypatch.setattr("resnet_fast.graph.quantize_build.LARGEST", 127)
    channels = 1 if kind == "odd, one channel" else 3
    model = made(Odd(channels) if kind.startswith("odd") else Residual())
    fast = rf.quantize(model, images(channels=channels), keep_float=[])
    assert fast.quantization is not None and len(fast.quantization.int8) == (5 if kind == "residual" else 6)
    assert calls(fast) == 1 and fast._in_one_call()
    assert {row.backend for row in fast.report().fused} == {"cpu", quantize_layers.ENGINE}
    compared = Compared(fast.graph_module)
    with torch.no_grad():
        for shape in ((0, 8, 8), (1, 1, 1), (3, 7, 5), (1, 97, 131), (2, 24, 24)):
            x = torch.randn(shape[0], channels, *shape[1:])
            found, layered = fast(x), compared.run(x)
            assert found.shape == layered.shape
            # The first convolution rounds from sums of its own, of bfloat16 where it can be multiplied.
            assert not len(x) or sqnr(layered, found) > 22, shape
            assert not len(x) or sqnr(model(x), found) > 22, shape
    assert compared.count > 50_000 and compared.different <= compared.count // 1000


def test_a_resnet_converts_nowhere_outside_of_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = rf.quantize(randomise(rf.resnet18().eval()), [torch.randn(1, 3, 48, 48)], check=False)
    counts = counted(monkeypatch, "quantize", "dequantize", "input", "convolution", "max_pool")
    assert calls(fast) == 1 and fast._in_one_call()
    layers = sum(isinstance(module, Convolution) for module in fast.graph_module.modules())
    assert counts == {"quantize": 0, "dequantize": 0, "input": 1, "convolution": layers + 2, "max_pool": 1}


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_what_is_drawn_into_convolutions_changes_nothing(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions by themselves give the same bits as the layers one by one; in the convolutions about the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x), 3, 2, 1)
        return F.relu(self.c(self.a(x)) + self.b(x))

    first = block(3, 40, kernel_size=7, stride=2, padding=3) if stem == "7x7" else block(3, 40)
    model = made(Lambda(forward, first=first, a=block(40, 24), b=conv_bn(40, 24), c=conv_bn(24, 24)))
    fast = rf.quantize(model, images())
    x = torch.randn(3, 3, 33, 20)
    with torch.no_grad():
        wanted = fast.graph_module(x)
    found = fast(x)
    assert calls(fast) == 1 and sqnr(wanted, found) > (35 if cpu.module().isa() in ("avx512_bf16", "amx") else 45)
    monkeypatch.setattr(engine, "_rounding", lambda *_: {})
    fast._planned = None
    torch.testing.assert_close(fast(x), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(engine, "_adding", lambda *_: {})
    fast._planned = None
    assert torch.equal(fast(x), wanted.contiguous())


def test_a_stream_that_is_read_in_float_too() -> None:
    """What is added as it is stored may also be read as real numbers, by whoever."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = self.b(self.a(self.first(x)))
        y = F.relu(self.d(self.c(x)) + x)
        return y.mean((2, 3)), F.gelu(x), self.e(x)

    parts: dict[str, nn.Module] = {name: block(16, 16) for name in "abc"}
    model = made(Lambda(forward, first=block(3, 16), d=conv_bn(16, 16), e=conv_bn(16, 8), **parts))
    fast = rf.quantize(model, images(), keep_float=["e.*"])
    x = images(3)[2]
    with torch.no_grad():
        for exact, layered, found in zip(model(x), fast.graph_module(x), fast(x), strict=True):
            assert sqnr(exact, found) > 25 and sqnr(layered, found) > 35


def test_a_window_that_lies_in_the_padding() -> None:
    """It gives -inf, which bytes are not: a dilated pool stays float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(F.max_pool2d(self.first(x), 2, 1, 1, 3))

    model = made(Lambda(forward, first=block(3, 16), a=block(16, 16)))
    fast = rf.quantize(model, images())
    assert fast.quantization is not None and len(fast.quantization.int8) == 1
    for size in (24, 2):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", backends.FallbackWarning)
            exact, found = model(x), fast(x)
        assert torch.equal(found.isfinite(), exact.isfinite()) and bool(exact.isfinite().all()) == (size > 2)


def test_the_same_bits_in_any_batch_by_any_number_of_threads() -> None:
    for model in (made(), made(Odd())):
        fast = rf.quantize(model, images())
        x = torch.randn(5, 3, 31, 18)
        wanted = torch.cat([fast(x[i : i + 1]) for i in range(5)])
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(fast(x), wanted) and torch.equal(fast(x[[4, 1, 4]]), wanted[[4, 1, 4]])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("split", [False, True])
def test_what_is_no_number_runs_by_the_definition(value: float, split: bool) -> None:
    model = made(Lambda(_between, **_parts())) if split else made()
    fast = rf.quantize(model, images())
    assert calls(fast) == (2 if split else 1)
    x = torch.randn(3, 3, 24, 24)
    good = fast(x)
    with backends.use("reference"):
        meant = fast(x)
    x[1, 0, 3, 3] = value
    said = ("optimize", "NaN, infinity or huge activations: such a batch runs again, exactly")
    before = backends.fallbacks().get(said, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", backends.FallbackWarning)
        found = fast(x)
    with torch.no_grad():
        exact = model(x)
    assert torch.equal(found.isnan(), exact.isnan()) and torch.equal(found.isinf(), exact.isinf())
    assert backends.fallbacks()[said] == before + 1
    torch.testing.assert_close(found[[0, 2]], meant[[0, 2]], rtol=1e-4, atol=1e-4)
    x[1] = 0
    assert torch.equal(fast(x)[[0, 2]], good[[0, 2]]), "the next batch is computed in integers again"


# --- what lies between calls


def _parts() -> dict[str, nn.Module]:
    narrow = {"groups": 8}
    return {"first": block(3, 16), "a": block(16, 32), "b": block(32, 32, **narrow), "c": block(32, 24)}


def _between(self: Any, x: Tensor) -> Tensor:
    """A convolution that oneDNN is left, and float32 on both sides of it."""
    x = self.a(self.first(x))
    return self.c(self.b(x) + x).mean((2, 3))


def test_what_onednn_is_left_runs_between_calls() -> None:
    model = made(Lambda(_between, **_parts()))
    fast = rf.quantize(model, images())
    names = {row.name: row.backend for row in fast.report().fused}
    assert names["b.0.0"] == onednn_int8.NAME and names["a.0.0"] == names["c.0.0"] == quantize_layers.ENGINE
    assert calls(fast) == 2 and not fast._in_one_call()
    compared = Compared(fast.graph_module)
    for x in (*images(3), torch.randn(1, 3, 1, 1), torch.randn(3, 3, 33, 57)):
        with torch.no_grad():
            assert sqnr(model(x), fast(x)) > 25 and sqnr(compared.run(x), fast(x)) > 30
    assert compared.different <= compared.count // 1000
    with backends.use("cpu"):
        chosen = rf.quantize(model, images())
    assert {row.backend for row in chosen.report().fused} == {"cpu", quantize_layers.ENGINE} and calls(chosen) == 1
    with backends.use("onednn"):
        other = rf.quantize(model, images())
    assert {row.backend for row in other.report().fused} == {"onednn", onednn_int8.NAME} and calls(other) == 0
    for each in (chosen, other):
        assert sqnr(fast(images()[0]), each(images()[0])) > 30


def test_foreign_layers_get_bytes_and_float() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat([self.a(x), self.b(x)], 1)  # of uint8
        y = self.c(F.max_pool2d(x, 2))
        y = torch.sigmoid(y) * y
        return self.d(y).mean((2, 3))

    parts = {"a": block(16, 8), "b": block(16, 24), "c": block(32, 16), "d": block(16, 8)}
    model = made(Lambda(forward, first=block(3, 16), **parts))
    fast = rf.quantize(model, images())
    assert fast.quantization is not None and len(fast.quantization.int8) == 4 and calls(fast) == 3
    seen: list[tuple[torch.dtype, ...]] = []
    planned: Any = fast._engine()
    for part in planned.modules():
        if isinstance(part, engine.Segment):
            part.register_forward_pre_hook(lambda _, args: seen.append(tuple(x.dtype for x in args)))
    x = images(3)[2]
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 25
    assert seen == [(torch.float32,), (torch.uint8,), (torch.float32,)]


def test_nothing_is_written_over_that_is_still_to_be_read() -> None:
    """A layer between calls that writes over its residual waits for a call that reads it, here of b."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        v = self.a(x)
        y = self.b(torch.sigmoid(v)) + v
        return self.c(torch.sigmoid(v)) + v + y

    depthwise = {"kernel_size": 7, "padding": 3, "groups": 32}
    parts = {"first": conv_bn(3, 32), "a": conv_bn(32, 32), "b": conv_bn(32, 32), "c": conv_bn(32, **depthwise)}
    model = made(Lambda(forward, **parts))
    x = images()[0]
    fast = optimize(model, example_inputs=x)
    assert [m.overwrites for m in fast.graph_module.modules() if getattr(m, "layer", "") == "c.0"] == [True]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


# --- what computes


def test_the_engine_needs_no_functions_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qconv2d_pointwise'")

    wanted = rf.quantize(made(), images())(images()[0])
    grouped = made(Lambda(_between, **_parts()))
    monkeypatch.setattr(onednn_int8, "_functions", gone)
    monkeypatch.setattr(onednn_int8, "_probe", onednn_int8._probe.__wrapped__)
    assert torch.equal(rf.quantize(made(), images())(images()[0]), wanted)
    fast = rf.quantize(grouped, images())
    assert {row.backend for row in fast.report().fused} == {"cpu", quantize_layers.ENGINE}, "slower than nothing?"


def test_activations_have_eight_bits_unless_onednn_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_int8, "saturates", lambda: True)
    for model, bits in ((made(), 8), (made(Lambda(_between, **_parts())), 7)):
        report = rf.quantize(model, images()).quantization
        assert report is not None and report.bits == bits


def test_matrix_units_are_left_to_onednn_if_the_engine_does_not_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {**cpu.module().features(), "amx_int8": True}
    shape = (64, 64, 3, 3)
    assert quantize_layers.computed_by(shape, 1) == quantize_layers.ENGINE
    monkeypatch.setattr(
        cpu, "module", lambda: type("M", (), {"features": lambda of_machine: features, "isa": lambda: "avx512_bf16"})
    )
    assert quantize_layers.computed_by(shape, 1) == onednn_int8.NAME
    monkeypatch.setattr(onednn_int8, "unavailable", lambda: "gone")
    assert quantize_layers.computed_by(shape, 1) == quantize_layers.ENGINE


def test_a_snapshot_moves_to_a_machine_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes it there; without its functions, the definition does, and says so."""
    brought, x = pickle.dumps(rf.quantize(made(), images())), images(3)[2]
    wanted = pickle.loads(brought)(x)
    monkeypatch.setattr(cpu, "without_uint8", lambda: "no VNNI")
    fast = pickle.loads(brought)
    assert sqnr(wanted, fast(x)) > 35
    assert all(m.backend == onednn_int8.NAME for m in fast.graph_module.modules() if isinstance(m, Convolution))
    monkeypatch.setattr(onednn_int8, "unavailable", lambda: "no functions either")
    slow = pickle.loads(brought)
    with pytest.warns(backends.FallbackWarning, match="int8 is computed in float32, slowly: no functions either"):
        found = slow(x)
    with backends.use("reference"):
        assert torch.allclose(found, fast(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_wrong_arithmetic_of_the_engine_is_found(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.Convolution.run

    def wrong(self: cpu.Convolution, x: Tensor, *rest: Any) -> Tensor:
        y = right(self, x, *rest)
        if y.dtype is not torch.uint8 or x.shape[1] != 16 or y.shape[1] != 16:
            return y
        if fails:
            raise ValueError("an image is too small\nlong story")
        return y.clamp(2)

    monkeypatch.setattr(cpu.Convolution, "run", wrong)
    report = rf.quantize(made(), images()).quantization
    assert report is not None and len(report.int8) == 4
    said = "fails: an image is too small" if fails else "gives other numbers than its definition"
    reasons = {layer.name: layer.reason for layer in report.kept_float}
    assert reasons["a.0.0"] == f"the engine's int8 convolution {said}"


def test_zero_points_that_cancel_out() -> None:
    """The first image gives 0 exactly, of which float32 leaves some rounding; that is no other number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(x).mean() + self.c(x)

    model = made(Lambda(forward, first=conv_bn(16, 8), c=nn.Conv2d(16, 16, 3, bias=False)))
    batch = torch.randn(3, 16, 12, 12)
    batch[0] = 0
    report = rf.quantize(model, [batch]).quantization
    assert report is not None and [layer.name for layer in report.int8] == ["c"]


def test_a_part_whose_only_layer_becomes_float_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class ByValue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.tail = nn.Sequential(block(3, 16), block(16, 24)), block(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.tail(y) if y.mean() > 0 else y

    right = cpu.Convolution.run

    def wrong(self: cpu.Convolution, x: Tensor, *rest: Any) -> Tensor:
        y = right(self, x, *rest)
        return y + 1 if x.dtype is torch.uint8 and x.shape[1] == 24 else y

    monkeypatch.setattr(cpu.Convolution, "run", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = rf.quantize(made(ByValue()), images()).quantization
    assert report is not None and [layer.name for layer in report.int8] == ["body.1.0.0"]


def test_layers_kept_in_float_stay_in_the_call() -> None:
    for keep in (["c.*", "shortcut.0"], ["b.0"], ["a.*", "d.0"]):
        fast = rf.quantize(made(), images(), keep_float=keep)
        assert calls(fast) == 1 and fast._in_one_call()
        x = images(3)[2]
        with torch.no_grad():
            assert sqnr(made()(x), fast(x)) > 28 and sqnr(fast.graph_module(x), fast(x)) > 30


def test_copies_and_new_constants_are_packed_anew() -> None:
    fast, other, x = rf.quantize(made(), images()), rf.quantize(made(seed=3), images()), images(3)[2]
    before, wanted = fast(x), other(x)
    copied = copy.deepcopy(fast)
    fast.load_state_dict(other.state_dict())
    assert torch.equal(fast(x), wanted) and torch.equal(copied(x), before) and not torch.equal(before, wanted)
