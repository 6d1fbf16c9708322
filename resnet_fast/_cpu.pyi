"""The CPU engine, built from csrc/cpu/ where a C++20 compiler was found.

Pointers are ints (``tensor.data_ptr()``, 0 for none) and nothing is checked: ``resnet_fast.backends.cpu`` does that.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Isa = Literal["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]

class BuildInfo(TypedDict):
    interface: int
    compiler: str
    cxx_standard: int
    isas: list[Isa]
    sanitizer: str

class Features(TypedDict):
    avx2: bool
    fma: bool
    f16c: bool
    avx_vnni: bool
    avx512: bool
    avx512_bf16: bool
    avx512_vnni: bool
    amx_bf16: bool
    amx_int8: bool

class Caches(TypedDict):
    l1d: int
    l2: int
    l3: int
    l3_threads: int

def build_info() -> BuildInfo: ...
def features(of_machine: bool = False) -> Features: ...
def isa() -> Isa: ...
def choose_isa(features: Mapping[str, bool], wanted: str = "") -> Isa: ...
def caches() -> Caches: ...
def processor() -> str: ...

#: Address, shape [N, C, H, W] and strides of a tensor.
Given = tuple[int, Sequence[int], Sequence[int]]
#: Scale and zero point.
Stored = tuple[float, int]

class Convolution:
    def __init__(
        self,
        weight: int,
        bias: int,
        k: int,
        c: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        dtype: str = "float32",
        choices: Sequence[tuple[int, int, str]] = (),
        out_dtype: str = "",
        weight_scale: int = 0,
        x: Stored = (1, 0),
        out: Stored = (1, 0),
        residual: Stored | None = None,
        largest: int = 255,
    ) -> None: ...
    def run(
        self,
        x: int,
        n: int,
        h: int,
        w: int,
        residual: int,
        out: int,
        relu: bool,
        residual_after_relu: bool,
        threads: int,
        algorithm: str = "auto",
        residual_dtype: str = "",
    ) -> bool: ...
    def shape(self, n: int, h: int, w: int) -> list[int]: ...
    def algorithm(self, h: int, w: int) -> str: ...
    @property
    def bytes(self) -> int: ...

class Plan:
    def __init__(self, near: int = 0) -> None: ...
    def input(self, channels: int, dtype: str = "float32") -> int: ...
    def convolution(
        self,
        x: int,
        layer: Convolution,
        residual: int,
        relu: bool,
        residual_after_relu: bool,
        algorithm: str = "auto",
    ) -> int: ...
    def max_pool(
        self,
        x: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> int: ...
    def average(self, x: int) -> int: ...
    def add(self, a: int, b: int, relu: bool) -> int: ...
    def quantize(self, x: int, stored: Stored, largest: int) -> int: ...
    def dequantize(self, x: int, stored: Stored) -> int: ...
    def output(self, value: int) -> None: ...
    def shapes(self, inputs: Sequence[Given]) -> list[list[int]]: ...
    def run(self, inputs: Sequence[Given], outputs: Sequence[int], threads: int, piece: int = 0) -> bool: ...
    def profile(self, inputs: Sequence[Given], outputs: Sequence[int], threads: int) -> list[float]: ...
    def algorithms(self, inputs: Sequence[Given], threads: int) -> list[str]: ...
    @property
    def arena_bytes(self) -> int: ...
