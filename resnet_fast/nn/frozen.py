"""``FrozenBatchNorm2d``: BatchNorm whose statistics and parameters are constants, as detection models train with.

Buffers, names and state_dict are those of ``torchvision.ops.FrozenBatchNorm2d``, which the models fuse just as well;
this one is for installations without torchvision. Behind a convolution of a model it becomes part of the fused op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import fused, pristine


class FrozenBatchNorm2d(nn.Module):
    """``(x - running_mean) / sqrt(running_var + eps) * weight + bias`` with four buffers; the same in train mode.

    Args:
        num_features: channels.
        eps: as for ``torch.nn.BatchNorm2d``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """``module`` with every BatchNorm2d and SyncBatchNorm in it frozen as it is now; itself where it is one.

        Raises:
            ValueError: one has no running statistics to freeze.
        """
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            return cls._of(module)
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module

    @classmethod
    def _of(cls, bn: Any) -> FrozenBatchNorm2d:
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError("FrozenBatchNorm2d: a BatchNorm without running statistics has nothing to freeze")
        frozen = cls(bn.num_features, bn.eps)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(bn, name)
                if value is not None:
                    setattr(frozen, name, value.detach().clone())
            frozen.to(bn.running_mean.device)
        return frozen

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of a checkpoint with ordinary BatchNorms
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, C, H, W] to the same shape."""
        return fused.frozen(x, self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


pristine.know_frozen(FrozenBatchNorm2d)
