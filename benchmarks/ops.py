"""The fused ops as cases to judge and to time: shapes, seeded data, plain torch beside each, and its floor.

The single-op benchmarks and the GPU stages take their cases from here. Nothing here times anything.
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
from resnet_fast.benchmarking.gate import judge
from resnet_fast.ops import ALL
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

    def rotation(self, who: str, l2: int) -> tuple[Callable[[], Tensor], int]:
        """``who`` called on one set of activations after the other, and how many: enough that none is still in a
        level-2 cache of ``l2`` bytes when its turn comes again, and at most 200."""
        run = self.contestants[who]
        count = max(2, min(200, -(-2 * l2 // max(1, self.work.activations))))
        sets = [self.data(seed) for seed in range(count)]

        def every() -> Tensor:
            return [_outputs(run(*activations))[0] for activations in sets][-1]

        return every, count


def _outputs(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def noise(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Seeded noise of mean 0 and variance 1, channels_last if it has four dimensions; on "meta" without values."""
    if device == "meta":
        made = torch.empty(shape, dtype=dtype, device="meta")
    else:
        made = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


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

    @property
    def output(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1


def conv_shapes(arch: str, image_size: int = 224) -> tuple[ConvShape, ...]:
    """The different convolutions of a network behind its stem, in their order, read off the graph of the model."""
    cases = shapes.problems([arch], [1], ["fp32"], image_size)
    found = ((case.form, case.problem) for case in cases if case.op == "conv_bn_act" and case.form != "backward")
    return tuple(
        dict.fromkeys(
            ConvShape(of.c, of.k, of.kernel[0], of.stride[0], of.h, of.residual, of.groups, form) for form, of in found
        )
    )


def _constants(c: int, k: int, kernel: int, *, groups: int, seed: int, dtype: torch.dtype, device: str) -> Any:
    """weight, scale, shift that keep the variance."""
    weight = noise(k, c // groups, kernel, kernel, seed=seed, dtype=torch.float32, device=device)
    weight = (weight / (c // groups * kernel**2) ** 0.5).to(dtype)
    scale = noise(k, seed=seed + 1, dtype=torch.float32, device=device).abs() + 0.5
    return weight, scale, noise(k, seed=seed + 2, dtype=torch.float32, device=device)


def _plain_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    **how: Any,
) -> Tensor:
    """torch's layers for the same: convolution, batch norm, addition, ReLU."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    y = F.batch_norm(F.conv2d(x, weight, **how), zero, one, scale, shift, eps=1e-30)  # torch 2.11 refuses 0
    if residual is not None:
        y = y + residual
    return F.relu(y, inplace=True) if relu else y


def _cudnn_conv(weight: Tensor, scale: Tensor, shift: Tensor, relu: bool, **how: Any) -> Callable[..., Tensor]:
    """cuDNN's convolution with bias, residual and ReLU in its epilogue; the scale is folded into the weight before."""
    folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(weight.dtype).contiguous(memory_format=torch.channels_last)
    bias, given = shift.to(weight.dtype), (how["stride"], how["padding"], (1, 1), how.get("groups", 1))

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not relu:
            y = torch.conv2d(x, folded, bias, *given)
            return y if residual is None else y + residual
        if residual is None:
            return torch.cudnn_convolution_relu(x, folded, bias, *given)
        return torch.cudnn_convolution_add_relu(x, folded, residual, 1.0, bias, *given)

    return run


def conv_bn_act(shape: ConvShape, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``conv_bn_act`` on one convolution of a network."""
    dtype, relu = DTYPES[precision], shape.activation == "relu"
    constants = _constants(
        shape.c, shape.k, shape.kernel, groups=shape.groups, seed=1, dtype=dtype, device=device
    )  # fmt: skip
    wide = tuple(tensor.double() for tensor in constants)
    how: dict[str, Any] = {
        "stride": (shape.stride,) * 2, "padding": (shape.kernel // 2,) * 2, "groups": shape.groups
    }  # fmt: skip
    fixed = ALL["conv_bn_act"].bind(*constants, **how, activation=shape.activation, dtype=dtype)

    def data(seed: int) -> tuple[Tensor, ...]:
        made = [noise(batch, shape.c, shape.size, shape.size, seed=10 + seed, dtype=dtype, device=device)]
        if shape.residual:
            size = shape.output
            made.append(noise(batch, shape.k, size, size, seed=1000 + seed, dtype=dtype, device=device))
        return tuple(made)

    return OpCase(
        "conv_bn_act", shape.name, precision, batch, data,
        contestants={
            "plain": lambda x, residual=None: _plain_conv(x, *constants, residual, relu, **how),
            "op": lambda x, residual=None: rf.ops.conv_bn_act(
                x, *constants, residual, activation=shape.activation, **how
            ),
            "prepared": fixed,
            "cudnn": _cudnn_conv(*constants, relu, **how),
        },
        exact=lambda x, residual=None: _plain_conv(
            x.double(), *wide, None if residual is None else residual.double(), relu, **how
        ),
        work=cost.conv(
            batch, shape.c, (shape.size,) * 2, shape.k, (shape.kernel,) * 2, how["stride"], (shape.output,) * 2,
            groups=shape.groups, residual=shape.residual, itemsize=dtype.itemsize,
        ),
    )  # fmt: skip


# --- the others


def add_act(channels: int, size: int, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``add_act`` on two tensors of a network."""
    dtype = DTYPES[precision]

    def data(seed: int) -> tuple[Tensor, ...]:
        return tuple(
            noise(batch, channels, size, size, seed=first + seed, dtype=dtype, device=device) for first in (10, 1000)
        )

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
    gamma = noise(channels, seed=1, dtype=torch.float32, device=device).abs() + 0.5
    beta = noise(channels, seed=2, dtype=torch.float32, device=device)
    elements = batch * channels * size * size

    def data(seed: int) -> tuple[Tensor, ...]:
        shape = (batch, channels, size, size)
        return tuple(noise(*shape, seed=first + seed, dtype=dtype, device=device) for first in (10, 1000, 2000))

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
    dtype = DTYPES[precision]
    constants = _constants(3, k, 7, groups=1, seed=1, dtype=dtype, device=device)
    wide = tuple(tensor.double() for tensor in constants)

    def plain(x: Tensor, *given: Tensor) -> Tensor:
        return F.max_pool2d(_plain_conv(x, *given, stride=2, padding=3), 3, 2, 1)

    pooled, conv = ((size - 1) // 2) // 2 + 1, _cudnn_conv(*constants, True, stride=(2, 2), padding=(3, 3))
    return OpCase(
        "stem", f"{size}px", precision, batch,
        data=lambda seed: (noise(batch, 3, size, size, seed=10 + seed, dtype=dtype, device=device),),
        contestants={
            "plain": lambda x: plain(x, *constants),
            "op": lambda x: rf.ops.stem(x, *constants),
            "prepared": ALL["stem"].bind(*constants, dtype=dtype),
            "cudnn": lambda x: F.max_pool2d(conv(x), 3, 2, 1),
        },
        exact=lambda x: plain(x.double(), *wide),
        work=cost.stem(batch, 3, (size, size), k, (pooled, pooled), itemsize=dtype.itemsize),
    )  # fmt: skip


def head(channels: int, size: int, batch: int, precision: str, device: str = "cpu", *, k: int = 1000) -> OpCase:
    """``head`` on a network's last features."""
    dtype = DTYPES[precision]
    weight = (noise(k, channels, seed=1, dtype=torch.float32, device=device) / channels**0.5).to(dtype)
    bias = noise(k, seed=2, dtype=dtype, device=device)

    def plain(x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), matrix, offset)

    return OpCase(
        "head", f"{channels}-{size}px", precision, batch,
        data=lambda seed: (noise(batch, channels, size, size, seed=10 + seed, dtype=dtype, device=device),),
        contestants={
            "plain": lambda x: plain(x, weight, bias),
            "op": lambda x: rf.ops.head(x, weight, bias),
            "prepared": ALL["head"].bind(weight, bias, dtype=dtype),
        },
        exact=lambda x: plain(x.double(), weight.double(), bias.double()),
        work=cost.head(batch, channels, (size, size), k, itemsize=dtype.itemsize),
    )  # fmt: skip


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

    @property
    def output(self) -> int:
        return (self.size - 1) // self.stride + 1


def bottleneck_tail(shape: TailShape, batch: int, precision: str, device: str = "cpu") -> OpCase:
    """``bottleneck_tail`` on one block of a network."""
    dtype = DTYPES[precision]

    def constants(c: int, k: int, kernel: int, seed: int) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = _constants(c, k, kernel, groups=1, seed=seed, dtype=dtype, device=device)
        return made

    nothing: tuple[None, None, None] = (None, None, None)
    spatial, expand = constants(shape.mid, shape.mid, 3, 1), constants(shape.mid, shape.k, 1, 4)
    project = constants(shape.shortcut, shape.k, 1, 7) if shape.shortcut else nothing
    following = constants(shape.k, shape.following, 1, 10) if shape.following else nothing
    how: dict[str, Any] = {
        "stride": (shape.stride,) * 2,
        "shortcut_stride": (shape.stride,) * 2 if shape.shortcut else (1, 1),
    }
    fixed = ALL["bottleneck_tail"].bind(*spatial, *expand, *project, *following, **how, dtype=dtype)

    def plain(a: Tensor, residual: Tensor, wide: bool) -> Result:
        def cast(given: Any) -> Any:
            return tuple(tensor.double() for tensor in given) if wide else given

        shortcut = residual
        if shape.shortcut:
            shortcut = _plain_conv(residual, *cast(project), None, False, stride=shape.stride)
        b = _plain_conv(a, *cast(spatial), stride=shape.stride, padding=1)
        y = _plain_conv(b, *cast(expand), shortcut)
        return (y, _plain_conv(y, *cast(following))) if shape.following else y

    def data(seed: int) -> tuple[Tensor, ...]:
        # Behind a ReLU, as in the network.
        a = noise(batch, shape.mid, shape.size, shape.size, seed=20 + seed, dtype=dtype, device=device).relu()
        size, channels = (shape.size, shape.shortcut) if shape.shortcut else (shape.output, shape.k)
        return a, noise(batch, channels, size, size, seed=1000 + seed, dtype=dtype, device=device).relu()

    return OpCase(
        "bottleneck_tail", shape.name, precision, batch, data,
        contestants={
            "plain": lambda a, residual: plain(a, residual, False),
            "op": lambda a, residual: rf.ops.bottleneck_tail(
                a, *spatial, *expand, residual, *project, *following, **how
            ),
            "prepared": fixed,
        },
        exact=lambda a, residual: plain(a.double(), residual.double(), True),
        work=cost.bottleneck_tail(
            batch, shape.mid, (shape.size,) * 2, shape.k, how["stride"], (shape.output,) * 2,
            shortcut=(shape.shortcut, (shape.size,) * 2, how["stride"]) if shape.shortcut else None,
            following=shape.following or None, itemsize=dtype.itemsize,
        ),
    )  # fmt: skip


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
    norms = dict.fromkeys((shape.k, shape.output) for shape in convolutions)
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
