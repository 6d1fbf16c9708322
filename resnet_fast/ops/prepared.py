"""The ops on constant weights, for frozen graphs: folded and packed once, then called with nothing but the data.

Same results as the ops of the same names, without autograd, autocast, checks or the dispatcher in between.
Packed copies are made at the first call for an input shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import onednn
from . import _packing
from ._common import KERNELS, backend_for, check_activation, kernel_vector, kernel_weight, kernels_on
from .bottleneck_tail import run_kernel as _bottleneck_tail_run_kernel
from .conv_bn_act import problem_of as _conv_bn_act_problem_of
from .conv_bn_act import reference as _conv_bn_act_reference
from .conv_bn_act import run_kernel as _conv_bn_act_run_kernel
from .head import problem_of as _head_problem_of
from .head import reference as _head_reference
from .head import run as _head_run
from .head import run_kernel as _head_run_kernel
from .stem import PACKED, PADDING, STRIDE
from .stem import problem_of as _stem_problem_of
from .stem import reference as _stem_reference
from .stem import run_kernel as _stem_run_kernel
from .stem import run_packed as _stem_run_packed


def choose(name: str, weight: Tensor, groups: int, dtype: torch.dtype, asked: str) -> str:
    """The backend for a constant weight and inputs of ``dtype``; records a fallback where it is not the fastest.

    "auto" where each input's shape decides between Triton and CUDA.
    """
    device = weight.device
    if whose := kernels_on(name, device, dtype, asked):
        return whose
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
        elif self.backend in KERNELS:
            self.weight = kernel_weight(self.weight, self.dtype)

    def backend_for(self, x: Tensor, residual: Tensor | None = None) -> str:
        """The name of the backend that runs it on inputs like these, which may be without data."""
        if self.backend not in KERNELS:
            return self.backend
        return backend_for(self._name, self._problem(x, residual), self.weight.device, self.backend)

    def _problem(self, x: Tensor, residual: Tensor | None) -> Any:
        raise NotImplementedError

    def _folded(self) -> tuple[Tensor, bool]:
        return _packing.fold(self.weight, self.scale, self.dtype), True


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

    def _problem(self, x: Tensor, residual: Tensor | None) -> Any:
        return _conv_bn_act_problem_of(x, self.weight, residual, *self.geometry)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False, finite: bool = False
    ) -> Tensor:
        """The op; with ``overwrite_residual`` the result may be written into ``residual``, with ``finite`` the caller
        vouches that neither NaN nor an overflow can reach the ReLU.
        """
        if self._packed is None or x.numel() == 0:
            arguments = (
                x, self.weight, self.scale, self.shift, residual, *self.geometry,
                self.activation, self.residual_after_activation,
            )  # fmt: skip
            if self.backend in KERNELS and torch.compiler.is_compiling():  # which cannot look into a launch
                return torch.ops.resnet_fast.conv_bn_act.default(*arguments)
            y = _conv_bn_act_run_kernel(self.backend, *arguments)
            return _conv_bn_act_reference(*arguments) if y is None else y
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
        self._forms: dict[str, Tensor] = {}

    def _problem(self, x: Tensor, residual: Tensor | None) -> Any:
        return _stem_problem_of(x, self.weight, self.ceil_mode)

    def _form(self, backend: str) -> Tensor:
        """The weight as that backend's kernel reads it."""
        if backend not in self._forms:
            self._forms[backend] = PACKED[backend](self.weight, self.dtype)
        return self._forms[backend]

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None and x.numel():
            return _stem_run_packed(self._packed, x, self._folded, self.ceil_mode)
        arguments = (x, self.weight, self.scale, self.shift, None, None, self.ceil_mode)
        if self.backend in KERNELS and torch.compiler.is_compiling():
            return torch.ops.resnet_fast.stem.default(*arguments)
        y = _stem_run_kernel(self.backend, *arguments, self._form)
        return _stem_reference(*arguments) if y is None else y


