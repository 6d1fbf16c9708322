"""Random convolutions of whole numbers, whose sums are exact: ours, rounded once for bfloat16, must equal torch's.

    python -m tests.ops.cpu.sweep --cases 5000 --seed 1

With RESNET_FAST_ISA in the environment, on that instruction set.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cpu.engine import DTYPES, Problem, _cpu, conv_shape

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 100, 128, 130, 200)
KERNELS = ((1, 1), (1, 1), (3, 3), (3, 3), (1, 7), (7, 1), (5, 3), (7, 7), (2, 2), (5, 5), (1, 3), (4, 1))
MOST = 6_000_000
"""Multiplications of a case."""


def whole(shape: tuple[int, ...], most: int, generator: torch.Generator) -> Tensor:
    """Return whole numbers from -most to most as float32."""
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def problem(random_: random.Random, special: bool = False) -> Problem:
    """Return a random problem. ``special``: with NaN and infinities in some of its tensors."""
    generator = torch.Generator().manual_seed(random_.randrange(2**31))
    while True:
        winograd = random_.random() < 0.4
        kernel = (3, 3) if winograd else random_.choice(KERNELS)
        grouped = not winograd and random_.random() < 0.3
        groups = random_.choice((2, 3, 8, 17, 32)) if grouped else 1
        if grouped:
            c = groups * random_.choice((1, 1, 3, 4, 8, 16))
            k = groups * random_.choice((1, 2, 4, 8, 20))
        else:
            c, k = random_.choice(CHANNELS), random_.choice(CHANNELS)
        stride = (1, 1) if winograd or random_.random() < 0.3 else (random_.randint(1, 3), random_.randint(1, 3))
        dilation = (1, 1) if winograd or random_.random() < 0.7 else (random_.randint(1, 3), random_.randint(1, 3))
        if random_.random() < 0.5:
            padding = (kernel[0] // 2, kernel[1] // 2)
        else:
            padding = (random_.randint(0, 5), random_.randint(0, 5))
        n = random_.choice((1, 1, 1, 2, 3))
        h = random_.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 28, 31, 56))
        w = random_.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 28, 31, 56))
        window = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
        if h + 2 * padding[0] < window[0] or w + 2 * padding[1] < window[1]:
            continue
        bare = Problem(
            torch.empty(n, c, h, w, device="meta"),
            torch.empty(k, c // groups, *kernel, device="meta"),
            torch.empty(k, device="meta"),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        shape = conv_shape(bare)
        if shape[0] * shape[1] * shape[2] * shape[3] * c // groups * kernel[0] * kernel[1] <= MOST:
            break
    x, weight = whole((n, c, h, w), 4, generator), whole((k, c // groups, *kernel), 3, generator)
    bias = whole((k,), 9, generator)
    residual = whole(shape, 50, generator) if random_.random() < 0.5 else None
    name = (
        f"x {tuple(x.shape)} weight {tuple(weight.shape)} stride {stride} padding {padding} dilation {dilation} "
        f"groups {groups}"
    )
    if special:
        for tensor in (x, x, weight, bias, residual):
            if tensor is None or random_.random() < 0.5:
                continue
            flat = tensor.view(-1)
            for _ in range(random_.randint(1, 3)):
                flat[random_.randrange(flat.numel())] = random_.choice((torch.nan, torch.inf, -torch.inf))
        name += " with NaN or infinities"
    return Problem(
        x,
        weight,
        bias,
        residual,
        stride,
        padding,
        dilation,
        groups,
        relu=random_.random() < 0.5,
        residual_after_relu=random_.random() < 0.4,
        name=name,
    )


def exact(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the result, all of whose sums are exact, and whether each of its values is torch's to say.

    None is that where padding meets a weight that is no number: some of torch's kernels multiply the two to NaN, others
    leave padding out, for one layer in one memory format or the other.
    """
    top, left = problem.padding
    around = (left, left, top, top)
    padded = replace(problem, x=F.pad(problem.x, around), padding=(0, 0))
    outside = F.pad(torch.zeros_like(problem.x, dtype=torch.float32), around, value=1.0)
    broken = (~problem.weight.isfinite()).float()
    doubtful = F.conv2d(outside, broken, None, problem.stride, 0, problem.dilation, problem.groups) > 0
    return padded.reference(torch.float64).to(problem.x.dtype), ~doubtful


def check(problem: Problem, algorithm: str, threads: int = 1) -> None:
    """Assert that the engine's result is torch's."""
    ours = problem.run(algorithm, threads)
    theirs, certain = exact(problem)
    assert ours.shape == theirs.shape
    ours, theirs = ours[certain], theirs[certain]
    what = f"{algorithm}, {_cpu.isa()}, {problem.x.dtype}, {threads} threads: {problem.name}"
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = int((test(ours) != test(theirs)).sum())
        assert differs == 0, f"{what}: {name} differs in {differs} of {ours.numel()} places"
    finite = theirs.isfinite()
    ours, theirs = ours[finite].float(), theirs[finite].float()
    error = (ours - theirs).abs()
    allowed = torch.zeros_like(error)
    if algorithm in ("winograd4", "auto"):
        # F(4x4) has fractions that no float32 holds. A number that is wrong is wrong by about 1.
        allowed += 0.005
        if problem.x.dtype is torch.bfloat16:  # the next number, if the sum lies between two
            allowed = torch.maximum(allowed, theirs.abs() * 2**-7)
    assert bool((error <= allowed).all()), f"{what}: error {error.max().item()}"


def sweep(cases: int, seed: int) -> int:
    """Check so many random problems, a third of them with NaN and infinities, every second one in bfloat16.

    Returns:
        The number of runs.
    """
    random_ = random.Random(seed)
    runs = 0
    for case in range(cases):
        each = problem(random_, special=case % 3 == 2).to(DTYPES[case % 2])
        for algorithm in each.algorithms():
            check(each, algorithm, threads=random_.choice((1, 1, 2, 3)))
            runs += 1
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = sweep(given.cases, given.seed)
    print(f"{_cpu.isa()}: {given.cases} problems, {runs} runs, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
