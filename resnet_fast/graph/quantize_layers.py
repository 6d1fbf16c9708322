"""The modules of a quantized graph: uint8 tensors between convolutions, and the way in and out of them.

Between :class:`Quantize` and :class:`Dequantize` runs one of two things, told by the tensor's dtype: uint8 through the
CPU engine, oneDNN or a GPU's kernels, or float32 that holds the same rounded values. The second, the definition, runs
where the first cannot: for who writes the ops down, and for what uint8 cannot hold, NaN. A convolution that nothing
here computes in int8 goes through its definition by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import backends
from resnet_fast._dtypes import FLOAT8, LARGEST_FLOAT8, narrowed
from resnet_fast.backends import cpu, cuda, onednn_int8, triton
from resnet_fast.backends.onednn import Window
from resnet_fast.backends.onednn_int8 import Affine
from resnet_fast.backends.packing import Layouts
from resnet_fast.nn.pristine import capturing
from resnet_fast.ops._op import Bound, readable, unmoded
from resnet_fast.ops.conv_fp8 import OP as CONV_FP8
from resnet_fast.ops.conv_fp8 import OUTPUTS as FLOAT8_OUTPUTS
from resnet_fast.ops.conv_int8 import MOST_PRODUCTS, OUTPUTS
from resnet_fast.ops.conv_int8 import OP as CONV_INT8

from .guard import TooLarge, in_float, unread

#: The CPU engine as a report names it where it computes int8.
ENGINE = "cpu int8"
#: Likewise Triton's kernels.
TRITON, TRITON_FLOAT8 = "triton int8", "triton float8"
#: The largest stored value, and the largest if products of 8 bits saturate (see onednn_int8.saturates).
LARGEST, LARGEST_REDUCED = 255, 127


def storage(largest: int) -> torch.dtype:
    """Return the dtype of stored values by the largest of them, which only float8's is 448."""
    return FLOAT8 if largest == LARGEST_FLOAT8 else torch.uint8


def is_stored(x: Tensor) -> bool:
    """Return whether a tensor holds stored values, not real ones."""
    return x.dtype in (torch.uint8, FLOAT8)


class Quantized(nn.Module):
    """What the modules here share.

    Attributes:
        layer: the name of the author's layer that it computes, "" if it computes none.
        exported: whether the definition runs, in ops that exporters know as quantization.
        dtype: of what is floating point on either side: float32, or half precision on a GPU.
    """

    dtype = torch.float32

    def __init__(self, layer: str = "") -> None:
        super().__init__()
        self.training = False
        self.layer, self.exported = layer, False
        self._affines: dict[str, Affine] = {}  # as Python's numbers

    def _store(self, name: str, affine: Affine) -> None:
        """Keep an affine as two buffers, so that a state_dict has it."""
        self.register_buffer(f"{name}_scale", torch.tensor(affine.scale, dtype=torch.float32))
        self.register_buffer(f"{name}_zero_point", torch.tensor(affine.zero_point, dtype=torch.int64))

    def affine(self, name: str) -> Affine | None:
        """Return how "x", "out" or "residual" is stored, None for float32."""
        if name not in self._affines and f"{name}_scale" in self._buffers:
            scale, zero_point = self._buffers[f"{name}_scale"], self._buffers[f"{name}_zero_point"]
            assert scale is not None and zero_point is not None
            if scale.is_meta:  # of which only sizes are asked
                return Affine(1.0, 0)
            self._affines[name] = Affine(float(scale), int(zero_point))
        return self._affines.get(name)

    def export(self) -> None:
        """Compute by the definition from now on, in ops that exporters know as quantization."""
        for name in ("x", "out", "residual"):
            self.affine(name)
        self.exported = True

    def _apply(self, fn: Any, recurse: bool = True) -> Quantized:
        self._changed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._changed()
        super()._load_from_state_dict(*args)

    def _changed(self) -> None:
        """Other constants: what was made of them is void."""
        self._affines.clear()


