"""The native module, built from csrc/ where a CUDA compiler was found. Without CUDA it has ``build_info`` only.

Pointers are ints (``tensor.data_ptr()``, 0 for none) and nothing is checked: ``resnet_fast.backends.cuda`` does that.
Every launch goes onto ``stream`` of the current device.

Arguments go by position or by name. ``fields`` are those of the function's struct in csrc/kernels/, in its order; there
each one is described, and ``help(_C.stem)`` lists them.
"""

from typing import Literal, TypedDict

Precision = Literal["fp16", "bf16", "tf32", "fp32"]
Field = int | float | bool | Precision

class BuildInfo(TypedDict):
    interface: int
    compiler: str
    cxx_standard: int
    cuda: str
    archs: list[str]
    emulated: bool

class ConvKernel(TypedDict):
    name: str
    algorithm: Literal["implicit_gemm", "cutlass_conv", "cutlass_gemm"]
    least_capability: int
    most_capability: int
    precision: Precision
    block_m: int
    block_n: int
    block_k: int
    stages: int
    threads: int
    shared_bytes: int

class CudaError(RuntimeError): ...

def build_info() -> BuildInfo: ...
def conv_bn_act_kernels() -> list[ConvKernel]: ...

# Of ConvBnAct; `stream` comes last.
def conv_bn_act_unsupported(kernel: str, *fields: Field, **named: Field) -> str: ...
def conv_bn_act_workspace(kernel: str, *fields: Field, **named: Field) -> int: ...
def conv_bn_act(kernel: str, *fields: Field, **named: Field) -> None: ...

# Of Stem and `stream`; of Head, `multiprocessors` and `stream`.
def stem_shared_bytes(precision: Precision, c: int, pooled_h: int) -> int: ...
def stem(*fields: Field, **named: Field) -> None: ...
def head_workspace(n: int, pixels: int, c: int, k: int, precision: Precision, multiprocessors: int) -> int: ...
def head(*fields: Field, **named: Field) -> None: ...
def add_act(x: int, y: int, out: int, count: int, precision: Precision, relu: bool, stream: int) -> None: ...
def add_act_backward(grad: int, output: int, out: int, count: int, precision: Precision, stream: int) -> None: ...

# Of BatchNormStatistics, BatchNormApply, BatchNormReduce and BatchNormBackward; `stream` comes last.
def batch_norm_act_workspace(rows: int, c: int, precision: Precision) -> int: ...
def batch_norm_act_statistics(*fields: Field, **named: Field) -> None: ...
def batch_norm_act_apply(*fields: Field, **named: Field) -> None: ...
def batch_norm_act_reduce(*fields: Field, **named: Field) -> None: ...
def batch_norm_act_backward(*fields: Field, **named: Field) -> None: ...
