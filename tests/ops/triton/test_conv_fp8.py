"""conv_fp8: its Triton kernels, all forms, against float64 by the error rule; how it saturates; how Hopper adds."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast._dtypes import FLOAT8, narrowed
from resnet_fast.kernels import gpus
from resnet_fast.kernels.problems import ConvFp8 as Problem
from tests.numerics import unit_roundoff
from tests.triton_device import DEVICE, FORMS, kernels

conv_fp8 = importlib.import_module("resnet_fast.ops.conv_fp8")  # whose name is a function's in ops, too
OP, Arguments, reference = conv_fp8.OP, conv_fp8.Arguments, conv_fp8.reference

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

H100, A100 = gpus.known("h100"), gpus.known("a100")
ADA = dataclasses.replace(A100, capability=89)
PLAIN = Problem(2, 9, 7, 32, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1, "fp8", residual=False)
POINTWISE = dataclasses.replace(PLAIN, kernel=(1, 1), padding=(0, 0))
NAN = float("nan")


def example(problem: Problem, **changes: Any) -> Any:
    return OP.example(problem, torch.device("cpu"), torch.Generator().manual_seed(7))._replace(**changes)


def exact(a: Any) -> Tensor:
    """The result in float64, not rounded and not saturated."""
    scale, shift = (each.double().view(1, -1, 1, 1) for each in (a.scale, a.shift))
    y = torch.conv2d(a.x.double(), a.weight.double(), None, a.stride, a.padding, a.dilation) * scale + shift
    added = 0.0 if a.residual is None else a.residual.double() * a.residual_scale
    y = y if a.residual_after_activation else y + added
    y = y.relu() if a.activation == "relu" else y
    return y + added if a.residual_after_activation else y


def plain(a: Any) -> Tensor:
    """Plain torch in float32 on the dequantized values, rounded once."""
    b = a._replace(x=a.x.float(), weight=a.weight.float())
    y = torch.conv2d(b.x, b.weight, None, a.stride, a.padding, a.dilation) * a.scale.view(1, -1, 1, 1)
    y = y + a.shift.view(1, -1, 1, 1)
    added = 0.0 if a.residual is None else a.residual.float() * a.residual_scale
    y = y if a.residual_after_activation else y + added
    y = y.relu() if a.activation == "relu" else y
    y = y + added if a.residual_after_activation else y
    return narrowed(y, conv_fp8.OUTPUTS[a.out])


def obeys(found: Tensor, a: Any) -> None:
    """The error rule; every element within one rounding and what float32 loses; NaN exactly where torch has it."""
    wanted, right, roundoff = plain(a).double(), exact(a), unit_roundoff(found.dtype)
    if a.out == "fp8":
        right = right.clamp(-448, 448)
    assert torch.equal(found.isnan(), wanted.isnan())
    finite = right.isfinite() & wanted.isfinite()
    error, plains = ((each.double() - right)[finite] for each in (found, wanted))
    assert error.norm() <= 2 * plains.norm() + roundoff * right[finite].norm(), (a[4:], error.norm(), plains.norm())
    # Below 2**-6 float8 has steps of 2**-9.
    least = 2.0**-10 if a.out == "fp8" else 0.0
    size = right[finite].abs()
    assert (error.abs() <= 1.001 * roundoff * size + least + 1e-5 * (1 + size)).all(), (a[4:], error.abs().max())


def check(a: Any, form: str) -> Tensor:
    with kernels(form) if form != "ada" else _ada():
        found = OP.run(a._make(value.to(DEVICE) if isinstance(value, Tensor) else value for value in a)).cpu()
    assert found.dtype is conv_fp8.OUTPUTS[a.out] and found.is_contiguous(memory_format=torch.channels_last)
    obeys(found, a)
    return found


class _ada:
    """A GPU without a copy engine that multiplies float8."""

    def __enter__(self) -> None:
        self._inside = [backends.triton.assume(ADA), backends.use("triton")]
        for each in self._inside:
            each.__enter__()

    def __exit__(self, *given: Any) -> None:
        for each in reversed(self._inside):
            each.__exit__(*given)


GPUS = FORMS if DEVICE == "cuda" else ["h100", "ada"]


@pytest.fixture(params=GPUS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"h": 8, "w": 8, "stride": (2, 2)},
        {"stride": (2, 1)},
        {"dilation": (2, 2), "padding": (2, 2)},
        {"kernel": (2, 3), "padding": (0, 1)},
        {"c": 5, "k": 3, "n": 1},
        {"kernel": (1, 1), "padding": (0, 0), "c": 256, "n": 3, "residual": True},
        {"kernel": (1, 1), "padding": (1, 1), "residual": True},
        {"n": 3, "h": 1, "w": 1, "residual": True},
        {"c": 160, "k": 80, "n": 1, "h": 4, "w": 5, "residual": True},
    ],
)
def test_shapes(changes: dict[str, Any], form: str) -> None:
    check(example(dataclasses.replace(PLAIN, **changes)), form)


@pytest.mark.parametrize("out", list(conv_fp8.OUTPUTS))
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("where", ["none", "before", "after"])
def test_what_is_stored(out: str, activation: str, where: str, form: str) -> None:
    a = example(dataclasses.replace(POINTWISE, n=1, out=out, residual=where != "none"))
    found = check(a._replace(activation=activation, residual_after_activation=where == "after"), form)
    assert len(found.float().unique()) > 20


def test_empty_batches(form: str) -> None:
    assert check(example(dataclasses.replace(PLAIN, n=0)), form).shape == (0, 48, 9, 7)


def one_product(values: Tensor, out: str = "fp8", shift: float = 0.0, residual: Tensor | None = None) -> Any:
    """``values`` [n] as shifts of channels, so that each comes out as itself."""
    x = torch.zeros(1, 32, 1, 1).to(FLOAT8)
    weight = torch.zeros(len(values), 32, 1, 1).to(FLOAT8)
    return Arguments(x, weight, torch.ones(len(values)), values.float(), out, residual, activation="none")


def test_every_float32_between_two_of_float8_is_rounded_as_torch_rounds(form: str) -> None:
    """All 254 numbers, the middles between them, and what is just beside those; saturating at both ends."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([middles, torch.nextafter(middles, middles * 2), torch.nextafter(middles, middles * 0)])
    ends = torch.tensor([448.1, 463.9, 464.0, 464.1, 480.0, 512.0, 1e30, float("inf"), 2.0**-10, 1e-30])
    values = torch.cat([numbers, beside, ends])
    values = torch.cat([values, -values, torch.tensor([NAN])])
    values = torch.cat([values, torch.zeros(-len(values) % 16)])
    found = check(one_product(values), form).flatten()
    wanted = values.clamp(-448, 448).to(FLOAT8)
    same = (found.view(torch.uint8) & 127 == wanted.view(torch.uint8) & 127) | (found.float() == wanted.float())
    assert same.all(), (values[~same], found[~same].float(), wanted[~same].float())
    assert found.float().nan_to_num().abs().max() == 448 and found.isnan().sum() == 1


