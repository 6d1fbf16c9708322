"""Cases of stem's kernels: both tiles and both squares in every precision, every way an image may lie in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from resnet_fast._dtypes import DTYPES
from resnet_fast.kernels.problems import Stem
from tests.emulator.cases._tensors import Results, around, case, framed, rounded_to_tf32, spoil
from tests.emulator.harness import Case
from tests.numerics import conv2d_in_order

PRECISIONS = ("fp16", "bf16", "tf32")
MEAN, STD = [0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]


@dataclass(frozen=True)
class Problem:
    """``layout`` is how x lies in memory; planar and interleaved ones of an even width are read two values at once.

    ``special`` puts NaN and infinities into x at these fractions of it; all images are NaN but one in ``finite_every``,
    which takes the emulator little time; ``framed`` lays NaN around x and the output,
    which then begins ``offset`` elements into its buffer.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    ceil_mode: bool = False
    layout: str = "planar"
    image_bytes: bool = False
    special: tuple[float, ...] = ()
    finite_every: int = 1
    framed: bool = False
    offset: int = 64

    def asked(self, precision: str) -> Stem:
        """What the kernel is asked to compute."""
        return Stem(self.n, self.h, self.w, self.c, self.k, self.image_bytes, self.ceil_mode, precision)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x, [N, C, H, W], with other strides."""
    if layout == "planar":
        return x.contiguous()
    if layout == "interleaved":
        return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, _interleaved_strides(x))
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "sliced"  # every second value of every direction
    wide = torch.zeros([2 * size for size in x.shape], dtype=x.dtype)
    wide[::2, ::2, ::2, ::2] = x
    return wide[::2, ::2, ::2, ::2]


def _interleaved_strides(x: Tensor) -> list[int]:
    _, c, h, w = x.shape
    return [h * w * c, 1, w * c, c]


def kernel_weight(weight: Tensor) -> Tensor:
    """[K, C, 7, 7] as the kernel reads it: [K, 4, 4, 16]."""
    k, c = weight.shape[:2]
    packed = torch.zeros(k, 4, 4, 16, dtype=weight.dtype)
    for r in range(7):
        for s in range(7):
            first = ((r + 1) % 2 * 2 + (s + 1) % 2) * c
            packed[:, (r + 1) // 2, (s + 1) // 2, first : first + c] = weight[:, :, r, s]
    return packed


def plain(problem: Problem, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The layers of torch in x's dtype; [N, P, Q, K]."""
    conv2d = nn.functional.conv2d if x.dtype is torch.float64 else conv2d_in_order
    y = conv2d(x, weight, None, (2, 2), (3, 3))
    y = nn.functional.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 1e-30)
    y = nn.functional.max_pool2d(y.relu(), 3, 2, 0 if problem.ceil_mode else 1, ceil_mode=problem.ceil_mode)
    return y.permute(0, 2, 3, 1).contiguous()


@functools.cache
def example(problem: Problem, precision: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Random tensors (x: [N, C, H, W]), plain torch's result for them, and the exact one."""
    generator = torch.Generator().manual_seed(20)
    dtype = DTYPES[precision]
    c, k = problem.c, problem.k
    shape = (problem.n, c, problem.h, problem.w)
    weight = (torch.randn(k, c, 7, 7, generator=generator) / (49 * c) ** 0.5).to(dtype)
    scale = torch.randn(k, generator=generator)
    shift = torch.randn(k, generator=generator) + 1
    if problem.image_bytes:
        x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        mean, std = (torch.tensor(values[:c], dtype=torch.float64).view(c, 1, 1) for values in (MEAN, STD))
        exact_x = (x.double() / 255 - mean) / std
    else:
        x = torch.randn(*shape, generator=generator).to(dtype)
        spoil(x, [int(fraction * (x.numel() - 1)) for fraction in problem.special])
        x[torch.arange(problem.n) % problem.finite_every != 0] = float("nan")
        exact_x = x.double()
    operands = exact_x.to(dtype), weight
    if precision == "tf32":
        operands = rounded_to_tf32(operands[0]), rounded_to_tf32(weight)
    same_dtype = plain(problem, *operands, scale, shift)
    exact = plain(problem, exact_x, weight.double(), scale.double(), shift.double())
    return {"x": x, "weight": kernel_weight(weight), "scale": scale, "shift": shift}, same_dtype, exact


def run(native: ModuleType, how: str, problem: Problem) -> Results:
    tensors, same_dtype, exact = example(problem, how)
    used = {name: t.clone() for name, t in tensors.items()}  # each ends its allocation
    x = laid_out(used["x"], problem.layout)
    out = torch.full_like(same_dtype, float("nan"))
    if problem.framed:
        x, out = framed(x, problem.offset), framed(out, problem.offset)
    c, asked = problem.c, problem.asked(how)
    normalisation = torch.tensor(
        [[1 / (255 * s) for s in STD[:c]], [-m / s for m, s in zip(MEAN, STD, strict=True)][:c]]
    )
    native.stem(
        x=x.data_ptr(),
        **dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True)),
        bytes=problem.image_bytes,
        normalisation=normalisation.data_ptr() if problem.image_bytes else 0,
        **{name: used[name].data_ptr() for name in ("weight", "scale", "shift")},
        out=out.data_ptr(),
        **{name: getattr(problem, name) for name in ("n", "c", "h", "w", "k", "ceil_mode")},
        **dict(zip(("conv_h", "conv_w"), asked.convolved, strict=True)),
        **dict(zip(("pooled_h", "pooled_w"), asked.output, strict=True)),
        precision=how,
        stream=0,
    )
    yield how, out, same_dtype, exact
    if problem.framed:
        yield from around("the output", out)


