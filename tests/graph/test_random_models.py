"""Random models equal their snapshots: `tests.graph.random_models` has the models, and runs as many as one likes."""

from __future__ import annotations

import ast
import collections
import random

import pytest
import torch

from resnet_fast.graph.snapshot import PartlyOptimizedModule
from tests.graph import random_models


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 500, 100))
def test_snapshots_of_random_models_equal_them(first: int) -> None:
    """Whole ones among them, and such with fused layers."""
    kinds: collections.Counter[str] = collections.Counter()
    for number in range(first, first + 100):
        found, source, fast = random_models.examine(number)
        assert not found, f"{number}: {found}\n{source}"
        if fast is not None:
            kinds["parts" if isinstance(fast, PartlyOptimizedModule) else "whole"] += 1
            kinds["fused"] += bool(fast.report().fused)
    assert min(kinds["whole"], kinds["fused"]) >= 40, kinds


def test_what_roundings_decide_is_no_difference() -> None:
    """The mean of an instance norm in half precision: nothing but the roundings is left."""
    assert random_models.examine(9371)[0] == ""


def test_every_statement_and_layer_occurs() -> None:
    """In the first hundreds: a kind that is never drawn would be no test."""
    layers: set[type] = set()
    statements: set[str] = set()
    for number in range(500):
        torch.manual_seed(number)
        model, source = random_models.model_of(random.Random(number))
        layers |= {type(module) for module in model.modules()}
        statements |= {type(node).__name__ for node in ast.walk(ast.parse(source))}
    assert len(layers) >= 30, layers
    assert {"If", "For", "Try", "With", "Lambda", "NamedExpr", "Dict", "ListComp", "FunctionDef"} <= statements
