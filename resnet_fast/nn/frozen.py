"""``FrozenBatchNorm2d``: BatchNorm whose statistics and parameters are constants, as detection models train with.

Buffers, names and state_dict are those of ``torchvision.ops.FrozenBatchNorm2d``, which the models fuse just as well;
this one is for installations without torchvision. Behind a convolution of a model it becomes part of the fused op.
"""

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
        """Freeze every BatchNorm2d and SyncBatchNorm in ``module`` as it is now, in place.

        A norm that is used in several places is frozen once and stays shared.

        Returns:
            ``module``, or the frozen norm if it is a norm itself.

        Raises:
            ValueError: one cannot be frozen with the same answers: it has no running statistics, its class is a
                subclass, a method or a function it calls was replaced, or it has hooks, which would be lost. Nothing
                is changed then.
        """
        kinds = nn.BatchNorm2d | nn.SyncBatchNorm | nn.LazyBatchNorm2d
        found = {norm: name for name, norm in module.named_modules() if isinstance(norm, kinds)}
        frozen = {norm: cls._of(norm, name or "the module itself") for norm, name in found.items()}
        if module in frozen:
            return frozen[module]
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if child in frozen:
                    setattr(parent, name, frozen[child])
        return module

    @classmethod
    def _of(cls, bn: Any, name: str) -> "FrozenBatchNorm2d":
        hooks = [kind for kind, registered in vars(bn).items() if kind.endswith("_hooks") and registered]
        reason = pristine.changed(bn)
        if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            reason = f"{type(bn).__qualname__} need not compute what BatchNorm2d does"
        elif bn.running_mean is None or bn.running_var is None:
            reason = "it has no running statistics to freeze"
        elif hooks:
            reason = f"its hooks ({', '.join(hooks)}) would be lost"
        if reason:
            advice = "call its eval() and requires_grad_(False) instead"
            raise ValueError(f"FrozenBatchNorm2d: {name} cannot be frozen: {reason}; {advice}")
        frozen = cls(len(bn.running_mean), bn.eps)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(bn, name)
                if value is not None:
                    setattr(frozen, name, value.detach().clone())
            frozen.to(bn.running_mean.device)
        return frozen.train(bn.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of a checkpoint with ordinary BatchNorms
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, C, H, W] to the same shape.

        Raises:
            ValueError: ``x`` is not 4-D.
        """
        return fused.frozen(x, self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


pristine.know_frozen(FrozenBatchNorm2d)
