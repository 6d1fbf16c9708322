"""Which launches a fused layer brings about, and each of them on an example of its op's: for compiling and measuring.

Tensors, outputs and right answers are those of the ops' declarations. No launch choice is made here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.backends import cuda, triton
from resnet_fast.graph.inventory import Block, Layer
from resnet_fast.kernels import cuda_choice
from resnet_fast.kernels.problems import AddAct, BatchNormAct, ConvBNAct, ConvFp8, ConvInt8, ConvStatistics, Head, Stem
from resnet_fast.ops import ALL, checks
from resnet_fast.ops import Op as Declaration
from resnet_fast.ops.add_act import BACKWARD as ADD_ACT_BACKWARD
from resnet_fast.ops.batch_norm_act import BACKWARD, STATISTICS, statistics
from resnet_fast.ops.batch_norm_act import OP as BATCH_NORM_ACT
from resnet_fast.ops.bottleneck_tail import composed
from resnet_fast.ops.conv_fp8 import OP as CONV_FP8
from resnet_fast.ops.conv_int8 import OP as CONV_INT8
from resnet_fast.ops.conv_int8 import offset
from resnet_fast.ops.conv_statistics import OP as CONV_STATISTICS
from resnet_fast.ops.conv_statistics import scale_and_shift
from resnet_fast.ops.stem import PACKED, normalisation
from resnet_fast.roofline import Work, cost

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

_EPS, _MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Case:
    """One launch of a network: an op's problem, and what its kernel is told besides.

    Attributes:
        op: the op's name for its Triton kernel, ``conv_bn_act.cuda`` for its CUDA kernels: the section of a table that
            holds the choice. problem: its kernel module's ``Problem``.
        form: the activation, "relu" or "none", if the op takes one; "backward" for a gradient; else "".
    """

    op: str
    problem: Any
    form: str = ""

    def __str__(self) -> str:
        return f"{self.op}{f' ({self.form})' if self.form else ''} {self.problem.key()}"


@dataclass(frozen=True)
class Launches:
    """Launches that do one thing together, one behind the other."""

    parts: tuple[Any, ...]

    def __call__(self) -> None:
        for part in self.parts:
            part()


@dataclass(frozen=True)
class Example:
    """Tensors for the launches of a case.

    Attributes:
        arguments, outputs: of the op's declaration, the outputs without values; those that the case has not are empty.
        others: what its launches read or write besides.
    """

    declaration: Declaration[Any]
    arguments: Any
    outputs: tuple[Any, ...]
    others: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        everything = (*self.arguments, *self.outputs, *self.others)
        return sum(each.nbytes for each in everything if isinstance(each, Tensor))

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return what the outputs must be, computed by the reference from floating point arguments in ``dtype``."""
        wide = [
            each.to(dtype, copy=True) if isinstance(each, Tensor) and each.is_floating_point() else each
            for each in self.arguments
        ]
        with backends.use("reference"):  # of the ops that a reference calls too
            return _several(self.declaration.reference(self.arguments._make(wide)))


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Op:
    """What compiling and measuring need of an op besides its declaration.

    Attributes:
        matrix: whether its products are worth Hopper's warp-group instructions.
        product: which of its launches multiplies, where it has several.
        cases: the cases that a layer or a block of a network brings about; most bring about none.
        launch: fills an example's outputs, of (kernel module, example, case, config): a ``Launch``, or ``Launches``.
        declared: the declaration of the op that computes a case. others: of (arguments, case), an example's.
        work: bytes and operations of a problem.
        parts: does what the kernel does by several launches, of an example; None if there is no such way.
        plain: whether those are what the op does by itself where no table says that its kernel takes less time.
        native: the CUDA kernels in place of a module of Triton's.
    """

    name: str
    matrix: bool
    cases: Callable[[Layer | Block], Iterator[Case]]
    launch: Callable[[Any, Example, Case, Any], Any]
    declared: Callable[[Case], Declaration[Any]] = lambda case: ALL[case.problem.op]
    others: Callable[[Any, Case], tuple[Any, ...]] = lambda a, case: ()
    parts: Callable[[Example], object] | None = None
    plain: bool = False
    native: CudaKernels | None = None
    work: Callable[[Any], Work] = cost.work
    product: int = 0

    @property
    def kernel(self) -> Any:
        """The kernel's module, whose import imports triton; of CUDA kernels what stands in for one."""
        return importlib.import_module(f"resnet_fast.kernels.{self.name}") if self.native is None else self.native

    def example(self, case: Case, device: torch.device) -> Example:
        """Return random tensors for a case; on the device "meta" they are shapes alone."""
        declaration = self.declared(case)
        a = declaration.example(case.problem, device)
        if case.form in checks.ACTIVATIONS:
            a = a._replace(activation=case.form)
        return Example(declaration, a, _several(declaration.empty(a)), self.others(a, case))


