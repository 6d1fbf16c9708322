"""Plans of the engine: what each layer computes, inputs of any strides, values used again, errors, the same bits."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.numerics import assert_obeys_error_rule
from tests.ops.cpu.engine import (
    ALGORITHMS,
    DTYPES,
    Buffer,
    _cpu,
    given,
    name_of,
    packed,
    run_plan,
    same,
    same_bits,
    same_numbers,
)
from tests.ops.cpu.sweep import whole

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(
    plan: _cpu.Plan, x: int, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0,
    dtype: torch.dtype = torch.float32, **more: object,
) -> int:  # fmt: skip
    """Add a square convolution; ``more``: residual, relu, residual_after_relu, algorithm."""
    layer = packed(weight, bias, (stride, stride), (padding, padding), dtype=dtype)
    return plan.convolution(x, layer, **{"residual": -1, "relu": False, "residual_after_relu": False, **more})


class Network:
    """A small ResNet as a plan and in plain torch: every kind of layer, values used twice."""

    def __init__(self, channels: int = 40, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        generator = torch.Generator().manual_seed(3)
        c = channels
        shapes = {"stem": (c, 3, 7, 7), "a": (c, c, 1, 1), "b": (c, c, 3, 3), "c": (2 * c, c, 1, 1)}
        shapes |= {"down": (2 * c, c, 1, 1), "d": (2 * c, 2 * c, 3, 3), "fc": (10, 2 * c, 1, 1)}
        self.weights = {
            name: (torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5).to(dtype).float()
            for name, shape in ((name, torch.Size(shape)) for name, shape in shapes.items())
        }
        self.biases = {name: torch.randn(weight.shape[0], generator=generator) for name, weight in self.weights.items()}

    def plan(self, algorithm: str = "auto", near: int = 0) -> _cpu.Plan:
        def layer(x: int, name: str, stride: int = 1, padding: int = 0, **more: object) -> int:
            winograd = self.weights[name].shape[2] == 3
            return conv(
                plan, x, self.weights[name], self.biases[name], stride, padding,
                self.dtype, algorithm=algorithm if winograd else "auto", **more,
            )  # fmt: skip

        plan = _cpu.Plan(near)
        x = layer(plan.input(3, name_of(self.dtype)), "stem", 2, 3, relu=True)
        x = plan.max_pool(x, (3, 3), (2, 2), (1, 1), (1, 1), False)
        y = layer(layer(x, "a", relu=True), "b", 1, 1, relu=True)
        features = layer(y, "c", residual=layer(x, "down"), relu=True)
        y = layer(features, "d", 1, 1, residual=features, relu=True, residual_after_relu=True)
        y = plan.add(y, features, True)
        plan.output(features)
        plan.output(layer(plan.average(y), "fc"))
        return plan

    def torch(self, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        dtype = dtype or self.dtype

        def layer(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
            return F.conv2d(x, self.weights[name].to(dtype), self.biases[name].to(dtype), stride, padding)

        x = F.max_pool2d(layer(x.to(dtype), "stem", 2, 3).relu(), 3, 2, 1)
        y = layer(layer(x, "a").relu(), "b", 1, 1).relu()
        features = (layer(y, "c") + layer(x, "down")).relu()
        y = layer(features, "d", 1, 1).relu() + features
        return [features, layer((y + features).relu().mean((2, 3), keepdim=True), "fc")]


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 8)])
@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_obeys_the_error_rule(algorithm: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    network, x = Network(dtype=dtype), torch.randn(2, 3, *size).to(dtype)
    plan = network.plan(algorithm)
    assert [tuple(shape) for shape in plan.shapes([given(x)])] == [tuple(each.shape) for each in network.torch(x)]
    for ours, plain, exact in zip(
        run_plan(plan, x, threads=2), network.torch(x), network.torch(x, torch.float64), strict=True
    ):
        assert_obeys_error_rule(ours, plain, exact, algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_many_channels(dtype: torch.dtype) -> None:
    """Their pixels are not dense between layers: a page is no multiple of the distance."""
    generator, c = torch.Generator().manual_seed(0), 256
    plan = _cpu.Plan()
    x, bias = whole((2, c, 9, 7), 1, generator), whole((c,), 9, generator)
    weights = [whole((c, c, 1, 1), 1, generator) * (torch.rand(c, c, 1, 1, generator=generator) < 0.02) for _ in "ab"]
    window = whole((c, c, 3, 3), 1, generator) * (torch.rand(c, c, 3, 3, generator=generator) < 0.005)
    a = conv(plan, plan.input(c, name_of(dtype)), weights[0], bias, dtype=dtype)
    b = conv(plan, a, window, bias, padding=1, dtype=dtype, algorithm="winograd2", residual=a, relu=True)
    for value in (
        plan.max_pool(b, (3, 3), (2, 2), (1, 1), (1, 1), False),
        conv(plan, b, weights[1], bias, dtype=dtype, residual=b),  # an output, which is dense
        plan.average(conv(plan, a, weights[1], bias, dtype=dtype, residual=b)),
        plan.add(a, conv(plan, b, weights[0], bias, dtype=dtype), True),  # dense, as what it takes
    ):
        plan.output(value)

    def plain(x: Tensor, weight: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        return (F.conv2d(x.double(), weight.double(), bias.double(), padding=weight.shape[2] // 2) + residual).to(dtype)

    first = plain(x, weights[0])
    second = plain(first, window, first.double()).relu()
    third = plain(first, weights[1], second.double()).double().mean((2, 3), keepdim=True)
    ours = run_plan(plan, x.to(dtype), threads=2)
    assert torch.equal(ours[0], F.max_pool2d(second, 3, 2, 1))
    assert torch.equal(ours[1], plain(second, weights[1], second.double()))
    assert torch.allclose(ours[2].double(), third, rtol=0.01)
    assert torch.equal(ours[3], (first.double() + plain(second, weights[0]).double()).to(dtype).relu())


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2", "winograd4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(
    algorithm: str, dtype: torch.dtype
) -> None:
    plan, x = Network(dtype=dtype).plan(algorithm), torch.randn(5, 3, 61, 50).to(dtype)
    alone = [torch.cat(parts) for parts in zip(*(run_plan(plan, x[i : i + 1]) for i in range(5)), strict=True)]
    for threads in (1, 2, 3, 2):
        for order in ([0, 1, 2, 3, 4], [3], [4, 0, 3], [2] * 7):
            for ours, each in zip(run_plan(plan, x[order], threads=threads), alone, strict=True):
                assert same_bits(ours, each[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_however_few_images_run_together(dtype: torch.dtype) -> None:
    network, x = Network(dtype=dtype), torch.randn(7, 3, 37, 50).to(dtype)
    plan = network.plan(near=1 << 40)
    alone = [torch.cat(parts) for parts in zip(*(run_plan(plan, x[i : i + 1]) for i in range(7)), strict=True)]
    for near in (1, 30_000, 70_000, 150_000, 300_000):
        plan = network.plan(near=near)
        for batch, threads in ((7, 1), (2, 2), (5, 2), (7, 3)):
            for order in (x[:batch], x[:batch].to(memory_format=torch.channels_last)):
                for ours, each in zip(run_plan(plan, order, threads=threads), alone, strict=True):
                    assert same_bits(ours, each[:batch])


@functools.lru_cache(maxsize=14)  # those of one plan, which is made several times
def _random_layer(seed: int, number: int, c: int, side: int, stride: int, dtype: torch.dtype) -> _cpu.Convolution:
    generator = torch.Generator().manual_seed(100 * seed + number)
    weight, bias = torch.randn(c, c, side, side, generator=generator) / 4, torch.randn(c, generator=generator)
    return packed(weight, bias, (stride, stride), (side // 2, side // 2), dtype=dtype)


def _random_plan(
    seed: int, near: int, dtype: torch.dtype = torch.float32, c: int = 8, all_given_back: bool = False
) -> tuple[_cpu.Plan, list[int]]:
    """Layers of any kind over values of ``c`` channels, each of any two earlier ones, and which are to be outputs."""
    draw = random.Random(seed)
    plan = _cpu.Plan(near)
    values = [(plan.input(c, name_of(dtype)), 0) for _ in range(2)]  # with how often their sides were halved

    for number in range(draw.randint(4, 14)):
        x, halved = draw.choice(values)
        like = draw.choice([value for value, times in values if times == halved])
        kind = draw.choice(["1x1", "3x3", "down", "pool", "add", "residual", "residual of 1x1"])
        stride = 2 if kind in ("down", "pool") and halved < 3 else 1
        if kind == "pool":
            made = plan.max_pool(x, (3, 3), (stride, stride), (1, 1), (1, 1), False)
        elif kind == "add":
            made = plan.add(x, like, draw.random() < 0.5)
        else:
            side = 1 if "1x1" in kind else 3
            residual = like if "residual" in kind else -1
            algorithm = draw.choice(ALGORITHMS) if side == 3 and stride == 1 else "auto"
            how = {"residual": residual, "relu": draw.random() < 0.5, "residual_after_relu": draw.random() < 0.5}
            made = plan.convolution(x, _random_layer(seed, number, c, side, stride, dtype), algorithm=algorithm, **how)
        values.append((made, halved + (stride == 2)))
    outputs = [value for value, _ in draw.sample(values, draw.randint(1, min(4, len(values))))]
    for value in [value for value, _ in values] if all_given_back else outputs:
        plan.output(value)
    return plan, outputs


@pytest.mark.parametrize("seed", range(25))
def test_random_plans_have_the_same_bits_however_few_images_run_together(seed: int) -> None:
    inputs = [torch.randn(5, 8, 21, 18) for _ in range(2)]
    inputs[1] = inputs[1].to(memory_format=torch.channels_last)

    def run(near: int, first: int, last: int) -> list[Tensor]:
        return run_plan(_random_plan(seed, near)[0], *(each[first:last] for each in inputs), threads=2)

    alone = [torch.cat(parts) for parts in zip(*(run(1 << 40, i, i + 1) for i in range(5)), strict=True)]
    for near in (1, 3_000, 12_000, 25_000, 50_000):
        for ours, each in zip(run(near, 0, 5), alone, strict=True):
            assert same_bits(ours, each), near


@pytest.mark.parametrize("c", [7, 8, 40, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_stored_on_their_residuals_are_what_they_are_elsewhere(dtype: torch.dtype, c: int) -> None:
    """If every value is given back, none may lie where another one was; NaN and infinities are computed twice."""
    seeds, n, size = (60, 5, (13, 10)) if c < 256 else (15, 3, (7, 6))  # a wide layer's time is its multiplications
    for seed in range(seeds):
        inputs = [torch.randn(n, c, *size).to(dtype) for _ in range(2)]
        inputs[0][1, 3, 4, 5], inputs[1][2, 0, -1, -1], inputs[1][0, c - 1, 0, 0] = torch.nan, torch.inf, -torch.inf
        image = inputs[0][0].numel() * dtype.itemsize
        for near in (1 << 40, image // 2, 2 * image):
            plan, outputs = _random_plan(seed, near, dtype, c)
            everything = run_plan(_random_plan(seed, near, dtype, c, all_given_back=True)[0], *inputs)
            for value, ours in zip(outputs, run_plan(plan, *inputs, threads=2), strict=True):
                assert same_numbers(ours, everything[value]), (seed, near, value)


@pytest.mark.parametrize("side", [1, 3])
def test_a_result_does_not_lie_where_its_own_image_does(side: int) -> None:
    generator, c = torch.Generator().manual_seed(0), 96
    x, bias = whole((1, c, 40, 40), 1, generator), whole((c,), 9, generator)
    weights = [(torch.rand(c, c, side, side, generator=generator) < 0.01).float() for _ in range(2)]
    plan = _cpu.Plan()
    y = conv(plan, plan.input(c), weights[0], bias, 1, side // 2)
    y = conv(plan, y, weights[1], bias, 1, side // 2, residual=y, algorithm="direct")
    plan.output(plan.max_pool(y, (1, 1), (1, 1), (0, 0), (1, 1), False))
    first = F.conv2d(x, weights[0], bias, padding=side // 2)
    assert torch.equal(run_plan(plan, x, threads=2)[0], F.conv2d(first, weights[1], bias, padding=side // 2) + first)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_tile_that_is_computed_twice_takes_its_residual_once(algorithm: str) -> None:
    """Of a panel's channels one alone is no finite number."""
    weight, x = torch.randn(32, 32, 3, 3) / 20, torch.randn(1, 32, 12, 12)
    weight[20, 3, 1, 1] = torch.inf
    pointwise, bias = torch.randn(32, 32, 1, 1), torch.ones(32)
    results = []
    for kept in (False, True):  # kept, the residual lies elsewhere
        plan = _cpu.Plan()
        image = plan.input(32)
        residual = conv(plan, image, pointwise, bias)
        y = conv(plan, image, weight, bias, 1, 1, residual=residual, algorithm=algorithm)
        plan.output(plan.max_pool(y, (1, 1), (1, 1), (0, 0), (1, 1), False))
        if kept:
            plan.output(residual)
        results.append(run_plan(plan, x)[0])
    assert results[0].isfinite().sum() == 31 * 144
    assert same_numbers(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_chain_of_residuals_takes_the_memory_of_one_and_of_what_is_added(algorithm: str, dtype: torch.dtype) -> None:
    image, weight, bias = torch.randn(1, 32, 64, 64).to(dtype), torch.randn(32, 32, 3, 3) / 40, torch.randn(32)
    plan = _cpu.Plan()
    x = conv(plan, plan.input(32, name_of(dtype)), weight, bias, 1, 1, dtype)
    for _ in range(5):
        inner = conv(plan, x, weight, bias, 1, 1, dtype, relu=True)
        x = conv(plan, inner, weight, bias, 1, 1, dtype, residual=x, algorithm=algorithm)
    plan.output(conv(plan, x, weight, bias, 1, 1, dtype))
    run_plan(plan, image)
    size = image.numel() * image.itemsize
    transformed = 0 if algorithm == "direct" else 36 * 80 * 4 * (64 * 64 // 4)  # where it is shared
    assert plan.arena_bytes <= 2 * size + size // 8 + transformed + 4096


def test_a_value_that_is_read_part_by_part_keeps_its_memory() -> None:
    """The first layer runs image by image, the others two by two; they make more than it made."""
    generator = torch.Generator().manual_seed(0)
    x, bias = whole((6, 8, 32, 32), 4, generator), whole((64,), 4, generator)
    up, down = whole((64, 8, 1, 1), 2, generator), whole((8, 64, 1, 1), 2, generator)
    plan = _cpu.Plan(40 << 10)
    y = plan.input(8)
    for _ in range(2):
        y = plan.max_pool(y, (3, 3), (2, 2), (1, 1), (1, 1), False)
    plan.output(conv(plan, conv(plan, y, up, bias), down, bias[:8]))
    pooled = F.max_pool2d(F.max_pool2d(x, 3, 2, 1), 3, 2, 1)
    (ours,) = run_plan(plan, x.to(memory_format=torch.channels_last))
    assert torch.equal(ours, F.conv2d(F.conv2d(pooled, up, bias), down, bias[:8]))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x + 1], 4).flatten(3)[:, :, :, ::2],
    "every other channel": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "a crop": lambda x: F.pad(x, (3, 2, 1, 4), value=torch.nan)[:, :, 1:-4, 3:-2],
    "a crop of channels_last": lambda x: F.pad(x, (3, 2, 1, 4), value=torch.nan).to(memory_format=torch.channels_last)[
        :, :, 1:-4, 3:-2
    ],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other image": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2].to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_strides(strides: str, dtype: torch.dtype) -> None:
    plan, x = Network(dtype=dtype).plan(), torch.randn(2, 3, 20, 17).to(dtype)
    other = STRIDES[strides](x)
    assert torch.equal(other, x)
    for ours, expected in zip(run_plan(plan, other), run_plan(plan, x), strict=True):
        assert same_bits(ours, expected)


