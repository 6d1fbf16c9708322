"""The CPU engine: whether resnet_fast._cpu can run here, why not, and its convolutions and plans on torch's tensors.

The module is loaded when somebody asks, and what went wrong is kept. No other file touches it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu_choices
from .cuda import record
from .layouts import channels_last

NAME = "cpu"

_INTERFACE = 3  # of the module's functions, as in csrc/cpu/binding.cpp


@functools.cache
def _loaded() -> tuple[Any, str]:
    """Return the installed module and "", or None and why there is none."""
    if importlib.util.find_spec("resnet_fast._cpu") is None:
        return None, f"resnet_fast._cpu is not built: {_why_not_built()}"
    try:
        module = importlib.import_module("resnet_fast._cpu")
        if module.build_info().get("interface") != _INTERFACE:
            return None, "resnet_fast._cpu was built from an older or newer csrc/ than this; build it again"
        module.isa()
    except ValueError as error:  # of RESNET_FAST_ISA
        return None, str(error)
    except Exception as error:  # whatever keeps a shared library from loading; kept, and shown by info()
        return None, f"resnet_fast._cpu does not load: {type(error).__name__}: {error}"
    return module, ""


def _why_not_built() -> str:
    found = record().get("cpu")
    if not isinstance(found, dict):
        return "this copy was not installed by setup.py (pip install -e ., or make engine)"
    if found.get("built"):
        return "it was, but for another Python, or the file is gone (install again)"
    return str(found.get("reason") or "the build gave no reason")


def load_error() -> str:
    """Why there is no module, "" if there is one: a compiler's message may have several lines."""
    return _loaded()[1]


def unavailable() -> str:
    """Return why the engine cannot be used in this process, or "" if it can."""
    return load_error().partition("\n")[0]


def module() -> Any:
    """Return ``resnet_fast._cpu``.

    Raises:
        RuntimeError: there is none that loads.
    """
    found, reason = _loaded()
    if found is None:
        raise RuntimeError(reason)
    return found


@functools.cache
def machine() -> str:
    """Return how tables of measured choices name this machine."""
    found = caches()
    return cpu_choices.machine(module().processor(), found["l2"], found["l3"])


def caches() -> dict[str, int]:
    """Return the bytes of a core's caches, ``l1d``, ``l2`` and ``l3``, and how many threads share the last."""
    found: dict[str, int] = module().caches()
    return found


def described() -> dict[str, Any]:
    """Return the engine as ``resnet_fast.info()`` shows it.

    ``built``: whether there is a module that loads; ``reason``: why not, in full. If built: ``isa``, the instruction
    set that runs; ``best_isa``, the highest that this machine runs, which ``RESNET_FAST_ISA`` may have ruled out;
    ``isas`` in the build; ``compiler``; ``sanitizer``, "" for none; ``threads``, which are torch's; ``table``, the file
    of measured choices in use, or "" and ``table_reason``, why there is none.
    """
    found, reason = _loaded()
    if found is None:
        return {"built": False, "reason": reason}
    info, isa, threads = found.build_info(), found.isa(), torch.get_num_threads()
    table, reason = cpu_choices.described(isa, threads, machine())
    return {
        "built": True,
        "reason": "",
        "isa": isa,
        "best_isa": found.choose_isa(found.features(of_machine=True)),
        "isas": list(info["isas"]),
        "compiler": info["compiler"],
        "sanitizer": info["sanitizer"],
        "threads": threads,
        "table": table,
        "table_reason": reason,
    }


#: What the engine computes, as it names them.
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def unsupported(dtype: torch.dtype) -> str:
    """Return why the engine cannot compute tensors of this dtype, "" if it can. Includes :func:`unavailable`."""
    if dtype not in _DTYPES:
        return f"the CPU engine computes {' and '.join(_DTYPES.values())}, not {str(dtype).removeprefix('torch.')}"
    return unavailable()


