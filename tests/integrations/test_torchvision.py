"""torchvision's registry makes models of resnet_fast: names, weights, enums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fast as rf

torchvision = pytest.importorskip("torchvision")
rf.register_models("torchvision")


@pytest.mark.parametrize("arch", rf.models.list_models())
def test_names(arch: str) -> None:
    name = f"{arch}_fast"
    assert name in torchvision.models.list_models() and name in torchvision.models.list_models(include="*_fast")
    assert name in torchvision.models.list_models(module=rf.models) and arch in torchvision.models.list_models()
    assert torchvision.models.get_model_weights(name) is torchvision.models.get_model_weights(arch)
    assert torchvision.models.get_model_builder(name) is getattr(rf, arch)
    with torch.device("meta"):
        theirs, ours = (torchvision.models.get_model(each, num_classes=3) for each in (arch, name))
    assert type(ours) is rf.models.resnet.ResNet and list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    "weights", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.DEFAULT", "enum", "get"]
)
def test_weights(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights by each of torchvision's ways lead to the same file, and into the model."""
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    asked: list[str] = []

    def download(url: str, **options: Any) -> Path:
        asked.append(url)
        return tmp_path / "w.pth"

    monkeypatch.setattr(rf.models.weights, "download", download)
    enum = torchvision.models.ResNet18_Weights
    given: Any = {"enum": enum.IMAGENET1K_V1, "get": torchvision.models.get_weight("ResNet18_Weights.IMAGENET1K_V1")}
    model = torchvision.models.get_model("resnet18_fast", weights=given.get(weights, weights))
    assert asked == [enum.IMAGENET1K_V1.url] and torch.equal(model.fc.weight, theirs.fc.weight)
    with pytest.raises((TypeError, ValueError), match="resnet34"):
        torchvision.models.get_model("resnet34_fast", weights=given.get(weights, "ResNet18_Weights.IMAGENET1K_V1"))


def test_registering_twice_changes_nothing() -> None:
    before = torchvision.models.list_models()
    rf.register_models("torchvision", "torchvision")
    assert torchvision.models.list_models() == before
