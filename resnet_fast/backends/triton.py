"""Triton: whether its kernels can run here, what they know of the GPU, and how float32 is to be multiplied.

It imports neither triton nor a kernel, so that asking costs nothing. The ops hold the calls of the kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels import _tables, gpus

NAME = "triton"
_OLDEST = (3, 6)

#: The dtypes that kernels compute, as problems name them if nothing is multiplied; :func:`precision` is for products.
PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

_assumed: gpus.GPU | None = None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors too (``TRITON_INTERPRET=1``, set before the first use)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def missing() -> str:
    """Return why there is no usable triton, or "" if there is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (the extra 'triton' of resnet_fast)"
    version = importlib.metadata.version("triton")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST:
        return f"triton is {version}, and the kernels need {'.'.join(map(str, _OLDEST))} or newer"
    return ""


@functools.cache
def _no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    return ""


def unavailable() -> str:
    """Return why the Triton kernels cannot be used in this process, or "" if they can."""
    return missing() or ("" if interpreted() else _no_gpu())


def unsupported(dtype: torch.dtype, device: torch.device) -> str:
    """Return why tensors of this dtype on this device cannot be computed by the kernels, or ""."""
    if dtype not in PRECISIONS:
        return f"the Triton kernels compute float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    capability = gpu_of(device).capability
    if capability < 80:
        return f"the Triton kernels need compute capability 8.0, this GPU has {capability // 10}.{capability % 10}"
    return ""


def without_float8(device: torch.device) -> str:
    """Return why the kernels multiply no float8 on this device, or "" if they do."""
    capability = gpu_of(device).capability
    if capability not in gpus.FLOAT8_CAPABILITIES:
        return f"float8 needs compute capability 8.9 or 9.0, this GPU has {capability // 10}.{capability % 10}"
    return ""


def precision(dtype: torch.dtype, product: str = "conv") -> str:
    """Return how the kernels multiply: "fp16", "bf16", and for float32 "tf32" or "fp32", whichever torch is set to.

    Args:
        product: "conv" follows ``torch.backends.cudnn.conv.fp32_precision`` (and ``cudnn.allow_tf32``), "matmul"
            ``torch.backends.cuda.matmul.fp32_precision`` (and ``torch.set_float32_matmul_precision``).
    """
    if dtype is not torch.float32:
        return PRECISIONS[dtype]
    setting: Any = torch.backends.cudnn.conv if product == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if setting.fp32_precision == "tf32" else "fp32"


def gpu_of(device: torch.device) -> gpus.GPU:
    """Return the GPU that launches on ``device`` are chosen for: the one given to :func:`assume`, else itself.

    An H100 for CPU tensors, which only the interpreter computes.
    """
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return gpus.known("h100")
    return _described(torch.cuda.current_device() if device.index is None else device.index)


def described() -> dict[str, str]:
    """Return which measured choices the launches on each GPU here are looked up in, by the name of the GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [gpu_of(torch.device("cuda", index)) for index in range(count)]
    return {gpu.name: _tables.described(gpu.name) for gpu in ([_assumed] if _assumed is not None else found)}


@contextmanager
def assume(gpu: gpus.GPU) -> Iterator[None]:
    """Choose launches as for this GPU, whatever computes them: for the interpreter, and for tests."""
    global _assumed
    before, _assumed = _assumed, gpu
    try:
        yield
    finally:
        _assumed = before


#: Multiply-adds in float16 per multiprocessor and clock, dense, by capability: for GPUs that no table describes.
_RATES = {80: 1024, 86: 512, 87: 512, 89: 512, 90: 2048, 100: 4096, 103: 4096, 120: 512}


@functools.cache
def _described(index: int) -> gpus.GPU:
    properties = torch.cuda.get_device_properties(index)
    name = gpus.normalise(properties.name)
    for gpu in gpus.GPUS:
        if gpu.name == name and gpu.multiprocessors == properties.multi_processor_count:
            return gpu
    capability = properties.major * 10 + properties.minor
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    memory_clock = getattr(properties, "memory_clock_rate", 0) * 1e3
    bandwidth = 2 * memory_clock * getattr(properties, "memory_bus_width", 0) / 8 or 1e12
    fp16 = 2 * _RATES.get(capability, 512) * properties.multi_processor_count * clock
    fp32 = 2 * 128 * properties.multi_processor_count * clock
    per_multiprocessor = properties.shared_memory_per_multiprocessor
    return gpus.GPU(
        name=name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", per_multiprocessor - 1024),
        shared_memory_per_multiprocessor=per_multiprocessor,
        l2=properties.L2_cache_size,
        bandwidth=bandwidth,
        flops=MappingProxyType({"fp16": fp16, "bf16": fp16, "tf32": fp16 / 2, "fp32": fp32}),
        source="the driver's clocks and widths, times what its generation does per clock",
    )


_NOWHERE = nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside go to ``device`` and its current stream."""
    if device.type != "cuda":
        return _NOWHERE
    return torch.cuda.device(device)