def test_nan_and_infinity_in_what_is_read(form: str) -> None:
    """NaN of x, of a weight and of a residual, infinity of a residual in half precision."""
    a = example(dataclasses.replace(PLAIN, n=1, residual=True), activation="none")
    x, residual = a.x.float(), a.residual.float()
    x[0, 3, 2, 1], residual[0, 5, 8, 6] = NAN, NAN
    found = check(a._replace(x=x.to(FLOAT8), residual=residual.to(FLOAT8)), form)
    assert found[0, :, 2, 1].isnan().all() and found[0, 5, 8, 6].isnan() and not found[0, 0, 8, 6].isnan()
    weight = a.weight.float()
    weight[7, 0, 1, 1] = NAN
    assert check(a._replace(weight=weight.to(FLOAT8)), form)[0, 7].isnan().all()
    half = example(dataclasses.replace(PLAIN, n=1, residual=True, out="fp16"))
    half.residual[0, 1, 1, 1] = float("inf")
    assert check(half, form)[0, 1, 1, 1] == float("inf")


def test_the_largest_products(form: str) -> None:
    """Sums of 288 products of 448 by 448, and all subnormal numbers."""
    x, weight = torch.full((1, 32, 3, 3), 448.0).to(FLOAT8), torch.full((16, 32, 3, 3), -448.0).to(FLOAT8)
    a = Arguments(x, weight, torch.ones(16), torch.zeros(16), "fp32", activation="none")
    assert check(a, form).unique().tolist() == [-448.0 * 448 * 288]
    small = torch.arange(8, dtype=torch.uint8).view(FLOAT8).float().view(1, 8, 1, 1).repeat(1, 4, 1, 1)
    a = Arguments(small.to(FLOAT8), torch.ones(16, 32, 1, 1).to(FLOAT8), torch.ones(16), torch.zeros(16), "fp32")
    assert check(a, form).unique().tolist() == [4 * 28 * 2.0**-9]