class _Converter(Quantized):
    def __init__(self, affine: Affine, largest: int) -> None:
        super().__init__()
        self.largest = largest
        self._store("x", affine)

    @property
    def stored_as(self) -> Affine:
        found = self.affine("x")
        assert found is not None
        return found

    def extra_repr(self) -> str:
        scale, zero_point = self.stored_as
        return f"scale={scale:.6g}, zero_point={zero_point}, largest={self.largest}"


class Quantize(_Converter):
    """From floating point to uint8 ``clamp(round(x / scale) + zero_point, 0, largest)``, channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        if self.exported or capturing() or torch.compiler.is_compiling() or in_float() or not integers(x):
            return fake(x, self.stored_as, self.largest, self.exported)
        if x.numel():  # uint8 has no NaN: the batch runs again by the definition, which lets it through
            finite, kept = x.sum(dtype=torch.float32 if x.dtype in _HALVES else None).isfinite(), unread()
            if kept is not None:
                kept.append(finite)
            elif not bool(finite):
                raise TooLarge
        return stored(x, self.stored_as, self.largest)

    def plain(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        """For shapes."""
        return x.to(storage(self.largest))


class Dequantize(_Converter):
    """From uint8 to floating point."""

    def forward(self, x: Tensor) -> Tensor:
        return _narrowed(real(x, self.stored_as), self.dtype)

    def plain(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        """For shapes."""
        return x.to(self.dtype)


class MaxPool(Quantized):
    """``torch.max_pool2d`` of stored values, whose order is that of the real ones."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, layer: str = "") -> None:
        super().__init__(layer)
        self.window = kernel, stride, padding, dilation, ceil

    def forward(self, x: Tensor) -> Tensor:
        if not is_stored(x):
            return torch.max_pool2d(x, *self.window)
        if x.dtype is FLOAT8:  # which torch does not pool
            return torch.max_pool2d(x.half(), *self.window).to(FLOAT8)
        return onednn_int8.max_pool(x, *self.window)

    def plain(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        """For shapes."""
        return torch.max_pool2d(x.float(), *self.window).to(x.dtype)


def on_gpu(device: torch.device) -> bool:
    """Return whether a GPU's kernels compute what is on this device; the interpreter's if somebody chose it."""
    return device.type == "cuda" or backends.current() == triton.NAME


def without_kernel(weight_shape: Sequence[int], groups: int, device: torch.device) -> str:
    """Return why no GPU's kernel computes a convolution of uint8 by this int8 weight there, "" if one does."""
    if backends.current() == cuda.NAME:
        return "there is no CUDA kernel of int8 convolutions, only Triton's"
    if not on_gpu(device):
        return "this snapshot was quantized for a GPU, and is on the CPU: quantize again here"
    if groups > 1:
        return "the Triton kernel of int8 convolutions has no groups"
    products = weight_shape[1] * weight_shape[2] * weight_shape[3]
    if products > MOST_PRODUCTS:
        return f"sums of {products} products of uint8 and int8 may not fit in 32 bits"
    return triton.unavailable() or triton.unsupported(torch.float16, device)


def without_float8(groups: int, device: torch.device) -> str:
    """Return why no kernel computes a convolution of float8 there, "" if one does."""
    if not on_gpu(device):
        return f"float8 is computed on GPUs only, and the model is on {device}"
    if backends.current() == cuda.NAME:
        return "there is no CUDA kernel of float8 convolutions, only Triton's"
    if groups > 1:
        return "the Triton kernel of float8 convolutions has no groups"
    return triton.unavailable() or triton.unsupported(torch.float16, device) or triton.without_float8(device)


def computed_by(weight_shape: Sequence[int], groups: int) -> str:
    """Return what is to compute a convolution of uint8 by such an int8 weight here: ``ENGINE`` or oneDNN's name."""
    chosen = backends.current()
    if chosen == "onednn" or cpu.unsupported_int8(weight_shape):
        return onednn_int8.NAME
    left = chosen != cpu.NAME and cpu.slower(torch.uint8, weight_shape, groups) and not onednn_int8.unavailable()
    return onednn_int8.NAME if left else ENGINE


def incapable(backend: str, largest: int) -> str:
    """Return why that backend computes no int8 here with stored values up to ``largest``, "" if it does."""
    if backend == ENGINE:
        return cpu.without_uint8()
    reason = onednn_int8.unavailable()
    if not reason and largest > LARGEST_REDUCED and onednn_int8.saturates():
        reason = "this snapshot uses 8 bits of activations, and here sums of two products saturate: quantize again here"
    return reason


class Convolution(Quantized):
    """A convolution of uint8 with an int8 weight, or of float8 with a float8 one, with all behind it.

    Args:
        weight: float [K, C/groups, R, S], the batch norm folded in. bias: float [K].
        window: padding, stride, dilation, groups.
        x: how the input is stored. out: how the output is, None for float32.
        residual: how what is added is stored, None for float32.
        relu: "" for none, "last" behind the addition, "first" in front of it, which takes float32 on both sides.

    Attributes:
        overwrites: whether the residual's memory may be written over.
    """

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor,
        window: Window,
        x: Affine,
        out: Affine | None,
        residual: Affine | None,
        relu: str,
        largest: int,
    ) -> None:
        super().__init__(layer)
        self.float8 = storage(largest) is FLOAT8
        scale = per_channel(weight, largest if self.float8 else 127)
        steps = weight / scale.double().view(-1, 1, 1, 1)
        self.register_buffer(
            "weight", narrowed(steps, FLOAT8) if self.float8 else steps.round().clamp(-127, 127).char()
        )
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias.float())
        for name, way in (("x", x), ("out", out), ("residual", residual)):
            if way is not None:
                self._store(name, way)
        self.window, self.relu, self.largest = window, relu, largest
        self.overwrites = False
        self._backend = ""
        self._packed: tuple[onednn_int8.Constants, Layouts] | None = None
        self._layers: dict[Affine | None, cpu.Convolution] = {}
        self._bound: dict[tuple[Affine | None, bool], Bound[Any]] = {}

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    @property
    def backend(self) -> str:
        """The name of what computes it in 8 bits; decided at the first use."""
        if self.float8:
            return TRITON_FLOAT8
        if not self._backend:
            gpu = on_gpu(self.weight.device) or self.dtype in _HALVES
            self._backend = TRITON if gpu else computed_by(self.weight.shape, self.window[3])
        return self._backend

    @property
    def incapable(self) -> str:
        """Why the backend does not compute it here, "" if it does."""
        if self.float8:
            return without_float8(self.window[3], self.weight.device)
        if self.backend == TRITON:
            return without_kernel(self.weight.shape, self.window[3], self.weight.device)
        return incapable(self.backend, self.largest)

    def bound(self, residual: Affine | None, added: bool) -> Bound[Any]:
        """Return the op on this layer's constants, made at the first use.

        Args:
            residual: how what is added is stored, None for floating point. added: whether something is.
        """
        key = residual, added
        if key not in self._bound:
            x, out = self.affine("x"), self.affine("out")
            assert x is not None
            if residual and residual.zero_point and added and self.relu == "first":
                raise RuntimeError("conv_int8: a residual with a zero point is added behind the ReLU")
            (padding, stride, dilation, _), largest = self.window, torch.finfo(torch.float32).max
            step = 1.0 if out is None else out.scale
            scale = self.weight_scale.double() * (x.scale / step)
            shift = (self.bias.double() - (residual.scale * residual.zero_point if residual else 0.0)) / step
            names = {dtype: name for name, dtype in (FLOAT8_OUTPUTS if self.float8 else OUTPUTS).items()}
            zero_points = {"zero_point": x.zero_point, "out_zero_point": out.zero_point if out else 0}
            constants: dict[str, Any] = {
                "weight": self.weight, "scale": scale.clamp(max=largest).float(),
                "shift": shift.clamp(-largest, largest).float(),
                "out": names[self.dtype if out is None else storage(self.largest)],
                **({} if self.float8 else {**zero_points, "largest": self.largest}),
                "residual_scale": residual.scale / step if residual else 1.0, "stride": stride, "padding": padding,
                "dilation": dilation, "activation": "relu" if self.relu else "none",
                "residual_after_activation": self.relu == "first" and added,
            }  # fmt: skip
            self._bound[key] = (CONV_FP8 if self.float8 else CONV_INT8).bind(**constants)
        return self._bound[key]

    def engine(self, residual: Affine | None) -> cpu.Convolution:
        """Return the engine's layer, made at the first use.

        Args:
            residual: how what is added is stored; None if nothing is, or float32.
        """
        if residual not in self._layers:
            padding, stride, dilation, groups = self.window
            x, out = self.affine("x"), self.affine("out")
            assert x is not None
            dtype = torch.float32 if out is None else torch.uint8
            stored = cpu.Stored(dtype, x, out or (1.0, 0), residual, self.weight_scale, self.largest)
            geometry = stride, padding, dilation, groups
            self._layers[residual] = cpu.Convolution(self.weight, self.bias, geometry, torch.uint8, (), stored)
        return self._layers[residual]

    def prepare(self, shape: tuple[int, ...]) -> tuple[Tensor, onednn_int8.Constants]:
        """Return the weight packed by oneDNN for inputs of this shape, and the rest; made at the first use."""
        if self._packed is None:
            x = self.affine("x")
            assert x is not None
            self._packed = onednn_int8.constants(self.weight_scale, self.bias, x, self.window), Layouts()
        constants, layouts = self._packed
        weight = layouts.by_shape.get(shape)
        if weight is None:
            weight = layouts.add(shape, onednn_int8.pack(self.weight, constants, shape))
        return weight, constants

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_stored(x):
            return self.defined(x, residual)
        out, relu = self.affine("out"), bool(self.relu)
        reason = self.incapable
        if reason:
            backends.fallback(
                "quantize", f"{'float8' if self.float8 else 'int8'} is computed in float32, slowly: {reason}"
            )
            added = None if residual is None else real(residual, self.affine("residual"))
            y = self.defined(real(x, self.affine("x")), added)
            return y if out is None else stored(y, out, self.largest)
        if self.backend in (TRITON, TRITON_FLOAT8):
            found: Tensor = self.bound(self.affine("residual"), residual is not None)(x, residual)
            return found
        if self.backend == ENGINE:
            layer = self.engine(None if residual is None else self.affine("residual"))
            return layer.run(x, residual, relu, self.relu == "first" and residual is not None)
        packed = self.prepare(tuple(x.shape))
        if residual is None:
            return self._limited(onednn_int8.conv(x, *packed, out, relu=relu))
        if self.relu == "first":
            return onednn_int8.conv(x, *packed, None, relu=True).add_(residual)
        # What is not owned is copied; NCHW images of a layer that is not ours become channels_last.
        dense = residual.is_contiguous(memory_format=torch.channels_last)
        own = residual if self.overwrites and dense else residual.clone(memory_format=torch.channels_last)
        return self._limited(onednn_int8.conv_sum_(own, self.affine("residual"), x, *packed, out, relu=relu))

    def _limited(self, y: Tensor) -> Tensor:
        """Clip to 7 bits what the next convolution reads, if that is the range: oneDNN itself clips to 8."""
        return y.clamp_(max=self.largest) if self.largest < LARGEST and not y.is_floating_point() else y

    def defined(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the same of float32 tensors that hold rounded values."""
        padding, stride, dilation, groups = self.window
        if self.exported and not self.float8:
            zero = torch.zeros_like(self.weight_scale, dtype=torch.int32)
            weight = self.weight.float() * self.weight_scale.view(-1, 1, 1, 1)
            weight = torch.fake_quantize_per_channel_affine(weight, self.weight_scale, zero, 0, -128, 127)
        else:
            weight = self.weight.to(x.dtype) * self.weight_scale.view(-1, 1, 1, 1)
        y = torch.conv2d(x, weight, self.bias, stride, padding, dilation, groups)
        if self.relu and (residual is None or self.relu == "first"):
            y = torch.relu(y)
        if residual is not None:
            y = y + residual
            y = torch.relu(y) if self.relu == "last" else y
        out = self.affine("out")
        return _narrowed(y, self.dtype) if out is None else fake(y, out, self.largest, self.exported)

    def plain(self, state: dict[str, Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """For shapes."""
        padding, stride, dilation, groups = self.window
        y = torch.conv2d(x.float(), state["weight"].float(), None, stride, padding, dilation, groups)
        return y.to(storage(self.largest)) if "out_scale" in self._buffers else y.to(self.dtype)

    def _changed(self) -> None:
        super()._changed()
        self._backend, self._packed, self._layers, self._bound = "", None, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backend": "", "_packed": None, "_layers": {}, "_bound": {}}

    def extra_repr(self) -> str:
        padding, stride, dilation, groups = self.window
        shape = "x".join(map(str, self.weight.shape))
        kinds = ("float8" if self.float8 else "int8") + ("" if "out_scale" in self._buffers else " -> float32")
        parts = f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, relu={self.relu!r}"
        return f"{shape}, {kinds}, {parts}"


def per_channel(weight: Tensor, stored_as: float = 127) -> Tensor:
    """Return float32 scales [K] so that each channel's largest magnitude is stored as that; 1 for channels of zeros."""
    largest = weight.detach().double().abs().flatten(1).amax(1)
    return torch.where(largest > 0, (largest / stored_as).clamp_min(_SMALLEST), torch.ones_like(largest)).float()


#: Of a scale: its inverse and its products with others stay normal numbers of float32.
_SMALLEST = 1e-18


def affine_of(low: float, high: float, largest: int) -> Affine:
    """Return how values from ``low`` to ``high`` are stored in 0 to ``largest``; 0 itself is always exact.

    Padding is 0, and so is what a ReLU closes: neither may be rounded. float8 has a sign, and no zero point.
    """
    if storage(largest) is FLOAT8:
        scale = max(-low, high) / largest
        return Affine(float(torch.tensor(max(scale, _SMALLEST), dtype=torch.float32)))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor(max((high - low) / largest, _SMALLEST), dtype=torch.float32))
    return Affine(scale, min(largest, max(0, round(-low / scale))))


