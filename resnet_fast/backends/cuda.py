"""CUDA C++: whether resnet_fast._C can run here, which of its kernels computes a problem, and its launches on tensors.

The module is loaded when somebody asks, and what went wrong is kept. Arguments are checked by the ops, not here. Where
kernels run is torch's choice: the tensors' device and its current stream.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast.kernels import _tables, cuda_choice

from . import triton
from .triton import PRECISIONS

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

NAME = "cuda"

#: What the module's functions are called with if nothing is known to be less aligned.
ALIGNED = 128

_STEM_CHANNELS = 4
_INTERFACE = 1  # of the module's functions, as in csrc/binding.cpp
_MOST = 2**31 - 1

#: The ops that have CUDA kernels and are chosen here.
OPS = ("conv_bn_act", "stem", "head", "add_act", "batch_norm_act")


class Native:
    """A loaded ``_C``: the module, what it was built for and its convolution kernels.

    Attributes:
        emulated: whether its launches run on the CPU, on CPU tensors: the tests' build.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.info: dict[str, Any] = dict(module.build_info())
        self.emulated = bool(self.info.get("emulated"))
        listed = module.conv_bn_act_kernels() if hasattr(module, "conv_bn_act_kernels") else []
        self.kernels = tuple(cuda_choice.Kernel(**entry) for entry in listed)


_substituted: Native | None = None


@contextmanager
def substitute(module: Any) -> Iterator[None]:
    """Use this module in place of ``resnet_fast._C``: one whose launches run on the CPU, for tests.

    While it is in force CPU tensors are accepted if the module is emulated, and CUDA tensors otherwise.
    """
    global _substituted
    before, _substituted = _substituted, Native(module)
    try:
        yield
    finally:
        _substituted = before


