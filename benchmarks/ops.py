"""The fused ops as cases to judge and to time: shapes, plain torch beside each, and its floor.

Tensors are the examples of the ops' declarations. The single-op benchmarks and the GPU stages take their cases from
here. Nothing here times anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast as rf
from resnet_fast._dtypes import DTYPES
from resnet_fast._random import Random
from resnet_fast.benchmarking.gate import judge
from resnet_fast.kernels.problems import BottleneckTail, ConvBNAct, Head, Stem
from resnet_fast.ops import ALL
from resnet_fast.ops.conv_bn_act import Arguments as Conv
from resnet_fast.roofline import Work, cost
from resnet_fast.tuning import shapes

Result = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class OpCase:
    """One op on one shape.

    Attributes:
        op, name, precision, batch: what it is; ``name`` says the shape.
        data: activations by seed; constants are the same for every seed.
        contestants: who computes it, by "plain" (torch's own layers), "op" (``rf.ops``), "prepared" (the op on
            constants bound beforehand) and "cudnn" (its fused convolution); each takes the activations.
        exact: the float64 answer to activations.
        work: bytes and flops that cannot be avoided.
    """

    op: str
    name: str
    precision: str
    batch: int
    data: Callable[[int], tuple[Tensor, ...]]
    contestants: Mapping[str, Callable[..., Result]]
    exact: Callable[..., Result]
    work: Work

    @property
    def title(self) -> str:
        return f"{self.op} {self.name} {self.precision} batch {self.batch}"

    def judge(self, who: str) -> tuple[float, float, str]:
        """The error of ``who`` relative to the exact answer, what the error rule allows, and why it does not pass
        ("" if it does); the worst of the op's outputs, on the first and last image of large batches."""
        activations = self.data(0)
        picked = list(range(self.batch)) if self.batch <= 4 else [0, self.batch - 1]
        answers = _outputs(self.contestants[who](*activations))
        few = [tensor[picked] for tensor in activations]
        plain, exact = _outputs(self.contestants["plain"](*few)), _outputs(self.exact(*few))
        verdicts = [
            judge(answer[picked].double(), same.cpu(), right.cpu(), DTYPES[self.precision])
            for answer, same, right in zip(answers, plain, exact, strict=True)
        ]
        worst = max(verdicts, key=lambda verdict: (not verdict.passed, verdict.error))
        return worst.error, worst.allowed, worst.reason

    def varies(self, who: str, repeats: int) -> str:
        """Return how many of ``repeats`` answers of ``who`` differ in a bit from the first; "" if none does."""
        activations = self.data(0)
        first = _outputs(self.contestants[who](*activations))
        different = 0
        for _ in range(repeats - 1):
            again = _outputs(self.contestants[who](*activations))
            same = (torch.equal(_bits(a), _bits(b)) for a, b in zip(first, again, strict=True))
            different += not all(same)
        return f"{different} of {repeats} answers have other bits" if different else ""

    def rotation(self, who: str, l2: int) -> tuple[Callable[[], Tensor], int]:
        """``who`` called on one set of activations after the other, and how many: enough that none is still in a
        level-2 cache of ``l2`` bytes when its turn comes again, and at most 200."""
        run = self.contestants[who]
        count = max(2, min(200, -(-2 * l2 // max(1, self.work.activations))))
        sets = [self.data(seed) for seed in range(count)]

        def every() -> Tensor:
            return [_outputs(run(*activations))[0] for activations in sets][-1]

        return every, count


def _bits(tensor: Tensor) -> Tensor:
    """Its bits as integers, among which NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _outputs(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _generator(seed: int, device: str) -> torch.Generator | None:
    return None if device == "meta" else torch.Generator(device).manual_seed(seed)


def _case(
    name: str,
    problem: Any,
    batch: int,
    device: str,
    plain: Callable[[Any], Result],
    cudnn: Callable[[Any], Callable[..., Tensor]] | None = None,
    **form: Any,
) -> OpCase:
    """Return the case of an op's problem.

    Args:
        plain: torch's own layers, of the op's arguments. cudnn: a contestant, made of an example. form: fields of the
            arguments that are not the problem's.
    """
    op, public = ALL[problem.op], getattr(rf.ops, problem.op)

    def example(seed: int) -> Any:
        return op.example(problem, torch.device(device), _generator(seed, device))._replace(**form)

    first = example(1)
    constants = {key: value for key, value in first._asdict().items() if key not in op.data}

    def data(seed: int) -> tuple[Tensor, ...]:
        given = example(10 + seed)
        return tuple(tensor for key in op.data if (tensor := getattr(given, key)) is not None)

    def by(function: Callable[..., Result]) -> Callable[..., Result]:
        return lambda *activations: function(**constants, **dict(zip(op.data, activations, strict=False)))

    def exact(**given: Any) -> Result:
        wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in given.items()}
        return plain(op.arguments(**wide))

    contestants = {
        "plain": by(lambda **given: plain(op.arguments(**given))),
        "op": by(public),
        "prepared": op.bind(**constants, dtype=DTYPES[problem.precision]),
    }
    if cudnn is not None:
        contestants["cudnn"] = cudnn(first)
    return OpCase(op.name, name, problem.precision, batch, data, contestants, by(exact), cost.work(problem))


# --- convolutions


@dataclass(frozen=True)
class ConvShape:
    """One convolution with what follows it, at images of ``size`` x ``size``."""

    c: int
    k: int
    kernel: int
    stride: int
    size: int
    residual: bool = False
    groups: int = 1
    activation: str = "relu"

    @property
    def name(self) -> str:
        shape = f"{self.kernel}x{self.kernel}s{self.stride}-{self.c}to{self.k}-{self.size}px"
        extras = (f"-g{self.groups}" if self.groups > 1 else "", "-residual" if self.residual else "")
        return shape + "".join(extras) + ("" if self.activation == "relu" else f"-{self.activation}")

    def problem(self, batch: int, precision: str) -> ConvBNAct:
        pairs = [(each, each) for each in (self.kernel, self.stride, self.kernel // 2, 1)]
        sizes = (batch, self.size, self.size, self.c, self.k)
        return ConvBNAct(*sizes, *pairs, self.groups, precision, self.residual)


def conv_shapes(arch: str, image_size: int = 224) -> tuple[ConvShape, ...]:
    """The different convolutions of a network behind its stem, in their order, read off the graph of the model."""
    cases = shapes.problems([arch], [1], ["fp32"], image_size)
    found = ((case.form, case.problem) for case in cases if case.op == "conv_bn_act" and case.form != "backward")
    return tuple(
        dict.fromkeys(
            ConvShape(of.c, of.k, of.kernel[0], of.stride[0], of.h, of.residual, of.groups, form) for form, of in found
        )
    )


def _plain_conv(a: Conv) -> Tensor:
    """torch's layers for the same: convolution, batch norm, addition, ReLU."""
    zero, one = torch.zeros_like(a.scale), torch.ones_like(a.scale)
    y = torch.conv2d(a.x, a.weight, None, *a.geometry)
    y = F.batch_norm(y, zero, one, a.scale, a.shift, eps=1e-30)  # torch 2.11 refuses 0
    if a.residual is not None:
        y = y + a.residual
    return F.relu(y, inplace=True) if a.activation == "relu" else y


def _cudnn_conv(a: Conv) -> Callable[..., Tensor]:
    """cuDNN's convolution with bias, residual and ReLU in its epilogue; the scale is folded into the weight before."""
    folded = (a.weight.float() * a.scale.view(-1, 1, 1, 1)).to(a.weight.dtype)
    folded, bias, geometry = folded.contiguous(memory_format=torch.channels_last), a.shift.to(folded.dtype), a.geometry

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if a.activation != "relu":
            y = torch.conv2d(x, folded, bias, *geometry)
            return y if residual is None else y + residual
        if residual is None:
            return torch.cudnn_convolution_relu(x, folded, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, folded, residual, 1.0, bias, *geometry)

    return run


def conv_bn_act(shape: ConvShape, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``conv_bn_act`` on one convolution of a network."""
    problem = shape.problem(batch, precision)
    return _case(shape.name, problem, batch, device, _plain_conv, _cudnn_conv, activation=shape.activation)


# --- the others


def add_act(channels: int, size: int, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``add_act`` on two tensors of a network."""
    dtype, shape = DTYPES[precision], (batch, channels, size, size)

    def data(seed: int) -> tuple[Tensor, ...]:
        draw = Random(torch.device(device), dtype, _generator(10 + seed, device))
        return draw.image(*shape), draw.image(*shape)

    return OpCase(
        "add_act", f"{channels}-{size}px", precision, batch, data,
        contestants={"plain": lambda x, y: torch.relu_(x + y), "op": rf.ops.add_act},
        exact=lambda x, y: torch.relu(x.double() + y.double()),
        work=cost.add_act(batch * channels * size * size, itemsize=dtype.itemsize),
    )  # fmt: skip


def batch_norm_act(channels: int, size: int, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``batch_norm_act`` in training, with residual and ReLU: its result, and every gradient for one of the result's.

    Of a whole batch alone: the statistics of some of its images are others.
    """
    dtype = DTYPES[precision]
    gamma, beta = Random(torch.device(device), dtype, _generator(1, device)).scale_and_shift(channels)
    elements = batch * channels * size * size

    def data(seed: int) -> tuple[Tensor, ...]:
        draw = Random(torch.device(device), dtype, _generator(10 + seed, device))
        return tuple(draw.image(batch, channels, size, size) for _ in range(3))

    def run(function: Callable[..., Tensor], x: Tensor, residual: Tensor, grad: Tensor) -> Result:
        given = [tensor.detach().requires_grad_() for tensor in (x, residual, gamma.to(grad), beta.to(grad))]
        if x.dtype is not torch.float64:
            given[2:] = [tensor.detach().requires_grad_() for tensor in (gamma, beta)]
        with torch.enable_grad():
            y = function(*given)
        found = torch.autograd.grad(y, given, grad)
        return y.detach(), *found[:2], *(vector.expand(batch, channels) for vector in found[2:])

    def plain(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, gamma, beta, True) + residual)

    return OpCase(
        "batch_norm_act", f"{channels}-{size}px", precision, batch, data,
        contestants={
            "plain": functools.partial(run, plain),
            "op": functools.partial(
                run, lambda x, residual, gamma, beta: rf.ops.batch_norm_act(
                    x, gamma, beta, residual=residual, training=True
                ),
            ),
        },
        exact=lambda *given: run(plain, *(tensor.double() for tensor in given)),
        work=Work(12 * elements * dtype.itemsize, 0, 20 * elements),
    )  # fmt: skip


def stem(size: int, batch: int, precision: str, device: str = "cpu", *, k: int = 64) -> OpCase:
    """``stem`` on float images of three channels, with padded pooling."""

    def conv(a: Any) -> Conv:
        return Conv(a.x, a.weight, a.scale, a.shift, stride=(2, 2), padding=(3, 3))

    def plain(a: Any) -> Tensor:
        return F.max_pool2d(_plain_conv(conv(a)), 3, 2, 1)

    def cudnn(a: Any) -> Callable[..., Tensor]:
        run = _cudnn_conv(conv(a))
        return lambda x: F.max_pool2d(run(x), 3, 2, 1)

    return _case(f"{size}px", Stem(batch, size, size, 3, k, False, False, precision), batch, device, plain, cudnn)


def head(channels: int, size: int, batch: int, precision: str, device: str = "cpu", *, k: int = 1000) -> OpCase:
    """``head`` on a network's last features."""

    def plain(a: Any) -> Tensor:
        return F.linear(F.adaptive_avg_pool2d(a.x, 1).flatten(1), a.weight, a.bias)

    return _case(f"{channels}-{size}px", Head(batch, size, size, channels, k, precision), batch, device, plain)


@dataclass(frozen=True)
class TailShape:
    """A bottleneck from its 3x3 on: ``mid`` channels at ``size`` x ``size``, ``k`` out of it, with the projection of
    ``shortcut`` channels or a plain residual, and ``following`` channels of the next block's 1x1 or none."""

    mid: int
    k: int
    size: int
    stride: int = 1
    shortcut: int = 0
    following: int = 0

    @property
    def name(self) -> str:
        extras = (
            f"-projected{self.shortcut}" if self.shortcut else "",
            f"-next{self.following}" if self.following else "",
        )
        return f"{self.mid}to{self.k}-{self.size}px-s{self.stride}" + "".join(extras)

    def problem(self, batch: int, precision: str) -> BottleneckTail:
        shortcut = (self.shortcut, self.size, self.size, self.stride) if self.shortcut else None
        sizes = (batch, self.size, self.size, self.mid, self.k)
        return BottleneckTail(*sizes, self.stride, shortcut, self.following, precision)


def bottleneck_tail(shape: TailShape, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``bottleneck_tail`` on one block of a network."""

    def plain(a: Any) -> Result:
        project = a.project(a.residual)
        shortcut = a.residual if project is None else _plain_conv(project)
        y = _plain_conv(a.expand(_plain_conv(a.spatial()), shortcut))
        following = a.following(y)
        return y if following is None else (y, _plain_conv(following))

    return _case(shape.name, shape.problem(batch, precision), batch, device, plain)


# --- which are looked at

TAILS = (
    TailShape(64, 256, 56, shortcut=64, following=64),
    TailShape(64, 256, 56, following=64),
    TailShape(64, 256, 56, following=128),
    TailShape(128, 512, 56, stride=2, shortcut=256, following=128),
    TailShape(128, 512, 28, following=128),
    TailShape(256, 1024, 28, stride=2, shortcut=512, following=256),
    TailShape(256, 1024, 14, following=256),
)
"""ResNet-50's blocks, those that a fused kernel can pay for."""

SMALL_CONVS = (
    ConvShape(16, 32, 1, 1, 7, residual=True),
    ConvShape(64, 64, 3, 1, 14),
    ConvShape(32, 64, 3, 2, 14),
    ConvShape(64, 128, 1, 2, 13, activation="none"),
    ConvShape(64, 64, 3, 1, 9, groups=8),
    ConvShape(17, 13, 3, 1, 11, residual=True),
    ConvShape(3, 16, 7, 2, 33),
)
SMALL_TAILS = (
    TailShape(16, 64, 7, following=16),
    TailShape(64, 256, 14, shortcut=64, following=64),
    TailShape(32, 128, 14, stride=2, shortcut=64, following=32),
    TailShape(64, 256, 9),
)


def op_of(make: Callable[[], OpCase]) -> str:
    """Return the name of the op that one of the functions of ``small`` and ``full`` makes a case of."""
    return str(make.func.__name__)  # type: ignore[attr-defined]


def small(precision: str, device: str) -> tuple[Callable[[], OpCase], ...]:
    """Return every op at small shapes that meet every form of every kernel; batch 3."""
    given = (3, precision, device)
    return (
        *(functools.partial(conv_bn_act, shape, *given) for shape in SMALL_CONVS),
        functools.partial(add_act, 17, 9, *given),
        functools.partial(add_act, 256, 14, *given),
        functools.partial(batch_norm_act, 17, 9, *given),
        functools.partial(batch_norm_act, 256, 14, *given),
        functools.partial(stem, 61, *given),
        functools.partial(stem, 64, *given, k=24),
        functools.partial(head, 512, 7, *given),
        functools.partial(head, 17, 3, *given, k=13),
        *(functools.partial(bottleneck_tail, tail, *given) for tail in SMALL_TAILS),
    )


def full(precision: str, batch: int, device: str) -> tuple[Callable[[], OpCase], ...]:
    """Every op at ResNet-50's shapes, the memory-bound ones first; made one at a time, since they fill memory. Of
    batch_norm_act, which only training runs, the large batches in bfloat16."""
    given = (batch, precision, device)
    convolutions = conv_shapes("resnet50")
    norms = dict.fromkeys((shape.k, shape.problem(batch, precision).output[0]) for shape in convolutions)
    trained = norms if precision == "bf16" and batch >= 32 else ()
    return (
        functools.partial(add_act, 256, 56, *given),
        functools.partial(add_act, 2048, 7, *given),
        *(functools.partial(bottleneck_tail, tail, *given) for tail in TAILS),
        *(functools.partial(conv_bn_act, shape, *given) for shape in convolutions),
        *(functools.partial(batch_norm_act, *norm, *given) for norm in trained),
        functools.partial(stem, 224, *given),
        functools.partial(head, 2048, 7, *given),
    )
