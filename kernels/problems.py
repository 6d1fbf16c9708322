"""What each op's kernels are asked to compute, as plain data: the part of a launch choice that the caller knows.

Triton's and CUDA's kernels are chosen for the same problems and tables name them by the same keys. It imports no
triton, and no choice is made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class ConvBNAct:
    """What a launch choice may depend on: x [n, c, h, w], weight [k, c / groups, r, s], precision, residual or not."""

    op: ClassVar[str] = "conv_bn_act"
    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    precision: str
    residual: bool

    #: No field: whether x is normalised on its way in, which only ``ConvStatistics`` may have.
    normalised = False

    @property
    def output(self) -> tuple[int, int]:
        """P and Q."""
        p, q = (
            (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, pad, dilation in zip(
                (self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return p, q

    @property
    def pixels(self) -> int:
        """N * P * Q, the rows of the product."""
        return self.n * self.output[0] * self.output[1]

    def key(self) -> str:
        """Return the problem as tables name it."""
        pairs = (f"{name}{a}x{b}" for name, (a, b) in (("s", self.stride), ("p", self.padding), ("d", self.dilation)))
        shape = f"n{self.n} {self.h}x{self.w} c{self.c} k{self.k} {self.kernel[0]}x{self.kernel[1]}"
        return f"{self.precision} {shape} {' '.join(pairs)} g{self.groups}{' residual' if self.residual else ''}"


@dataclass(frozen=True)
class ConvStatistics(ConvBNAct):
    """A convolution alone (``residual`` is False) that leaves the moments of its output.

    Attributes:
        normalised: whether it is of ``relu(norm(x))``, computed while x is read.
    """

    op: ClassVar[str] = "conv_statistics"
    normalised: bool = False

    def key(self) -> str:
        """Return the problem as tables name it."""
        return f"{super().key()}{' normalised' if self.normalised else ''}"


@dataclass(frozen=True)
class ConvInt8(ConvBNAct):
    """A convolution of uint8 with an int8 weight; ``precision`` is "int8".

    Attributes:
        out: the dtype of the output and the residual: "uint8", or "fp16", "bf16" or "fp32".
        shifted: whether x's zero point is not 0, so that padding is not the byte 0.
    """

    op: ClassVar[str] = "conv_int8"
    out: str = "uint8"
    shifted: bool = False

    @property
    def out_itemsize(self) -> int:
        """Bytes of an element of the output and of the residual."""
        return {"uint8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}[self.out]

    def key(self) -> str:
        """Return the problem as tables name it."""
        return f"{super().key()} {self.out}{' shifted' if self.shifted else ''}"


@dataclass(frozen=True)
class ConvFp8(ConvInt8):
    """A convolution of float8 with a float8 weight; ``precision`` is "fp8". It is never shifted."""

    op: ClassVar[str] = "conv_fp8"
    out: str = "fp8"


@dataclass(frozen=True)
class Stem:
    """What a launch choice may depend on: x [n, c, h, w] or uint8 [n, h, w, c], k channels out, the pool's form."""

    op: ClassVar[str] = "stem"
    n: int
    h: int
    w: int
    c: int
    k: int
    uint8: bool
    ceil_mode: bool
    precision: str

    @property
    def convolved(self) -> tuple[int, int]:
        """The convolution's output size, never stored."""
        return (self.h - 1) // 2 + 1, (self.w - 1) // 2 + 1

    @property
    def output(self) -> tuple[int, int]:
        """P and Q: padded by 1, or Caffe's unpadded windows with the size rounded up."""
        p, q = ((size - 2) // 2 + 1 if self.ceil_mode else (size - 1) // 2 + 1 for size in self.convolved)
        return p, q

    def key(self) -> str:
        """Return the problem as tables name it."""
        pixels = "uint8 " if self.uint8 else ""
        pool = " ceil" if self.ceil_mode else ""
        return f"{self.precision} {pixels}n{self.n} {self.h}x{self.w} c{self.c} k{self.k}{pool}"


@dataclass(frozen=True)
class BottleneckTail:
    """What a launch choice may depend on.

    Attributes:
        n, h, w, mid: of a, the 3x3's input. k: channels of the output. stride: of the 3x3.
        shortcut: (c, h, w, stride) of the projection's input, None for a plain residual.
        following: output channels of the next block's 1x1, 0 without one.
    """

    op: ClassVar[str] = "bottleneck_tail"
    n: int
    h: int
    w: int
    mid: int
    k: int
    stride: int
    shortcut: tuple[int, int, int, int] | None
    following: int
    precision: str

    @property
    def output(self) -> tuple[int, int]:
        """P and Q."""
        return (self.h - 1) // self.stride + 1, (self.w - 1) // self.stride + 1

    @property
    def pixels(self) -> int:
        """N * P * Q."""
        return self.n * self.output[0] * self.output[1]

    def key(self) -> str:
        """Return the problem as tables name it."""
        parts = [self.precision, f"n{self.n} {self.h}x{self.w} mid{self.mid} k{self.k} s{self.stride}"]
        if self.shortcut is not None:
            c, h, w, stride = self.shortcut
            parts.append(f"shortcut c{c} {h}x{w} s{stride}")
        if self.following:
            parts.append(f"following{self.following}")
        return " ".join(parts)


@dataclass(frozen=True)
class Head:
    """What a launch choice may depend on: x [n, c, h, w], weight [k, c], and how is multiplied."""

    op: ClassVar[str] = "head"
    n: int
    h: int
    w: int
    c: int
    k: int
    precision: str

    def key(self) -> str:
        """Return the problem as tables name it."""
        return f"{self.precision} n{self.n} {self.h}x{self.w} c{self.c} k{self.k}"


@dataclass(frozen=True)
class AddAct:
    """What a launch choice may depend on: how many elements, of which precision. Forward and backward are alike."""

    op: ClassVar[str] = "add_act"
    length: int
    precision: str

    def key(self) -> str:
        """Return the problem as tables name it; tf32 and fp32 differ in products only, and here is none."""
        return f"{'fp32' if self.precision == 'tf32' else self.precision} {self.length}"


@dataclass(frozen=True)
class BatchNormAct:
    """What a launch choice may depend on: x as a matrix [rows, c] with rows = N H W, its precision, and which pass.

    Attributes:
        step: "statistics", "apply", "reduce" or "backward".
        relu: whether reduce and backward read the output, to see where the ReLU was open; no matter to the others.
        residual: whether apply adds one, or backward writes its gradient.
    """

    op: ClassVar[str] = "batch_norm_act"
    rows: int
    c: int
    precision: str
    step: str
    relu: bool = False
    residual: bool = False

    def key(self) -> str:
        """Return the problem as tables name it; tf32 and fp32 differ in products only, and here is none."""
        precision = "fp32" if self.precision == "tf32" else self.precision
        read = f"{' relu' if self.relu else ''}{' residual' if self.residual else ''}"
        return f"{precision} {self.step} {self.rows}x{self.c}{read}"


Problem = ConvBNAct | BottleneckTail | Stem | Head | AddAct | BatchNormAct

#: The problems of the ops whose kernels are tuned, by the op's name. The last two run in training only.
OPS = {
    problem.op: problem
    for problem in (ConvBNAct, BottleneckTail, Stem, Head, AddAct, ConvInt8, ConvFp8, BatchNormAct, ConvStatistics)
}
