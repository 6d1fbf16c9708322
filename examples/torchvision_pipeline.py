"""Use resnet_fast with torchvision, offline, with random weights: ``python examples/torchvision_pipeline.py``."""

from __future__ import annotations

import torch
import torchvision

import resnet_fast as rf


def main() -> None:
    torch.manual_seed(0)
    rf.register_models("torchvision")
    images = torch.randn(2, 3, 64, 64)

    # 1. By name, for scripts with --model; weights="IMAGENET1K_V1" downloads torchvision's.
    model = torchvision.models.get_model("resnet18_fast", num_classes=10).eval()
    print([name for name in torchvision.models.list_models() if name.endswith("_fast")])

    # 2. A model that was trained with torchvision, as a live model of resnet_fast: the same answers.
    trained = torchvision.models.resnet18(num_classes=10).eval()
    ours = rf.from_torchvision(trained)
    with torch.no_grad():
        assert torch.allclose(ours(images), trained(images), atol=1e-4)

    # 3. torchvision's own tools take it: a backbone for detection, for example.
    backbone = torchvision.models._utils.IntermediateLayerGetter(model, {"layer2": "fine", "layer4": "coarse"})
    print({name: tuple(level.shape) for name, level in backbone(images).items()})


if __name__ == "__main__":
    main()
