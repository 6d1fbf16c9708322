"""Capture by running: whatever Python does in forward is what the snapshot does, or that part runs as it is."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import resnet_fast as rf
from resnet_fast.graph import OptimizedModule, optimize
from resnet_fast.graph.plan import Fused
from resnet_fast.graph.snapshot import PartlyOptimizedModule
from tests.graph.user_models import MODELS, ByValue, Flags, block
from tests.networks import Lambda, assert_same, conv_bn, randomise

IN_PARTS = {"branch_on_value", "autocast"}


def fused_ops(fast: nn.Module) -> int:
    return sum(isinstance(module, Fused) for module in fast.modules())


@pytest.fixture
def quiet() -> Iterator[None]:
    """Nothing is said of models that run in parts, or of sizes that their own code runs for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", MODELS)
def test_models_as_their_authors_write_them(name: str, quiet: None) -> None:
    torch.manual_seed(0)
    model = randomise(MODELS[name]())
    fast = optimize(model, example_inputs=torch.empty(1, 3, 64, 64))
    assert isinstance(fast, PartlyOptimizedModule) == (name in IN_PARTS)
    assert fused_ops(fast)
    for batch, height, width in ((1, 64, 64), (3, 64, 64), (2, 48, 80), (5, 96, 64)):
        x = torch.rand(batch, 3, height, width)
        assert_same(fast, model, x, 1e-2 if name == "autocast" else 1e-5)
        assert_same(fast, model, x.contiguous(memory_format=torch.channels_last), 1e-2 if name == "autocast" else 1e-5)
        with torch.no_grad():
            assert type(fast(x)) is type(model(x))


def test_flags_and_defaults(quiet: None) -> None:
    """Another flag than that of the capture runs the author's code."""
    model = randomise(Flags())
    fast, x, labels = optimize(model), torch.rand(2, 3, 32, 32), torch.tensor([1, 3])
    for kwargs in ({}, {"softmax": False}, {"softmax": True}, {"labels": labels}, {"labels": None}):
        with torch.no_grad():
            assert torch.allclose(fast(x, **kwargs), model(x, **kwargs), atol=1e-5)
            assert torch.allclose(fast(x=x, **kwargs), model(x, **kwargs), atol=1e-5)
    with pytest.raises(AssertionError, match="RGB"):  # as the model does: it looks before it adds a dimension
        fast(torch.rand(3, 32, 32))


