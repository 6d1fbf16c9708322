"""The native module, built from csrc/ where a CUDA compiler was found. Without CUDA it has ``build_info`` only.

Pointers are ints (``tensor.data_ptr()``, 0 for none) and nothing is checked: ``resnet_fast.backends.cuda`` does that.
Every launch goes onto ``stream`` of the current device.

Arguments go by position or by name. ``fields`` are first those of the struct that the line names, which csrc/kernels/
describes, in its order, then the others it names; ``help(_C.stem)`` lists them all.
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
def conv_bn_act_unsupported(kernel: str, *fields: Field, **named: Field) -> str: ...  # ConvBnAct
def conv_bn_act_workspace(kernel: str, *fields: Field, **named: Field) -> int: ...  # ConvBnAct
def conv_bn_act(kernel: str, *fields: Field, **named: Field) -> None: ...  # ConvBnAct, stream
def add_act(x: int, y: int, out: int, count: int, precision: Precision, relu: bool, stream: int) -> None: ...
def add_act_backward(grad: int, output: int, out: int, count: int, precision: Precision, stream: int) -> None: ...
def batch_norm_act_workspace(rows: int, c: int, precision: Precision) -> int: ...
def batch_norm_act_statistics(*fields: Field, **named: Field) -> None: ...  # BatchNormStatistics, stream
def batch_norm_act_apply(*fields: Field, **named: Field) -> None: ...  # BatchNormApply, stream
def batch_norm_act_reduce(*fields: Field, **named: Field) -> None: ...  # BatchNormReduce, stream
def batch_norm_act_backward(*fields: Field, **named: Field) -> None: ...  # BatchNormBackward, stream
def stem_shared_bytes(precision: Precision, c: int, pooled_h: int) -> int: ...
def stem(*fields: Field, **named: Field) -> None: ...  # Stem, stream
def head_workspace(n: int, pixels: int, c: int, k: int, precision: Precision, multiprocessors: int) -> int: ...
def head(*fields: Field, **named: Field) -> None: ...  # Head, multiprocessors, stream
