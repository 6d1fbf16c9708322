"""Each op as launches see it: from a fused layer to its kernel's problem, tensors for one, the answer, the least work.

One small adapter per op, so that compiling and measuring treat all of them alike. No launch choice is made here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast.backends import cuda, triton
from resnet_fast.kernels import cuda_choice
from resnet_fast.roofline import Work, cost
from resnet_fast.roofline.schedule import ITEMSIZE

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

#: Storage of each precision.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}

Tensors = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One launch of a network: an op's problem, and what its kernel is told besides.

    Attributes:
        op: the op's name for its Triton kernel, ``conv_bn_act.cuda`` for its CUDA kernels: the section of a table that
            holds the choice. problem: its kernel module's ``Problem``.
        form: the activation, "relu" or "none", where the op takes one; "backward" for a gradient; else "".
    """

    op: str
    problem: Any
    form: str = ""

    def __str__(self) -> str:
        return f"{self.op}{f' ({self.form})' if self.form else ''} {self.problem.key()}"


@dataclass(frozen=True)
class Layer:
    """A fused module of a graph with the shapes of its inputs and of its output at batch 1.

    Attributes:
        name: of its node. sources: names of the nodes whose results it reads, the residual last.
    """

    op: str
    name: str
    sources: tuple[str, ...]
    module: Any
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A bottleneck from its 3x3 on, as layers: what one ``bottleneck_tail`` may compute.

    Attributes:
        spatial: the 3x3. expand: the 1x1 with the residual. project: the 1x1 that makes the residual, if one does.
        following: the next block's first 1x1, if there is a next block.
    """

    spatial: Layer
    expand: Layer
    project: Layer | None
    following: Layer | None


@dataclass(frozen=True)
class Op:
    """What compiling and measuring need of an op.

    Attributes:
        matrix: whether its products are worth Hopper's warp-group instructions.
        cases: the cases that a layer brings about, of (kernel module, layer, batch, precision); most ops' layers none.
        tensors: arguments and outputs (named ``out`` or ``out_...``) for a problem, of (problem, device), random.
        launch: fills the outputs, of (kernel module, tensors, case, config).
        reference: what the outputs must be, of (tensors, case), in the dtype that the floating point inputs have.
        work: bytes and operations of a problem.
        parts: does what the kernel does by several launches, of (tensors, case); None where there is no such way.
        native: the CUDA kernels in place of a module of Triton's.
    """

    name: str
    matrix: bool
    cases: Callable[[ModuleType, Layer | Block, int, str], Iterator[Case]]
    tensors: Callable[[Any, torch.device], dict[str, Tensor | None]]
    launch: Callable[[ModuleType, Tensors, Case, Any], Any]
    reference: Callable[[Tensors, Case], dict[str, Tensor]]
    work: Callable[[Any], Work]
    parts: Callable[[Tensors, Case], object] | None = None
    native: CudaKernels | None = None

    @property
    def kernel(self) -> Any:
        """The kernel's module, whose import imports triton; of CUDA kernels what stands in for one."""
        return importlib.import_module(f"resnet_fast.kernels.{self.name}") if self.native is None else self.native


@dataclass(frozen=True)
class CudaKernels:
    """The CUDA kernels of an op, with what a kernel module has of functions: its choices are the kernels there are."""

    op: str

    def candidates(self, problem: Any, gpu: GPU) -> Iterator[Any]:
        """Every kernel that computes the problem on ``gpu``, the likely ones first; none where none was built."""
        if cuda.native() is None:
            return
        if self.op == "conv_bn_act":
            yield from cuda_choice.candidates(problem, gpu, cuda.supporting(problem, gpu)[0])
        elif cuda.kernel(self.op, problem, gpu)[0]:
            yield cuda_choice.Only()

    def heuristic(self, problem: Any, gpu: GPU) -> Any:
        """The choice without a table, None where no kernel computes the problem."""
        return next(self.candidates(problem, gpu), None)

    def choose(self, problem: Any, gpu: GPU) -> Any:
        """The measured choice where there is one, else the heuristic's; None where no kernel computes the problem."""
        name = "" if cuda.native() is None else cuda.kernel(self.op, problem, gpu)[0]
        if not name:
            return None
        return cuda_choice.Config(name) if self.op == "conv_bn_act" else cuda_choice.Only()

    def as_fields(self, config: Any) -> dict[str, Any]:
        """A choice as a table stores it."""
        return cuda_choice.as_fields(config)