@dataclass(frozen=True)
class CudaKernels:
    """The CUDA kernels of an op, with what a kernel module has of functions: its choices are the kernels there are."""

    op: str

    def candidates(self, problem: Any, gpu: GPU) -> Iterator[Any]:
        """Every kernel that computes the problem on ``gpu``, the likely ones first; none if none was built."""
        if cuda.native() is None:
            return
        if self.op == "conv_bn_act":
            yield from cuda_choice.candidates(problem, gpu, cuda.supporting(problem, gpu)[0])
        elif cuda.kernel(self.op, problem, gpu)[0]:
            yield cuda_choice.Only()

    def heuristic(self, problem: Any, gpu: GPU) -> Any:
        """Return the choice without a table, None if no kernel computes the problem."""
        return next(self.candidates(problem, gpu), None)

    def choose(self, problem: Any, gpu: GPU) -> Any:
        """The measured choice if there is one, else the heuristic's; None if no kernel computes the problem."""
        name = "" if cuda.native() is None else cuda.kernel(self.op, problem, gpu)[0]
        if not name:
            return None
        return cuda_choice.Config(name) if self.op == "conv_bn_act" else cuda_choice.Only()


def names() -> tuple[str, ...]:
    """Return the ops that have a Triton kernel to tune."""
    return tuple(_OPS)


def get(name: str) -> Op:
    """Return the adapter of an op's Triton kernel, or as ``conv_bn_act.cuda`` of its CUDA kernels.

    Raises:
        ValueError: there is none of that name.
    """
    found = _OPS.get(name) or _CUDA_OPS.get(name)
    if found is None:
        raise ValueError(f"no kernel of an op {name!r} is tuned or checked; there are {', '.join((*_OPS, *_CUDA_OPS))}")
    return found


def is_cuda(case: Case) -> bool:
    """Return whether the case is one of CUDA kernels."""
    return case.op in _CUDA_OPS


def with_cuda(cases: Iterable[Case], gpu: GPU) -> tuple[Case, ...]:
    """``cases`` with those of the CUDA kernels beside them, as far as the loaded ``_C`` has kernels for ``gpu``.

    Each right behind its Triton case; a sweep measures all of Triton's first (``sweep.pending``).
    """
    found = cuda.native()
    runs = found is not None and (found.emulated or cuda.built_for(found.info["archs"], *divmod(gpu.capability, 10)))
    made: list[Case] = []
    for case in cases:
        made.append(case)
        twin = _CUDA_OPS.get(cuda_choice.table(case.op))
        if runs and twin is not None and twin.kernel.heuristic(case.problem, gpu) is not None:
            made.append(replace(case, op=twin.name))
    return tuple(made)


def supported(case: Case, gpu: GPU) -> bool:
    """Return whether the kernel computes the problem on ``gpu`` at all; most compute every problem."""
    supports = getattr(get(case.op).kernel, "supports", None)
    return supports is None or bool(supports(case.problem, gpu))


# --- conv_bn_act


def _conv_cases(layer: Layer | Block) -> Iterator[Case]:
    if isinstance(layer, Layer) and layer.op == "conv_bn_act":
        yield Case("conv_bn_act", layer.problem, layer.activation)