def test_two_images_of_unequal_channels_need_no_example() -> None:
    """As colours and depth: which of the two has how many channels is found by trying."""

    class WithDepth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(3), conv_bn(1, 3)

        def forward(self, depth: Tensor, image: Tensor) -> Tensor:
            return self.a(image) + self.b(depth)

    model = randomise(WithDepth())
    fast, given = optimize(model), (torch.rand(2, 1, 9, 8), torch.rand(2, 3, 9, 8))
    assert fused_ops(fast) == 2
    with torch.no_grad():
        torch.testing.assert_close(fast(*given), model(*given))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.a(x) if x.shape[0] > 2 else self.a(x) * 2,
        lambda self, x: self.a(x) if x.shape[2] == x.shape[3] else self.a(x).mean((2, 3)),
        lambda self, x: self.a(x[: x.shape[0] // 2 + 1]),
        lambda self, x: sum(self.a(x) * index for index in range(len(x))),
        lambda self, x: self.a(x).squeeze(),
        lambda self, x: self.a(x).mean((1, 2, 3)).squeeze(0),
        lambda self, x: self.a(x) * (x.numel() / 1000) ** 0.5,
        lambda self, x: F.pad(self.a(x), (0, 0, 0, max(0, 16 - x.size(2)))),
        lambda self, x: self.a(x) + torch.arange(x.shape[-1]) + x.new_zeros(x.shape[-2], 1),
        lambda self, x: torch.cat(self.a(x).split(max(1, x.shape[0] // 2))),
        lambda self, x: self.a(x).view(x.shape[0], 2, -1, *x.shape[2:]).sum(1),
        lambda self, x: {f"{x.shape[2]}": self.a(x)},
        lambda self, x: self.a(x) * {(8, 8): 2.0}.get((int(x.shape[2]), x.shape[3]), 1.0),
        lambda self, x: F.interpolate(self.a(x), size=(int(x.shape[2] * 1.5), x.shape[3] * 2)),
    ],
)  # fmt: skip
def test_what_depends_on_sizes(forward: Callable[..., Any], quiet: None) -> None:
    model = randomise(Lambda(forward, a=block()))
    for example in (torch.empty(1, 3, 8, 8), torch.empty(3, 3, 8, 12)):
        fast = optimize(model, example_inputs=example)
        for shape in ((1, 3, 8, 8), (2, 3, 8, 8), (3, 3, 12, 9), (4, 3, 20, 20), (1, 3, 17, 9)):
            assert_same(fast, model, torch.rand(shape))


def test_sizes_asked_inside_a_chain_do_not_break_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        batch, channels, height, width = y.shape
        return self.bn(y).relu().view(batch, channels, height * width)

    model = randomise(Lambda(forward, conv=nn.Conv2d(3, 8, 3, 2, 1), bn=nn.BatchNorm2d(8)))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    assert {row.fused for row in fast.report().rows if row.kind != "view"} == {"conv_bn_act conv"}
    for shape in ((2, 3, 9, 7), (1, 3, 8, 8)):
        assert_same(fast, model, torch.rand(shape))


def test_a_size_that_decides_otherwise_is_said() -> None:
    model = randomise(Lambda(lambda self, x: self.a(x) if x.shape[0] < 3 else self.a(x) * 2, a=block()))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    with pytest.warns(rf.backends.FallbackWarning, match=r"own code runs, unfused, .*: s0 < 3 does not hold"):
        fast(torch.rand(4, 3, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: _then(x, self.a(x), lambda y: y.add_(1)),
        lambda self, x: self.a(x.clone().mul_(2)),
        lambda self, x: _then(x, self.a(x), lambda y: y[:, :4].zero_()),
        lambda self, x: _then(x, self.a(x), lambda y: y.chunk(2, 1)[0].mul_(3)),
        lambda self, x: _then(x, self.a(x), lambda y: y.transpose(1, 2).copy_(y.transpose(1, 2) * 2)),
        lambda self, x: _then(x, self.a(x), lambda y: y.contiguous(memory_format=torch.channels_last).add_(5)),
        lambda self, x: _then(x, self.a(x), lambda y: torch.add(y, 1, out=torch.empty_like(y))),
        lambda self, x: _then(x, self.a(x), lambda y: y.masked_fill_(y > 1, 0.0)),
        lambda self, x: _then(x, self.a(x), lambda y: F.relu(y[:, ::2], inplace=True)),
        lambda self, x: _kept(self.a(x)),
        lambda self, x: _iadd(self.a(x), self.b(x)),
    ],
)  # fmt: skip
def test_writes_in_place(forward: Callable[..., Any], quiet: None) -> None:
    model = randomise(Lambda(forward, a=conv_bn(3, 8), b=block()))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    for shape in ((1, 3, 8, 8), (3, 3, 10, 7)):
        assert_same(fast, model, torch.randn(shape))


def _then(x: Tensor, y: Tensor, write: Callable[[Tensor], Any]) -> tuple[Tensor, Any]:
    result = write(y)
    return y.relu(), result


def _kept(y: Tensor) -> tuple[Tensor, Tensor]:
    before = y
    y = y.relu_()
    y += 1
    return before, y


def _iadd(y: Tensor, z: Tensor) -> Tensor:
    y += z
    return F.relu(y, inplace=True)


# ------------------------------------------------------------------------------------------------- what users replace


def test_replaced_methods(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    """Of an instance, of a class, of what a class calls: the snapshot computes what the model computes."""
    x = torch.rand(2, 3, 16, 16)

    def agrees(model: nn.Module) -> None:
        fast = optimize(model, example_inputs=x)
        assert_same(fast, model, x)

    model = randomise(nn.Sequential(*conv_bn(3, 8), nn.ReLU()))
    model[0].forward = lambda x, conv=model[0]: conv._conv_forward(x, conv.weight * 2, conv.bias)
    agrees(model)
    model = randomise(nn.Sequential(*conv_bn(3, 8), nn.ReLU()))
    with monkeypatch.context() as patch:
        adapted = lambda self, x: F.batch_norm(x, None, None, self.weight, self.bias, True)  # noqa: E731
        patch.setattr(nn.BatchNorm2d, "forward", adapted)
        agrees(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: F.conv2d(x, -w, b))
        agrees(model)
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: x.clamp(min=-0.5))
        agrees(model)
    model[0].register_forward_hook(lambda module, args, result: result * 3)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    agrees(model)


def test_hooks_are_named_once_more() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 8)))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks are not called by the frozen snapshot.*: 1$"):
        optimize(model)


