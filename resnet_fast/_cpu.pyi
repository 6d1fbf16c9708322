"""The CPU engine, built from csrc/cpu/ where a C++20 compiler was found.

Pointers are ints (``tensor.data_ptr()``, 0 for none) and nothing is checked: ``resnet_fast.backends.cpu`` does that.
"""

from collections.abc import Mapping
from typing import Literal, TypedDict

Isa = Literal["portable", "avx2", "avx512"]

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
