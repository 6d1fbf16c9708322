"""Small models as their authors write them, with the Python that public code has in its forward."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.networks import Lambda, conv_bn


@dataclasses.dataclass
class Output:
    """What many libraries return in place of a tuple."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


def block(channels: int = 3, out: int = 8) -> nn.Sequential:
    return nn.Sequential(conv_bn(channels, out), nn.ReLU(inplace=True), conv_bn(out, out), nn.ReLU(inplace=True))


class Flags(nn.Module):
    """Options with defaults, and checks of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = block(), nn.Linear(8, 5)

    def forward(self, x: Tensor, softmax: bool = False, labels: Tensor | None = None) -> Any:
        assert x.shape[1] == 3, "RGB"
        if x.dim() == 3:
            x = x.unsqueeze(0)
        y = self.fc(self.body(x).mean((2, 3)))
        if labels is not None:
            return F.cross_entropy(y, labels)
        return y.softmax(1) if softmax else y


class Registry(nn.Module):
    """Layers chosen by isinstance and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if not isinstance(layer, nn.ReLU) else F.relu(layer(x), inplace=True)
        return x


class Branching(nn.Module):
    """A branch that the size decides."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) if x.shape[-1] > 64 else self.small(x)


class ByValue(nn.Module):
    """A branch that the values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = block(), block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.tail(y) if y.mean() > 0 else y


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1).expand_as(x)


def _upsampled(self: Any, x: Tensor) -> Tensor:
    low = self.low(F.max_pool2d(x, 2))
    return self.out(torch.cat([F.interpolate(low, size=x.shape[-2:], mode="bilinear"), x], 1))


def _counted(self: Any, x: Tensor) -> Tensor:
    y = self.body(x)
    for _ in range(x.shape[0] // x.shape[0] + 1):
        y = y + self.again(y)
    return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "flags": Flags,
    "registry": Registry,
    "branch_on_size": Branching,
    "branch_on_value": ByValue,
    "squeeze_excite": lambda: nn.Sequential(block(), SqueezeExcite(8)),
    "dict": lambda: Lambda(lambda self, x: {"a": (y := self.a(x)), "b": [self.b(y), y]}, a=block(), b=block(8, 8)),
    "ordered": lambda: Lambda(lambda self, x: collections.OrderedDict(z=self.a(x), a=x), a=block()),
    "dataclass": lambda: Lambda(lambda self, x: Output((y := self.a(x)).mean((2, 3)), (y, x)), a=block()),
    "namedtuple": lambda: Lambda(lambda self, x: Pair(self.a(x).mean(), x.relu()), a=block()),
    "unet": lambda: Lambda(_upsampled, low=block(), out=block(11)),
    "in_place": lambda: Lambda(lambda self, x: self.a(x).add_(1).mul_(2).clamp_(max=3), a=block()),
    "in_place_view": lambda: Lambda(lambda self, x: _written(self.a(x)), a=block()),
    "chunks": lambda: Lambda(lambda self, x: torch.cat([c.relu() for c in self.a(x).chunk(2, 1)][::-1], 1), a=block()),
    "loop_over_images": lambda: Lambda(lambda self, x: torch.stack([self.a(i[None])[0] for i in x]), a=block()),
    "normalised": lambda: Lambda(lambda self, x: self.a((x - x.new_tensor([0.4] * 3).view(3, 1, 1)) / 0.2), a=block()),
    "checkpoint": lambda: Lambda(lambda self, x: checkpoint(self.a, x, use_reentrant=False), a=block()),
    "shared": lambda: Lambda(lambda self, x: self.a(self.a(self.b(x))), a=block(8, 8), b=block()),
    "siamese": lambda: Lambda(lambda self, x: (self.a(x) - self.a(x.flip(3))).abs(), a=block()),
    "flip_test": lambda: Lambda(lambda self, x: (self.a(x) + self.a(x.flip(-1)).flip(-1)) / 2, a=block()),
    "activations": lambda: nn.Sequential(
        conv_bn(3, 8), nn.SiLU(), conv_bn(8, 8), nn.Hardswish(), conv_bn(8), nn.GELU()
    ),
    "grouped_shuffle": lambda: nn.Sequential(block(), nn.ChannelShuffle(2), conv_bn(8, 8, groups=2)),
    "transposed": lambda: nn.Sequential(block(), nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU()),
    "attention": lambda: Lambda(_attended, a=block(), b=nn.MultiheadAttention(8, 2, batch_first=True)),
    "counted": lambda: Lambda(_counted, body=block(), again=block(8, 8)),
    "autocast": lambda: Lambda(_under_autocast, a=block(), b=block(8, 8)),
    "weight_standardised": lambda: Lambda(_standardised, a=nn.Conv2d(3, 8, 3), b=nn.BatchNorm2d(8)),
    "lambda_in_sequential": lambda: nn.Sequential(block(), Lambda(lambda self, x: x[:, :, ::2, ::2]), conv_bn(8)),
    "asserted": lambda: Lambda(lambda self, x: _asserted(self, x), a=nn.Conv2d(3, 8, 3), b=nn.BatchNorm2d(8)),
    "padded": lambda: Lambda(lambda self, x: self.a(F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16))), a=block()),
}


def _written(y: Tensor) -> Tensor:
    y[:, ::2] = 0
    return y.relu()


def _attended(self: Any, x: Tensor) -> Tensor:
    y = self.a(F.avg_pool2d(x, 8)).flatten(2).transpose(1, 2)
    return y + self.b(y, y, y, need_weights=False)[0]


def _under_autocast(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.b(y)


def _standardised(self: Any, x: Tensor) -> Tensor:
    w = self.a.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return self.b(F.conv2d(x, w, self.a.bias)).relu()


def _asserted(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    torch._assert(y.ndim == 4, "an image")
    return F.relu(self.b(y))
