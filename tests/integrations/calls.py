"""What the tests of the integrations share: counting fused ops, and networks whose BatchNorm has been used."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def fused_ops(model: nn.Module, x: Tensor) -> Counter[str]:
    """Run the model and count its ops of resnet_fast, and torch's BatchNorms, by name."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as record:
        model(x)
    names = [str(event.name) for event in record.events()]
    return Counter(
        name.removeprefix("resnet_fast::") for name in names if name.startswith(("resnet_fast::", "aten::batch_norm"))
    )


def used(model: Any) -> Any:
    """Give every BatchNorm statistics and parameters of its own, as training does, and return the model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, 0, 0.1)
    return model