def test_weights_that_hooks_and_parametrisations_make(quiet: None) -> None:
    x = torch.rand(2, 3, 8, 8)
    for wrap in (
        lambda conv: torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.orthogonal,
    ):
        model = randomise(nn.Sequential(*conv_bn(3, 8), nn.ReLU()))
        wrap(model[0])
        state = {
            name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        model.load_state_dict(state)
        model.eval()
        fast = optimize(model, example_inputs=x)  # before any forward
        assert_same(fast, model, x)
        assert fused_ops(fast) == 1


def test_wrappers(quiet: None) -> None:
    x = torch.rand(2, 3, 16, 16)
    averaged = torch.optim.swa_utils.AveragedModel(randomise(block())).eval()

    class Forwarding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = randomise(block())

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    class Own(nn.BatchNorm2d):
        pass

    subclassed = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Own(8), nn.ReLU()))
    for model in (averaged, Forwarding().eval(), subclassed):
        fast = optimize(model)
        assert_same(fast, model, x)
        assert len(fast.report().fused) >= 3


# ------------------------------------------------------------------------------------------- state, chance, other modes


class Counting(nn.Module):
    """Keeps what it does: a buffer written in place, one put in its place, an attribute, a number."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.way, self.calls = block(), way, 0
        self.last: Any = None
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.way == "written":
            self.n += 1
        elif self.way == "replaced":
            self.n = self.n + 1
        elif self.way == "attribute":
            y = y if self.last is None else y + self.last.mean()
            self.last = y
        else:
            self.calls += 1
            return y * self.calls
        return y * (1 + self.n)


@pytest.mark.parametrize("way", ["written", "replaced", "attribute", "number"])
def test_state_goes_on(way: str, quiet: None) -> None:
    model = randomise(Counting(way))
    fast, x = optimize(copy.deepcopy(model), example_inputs=torch.empty(1, 3, 8, 8)), torch.rand(2, 3, 8, 8)
    for _ in range(3):
        assert_same(fast, model, x)


def test_chance_is_drawn_anew(quiet: None) -> None:
    noisy = randomise(Lambda(lambda self, x: self.a(x + torch.randn(x.shape[0], 1, 1, 1)), a=block()))
    fast, x = optimize(noisy), torch.rand(2, 3, 8, 8)
    assert not torch.equal(fast(x), fast(x))
    torch.manual_seed(3)
    mine = fast(x)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.allclose(mine, noisy(x), atol=1e-5)


def test_a_dropout_in_training_mode_is_refused() -> None:
    model = randomise(block())
    model.append(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"parts of the model are in training mode \(4,"):
        optimize(model)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    model = randomise(block())
    torch.manual_seed(0)
    optimize(model)
    assert torch.equal(torch.rand(3), want)


# ------------------------------------------------------------------------------------------------------ parts, threads


def test_parts_of_a_model_that_decides_by_values() -> None:
    model = randomise(ByValue())
    with pytest.warns(UserWarning, match="own code runs, and 2 parts of it are fused: its code decides by values"):
        fast = optimize(model, example_inputs=torch.empty(1, 3, 16, 16))
    assert isinstance(fast, PartlyOptimizedModule) and list(fast.model._modules) == ["body", "tail"]
    rows = {row.name: row for row in fast.report().rows}
    assert rows["body.0.0"].fused == "conv_bn_act body.0.0" and rows["tail.2.1"].fused == "conv_bn_act tail.2.0"
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for x in (torch.rand(2, 3, 16, 16), torch.rand(1, 3, 9, 11) - 5):
        for other in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded, fast.train().to("cpu")):
            assert_same(other, model, x)


def test_hooks_of_parts_fire(quiet: None) -> None:
    seen: list[tuple[int, ...]] = []
    model = randomise(ByValue())
    model.body.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 16, 16))
    seen.clear()
    fast(torch.rand(2, 3, 8, 8))
    assert seen == [(2, 8, 8, 8)]


def test_threads_optimize_while_others_serve() -> None:
    """Nothing of the process is replaced while a model is captured."""
    served = rf.optimize(rf.resnet18().eval())
    live = rf.resnet18().eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        want, want_live = served(x), live(x)
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__
    errors: list[BaseException] = []
    done = threading.Event()

    def serve() -> None:
        try:
            while not done.is_set():
                assert torch.equal(served(x), want)
                with torch.no_grad():
                    assert torch.equal(live(x), want_live)
                assert nn.Module.__call__ is call and nn.Module.__getattr__ is getattr_
        except BaseException as error:
            errors.append(error)

    def make() -> None:
        try:
            for _ in range(3):
                model = randomise(block())
                assert_same(optimize(model), model, torch.rand(2, 3, 8, 8))
        except BaseException as error:
            errors.append(error)

    makers, servers = ([threading.Thread(target=f) for _ in range(4)] for f in (make, serve))
    for thread in (*servers, *makers):
        thread.start()
    for thread in makers:
        thread.join()
    done.set()
    for thread in servers:
        thread.join()
    assert not errors, errors[0]


def test_a_failed_capture_leaves_nothing_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not today")

    call = nn.Module.__call__
    with pytest.raises((TypeError, ValueError), match="not today"):
        optimize(Fails().eval(), example_inputs=torch.empty(1, 3, 8, 8))
    assert nn.Module.__call__ is call and torch._C._len_torch_function_stack() == 0
    assert torch.rand(2).sum() >= 0


# ------------------------------------------------------------------------------------------------- check, export, nest


def test_a_wrong_fusion_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that computes something else makes that part run plain, and is said."""
    from resnet_fast.graph import fold_bn

    right = fold_bn._statistics

    def wrong(gm: fx.GraphModule, node: fx.Node, x: fx.Node, channels: int) -> Any:
        scale, shift = right(gm, node, x, channels)  # type: ignore[misc]
        return scale, shift + (0.5 if channels == 6 else 0.0)

    monkeypatch.setattr(fold_bn, "_statistics", wrong)
    model = randomise(nn.Sequential(block(), conv_bn(8, 6), conv_bn(6, 8)))
    with pytest.warns(UserWarning, match="its snapshot gave another answer: off by"):
        fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    assert_same(fast, model, torch.rand(2, 3, 8, 8))
    assert {row.name for row in fast.report().fused} >= {"0.0.0", "2.0"}
    unchecked = optimize(model, example_inputs=torch.empty(1, 3, 8, 8), check=False)
    with pytest.raises(AssertionError):
        assert_same(unchecked, model, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("way", ["jit.trace", "jit.script", "export", "fx", "onnx"])
def test_exporting_a_snapshot_says_what_to_export(way: str, quiet: None) -> None:
    fast, x = optimize(randomise(nn.Sequential(*conv_bn(3, 8), nn.ReLU()))), torch.rand(2, 3, 8, 8)
    ways: dict[str, Callable[[], Any]] = {
        "jit.trace": lambda: torch.jit.trace(fast, x),
        "jit.script": lambda: torch.jit.script(fast),
        "export": lambda: torch.export.export(fast, (x,)),
        "fx": lambda: fx.symbolic_trace(fast),
        "onnx": lambda: torch.onnx.export(fast, (x,), io.BytesIO(), dynamo=False),
    }
    with pytest.raises(Exception, match=r"exportable.*original model"):
        ways[way]()


def test_snapshots_inside_models(quiet: None) -> None:
    inner = randomise(nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    model = nn.Sequential(optimize(inner), nn.Linear(5, 3)).eval()
    fast = optimize(model)
    assert isinstance(fast, OptimizedModule) and fused_ops(fast) == 3
    assert_same(fast, model, torch.rand(2, 3, 24, 24))


def test_a_compiled_snapshot_takes_every_size() -> None:
    fast = optimize(randomise(block()))
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="eager", fullgraph=True, dynamic=True)
    for batch, size in ((2, 16), (3, 24), (5, 9)):
        x = torch.rand(batch, 3, size, size)
        assert torch.allclose(compiled(x), fast(x), atol=1e-5)
    torch._dynamo.reset()


def test_casts_that_the_author_wrote(quiet: None) -> None:
    """Bytes divided by 255, ``x.float()`` and constants made on the way follow the dtype that is asked for."""
    model = randomise(Lambda(lambda self, x: self.a(x.float() / 255 + torch.zeros(3, 1, 1)), a=block()))
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        want = model(x)
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)):
        fast = optimize(model, dtype=dtype, example_inputs=x)
        assert (fast(x) - want).norm() <= tolerance * want.norm()
        assert fast(x).dtype is torch.float32


