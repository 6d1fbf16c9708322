"""Each op as launches see it: from a fused layer to its kernel's problem, tensors for one, the answer, the least work.

One small adapter per op, so that compiling and measuring treat all of them alike. No launch choice is made here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast._dtypes import DTYPES
from resnet_fast.backends import cuda, triton
from resnet_fast.graph.inventory import Block, Layer
from resnet_fast.kernels import cuda_choice
from resnet_fast.kernels.problems import AddAct, BatchNormAct, ConvBNAct, ConvStatistics, Head, Stem
from resnet_fast.roofline import Work, cost

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

Tensors = Mapping[str, Tensor | None]

_EPS = 1e-5


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
class Op:
    """What compiling and measuring need of an op.

    Attributes:
        matrix: whether its products are worth Hopper's warp-group instructions.
        cases: the cases that a layer or a block of a network brings about; most bring about none.
        tensors: arguments and outputs (named ``out`` or ``out_...``) for a problem, of (problem, device), random.
        launch: fills the outputs, of (kernel module, tensors, case, config): a ``Launch``, or ``Launches``.
        reference: what the outputs must be, of (tensors, case), in the dtype that the floating point inputs have.
        work: bytes and operations of a problem.
        parts: does what the kernel does by several launches, of (tensors, case); None if there is no such way.
        plain: whether those are what the op does by itself where no table says that its kernel takes less time.
        native: the CUDA kernels in place of a module of Triton's.
    """

    name: str
    matrix: bool
    cases: Callable[[Layer | Block], Iterator[Case]]
    tensors: Callable[[Any, torch.device], dict[str, Tensor | None]]
    launch: Callable[[ModuleType, Tensors, Case, Any], Any]
    reference: Callable[[Tensors, Case], dict[str, Tensor]]
    parts: Callable[[Tensors, Case], object] | None = None
    plain: bool = False
    native: CudaKernels | None = None
    work: Callable[[Any], Work] = cost.work

    @property
    def kernel(self) -> Any:
        """The kernel's module, whose import imports triton; of CUDA kernels what stands in for one."""
        return importlib.import_module(f"resnet_fast.kernels.{self.name}") if self.native is None else self.native


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

    def as_fields(self, config: Any) -> dict[str, Any]:
        """Return a choice as a table stores it."""
        return cuda_choice.as_fields(config)


def names() -> tuple[str, ...]:
    """Return the ops that have a Triton kernel and an adapter."""
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


# --- tensors, which on the device "meta" are shapes alone


def _image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def _weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Such that a product of unit inputs has about unit size."""
    made = torch.randn(shape, device=device) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
    made = made.to(dtype)
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


def _per_channel(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift."""
    return torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


# --- conv_bn_act


def _conv_cases(layer: Layer | Block) -> Iterator[Case]:
    if isinstance(layer, Layer) and layer.op == "conv_bn_act":
        yield Case("conv_bn_act", layer.problem, layer.activation)


