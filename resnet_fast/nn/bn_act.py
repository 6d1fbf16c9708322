"""``BNAct2d``: BatchNorm + ReLU as one module. Parameters only; what runs is decided in ``fused``."""

from collections.abc import Callable

from torch import Tensor, nn

from . import fused


class BNAct2d(nn.Module):
    """BatchNorm, optional residual and ReLU: ``relu(bn(x) + residual)``, in train mode, eval mode and frozen.

    Two passes over memory in train mode (statistics, and all the rest), one otherwise; backward likewise. The children
    ``bn`` and ``act`` are ordinary modules: state_dict, hooks, ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and
    in-place edits work as for them.

    Args:
        num_features: channels.
        eps, momentum, affine, track_running_stats: as for ``torch.nn.BatchNorm2d``.
        activation: whether a ReLU follows.
        norm_layer: makes the norm from its channel count; then the four arguments above must be left alone.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            self.bn: nn.Module = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)
        elif (eps, momentum, affine, track_running_stats) != (1e-5, 0.1, True, True):
            raise ValueError("BNAct2d: give eps, momentum, affine and track_running_stats to norm_layer itself")
        else:
            self.bn = norm_layer(num_features)
        self.act = nn.ReLU(inplace=True) if activation else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` [N, C, H, W], ``residual`` likewise or None; returns [N, C, H, W] in x's memory format."""
        return fused.laid_out(fused.bn_act(x, self.bn, self.act, residual), x)
