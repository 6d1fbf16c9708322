"""Use resnet_fast in a timm pipeline, offline, with random weights: ``python examples/timm_pipeline.py``."""

from __future__ import annotations

import tempfile

import timm
import torch
from timm.optim import create_optimizer_v2

import resnet_fast as rf


def main() -> None:
    torch.manual_seed(0)
    rf.register_models("timm")
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])

    # 1. timm makes, trains and saves the model; pretrained=True loads the weights of timm's resnet18.
    model = timm.create_model("resnet18_fast", num_classes=4, drop_path_rate=0.05)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, layer_decay=0.9)
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    # 2. The checkpoint fits timm's own resnet18, and the other way round.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save({"state_dict": model.state_dict()}, f"{folder}/last.pth")
        theirs = timm.create_model("resnet18", num_classes=4, checkpoint_path=f"{folder}/last.pth").eval()
        assert torch.allclose(model.eval()(images), theirs(images), atol=1e-3)

    # 3. A backbone; then timm's own model, trained elsewhere, as one of resnet_fast.
    features = timm.create_model("resnet18_fast", features_only=True, out_indices=(2, 3, 4))
    print([tuple(level.shape) for level in features(images)])
    print(repr(rf.optimize(rf.from_timm(theirs)).report()))


if __name__ == "__main__":
    main()
