"""The native module, built from csrc/ where a CUDA compiler was found. Without CUDA it has ``build_info`` only.

Pointers are ints (``tensor.data_ptr()``, 0 for none) and nothing is checked: ``resnet_fast.backends.cuda`` does that.
Every launch goes onto ``stream`` of the current device.
"""

from typing import Literal, TypedDict

Precision = Literal["fp16", "bf16", "tf32", "fp32"]

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
def conv_bn_act_unsupported(
    kernel: str,
    x: int,
    weight: int,
    scale: int,
    shift: int,
    residual: int,
    out: int,
    n: int,
    h: int,
    w: int,
    c: int,
    k: int,
    r: int,
    s: int,
    p: int,
    q: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    precision: Precision,
    relu: bool,
    residual_after_activation: bool,
    workspace: int,
) -> str: ...
def conv_bn_act_workspace(
    kernel: str,
    x: int,
    weight: int,
    scale: int,
    shift: int,
    residual: int,
    out: int,
    n: int,
    h: int,
    w: int,
    c: int,
    k: int,
    r: int,
    s: int,
    p: int,
    q: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    precision: Precision,
    relu: bool,
    residual_after_activation: bool,
    workspace: int,
) -> int: ...
def conv_bn_act(
    kernel: str,
    x: int,
    weight: int,
    scale: int,
    shift: int,
    residual: int,
    out: int,
    n: int,
    h: int,
    w: int,
    c: int,
    k: int,
    r: int,
    s: int,
    p: int,
    q: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    precision: Precision,
    relu: bool,
    residual_after_activation: bool,
    workspace: int,
    stream: int,
) -> None: ...
def add_act(
    x: int,
    y: int,
    out: int,
    count: int,
    precision: Precision,
    relu: bool,
    stream: int,
) -> None: ...
def add_act_backward(
    grad: int,
    output: int,
    out: int,
    count: int,
    precision: Precision,
    stream: int,
) -> None: ...
def batch_norm_act_workspace(rows: int, c: int, precision: Precision) -> int: ...
def batch_norm_act_statistics(
    x: int,
    mean: int,
    invstd: int,
    running_mean: int,
    running_var: int,
    rows: int,
    c: int,
    eps: float,
    momentum: float,
    precision: Precision,
    workspace: int,
    stream: int,
) -> None: ...
def batch_norm_act_apply(
    x: int,
    mean: int,
    invstd: int,
    gamma: int,
    beta: int,
    residual: int,
    out: int,
    rows: int,
    c: int,
    relu: bool,
    precision: Precision,
    stream: int,
) -> None: ...
def batch_norm_act_reduce(
    grad: int,
    x: int,
    output: int,
    mean: int,
    invstd: int,
    sum_grad: int,
    sum_grad_xhat: int,
    rows: int,
    c: int,
    precision: Precision,
    workspace: int,
    stream: int,
) -> None: ...
def batch_norm_act_backward(
    grad: int,
    x: int,
    output: int,
    mean: int,
    invstd: int,
    gamma: int,
    sum_grad: int,
    sum_grad_xhat: int,
    grad_x: int,
    grad_residual: int,
    rows: int,
    c: int,
    precision: Precision,
    stream: int,
) -> None: ...
def stem_shared_bytes(precision: Precision, c: int, pooled_h: int) -> int: ...
def stem(
    x: int,
    stride_n: int,
    stride_c: int,
    stride_h: int,
    stride_w: int,
    bytes: bool,
    normalisation: int,
    weight: int,
    scale: int,
    shift: int,
    out: int,
    n: int,
    c: int,
    h: int,
    w: int,
    k: int,
    conv_h: int,
    conv_w: int,
    pooled_h: int,
    pooled_w: int,
    ceil_mode: bool,
    precision: Precision,
    stream: int,
) -> None: ...
def head_workspace(
    n: int,
    pixels: int,
    c: int,
    k: int,
    precision: Precision,
    multiprocessors: int,
) -> int: ...
def head(
    x: int,
    weight: int,
    bias: int,
    out: int,
    n: int,
    pixels: int,
    c: int,
    k: int,
    precision: Precision,
    workspace: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