def test_pixels_as_integers_that_no_example_showed(quiet: None) -> None:
    """Code that divides them takes both; the convolution of another network does not."""
    model = randomise(Lambda(lambda self, x: self.a(x / 255 - 0.5), a=block()))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.05)):
        fast = optimize(model, dtype=dtype)
        with torch.no_grad():
            want = model(pixels)
        for x in (pixels, pixels.float()):
            assert (fast(x) - want).norm() <= tolerance * want.norm() and fast(x).dtype is torch.float32
    with pytest.raises(TypeError, match=r"uint8.*prepare images"):
        optimize(randomise(block()))(pixels)


def test_the_callers_tensor_is_left_alone_by_what_stays_in_place(quiet: None) -> None:
    """Also if a guard behind the write fails, and the author's code runs."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x[:, 1] = x[:, 0] * 2
        return self.a(x) if x.shape[2] == x.shape[3] else self.a(x) * 2

    model = randomise(Lambda(forward, a=block()))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    assert fused_ops(fast) and any("into the caller's tensor" in note for note in fast.report().notes)
    for shape in ((2, 3, 8, 8), (2, 3, 8, 12)):
        assert_same(fast, model, torch.rand(shape))
    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    fast(x)
    assert torch.equal(x, before)


def test_memory_shared_in_one_memory_format_alone(quiet: None) -> None:
    """What ``contiguous`` returns for a channels_last image is the image, which a write changes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        same = y.contiguous(memory_format=torch.channels_last)
        y += 1
        return same * 2

    model = randomise(Lambda(forward, a=conv_bn(3, 8)))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_same(fast, model, torch.rand(2, 3, 8, 8).contiguous(memory_format=layout))


