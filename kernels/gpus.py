"""What a launch choice and a floor need to know of a GPU: its limits, its memory and its matrix units.

Plain data, no import of triton or torch. ``known`` finds a built-in GPU by name, ``GPU(...)`` describes any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

#: How a convolution multiplies: storage type, or for float32 whether the matrix units round to tf32 first.
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: lower case, as the files in ``tuned/`` are called.
        capability: compute capability, major * 10 + minor (90 for Hopper).
        multiprocessors: streaming multiprocessors.
        shared_memory: bytes one thread block may use; ``shared_memory_per_multiprocessor``: for all its blocks.
        l2: bytes of level-2 cache; ``l2_bandwidth``: bytes per second out of it to all multiprocessors, None where no
            figure is at hand, and then nothing counts it.
        bandwidth: bytes per second of device memory.
        flops: operations per second (a multiply-add is two) by precision, without sparsity.
        source: where the figures come from.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int
    shared_memory_per_multiprocessor: int
    l2: int
    bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    source: str = "given"
    registers: int = 65536
    l2_bandwidth: float | None = None

    def rate(self, precision: str) -> float:
        """Return operations per second in a precision; in "int8" the double of float16's if nothing else is known."""
        return self.flops.get(precision) or 2 * self.flops["fp16"]

    def __post_init__(self) -> None:
        missing = [precision for precision in PRECISIONS if self.flops.get(precision, 0) <= 0]
        if missing or self.bandwidth <= 0 or self.multiprocessors < 1:
            raise ValueError(
                f"GPU {self.name!r}: bandwidth, multiprocessors and flops of {', '.join(PRECISIONS)} must be positive"
                + (f"; {', '.join(missing)} is missing" if missing else "")
            )


def _flops(fp16: float, tf32: float, fp32: float, int8: float | None = None) -> Mapping[str, float]:
    """From TFLOP/s; bfloat16 runs at float16's rate on all of them, and int8 at the double of it unless given."""
    rates = {
        "fp16": fp16,
        "bf16": fp16,
        "tf32": tf32,
        "fp32": fp32,
        "int8": 2 * fp16 if int8 is None else int8,
        "fp8": 2 * fp16,
    }
    return MappingProxyType({precision: rate * 1e12 for precision, rate in rates.items()})


_KB, _MB = 1024, 1024 * 1024
_SHEET = "NVIDIA's data sheet, dense rates with float32 accumulation"
_READ = "copy (read + write) and 8192^3 product measured; tf32 at half of it; fp32 from the data sheet"
_L2_HOPPER = 8.5e12
"""Assumed, not measured: a little less than the 5120 bytes a clock that NVIDIA's white paper gives the A100's cache, at
1.755 GHz."""

#: Built-in GPUs. Where a ceiling was measured it stands in place of the data sheet's, and ``source`` says so.
GPUS: tuple[GPU, ...] = (
    GPU("h100", 90, 132, 227 * _KB, 228 * _KB, 50 * _MB, 3.0e12, _flops(798, 399, 66.9), f"SXM: {_READ}",
        l2_bandwidth=_L2_HOPPER),
    GPU("h200", 90, 132, 227 * _KB, 228 * _KB, 60 * _MB, 4.3e12, _flops(788, 394, 66.9), f"SXM: {_READ}, size of L2",
        l2_bandwidth=_L2_HOPPER),
    GPU("a100", 80, 108, 163 * _KB, 164 * _KB, 40 * _MB, 2.039e12, _flops(312, 156, 19.5), f"SXM 80 GB: {_SHEET}"),
    GPU("b200", 100, 148, 227 * _KB, 228 * _KB, 126 * _MB, 8.0e12, _flops(2250, 1125, 75), _SHEET),
    GPU("l4", 89, 58, 99 * _KB, 100 * _KB, 48 * _MB, 300e9, _flops(121, 60.5, 30.3), _SHEET),
    GPU("rtx4090", 89, 128, 99 * _KB, 100 * _KB, 72 * _MB, 1.008e12, _flops(165.2, 82.6, 82.6, 660.6), _SHEET),
    GPU("rtx5090", 120, 170, 99 * _KB, 100 * _KB, 96 * _MB, 1.792e12, _flops(209.5, 104.8, 104.8, 838), _SHEET),
)  # fmt: skip


#: Compute capabilities whose float8 kernels were looked at: Ada's and Hopper's.
FLOAT8_CAPABILITIES = (89, 90)


#: Words that make another chip of a name, or a part of one: fewer multiprocessors, other memory.
_OTHER_CHIPS = {"pcie", "nvl", "d", "ti", "super", "laptop", "max", "mig"}


def normalise(name: str) -> str:
    """Return a driver's or a user's name for a GPU as the tables write it: ``NVIDIA H100 80GB HBM3`` -> ``h100``."""
    words = name.lower().replace("-", " ").replace("geforce", "").replace("nvidia", "").split()
    names = {gpu.name for gpu in GPUS}
    for count in range(1, len(words) + 1):
        # Whole words only: "l40s" and "h100x" are no "l4" and "h100". Memory sizes and form factors may follow.
        if "".join(words[:count]) in names and not _OTHER_CHIPS & set(words[count:]):
            return "".join(words[:count])
    return "_".join(words) or "unknown"


def known(name: str) -> GPU:
    """Return the built-in GPU of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    found = {gpu.name: gpu for gpu in GPUS}.get(normalise(name))
    if found is None:
        raise ValueError(f"unknown GPU {name!r}; built in are {', '.join(gpu.name for gpu in GPUS)}")
    return found


#: Compute capabilities whose thread blocks have as much shared memory as a built-in GPU's of another capability.
_SAME_LIMITS = {86: 89, 87: 80, 103: 100, 121: 120}


def of_capability(capability: int) -> GPU:
    """Return a built-in GPU with the on-chip limits of this compute capability.

    Raises:
        ValueError: none is known; the message lists the capabilities that are.
    """
    wanted = _SAME_LIMITS.get(capability, capability)
    found = next((gpu for gpu in GPUS if gpu.capability == wanted), None)
    if found is None:
        known = sorted({*(gpu.capability for gpu in GPUS), *_SAME_LIMITS})
        raise ValueError(f"capability is {capability}; known are {', '.join(map(str, known))}")
    return replace(found, capability=capability)
