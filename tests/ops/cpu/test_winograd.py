"""Winograd's minimal filtering: its error, and infinities and NaN, which its transforms would spread over a tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_obeys_error_rule
from tests.ops.cpu.engine import DTYPES, Problem, _cpu, packed, same_bits
from tests.ops.cpu.sweep import check, whole
from tests.ops.cpu.test_convolution import DATA, normal_weight

pytestmark = pytest.mark.usefixtures("one_thread")
WINOGRAD = ("winograd2", "winograd4")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("c", [64, 256])
@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_winograd_obeys_the_error_rule(algorithm: str, data: str, c: int, dtype: torch.dtype) -> None:
    """Beside torch's convolution of the same layout, which adds channel after channel as the engine does."""
    x = DATA[data](torch.randn(1, c, 20, 28)).to(memory_format=torch.channels_last)
    weight = normal_weight(64, c).to(memory_format=torch.channels_last)
    problem = Problem(x, weight, torch.zeros(64), padding=(1, 1)).to(dtype)
    exact = problem.reference(torch.float64)
    assert_obeys_error_rule(problem.run(algorithm), problem.reference(), exact, data)


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_at_each_position_of_a_tile(algorithm: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = whole((1, 5, 10, 9), 4, generator), whole((35, 5, 3, 3), 3, generator)
    bias, residual = whole((35,), 9, generator), whole((1, 35, 10, 9), 9, generator)
    values = itertools.cycle((torch.nan, torch.inf, -torch.inf))
    problem = Problem(x, weight, bias, residual, padding=(1, 1), relu=True, name="special").to(dtype)
    x = problem.x
    layer = problem.layer()
    clean = problem.run(algorithm, layer=layer)
    side = int(algorithm[-1])
    for y, column in itertools.product(range(10), range(9)):
        channel = (y + column) % 5
        before = x[0, channel, y, column].item()
        x[0, channel, y, column] = next(values)
        check(problem, algorithm)
        # Tiles that do not see it keep their bits.
        kept = torch.ones(10, 9, dtype=torch.bool)
        top, left = max(y - 1, 0) // side * side, max(column - 1, 0) // side * side
        kept[top : min(y + 1, 9) // side * side + side, left : min(column + 1, 8) // side * side + side] = False
        assert same_bits(problem.run(algorithm, layer=layer)[0, :, kept], clean[0, :, kept])
        x[0, channel, y, column] = before


@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_special_values_at_each_position_of_a_filter(algorithm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = whole((1, 3, 6, 6), 4, generator), whole((5, 3, 3, 3), 3, generator)
    for tap, value in itertools.product(range(9), (torch.nan, torch.inf, -torch.inf)):
        changed = weight.clone()
        changed[2, 1, tap // 3, tap % 3] = value
        check(Problem(x, changed, torch.zeros(5), padding=(1, 1), name=f"tap {tap}"), algorithm)


@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_what_overflows_on_the_way_only_is_finite(algorithm: str) -> None:
    x = torch.full((1, 2, 8, 8), 1e38)
    x[:, :, ::2] *= -1
    weight = torch.zeros(3, 2, 3, 3)
    weight[:, :, 1, 1] = 0.5
    problem = Problem(x, weight, torch.zeros(3), padding=(1, 1))
    ours = problem.run(algorithm)
    assert ours.isfinite().all()
    assert torch.equal(ours, problem.reference())


def test_winograd_has_a_layer_of_one_pixel() -> None:
    problem = Problem(torch.ones(2, 40, 1, 1), torch.ones(40, 40, 3, 3), torch.zeros(40), padding=(1, 1))
    for algorithm in WINOGRAD:
        out: Tensor = problem.run(algorithm)
        assert torch.allclose(out, torch.full_like(out, 40.0), rtol=1e-5)


def _taps(rows: list[list[float]], k: int, c: int) -> Tensor:
    return torch.tensor(rows) * torch.randn(k, c, 1, 1) / c**0.5


FILTERS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": normal_weight,
    "positive": lambda k, c: normal_weight(k, c).abs(),
    "identity": lambda k, c: torch.nn.init.dirac_(torch.empty(k, c, 3, 3)),
    "near identity": lambda k, c: torch.nn.init.dirac_(torch.empty(k, c, 3, 3)) + 0.01 * normal_weight(k, c),
    "edges": lambda k, c: _taps([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], k, c),
    "Laplace": lambda k, c: _taps([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], k, c),
    "box": lambda k, c: _taps([[1.0] * 3] * 3, k, c),
    "means": lambda k, c: torch.full((k, c, 3, 3), 1 / (9 * c)),
    "corners": lambda k, c: _taps([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]], k, c),
    "1x1": lambda k, c: _taps([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]], k, c),
    "heavy tails": lambda k, c: normal_weight(k, c) * torch.randn(k, c, 3, 3).abs() ** 3,
    "few channels": lambda k, c: normal_weight(k, c) * (torch.rand(k, c, 1, 1) < 4 / c),
    "a tenth": lambda k, c: normal_weight(k, c) * (torch.rand(k, c, 3, 3) < 0.1),
    "low rank": lambda k, c: (torch.randn(k, 2) @ torch.randn(2, c * 9)).view(k, c, 3, 3) / (9 * c) ** 0.5,
    "zero": lambda k, c: torch.zeros(k, c, 3, 3),
}
SPARSE = ("identity", "corners", "few channels", "a tenth", "zero")


@pytest.mark.parametrize("filters", FILTERS)
def test_what_is_chosen_obeys_the_error_rule(filters: str) -> None:
    """F(4x4) is chosen by what its rounding errors are with the layer's weights: it loses too much with some."""
    for c in (32, 48, 64, 128):
        weight = FILTERS[filters](c, c).to(memory_format=torch.channels_last)
        layer = Problem(torch.empty(0), weight, torch.zeros(c), padding=(1, 1)).layer()
        assert layer.algorithm(20, 28) == layer.algorithm(56, 56) in WINOGRAD
        for data in ("normal", "after ReLU", "mean 100", "heavy tails"):
            x = DATA[data](torch.randn(1, c, 24, 28)).to(memory_format=torch.channels_last)
            problem = Problem(x, weight, torch.zeros(c), padding=(1, 1))
            exact = problem.reference(torch.float64)
            what = f"{c} channels, {data}, {layer.algorithm(24, 28)}"
            assert_obeys_error_rule(problem.run("auto", layer=layer), problem.reference(), exact, what)


def test_the_choice_of_the_tile_is_by_the_weights() -> None:
    for name, make in FILTERS.items():
        layer = Problem(torch.empty(0), make(64, 64), torch.zeros(64), padding=(1, 1)).layer()
        if name in SPARSE:
            assert layer.algorithm(56, 56) == "winograd2", name
    for c in (64, 128, 256):  # those of residual networks
        weight = normal_weight(c, c)
        assert Problem(torch.empty(0), weight, torch.zeros(c), padding=(1, 1)).layer().algorithm(14, 14) == "winograd4"
        weight[0, 0, 0, 0] = torch.nan
        assert Problem(torch.empty(0), weight, torch.zeros(c), padding=(1, 1)).layer().algorithm(14, 14) == "winograd2"
    few = Problem(torch.empty(0), normal_weight(48, 48), torch.zeros(48), padding=(1, 1)).layer()
    assert few.algorithm(56, 56) == "winograd2"
    assert few.algorithm(2, 2) == "direct"
    thin = Problem(torch.empty(0), normal_weight(31, 64), torch.zeros(31), padding=(1, 1)).layer()
    assert thin.algorithm(56, 56) == "direct"


@pytest.mark.parametrize("c", range(1, 7))
def test_memory_for_the_window_of_a_tile_with_nan(c: int) -> None:
    """In a thread of its own, whose memory is what this layer asks for, as sanitizers see."""
    x = torch.ones(1, c, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    problem = Problem(x, torch.ones(16, c, 3, 3), torch.zeros(16), padding=(1, 1), name=f"{c} channels")
    with ThreadPoolExecutor(1) as pool:
        for dtype in DTYPES:
            found = pool.submit(lambda each: each.run("winograd2", 1), problem.to(dtype)).result()
            assert bool(found[..., :2, :2].isnan().all()) and int(found.isnan().sum()) == 16 * 4


def test_the_choice_for_bfloat16_is_by_its_rate() -> None:
    """F(4x4)'s rounding is nothing beside bfloat16's; pairs are multiplied at twice the rate of floats, if at all, and
    tiles at sixteen times of it."""
    pairs = _cpu.isa() == "avx512_bf16"

    def chosen(c: int, make: Callable[[int, int], Tensor] = normal_weight) -> str:
        layer = packed(make(c, c), torch.zeros(c), padding=(1, 1), dtype=torch.bfloat16)
        return str(layer.algorithm(14, 14))

    if _cpu.isa() == "amx":
        assert {chosen(64, FILTERS[name]) for name in FILTERS} | {chosen(512)} == {"direct"}
        return
    assert {chosen(64, FILTERS[name]) for name in FILTERS} == {"winograd4"}
    assert chosen(512) == ("direct" if pairs else "winograd2")