def test_results_that_are_one_tensor_stay_one() -> None:
    fast = optimize(
        randomise(Lambda(lambda self, x: {"a": (y := self.a(x)), "b": [y, y + 1]}, a=block())),
        example_inputs=torch.empty(1, 3, 8, 8),
    )
    for batch in (1, 3):
        result = fast(torch.rand(batch, 3, 8, 8))
        assert result["a"] is result["b"][0] and result["b"][1] is not result["a"]


def test_networks_that_amplify_rounding_are_compared_as_their_own_answers_vary() -> None:
    """Deep chaos: float32 itself is far from float64, and so may the snapshot be; a wrong layer still shows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(40):
            y = torch.frac(self.b(y) * 1.9)
        return y

    model = randomise(Lambda(forward, a=block(), b=conv_bn(8)))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    assert fused_ops(fast) == 42
    assert any("compared loosely: a few roundings of the image" in note for note in fast.report().notes)
    assert not any("compared loosely" in note for note in optimize(randomise(block())).report().notes)


def test_parts_whose_roundings_decide_are_compared_as_those_vary() -> None:
    """As boxes by their rank: roundings of the image do not reach the answer, those within a part do."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(torch.round(x * 16) / 16)
        return torch.frac((y if y.mean() < 1e9 else -y) * 1e6)

    model = randomise(Lambda(forward, a=block()))
    with pytest.warns(UserWarning, match="1 parts of it are fused"):
        fast = optimize(model, example_inputs=torch.empty(1, 3, 8, 8))
    assert fused_ops(fast) == 2
    assert any("compared loosely: a few roundings of what its parts give" in note for note in fast.report().notes)


