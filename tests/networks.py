"""Small networks for the tests of graphs, and what it means that two give the same; no tests, and no hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import _torchvision_stub  # noqa: F401 - before torchvision

# isort: split
from torchvision.models.resnet import Bottleneck, ResNet

from resnet_fast.graph import calling
from resnet_fast.ops import Op


def randomise(model: nn.Module) -> nn.Module:
    """Weights and batch norm statistics that no layer is trivial with, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def smooth(model: nn.Module) -> nn.Module:
    """A torchvision-like ResNet whose ReLUs are open at almost every element, with small residual branches.

    Where rounding decides whether a ReLU passes a value near 0, gradients of two float32 runs differ by percents, and
    which is nearer to float64 is luck. Here rounding errors stay rounding errors.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) or type(module).__name__ == "FrozenBatchNorm2d":
                module.bias.fill_(4.0)
            if isinstance(module, nn.Sequential) and hasattr(module, "0") and hasattr(module[0], "bn2"):
                for block in module:
                    getattr(block, "bn3", block.bn2).weight.fill_(0.1)
    return model


def conv_bn(channels: int = 4, out: int | None = None, **kwargs: Any) -> nn.Sequential:
    out = channels if out is None else out
    kwargs = {"kernel_size": 3, "padding": 1, "bias": False, **kwargs}
    return nn.Sequential(nn.Conv2d(channels, out, **kwargs), nn.BatchNorm2d(out))


class Lambda(nn.Module):
    """Modules by name and a forward given as a function of them."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in calling.flatten(value)[0] if isinstance(leaf, Tensor)]


def assert_same(fused: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Both give the same nest of tensors up to rounding, each on its own copy of ``x``."""
    with torch.no_grad():
        expected = model(x.clone())
    actual = fused(x.clone())
    assert torch.utils._pytree.tree_structure(actual) == torch.utils._pytree.tree_structure(expected)
    for index, (a, e) in enumerate(zip(leaves(actual), leaves(expected), strict=True)):
        assert a.shape == e.shape, index
        assert a.dtype is e.dtype, index
        assert not a.requires_grad, index
        assert (a - e).norm() <= tolerance * (e.norm() + 1e-3), (index, (a - e).norm().item(), e.norm().item())


def small(layers: tuple[int, ...] = (2, 1, 1, 2), block: Any = Bottleneck, **kwargs: Any) -> nn.Module:
    """torchvision's ResNet with few blocks, statistics that are not trivial, and a trunk that stays in range."""
    model = randomise(ResNet(block, list(layers), **kwargs))
    for name, module in model.named_modules():
        if name.endswith("bn3") and isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.3)
    return model


def watch_ops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return a list of the ops that run from now on, by name and arguments."""
    found: list[tuple[str, Any]] = []
    run = Op.run

    def watching(op: Op[Any], a: Any) -> Any:
        found.append((op.name, a))
        return run(op, a)

    monkeypatch.setattr(Op, "run", watching)
    return found