GEOMETRY = {
    # Output channels: whole packs, of one block that is not full; odd ones; two blocks.
    "planar": Problem(1, 3, 12, 30, 24, framed=True),
    "planar, odd width": Problem(1, 3, 13, 29, 20, framed=True, offset=63),
    "planar, misaligned": Problem(1, 3, 12, 14, 5, framed=True, offset=63),
    "interleaved": Problem(2, 3, 14, 10, 72, layout="interleaved", framed=True),
    "interleaved, odd width": Problem(1, 3, 7, 9, 64, layout="interleaved", framed=True),
    "transposed": Problem(1, 3, 10, 12, 8, layout="transposed"),
    "sliced": Problem(1, 3, 9, 12, 8, layout="sliced"),
    "bytes interleaved": Problem(1, 3, 11, 14, 16, layout="interleaved", image_bytes=True, framed=True),
    "bytes interleaved, odd width": Problem(2, 3, 11, 13, 9, layout="interleaved", image_bytes=True),
    "bytes planar": Problem(1, 3, 10, 14, 8, image_bytes=True),
    "ceil": Problem(1, 3, 15, 38, 24, ceil_mode=True, framed=True),
    "ceil, odd": Problem(1, 3, 17, 9, 7, ceil_mode=True),
    "smallest": Problem(3, 3, 1, 1, 3),
    "smallest ceil": Problem(1, 3, 5, 5, 8, ceil_mode=True),
    "one pixel wide": Problem(1, 3, 37, 1, 4),
    "1 channel": Problem(1, 1, 13, 18, 12, framed=True),
    "2 channels": Problem(1, 2, 10, 9, 8, layout="interleaved", framed=True, ceil_mode=True),
    "4 channels": Problem(2, 4, 12, 19, 65, framed=True),
    "4 channels interleaved": Problem(1, 4, 9, 33, 16, layout="interleaved"),
    "4 channels of bytes": Problem(1, 4, 9, 12, 8, layout="interleaved", image_bytes=True),
    "2 channels of bytes": Problem(1, 2, 9, 12, 8, layout="interleaved", image_bytes=True),
    "1 channel of bytes": Problem(1, 1, 9, 12, 8, image_bytes=True),
}
SPECIAL = {
    "NaN": Problem(1, 4, 13, 29, 6, special=(0.0, 0.5, 1.0), framed=True),
    "NaN in a corner": Problem(1, 4, 30, 41, 8, special=(0.0,)),
    "NaN, ceil": Problem(2, 4, 16, 15, 5, ceil_mode=True, special=(0.3, 0.4, 0.9), framed=True),
    "NaN of 3 channels": Problem(1, 3, 13, 30, 10, special=(0.2, 0.6, 0.99)),
    "NaN of 2 channels": Problem(1, 2, 14, 11, 66, special=(0.1, 0.7)),
}
# Enough blocks for the larger tile, hence dear: in every precision one of three channels and one of four.
MANY = {
    "many, four tiles": Problem(64, 3, 33, 34, 8, layout="interleaved", finite_every=63),
    "many, NaN": Problem(256, 4, 5, 6, 4, special=(0.0, 0.002), finite_every=255),
}
MANY_FP16 = {"many": Problem(256, 3, 28, 32, 8, finite_every=200)}
MANY_NOT_BF16 = {"many, 4 channels": Problem(86, 4, 61, 29, 8, ceil_mode=True, finite_every=85)}


def cases() -> list[Case]:
    made = []
    for precision in PRECISIONS:
        for name, problem in (GEOMETRY | SPECIAL | MANY).items():
            made.append(case(run, name, precision, problem))
        if precision == "fp16":
            made += [case(run, name, precision, problem) for name, problem in MANY_FP16.items()]
        if precision != "bf16":
            made += [case(run, name, precision, problem) for name, problem in MANY_NOT_BF16.items()]
    return made