def test_standardised_weights_are_computed_once() -> None:
    """As in normalizer-free networks, by a batch norm of the weight, and by its mean and deviation."""

    class Standardised(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 8, 3)
            self.gain = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight.reshape(1, 8, -1)
            w = F.batch_norm(w, None, None, (self.gain * 0.1).view(-1), training=True, momentum=0.0, eps=1e-6)
            return F.conv2d(x, w.reshape_as(self.weight), self.bias)

    model = nn.Sequential(Standardised(), nn.ReLU()).eval()
    fast = optimize(model)
    assert [row.fused for row in fast.report().rows if row.fused] and fused_ops(fast) == 1
    assert "batch_norm" not in fast.code
    assert_same(fast, model, torch.rand(2, 3, 9, 9))


def test_an_exported_program_can_be_optimized(quiet: None) -> None:
    model = randomise(nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.rand(2, 3, 16, 16),), dynamic_shapes=({0: batch},)).module()
    fast = optimize(program, example_inputs=torch.empty(2, 3, 16, 16))
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


SCALE = torch.tensor([2.0])


def test_tensors_from_elsewhere_are_frozen(quiet: None) -> None:
    """Closures, globals and attributes that are no buffers: the snapshot has them as they were."""
    held = {"shift": torch.tensor([1.0])}
    model = randomise(Lambda(lambda self, x: self.a(x) * SCALE + held["shift"] + self.offset[0], a=block()))
    model.offset = [torch.ones(8, 1, 1)]
    x = torch.rand(2, 3, 8, 8)
    fast = optimize(model)
    assert_same(fast, model, x)
    want = fast(x)
    held["shift"].fill_(5)
    assert torch.equal(fast(x), want)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_mode_does_not_matter(mode: Callable[[], Any], quiet: None) -> None:
    model, x = randomise(Lambda(lambda self, x: self.a(x).add_(1)[:, 1:].mul_(2), a=block())), torch.rand(2, 3, 8, 8)
    with mode():
        fast = optimize(model)
    assert_same(fast, model, x)
    assert fused_ops(fast) == 2


def test_inference_mode_inside(quiet: None) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.a(x)
            y[:, :2] = 0
            return self.b(y).clone()

    model = randomise(Lambda(forward, a=block(), b=block(8, 8)))
    assert_same(optimize(model), model, torch.rand(2, 3, 8, 8))


# --------------------------------------------------------------------------------- decisions that sizes or types take


def _skips_empty(self: Any, x: Tensor) -> Tensor:
    return x.new_zeros(0, 7) if x.shape[0] == 0 else self.a(x)


def _skips_empty_crop(self: Any, x: Tensor) -> Tensor:
    crop = self.a(x)[:, :, 9:]
    return crop.amax((2, 3)) if crop.numel() else crop.new_zeros(len(x), 8)


def _bytes_or_floats(self: Any, x: Tensor) -> Tensor:
    return self.a(x.float() / 255 if x.dtype == torch.uint8 else x)


