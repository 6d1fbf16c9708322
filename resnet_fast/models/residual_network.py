"""Define the small residual network without BatchNorm of TensorFlow's MNIST examples; not one of the ten ResNets.

Only the wiring and the initial values are here: how a layer is computed is decided by `resnet_fast.nn`, how it is
trained by `resnet_fast.training.residual`.
"""

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from resnet_fast.models.resnet import check_images
from resnet_fast.nn import fused
from resnet_fast.nn.conv_act import conv_act, same_padding

__all__ = ["ResidualNetwork", "residual_network"]

_BLOCKS = ((128, 32), (256, 64), (512, 128), (1024, 256))
"""Filters and bottleneck size of each block."""

_REPEATS = 3
_STDDEV = 0.02


class MaxPool2dSame(nn.Module):
    """Max-pool with TensorFlow's SAME padding: [N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)].

    Padding never wins a maximum, and NaN does. torch's own pool does both: it takes the padding before the image, and
    with ``ceil_mode`` lets the last window reach over the end, so nothing is copied.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        before = [same_padding(size, self.kernel_size, self.stride)[0] for size in (x.shape[2], x.shape[3])]
        return torch.max_pool2d(x, self.kernel_size, self.stride, before, 1, True)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class ResidualRepeat(nn.Module):
    """1x1 to ``bottleneck`` channels, 3x3, 1x1 back to ``filters``, a ReLU after each; then the input is added.

    Nothing follows the addition. [N, filters, H, W] -> the same shape.
    """

    def __init__(self, filters: int, bottleneck: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(filters, bottleneck, 1)
        self.conv_bottleneck = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.conv_out = nn.Conv2d(bottleneck, filters, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_act(x, self.conv_in, self.relu)
        out = conv_act(out, self.conv_bottleneck, self.relu)
        out = conv_act(out, self.conv_out, self.relu, residual=x)
        return fused.laid_out(out, x, self.conv_in, self.conv_bottleneck, self.conv_out)


class ResidualBlock(nn.Module):
    """Three repeats, then, before another block, a 1x1 convolution without bias to that one's filters."""

    def __init__(self, filters: int, bottleneck: int, next_filters: int | None) -> None:
        super().__init__()
        self.repeat_0, self.repeat_1, self.repeat_2 = (ResidualRepeat(filters, bottleneck) for _ in range(_REPEATS))
        self.conv_upscale = None if next_filters is None else nn.Conv2d(filters, next_filters, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.repeat_2(self.repeat_1(self.repeat_0(x)))
        if self.conv_upscale is None:
            return x
        return fused.laid_out(conv_act(x, self.conv_upscale), x, self.conv_upscale)


class ResidualNetwork(nn.Module):
    """See :func:`residual_network`. Children are named after the TensorFlow variables (`block_0.repeat_0.conv_in`).

    Args:
        num_outputs: classes. in_channels: of the images.

    Raises:
        ValueError: for a number below 1.
    """

    def __init__(self, num_outputs: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        for name, value in (("num_outputs", num_outputs), ("in_channels", in_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"residual_network: {name} is {value!r}, it must be an int of at least 1")
        following = [filters for filters, _ in _BLOCKS[1:]] + [None]
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2)  # its padding depends on the image: see forward
        self.relu = nn.ReLU(inplace=True)
        self.pool = MaxPool2dSame(3, 2)
        self.conv2 = nn.Conv2d(64, _BLOCKS[0][0], 1)
        self.block_0, self.block_1, self.block_2, self.block_3 = (
            ResidualBlock(*sizes, after) for sizes, after in zip(_BLOCKS, following, strict=True)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(_BLOCKS[-1][0], num_outputs, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions and their biases: normal, σ 0.02, redrawn beyond 2σ. The linear matrix: normal, σ 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                for parameter in module.parameters():
                    nn.init.trunc_normal_(parameter, std=_STDDEV, a=-2 * _STDDEV, b=2 * _STDDEV)
        nn.init.normal_(self.linear.weight, std=_STDDEV)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_outputs]. Probabilities are their ``softmax(1)``; losses are best computed from logits.

        Args:
            x: floating point, [N, in_channels, H, W] in any memory format, or, for one channel, [N, D * D].

        Raises:
            TypeError: if `x` is not a tensor, not floating point or, outside autocast, not of the parameters' dtype.
            ValueError: if a flat image is not a square, or for any other shape.
        """
        if not isinstance(x, Proxy):  # a traced graph takes [N, C, H, W]
            x = _as_images(x, self.conv1)
        (top, bottom), (left, right) = (same_padding(x.shape[axis], 7, 2) for axis in (2, 3))
        x = nn.functional.pad(x, (left, right, top, bottom))
        x = self.pool(conv_act(x, self.conv1, self.relu))
        x = conv_act(x, self.conv2)
        x = self.block_3(self.block_2(self.block_1(self.block_0(x))))
        return fused.head(x, self.avgpool, self.linear)


def _as_images(x: Tensor, first: nn.Module) -> Tensor:
    if isinstance(x, Tensor) and x.dim() == 2:
        channels, length = first.in_channels if type(first) is nn.Conv2d else 1, x.shape[1]
        if channels != 1:
            raise ValueError(
                f"a flat batch {list(x.shape)} has one channel, this network has {channels}: "
                f"give a tensor of shape [N, {channels}, H, W]"
            )
        side = round(length**0.5)  # math.isqrt cannot be traced with a symbolic length
        if side * side != length or side == 0:
            raise ValueError(
                f"a flat image must be a square, [N, D * D]; got {list(x.shape)}, {length} is not a square number"
            )
        x = x.reshape(-1 if x.shape[0] else 0, 1, side, side)
    check_images(x, first)
    if isinstance(x, Tensor) and 0 in x.shape[2:]:
        raise ValueError(f"expected an image of at least 1x1, got shape {list(x.shape)}")
    return x


def residual_network(num_outputs: int = 10, in_channels: int = 1) -> ResidualNetwork:
    """Return the residual network of TensorFlow's early MNIST examples: twelve bottlenecks, no BatchNorm.

    7x7/2 convolution to 64 channels, ReLU, max-pool 3x3/2, 1x1 to 128; four blocks of three repeats with 128, 256, 512
    and 1024 filters and bottlenecks of 32, 64, 128 and 256, at one resolution; global average; linear without bias.
    A repeat is 1x1, 3x3, 1x1, each with bias and ReLU, and then **adds its input after the last ReLU**. Padding is
    TensorFlow's SAME (an odd row or column goes to the bottom or right), initial values are normal with a deviation of
    0.02, those of convolutions cut at two deviations.

    Args:
        num_outputs: classes. in_channels: of the images.

    Returns:
        A module from floating point [N, in_channels, H, W] (or [N, D * D] for one channel) to logits [N, num_outputs].

    Raises:
        ValueError: for a number below 1.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> rf.residual_network()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return ResidualNetwork(num_outputs, in_channels)
