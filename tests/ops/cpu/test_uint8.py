"""The engine's convolutions of uint8 against integers: exact sums, one rounding, and nothing else than the layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.backends import cpu
from tests.ops.cpu.engine import _cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(cpu.without_uint8()), reason=cpu.without_uint8() or "-"),
]
EPS = 2.0**-24


@dataclass(frozen=True)
class Problem:
    """A convolution; ``kinds``: of images and outputs. ``residual``: "", "stored", "float", "behind the ReLU"."""

    n: int = 2
    c: int = 16
    k: int = 32
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    reads: torch.dtype = torch.uint8
    makes: torch.dtype = torch.uint8
    residual: str = ""
    relu: bool = True
    x: tuple[float, int] = (0.25, 7)
    out_zero: int = 30
    added: tuple[float, int] = (0.5, 100)
    largest: int = 255
    seed: int = 0

    def shape(self) -> tuple[int, int, int, int]:
        window = [self.dilation[i] * (self.kernel[i] - 1) + 1 for i in range(2)]
        p, q = ((self.size[i] + 2 * self.padding[i] - window[i]) // self.stride[i] + 1 for i in range(2))
        return self.n, self.k, p, q


class Case:
    """A problem with numbers: ``real`` is what the convolution gives exactly, ``error`` how far float32 may be off."""

    def __init__(self, problem: Problem) -> None:
        self.problem = a = problem
        random = torch.Generator().manual_seed(a.seed)
        shape, stored = (a.n, a.c, *a.size), a.reads is torch.uint8
        numbers = (a.k, a.c // a.groups, *a.kernel)
        self.weight_scale = torch.rand(a.k, generator=random) * 0.02 + 0.001 if stored else torch.ones(a.k)
        if stored:
            self.image = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
            self.weight = torch.randint(-127, 128, numbers, generator=random, dtype=torch.int8)
            x = a.x[0] * (self.image.double() - a.x[1])
        else:
            self.image, self.weight = (torch.randn(each, generator=random) for each in (shape, numbers))
            x = self.image.double()
        scale = self.weight_scale.double().view(-1, 1, 1, 1)
        rest: Any = (a.stride, a.padding, a.dilation, a.groups)
        self.bias = torch.randn(a.k, generator=random) * 5
        real = F.conv2d(x, self.weight.double() * scale, self.bias.double(), *rest)
        # What is added up, without its signs: zero points are subtracted behind the sum.
        x = a.x[0] * (self.image.double() + a.x[1]) if stored else x
        magnitude = F.conv2d(x.abs(), (self.weight.double() * scale).abs(), self.bias.double().abs(), *rest)
        if stored and a.x[1]:
            magnitude += a.x[0] * a.x[1] * (self.weight.double() * scale).abs().sum((1, 2, 3)).view(-1, 1, 1)
        self.residual: Tensor | None = None
        added: Tensor | float = 0.0
        if a.residual == "stored":
            self.residual = torch.randint(0, 256, real.shape, generator=random, dtype=torch.uint8)
            added = a.added[0] * (self.residual.double() - a.added[1])
            magnitude += a.added[0] * (self.residual.double() + a.added[1])
        elif a.residual:
            self.residual = torch.randn(real.shape, generator=random) * 20
            added = self.residual.double()
            magnitude += added.abs()
        behind = a.residual == "behind the ReLU"
        real = real.relu() + added if behind and a.relu else real + added
        self.real = real.relu() if a.relu and not behind else real
        largest = float(self.real.abs().max()) if real.numel() else 0.0
        self.out = (float(torch.tensor(largest / 90 or 1.0)), a.out_zero)
        products = self.weight[0].numel()
        in_bfloat16 = not stored and _cpu.isa() in ("avx512_bf16", "amx")  # both factors
        halves = (1 + 2.0**-8) ** 2 - 1 if in_bfloat16 else 0.0
        self.error = magnitude * (halves + EPS * (8 if stored else products + 8))
        if stored:  # a sum of few products may begin at 1.5 * 2^23, of which the bias is rounded as it is taken away
            self.error = self.error + 0.75 * a.x[0] * scale.view(-1, 1, 1)

    def layer(self, residual_stored: bool | None = None) -> cpu.Convolution:
        a = self.problem
        holds = a.residual == "stored" if residual_stored is None else residual_stored
        stored = cpu.Stored(a.makes, a.x, self.out, a.added if holds else None, self.weight_scale, a.largest)
        geometry = (a.stride, a.padding, a.dilation, a.groups)
        return cpu.Convolution(self.weight, self.bias, geometry, a.reads, (), stored)

    def run(self, layer: cpu.Convolution | None = None, images: slice | list[int] = slice(None)) -> Tensor:
        a = self.problem
        residual = None if self.residual is None else self.residual[images]
        return (layer or self.layer()).run(self.image[images], residual, a.relu, a.residual == "behind the ReLU")

    def check(self) -> tuple[int, int]:
        """Return how many outputs differ from the rounded exact ones, each by a step and near half of one, of how
        many."""
        a, found = self.problem, self.run()
        assert tuple(found.shape) == a.shape() and found.is_contiguous(memory_format=torch.channels_last)
        assert found.dtype is a.makes
        if a.makes is torch.float32:
            assert bool(((found.double() - self.real).abs() <= self.error).all()), a
            return 0, 0
        scale, zero = self.out
        steps = self.real / scale
        wanted = (steps.round() + zero).clamp(0, a.largest)
        difference = (found.double() - wanted).abs()
        border = ((steps - steps.floor()) - 0.5).abs() <= self.error / scale
        assert bool((difference <= border).all()), a
        return int((difference > 0).sum()), found.numel()


PROBLEMS = [
    Problem(),
    Problem(n=1, c=1, k=1, size=(1, 1), kernel=(1, 1), padding=(0, 0)),
    Problem(n=1, c=3, k=64, size=(97, 131), kernel=(7, 7), stride=(2, 2), padding=(3, 3), x=(0.0125, 120)),
    Problem(n=3, c=17, k=33, size=(13, 11), stride=(2, 1), residual="stored", x=(0.1, 255)),
    Problem(n=3, c=64, k=64, size=(7, 7), kernel=(1, 1), padding=(0, 0), residual="stored", largest=127, out_zero=9),
    Problem(n=1, c=64, k=256, size=(14, 14), kernel=(1, 1), padding=(0, 0), residual="stored", out_zero=0),
    Problem(n=1, c=64, k=17, size=(14, 10), padding=(2, 2), dilation=(2, 2)),
    Problem(n=3, c=33, k=5, size=(8, 9), kernel=(1, 7), padding=(0, 3), largest=127, relu=False),
    Problem(n=1, c=33, k=130, size=(8, 9), kernel=(7, 1), padding=(6, 0), relu=False, residual="stored"),
    Problem(n=2, c=64, k=64, groups=4, residual="stored"),
    Problem(n=2, c=24, k=48, groups=2, kernel=(5, 5), padding=(4, 4), stride=(3, 3)),
    Problem(n=2, c=32, k=32, groups=32),
    Problem(n=1, c=512, k=70, size=(7, 7)),
    Problem(n=1, c=64, k=64, size=(2, 2), kernel=(3, 3), padding=(5, 4)),
    Problem(n=0, residual="stored"),
    Problem(n=1, c=21, k=40, size=(3, 700), stride=(1, 2)),
    Problem(n=2, c=6, k=35, size=(40, 33), padding=(9, 12), dilation=(9, 12), residual="stored"),
    Problem(n=1, c=5, k=33, size=(12, 23), kernel=(2, 1), stride=(3, 4), padding=(1, 0)),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_sums_are_exact(problem: Problem) -> None:
    different, count = Case(problem).check()
    assert different <= max(1, count // 1000)
    if problem.residual == "stored":
        Case(dataclasses.replace(problem, makes=torch.float32)).check()
        return
    for residual in ("", "float", "behind the ReLU"):
        Case(dataclasses.replace(problem, makes=torch.float32, residual=residual)).check()


def _drawn(seed: int) -> Problem:
    random = torch.Generator().manual_seed(seed)

    def one(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    kernel, dilation = (one(1, 1, 2, 3, 5), one(1, 1, 3, 4)), (one(1, 1, 2), one(1, 1, 2))
    window = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    size = tuple(one(1, 2, 5, 8, 15) + window[i] - 1 for i in range(2))
    groups, reads, makes = one(1, 1, 1, 2, 3), one(torch.uint8, torch.uint8, torch.float32), torch.uint8
    residual = one("", "stored") if reads is torch.uint8 else ""
    if reads is torch.uint8 and one(False, False, True):
        makes, residual = torch.float32, one("", "stored", "float", "behind the ReLU")
    return Problem(
        one(1, 2, 3), groups * one(1, 3, 4, 17, 33, 64, 65), groups * one(1, 7, 16, 31, 32, 33, 64, 100), size, kernel,
        (one(1, 2, 3), one(1, 1, 2)), (one(0, 1, window[0]), one(0, 1, 3)), dilation, groups, reads, makes, residual,
        one(False, True), (one(0.01, 0.5), one(0, 1, 128, 255)), one(0, 0, 13, 120), (one(0.1, 2.0), one(0, 17, 255)),
        one(255, 255, 127), seed,
    )  # fmt: skip


def test_random_problems() -> None:
    different = count = 0
    for seed in range(150):
        one, all_ = Case(_drawn(seed)).check()
        if _drawn(seed).reads is torch.uint8:
            different, count = different + one, count + all_
    assert count > 100_000 and different <= count // 1000


@pytest.mark.parametrize("size", [(1, 1), (14, 14), (97, 131)])
@pytest.mark.parametrize("relu", [False, True])
def test_images_in_float32_become_bytes_at_once(size: tuple[int, int], relu: bool) -> None:
    for c, k, kernel, groups in ((3, 64, 7, 1), (1, 16, 3, 1), (64, 17, 1, 1), (34, 32, 3, 2)):
        problem = Problem(2, c, k, size, (kernel,) * 2, (2, 2), (kernel // 2,) * 2, groups=groups, reads=torch.float32)
        Case(dataclasses.replace(problem, relu=relu, largest=127 if groups > 1 else 255)).check()


@pytest.mark.parametrize("reads", [torch.uint8, torch.float32])
def test_the_same_bits_in_every_batch_by_any_number_of_threads(reads: torch.dtype) -> None:
    for c, k, size, kernel in ((64, 130, (14, 14), 3), (3, 40, (30, 31), 3), (100, 33, (7, 7), 1)):
        residual = "stored" if reads is torch.uint8 else ""
        case = Case(Problem(5, c, k, size, (kernel,) * 2, padding=(kernel // 2,) * 2, reads=reads, residual=residual))
        layer = case.layer()
        alone = torch.cat([case.run(layer, [index]) for index in range(5)])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(case.run(layer), alone)
            assert torch.equal(case.run(layer, [3, 1, 3]), alone[[3, 1, 3]])


def test_images_of_any_strides() -> None:
    case = Case(Problem(c=33, residual="stored"))
    wanted = case.run()
    for change in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
    ):
        changed = Case(case.problem)
        assert changed.residual is not None
        changed.image, changed.residual = change(case.image), change(changed.residual)
        assert torch.equal(changed.run(), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [35, 64])  # 35: the last vector has places without a channel, of weights 0
def test_what_is_no_number_is_said(value: float, k: int) -> None:
    case = Case(Problem(reads=torch.float32, c=6, k=k))
    case.run()
    case.image[1, 4, 4, 3] = value
    with pytest.raises(cpu.NotFiniteError):
        case.run()
    case.weight.abs_()
    if value == -float("inf"):  # which the ReLU makes a number, as in float32
        found = case.run()
        exact = F.conv2d(case.image, case.weight, case.bias, padding=1)
        assert bool((found[exact.isinf()] == case.out[1]).all()) and bool(exact.isinf().any())


def test_the_extremes_of_a_sum() -> None:
    """As many products of 255 and 127 as 32 bits hold, and one more is refused."""
    most = (2**31 - 1) // (255 * 127)
    for sign in (1, -1):
        x = torch.full((1, most, 1, 1), 255, dtype=torch.uint8)
        weight = torch.full((16, most, 1, 1), sign * 127, dtype=torch.int8)
        stored = cpu.Stored(torch.float32, (1.0, 0), weight_scale=torch.ones(16))
        layer = cpu.Convolution(weight, torch.zeros(16), ((1, 1), (0, 0), (1, 1), 1), torch.uint8, (), stored)
        assert torch.allclose(layer.run(x, None, False, False), torch.tensor(sign * most * 255.0 * 127.0), rtol=1e-6)
    assert not cpu.unsupported_int8((16, most, 1, 1)) and "at most" in cpu.unsupported_int8((16, most + 1, 1, 1))


def test_a_residual_of_another_kind_is_refused() -> None:
    case = Case(Problem(residual="stored"))
    assert case.residual is not None
    with pytest.raises(ValueError, match="made for a residual in uint8"):
        case.layer().run(case.image, None, True, False)
    with pytest.raises(RuntimeError, match="the residual must be uint8 of"):
        case.layer().run(case.image, case.residual.float(), True, False)
    with pytest.raises(RuntimeError, match="the residual must be uint8 of"):
        case.layer().run(case.image, case.residual[:1], True, False)
    with pytest.raises(ValueError, match="made without a residual in uint8"):
        case.layer(residual_stored=False).run(case.image, case.residual, True, False)
    with pytest.raises(RuntimeError, match="takes uint8 images of 16 channels"):
        case.layer().run(case.image.float(), case.residual, True, False)


def test_a_plan_of_both_kinds_is_its_layers() -> None:
    first, second = Case(Problem(c=16, k=16)), Case(Problem(c=16, k=16, residual="stored", makes=torch.float32))
    image, way, largest = torch.randn(3, 16, 9, 7) * 40, (0.5, 90), 200
    network = cpu.Network()
    x = network.quantize(network.input(16, torch.float32), way, largest)
    pooled = network.max_pool(x, (3, 3), (1, 1), (1, 1), (1, 1), False)
    y = network.convolution(pooled, first.layer(), None, True)
    z = network.convolution(y, second.layer(), x, True)
    for value in (x, network.dequantize(pooled, way), y, z):
        network.output(value, flat=False)
    stored, real, bytes_, floats = network.run([image])
    wanted = (image * 2).round().add(90).clamp(0, largest).to(torch.uint8)
    assert torch.equal(stored, wanted)
    maximum = F.max_pool2d(wanted.float(), 3, 1, 1)
    assert torch.equal(real, (maximum - 90) * 0.5)
    assert torch.equal(bytes_, first.layer().run(maximum.to(torch.uint8), None, True, False))
    assert torch.equal(floats, second.layer().run(bytes_, wanted, True, False))
    image[2, 3, 4, 5] = torch.nan
    with pytest.raises(cpu.NotFiniteError):
        network.run([image])


STORED = [a for a in PROBLEMS if a.residual == "stored"]
STORED += [Problem(c=c, k=33, residual="stored", makes=torch.float32) for c in (3, 64)]
STORED += [
    Problem(c=c, k=k, kernel=(side, side), padding=(side // 2, side // 2), reads=torch.float32, residual="stored")
    for c, k, side in ((1, 16, 3), (7, 33, 3), (32, 64, 1), (50, 5, 2))
]


@pytest.mark.parametrize("a", STORED, ids=str)
def test_results_stored_on_their_residuals_are_what_they_are_elsewhere(a: Problem) -> None:
    """Minus infinity behind the ReLU is a number, and on AMX such outputs are computed twice."""
    case = Case(a)
    if a.reads is torch.float32:
        case.weight = case.weight.abs()
        case.image[:, 0, 4, 3], case.image[:, -1, 0, 0] = -torch.inf, -torch.inf
    same_place = ((1, 1), (1, 1), (0, 0), (1, 1), False)
    found = []
    for kept in (False, True):  # kept, the residual lies elsewhere
        network, layer = cpu.Network(), case.layer()
        image = network.input(a.c, a.reads)
        residual = network.max_pool(network.input(a.k, torch.uint8), *same_place)
        network.output(network.max_pool(network.convolution(image, layer, residual, a.relu), *same_place), flat=False)
        if kept:
            network.output(residual, flat=False)
        assert case.residual is not None
        try:
            found.append(network.run([case.image, case.residual])[0])
        except cpu.NotFiniteError:
            # There a run that ends within a word sees the infinity of a neighbour: an error that is none.
            assert a.reads is torch.float32 and a.c % 2 and _cpu.isa() == "avx512_bf16"
            found.append(torch.empty(0))
    assert torch.equal(*found)
    if a.reads is torch.uint8:
        assert torch.equal(found[0], case.run())


def test_where_the_relu_is() -> None:
    """Behind no residual it is where it always is; a stored residual is added in front of it."""
    case = Case(Problem(makes=torch.float32))
    found = case.layer().run(case.image, None, True, True)
    assert torch.equal(found, case.run()) and bool((found >= 0).all()) and bool((found == 0).any())
    case = Case(Problem(makes=torch.float32, residual="stored"))
    with pytest.raises(ValueError, match="a residual in uint8 is added in front of the ReLU"):
        case.layer().run(case.image, case.residual, True, True)
    network = cpu.Network()
    image, residual = (network.input(channels, torch.uint8) for channels in (16, 32))
    with pytest.raises(ValueError, match="a residual in uint8 is added in front of the ReLU"):
        network.convolution(image, case.layer(), residual, True, True)
    assert network.convolution(image, case.layer(), residual, False, True) == 2


@pytest.mark.parametrize("c", [1, 128, 129, 130, 200, 517, 520])
def test_the_largest_sums_become_bytes(c: int) -> None:
    """Short sums are floats as they are, and no longer are where they would not fit."""
    for sign in (1, -1):
        x = torch.full((1, c, 3, 5), 255, dtype=torch.uint8)
        weight = torch.full((33, c, 1, 1), sign * 127, dtype=torch.int8)
        step = c * 255 * 127 / 100.25  # the result in steps
        stored = cpu.Stored(torch.uint8, (1.0, 0), (step, 120), None, torch.ones(33))
        layer = cpu.Convolution(weight, torch.zeros(33), ((1, 1), (0, 0), (1, 1), 1), torch.uint8, (), stored)
        assert layer.run(x, None, False, False).unique().tolist() == [120 + sign * 100]
