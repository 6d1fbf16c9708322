"""Cases of conv_bn_act's kernels for capability 8.0 and up: every tile and precision, every geometry on one tile."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from resnet_fast._dtypes import DTYPES
from tests.emulator.cases._tensors import Results, asserted, case, placed, rounded_to_tf32, spoil
from tests.emulator.harness import Case
from tests.numerics import conv2d_in_order

HALF_TILES = (
    "128x128x32_4", "256x64x32_4", "128x64x32_4", "64x128x32_4", "64x64x64_4", "64x32x64_4", "32x64x64_4",
    "128x32x64_3", "128x16x64_3",
)  # fmt: skip
FLOAT_TILES = (
    "128x128x16_5", "128x64x16_5", "64x128x16_5", "64x64x32_4", "64x32x32_4", "32x64x32_4", "128x32x32_3",
    "128x16x32_3",
)  # fmt: skip
MASKED_TILES = ("masked_64x64x32", "masked_64x16x32")
TILES = {name: (FLOAT_TILES if name == "tf32" else HALF_TILES) + MASKED_TILES for name in ("fp16", "bf16", "tf32")}


@dataclass(frozen=True)
class Problem:
    """``padding`` is (top, bottom, left, right); ``residual`` none, before or after the activation.

    ``special`` names the tensor that holds NaN and infinities; ``framed`` lays NaN around every tensor, which then
    begins ``offset`` elements into its buffer.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: str = "none"
    relu: bool = True
    special: str = ""
    framed: bool = False
    offset: int = 64

    @property
    def p(self) -> int:
        return (self.h + sum(self.padding[:2]) - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        return (self.w + sum(self.padding[2:]) - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1


def conv(problem: Problem, x: Tensor, weight: Tensor) -> Tensor:
    """torch's convolution of NHWC and KRSC tensors, of zeros where the image is padded."""
    if problem.c == 0:  # torch gives a result without channels
        return x.new_zeros(problem.n, problem.k, problem.p, problem.q)
    top, bottom, left, right = problem.padding
    x = nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    w = weight.permute(0, 3, 1, 2)
    conv2d = nn.functional.conv2d if x.dtype is torch.float64 else conv2d_in_order
    return conv2d(x, w, None, problem.stride, (0, 0), problem.dilation, problem.groups)


def plain(problem: Problem, tensors: dict[str, Tensor], precision: str) -> Tensor:
    """The layers of torch in the dtype, each rounding; ``precision`` "exact" is float64, without rounding."""
    exact = precision == "exact"
    x, weight, scale, shift, residual = (
        t.double() if exact else t for t in (tensors[name] for name in ("x", "weight", "scale", "shift", "residual"))
    )
    if precision == "tf32":
        x, weight = rounded_to_tf32(x), rounded_to_tf32(weight)
    y = conv(problem, x, weight)
    y = nn.functional.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 1e-30)
    y = y.permute(0, 2, 3, 1)
    if problem.residual == "before":
        y = y + residual
    if problem.relu:
        y = nn.functional.relu(y)
    if problem.residual == "after":
        y = y + residual
    return y.contiguous()


@functools.cache
def example(problem: Problem, precision: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Random tensors, plain torch's result for them, and the exact one."""
    generator = torch.Generator().manual_seed(20)
    dtype = DTYPES[precision]
    group_c = problem.c // problem.groups
    fan_in = max(1, problem.r * problem.s * group_c)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "x": normal(problem.n, problem.h, problem.w, problem.c).to(dtype),
        "weight": (normal(problem.k, problem.r, problem.s, group_c) / fan_in**0.5).to(dtype),
        "scale": torch.rand(problem.k, generator=generator) + 0.5,
        "shift": normal(problem.k),
        "residual": normal(problem.n, problem.p, problem.q, problem.k).to(dtype),
    }
    if problem.special:
        values = tensors[problem.special]
        spoil(values, [(2 * i + 1) * values.numel() // 7 for i in range(3)])
    return tensors, plain(problem, tensors, precision), plain(problem, tensors, "exact")


def run(native: ModuleType, how: str, problem: Problem) -> Results:
    kernel, precision = how, how.split("_")[1]
    tensors, same_dtype, exact = example(problem, precision)
    used = {name: placed(t, problem) for name, t in tensors.items()}
    out = torch.full_like(same_dtype, float("nan"))
    arguments = {
        "kernel": kernel,
        **{name: t.data_ptr() for name, t in used.items()},
        "out": out.data_ptr(),
        **{name: getattr(problem, name) for name in ("n", "h", "w", "c", "k", "r", "s", "p", "q", "groups", "relu")},
        **{"stride_h": problem.stride[0], "stride_w": problem.stride[1]},
        **{"pad_h": problem.padding[0], "pad_w": problem.padding[2]},
        **{"dilation_h": problem.dilation[0], "dilation_w": problem.dilation[1]},
        "precision": precision,
        "residual_after_activation": problem.residual == "after",
        "workspace": 0,
    }
    if problem.residual == "none":
        arguments["residual"] = 0
    assert native.conv_bn_act_unsupported(**arguments) == ""
    assert native.conv_bn_act_workspace(**arguments) == 0
    native.conv_bn_act(**arguments, stream=0)
    yield kernel, out, same_dtype, exact


def every_kernel_has_a_case(native: ModuleType) -> Results:
    built = {kernel["name"] for kernel in native.conv_bn_act_kernels() if kernel["name"].startswith("sm80_")}
    assert built == {f"sm80_{precision}_{tile}" for precision, tiles in TILES.items() for tile in tiles}
    yield from asserted("kernels")


def refusals(native: ModuleType) -> Results:
    """What the vector kernel says of problems that are not its own; the masked one takes them all."""
    fields = {
        **{"x": 64, "weight": 64, "scale": 4, "shift": 4, "residual": 0, "out": 64, "n": 1, "h": 8, "w": 8, "c": 64},
        **{"k": 64, "r": 3, "s": 3, "p": 8, "q": 8, "stride_h": 1, "stride_w": 1, "pad_h": 1, "pad_w": 1},
        **{"dilation_h": 1, "dilation_w": 1, "groups": 1, "precision": "fp16", "relu": True},
        **{"residual_after_activation": False, "workspace": 0},
    }
    for change, words in (
        ({}, ""),
        ({"c": 60}, "60 input channels in a group; it needs a multiple of 8"),
        ({"c": 0}, "0 input channels in a group; it needs a multiple of 8"),
        ({"groups": 16}, "4 input channels in a group; it needs a multiple of 8"),
        ({"k": 1001}, "1001 output channels in a group; it needs a multiple of 8"),
        ({"r": 16}, "a window of 16x3; it takes up to 15 each way"),
        ({"residual": 40}, "a tensor that is not aligned to 16 bytes"),
        ({"n": 1 << 24, "p": 64, "q": 64, "h": 1, "w": 1}, "2^31 output pixels or more"),
        ({"n": 1 << 24, "h": 64, "w": 64}, "x or weight has 16 GiB or more"),
    ):
        problem = fields | change
        assert native.conv_bn_act_unsupported("sm80_fp16_64x64x64_4", **problem) == words, change
        assert native.conv_bn_act_unsupported("sm80_fp16_masked_64x64x32", **problem) == "", change
    other = native.conv_bn_act_unsupported("sm80_bf16_64x64x64_4", **fields)
    assert other == "it computes bf16, the problem is in fp16"
    for nothing in ({"n": 0}, {"p": 0}, {"k": 0}):  # nothing is launched: those pointers are none
        native.conv_bn_act("sm80_fp16_64x64x64_4", **fields | nothing, stream=0)
        native.conv_bn_act("sm80_fp16_masked_64x64x32", **fields | nothing, stream=0)
    yield from asserted("refusals")


VECTOR_GEOMETRY = {
    "1x1": Problem(3, 64, 7, 7, 64, 1, 1),
    "1x1 one pixel": Problem(1, 8, 1, 1, 8, 1, 1),
    "1x1 stride 2": Problem(1, 16, 13, 29, 24, 1, 1, stride=(2, 2)),
    "1x1 padded": Problem(1, 8, 3, 4, 8, 1, 1, padding=(1, 2, 0, 1)),
    "1x1 cropped": Problem(2, 8, 4, 4, 8, 1, 1, stride=(3, 3), residual="before"),
    "3x3": Problem(2, 24, 7, 7, 24, 3, 3, padding=(1, 1, 1, 1), framed=True),
    "3x3 stride 2": Problem(1, 8, 13, 29, 64, 3, 3, stride=(2, 2), padding=(1, 1, 1, 1), residual="after"),
    "3x3 strides 3, 1": Problem(1, 16, 13, 9, 8, 3, 3, stride=(3, 1), padding=(0, 2, 1, 0), relu=False),
    "3x3 dilated": Problem(1, 8, 9, 11, 8, 3, 3, padding=(2, 2, 0, 3), dilation=(2, 3), framed=True),
    "3x1 and far padding": Problem(1, 8, 2, 3, 8, 3, 1, padding=(4, 4, 3, 3)),
    "7x7": Problem(1, 8, 13, 29, 16, 7, 7, stride=(2, 2), padding=(3, 3, 3, 3)),
    "1x15": Problem(1, 8, 2, 9, 8, 1, 15, padding=(0, 0, 7, 7)),
    "15x1": Problem(1, 8, 9, 2, 8, 15, 1, padding=(7, 7, 0, 0)),
    "groups 2": Problem(1, 48, 5, 6, 16, 3, 3, padding=(1, 1, 1, 1), groups=2, residual="before", framed=True),
    "groups 4": Problem(2, 32, 7, 7, 96, 1, 1, groups=4),
    "groups 32": Problem(1, 256, 3, 4, 256, 3, 3, padding=(1, 1, 1, 1), groups=32),
    "depth of ten steps": Problem(1, 128, 3, 5, 8, 3, 3, padding=(1, 1, 1, 1)),
    "before, no relu": Problem(3, 64, 5, 5, 64, 1, 1, residual="before", relu=False),
    "after": Problem(3, 64, 5, 5, 72, 1, 1, residual="after", framed=True),
    "after, no relu": Problem(1, 64, 5, 5, 64, 1, 1, residual="after", relu=False),
    "NaN in x": Problem(1, 16, 7, 7, 24, 3, 3, padding=(1, 1, 1, 1), special="x"),
    "NaN in x of groups": Problem(1, 16, 7, 7, 16, 1, 1, groups=2, special="x"),
    "NaN in weight": Problem(1, 16, 7, 7, 24, 3, 3, special="weight", residual="after"),
    "NaN in residual": Problem(1, 16, 7, 7, 24, 1, 1, special="residual", residual="before"),
    "NaN in residual after": Problem(1, 16, 7, 7, 24, 1, 1, special="residual", residual="after"),
}

MASKED_GEOMETRY = {
    "one channel": Problem(3, 1, 7, 7, 8, 3, 3, padding=(1, 1, 1, 1), framed=True, offset=1),
    "stem": Problem(1, 3, 13, 29, 64, 7, 7, stride=(2, 2), padding=(3, 3, 3, 3)),
    "17 channels": Problem(2, 17, 7, 7, 17, 3, 3, padding=(1, 1, 1, 1), residual="before", framed=True, offset=3),
    "130 channels": Problem(1, 24, 7, 7, 130, 1, 1, stride=(3, 3), residual="after"),
    "1x1 one pixel": Problem(1, 64, 1, 1, 17, 1, 1),
    "1x1 strides 1, 2": Problem(1, 8, 13, 29, 17, 1, 1, stride=(1, 2), residual="before", relu=False),
    "dilated": Problem(1, 5, 9, 11, 10, 3, 3, stride=(1, 2), padding=(2, 1, 0, 3), dilation=(2, 3), groups=5),
    "16x17": Problem(1, 2, 17, 18, 3, 16, 17),
    "groups 4": Problem(2, 12, 7, 7, 20, 3, 3, padding=(1, 1, 1, 1), groups=4, framed=True),
    "groups 32": Problem(1, 128, 3, 4, 128, 3, 3, padding=(1, 1, 1, 1), groups=32),
    "depthwise": Problem(1, 33, 7, 7, 33, 3, 3, stride=(2, 2), padding=(1, 1, 1, 1), groups=33, residual="after"),
    "no channels": Problem(1, 0, 2, 2, 3, 1, 1),
    "NaN in x": Problem(1, 6, 7, 7, 6, 3, 3, padding=(1, 1, 1, 1), groups=2, special="x"),
    "NaN in weight": Problem(1, 3, 7, 7, 5, 3, 3, special="weight", residual="before"),
    "NaN in residual": Problem(1, 3, 7, 7, 5, 1, 1, special="residual", residual="after"),
}


def cases() -> list[Case]:
    made = [Case("every kernel has a case", every_kernel_has_a_case), Case("refusals", refusals)]
    for precision, tiles in TILES.items():
        for tile in tiles:
            # More channels than a tile has, a last step that is not full, two tiles of pixels except in the largest.
            kernel = f"sm80_{precision}_{tile}"
            made.append(
                case(run, "tile", kernel, Problem(1, 24, 5, 29, 136, 3, 3, padding=(1, 1, 1, 1), residual="before"))
            )
            made.append(case(run, "tile, no residual", kernel, Problem(2, 72, 7, 7, 24, 1, 1, framed=True)))
    for name, problem in VECTOR_GEOMETRY.items():
        made.append(case(run, name, "sm80_fp16_64x32x64_4", problem))
        made.append(case(run, name, "sm80_tf32_32x64x32_4", problem))
    # Not bfloat16: torch's own convolution of groups carries NaN from one group to others there.
    for name, problem in MASKED_GEOMETRY.items():
        made.append(case(run, name, "sm80_fp16_masked_64x16x32", problem))
        made.append(case(run, name, "sm80_tf32_masked_64x64x32", problem))
    return made