def slower(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> str:
    """Return why oneDNN is left a convolution that the engine could compute, "" if the engine takes less time."""
    if module().isa() == "portable":
        return "the engine has no kernels for this processor's vector instructions"
    if dtype is torch.bfloat16 and module().features()["amx_bf16"]:
        return "oneDNN multiplies bfloat16 by AMX, the engine does not"
    made, read = weight_shape[0] // groups, weight_shape[1]
    if groups > 1 and made < 16 and not (made == read and made in (1, 2, 4, 8)):
        return "narrow groups of unequal or odd numbers of channels"
    if groups > 1 and made == read == 1 and weight_shape[2] * weight_shape[3] > 25:
        return "depthwise, by a window larger than 5x5"
    return ""


def problem(dtype: torch.dtype, c: int, k: int, padding: Sequence[int]) -> cpu_choices.Layer:
    """Return a 3x3 convolution of stride 1 as the tables name it, here and with torch's number of threads."""
    isa, threads = module().isa(), torch.get_num_threads()
    return cpu_choices.Layer(isa, _DTYPES[dtype], threads, c, k, (padding[0], padding[1]))


def measured(dtype: torch.dtype, c: int, k: int, padding: Sequence[int]) -> Sequence[cpu_choices.Choice]:
    """Return what the table of this machine, if there is one, says of such a convolution."""
    return cpu_choices.choices(problem(dtype, c, k, padding), machine())


class Convolution:
    """A convolution's folded weight and bias, packed for this machine.

    Args:
        weight: [K, C / groups, R, S]. bias: [K]. Both are read as float32.
        geometry: stride, padding, dilation and groups.
        dtype: of images and outputs, float32 or bfloat16; weights are rounded to it.
        choices: (height, width, algorithm) of images, what computes them if it may; None: what was measured with as
            many threads as torch has now. They hold for as long as the layer does.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        dtype: torch.dtype, choices: Sequence[cpu_choices.Choice] | None = None,
    ) -> None:  # fmt: skip
        stride, padding, dilation, groups = geometry
        k, c, *kernel = weight.shape
        self.channels, self.dtype = c * groups, dtype
        if choices is None:
            spatial = (*kernel, *stride, *dilation, groups) == (3, 3, 1, 1, 1, 1, 1)
            choices = measured(dtype, c, k, padding) if spatial else ()
        weight, bias = (tensor.detach().to(torch.float32).contiguous() for tensor in (weight, bias))
        self.layer = module().Convolution(
            weight.data_ptr(),
            bias.data_ptr(),
            k,
            c * groups,
            groups,
            kernel,
            list(stride),
            list(padding),
            list(dilation),
            _DTYPES[dtype],
            choices,
        )

    def algorithm(self, h: int, w: int) -> str:
        """Return what computes images of this size: direct, winograd2 or winograd4."""
        return str(self.layer.algorithm(h, w))

    def run(self, x: Tensor, residual: Tensor | None, relu: bool, residual_after_relu: bool) -> Tensor:
        """Return ``act(conv(x) + residual)`` of ``x`` [N, C, H, W] in any strides, channels_last.

        Raises:
            RuntimeError: ``x`` or ``residual`` does not fit. ValueError: ``x`` is smaller than the window, or not 4-D.
        """
        n, c, h, w = x.shape
        dtype = self.dtype
        if c != self.channels or x.dtype is not dtype:
            raise RuntimeError(
                f"the convolution takes {_DTYPES[dtype]} images of {self.channels} channels, "
                f"got {x.dtype} of {list(x.shape)}"
            )
        if x.stride() != (h * w * c, 1, w * c, c):
            x = channels_last(x)
        _, k, p, q = shape = self.layer.shape(n, h, w)
        if residual is not None:
            if residual.dtype is not dtype or list(residual.shape) != shape:
                raise RuntimeError(
                    f"the residual must be {_DTYPES[dtype]} of {shape}, got {residual.dtype} of {list(residual.shape)}"
                )
            if residual.stride() != (p * q * k, 1, q * k, k):
                residual = channels_last(residual)
        out = torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
        self.layer.run(
            x.data_ptr(), n, h, w, 0 if residual is None else residual.data_ptr(), out.data_ptr(), relu,
            residual_after_relu, torch.get_num_threads(),
        )  # fmt: skip
        return out


class Network:
    """Layers that run as one call. Values are numbered in the order in which they are made.

    Args:
        dtype: of all values and of the convolutions, float32 or bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._plan = module().Plan(_DTYPES[dtype])
        self._flat: list[bool] = []

    def input(self, channels: int) -> int:
        """Return the value of the next tensor [N, C, H, W] that :meth:`run` is given."""
        return int(self._plan.input(channels))

    def convolution(
        self, x: int, layer: Convolution, residual: int | None, relu: bool, residual_after_relu: bool = False
    ) -> int:
        """Return ``act(conv(x) + residual)``, or with the residual added after the ReLU."""
        return int(
            self._plan.convolution(x, layer.layer, -1 if residual is None else residual, relu, residual_after_relu)
        )

    def max_pool(
        self, x: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
        ceil_mode: bool,
    ) -> int:  # fmt: skip
        """Return torch's max_pool2d."""
        return int(self._plan.max_pool(x, list(kernel), list(stride), list(padding), list(dilation), ceil_mode))

    def average(self, x: int) -> int:
        """Return the mean over all pixels, [N, C, 1, 1]."""
        return int(self._plan.average(x))

    def add(self, x: int, y: int, relu: bool) -> int:
        """Return ``x + y``, or the ReLU of it."""
        return int(self._plan.add(x, y, relu))

    def output(self, value: int, flat: bool) -> None:
        """Give the value back, ``flat`` as [N, K] rather than [N, K, 1, 1]."""
        self._plan.output(value)
        self._flat.append(flat)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for images of the dtype, in any strides, channels_last.

        Raises:
            ValueError: an image does not fit.
        """
        given = [(x.data_ptr(), x.shape, x.stride()) for x in inputs]
        outputs = [
            torch.empty(
                shape[:2] if flat else shape,
                dtype=self.dtype,
                device="cpu",
                memory_format=torch.contiguous_format if flat else torch.channels_last,
            )
            for shape, flat in zip(self._plan.shapes(given), self._flat, strict=True)
        ]
        self._plan.run(given, [output.data_ptr() for output in outputs], torch.get_num_threads())
        return outputs
