"""The CPU engine: whether resnet_fast._cpu can run here, why not, and its convolutions and plans on torch's tensors.

The module is loaded when somebody asks, and what went wrong is kept. No other file touches it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu_choices
from .cuda import record
from .layouts import channels_last

NAME = "cpu"

_INTERFACE = 5  # of the module's functions, as in csrc/cpu/binding.cpp


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


#: What the engine computes, as it names them; uint8 beside float32, as :class:`Stored` says.
_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_DTYPES = {**_FLOATS, torch.uint8: "uint8"}

#: Instruction sets with kernels for uint8.
_WITH_UINT8 = ("avx512_vnni", "avx512_bf16", "amx")
#: How many products of 255 and 127 are added up in 32 bits.
_MOST_PRODUCTS = (2**31 - 1) // (255 * 127)


def unsupported(dtype: torch.dtype) -> str:
    """Return why the engine cannot compute tensors of this dtype, "" if it can. Includes :func:`unavailable`."""
    if dtype not in _FLOATS:
        return f"the CPU engine computes {' and '.join(_FLOATS.values())}, not {str(dtype).removeprefix('torch.')}"
    return unavailable()


def without_uint8() -> str:
    """Return why the engine has no kernels for uint8 here, "" if it has. Includes :func:`unavailable`."""
    reason = unavailable()
    if not reason and module().isa() not in _WITH_UINT8:
        reason = f"the CPU engine computes uint8 by AVX-512 VNNI, and here runs on {module().isa()}"
    return reason


def unsupported_int8(weight_shape: Sequence[int]) -> str:
    """Return why the engine cannot compute a convolution of uint8 by this int8 weight, "" if it can."""
    products = weight_shape[1] * weight_shape[2] * weight_shape[3]
    if products > _MOST_PRODUCTS:
        return f"the CPU engine adds up at most {_MOST_PRODUCTS} products of uint8, not {products}"
    return without_uint8()


def slower(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> str:
    """Return why oneDNN is left a convolution that the engine could compute, "" if the engine takes less time.

    Args:
        dtype: of the images.
    """
    if module().isa() == "portable":
        return "the engine has no kernels for this processor's vector instructions"
    for each, feature in ((torch.bfloat16, "amx_bf16"), (torch.uint8, "amx_int8")):
        if dtype is each and module().isa() != "amx" and module().features(of_machine=True)[feature]:
            return f"oneDNN multiplies {_DTYPES[dtype]} by AMX, the engine here does not"
    made, read = weight_shape[0] // groups, weight_shape[1]
    if dtype is torch.uint8:
        return "groups of fewer channels than a vector holds" if groups > 1 and made < 16 else ""
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


class NotFiniteError(ArithmeticError):
    """NaN or infinity is there where float32 becomes uint8, which has neither."""


class Stored(NamedTuple):
    """How a convolution's images, outputs and residuals are stored if uint8 is among them.

    uint8 stands for real numbers by a scale and a zero point: ``real = scale * (stored - zero_point)``.

    Attributes:
        out_dtype: of the outputs: uint8 or float32.
        x, out: of images and outputs, if they are uint8.
        residual: of what is added, which is uint8 then; None if nothing is, or float32 to float32.
        weight_scale: float32 [K] for images in uint8, whose weights are integers of at most 127 times this.
        largest: what outputs in uint8 are clipped to.
    """

    out_dtype: torch.dtype
    x: tuple[float, int] = (1.0, 0)
    out: tuple[float, int] = (1.0, 0)
    residual: tuple[float, int] | None = None
    weight_scale: Tensor | None = None
    largest: int = 255


class Convolution:
    """A convolution's folded weight and bias, packed for this machine.

    Args:
        weight: [K, C / groups, R, S]. bias: [K]. Both are read as float32.
        geometry: stride, padding, dilation and groups.
        dtype: of images, and of outputs unless ``stored`` names another: float32, bfloat16 or uint8. Weights are
            rounded to bfloat16 for such images, and for images of float32 and outputs of uint8 on an instruction set
            that multiplies it, as images then are.
        choices: (height, width, algorithm) of images, what computes them if it may; None: what was measured with as
            many threads as torch has now. They hold for as long as the layer does.
        stored: how what is uint8 is stored; None if nothing is.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        dtype: torch.dtype, choices: Sequence[cpu_choices.Choice] | None = None, stored: Stored | None = None,
    ) -> None:  # fmt: skip
        stride, padding, dilation, groups = geometry
        k, c, *kernel = weight.shape
        self.channels, self.dtype, self.out_dtype = c * groups, dtype, dtype
        if choices is None:
            spatial = stored is None and (*kernel, *stride, *dilation, groups) == (3, 3, 1, 1, 1, 1, 1)
            choices = measured(dtype, c, k, padding) if spatial else ()
        weight, bias = (tensor.detach().to(torch.float32).contiguous() for tensor in (weight, bias))
        given: dict[str, Any] = {}
        if stored is not None:
            self.out_dtype = stored.out_dtype
            scale = None if stored.weight_scale is None else stored.weight_scale.detach().contiguous()
            given = {
                "out_dtype": _DTYPES[stored.out_dtype],
                "weight_scale": 0 if scale is None else scale.data_ptr(),
                "x": stored.x,
                "out": stored.out,
                "residual": stored.residual,
                "largest": stored.largest,
            }
        self.residual_dtype = torch.uint8 if stored is not None and stored.residual is not None else self.out_dtype
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
            **given,
        )

    def algorithm(self, h: int, w: int) -> str:
        """Return what computes images of this size: direct, winograd2 or winograd4."""
        return str(self.layer.algorithm(h, w))

    def run(self, x: Tensor, residual: Tensor | None, relu: bool, residual_after_relu: bool) -> Tensor:
        """Return ``act(conv(x) + residual)`` of ``x`` [N, C, H, W] in any strides, channels_last.

        Raises:
            RuntimeError: ``x`` or ``residual`` does not fit. ValueError: ``x`` is smaller than the window, not 4-D, or
                there is no residual where one in uint8 must be, or the other way round.
            NotFiniteError: as its name says.
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
            if residual.dtype is not self.residual_dtype or list(residual.shape) != shape:
                raise RuntimeError(
                    f"the residual must be {_DTYPES[self.residual_dtype]} of {shape}, "
                    f"got {residual.dtype} of {list(residual.shape)}"
                )
            if residual.stride() != (p * q * k, 1, q * k, k):
                residual = channels_last(residual)
        out = torch.empty(shape, dtype=self.out_dtype, device="cpu", memory_format=torch.channels_last)
        if not n and min(p, q) > 0:
            return out  # torch gives no address to an empty tensor, of a residual that there must be
        finite = self.layer.run(
            x.data_ptr(), n, h, w, 0 if residual is None else residual.data_ptr(), out.data_ptr(), relu,
            residual_after_relu, torch.get_num_threads(), residual_dtype=_DTYPES[self.residual_dtype],
        )  # fmt: skip
        if not finite:
            raise NotFiniteError("the convolution gives NaN or infinity, and its outputs are uint8")
        return out


class Network:
    """Layers that run as one call. Values are numbered in the order in which they are made.

    Attributes:
        given: the dtypes of the tensors that :meth:`run` is given.
    """

    def __init__(self) -> None:
        self._plan = module().Plan()
        self._dtypes: dict[int, torch.dtype] = {}
        self.given: list[torch.dtype] = []
        self._outputs: list[tuple[torch.dtype, bool]] = []

    def _made(self, value: int, dtype: torch.dtype) -> int:
        self._dtypes[value] = dtype
        return value

    def input(self, channels: int, dtype: torch.dtype) -> int:
        """Return the value of the next tensor [N, C, H, W] that :meth:`run` is given."""
        self.given.append(dtype)
        return self._made(self._plan.input(channels, _DTYPES[dtype]), dtype)

    def convolution(
        self, x: int, layer: Convolution, residual: int | None, relu: bool, residual_after_relu: bool = False
    ) -> int:
        """Return ``act(conv(x) + residual)``, or with the residual added after the ReLU."""
        made = self._plan.convolution(x, layer.layer, -1 if residual is None else residual, relu, residual_after_relu)
        return self._made(made, layer.out_dtype)

    def max_pool(
        self, x: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
        ceil_mode: bool,
    ) -> int:  # fmt: skip
        """Return torch's max_pool2d."""
        made = self._plan.max_pool(x, list(kernel), list(stride), list(padding), list(dilation), ceil_mode)
        return self._made(made, self._dtypes[x])

    def average(self, x: int) -> int:
        """Return the mean over all pixels, [N, C, 1, 1]."""
        return self._made(self._plan.average(x), self._dtypes[x])

    def add(self, x: int, y: int, relu: bool) -> int:
        """Return ``x + y``, or the ReLU of it."""
        return self._made(self._plan.add(x, y, relu), self._dtypes[x])

    def quantize(self, x: int, stored: tuple[float, int], largest: int) -> int:
        """Return float32 as uint8 of this scale and zero point, at most ``largest``."""
        return self._made(self._plan.quantize(x, stored, largest), torch.uint8)

    def dequantize(self, x: int, stored: tuple[float, int]) -> int:
        """Return uint8 of this scale and zero point as float32."""
        return self._made(self._plan.dequantize(x, stored), torch.float32)

    def output(self, value: int, flat: bool) -> None:
        """Give the value back, ``flat`` as [N, K] rather than [N, K, 1, 1]."""
        self._plan.output(value)
        self._outputs.append((self._dtypes[value], flat))

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for images of the dtypes ``given``, in any strides, channels_last.

        Raises:
            ValueError: an image does not fit.
            NotFiniteError: as its name says.
        """
        given = [(x.data_ptr(), x.shape, x.stride()) for x in inputs]
        outputs = [
            torch.empty(
                shape[:2] if flat else shape,
                dtype=dtype,
                device="cpu",
                memory_format=torch.contiguous_format if flat else torch.channels_last,
            )
            for shape, (dtype, flat) in zip(self._plan.shapes(given), self._outputs, strict=True)
        ]
        if not self._plan.run(given, [output.data_ptr() for output in outputs], torch.get_num_threads()):
            raise NotFiniteError("the network makes NaN or infinity where it goes on in uint8")
        return outputs