def _conv_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    a, (out,) = example.arguments, example.outputs
    if config.shares == 1:
        return kernel.launch(*a[:5], out, case.problem, config, activation=a.activation)
    sums = out.new_empty(kernel.sums_shape(case.problem, config), dtype=torch.float32)
    return Launches(
        (
            kernel.launch_shares(*a[:2], sums, case.problem, config),
            kernel.launch_sum(sums, *a[2:5], out, case.problem, config, activation=a.activation),
        )
    )


# --- conv_int8, conv_fp8


def _quantized_cases(made: type[ConvInt8], layer: Layer | Block) -> Iterator[Case]:
    """Convolutions between bytes; those that end a block also into half precision, in which their reader may be."""
    if isinstance(layer, Layer) and layer.op == "conv_bn_act" and f"conv_{layer.problem.precision}" == made.op:
        for out in (made.out, "fp16") if layer.problem.residual and not layer.late else (made.out,):
            yield Case(made.op, made(**vars(layer.problem), out=out), layer.activation)


def _quantized_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    a, (out,) = example.arguments, example.outputs
    tensors = (*a[:4], *example.others, a.residual, out)
    return kernel.launch(*tensors, case.problem, config, residual_scale=a.residual_scale, activation=a.activation)


# --- add_act


def _add_cases(layer: Layer | Block) -> Iterator[Case]:
    """Where a convolution takes a residual up, training and graphs that cannot fuse it add tensors of that size."""
    if isinstance(layer, Layer) and isinstance(layer.problem, ConvBNAct) and layer.problem.residual:
        problem = AddAct(math.prod(layer.shape), layer.problem.precision)
        for form in ("relu", "backward"):
            yield Case("add_act", problem, form)


def _add_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    launch = kernel.launch_backward if case.form == "backward" else kernel.launch
    return launch(*example.arguments[:2], *example.outputs, case.problem, config)


# --- batch_norm_act: each pass over memory is a case


def _norm_cases(layer: Layer | Block) -> Iterator[Case]:
    """In training a BatchNorm stands behind every convolution, and what its layer fuses behind the BatchNorm."""
    if isinstance(layer, Block) or layer.late or not isinstance(conv := layer.problem, ConvBNAct | Stem):
        return
    # The pool behind a stem's convolution is not a part of this.
    rows, columns = conv.convolved if isinstance(conv, Stem) else conv.output
    residual, relu = isinstance(conv, ConvBNAct) and conv.residual, layer.activation == "relu"
    problem = partial(BatchNormAct, conv.n * rows * columns, conv.k, conv.precision)
    yield Case("batch_norm_act", problem("statistics"))
    yield Case("batch_norm_act", problem("apply", residual=residual), layer.activation)
    yield Case("batch_norm_act", problem("reduce", relu=relu))
    yield Case("batch_norm_act", problem("backward", relu=relu, residual=residual))


def _norm_others(a: Any, case: Case) -> tuple[Tensor, ...]:
    """Return the sums that the step "reduce" leaves for "backward"."""
    if case.problem.step != "backward":
        return ()
    _, *sums, _ = BACKWARD.reference(a._replace(need_x=False, need_sums=True, need_residual=False))
    return tuple(sums)


def _norm_tensors(example: Example, step: str) -> tuple[Any, ...]:
    """Return what launches of a step take, of Triton's and of CUDA's kernels."""
    a, outputs = example.arguments, example.outputs
    if step == "statistics":
        return a.x, *outputs[:2], a.running_mean, a.running_var
    if step == "apply":
        return a.x, a.mean, a.invstd, a.gamma, a.beta, a.residual, *outputs
    grad_x, *sums, grad_residual = outputs
    given = a.grad, a.x, a.output, a.mean, a.invstd
    if step == "reduce":
        return *given, *sums
    return *given, a.gamma, *example.others, grad_x, grad_residual if a.need_residual else None


def _norm_options(example: Example, step: str) -> dict[str, Any]:
    options = {"statistics": ("eps", "momentum"), "apply": ("activation",)}.get(step, ())
    return {name: getattr(example.arguments, name) for name in options}


def _norm_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    problem, tensors = case.problem, _norm_tensors(example, case.problem.step)
    if problem.step in ("statistics", "reduce"):
        size = kernel.workspace_size(problem, config)
        tensors = (*tensors, torch.empty(size, device=example.arguments.x.device))
    launches = getattr(kernel, problem.step)
    return Launches(launches(*tensors, problem, config, **_norm_options(example, problem.step)))


