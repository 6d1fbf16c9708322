"""Our models beside torchvision's with the same parameters; no tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast as rf

Edit = Callable[[nn.Module], Any]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """BN statistics and affine parameters as of a trained network, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for name, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5), ("weight", 0.5, 1.0),
                                    ("bias", -0.2, 0.2)):  # fmt: skip
                tensor = getattr(module, name)
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def twins(name: str = "resnet50", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our model and torchvision's with the same parameters, in eval mode."""
    theirs = randomise(getattr(torchvision.models, name)(**kwargs)).eval()
    ours = getattr(rf, name)(**kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def small_twins(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A small ResNet of ours and torchvision's with the same parameters, in eval mode."""
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, **kwargs)
    ours = rf.models.ResNet(rf.models.BasicBlock, [1, 1, 1, 1], num_classes=5, **kwargs)
    ours.load_state_dict(randomise(theirs).state_dict())
    return ours.eval(), theirs.eval()


def same_gradients(ours: nn.Module, theirs: nn.Module, image: Tensor) -> None:
    """In float64, where a ReLU that two roundings open and close differently cannot blur the comparison.

    The gradients of each op in float32 and bfloat16 are held to the error rule in the ops' own tests.
    """
    inputs = [image.double().requires_grad_() for _ in range(2)]
    for model, x in zip((ours.double(), theirs.double()), inputs, strict=True):
        model(x).square().sum().backward()
    assert close(inputs[0].grad, inputs[1].grad, 1e-11)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or close(p.grad, q.grad, 1e-11), name


def put(layer: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(layer, name, value)
