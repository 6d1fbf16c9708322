"""Folded and packed weights for the CPU: built once, found again by the weight's storage, dropped with it.

Live modules must see every change of their parameters at the next forward, so a cached copy counts only while the
weight's version counter, a sample of its values, and all of scale and shift are what they were when it was built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..backends import onednn
from ._common import channels_last

_SHAPES_KEPT = 256
_SAMPLES = 64


def fold(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * scale`` per output channel, computed in float32 or wider and rounded once to ``dtype``."""
    return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)).to(dtype)


@dataclass(eq=False)
class PackedConv:
    """A convolution with its scale folded in, run by oneDNN; packed copies per input shape, shared where alike.

    ``bias`` is the shift [K], in the inputs' dtype as oneDNN wants it. It holds no plain weight: whoever calls passes a
    function that makes it, used when an input shape comes for the first time.
    """

    bias: Tensor
    weight_shape: torch.Size
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    _by_shape: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _by_layout: dict[tuple[str, bytes], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        channels, *kernel = self.weight_shape[1:]
        # 1x1, stride 1: a plain matrix product over pixels, which oneDNN runs a little faster than the convolution.
        self._is_product = (kernel, self.stride, self.padding, self.groups) == ([1, 1], [1, 1], [0, 0], 1)
        # oneDNN multiplies bfloat16 channels in pairs. With an odd count the last pair reaches into the next pixel,
        # times 0: harmless for numbers, but there a NaN or infinity spreads. A channel of zeros keeps pixels apart.
        self._pads = self.bias.dtype is torch.bfloat16 and channels % 2 == 1 and self.groups == 1

    def _input(self, x: Tensor) -> Tensor:
        """``x`` in the bias' dtype, dense and channels_last, with a channel of zeros behind an odd bfloat16 count."""
        if not self._pads:
            return channels_last(x.to(self.bias.dtype))
        n, c, h, w = x.shape
        padded = torch.empty(
            (n, c + 1, h, w), dtype=self.bias.dtype, device=x.device, memory_format=torch.channels_last
        )
        padded[:, :c] = x
        padded[:, c:] = 0
        return padded

    def _weight(self, folded: Callable[[], Tensor]) -> Tensor:
        return torch.nn.functional.pad(folded(), (0, 0, 0, 0, 0, 1)) if self._pads else folded()

    def _packed(self, key: tuple[int, ...], pack: Callable[[], Tensor]) -> Tensor:
        packed = self._by_shape.get(key)
        if packed is None:
            packed = pack()
            name = "linear" if len(key) == 1 else "conv"
            packed = self._by_layout.setdefault((name, onednn.layout(packed)), packed)
            if len(self._by_shape) >= _SHAPES_KEPT:
                self._by_shape.clear()
            self._by_shape[key] = packed
        return packed

    def run(
        self,
        x: Tensor,
        folded: Callable[[], Tensor],
        residual: Tensor | None = None,
        *,
        overwrite_residual: bool = False,
        activation: str = "none",
        residual_after_activation: bool = False,
        finite: bool = False,
    ) -> Tensor:
        """The op; ``finite``: the caller knows that no NaN can reach the ReLU."""
        x = self._input(x)
        residual = None if residual is None else channels_last(residual)
        relu = activation == "relu"
        late = residual if residual_after_activation else None
        early = None if residual_after_activation else residual
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        post_op = relu and finite
        if early is None and self._is_product:
            rows = x.shape[0] * x.shape[2] * x.shape[3]
            packed = self._packed((rows,), lambda: onednn.pack_linear(self._weight(folded).flatten(1), rows))
            y = onednn.linear(x.permute(0, 2, 3, 1), packed, self.bias, relu=post_op).permute(0, 3, 1, 2)
        else:
            size = list(x.shape)
            packed = self._packed(tuple(size), lambda: onednn.pack_conv(self._weight(folded), *geometry, size))
            if early is None:
                y = onednn.conv(x, packed, self.bias, *geometry, relu=post_op)
            elif overwrite_residual:
                y = onednn.conv_sum_(early, x, packed, self.bias, *geometry, relu=post_op)
            else:
                y = onednn.conv_sum(x, early, packed, self.bias, *geometry, relu=post_op)
        if relu and not post_op:
            y.relu_()
        if late is not None:
            y += late
        return y


@dataclass
class _Entry:
    version: tuple[int, int]
    sample: Tensor
    scale: Tensor
    shift: Tensor
    conv: PackedConv


_lock = threading.Lock()
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    """Fused optimizers change parameters without touching their version counters."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)
_storages: dict[int, tuple[StorageWeakRef, dict[tuple[object, ...], _Entry]]] = {}


def _sample(weight: Tensor) -> Tensor:
    """Up to 64 values spread over a dense weight: catches edits through ``.data``, which leave the version as it is."""
    step = max(1, weight.numel() // _SAMPLES)
    return weight.as_strided((min(_SAMPLES, weight.numel()),), (step,))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """torch.equal, except that NaN equals itself."""
    if torch.equal(a, b):
        return True
    integer = torch.int64 if a.dtype is torch.float64 else torch.int32 if a.dtype is torch.float32 else torch.int16
    return torch.equal(a.view(integer), b.view(integer))


def unsupported(dtype: torch.dtype, weight: Tensor, groups: int) -> str:
    """Why this convolution cannot run packed, or "" if it can."""
    depthwise = weight.shape[1] == 1 and weight.shape[0] == groups
    if dtype is torch.bfloat16 and groups > 1 and weight.shape[1] % 2 and not depthwise:
        return f"oneDNN mixes pixels for bfloat16 groups of an odd number of channels ({weight.shape[1]})"
    return onednn.unsupported(dtype)


def packed_conv(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> PackedConv:
    """The packed form of weight, scale and shift for inputs of ``dtype``; cached while none of the three changes."""

    def build() -> PackedConv:
        return PackedConv(
            bias=shift.to(dtype, copy=True),
            weight_shape=weight.shape,
            stride=list(stride),
            padding=list(padding),
            dilation=list(dilation),
            groups=groups,
        )

    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if weight.is_inference() or not dense:
        return build()  # no version counter to watch, or no cheap sample: pack at every call rather than be stale
    version = (weight._version, _optimizer_steps)
    storage = weight.untyped_storage()
    key = (
        weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, dtype,
        tuple(stride), tuple(padding), tuple(dilation), groups,
    )  # fmt: skip
    with _lock:
        found = _storages.get(storage._cdata)
    entry = found[1].get(key) if found is not None else None
    if (
        entry is not None
        and entry.version == version
        and _same_bits(entry.scale, scale)
        and _same_bits(entry.shift, shift)
        and _same_bits(entry.sample, _sample(weight))
    ):
        return entry.conv
    entry = _Entry(version, _sample(weight).clone(), scale.clone(), shift.clone(), build())
    with _lock:
        for address in [a for a, (reference, _) in _storages.items() if reference.expired()]:
            del _storages[address]
        _storages.setdefault(storage._cdata, (StorageWeakRef(storage), {}))[1][key] = entry
    return entry.conv
