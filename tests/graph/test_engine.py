"""A lowered graph as calls of the CPU engine: the same answers as layer by layer, whatever lies between its layers."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import cpu
from resnet_fast.graph import OptimizedModule, engine, optimize
from tests.networks import Lambda, conv_bn, randomise
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "-"),
    pytest.mark.skipif(
        not cpu.unavailable() and cpu.module().isa() == "portable", reason="oneDNN is left its convolutions here"
    ),
]


def calls(fast: OptimizedModule) -> int:
    planned = fast._engine()
    return 0 if planned is None else sum(isinstance(part, engine.Segment) for part in planned.modules())


@pytest.fixture(scope="module")
def resnet18() -> OptimizedModule:
    """A snapshot that no test changes."""
    torch.manual_seed(0)
    return optimize(randomise(rf.resnet18()).eval())


def assert_right(model: nn.Module, fast: nn.Module, *images: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The error rule against the model in float64, with its own answer in ``dtype`` by plain torch."""
    with torch.no_grad(), backends.use("reference"):
        exact = copy.deepcopy(model).double()(*(x.double() for x in images))
        same = copy.deepcopy(model).to(dtype)(*(x.to(dtype) for x in images))
    ours = fast(*images)
    for mine, plain, wanted in zip(
        *([y] if isinstance(y, Tensor) else list(y) for y in (ours, same, exact)), strict=True
    ):
        assert_obeys_error_rule(mine.to(dtype), plain, wanted)  # its outputs have the images' dtype