def record() -> dict[str, Any]:
    """Return what the last build of this installation left behind, empty where there was none.

    ``built``, ``reason`` (why not), ``archs``, ``ptx``, ``cuda`` (the compiler's version), ``sm90``, ``seconds``;
    ``cpu``, what became of the CPU engine.
    """
    try:
        found = json.loads(Path(__file__).parents[1].joinpath("_build_record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def _loaded() -> tuple[Native | None, str]:
    """Return the installed module, or why there is none."""
    if importlib.util.find_spec("resnet_fast._C") is None:
        return None, f"resnet_fast._C is not built: {_why_not_built()}"
    try:
        module = importlib.import_module("resnet_fast._C")
        if module.build_info().get("interface") != _INTERFACE:
            return None, "resnet_fast._C was built from an older or newer csrc/ than this; build it again"
        native = Native(module)
    except Exception as error:  # whatever keeps a shared library from loading; kept, and shown by info()
        return None, f"resnet_fast._C does not load: {type(error).__name__}: {error}"
    if not native.info.get("cuda"):
        return None, "resnet_fast._C was built without CUDA: no CUDA compiler was found"
    return native, ""


def _why_not_built() -> str:
    found = record()
    if "built" not in found:
        return "this copy was not installed by setup.py (pip install -e ., or make native)"
    if found.get("built"):
        return "it was, but for another Python, or the file is gone (install again)"
    return str(found.get("reason") or "the build gave no reason")


def native() -> Native | None:
    """Return the module in force; None if there is none that loads."""
    return _substituted if _substituted is not None else _loaded()[0]


def load_error() -> str:
    """Why there is no module, "" if there is one. For its first line the build record says why it was not built."""
    return "" if _substituted is not None else _loaded()[1]


def described() -> dict[str, Any]:
    """Return the native module as ``resnet_fast.info()`` shows it.

    ``built``: whether there is one that loads; ``reason``: why not, in full. If built: ``archs``, ``cuda`` (the
    compiler's version), ``convolutions`` (how many kernels), ``cutlass`` (how many of those are made with CUTLASS, for
    Hopper), ``emulated``; ``sm90`` (which of these the build was asked for), ``ptx`` and ``seconds``, where the build
    left its record.
    """
    found, built_as = native(), {} if _substituted is not None else record()
    if found is None:
        return {"built": False, "reason": load_error()}
    kept: dict[str, Any] = {
        name: built_as[name] for name in ("sm90", "ptx", "seconds") if built_as.get("built") and name in built_as
    }
    return {
        "built": True,
        "reason": "",
        "archs": list(found.info["archs"]),
        "cuda": str(found.info["cuda"]),
        "convolutions": len(found.kernels),
        "cutlass": sum(each.algorithm.startswith("cutlass") for each in found.kernels),
        "emulated": found.emulated,
        **kept,
    }


def emulated() -> bool:
    """Return whether launches run on the CPU, because a test put such a module in place."""
    return _substituted is not None and _substituted.emulated


@functools.cache
def _no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return "" if torch.version.hip is None else "the kernels are written for NVIDIA GPUs"


def unavailable(initialize: bool = False) -> str:
    """Return why the CUDA kernels cannot be used in this process, or "" if they can.

    Whether there is code for the GPU is looked at where CUDA is initialized already, since doing so in a process that
    computes on the CPU would keep it from forking; with ``initialize`` always.
    """
    if _substituted is not None:
        return "" if _substituted.emulated else _no_gpu()
    reason = _loaded()[1].partition("\n")[0] or _no_gpu()
    if reason or not (initialize or torch.cuda.is_initialized()):
        return reason
    # Of several GPUs one is enough; where a tensor lies `unsupported` looks at.
    reasons = [_no_code(index) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else reasons[0]


@functools.cache
def _no_code(index: int) -> str:
    """Return why nothing that was built runs on this GPU, or ""."""
    found = native()
    assert found is not None
    capability = torch.cuda.get_device_capability(index)
    return "" if built_for(found.info["archs"], *capability) else _not_built_for(found.info["archs"], *capability)


def _not_built_for(archs: list[str], major: int, minor: int) -> str:
    return f"resnet_fast._C was built for {', '.join(archs)}, this GPU is {major}.{minor}"


def built_for(archs: list[str], major: int, minor: int) -> bool:
    """Return whether code for these architectures ("80", "90a") runs on a GPU of this compute capability.

    Machine code runs on later minors of its major; with an "a" on its own capability alone. The lowest one, its "a" cut
    off, is in the module as PTX too, which the driver compiles for whatever is newer.
    """
    capability = 10 * major + minor
    plain = [int(arch) for arch in archs if arch.isdigit()]
    exact = [arch for arch in archs if arch.endswith("a") and arch[:-1] == str(capability)]
    same_major = [arch for arch in plain if arch // 10 == major and arch <= capability]
    lowest = min((int(arch.rstrip("af")) for arch in archs), default=capability + 1)
    return bool(exact or same_major or lowest <= capability)


def unsupported(dtype: torch.dtype, device: torch.device) -> str:
    """Return why tensors of this dtype on this device cannot be computed by the kernels, or ""."""
    if dtype not in PRECISIONS:
        return f"the CUDA kernels compute float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    wanted = "cpu" if emulated() else "cuda"
    if device.type != wanted:
        return f"the CUDA kernels run on {wanted} tensors here, not on {device.type} tensors"
    if wanted == "cuda" and _substituted is None:
        return _no_code(torch.cuda.current_device() if device.index is None else device.index)
    return ""


# --- which kernel


def kernel(op: str, problem: Any, gpu: GPU, alignment: int = ALIGNED) -> tuple[str, str]:
    """Return the kernel for a problem and "", or "" and why no CUDA kernel computes it.

    Measured choices come first, then the heuristic. An op with one kernel names it like itself.

    Args:
        alignment: bytes that every tensor's address is a multiple of, a power of two.
    """
    found = native()
    assert found is not None, load_error()
    return _kernel(found, op, problem, gpu, alignment)


def faster(op: str, problem: Any, gpu: GPU, alignment: int = ALIGNED) -> str:
    """Return the kernel where tables say that it takes less time than Triton's, else ""."""
    found = native()
    return "" if found is None else _faster(found, op, problem, gpu, alignment)


def supporting(problem: Any, gpu: GPU, alignment: int = ALIGNED) -> tuple[list[cuda_choice.Kernel], str]:
    """Return the convolution kernels that compute the problem, and if there are none why not."""
    found = native()
    assert found is not None, load_error()
    return _supporting(found, problem, gpu, alignment)


@functools.lru_cache(maxsize=4096)
def _kernel(found: Native, op: str, problem: Any, gpu: GPU, alignment: int) -> tuple[str, str]:
    sizes = [size for size in vars(problem).values() if type(size) is int]
    sizes += [problem.h * problem.w] if op == "head" else []
    if op != "add_act" and max(sizes) > _MOST:
        return "", f"the CUDA kernels count sizes in 32 bits, and the problem is {problem.key()}"
    if op == "stem" and problem.c > _STEM_CHANNELS:
        return "", f"the CUDA stem takes up to {_STEM_CHANNELS} channels, x has {problem.c}"
    if op == "stem" and problem.precision == "fp32":
        return "", "the CUDA stem multiplies float32 as tf32 only, which torch is set not to"
    if op != "conv_bn_act":
        return (op, "") if op in OPS else ("", f"{op} has no CUDA kernel")
    kernels, reason = _supporting(found, problem, gpu, alignment)
    if not kernels:
        return "", reason
    wanted = cuda_choice.measured(op, problem, gpu)
    chosen = next((each for each in kernels if each.name == wanted), None)
    chosen = chosen or cuda_choice.heuristic(problem, gpu, kernels)
    assert chosen is not None
    return chosen.name, ""


@functools.lru_cache(maxsize=4096)
def _faster(found: Native, op: str, problem: Any, gpu: GPU, alignment: int) -> str:
    if not cuda_choice.faster(op, problem, gpu):
        return ""
    name, _ = _kernel(found, op, problem, gpu, alignment)
    # The time is that of the kernel in the table; another one, chosen because that one is not there, was not measured.
    return name if name == cuda_choice.measured(op, problem, gpu) else ""


@functools.lru_cache(maxsize=4096)
def _supporting(found: Native, problem: Any, gpu: GPU, alignment: int) -> tuple[list[cuda_choice.Kernel], str]:
    suited = [each for each in found.kernels if cuda_choice.suits(each, problem, gpu)]
    if not suited:
        what = {"fp32": "float32 without tf32", "tf32": "float32 as tf32"}.get(problem.precision, problem.precision)
        return [], f"no CUDA convolution for this GPU computes {what}"
    address = ALIGNED + alignment  # a multiple of `alignment` and of nothing more; 2 * ALIGNED is one of all of it
    pointers = (address, address, address, address, address if problem.residual else 0, address)
    fields = (*pointers, *_sizes(problem), True, False, 0)
    reasons = {each: found.module.conv_bn_act_unsupported(each.name, *fields) for each in suited}
    kernels = [each for each, reason in reasons.items() if not reason]
    said = list(dict.fromkeys(reasons.values()))
    return kernels, "" if kernels else f"no CUDA convolution computes this problem: {'; '.join(said[:3])}"


_tables.remembers(_kernel)
_tables.remembers(_faster)


def _sizes(problem: Any) -> tuple[Any, ...]:
    """Return the sizes and the precision of a convolution in the order of the module's arguments."""
    return (
        problem.n, problem.h, problem.w, problem.c, problem.k, *problem.kernel, *problem.output, *problem.stride,
        *problem.padding, *problem.dilation, problem.groups, problem.precision,
    )  # fmt: skip


def alignment(*tensors: Tensor | None) -> int:
    """Return the largest power of two, at most ``ALIGNED``, that divides all of the addresses."""
    bits = ALIGNED
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits & -bits


# --- launches: thin, on checked arguments


def _module() -> Any:
    found = native()
    if found is None:
        raise RuntimeError(load_error())
    return found.module


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(size: int, to: int, device: torch.device) -> Tensor | None:
    """Memory of ``size`` bytes at an address that is a multiple of ``to``; None for no bytes.

    It may be freed as soon as the launch is on the stream: torch reuses memory in the order of that stream.
    """
    if size == 0:
        return None
    memory = torch.empty(size + to, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % to :]


def _run(function: str, device: torch.device, *arguments: Any) -> None:
    """Call a function of the module with the addresses of tensors, 0 for None, on the device's current stream."""
    values = [_pointer(each) if each is None or isinstance(each, Tensor) else each for each in arguments]
    with triton.on(device):
        getattr(_module(), function)(*values, _stream(device))


def conv_bn_act(
    name: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    problem: Any,
    *,
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> None:
    """Fill ``out`` by the convolution kernel ``name``.

    Args:
        x: [N, C, H, W], residual and out: [N, K, P, Q], all dense channels_last and of one dtype.
        weight: [K, C / groups, R, S], dense channels_last, of that dtype.
        scale, shift: [K] float32, dense.
        problem: ``kernels.problems.ConvBNAct``.

    Raises:
        CudaError (a RuntimeError): the launch failed. ValueError: the kernel does not compute the problem.
    """
    module, device = _module(), x.device
    pointers = [x.data_ptr(), weight.data_ptr(), scale.data_ptr(), shift.data_ptr(), _pointer(residual), out.data_ptr()]
    fields = (*pointers, *_sizes(problem), activation == "relu", residual_after_activation)
    with triton.on(device):
        memory = _workspace(module.conv_bn_act_workspace(name, *fields, 0), 256, device)
        module.conv_bn_act(name, *fields, _pointer(memory), _stream(device))


def stem(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, normalisation: Tensor | None, out: Tensor, problem: Any
) -> None:
    """Fill ``out`` with convolution 7x7/2 + scale, shift + ReLU + max-pool 3x3/2.

    Args:
        x: [N, C, H, W] in out's dtype, or uint8 [N, H, W, C]; any strides.
        weight: [K, 4, 4, 16] in out's dtype as ``layouts.squares`` packs it.
        scale, shift: [K] float32, dense.
        normalisation: for uint8 [2, C] float32, dense: a value is ``byte * normalisation[0] + normalisation[1]``.
        out: [N, K, P, Q], dense channels_last.
        problem: ``kernels.problems.Stem``.
    """
    stride_n, *others = x.stride()
    strides = (others[2], others[0], others[1]) if problem.uint8 else others
    _run(
        "stem", x.device, x, stride_n, *strides, problem.uint8, normalisation, weight, scale, shift, out, problem.n,
        problem.c, problem.h, problem.w, problem.k, *problem.convolved, *problem.output, problem.ceil_mode,
        problem.precision,
    )  # fmt: skip


def head(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, problem: Any, gpu: GPU) -> None:
    """Fill ``out`` [N, K] with ``mean(x, (2, 3)) @ weight.T + bias``.

    Args:
        x: [N, C, H, W], dense channels_last. weight: [K, C] of x's dtype, dense. bias: [K] float32, dense, or None.
        problem: ``kernels.problems.Head``.
    """
    sizes = (problem.n, problem.h * problem.w, problem.c, problem.k, problem.precision)
    memory = _workspace(_module().head_workspace(*sizes, gpu.multiprocessors), 16, x.device)
    _run("head", x.device, x, weight, bias, out, *sizes, memory, gpu.multiprocessors)


def add_act(x: Tensor, y: Tensor, out: Tensor, *, activation: str = "relu") -> None:
    """Fill ``out`` with ``act(x + y)``: one dtype and the same dense strides; ``out`` may be x or y."""
    _run("add_act", x.device, x, y, out, x.numel(), PRECISIONS[x.dtype], activation == "relu")


def add_act_backward(grad: Tensor, output: Tensor, out: Tensor) -> None:
    """Fill ``out`` with ``grad`` where not ``output`` <= 0, else 0; tensors as for :func:`add_act`."""
    _run("add_act_backward", output.device, grad, output, out, output.numel(), PRECISIONS[output.dtype])


# Training BatchNorm + residual + ReLU. All images here are [N, C, H, W], dense channels_last and of one dtype; vectors
# are [C], float32 and dense. Definitions as torch.nn.functional.batch_norm: Ioffe & Szegedy 2015, arXiv:1502.03167.


def _rows(x: Tensor) -> tuple[int, int]:
    """Return an image's pixels and channels: what its memory is as a matrix."""
    return (x.numel() // x.shape[1] if x.shape[1] else 0), x.shape[1]


def _sums(x: Tensor) -> Tensor | None:
    """Return the workspace of the functions that sum over an image's pixels."""
    return _workspace(_module().batch_norm_act_workspace(*_rows(x), PRECISIONS[x.dtype]), 16, x.device)


def batch_norm_act_statistics(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float,
    momentum: float,
) -> None:
    """Fill ``mean`` and ``invstd = 1 / sqrt(variance + eps)`` of x's channels, and update the running statistics.

    ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance; None for no such statistics.
    """
    _run(
        "batch_norm_act_statistics", x.device, x, mean, invstd, running_mean, running_var, *_rows(x), eps, momentum,
        PRECISIONS[x.dtype], _sums(x),
    )  # fmt: skip


def batch_norm_act_apply(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    activation: str = "relu",
) -> None:
    """Fill ``out`` with ``act((x - mean) * invstd * gamma + beta + residual)``; it may be x or the residual."""
    _run(
        "batch_norm_act_apply", x.device, x, mean, invstd, gamma, beta, residual, out, *_rows(x), activation == "relu",
        PRECISIONS[x.dtype],
    )  # fmt: skip


def batch_norm_act_reduce(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
) -> None:
    """Fill the sums over pixels of ``g`` (beta's gradient) and of ``g * (x - mean) * invstd`` (gamma's).

    ``g`` is ``grad`` where the ReLU was open, which ``output`` tells; all of it if that is None.
    """
    _run(
        "batch_norm_act_reduce", x.device, grad, x, output, mean, invstd, sum_grad, sum_grad_xhat, *_rows(x),
        PRECISIONS[x.dtype], _sums(x),
    )  # fmt: skip


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_xhat: Tensor | None,
    grad_x: Tensor | None,
    grad_residual: Tensor | None,
) -> None:
    """Fill ``grad_x`` and ``grad_residual`` (``g`` itself), if they are not None.

    ``grad_x = gamma * invstd * (g - sum_grad / rows - xhat * sum_grad_xhat / rows)``, without the sums (None) for
    statistics that do not depend on x.
    """
    _run(
        "batch_norm_act_backward", x.device, grad, x, output, mean, invstd, gamma, sum_grad, sum_grad_xhat, grad_x,
        grad_residual, *_rows(x), PRECISIONS[x.dtype],
    )  # fmt: skip