# --- conv_statistics: in training, in place of torch's convolution and the pass "statistics"


def _statistics_cases(layer: Layer | Block) -> Iterator[Case]:
    """Every convolution; those inside a block also with the BatchNorm + ReLU in front, for ``memory_efficient``."""
    conv = layer.spatial.problem if isinstance(layer, Block) else layer.problem
    if isinstance(conv, Stem):
        geometry: Any = (7, 7), (2, 2), (3, 3), (1, 1), 1
        conv = ConvBNAct(conv.n, conv.h, conv.w, conv.c, conv.k, *geometry, conv.precision, residual=False)
    if not isinstance(conv, ConvBNAct):
        return
    normalised = (
        (True,) if isinstance(layer, Block) else (False, True) if conv.residual and not layer.late else (False,)
    )
    for each in normalised:
        yield Case("conv_statistics", ConvStatistics(**{**vars(conv), "residual": False, "normalised": each}))


def _statistics_others(a: Any, case: Case) -> tuple[Tensor | None, ...]:
    """Return the scale and shift of a BatchNorm in front, running statistics, and memory for an inverse deviation."""
    k, device = case.problem.k, a.x.device
    running = torch.randn(k, device=device), torch.rand(k, device=device)
    return *((None, None) if a.before is None else scale_and_shift(a.before)), *running, torch.empty(k, device=device)


def _statistics_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    """Return all that the parts do: the running statistics too."""
    from resnet_fast.kernels import batch_norm_act

    problem, a = case.problem, example.arguments
    _, mean, variance = example.outputs
    *before, running_mean, running_var, invstd = example.others
    workspace = torch.empty(kernel.workspace_size(problem, config), device=a.x.device)
    launches = kernel.launches(a.x, a.weight, *before, *example.outputs, workspace, problem, config)
    vectors = (mean, variance, invstd, running_mean, running_var)
    finish = batch_norm_act.finish(*vectors, problem.pixels, problem.k, eps=_EPS, momentum=_MOMENTUM)
    return Launches((*launches, finish))


def _statistics_parts(example: Example) -> object:
    """By the algorithm that cuDNN finds fastest when it tries them."""
    a = example.arguments
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        y = a.convolved()
        _, _, running_mean, running_var, _ = example.others
        return statistics(y, running_mean, running_var, _MOMENTUM, _EPS)
    finally:
        torch.backends.cudnn.benchmark = before


# --- stem


def _stem_cases(layer: Layer | Block) -> Iterator[Case]:
    """Images as floats, by rows of each channel and channels_last, and as bytes."""
    if isinstance(layer, Layer) and isinstance(layer.problem, Stem):
        for form in ("nchw", "nhwc", "uint8"):
            yield Case("stem", replace(layer.problem, uint8=form == "uint8"), form)


def _stem_x(example: Example, case: Case) -> Tensor:
    x: Tensor = example.arguments.x
    return x.contiguous() if case.form == "nchw" else x


def _stem_constants(example: Example, backend: str) -> tuple[Any, ...]:
    """Return the constants as a backend's kernel reads them."""
    a = example.arguments
    return PACKED[backend](a.weight, a.dtype), a.scale, a.shift, normalisation(a)


def _stem_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    weight, scale, shift, factors = _stem_constants(example, triton.NAME)
    (out,) = example.outputs
    squares = out.new_empty(kernel.squares_shape(case.problem))
    return Launches(
        (
            kernel.launch_squares(_stem_x(example, case), factors, squares, case.problem, config),
            kernel.launch(squares, weight, scale, shift, out, case.problem, config),
        )
    )


# --- head


def _head_cases(layer: Layer | Block) -> Iterator[Case]:
    if isinstance(layer, Layer) and isinstance(layer.problem, Head):
        yield Case("head", layer.problem)


def _head_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    return kernel.launch(*example.arguments, *example.outputs, case.problem, config)


# --- bottleneck_tail