def _conv_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    dtype = DTYPES[problem.precision]
    shape = (problem.n, problem.k, *problem.output)
    scale, shift = _per_channel(problem.k, device)
    return {
        "x": _image((problem.n, problem.c, problem.h, problem.w), dtype, device),
        "weight": _weight((problem.k, problem.c // problem.groups, *problem.kernel), dtype, device),
        "scale": scale,
        "shift": shift,
        "residual": _image(shape, dtype, device) if problem.residual else None,
        "out": _empty(shape, dtype, device),
    }


def _conv_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    return kernel.launch(**tensors, problem=case.problem, config=config, activation=case.form or "relu")


def _conv_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    from resnet_fast.ops.conv_bn_act import OP

    problem = case.problem
    arguments: list[Any] = [tensors[name] for name in ("x", "weight", "scale", "shift", "residual")]
    arguments += [problem.stride, problem.padding, problem.dilation, problem.groups, case.form or "relu"]
    return {"out": OP.reference(OP.arguments(*arguments))}


# --- add_act


def _add_cases(layer: Layer | Block) -> Iterator[Case]:
    """Where a convolution takes a residual up, training and graphs that cannot fuse it add tensors of that size."""
    if isinstance(layer, Layer) and isinstance(layer.problem, ConvBNAct) and layer.problem.residual:
        problem = AddAct(math.prod(layer.shape), layer.problem.precision)
        for form in ("relu", "backward"):
            yield Case("add_act", problem, form)


def _add_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    x, y, out = (torch.randn(problem.length, dtype=DTYPES[problem.precision], device=device) for _ in range(3))
    return {"x": x, "y": y, "out": out}


def _add_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    arguments = (tensors["x"], tensors["y"], tensors["out"], case.problem, config)
    return kernel.launch_backward(*arguments) if case.form == "backward" else kernel.launch(*arguments)


def _add_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    x, y = tensors["x"], tensors["y"]
    assert x is not None and y is not None
    return {"out": torch.where(y <= 0, 0.0, x) if case.form == "backward" else torch.relu(x + y)}


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


def _norm_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    """Images as matrices [rows, c]. ``y`` is the forward's output where a ReLU asks for it."""
    dtype, rows, c, step = DTYPES[problem.precision], problem.rows, problem.c, problem.step

    def image() -> Tensor:
        return torch.randn(rows, c, dtype=dtype, device=device)

    def vector() -> Tensor:
        return torch.empty(c, device=device)

    std, mean = _per_channel(c, device)
    x = torch.randn(rows, c, device=device).mul_(std).add_(mean).to(dtype)
    if step == "statistics":
        running = {"running_mean": torch.randn(c, device=device), "running_var": torch.rand(c, device=device)}
        return {"x": x, "out_mean": vector(), "out_invstd": vector(), **running}
    given: dict[str, Tensor | None] = {"x": x, "mean": mean, "invstd": 1 / std}
    gamma, beta = _per_channel(c, device)
    if step == "apply":
        residual = image() if problem.residual else None
        return given | {"gamma": gamma, "beta": beta, "residual": residual, "out": torch.empty_like(x)}
    given |= {"grad": image(), "y": image() if problem.relu else None}
    if step == "reduce":
        return given | {"out_sum_grad": vector(), "out_sum_grad_xhat": vector()}
    sums = rows**0.5 * torch.randn(2, c, device=device)
    given |= {"gamma": gamma, "sum_grad": sums[0], "sum_grad_xhat": sums[1]}
    return given | {"out": torch.empty_like(x), "out_residual": torch.empty_like(x) if problem.residual else None}


def _norm_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    problem, x = case.problem, _given(tensors, "x")

    def given(names: str) -> list[Tensor | None]:
        return [tensors[name] for name in names.split()]

    if problem.step == "apply":
        arguments = given("x mean invstd gamma beta residual out")
        return Launches(kernel.apply(*arguments, problem, config, activation=case.form or "relu"))
    if problem.step == "backward":
        arguments = given("grad x y mean invstd gamma sum_grad sum_grad_xhat out out_residual")
        return Launches(kernel.backward(*arguments, problem, config))
    workspace = torch.empty(kernel.workspace_size(problem, config), device=x.device)
    if problem.step == "reduce":
        arguments = given("grad x y mean invstd out_sum_grad out_sum_grad_xhat")
        return Launches(kernel.reduce(*arguments, workspace, problem, config))
    arguments = given("x out_mean out_invstd running_mean running_var")
    return Launches(kernel.statistics(*arguments, workspace, problem, config, eps=_EPS, momentum=0.1))


def _norm_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    step, x, y = case.problem.step, _given(tensors, "x"), tensors.get("y")
    if step == "statistics":
        return {"out_mean": x.mean(0), "out_invstd": (x.var(0, unbiased=False) + _EPS).rsqrt()}
    xhat = (x - _given(tensors, "mean")) * _given(tensors, "invstd")
    if step == "apply":
        out = xhat * _given(tensors, "gamma") + _given(tensors, "beta")
        out = out if tensors["residual"] is None else out + tensors["residual"]
        return {"out": out if case.form == "none" else torch.relu(out)}
    g = _given(tensors, "grad") if y is None else torch.where(y <= 0, 0.0, _given(tensors, "grad"))
    if step == "reduce":
        return {"out_sum_grad": g.sum(0), "out_sum_grad_xhat": (g * xhat).sum(0)}
    of_mean, of_std = _given(tensors, "sum_grad"), _given(tensors, "sum_grad_xhat")
    through = g - of_mean / case.problem.rows - xhat * (of_std / case.problem.rows)
    made = {"out": through * (_given(tensors, "gamma") * _given(tensors, "invstd"))}
    return made | ({"out_residual": g} if case.problem.residual else {})


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


def _statistics_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    """As the convolution's, with the BatchNorm in front as scale and shift (and a mean of 0 for its parts)."""
    dtype, c, k = DTYPES[problem.precision], problem.c, problem.k
    scale, shift = _per_channel(c, device) if problem.normalised else (None, None)
    return {
        "x": _image((problem.n, c, problem.h, problem.w), dtype, device).add_(0.5),
        "weight": _weight((k, c // problem.groups, *problem.kernel), dtype, device),
        "scale": scale,
        "shift": shift,
        "zero": torch.zeros(c, device=device) if problem.normalised else None,
        "running_mean": torch.randn(k, device=device),
        "running_var": torch.rand(k, device=device),
        "variance": torch.empty(k, device=device),
        "out": _empty((problem.n, k, *problem.output), dtype, device),
        "out_mean": torch.empty(k, device=device),
        "out_invstd": torch.empty(k, device=device),
    }


def _statistics_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    """Return all that the parts do: the running statistics too."""
    from resnet_fast.kernels import batch_norm_act

    problem, x = case.problem, _given(tensors, "x")
    workspace = torch.empty(kernel.workspace_size(problem, config), device=x.device)
    filled = [tensors[name] for name in ("x", "weight", "scale", "shift", "out", "out_mean", "variance")]
    vectors = [tensors[name] for name in ("out_mean", "variance", "out_invstd", "running_mean", "running_var")]
    finish = batch_norm_act.finish(*vectors, problem.pixels, problem.k, eps=_EPS, momentum=0.1)
    return Launches((*kernel.launches(*filled, workspace, problem, config), finish))


def _statistics_parts(tensors: Tensors, case: Case) -> object:
    """By the algorithm that cuDNN finds fastest when it tries them."""
    from resnet_fast.ops.batch_norm_act import statistics

    problem, x, scale = case.problem, _given(tensors, "x"), tensors["scale"]
    how = (problem.stride, problem.padding, problem.dilation, problem.groups)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        if scale is not None:
            x = torch.ops.resnet_fast.batch_norm_act.default(
                x, None, tensors["shift"], tensors["zero"], scale, None, "relu", False, None, ""
            )
        y = torch.conv2d(x, _given(tensors, "weight"), None, *how)
        return statistics(y, tensors["running_mean"], tensors["running_var"], 0.1, _EPS)
    finally:
        torch.backends.cudnn.benchmark = before


def _statistics_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    problem, x, scale = case.problem, _given(tensors, "x"), tensors["scale"]
    if scale is not None:
        x = torch.relu(x * scale.view(-1, 1, 1) + _given(tensors, "shift").view(-1, 1, 1))
    how = (problem.stride, problem.padding, problem.dilation, problem.groups)
    y = torch.conv2d(x, _given(tensors, "weight"), None, *how)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return {"out": y, "out_mean": mean, "out_invstd": (var + _EPS).rsqrt()}


# --- stem


def _stem_cases(layer: Layer | Block) -> Iterator[Case]:
    """Images as floats, by rows of each channel and channels_last, and as bytes."""
    if isinstance(layer, Layer) and isinstance(layer.problem, Stem):
        for form in ("nchw", "nhwc", "uint8"):
            yield Case("stem", replace(layer.problem, uint8=form == "uint8"), form)


def _stem_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    dtype, n, c, h, w = DTYPES[problem.precision], problem.n, problem.c, problem.h, problem.w
    scale, shift = _per_channel(problem.k, device)
    x = torch.randn(n, c, h, w, dtype=dtype, device=device)
    normalise = None
    if problem.uint8:
        x = torch.randint(0, 256, (n, h, w, c), dtype=torch.uint8, device=device)
        normalise = torch.stack([torch.full((c,), 1 / 64.0), torch.full((c,), -2.0)]).to(device)
    weight = _weight((problem.k, c, 7, 7), dtype, device)
    return {
        "x": x,
        "weight": weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),  # as the op packs it: [7, 7, C, K]
        "scale": scale,
        "shift": shift,
        "normalise": normalise,
        "out": _empty((n, problem.k, *problem.output), dtype, device),
    }


def _stem_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    given = dict(tensors)
    if case.form == "nhwc" and given["x"] is not None:
        given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    return kernel.launch(**given, problem=case.problem, config=config)


def _stem_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    from resnet_fast.ops.stem import OP

    x, weight, scale, shift, normalise = (tensors[name] for name in ("x", "weight", "scale", "shift", "normalise"))
    assert x is not None and weight is not None and scale is not None and shift is not None
    if normalise is not None:  # pixel * factor + summand, before the padding with zeros
        x = (x.to(weight.dtype) * normalise[0] + normalise[1]).permute(0, 3, 1, 2)
    return {"out": OP.reference(OP.arguments(x, weight, scale, shift, None, None, case.problem.ceil_mode))}


# --- head


def _head_cases(layer: Layer | Block) -> Iterator[Case]:
    if isinstance(layer, Layer) and isinstance(layer.problem, Head):
        yield Case("head", layer.problem)


def _head_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    dtype = DTYPES[problem.precision]
    return {
        "x": _image((problem.n, problem.c, problem.h, problem.w), dtype, device),
        "weight": _weight((problem.k, problem.c), dtype, device),
        "bias": torch.randn(problem.k, dtype=dtype, device=device),
        "out": torch.empty(problem.n, problem.k, dtype=dtype, device=device),
    }


def _head_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    return kernel.launch(**tensors, problem=case.problem, config=config)


def _head_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    from resnet_fast.ops.head import OP

    arguments: Any = [tensors[name] for name in ("x", "weight", "bias")]
    return {"out": OP.reference(OP.arguments(*arguments))}


# --- bottleneck_tail


def _tail_cases(layer: Layer | Block) -> Iterator[Case]:
    """A block with and without the next block's 1x1; which of them is planned depends on the GPU."""
    if isinstance(layer, Block):
        for block in dict.fromkeys((replace(layer, following=None), layer)):
            if block.problem is not None:
                yield Case("bottleneck_tail", block.problem)


def _tail_tensors(problem: Any, device: torch.device) -> dict[str, Tensor | None]:
    dtype, n, mid, k = DTYPES[problem.precision], problem.n, problem.mid, problem.k
    out = (n, k, *problem.output)
    made: dict[str, Tensor | None] = {"a": _image((n, mid, problem.h, problem.w), dtype, device)}
    convolutions = [("2", mid, (mid, mid, 3, 3)), ("3", k, (k, mid, 1, 1))]
    if problem.shortcut is None:
        made["residual"] = _image(out, dtype, device)
    else:
        c, h, w, _ = problem.shortcut
        made["residual"] = _image((n, c, h, w), dtype, device)
        convolutions.append(("_shortcut", k, (k, c, 1, 1)))
    if problem.following:
        convolutions.append(("1", problem.following, (problem.following, k, 1, 1)))
    for suffix in ("2", "3", "_shortcut", "1"):
        made |= {f"{name}{suffix}": None for name in ("weight", "scale", "shift")}
    for suffix, channels, shape in convolutions:
        made[f"weight{suffix}"] = _weight(shape, dtype, device)
        made[f"scale{suffix}"], made[f"shift{suffix}"] = _per_channel(channels, device)
    made["out"] = _empty(out, dtype, device)
    made["out_following"] = (
        _empty((n, problem.following, *problem.output), dtype, device) if problem.following else None
    )
    return made


def _tail_launch(kernel: ModuleType, tensors: Tensors, case: Case, config: Any) -> Any:
    given = dict(tensors)
    vectors = ("weight", "scale", "shift")
    projection, reduction = (
        None if given[f"weight{suffix}"] is None else tuple(given[f"{name}{suffix}"] for name in vectors)
        for suffix in ("_shortcut", "1")
    )
    return kernel.launch(
        given["a"], *(given[f"{name}2"] for name in vectors), *(given[f"{name}3"] for name in vectors),
        given["residual"], projection, given["out"], reduction, given["out_following"], case.problem, config,
    )  # fmt: skip


def _tail_arguments(tensors: Tensors, problem: Any) -> Any:
    stride = 1 if problem.shortcut is None else problem.shortcut[3]
    arguments: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if not name.startswith("out")}
    return arguments | {"stride": (problem.stride,) * 2, "shortcut_stride": (stride,) * 2}


def _tail_parts(tensors: Tensors, case: Case) -> object:
    from resnet_fast.ops.bottleneck_tail import Arguments, composed

    return composed(Arguments(**_tail_arguments(tensors, case.problem)))


def _tail_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    from resnet_fast.ops.bottleneck_tail import OP

    problem = case.problem
    y, following = OP.reference(OP.arguments(**_tail_arguments(tensors, problem)))
    return {"out": y, "out_following": following} if problem.following else {"out": y}


_OPS = {
    op.name: op
    for op in (
        Op("conv_bn_act", True, _conv_cases, _conv_tensors, _conv_launch, _conv_reference),
        Op("bottleneck_tail", True, _tail_cases, _tail_tensors, _tail_launch, _tail_reference, _tail_parts),
        Op("stem", True, _stem_cases, _stem_tensors, _stem_launch, _stem_reference),
        Op("head", False, _head_cases, _head_tensors, _head_launch, _head_reference),
        Op("add_act", False, _add_cases, _add_tensors, _add_launch, _add_reference),
        Op("batch_norm_act", False, _norm_cases, _norm_tensors, _norm_launch, _norm_reference),
        Op(
            "conv_statistics",
            True,
            _statistics_cases,
            _statistics_tensors,
            _statistics_launch,
            _statistics_reference,
            _statistics_parts,
            plain=True,
        ),
    )
}


# --- CUDA kernels: the same cases, tensors, answers and work; what is packed is packed before the launch is timed


def _cuda_conv_launch(kernels: Any, tensors: Tensors, case: Case, config: Any) -> Any:
    given: dict[str, Any] = {**tensors, "problem": case.problem, "activation": case.form or "relu"}
    return partial(cuda.conv_bn_act, config.kernel, **given)


def _cuda_add_launch(kernels: Any, tensors: Tensors, case: Case, config: Any) -> Any:
    run = cuda.add_act_backward if case.form == "backward" else cuda.add_act
    return partial(run, *(_given(tensors, name) for name in ("x", "y", "out")))


def _cuda_stem_launch(kernels: Any, tensors: Tensors, case: Case, config: Any) -> Any:
    from resnet_fast.backends.layouts import squares

    x, weight = _given(tensors, "x"), _given(tensors, "weight")
    if case.form == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    vectors = (_given(tensors, "scale"), _given(tensors, "shift"), tensors["normalise"])
    return partial(cuda.stem, x, squares(weight, weight.dtype), *vectors, _given(tensors, "out"), case.problem)


def _cuda_head_launch(kernels: Any, tensors: Tensors, case: Case, config: Any) -> Any:
    x, bias = _given(tensors, "x"), _given(tensors, "bias").float()
    gpu = triton.gpu_of(x.device)
    return partial(cuda.head, x, _given(tensors, "weight"), bias, _given(tensors, "out"), case.problem, gpu)


def _cuda_norm_launch(kernels: Any, tensors: Tensors, case: Case, config: Any) -> Any:
    """Return the launches read an image's memory as a matrix; a matrix is one of one-pixel images."""
    images = {
        name: tensor[:, :, None, None] if tensor is not None and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }

    def given(names: str) -> list[Any]:
        return [images[name] for name in names.split()]

    if case.problem.step == "statistics":
        names = given("x out_mean out_invstd running_mean running_var")
        return partial(cuda.batch_norm_act_statistics, *names, eps=_EPS, momentum=0.1)
    if case.problem.step == "apply":
        names = given("x mean invstd gamma beta residual out")
        return partial(cuda.batch_norm_act_apply, *names, activation=case.form or "relu")
    if case.problem.step == "reduce":
        return partial(cuda.batch_norm_act_reduce, *given("grad x y mean invstd out_sum_grad out_sum_grad_xhat"))
    names = given("grad x y mean invstd gamma sum_grad sum_grad_xhat out out_residual")
    return partial(cuda.batch_norm_act_backward, *names)


def _given(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors[name]
    assert tensor is not None
    return tensor


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
