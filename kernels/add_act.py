"""add_act: relu(x + y) and its gradient, one pass over memory each; kernels and launch.

Floor: 3 passes over the tensor (two read, one written), forward and backward alike; no arithmetic to speak of.
All tensors of a launch hold their elements in one and the same dense order, so the kernels see flat vectors.

Trap: a mask costs the wide accesses unless the length is known to be a multiple of their width, so only the last
program masks; all others read and write 16 bytes at a time, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from . import _tables
from ._language import relu, rounded, wait_for_earlier_kernels
from ._launch import ITEMSIZE, WIDE_FROM, Launch, cdiv
from .gpus import GPU
from .problems import AddAct as Problem

NAME = "add_act"


@triton.jit
def _act(x, y, RELU: tl.constexpr):
    z = x.to(tl.float32) + y.to(tl.float32)
    if RELU:
        z = relu(z)
    return z


@triton.jit
def _open(grad, output):
    """grad where the ReLU was open; NaN is not <= 0, so its gradient passes, as in torch."""
    return tl.where(output.to(tl.float32) <= 0.0, 0.0, grad.to(tl.float32))


@triton.jit(do_not_specialize=["LENGTH"])
def _forward(x, y, out, LENGTH, RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_earlier_kernels()
    pid = tl.program_id(0)
    start = (pid.to(tl.int64) if WIDE else pid) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start <= LENGTH - BLOCK:
        z = _act(tl.load(x + at), tl.load(y + at), RELU)
        tl.store(out + at, rounded(z, out.dtype.element_ty))
    else:
        mask = at < LENGTH
        z = _act(tl.load(x + at, mask=mask, other=0.0), tl.load(y + at, mask=mask, other=0.0), RELU)
        tl.store(out + at, rounded(z, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["LENGTH"])
def _backward(grad, output, out, LENGTH, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_earlier_kernels()
    pid = tl.program_id(0)
    start = (pid.to(tl.int64) if WIDE else pid) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start <= LENGTH - BLOCK:
        g = _open(tl.load(grad + at), tl.load(output + at))
        tl.store(out + at, rounded(g, out.dtype.element_ty))
    else:
        mask = at < LENGTH
        g = _open(tl.load(grad + at, mask=mask, other=0.0), tl.load(output + at, mask=mask, other=0.0))
        tl.store(out + at, rounded(g, out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """A launch choice: elements per program, and warps."""

    block: int
    num_warps: int

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory: none, every element stays with its thread."""
        return 0


def _vector(problem: Problem) -> int:
    """Elements in a 16-byte access."""
    return 16 // ITEMSIZE[problem.precision]


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """Four warps with two 16-byte accesses per thread and tensor; one access where that leaves multiprocessors idle."""
    once = 4 * 32 * _vector(problem)
    twice = 2 * once
    return Config(twice if cdiv(problem.length, twice) >= 2 * gpu.multiprocessors else once, 4)


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: one to four 16-byte accesses per thread and tensor, four or eight warps."""
    for num_warps in (4, 8):
        for accesses in (1, 2, 4):
            yield Config(num_warps * 32 * _vector(problem) * accesses, num_warps)


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one, else the heuristic's."""
    return _tables.measured(NAME, problem.key(), gpu.name, Config) or heuristic(problem, gpu)


def _wide(problem: Problem, config: Config) -> bool:
    """Return whether an offset, masked ones of the last program included, may not fit in 32 bits."""
    return problem.length > WIDE_FROM - config.block


def launch(x: Any, y: Any, out: Any, problem: Problem, config: Config, *, activation: str = "relu") -> Launch:
    """Return the launch that fills ``out`` with ``act(x + y)``.

    Args:
        x, y, out: tensors of one shape, dtype and strides, without gaps between elements. ``out`` may be x or y.
    """
    options = {
        "RELU": activation == "relu",
        "WIDE": _wide(problem, config),
        "BLOCK": config.block,
        "num_warps": config.num_warps,
    }
    return Launch(_forward, (cdiv(problem.length, config.block),), (x, y, out, problem.length), options)


def launch_backward(grad: Any, output: Any, out: Any, problem: Problem, config: Config) -> Launch:
    """The launch that fills ``out`` with ``grad`` where not ``output`` <= 0, else 0; tensors as for :func:`launch`."""
    options = {"WIDE": _wide(problem, config), "BLOCK": config.block, "num_warps": config.num_warps}
    return Launch(_backward, (cdiv(problem.length, config.block),), (grad, output, out, problem.length), options)
