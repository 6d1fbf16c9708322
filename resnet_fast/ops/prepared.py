"""The ops on constant weights, for frozen graphs: folded and packed once, then called with nothing but the data.

Same results as the ops of the same names, without autograd, autocast, checks or the dispatcher in between.
Packed copies are made at the first call for an input shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends import onednn
from . import _packing
from ._common import check_activation
from .conv_bn_act import reference as _conv_bn_act_reference
from .head import reference as _head_reference
from .head import run as _head_run
from .stem import PADDING, STRIDE
from .stem import reference as _stem_reference
from .stem import run_packed as _stem_run_packed


def choose(name: str, weight: Tensor, groups: int, dtype: torch.dtype, asked: str) -> str:
    """The backend for a constant weight and inputs of ``dtype``; records a fallback where it is not the fastest."""
    device = weight.device
    if device.type != "cpu":
        if asked == "auto" and backends.runs("reference", device.type, asked):
            backends.fallback(name, f"no {device.type} kernel in this version; the plain torch reference runs")
        return "reference"
    if not backends.runs("onednn", device.type, asked):
        return "reference"
    reason = _packing.unsupported(dtype, weight, groups)
    if reason:
        backends.fallback(name, f"{reason}; the plain torch reference runs instead")
        return "reference"
    return "onednn"


class _PreparedConv:
    """A convolution with constant weight: on oneDNN the scale is folded into the weight, elsewhere it stays apart."""

    _name: str

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        self.dtype = dtype
        self.geometry = (list(stride), list(padding), list(dilation), groups)
        self.weight = weight.detach()
        self.scale = scale.detach().clone()
        self.shift = shift.detach().clone()
        self.backend = choose(self._name, self.weight, self.geometry[3], self.dtype, backend)
        self._packed: _packing.PackedConv | None = None
        if self.backend == "onednn":
            self._packed = _packing.PackedConv(self.shift.to(self.dtype), self.weight.shape, *self.geometry)

    def _folded(self) -> Tensor:
        return _packing.fold(self.weight, self.scale, self.dtype)


class ConvBNAct(_PreparedConv):
    """``conv_bn_act`` on a constant weight. ``backend`` names what runs it.

    Args:
        weight, scale, shift: as for the op, in the precision they are to be folded in (float32, or float64).
        dtype: of the inputs and outputs.
        backend: "auto" or a backend's name.
    """

    _name = "conv_bn_act"

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        activation: str = "relu",
        residual_after_activation: bool = False,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        check_activation(self._name, activation)
        self.activation = activation
        self.residual_after_activation = residual_after_activation
        super().__init__(weight, scale, shift, stride, padding, dilation, groups, dtype, backend)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False, finite: bool = False
    ) -> Tensor:
        """The op; with ``overwrite_residual`` the result may be written into ``residual``, with ``finite`` the caller
        vouches that neither NaN nor an overflow can reach the ReLU.
        """
        if self._packed is None or x.numel() == 0:
            return _conv_bn_act_reference(
                x, self.weight, self.scale, self.shift, residual, *self.geometry,
                self.activation, self.residual_after_activation,
            )  # fmt: skip
        return self._packed.run(
            x,
            self._folded,
            residual,
            overwrite_residual=overwrite_residual,
            activation=self.activation,
            residual_after_activation=self.residual_after_activation,
            finite=finite,
        )


class Stem(_PreparedConv):
    """``stem`` on a constant weight, for float images. Arguments as for :class:`ConvBNAct`."""

    _name = "stem"

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        ceil_mode: bool = False,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        self.ceil_mode = ceil_mode
        super().__init__(weight, scale, shift, STRIDE, PADDING, [1, 1], 1, dtype, backend)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None or x.numel() == 0:
            return _stem_reference(x, self.weight, self.scale, self.shift, None, None, self.ceil_mode)
        return _stem_run_packed(self._packed, x, self._folded, self.ceil_mode)


class Head:
    """``head`` on constant weight and bias, rounded once to ``dtype``."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
    ) -> None:
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        # Plain torch is what runs fastest on a CPU, so only a choice of "reference" makes a difference.
        chosen = backends.runs("onednn", "cpu", backend) and self.weight.device.type == "cpu"
        self.backend = "onednn" if chosen and not onednn.unavailable() else "reference"

    def __call__(self, x: Tensor) -> Tensor:
        return (_head_run if self.backend == "onednn" else _head_reference)(x, self.weight, self.bias)
