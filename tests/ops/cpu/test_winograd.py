"""Winograd's minimal filtering: its error, and infinities and NaN, which its transforms would spread over a tile."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_obeys_error_rule
from tests.ops.cpu.engine import Problem, same_bits
from tests.ops.cpu.sweep import check, whole
from tests.ops.cpu.test_convolution import DATA, normal_weight

pytestmark = pytest.mark.usefixtures("one_thread")
WINOGRAD = ("winograd2", "winograd4")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("c", [64, 256])
@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_winograd_obeys_the_error_rule(algorithm: str, data: str, c: int) -> None:
    """Beside torch's convolution of the same layout, which adds channel after channel as the engine does."""
    x = DATA[data](torch.randn(1, c, 20, 28)).to(memory_format=torch.channels_last)
    weight = normal_weight(64, c).to(memory_format=torch.channels_last)
    problem = Problem(x, weight, torch.zeros(64), padding=(1, 1))
    exact = problem.reference(torch.float64)
    assert_obeys_error_rule(problem.run(algorithm), problem.reference(), exact, data)


@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_special_values_at_each_position_of_a_tile(algorithm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = whole((1, 5, 10, 9), 4, generator), whole((35, 5, 3, 3), 3, generator)
    bias, residual = whole((35,), 9, generator), whole((1, 35, 10, 9), 9, generator)
    values = itertools.cycle((torch.nan, torch.inf, -torch.inf))
    problem = Problem(x, weight, bias, residual, padding=(1, 1), relu=True, name="special")
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