class Refused(RuntimeError):
    """A launch that the compiler or the driver refused, so that nothing of it ran; the message names the launch."""


#: What the driver says of a launch that it has not made. Other errors may be of an earlier one, whose result is wrong.
_REFUSALS = (
    "invalid argument",
    "too many resources requested for launch",
    "no kernel image is available for execution on the device",
    "device kernel image is invalid",
    "a PTX JIT compilation failed",
    "the provided PTX was compiled with an unsupported toolchain",
    "operation not supported",
    "cluster misconfiguration",
)

_refused: dict[tuple[str, Any, torch.device], str] = {}
_REFUSED_KEPT = 1000


def _refusal(error: Exception) -> str:
    """Return the words of an error that means that a launch was refused, "" of any other."""
    from triton import TritonError

    text = str(error).strip()
    lines = text.splitlines() or [type(error).__name__]
    if isinstance(error, TritonError) or "PassManager::run failed" in text:
        return f"{type(error).__name__}: {lines[-1].strip()}"
    if isinstance(error, RuntimeError) and lines[0].startswith("Triton Error [CUDA]: "):
        words = lines[0].removeprefix("Triton Error [CUDA]: ")
        if words.removeprefix("Failed to create tensor map descriptor: ").startswith(_REFUSALS):
            return words
    return ""


def refused(op: str, problem: Any, device: torch.device) -> bool:
    """Return whether the launch for a problem was refused before."""
    return bool(_refused) and (op, problem, device) in _refused


def run(op: str, problem: Any, device: torch.device, launches: Callable[[], None]) -> None:
    """Make an op's launches for a problem on ``device`` and its current stream.

    Raises:
        Refused: the compiler or the driver will not have one of them. What was refused once is not tried again.
    """
    key = op, problem, device
    if refused(*key):
        raise Refused(_refused[key])
    try:
        with on(device):
            launches()
    except Exception as error:
        reason = _refusal(error)
        if not reason:
            raise
        name = problem.key() if hasattr(problem, "key") else problem
        if len(_refused) >= _REFUSED_KEPT:
            _refused.clear()
        _refused[key] = f"the Triton kernel for {name} cannot be launched ({reason})"
        raise Refused(_refused[key]) from error


def launch(op: str, problem: Any, device: torch.device, *arguments: Any, function: str = "launch", **form: Any) -> None:
    """Run an op's kernel as it is chosen for the problem.

    Args:
        arguments, form: what the kernel's ``launch`` takes before and after the problem and the choice.
        function: of the kernel's module.

    Raises:
        Refused: as :func:`run`.
    """
    kernels = _module(op)
    config = kernels.choose(problem, gpu_of(device))
    key = op, function, problem, config, device, tuple([each is None for each in arguments]), *form.items()
    ready = _ready.get(key)

    def launches() -> None:
        if ready and ready(arguments):
            return
        made = getattr(kernels, function)(*arguments, problem, config, **form)
        made()
        if ready is None and not interpreted():
            _remember(key, made, arguments)

    run(op, problem, device, launches)


#: Of launches made before: what makes them again for less, False if nothing can.
_ready: dict[Any, Any] = {}
_READY_KEPT = 4096


def _remember(key: Any, made: Any, arguments: tuple[Any, ...]) -> None:
    """Keep what makes a launch again; not if a tensor is given twice or not aligned, which others need not be."""
    tensors = [each for each in arguments if each is not None]
    if all(isinstance(each, Tensor) for each in tensors):
        if len({id(each) for each in tensors}) < len(tensors) or not _module("_launch").aligned(*tensors):
            return
        found = _module("_launch").Ready.of(made, arguments)
    else:
        found = None
    if len(_ready) >= _READY_KEPT:
        _ready.clear()
    _ready[key] = found or False


@functools.cache
def _module(op: str) -> Any:
    return importlib.import_module(f"resnet_fast.kernels.{op}")