def test_expanded_inputs() -> None:
    plan, x = Network().plan(), torch.randn(1, 1, 20, 1)
    expanded = x.expand(3, 3, 20, 17)
    for ours, expected in zip(run_plan(plan, expanded), run_plan(plan, expanded.contiguous()), strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool(channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, channels, 13, 10).to(dtype)
    x[1, 0, :3, :3] = torch.finfo(dtype).tiny / 4 * torch.arange(-4, 5).view(3, 3)  # subnormal
    x[0, 0, 2, 3], x[1, -1, 12, 9], x[0, -1, 0, 0], x[1, 0, 5, 5] = torch.nan, torch.nan, torch.inf, -torch.inf
    x[1, 0, 6:, 6:] = -torch.inf
    for kernel, stride, dilation, ceil_mode in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), (False, True)):
        for padding in range(kernel // 2 + 1):
            expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
            plan = _cpu.Plan()
            pair = [(each, each) for each in (kernel, stride, padding, dilation)]
            plan.output(plan.max_pool(plan.input(channels, name_of(dtype)), *pair, ceil_mode))
            assert same(run_plan(plan, x)[0], expected), (kernel, stride, padding, dilation, ceil_mode)


def test_max_pool_of_unlike_sides() -> None:
    x, plan = torch.randn(2, 5, 9, 20), _cpu.Plan()
    plan.output(plan.max_pool(plan.input(5), (1, 4), (2, 3), (0, 2), (1, 2), True))
    assert same(run_plan(plan, x)[0], F.max_pool2d(x, (1, 4), (2, 3), (0, 2), (1, 2), True))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 17, 7, 7), (1, 64, 56, 56), (1, 5, 224, 224)])
