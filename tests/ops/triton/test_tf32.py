"""float32 multiplied as tf32: in every product operands are rounded before the matrix units cut them off.

In the interpreter with products that cut as the units do: one that gets what is not rounded breaks the error rule.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import ops
from resnet_fast.backends import triton
from resnet_fast.roofline.measure import tf32
from tests.numerics import assert_obeys_error_rule
from tests.triton_device import DEVICE, FORMS, kernels

if not triton.missing():
    import triton.language as tl
    from triton import jit

    from resnet_fast.kernels import _language
    from resnet_fast.kernels._language import _nearest_tf32

    @jit
    def _round(x, out, COUNT: tl.constexpr):
        index = tl.arange(0, COUNT)
        tl.store(out + index, _nearest_tf32(tl.load(x + index)))


pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory", "one_thread")]

CASES: dict[str, Callable[[], ops.OpCase]] = {
    **{shape.name: functools.partial(ops.conv_bn_act, shape, 2, "tf32") for shape in ops.SMALL_CONVS[:6]},
    "stem": functools.partial(ops.stem, 33, 2, "tf32", k=24),
    "head": functools.partial(ops.head, 96, 3, 2, "tf32", k=33),
    **{tail.name: functools.partial(ops.bottleneck_tail, tail, 1, "tf32") for tail in ops.SMALL_TAILS},
}


def nearest(x: Tensor) -> Tensor:
    """float32 to tf32 by arithmetic: to nearest, ties away from 0."""
    wide = x.double()
    step = torch.ldexp(torch.ones_like(wide), (torch.frexp(wide).exponent - 11).clamp(min=-136))
    return (torch.sign(wide) * torch.floor(wide.abs() / step + 0.5) * step).float()


class Rounding(TorchFunctionMode):
    """torch's convolutions and products as a GPU computes them in tf32: operands rounded, sums exact."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.conv2d, F.conv2d, F.linear) and args[0].dtype is torch.float32:
            x, weight, *others = args
            wide = [other.double() if isinstance(other, Tensor) else other for other in others]
            return function(nearest(x).double(), nearest(weight).double(), *wide, **(kwargs or {})).float()
        return function(*args, **(kwargs or {}))


def cut(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes the interpreter's tf32 products cut their operands off; given True, kernels round as on a GPU."""

    def switch_on(rounds: bool) -> None:
        from triton._C.libtriton import ir
        from triton.runtime import interpreter

        builder = interpreter.InterpreterBuilder
        dot = builder.create_dot

        def cutting(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
            if input_precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
                a, b = (interpreter.TensorHandle(cut(each.data), each.dtype) for each in (a, b))
            return dot(self, a, b, d, input_precision, *rest)

        monkeypatch.setattr(builder, "create_dot", cutting)
        monkeypatch.setattr(_language, "_ROUNDS_TF32", tl.constexpr(rounds))

    return switch_on


def judged(make: Callable[[], ops.OpCase], form: str) -> None:
    with torch.no_grad():
        case = make()
        data = case.data(0)
        with kernels(form), tf32(True):
            ours = case.contestants["op"](*data)
        with Rounding():
            same = case.contestants["plain"](*data)
        exact = case.exact(*data)
    for one, other, reference in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, same, exact)), strict=True):
        assert_obeys_error_rule(one, other, reference, case.title)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's own tests compare with its own tf32")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_product_gets_rounded_operands(name: str, form: str, matrix_units: Callable[[bool], None]) -> None:
    matrix_units(True)
    judged(CASES[name], form)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no products without the rounding")
@pytest.mark.parametrize("name", ["3x3s1-64to64-14px", "stem", "head", "64to256-9px-s1"])
def test_without_the_rounding_the_rule_is_broken(name: str, matrix_units: Callable[[bool], None]) -> None:
    matrix_units(False)
    with pytest.raises(AssertionError, match="is above the allowed"):
        judged(CASES[name], "h100")


def test_tf32_by_bits(matrix_units: Callable[[bool], None]) -> None:
    """What the kernels' rounding gives for every kind of float; cutting afterwards changes nothing."""
    if DEVICE == "cpu":
        matrix_units(True)
    tiny = 2.0**-149
    special = [0.0, -0.0, 1.0, 1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-23, -1 - 2.0**-11, 1 + 3 * 2.0**-11, tiny, -tiny,
               2.0**-126, 2.0**-137, float("inf"), float("-inf"), 3.4028234e38, -3.4028234e38]  # fmt: skip
    payloads = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF]
    x = torch.cat((torch.tensor(special), torch.tensor(payloads, dtype=torch.int32).view(torch.float32)))
    x = torch.cat((x, torch.randn(128 - len(x)) * torch.logspace(-30, 30, 128 - len(x)))).to(DEVICE)
    out = torch.empty_like(x)
    _round[(1,)](x, out, 128)
    count, out, x = len(special), out.cpu(), x.cpu()
    numbers = torch.cat((x[: count - 4], x[count + len(payloads) :]))
    found = torch.cat((out[: count - 4], out[count + len(payloads) :]))
    torch.testing.assert_close(found, nearest(numbers), rtol=0, atol=0)
    assert np.array_equal(cut(found.numpy()), found.numpy())
    assert out[count - 4 : count].tolist() == [float("inf"), float("-inf")] * 2
    assert out[count : count + len(payloads)].isnan().all()


def test_compiled_kernels_round_by_one_instruction() -> None:
    """The PTX of a convolution, a stem, a head and, for Hopper, a tail."""
    code = """
import sys
from resnet_fast.kernels import gpus
from resnet_fast.tuning import compile as check, ops, shapes
from resnet_fast.tuning.compiler import launches
import triton
from resnet_fast.tuning.compiler import _Driver
for capability, name in list(check.ARCHITECTURES.items())[:2]:
    triton.runtime.driver.set_active(_Driver(capability))
    gpu = gpus.known(name)
    seen = set()
    for case in shapes.problems(["resnet50"], [1], ["fp16", "tf32"], gpu=gpu):
        kernel = ops.get(case.op).kernel
        if not ops.get(case.op).matrix or (case.op, case.problem.precision) in seen:
            continue
        seen.add((case.op, case.problem.precision))
        launch = launches(case, kernel.heuristic(case.problem, gpu))[ops.get(case.op).product]
        ptx = launch.compile().asm["ptx"]
        print(capability, case.op, case.problem.precision, ptx.count("cvt.rna.tf32"), ".tf32.tf32" in ptx)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {"80", "90"} and {row[1] for row in rows} >= {"conv_bn_act", "stem"}
    for _, op, precision, count, units in rows:
        assert (int(count) > 0) == (precision == "tf32") == (units == "True"), (op, precision, count, units)