def _tail_cases(layer: Layer | Block) -> Iterator[Case]:
    """A block with and without the next block's 1x1 and its projection; what is planned depends on the GPU."""
    if isinstance(layer, Block):
        ends = (replace(layer, following=None), layer)
        for block in dict.fromkeys((*ends, *(replace(end, project=None) for end in ends))):
            if block.problem is not None:
                yield Case("bottleneck_tail", block.problem)


def _tail_launch(kernel: Any, example: Example, case: Case, config: Any) -> Any:
    a, (out, following) = example.arguments, example.outputs
    projection, reduction = (None if constants[0] is None else constants for constants in (a[8:11], a[11:14]))
    next_one = following if case.problem.following else None
    return kernel.launch(*a[:8], projection, out, reduction, next_one, case.problem, config)


_OF_STEPS: dict[str, Declaration[Any]] = {
    "statistics": STATISTICS, "apply": BATCH_NORM_ACT, "reduce": BACKWARD, "backward": BACKWARD
}  # fmt: skip

_OPS = {
    op.name: op
    for op in (
        Op("conv_bn_act", True, _conv_cases, _conv_launch),
        Op("bottleneck_tail", True, _tail_cases, _tail_launch, parts=lambda example: composed(example.arguments)),
        Op("stem", True, _stem_cases, _stem_launch, product=1),
        Op("head", False, _head_cases, _head_launch),
        Op(
            "conv_int8", True, partial(_quantized_cases, ConvInt8), _quantized_launch, lambda case: CONV_INT8,
            lambda a, case: (offset(a),),
        ),
        Op("conv_fp8", True, partial(_quantized_cases, ConvFp8), _quantized_launch, lambda case: CONV_FP8),
        Op(
            "add_act", False, _add_cases, _add_launch,
            lambda case: ADD_ACT_BACKWARD if case.form == "backward" else ALL["add_act"],
        ),
        Op("batch_norm_act", False, _norm_cases, _norm_launch, lambda case: _OF_STEPS[case.problem.step], _norm_others),
        Op(
            "conv_statistics", True, _statistics_cases, _statistics_launch, lambda case: CONV_STATISTICS,
            _statistics_others, _statistics_parts, plain=True,
        ),
    )
}  # fmt: skip


# --- CUDA kernels: the same cases and examples; what is packed is packed before the launch is timed


def _cuda_conv_launch(kernels: Any, example: Example, case: Case, config: Any) -> Any:
    a = example.arguments
    tensors: tuple[Any, ...] = (*a[:5], *example.outputs, case.problem)
    return partial(cuda.conv_bn_act, config.kernel, *tensors, activation=a.activation)


def _cuda_add_launch(kernels: Any, example: Example, case: Case, config: Any) -> Any:
    run = cuda.add_act_backward if case.form == "backward" else cuda.add_act
    return partial(run, *example.arguments[:2], *example.outputs)


def _cuda_stem_launch(kernels: Any, example: Example, case: Case, config: Any) -> Any:
    (out,) = example.outputs
    weight, scale, shift, factors = _stem_constants(example, cuda.NAME)
    return partial(cuda.stem, _stem_x(example, case), weight, scale, shift, factors, out, case.problem)


def _cuda_head_launch(kernels: Any, example: Example, case: Case, config: Any) -> Any:
    (x, weight, bias), (out,) = example.arguments, example.outputs
    return partial(cuda.head, x, weight, bias.float(), out, case.problem, triton.gpu_of(x.device))


def _cuda_norm_launch(kernels: Any, example: Example, case: Case, config: Any) -> Any:
    step = case.problem.step
    run = getattr(cuda, f"batch_norm_act_{step}")
    return partial(run, *_norm_tensors(example, step), **_norm_options(example, step))


_CUDA_OPS = {
    cuda_choice.table(name): replace(_OPS[name], name=cuda_choice.table(name), launch=launch, native=CudaKernels(name))
    for name, launch in (
        ("conv_bn_act", _cuda_conv_launch),
        ("stem", _cuda_stem_launch),
        ("head", _cuda_head_launch),
        ("add_act", _cuda_add_launch),
        ("batch_norm_act", _cuda_norm_launch),
    )
}