_HALVES = (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    """Return half precision as float32, in which all here is computed."""
    return x.float() if x.dtype in _HALVES else x


def _narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what was computed in float32 as the half precision around it, if it is that."""
    return y.to(dtype) if dtype in _HALVES else y


def stored(x: Tensor, affine: Affine, largest: int) -> Tensor:
    """Return floating point as uint8 or float8, channels_last."""
    zero, y = affine.zero_point, _wide(x) * (1.0 / affine.scale)
    if storage(largest) is FLOAT8:
        y = narrowed(y, FLOAT8)
    else:
        y = y.round_().clamp_(-zero, largest - zero)
        y = (y.add_(zero) if zero else y).to(torch.uint8)
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


def real(x: Tensor, affine: Affine | None) -> Tensor:
    """Return uint8 or float8 as float32; float32 is the real value already."""
    if affine is None or not is_stored(x):
        return x
    y = x.float()
    return (y.sub_(affine.zero_point) if affine.zero_point else y).mul_(affine.scale)


def fake(x: Tensor, affine: Affine, largest: int, exported: bool = False) -> Tensor:
    """Return float32 rounded to what uint8 or float8 can hold; NaN and infinity stay, except in exports."""
    x, zero = _wide(x), affine.zero_point
    if storage(largest) is FLOAT8:
        return torch.where(x.isfinite(), narrowed(x * (1.0 / affine.scale), FLOAT8).float() * affine.scale, x)
    if exported:
        return torch.fake_quantize_per_tensor_affine(x, affine.scale, zero, 0, largest)
    y = (x * (1.0 / affine.scale)).round().clamp(-zero, largest - zero) * affine.scale
    return torch.where(x.isfinite(), y, x)


def integers(*tensors: Tensor) -> bool:
    """Return whether what goes on from these tensors may be computed in integers."""
    memory = readable(tensors) or all(x.is_cuda and type(x) is Tensor for x in tensors)
    usual = all(x.dtype in (torch.float32, torch.uint8, FLOAT8, *_HALVES) for x in tensors) and memory and unmoded()
    return usual and backends.current() != "reference"
