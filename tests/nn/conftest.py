"""Fixtures of this room: two models, an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.nn.twins import twins


@pytest.fixture(params=["resnet18", "resnet50"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return twins(request.param)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 96)
