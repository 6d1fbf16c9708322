"""Cases of add_act's kernels, both ways: lengths around whole packs and blocks, every alignment, in place."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from resnet_fast._dtypes import DTYPES
from tests.emulator.cases._tensors import Results, around, case, framed
from tests.emulator.harness import Case

SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0)


@dataclass(frozen=True)
class Problem:
    """``out`` names the operand that the output overwrites, ``misaligned`` the tensors that begin one element late.

    With ``special`` the operands are all pairs of NaN, infinities and zeros, then values whose sum is too large, and
    small ones.
    """

    count: int
    out: str = "out"
    misaligned: tuple[str, ...] = ()
    special: bool = False


@functools.cache
def example(problem: Problem, precision: str) -> tuple[Tensor, Tensor]:
    """Two random vectors, of which the second has an eighth of exact zeros."""
    generator = torch.Generator().manual_seed(20)
    dtype = DTYPES[precision]
    x, y = torch.randn(2, problem.count, generator=generator)
    y[torch.rand(problem.count, generator=generator) < 0.125] = 0
    x, y = x.to(dtype), y.to(dtype)
    if problem.special:
        most, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
        pairs = [(a, b) for a in SPECIAL for b in SPECIAL] + [(most, most), (-most, -most), (tiny / 2, tiny / 4)]
        x[: len(pairs)], y[: len(pairs)] = torch.tensor(pairs, dtype=torch.float64).to(dtype).T
        x[-len(pairs) :], y[-len(pairs) :] = x[: len(pairs)], y[: len(pairs)]  # behind the last whole pack too
    return x, y


def forward(x: Tensor, y: Tensor, relu: bool) -> Tensor:
    return (x + y).relu() if relu else x + y


def open_gradient(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, output, 0)


def run(native: ModuleType, how: str, problem: Problem) -> Results:
    operands = example(problem, how)
    wide = operands[0].double(), operands[1].double()

    def placed(t: Tensor, name: str) -> Tensor:
        """What is written lies in NaN, what is only read ends its allocation."""
        offset = 1 if name in problem.misaligned else 0
        if name == problem.out:
            return framed(t, 64 + offset)
        return torch.cat([torch.full((offset,), float("nan"), dtype=t.dtype), t])[offset:]

    def launched(what: str, first: str, second: str, **flags: bool) -> Tensor:
        """The launcher called on the operands under its names for them."""
        x, y = placed(operands[0], "x"), placed(operands[1], "y")
        out = {"x": x, "y": y}.get(problem.out)
        if out is None:
            out = placed(torch.full_like(x, float("nan")), "out")
        pointers = {first: x.data_ptr(), second: y.data_ptr(), "out": out.data_ptr()}
        getattr(native, what)(**pointers, count=problem.count, precision=how, **flags, stream=0)
        return out

    results = {
        "relu": (launched("add_act", "x", "y", relu=True), forward(*operands, True), forward(*wide, True)),
        "sum": (launched("add_act", "x", "y", relu=False), forward(*operands, False), forward(*wide, False)),
        "gradient": (
            launched("add_act_backward", "grad", "output"),
            open_gradient(*operands),
            open_gradient(*wide),
        ),
    }
    for name, (ours, same_dtype, exact) in results.items():
        yield name, ours, same_dtype, exact
        yield from around(name, ours)


# A pack has 8 values (4 of float32), a block 512 packs.
GEOMETRY = {
    "nothing": Problem(0),
    "one": Problem(1),
    "less than a pack": Problem(3),
    "a pack": Problem(8),
    "a pack and a rest": Problem(15),
    "half a block": Problem(2048),
    "a block": Problem(4096),
    "a block and a rest": Problem(4096 + 7),
    "blocks": Problem(9000),
    "x misaligned": Problem(1537, misaligned=("x",)),
    "y misaligned": Problem(1024, misaligned=("y",)),
    "out misaligned": Problem(515, misaligned=("out",)),
    "all misaligned": Problem(1030, misaligned=("x", "y", "out")),
    "out is x": Problem(4096 + 13, out="x"),
    "out is y": Problem(333, out="y"),
    "out is x, misaligned": Problem(777, out="x", misaligned=("x",)),
    "special": Problem(67, special=True),
    "special, out is y": Problem(63, out="y", special=True),
    "special, misaligned": Problem(61, misaligned=("y",), special=True),
}


def cases() -> list[Case]:
    made = [case(run, "tf32", "tf32", Problem(77))]
    for precision in ("fp16", "bf16", "fp32"):
        made += [case(run, name, precision, problem) for name, problem in GEOMETRY.items()]
    return made