class Head:
    """``head`` on constant weight and bias, rounded once to ``dtype``."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
    ) -> None:
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.backend = kernels_on("head", self.weight.device, dtype, backend)
        if self.backend in ("cuda", "auto") and self.bias is not None:
            self.bias = kernel_vector(self.bias)  # as CUDA's kernel reads it; Triton's reads any type
        if not self.backend:
            # Plain torch is what runs fastest on a CPU, so only a choice of "reference" makes a difference.
            chosen = self.weight.device.type == "cpu" and backends.runs("onednn", "cpu", backend)
            self.backend = "onednn" if chosen and not onednn.unavailable() else "reference"

    def backend_for(self, x: Tensor) -> str:
        """The name of the backend that runs it on inputs like this, which may be without data."""
        if self.backend not in KERNELS:
            return self.backend
        return backend_for("head", _head_problem_of(x, self.weight), self.weight.device, self.backend)

    def __call__(self, x: Tensor) -> Tensor:
        if self.backend in KERNELS and torch.compiler.is_compiling():
            return torch.ops.resnet_fast.head.default(x, self.weight, self.bias)
        y = _head_run_kernel(self.backend, x, self.weight, self.bias)
        if y is not None:
            return y
        return (_head_run if self.backend == "onednn" else _head_reference)(x, self.weight, self.bias)


class BottleneckTail:
    """``bottleneck_tail`` on constant weights: the arguments of the op that are no data, as for :class:`ConvBNAct`.

    Where its kernel does not run its convolutions run one after the other; ``backend`` names what runs them.
    """

    def __init__(
        self,
        weight2: Tensor,
        scale2: Tensor,
        shift2: Tensor,
        weight3: Tensor,
        scale3: Tensor,
        shift3: Tensor,
        weight_shortcut: Tensor | None = None,
        scale_shortcut: Tensor | None = None,
        shift_shortcut: Tensor | None = None,
        weight1: Tensor | None = None,
        scale1: Tensor | None = None,
        shift1: Tensor | None = None,
        *,
        stride: Sequence[int] = (1, 1),
        shortcut_stride: Sequence[int] = (1, 1),
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        def conv(weight: Tensor, scale: Tensor | None, shift: Tensor | None, **options: Any) -> ConvBNAct:
            assert scale is not None and shift is not None
            return ConvBNAct(weight, scale, shift, dtype=dtype, backend=backend, **options)

        self._spatial = conv(weight2, scale2, shift2, stride=stride, padding=(1, 1))
        self._expand = conv(weight3, scale3, shift3)
        self._project = self._following = None
        if weight_shortcut is not None:
            self._project = conv(
                weight_shortcut, scale_shortcut, shift_shortcut, stride=shortcut_stride, activation="none"
            )
        if weight1 is not None:
            self._following = conv(weight1, scale1, shift1)
        self.backend = self._spatial.backend
        self._stride, self._shortcut_stride = list(stride), list(shortcut_stride)

    def backend_for(self, a: Tensor, residual: Tensor) -> str:
        """The name of the backend that runs it: Triton where either may, since CUDA has no kernel of it."""
        return "triton" if self.backend == "auto" else self.backend

    def __call__(self, a: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, following) where ``weight1`` was given."""
        if self.backend in KERNELS and a.numel() and not torch.compiler.is_compiling():

            def constants(conv: ConvBNAct | None) -> tuple[Any, Any, Any]:
                return (None, None, None) if conv is None else (conv.weight, conv.scale, conv.shift)

            results = _bottleneck_tail_run_kernel(
                self.backend, a, *constants(self._spatial), *constants(self._expand), residual,
                *constants(self._project), *constants(self._following), self._stride, self._shortcut_stride,
            )  # fmt: skip
            if results is not None:
                return results[0] if self._following is None else results
        b = self._spatial(a)
        if self._project is None:
            y = self._expand(b, residual)
        else:  # the projected shortcut is nobody else's
            y = self._expand(b, self._project(residual), overwrite_residual=True)
        return y if self._following is None else (y, self._following(y))
