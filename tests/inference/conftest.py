"""A small trained-like network for the tests of this folder, and its answers in float64; no tests."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import resnet_fast as rf
from resnet_fast import inference, models
from resnet_fast.models import Preprocessing

FACTS = Preprocessing(40, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bicubic")
NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a ResNet-18 with seven classes, whose scores differ between images, as training writes them."""
    torch.manual_seed(0)
    model = rf.resnet18(num_classes=len(NAMES))
    model(torch.randn(16, 3, 64, 64))  # measures BatchNorm's statistics
    with torch.no_grad():
        model.fc.weight.mul_(8)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    about = {"arch": "resnet18", "classes": json.dumps(NAMES), **FACTS.to_metadata()}
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, about)
    return path


@pytest.fixture(scope="session")
def classifier(checkpoint: Path) -> inference.Classifier:
    return inference.load(weights=str(checkpoint))


@pytest.fixture(scope="session")
def exact(checkpoint: Path) -> Callable[[Image.Image], Tensor]:
    """Probabilities in float64 by plain layers, of an upright RGB image."""
    network = inference.classifier.load_network(None, str(checkpoint))
    plain = models.resnet18(num_classes=len(NAMES)).double().eval()
    plain.load_state_dict(network.model.double().state_dict())

    def answer(image: Image.Image) -> Tensor:
        resized = image.resize(_resized(image.size), Image.Resampling.BICUBIC)
        left, top = ((side - 32) / 2 for side in resized.size)
        crop = np.asarray(resized.crop((round(left), round(top), round(left) + 32, round(top) + 32)))
        pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1).double() / 255
        mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (FACTS.mean, FACTS.std))
        with torch.no_grad():
            return plain(((pixels - mean) / std)[None])[0].softmax(0)

    return answer


def _resized(size: tuple[int, int]) -> tuple[int, int]:
    short, long = min(size), max(size)
    longer = int(40 * long / short)
    return (40, longer) if size[0] <= size[1] else (longer, 40)


def picture(seed: int = 0, size: tuple[int, int] = (60, 44)) -> Image.Image:
    """A smooth random picture, which formats with loss keep nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