def names() -> tuple[str, ...]:
    """The ops that have a Triton kernel and an adapter."""
    return tuple(_OPS)


def get(name: str) -> Op:
    """The adapter of an op's Triton kernel, or as ``conv_bn_act.cuda`` of its CUDA kernels.

    Raises:
        ValueError: there is none of that name.
    """
    found = _OPS.get(name) or _CUDA_OPS.get(name)
    if found is None:
        raise ValueError(f"no kernel of an op {name!r} is tuned or checked; there are {', '.join((*_OPS, *_CUDA_OPS))}")
    return found


def is_cuda(case: Case) -> bool:
    """Whether the case is one of CUDA kernels."""
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
    """Whether the kernel computes the problem on ``gpu`` at all; most compute every problem."""
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


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


# --- conv_bn_act


def _conv_cases(kernel: ModuleType, layer: Layer | Block, batch: int, precision: str) -> Iterator[Case]:
    if isinstance(layer, Block) or layer.op != "conv_bn_act":
        return
    module, (_, c, h, w) = layer.module, layer.inputs[0]
    problem = kernel.Problem(
        n=batch,
        h=h,
        w=w,
        c=c,
        k=layer.output[1],
        kernel=_pair(module.weight.shape[2:]),
        stride=_pair(module.stride),
        padding=_pair(module.padding),
        dilation=_pair(module.dilation),
        groups=module.groups,
        precision=precision,
        residual=len(layer.inputs) > 1,
    )
    yield Case("conv_bn_act", problem, module.activation)


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
    from resnet_fast.ops.conv_bn_act import reference

    problem = case.problem
    arguments: list[Any] = [tensors[name] for name in ("x", "weight", "scale", "shift", "residual")]
    arguments += [problem.stride, problem.padding, problem.dilation, problem.groups, case.form or "relu"]
    return {"out": reference(*arguments)}


def _conv_work(problem: Any) -> Work:
    return cost.conv(
        problem.n, problem.c, (problem.h, problem.w), problem.k, problem.kernel, problem.stride, problem.output,
        groups=problem.groups, residual=problem.residual, itemsize=ITEMSIZE[problem.precision],
    )  # fmt: skip


# --- add_act


def _add_cases(kernel: ModuleType, layer: Layer | Block, batch: int, precision: str) -> Iterator[Case]:
    """Where a convolution takes a residual up, training and graphs that cannot fuse it add tensors of that size."""
    if isinstance(layer, Layer) and layer.op == "conv_bn_act" and len(layer.inputs) > 1:
        problem = kernel.Problem(batch * torch.Size(layer.output).numel(), precision)
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


def _add_work(problem: Any) -> Work:
    return cost.add_act(problem.length, itemsize=ITEMSIZE[problem.precision])


# --- stem


def _stem_cases(kernel: ModuleType, layer: Layer | Block, batch: int, precision: str) -> Iterator[Case]:
    """Images as floats, by rows of each channel and channels_last, and as bytes."""
    if isinstance(layer, Block) or layer.op != "stem":
        return
    _, c, h, w = layer.inputs[0]
    for form in ("nchw", "nhwc", "uint8"):
        problem = kernel.Problem(
            n=batch,
            h=h,
            w=w,
            c=c,
            k=layer.output[1],
            uint8=form == "uint8",
            ceil_mode=layer.module.ceil_mode,
            precision=precision,
        )
        yield Case("stem", problem, form)


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
    from resnet_fast.ops.stem import reference

    x, weight, scale, shift, normalise = (tensors[name] for name in ("x", "weight", "scale", "shift", "normalise"))
    assert x is not None and weight is not None and scale is not None and shift is not None
    if normalise is not None:  # pixel * factor + summand, before the padding with zeros
        x = (x.to(weight.dtype) * normalise[0] + normalise[1]).permute(0, 3, 1, 2)
    return {"out": reference(x, weight, scale, shift, None, None, case.problem.ceil_mode)}


