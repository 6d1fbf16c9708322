"""Cases of head's kernel: every tile that choose_tile may take, whole and odd channels, in every precision."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from resnet_fast._dtypes import DTYPES
from tests.emulator.cases._tensors import Results, around, case, placed, spoil
from tests.emulator.harness import Case


@dataclass(frozen=True)
class Problem:
    """x is [n, pixels, c]. ``multiprocessors`` decides the tile: few get tiles of many images and outputs.

    ``special`` names the tensor with NaN and infinities: in x they are the first image's, in the weight the first
    output's, so that all the other results are finite. ``framed`` lays NaN around x, the weight and the output, which
    then begin ``offset`` elements into their buffers.
    """

    n: int
    pixels: int
    c: int
    k: int
    bias: bool = True
    multiprocessors: int = 132
    special: str = ""
    framed: bool = False
    offset: int = 64


@functools.cache
def example(problem: Problem, precision: str) -> dict[str, Tensor]:
    """Random tensors."""
    generator = torch.Generator().manual_seed(20)
    n, pixels, c, k, dtype = problem.n, problem.pixels, problem.c, problem.k, DTYPES[precision]
    tensors = {
        "x": (torch.randn(n, pixels, c, generator=generator) + 0.5).to(dtype),
        "weight": (torch.randn(k, c, generator=generator) / max(c, 1) ** 0.5).to(dtype),
        "bias": torch.randn(k, generator=generator),
    }
    if problem.special:
        values = tensors[problem.special][0]
        spoil(values, [i * (values.numel() - 1) // 2 for i in range(3)])
    return tensors


def plain(problem: Problem, t: dict[str, Tensor]) -> Tensor:
    """torch's pool and layer in x's dtype, both rounding."""
    x = t["x"]
    return nn.functional.linear(x.mean(1), t["weight"].to(x.dtype), t["bias"].to(x.dtype) if problem.bias else None)


def run(native: ModuleType, how: str, problem: Problem) -> Results:
    tensors = example(problem, how)
    same_dtype = plain(problem, tensors)
    exact = plain(problem, {name: t.double() for name, t in tensors.items()})

    x, weight, bias = placed(tensors["x"], problem), placed(tensors["weight"], problem), tensors["bias"].clone()
    out = placed(torch.full_like(same_dtype, float("nan")), problem)
    sizes = {name: getattr(problem, name) for name in ("n", "pixels", "c", "k", "multiprocessors")}
    assert native.head_workspace(precision=how, **sizes) == 0
    native.head(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr() if problem.bias else 0,
        out=out.data_ptr(),
        precision=how,
        workspace=0,
        stream=0,
        **sizes,
    )
    yield "out", out, same_dtype, exact
    if problem.framed:
        yield from around("the output", out)


# A step has 32 channels (16 of float32), a slice 64 steps, a tile 1 to 8 images by 16 to 512 outputs.
GEOMETRY = {
    "no image": Problem(0, 49, 8, 10),
    "no output": Problem(3, 4, 8, 0),
    "no channel": Problem(2, 4, 0, 5),
    "no pixel": Problem(2, 0, 8, 5),
    "smallest": Problem(1, 1, 1, 1),
    "1 output": Problem(2, 4, 8, 1, framed=True),
    "7x7": Problem(1, 49, 64, 10, framed=True),
    "7x7, odd": Problem(2, 49, 7, 17, framed=True, offset=3),
    "9x9": Problem(1, 81, 24, 10, bias=False),
    "9 images": Problem(9, 4, 40, 17, framed=True, multiprocessors=1),
    "9 images, odd": Problem(9, 4, 67, 17, framed=True, offset=1, multiprocessors=1),
    "5 images": Problem(5, 3, 48, 33, multiprocessors=2),
    "3 images, no bias": Problem(3, 1, 24, 100, bias=False, multiprocessors=1, framed=True),
    "100 outputs": Problem(1, 4, 72, 100, framed=True),
    "600 outputs": Problem(1, 1, 16, 600, multiprocessors=1),
    "600 outputs, odd": Problem(2, 1, 5, 600, multiprocessors=1),
    "misaligned": Problem(2, 9, 32, 20, framed=True, offset=63),
    "2048 channels": Problem(1, 4, 2048, 17),
    "slices": Problem(2, 1, 2048 + 72, 17, framed=True, multiprocessors=1),
    "slices, odd": Problem(1, 3, 2048 + 35, 16, framed=True, offset=1),
}
SPECIAL = {
    "NaN in x": Problem(3, 4, 24, 20, special="x", multiprocessors=1),
    "NaN in x, odd": Problem(3, 9, 21, 20, special="x", multiprocessors=1),
    "NaN in the weight": Problem(2, 4, 40, 20, special="weight"),
    "NaN in the weight, odd": Problem(2, 4, 35, 20, special="weight", multiprocessors=1),
}


def cases() -> list[Case]:
    made = [case(run, "tf32", "tf32", Problem(2, 4, 24, 10))]
    for precision in ("fp16", "bf16", "fp32"):
        made += [case(run, name, precision, problem) for name, problem in (GEOMETRY | SPECIAL).items()]
    return made
