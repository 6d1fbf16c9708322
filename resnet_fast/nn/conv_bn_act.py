"""``ConvBNAct2d``: convolution + BatchNorm + ReLU as one module. Parameters only; what runs is decided in ``fused``."""

from collections.abc import Callable

from torch import Tensor, nn

from . import fused


class ConvBNAct2d(nn.Module):
    """Convolution, BatchNorm, optional residual and ReLU: ``relu(bn(conv(x)) + residual)``.

    One fused op in eval mode and with frozen BN; in train mode a convolution, the statistics, and one op for the rest.
    The children ``conv``, ``bn`` and ``act`` are ordinary modules: state_dict, hooks and in-place edits work as for
    them.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: as for ``torch.nn.Conv2d``.
        bias: of the convolution; none by default, since the norm has a shift of its own.
        padding: as for ``torch.nn.Conv2d``; None keeps the size at stride 1 (odd kernels).
        activation: whether a ReLU follows.
        norm_layer: makes the norm from its channel count; ``torch.nn.BatchNorm2d`` where None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        activation: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            sizes = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
            steps = (dilation,) * 2 if isinstance(dilation, int) else dilation
            if not all(size % 2 for size in sizes):
                raise ValueError(f"ConvBNAct2d: kernel_size {kernel_size} is even; give padding explicitly")
            padding = (steps[0] * (sizes[0] - 1) // 2, steps[1] * (sizes[1] - 1) // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.act = nn.ReLU(inplace=True) if activation else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``relu(bn(conv(x)) + residual)``.

        ``x`` [N, C, H, W], ``residual`` [N, K, P, Q] or None; returns [N, K, P, Q], channels_last if ``x`` or the
        convolution's weight is, as torch's layers do.
        """
        return fused.laid_out(fused.conv_bn_act(x, self.conv, self.bn, self.act, residual), x, self.conv)
