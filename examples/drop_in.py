"""Use resnet_fast in three ways, offline, with random weights: ``python examples/drop_in.py``."""

from __future__ import annotations

import torch

import resnet_fast as rf


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 224, 224)  # stands for a preprocessed batch

    # 1. A drop-in for torchvision.models.resnet50: same arguments and state_dict, fused if that changes nothing.
    model = rf.resnet50().eval()
    with torch.no_grad():
        scores = model(images)

        # It stays an ordinary module: an edit shows at the next forward, a hook fires.
        model.fc.bias[7] += 1
        assert torch.allclose(model(images)[:, 7], scores[:, 7] + 1, atol=1e-4)
        shapes = []
        handle = model.layer3.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        model(images)
        handle.remove()
        assert shapes == [(4, 1024, 14, 14)]

    # 2. A frozen snapshot for inference, of this or of a torchvision model.
    fast = rf.optimize(model)
    with torch.no_grad():
        print("largest difference:", (fast(images) - model(images)).abs().max().item())
    print(str(fast.report()).splitlines()[-2])

    # 3. Gradients with frozen BatchNorm statistics, as for fine-tuning a detection backbone: fused as well.
    model(images).logsumexp(1).sum().backward()
    print("gradient norm of the first convolution:", model.conv1.weight.grad.norm().item())


if __name__ == "__main__":
    main()