@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_average(shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> None:
    x, plan = (torch.randn(shape) + mean).to(dtype), _cpu.Plan()
    plan.output(plan.average(plan.input(shape[1], name_of(dtype))))
    exact = x.double().mean((2, 3), keepdim=True)
    assert_obeys_error_rule(run_plan(plan, x)[0], F.adaptive_avg_pool2d(x, 1), exact)
    ones = torch.ones(1, shape[1], 7, 7, dtype=dtype)
    assert torch.equal(run_plan(plan, ones)[0], torch.ones(1, shape[1], 1, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_of_average_and_add(dtype: torch.dtype) -> None:
    x, y = torch.zeros(3, 5, 4, 4, dtype=dtype), torch.zeros(3, 5, 4, 4, dtype=dtype)
    plan = _cpu.Plan()
    x[0, 0, 1, 1], x[0, 1, 0, 0], x[0, 2, 3, 3], x[1, 3, 0, 0] = torch.nan, torch.inf, -torch.inf, torch.inf
    y[1, 3, 0, 0], y[2, 4, 3, 3] = -torch.inf, torch.nan
    a, b = (plan.input(5, name_of(dtype)) for _ in "ab")
    for value in (plan.average(a), plan.add(a, b, False), plan.add(a, b, True)):
        plan.output(value)
    mean, total, rectified = run_plan(plan, x, y)
    assert same(mean, x.mean((2, 3), keepdim=True))
    assert same(total, x + y)
    assert same(rectified, (x + y).relu())


def test_values_used_twice_and_outputs_used_later() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = whole((2, 6, 5, 5), 4, generator), whole((6, 6, 1, 1), 2, generator), whole((6,), 4, generator)
    plan = _cpu.Plan()
    a = plan.input(6)
    b = plan.add(a, a, False)
    c = conv(plan, b, weight, bias, residual=b, relu=True)  # its input is its residual
    unused = conv(plan, c, weight, bias)
    d = plan.add(c, plan.add(b, c, False), True)
    for value in (c, a, d):  # one that is used later, the input itself
        plan.output(value)
    assert unused < d
    for order in (x, x.to(memory_format=torch.channels_last)):
        ours = run_plan(plan, order, threads=2)
        second = (F.conv2d(2 * x, weight, bias) + 2 * x).relu()
        assert torch.equal(ours[0], second)
        assert torch.equal(ours[1], x)
        assert torch.equal(ours[2], (second + 2 * x + second).relu())


def test_a_value_that_is_used_twice_leaves_its_memory() -> None:
    plan = _cpu.Plan()
    x = plan.input(16)
    for _ in range(40):
        x = plan.add(x, x, True)
    plan.output(x)
    image = torch.zeros(1, 16, 32, 32)
    assert run_plan(plan, image)[0].sum() == 0
    assert plan.arena_bytes <= 3 * 4 * image.numel() + 4096


def test_empty_batch() -> None:
    plan = Network().plan()
    assert [tuple(each.shape) for each in run_plan(plan, torch.empty(0, 3, 20, 17))] == [(0, 80, 5, 5), (0, 10, 1, 1)]
    plan.run([(0, (0, 3, 20, 17), (1020, 340, 17, 1))], [0, 0], 1)  # torch gives no address to an empty tensor


def test_one_of_two_batches_is_empty() -> None:
    plan, full, empty = _cpu.Plan(), torch.randn(2, 3, 4, 4), torch.empty(0, 3, 4, 4)
    for _ in range(2):
        plan.output(plan.average(plan.input(3)))
    for x, y in ((full, empty), (empty, full)):
        a, b = run_plan(plan, x, y)
        assert (len(a), len(b)) == (len(x), len(y))
        assert torch.allclose(torch.cat([a, b]), full.mean((2, 3), keepdim=True), atol=1e-6)
    out = Buffer((2, 3, 1, 1), full.dtype)
    with pytest.raises(ValueError, match="output has the address 0"):
        plan.run([given(empty), given(full)], [out.address, 0], 1)


def test_many_shapes_one_after_the_other() -> None:
    plan, fresh = Network().plan(), Network()
    images = [torch.randn(1 + i % 3, 3, 20 + i, 40 - i) for i in range(20)]  # more than schedules are kept
    first = [run_plan(plan, image, threads=1 + i % 3) for i, image in enumerate(images)]
    kept = plan.arena_bytes
    for _ in range(2):
        for image, expected in zip(images, first, strict=True):
            assert all(same_bits(a, b) for a, b in zip(run_plan(plan, image), expected, strict=True))
    assert plan.arena_bytes <= kept
    assert all(same_bits(a, b) for a, b in zip(run_plan(fresh.plan(), images[7]), first[7], strict=True))


def test_the_memory_of_a_huge_image_is_not_kept() -> None:
    plan = _cpu.Plan()
    x = plan.input(16)
    for _ in range(3):
        x = plan.add(x, x, True)
    plan.output(plan.average(x))
    run_plan(plan, torch.zeros(1, 16, 100, 100))
    kept = plan.arena_bytes
    assert kept >= 2 * 16 * 100 * 100 * 4
    run_plan(plan, torch.zeros(1, 16, 1500, 1500))  # 144 MB for each value, of which two live at a time
    assert plan.arena_bytes == 0  # the small one was too small to be used, the large one too large to be kept
    run_plan(plan, torch.zeros(1, 16, 100, 100))
    assert plan.arena_bytes == kept


def test_profile_and_algorithms() -> None:
    network, x = Network(), torch.randn(1, 3, 64, 64)
    plan = network.plan("winograd2")
    outputs = [Buffer(shape, x.dtype) for shape in plan.shapes([given(x)])]
    seconds = plan.profile([given(x)], [each.address for each in outputs], 1)
    names = plan.algorithms([given(x)], 1)
    assert len(seconds) == len(names) == 11
    assert min(seconds) >= 0
    assert names.count("winograd 2x2") == 2
    for ours, expected in zip(outputs, run_plan(plan, x), strict=True):
        assert same_bits(ours.tensor, expected)


def test_bad_arguments_have_words() -> None:
    plan, x = _cpu.Plan(), torch.zeros(1, 3, 8, 8)
    layer, wide = packed(torch.ones(4, 3, 3, 3), torch.zeros(4), (2, 2)), packed(torch.ones(4, 3, 1, 1), torch.zeros(4))
    value = plan.input(3)

    def pool(kernel: int = 2, stride: int = 1, padding: int = 0, dilation: int = 1) -> None:
        plan.max_pool(value, (2, kernel), (1, stride), (0, padding), (1, dilation), False)

    for near in (-1, 2**50 + 1):
        with pytest.raises(ValueError, match=f"near must be bytes, at most 2.50, .* got {near}"):
            _cpu.Plan(near)
    with pytest.raises(ValueError, match="must have channels, got 0"):
        plan.input(0)
    with pytest.raises(ValueError, match="no value has the number 7"):
        plan.average(7)
    with pytest.raises(ValueError, match="no value has the number -2"):
        plan.convolution(value, wide, -2, False, False)
    with pytest.raises(TypeError):
        plan.convolution(value, None, -1, False, False)
    with pytest.raises(ValueError, match="residual of 3 channels is added to 4"):
        plan.convolution(value, wide, value, False, False)
    other = _cpu.Plan()
    other.input(3, "bfloat16")
    with pytest.raises(ValueError, match="convolution of float32 and values of bfloat16"):
        other.convolution(0, wide, -1, False, False)
    with pytest.raises(ValueError, match="stride 1 without groups"):
        plan.convolution(value, layer, -1, False, False, "winograd4")
    for given_, words in (
        ({"kernel": 0}, r"kernel of a pooling must be from 1 to \d+, got \(2, 0\)"),
        ({"stride": 0}, r"stride .* got \(1, 0\)"),
        ({"dilation": 0}, r"dilation .* got \(1, 0\)"),
        ({"padding": -1}, r"padding .* got \(0, -1\)"),
        ({"padding": 2}, r"padding of a pooling must be at most half of its window, got \(0, 2\)"),
        ({"padding": 2**62}, "padding"),
    ):
        with pytest.raises(ValueError, match=words):
            pool(**given_)
    small = plan.convolution(value, layer, -1, False, False)
    with pytest.raises(ValueError, match="convolution of 3 channels is given 4"):
        plan.convolution(small, wide, -1, False, False)
    with pytest.raises(ValueError, match="3 and 4 channels are added"):
        plan.add(value, small, False)
    plan.output(small)
    with pytest.raises(ValueError, match="is an output already"):
        plan.output(small)
    with pytest.raises(ValueError, match="0 images are given, it takes 1"):
        plan.shapes([])
    with pytest.raises(ValueError, match="image of 4 channels is given, it takes 3"):
        plan.shapes([given(torch.zeros(1, 4, 8, 8))])
    with pytest.raises(ValueError, match="2x2 pixels is too small"):  # (2 - 3) / 2 + 1 would be one pixel
        plan.shapes([given(torch.zeros(1, 3, 2, 2))])
    with pytest.raises(ValueError, match="0x8 pixels is given"):
        plan.shapes([given(torch.zeros(1, 3, 0, 8))])
    with pytest.raises(ValueError, match="too large"):
        plan.shapes([given(x.expand(2**50, 3, 8, 8))])
    with pytest.raises(ValueError, match="a batch of -1 images"):
        plan.shapes([(0, (-1, 3, 8, 8), (0, 0, 0, 0))])
    out = Buffer((1, 4, 3, 3), x.dtype)
    with pytest.raises(ValueError, match="0 outputs are given, it makes 1"):
        plan.run([given(x)], [], 1)
    with pytest.raises(ValueError, match="output has the address 0"):
        plan.run([given(x)], [0], 1)
    with pytest.raises(ValueError, match="image has the address 0"):
        plan.run([(0, (1, 3, 8, 8), (192, 64, 8, 1))], [out.address], 1)
    with pytest.raises(ValueError, match="threads must be from 1 to 1024, got 0"):
        plan.run([given(x)], [out.address], 0)
    plan.run([given(x)], [out.address], 1)
    for add in (lambda: plan.input(3), lambda: plan.average(small), lambda: plan.output(value)):
        with pytest.raises(ValueError, match="it has run, nothing can be added"):
            add()


def test_values_of_different_sizes_are_not_added() -> None:
    plan = _cpu.Plan()
    x, y = plan.input(3), plan.input(3)
    plan.output(plan.add(x, y, False))
    for other in ((1, 3, 8, 9), (2, 3, 8, 8)):  # nor is anything broadcast
        with pytest.raises(ValueError, match="different sizes"):
            plan.shapes([given(torch.zeros(1, 3, 8, 8)), given(torch.zeros(other))])
