"""Use resnet_fast with transformers, offline, with random weights: ``python examples/transformers_pipeline.py``."""

from __future__ import annotations

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import resnet_fast as rf


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    config = ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], id2label={0: "cat", 1: "dog"}
    )
    theirs = ResNetForImageClassification(config).eval()

    # 1. A model in memory, as a live model of resnet_fast, which returns the logits alone.
    with torch.no_grad():
        ours = rf.from_transformers(theirs)
        assert torch.allclose(ours(images), theirs(images).logits, atol=1e-4)

        # 2. A folder of save_pretrained; "hf://owner/name" reads the same from the hub.
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            model = rf.resnet18(weights=folder).eval()
            labels = rf.models.categories(folder)
        print([labels[index] for index in model(images).argmax(1)])

        # 3. The model as it is, with its outputs, fused and frozen: for any other network of transformers too.
        fast = rf.optimize(theirs, example_inputs=images)
        assert torch.allclose(fast(images).logits, theirs(images).logits, atol=1e-4)


if __name__ == "__main__":
    main()