def _stem_work(problem: Any) -> Work:
    item = ITEMSIZE[problem.precision]
    work = cost.stem(problem.n, problem.c, (problem.h, problem.w), problem.k, problem.output, itemsize=item)
    saved = problem.n * problem.c * problem.h * problem.w * (item - 1) if problem.uint8 else 0
    return Work(work.activations - saved, work.weights, work.flops)


# --- head


def _head_cases(kernel: ModuleType, layer: Layer | Block, batch: int, precision: str) -> Iterator[Case]:
    if isinstance(layer, Layer) and layer.op == "head":
        _, c, h, w = layer.inputs[0]
        yield Case("head", kernel.Problem(n=batch, h=h, w=w, c=c, k=layer.output[1], precision=precision))


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
    from resnet_fast.ops.head import reference

    arguments: Any = [tensors[name] for name in ("x", "weight", "bias")]
    return {"out": reference(*arguments)}


def _head_work(problem: Any) -> Work:
    return cost.head(
        problem.n, problem.c, (problem.h, problem.w), problem.k, itemsize=ITEMSIZE[problem.precision]
    )  # fmt: skip


# --- bottleneck_tail


def _tail_cases(kernel: ModuleType, layer: Layer | Block, batch: int, precision: str) -> Iterator[Case]:
    """A block with and without the next block's 1x1; which of them is planned depends on the GPU."""
    if not isinstance(layer, Block):
        return
    _, mid, h, w = layer.spatial.inputs[0]
    shortcut = None
    if layer.project is not None:
        _, c, rows, columns = layer.project.inputs[0]
        shortcut = (c, rows, columns, int(layer.project.module.stride[0]))
    for following in {0, 0 if layer.following is None else layer.following.output[1]}:
        problem = kernel.Problem(
            n=batch,
            h=h,
            w=w,
            mid=mid,
            k=layer.expand.output[1],
            stride=int(layer.spatial.module.stride[0]),
            shortcut=shortcut,
            following=following,
            precision=precision,
        )
        yield Case("bottleneck_tail", problem)


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
    from resnet_fast.ops.bottleneck_tail import composed

    return composed(**_tail_arguments(tensors, case.problem))


def _tail_reference(tensors: Tensors, case: Case) -> dict[str, Tensor]:
    from resnet_fast.ops.bottleneck_tail import reference

    problem = case.problem
    y, following = reference(**_tail_arguments(tensors, problem))
    return {"out": y, "out_following": following} if problem.following else {"out": y}


def _tail_work(problem: Any) -> Work:
    shortcut = None
    if problem.shortcut is not None:
        c, h, w, stride = problem.shortcut
        shortcut = (c, (h, w), (stride, stride))
    return cost.bottleneck_tail(
        problem.n, problem.mid, (problem.h, problem.w), problem.k, (problem.stride,) * 2, problem.output,
        shortcut=shortcut, following=problem.following or None, itemsize=ITEMSIZE[problem.precision],
    )  # fmt: skip


_OPS = {
    op.name: op
    for op in (
        Op("conv_bn_act", True, _conv_cases, _conv_tensors, _conv_launch, _conv_reference, _conv_work),
        Op("bottleneck_tail", True, _tail_cases, _tail_tensors, _tail_launch, _tail_reference, _tail_work, _tail_parts),
        Op("stem", True, _stem_cases, _stem_tensors, _stem_launch, _stem_reference, _stem_work),
        Op("head", False, _head_cases, _head_tensors, _head_launch, _head_reference, _head_work),
        Op("add_act", False, _add_cases, _add_tensors, _add_launch, _add_reference, _add_work),
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
    from resnet_fast.ops.stem import cuda_weight

    x, weight = _given(tensors, "x"), _given(tensors, "weight")
    if case.form == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    vectors = (_given(tensors, "scale"), _given(tensors, "shift"), tensors["normalise"])
    return partial(cuda.stem, x, cuda_weight(weight, weight.dtype), *vectors, _given(tensors, "out"), case.problem)


def _cuda_head_launch(kernels: Any, tensors: Tensors, case: Case, config: Any) -> Any:
    x, bias = _given(tensors, "x"), _given(tensors, "bias").float()
    gpu = triton.gpu_of(x.device)
    return partial(cuda.head, x, _given(tensors, "weight"), bias, _given(tensors, "out"), case.problem, gpu)


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
    )
}