@pytest.mark.parametrize("problem", [PLAIN, dataclasses.replace(POINTWISE, c=64, residual=True)])
def test_every_place_in_a_batch_has_the_same_bits(problem: Problem, form: str) -> None:
    alone = example(dataclasses.replace(problem, n=1))
    several = alone._replace(
        x=alone.x.expand(5, -1, -1, -1),
        residual=None if alone.residual is None else alone.residual.expand(5, -1, -1, -1),
    )
    first, rest = check(alone, form), check(several, form)
    for image in rest:
        assert torch.equal(image.view(torch.uint8), first[0].view(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "tile", "name"),
    [
        ({"kernel": (1, 1), "padding": (0, 0), "c": 64, "k": 80}, (64, 64, 64), "_resident"),
        ({"kernel": (1, 1), "padding": (0, 0), "c": 256, "k": 144}, (64, 64, 256), "_resident"),
        ({"kernel": (1, 1), "padding": (0, 0), "c": 96}, (64, 64, 32), "_boxes"),
        ({"h": 10, "w": 6, "stride": (2, 2)}, (16, 64, 32), "_boxes"),
        ({"n": 11, "h": 5, "w": 5, "k": 144}, (128, 128, 32), "_boxes"),
    ],
)
@pytest.mark.parametrize("programs", [1, 5])
def test_programs_that_take_tiles_in_turn(
    changes: dict[str, Any], tile: tuple[int, int, int], name: str, programs: int
) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_fp8")
    problem = dataclasses.replace(PLAIN, **changes, residual=True)
    config = kernel.Config(*tile, 8, 3, True, programs)
    if not kernel.takes(config, problem, H100):
        assert name == "_resident" and programs < -(-problem.k // config.block_n)  # not one for each column
        return
    a = example(problem)
    out = conv_fp8.empty(a).view(torch.uint8).fill_(0x7F).view(FLOAT8).to(DEVICE)
    tensors = [each.to(DEVICE) for each in (*a[:4], a.residual)]
    made = kernel.launch(*tensors, out, problem, config, residual_scale=a.residual_scale)
    made()
    assert made.kernel.fn.__name__ == name
    obeys(out.cpu(), a)


def test_a_gpu_without_float8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    a = example(PLAIN)
    with (
        backends.triton.assume(A100),
        backends.use("triton"),
        pytest.warns(
            backends.FallbackWarning, match=r"conv_fp8: float8 needs compute capability 8.9 or 9.0, .* has 8.0"
        ),
    ):
        found = OP.run(a)
    assert torch.equal(found.view(torch.uint8), reference(a).view(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.zeros(1, 32, 4, 4)}, TypeError, "x must be torch.float8_e4m3fn"),
        ({"weight": torch.zeros(48, 32, 3, 3)}, TypeError, "weight must be torch.float8_e4m3fn"),
        ({"weight": torch.zeros(48, 16, 3, 3).to(FLOAT8)}, ValueError, "x has 32 channels, weight expects 16"),
        ({"out": "uint8"}, ValueError, "out is 'uint8'; it must be one of"),
        ({"residual": torch.zeros(2, 48, 9, 7)}, ValueError, "they must be the same"),
        ({"stride": (0, 1)}, ValueError, "stride must be two ints >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        OP.run(example(PLAIN, **changes))


def test_opcheck() -> None:
    a = example(dataclasses.replace(PLAIN, n=1, h=3, w=3, residual=True, out="fp16"))
    # torch cannot copy float8 as the other tests do.
    torch.library.opcheck(torch.ops.resnet_fast.conv_fp8.default, tuple(a), test_utils="test_faketensor")


def hopper(x: Tensor, weight: Tensor, most: int) -> Tensor:
    """x @ weight.T as Hopper's units are known to add: 32 products and the sum so far, each cut to 13 bits of fraction
    beside the largest of them; after ``most`` products the sum is added to one in float32. A model, not a measurement.
    """
    total = torch.zeros(x.shape[0], weight.shape[0])
    for first in range(0, x.shape[1], most):
        part = torch.zeros_like(total, dtype=torch.float64)
        for k in range(first, min(first + most, x.shape[1]), 32):
            terms = x[:, None, k : k + 32].double() * weight[None, :, k : k + 32].double()
            terms = torch.cat([terms, part[..., None]], 2)
            step = torch.exp2(terms.abs().amax(2, keepdim=True).clamp_min(2.0**-40).log2().floor() - 13)
            part = ((terms / step).trunc() * step).sum(2)
        total = total + part.float()
    return total


def test_sums_of_128_products_obey_the_error_rule_of_half_precision_and_whole_ones_do_not() -> None:
    """At the depth of the largest 3x3 of a ResNet, 4608, in the model of Hopper's sums."""
    generator = torch.Generator().manual_seed(1)
    x = narrowed(torch.randn(16, 4608, generator=generator).relu() * 100, FLOAT8).float()
    weight = narrowed(torch.randn(24, 4608, generator=generator) * 100, FLOAT8).float()
    right = x.double() @ weight.double().T
    scale = 1 / right.std()
    wanted = (x @ weight.T * scale).half()
    allowed = 2 * (wanted.double() - right * scale).norm() + unit_roundoff(torch.float16) * (right * scale).norm()
    errors = {
        most: ((hopper(x, weight, most) * scale).half().double() - right * scale).norm() / allowed
        for most in (128, 512, 4608)
    }
    assert errors[128] < 1 < errors[4608], errors