def test_onednn_is_left_what_it_computes_faster() -> None:
    wide = {"kernel_size": 7, "groups": 32}
    model = nn.Sequential(conv_bn(3, 32), conv_bn(32, **wide), conv_bn(32, **{**wide, "kernel_size": 5})).eval()
    x = torch.randn(2, 3, 20, 20)
    fast = optimize(model)
    assert [row.backend for row in fast.report().fused if row.kind == "Conv2d"] == ["cpu", "onednn", "cpu"]
    assert_right(model, fast, x)
    with backends.use("cpu"):
        chosen = optimize(model)
    assert {row.backend for row in chosen.report().fused} == {"cpu"} and calls(chosen) == 1
    assert_right(model, chosen, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet50_caffe"])
def test_a_resnet_is_one_call(name: str, dtype: torch.dtype) -> None:
    if backends.packing.unsupported(cpu.NAME, False, dtype, (64, 64, 3, 3), 1):
        pytest.skip("oneDNN is left bfloat16 here")
    torch.manual_seed(0)
    if name == "resnet50_caffe":
        model = rf.resnet50(stride_in_1x1=True, unpadded_pool=True).eval()
    else:
        model = getattr(rf, name)().eval()
    randomise(model)
    fast = optimize(model, dtype=dtype, example_inputs=torch.empty(1, 3, 97, 131))
    assert calls(fast) == 1 and fast._in_one_call()
    assert {row.backend for row in fast.report().fused} == {"cpu"}
    for shape in ((2, 3, 64, 64), (1, 3, 97, 131), (3, 3, 33, 33)):
        assert_right(model, fast, torch.randn(shape), dtype=dtype)


def mixed() -> nn.Module:
    """The engine's layers, others between them that read several of its results, and results of both kinds."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        a = self.a(x).relu()
        b = self.b(a).relu()
        gate = torch.sigmoid(F.adaptive_avg_pool2d(b, 1))
        c = self.c(b * gate)
        d = (c + a).relu()
        e = F.max_pool2d(d, 3, 2, 1)
        return a, F.gelu(self.d(e)), e

    return randomise(
        Lambda(forward, a=conv_bn(3, 48), b=conv_bn(48, 48), c=conv_bn(48, 48), d=nn.Conv2d(48, 20, 1))
    ).eval()


def test_other_layers_run_in_torch_between_calls() -> None:
    torch.manual_seed(0)
    model = mixed()
    fast = optimize(model, example_inputs=torch.randn(1, 3, 20, 20))
    assert calls(fast) == 2 and not fast._in_one_call()
    for shape in ((1, 3, 20, 20), (5, 3, 31, 17)):
        assert_right(model, fast, torch.randn(shape))


@pytest.mark.parametrize("backend", ["onednn", "reference"])
def test_another_backend_makes_no_call(backend: str) -> None:
    if backends.available()[backend]:
        pytest.skip(backends.available()[backend])
    fast = optimize(mixed(), backend=backend, example_inputs=torch.randn(1, 3, 20, 20))
    assert calls(fast) == 0
    assert calls(optimize(mixed(), example_inputs=torch.randn(1, 3, 20, 20), dtype=torch.float64)) == 0


def test_results_are_as_the_layers_give_them() -> None:
    torch.manual_seed(0)
    model = mixed()
    fast = optimize(model, example_inputs=torch.randn(1, 3, 20, 20))
    for image in (torch.randn(2, 3, 20, 20), torch.randn(2, 3, 20, 20).contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            wanted = model(image)
        for ours, plain in zip(fast(image), wanted, strict=True):
            assert ours.stride() == plain.stride() and not ours._is_view() and not ours.requires_grad
    first = fast(torch.zeros(1, 3, 20, 20))
    kept = [y.clone() for y in first]
    fast(torch.randn(1, 3, 20, 20))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True)), (
        "a result lies in memory that is used again"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stands_where_torch_has_it(value: float) -> None:
    torch.manual_seed(0)
    model = mixed()
    fast = optimize(model, example_inputs=torch.randn(1, 3, 20, 20))
    image = torch.randn(2, 3, 24, 24)
    image[1, 2, 11, 5] = value
    with torch.no_grad():
        wanted = model(image)
    for ours, plain in zip(fast(image), wanted, strict=True):
        assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.isinf(), plain.isinf())


def test_the_same_bits_in_any_batch_by_any_number_of_threads(resnet18: OptimizedModule) -> None:
    fast, images = resnet18, torch.randn(5, 3, 64, 64)
    wanted = torch.cat([fast(images[i : i + 1]) for i in range(5)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fast(images), wanted) and torch.equal(fast(images.flip(0)), wanted.flip(0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "transposed", "other dtype"])
def test_images_lie_in_memory_as_they_like(layout: str, resnet18: OptimizedModule) -> None:
    fast, image = resnet18, torch.randn(4, 3, 40, 48)
    other = {
        "channels_last": lambda: image.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: torch.randn(8, 5, 43, 96)[::2, 1:4, 3:, ::2].copy_(image),
        "expanded": lambda: image[:1].expand(4, -1, -1, -1),
        "transposed": lambda: image.transpose(2, 3).contiguous().transpose(2, 3),
        "other dtype": lambda: image.double(),
    }[layout]()
    assert torch.equal(fast(other), fast(other.float().contiguous()))


def test_a_tensor_that_the_engine_cannot_read_runs_layer_by_layer(resnet18: OptimizedModule) -> None:
    fast = resnet18
    segment = next(part for part in fast._engine().modules() if isinstance(part, engine.Segment))  # type: ignore[union-attr]
    unreadable = (
        torch.randn(1, 3, 64, 64, dtype=torch.float64),
        torch.empty(1, 3, 64, 64, device="meta"),
        torch.randn(3, 64, 64),
        torch.randn(0, 3, 64, 64),
        torch.randn(1, 3, 64, 64).to_mkldnn(),
        torch.randn(1, 3, 64, 64, dtype=torch.complex64).imag._neg_view(),
    )
    for image in unreadable:
        with pytest.raises(engine.NotPlanned), torch.no_grad():
            segment(image)

    class Tagged(Tensor):
        pass

    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(fast(image.as_subclass(Tagged)), fast(image), rtol=1e-4, atol=1e-4)


def test_a_layer_refuses_what_does_not_fit() -> None:
    """Memory behind a tensor is never read: the author's code may try, and catch the error."""
    torch.manual_seed(0)
    conv = cpu.Convolution(torch.randn(16, 8, 3, 3), torch.randn(16), ((1, 1), (1, 1), (1, 1), 1), torch.float32)
    image, added = torch.randn(2, 8, 6, 5), torch.randn(2, 16, 6, 5)
    assert conv.run(image, added, True, False).shape == added.shape
    for x, residual in (
        (image[:, :3], None),
        (torch.randn(2, 16, 6, 5), None),
        (image.double(), None),
        (image, added[:1]),
        (image, added[:, :8]),
        (image, added[..., :4]),
        (image, added.double()),
    ):
        with pytest.raises(RuntimeError, match=r"must be float32|takes float32"):
            conv.run(x, residual, True, False)
    for x in (image[..., 0], torch.randn(2, 8, 0, 5)):
        with pytest.raises(ValueError, match=r"unpack|too small|pixels"):
            conv.run(x, None, True, False)

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        try:
            y = self.a(y[:, :3])
        except RuntimeError:
            y = y + 1
        return y if y.sum() > -1e9 else x  # so that it runs in parts

    model = randomise(Lambda(forward, a=conv_bn(8, 8))).eval()
    image = torch.randn(1, 8, 6, 6)
    fast = optimize(model, example_inputs=image)
    with torch.no_grad():
        assert torch.allclose(fast(image), model(image), rtol=1e-4, atol=1e-4)


def test_what_others_have_switched_in_torch(resnet18: OptimizedModule) -> None:
    """A default dtype or device is for tensors that the user makes; transforms see every image."""
    fast, image = resnet18, torch.randn(2, 3, 64, 64)
    wanted = fast(image)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fast(image), wanted)
        live = rf.ops.conv_bn_act(image, image[:, :, :1, :1], *(image[0, 0, 0, :2],) * 2)
        assert live.dtype is torch.float32 and live.isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(fast(image), wanted)
    mapped = torch.func.vmap(lambda one: fast(one[None])[0])(image)
    assert torch.allclose(mapped, wanted, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(image)).shape == wanted.shape


def test_copies_and_new_constants_are_packed_anew(resnet18: OptimizedModule) -> None:
    torch.manual_seed(1)
    other, fast = resnet18, optimize(randomise(rf.resnet18()).eval())
    image = torch.randn(1, 3, 64, 64)
    before, wanted = fast(image), other(image)
    assert not torch.allclose(before, wanted)
    copied = copy.deepcopy(fast)
    saved = io.BytesIO()
    torch.save(fast, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    fast.load_state_dict(other.state_dict())
    assert torch.equal(fast(image), wanted)
    assert torch.equal(copied(image), before) and torch.equal(loaded(image), before)


def test_threads_share_a_snapshot() -> None:
    torch.manual_seed(0)
    fast = optimize(mixed(), example_inputs=torch.randn(1, 3, 20, 20))
    fast._planned = None  # made by whoever comes first
    images = [torch.randn(1 + i % 3, 3, 16 + i, 20) for i in range(8)]
    reference = copy.deepcopy(fast)
    wanted = [reference(image) for image in images]
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(fast(images[i]), wanted[i], strict=True)):
                wrong.append(i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, range(8)))  # raises what they raise
    assert not wrong