def _single_or_batch(self: Any, x: Tensor) -> Tensor:
    return self.a(x[None] if x.ndim == 3 else x)


def _by_layout(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if x.is_contiguous() else self.a(x) * 2


def _swallows(self: Any, x: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        if x.max() > 10:
            x = x / 255
    return self.a(x)


def _tries(self: Any, x: Tensor) -> Tensor:
    try:
        return self.a(x)[5]
    except IndexError:
        return self.a(x) * 2


def _decides_by_a_tensor_of_a_size(self: Any, x: Tensor) -> Tensor:
    return self.a(x) * 2 if torch.tensor(x.shape[2]) < 10 else self.a(x)


def _decimal_factors(self: Any, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(self.a(x), (math.ceil(x.shape[2] * 0.1 * 3), 2))


def _kind_of_number(self: Any, x: Tensor) -> Tensor:
    height = x.shape[2]
    return self.a(x) * (height if isinstance(height, int) else 1)


def _updates_statistics(self: Any, x: Tensor) -> Tensor:
    norm = self.a[0][1]
    return F.batch_norm(self.a(x), norm.running_mean, norm.running_var, training=True) + norm.running_mean.sum()


DECISIONS = [
    _skips_empty, _skips_empty_crop, _bytes_or_floats, _single_or_batch, _by_layout, _swallows, _tries,
    _decides_by_a_tensor_of_a_size, _decimal_factors, _kind_of_number, _updates_statistics,
]  # fmt: skip


@pytest.mark.parametrize("forward", DECISIONS)
def test_decisions(forward: Callable[..., Any], quiet: None) -> None:
    model = randomise(Lambda(forward, a=block()))
    fast = optimize(copy.deepcopy(model), example_inputs=torch.empty(1, 3, 16, 16))
    images = [torch.rand(shape) for shape in ((1, 3, 16, 16), (0, 3, 16, 16), (7, 3, 5, 5), (2, 3, 20, 30))]
    images.append(torch.rand(1, 3, 16, 16).contiguous(memory_format=torch.channels_last))
    images.append(50 * torch.rand(1, 3, 16, 16))
    if forward is _bytes_or_floats:
        images.append(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    if forward is _single_or_batch:
        images.append(torch.rand(3, 16, 16))
    for x in images:
        if forward is _updates_statistics and not len(x):
            continue
        assert_same(fast, model, x, 1e-4)


class TriesToPool(nn.Module):
    """Its forward catches what only other sizes raise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return F.max_pool2d(self.a(x), 8)
        except RuntimeError:
            return self.a(x) * 2


def test_exceptions_that_other_sizes_raise(quiet: None) -> None:
    model = randomise(TriesToPool())
    fast = optimize(model, example_inputs=torch.empty(1, 3, 16, 16))
    assert fused_ops(fast) == 2
    for size in (16, 5, 24):
        assert_same(fast, model, torch.rand(2, 3, size, size))


class Kept(nn.Module):
    """A block that others change from outside, and that keeps what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gain = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), 1.0
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(self.bn(self.conv(x))) * self.gain
        return self.last


def _sets_attribute(self: Any, y: Tensor, value: float) -> Any:
    self.b.gain = value + 3
    return self.b(y)


def _fills_weight(self: Any, y: Tensor, value: float) -> Any:
    self.b.conv.weight.data.fill_(value)
    return self.b(y)


def _sets_stride(self: Any, y: Tensor, value: float) -> Any:
    self.b.conv.stride = (2, 2)
    return self.b(y)


def _trains_norm(self: Any, y: Tensor, value: float) -> Any:
    self.b.bn.train()
    result = self.b(y)
    self.b.bn.eval()
    return result


def _hooks_for_a_moment(self: Any, y: Tensor, value: float) -> Any:
    seen: list[Tensor] = []
    handle = self.b.conv.register_forward_hook(lambda module, args, result: seen.append(result))
    self.b(y)
    handle.remove()
    return seen


def _autocasts_later(self: Any, y: Tensor, value: float) -> Any:
    first = self.b(y)
    with torch.autocast("cpu", torch.bfloat16):
        return first, self.b(y)


def _differentiates(self: Any, y: Tensor, value: float) -> Any:
    self.b(y)
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        return torch.autograd.grad(self.b(leaf).sum(), leaf)[0]


def _writes_into_one_of_two(self: Any, y: Tensor, value: float) -> Any:
    whole, part = self.two(y)
    part.zero_()
    return whole


AROUND_PARTS = [
    _sets_attribute, _fills_weight, _sets_stride, _trains_norm, _hooks_for_a_moment, _autocasts_later, _differentiates,
    _writes_into_one_of_two,
    lambda self, y, value: (self.b(y), self.b.last * 2)[1],
    lambda self, y, value: torch.func.functional_call(self.b, {"conv.weight": self.b.conv.weight * value}, (y,)),
    lambda self, y, value: torch.func.vmap(lambda each: self.b(each[None])[0])(y),
    lambda self, y, value: torch.func.jvp(self.b, (y,), (y,)),
]  # fmt: skip


@pytest.mark.parametrize("rest", AROUND_PARTS)
def test_code_around_parts(rest: Callable[..., Any], quiet: None) -> None:
    """The model decides by a value, so its own code runs; what it does to its children counts."""

    def forward(self: Any, x: Tensor) -> Any:
        y = self.a(x)
        return rest(self, y, float(y.mean()))

    two = Lambda(lambda self, y: ((z := self.c(y)), z[:, :2]), c=conv_bn(8, 8))
    model = randomise(Lambda(forward, a=block(), b=Kept(), two=two))
    fast = optimize(copy.deepcopy(model), example_inputs=torch.empty(1, 3, 16, 16))
    assert fused_ops(fast) >= 2, "the block that nobody touches stays fused"
    for shape in ((1, 3, 16, 16), (3, 3, 9, 12)):
        assert_same(fast, model, torch.rand(shape), 2e-2 if rest is _autocasts_later else 1e-5)


def test_caches_of_the_process_hold_tensors_with_data(quiet: None) -> None:
    """Code runs on data before it is captured: a cache by size is filled with what the original can use."""

    @functools.lru_cache
    def grid(height: int, width: int) -> Tensor:
        return torch.arange(float(height * width)).view(height, width)

    model = randomise(Lambda(lambda self, x: self.a(x) * grid(int(x.shape[2]), int(x.shape[3])), a=block()))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 16, 16))
    for size in (16, 48, 9):
        x = torch.rand(2, 3, size, size)
        with torch.no_grad():
            assert type(model(x)) is Tensor
        assert_same(fast, model, x)


def test_guarded_snapshots_can_be_copied(quiet: None) -> None:
    model = randomise(Lambda(_skips_empty_crop, a=block()))
    fast = optimize(model, example_inputs=torch.empty(1, 3, 16, 16))
    other: Any = copy.deepcopy(fast)
    for size in (16, 8):
        assert_same(other, model, torch.rand(2, 3, size, size))
    branching = MODELS["branch_on_size"]()
    other = pickle.loads(pickle.dumps(optimize(randomise(branching))))
    for size in (48, 80):
        assert_same(other, branching, torch.rand(2, 3, size, size))


def test_arguments_of_other_forms(quiet: None) -> None:
    default = torch.ones(8, 1, 1)

    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = block()

        def forward(self, images: Any, weight: Tensor = default) -> Tensor:
            result: Tensor = self.a(images["x"]) * weight
            return result

    model, images = randomise(Nest()), {"x": torch.rand(2, 3, 8, 8)}
    fast = optimize(model, example_inputs=({"x": torch.empty(1, 3, 8, 8)},))
    with torch.no_grad():
        assert torch.allclose(fast(images), model(images), atol=1e-5)
        assert torch.allclose(fast(images, weight=2 * default), model(images, 2 * default), atol=1e-5)
    assert fused_ops(fast) == 2
