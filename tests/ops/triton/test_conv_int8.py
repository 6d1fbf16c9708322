"""conv_int8: its Triton kernels, both forms, bit for bit against integers; the reference against torch's; refusals."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.kernels import gpus
from resnet_fast.kernels.problems import ConvInt8 as Problem
from tests.triton_device import DEVICE, FORMS, kernels, launch_anew

conv_int8 = importlib.import_module("resnet_fast.ops.conv_int8")  # whose name is a function's in ops, too
OP, Arguments, reference = conv_int8.OP, conv_int8.Arguments, conv_int8.reference

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

H100 = gpus.known("h100")
PLAIN = Problem(2, 9, 7, 32, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1, "int8", residual=False)
POINTWISE = dataclasses.replace(PLAIN, kernel=(1, 1), padding=(0, 0))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    names: list[str] = []
    make: Callable[..., Any] = kernel.launch

    def launch(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        names.append(made.kernel.fn.__name__)
        return made

    monkeypatch.setattr(kernel, "launch", launch)
    launch_anew(monkeypatch)
    return names


def example(problem: Problem, **changes: Any) -> Any:
    return OP.example(problem, torch.device("cpu"), torch.Generator().manual_seed(7))._replace(**changes)


def check(a: Any, form: str) -> Tensor:
    """The kernel gives the reference's bits."""
    wanted = reference(a)
    with kernels(form):
        found = OP.run(a._make(value.to(DEVICE) if isinstance(value, Tensor) else value for value in a)).cpu()
    assert found.dtype is wanted.dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, wanted), (form, a[4:], (found != wanted).sum(), found.numel())
    return found


@pytest.mark.parametrize(
    ("changes", "boxes"),
    [
        ({}, True),
        ({"h": 8, "w": 8, "stride": (2, 2)}, True),
        ({"stride": (2, 2)}, False),  # of odd sizes
        ({"stride": (2, 1)}, False),
        ({"dilation": (2, 2), "padding": (2, 2)}, False),
        ({"kernel": (2, 3), "padding": (0, 1)}, True),
        ({"c": 96, "k": 144, "n": 1}, True),
        ({"c": 48}, False),  # no whole steps of 32
        ({"c": 5, "k": 3}, False),
        ({"kernel": (1, 1), "padding": (0, 0), "c": 256}, True),
        ({"kernel": (1, 1), "padding": (0, 0), "h": 8, "w": 8, "stride": (2, 2)}, True),
        ({"kernel": (1, 1), "padding": (1, 1)}, True),
        ({"shifted": True}, False),  # what the copy engine fills in would not be 0
        ({"shifted": True, "padding": (0, 0)}, True),
        ({"n": 3, "h": 1, "w": 1}, True),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_shapes(changes: dict[str, Any], boxes: bool, residual: bool, form: str, launched: list[str]) -> None:
    check(example(dataclasses.replace(PLAIN, **changes, residual=residual)), form)
    assert launched == ["_boxes" if boxes and form == "h100" else "_gather"]


@pytest.mark.parametrize("problem", [POINTWISE, PLAIN])
@pytest.mark.parametrize("out", list(conv_int8.OUTPUTS))
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("where", ["none", "before", "after"])
def test_what_is_stored(problem: Problem, out: str, activation: str, where: str, form: str) -> None:
    a = example(dataclasses.replace(problem, n=1, out=out, residual=where != "none"))
    zero = 101 if activation == "none" and out == "uint8" else 0
    options = {"activation": activation, "residual_after_activation": where == "after", "out_zero_point": zero}
    found = check(a._replace(**options), form)
    assert len(found.unique()) > 20


@pytest.mark.parametrize(("zero", "largest"), [(0, 255), (128, 255), (3, 127)])
def test_both_ends_saturate(zero: int, largest: int, form: str) -> None:
    a = example(PLAIN, activation="none", out_zero_point=zero, largest=largest)
    found = check(a._replace(scale=a.scale * 50), form)
    assert int(found.min()) == 0 and int(found.max()) == largest
    huge = a._replace(scale=torch.full_like(a.scale, 3e38))  # infinite steps
    assert set(check(huge, form).unique().tolist()) >= {0, largest}


def test_halves_are_rounded_to_even(form: str) -> None:
    """Of -2.5 to 4.5, around an odd zero point, too."""
    x = torch.arange(0, 16, dtype=torch.uint8).view(1, 1, 1, 16).expand(1, 32, 1, 16)
    weight = torch.zeros(16, 32, 1, 1, dtype=torch.int8)
    weight[:, 0] = 1
    a = Arguments(x, weight, torch.full((16,), 0.5), torch.full((16,), -2.5), activation="none", out_zero_point=7)
    steps = check(a, form)[0, 0, 0].int() - 7
    assert steps.tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]


@pytest.mark.parametrize(("pixel", "weight"), [(255, 127), (255, -128), (0, 127), (128, -127), (127, 127)])
@pytest.mark.parametrize("zero_point", [0, 255, 128])
def test_the_largest_sums(pixel: int, weight: int, zero_point: int, form: str) -> None:
    """Depth 2304, where float32 would round sums."""
    x = torch.full((1, 256, 3, 3), pixel, dtype=torch.uint8)
    x[0, 0, 1, 1] = 1
    weights = torch.full((16, 256, 3, 3), weight, dtype=torch.int8)
    ones, zeros = torch.ones(16), torch.zeros(16)
    a = Arguments(x, weights, ones, zeros, zero_point, "fp32", activation="none", padding=(1, 1))
    found = check(a, form)
    inside = (x.double() - zero_point).sum() * weight
    assert found[0, 0, 1, 1] == inside.float()
    assert check(a._replace(padding=(0, 0)), form)[0, 3].item() == inside.float()


def test_nothing_is_contracted(form: str) -> None:
    """A product that float32 rounds before the shift is added, where a multiply-add would not."""
    x = torch.full((1, 32, 1, 1), 3, dtype=torch.uint8)
    weight = torch.zeros(16, 32, 1, 1, dtype=torch.int8)
    weight[:, 0] = 11
    scale = torch.full((16,), 1 / 3)
    a = Arguments(x, weight, scale, -33 * scale, out="fp32", activation="none")
    assert check(a, form).unique().tolist() == [0.0]


def test_nan_in_a_residual_passes(form: str) -> None:
    a = example(dataclasses.replace(PLAIN, n=1, out="fp16", residual=True))
    assert a.residual is not None
    a.residual[0, 3, 2, 1] = float("nan")
    with kernels(form):
        found = OP.run(a._make(value.to(DEVICE) if isinstance(value, Tensor) else value for value in a)).cpu()
    assert found.isnan().nonzero().tolist() == [[0, 3, 2, 1]]
    assert torch.equal(found.nan_to_num(), reference(a).nan_to_num())


@pytest.mark.parametrize("layout", ["nchw", "sliced", "odd address"])
def test_any_strides(layout: str, form: str, launched: list[str]) -> None:
    a = example(dataclasses.replace(PLAIN, residual=True))
    given = {
        "nchw": lambda t: t.contiguous(),
        "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
        "odd address": lambda t: (
            torch.cat([t.flatten()[:1], t.permute(0, 2, 3, 1).flatten()])[1:]
            .view(t.shape[0], *t.shape[2:], t.shape[1])
            .permute(0, 3, 1, 2)
        ),
    }[layout]
    check(a._replace(x=given(a.x), residual=given(a.residual)), form)
    assert launched == ["_boxes" if layout != "odd address" and form == "h100" else "_gather"]


def run(a: Any, problem: Problem, config: Any) -> str:
    """A launch of this choice gives the reference's bits in an output that is right nowhere before; its kernel."""
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    wanted = reference(a)
    stale = wanted.bitwise_not() if wanted.dtype is torch.uint8 else torch.full_like(wanted, float("nan"))
    out = conv_int8.empty(a).copy_(stale).to(DEVICE)
    tensors = [*a[:4], conv_int8.offset(a), a.residual]
    names = "residual_scale", "activation", "residual_after_activation", "zero_point", "out_zero_point", "largest"
    options = {name: getattr(a, name) for name in names}
    there = [None if each is None else each.to(DEVICE) for each in tensors]
    made = kernel.launch(*there, out, problem, config, **options)
    made()
    assert torch.equal(out.cpu(), wanted), (problem, config, (out.cpu() != wanted).sum())
    return str(made.kernel.fn.__name__)


ODD = [
    ({"kernel": (1, 1), "padding": (0, 0), "c": 64, "k": 80}, (64, 64, 64), "_resident"),
    ({"kernel": (1, 1), "padding": (0, 0), "c": 32, "k": 16, "n": 1}, (64, 64, 32), "_resident"),  # less than a tile
    ({"kernel": (1, 1), "padding": (0, 0), "c": 64, "k": 144}, (64, 128, 64), "_resident"),
    ({"kernel": (1, 1), "padding": (0, 0), "c": 96}, (64, 64, 32), "_boxes"),
    ({"kernel": (1, 1), "padding": (0, 0), "h": 10, "w": 6, "stride": (2, 2), "k": 80}, (32, 64, 32), "_boxes"),
    ({"k": 80}, (64, 64, 32), "_boxes"),
    ({"h": 10, "w": 6, "stride": (2, 2)}, (16, 64, 32), "_boxes"),
    ({"kernel": (2, 3), "padding": (0, 1), "n": 5, "h": 4, "w": 3}, (64, 64, 32), "_boxes"),
    ({"n": 33, "h": 5, "w": 5, "k": 64}, (512, 64, 32), "_boxes"),
    ({"n": 11, "h": 5, "w": 5, "k": 272}, (128, 256, 32), "_boxes"),
]


@pytest.mark.parametrize(("changes", "tile", "name"), ODD)
@pytest.mark.parametrize("programs", [1, 2, 5, 1000])
@pytest.mark.parametrize("residual", [False, True])
def test_programs_that_take_tiles_in_turn(
    changes: dict[str, Any], tile: tuple[int, int, int], name: str, programs: int, residual: bool
) -> None:
    """Sizes that tiles do not divide; more programs than tiles, and one for all of them."""
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    problem = dataclasses.replace(PLAIN, **changes, residual=residual)
    config = kernel.Config(*tile, 4, 3, True, programs)
    if not kernel.takes(config, problem, H100):
        assert name == "_resident" and programs < -(-problem.k // config.block_n)  # not one for each column
        return
    assert run(example(problem), problem, config) == name


@pytest.mark.parametrize("problem", [PLAIN, dataclasses.replace(POINTWISE, c=64)])
@pytest.mark.parametrize("out", list(conv_int8.OUTPUTS))
@pytest.mark.parametrize(("activation", "zero"), [("relu", 0), ("relu", 7), ("none", 0), ("none", 101)])
@pytest.mark.parametrize("where", ["none", "before", "after"])
def test_what_is_stored_by_programs_of_several_tiles(
    problem: Problem, out: str, activation: str, zero: int, where: str
) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    problem = dataclasses.replace(problem, n=1, out=out, residual=where != "none")
    a = example(problem, activation=activation, residual_after_activation=where == "after")
    a = a._replace(out_zero_point=zero, largest=200) if out == "uint8" else a
    run(a, problem, kernel.Config(16 if problem.kernel == (3, 3) else 64, 64, problem.c, 4, 3, True, 2))


@pytest.mark.parametrize("layout", ["x", "out"])
def test_an_odd_address_leaves_large_tiles_to_the_other_form(layout: str) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    for problem, tile in ((PLAIN, (512, 64, 32)), (dataclasses.replace(POINTWISE, c=64), (64, 64, 64))):
        a = example(problem)
        out = conv_int8.empty(a)
        x, to = (
            torch.cat([t.flatten()[:1], t.permute(0, 2, 3, 1).flatten()])[1:]
            .view(t.shape[0], *t.shape[2:], t.shape[1])
            .permute(0, 3, 1, 2)
            if layout == which
            else t
            for which, t in (("x", a.x), ("out", out))
        )
        config = kernel.Config(*tile, 8, 3, True, 2)
        made = kernel.launch(
            *(each.to(DEVICE) for each in (x, *a[1:4], conv_int8.offset(a))), None, to, problem, config
        )
        assert made.kernel.fn.__name__ == "_gather" and made.options["BLOCK_M"] <= 128
        made()
        assert torch.equal(to, reference(a))


def test_large_problems_have_programs_of_several_tiles() -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    plain = Problem(256, 56, 56, 64, 256, (1, 1), (1, 1), (0, 0), (1, 1), 1, "int8", residual=True)
    window = dataclasses.replace(plain, kernel=(3, 3), padding=(1, 1), residual=False)
    found = kernel.heuristic(plain, H100)
    assert found.resident(plain) and found.persistent == 3 * 132 and kernel.blocks(plain, found) == 396
    assert kernel.heuristic(dataclasses.replace(plain, residual=False), H100).persistent == 4 * 132
    for c, k, tile in ((64, 64, (512, 64)), (128, 128, (256, 128)), (256, 256, (128, 256))):
        found = kernel.heuristic(dataclasses.replace(window, c=c, k=k, h=28, w=28), H100)
        assert (found.block_m, found.block_n, found.persistent, found.num_warps) == (*tile, 132, 8)
    for few in (dataclasses.replace(plain, n=1), dataclasses.replace(window, n=1), dataclasses.replace(plain, c=1024)):
        assert not kernel.heuristic(few, H100).persistent
    for gpu in ("a100", "b200"):
        assert not kernel.heuristic(plain, gpus.known(gpu)).persistent
        assert not any(each.persistent for each in kernel.candidates(window, gpus.known(gpu)))


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, (64, 64, 32, 4, 3, False, 132)),  # not in boxes
        ({"kernel": (1, 1), "padding": (0, 0), "k": 256}, (64, 64, 32, 4, 3, True, 3)),  # less than its columns
        ({"kernel": (1, 1), "padding": (0, 0), "c": 1024}, (64, 64, 1024, 4, 3, True, 132)),
        ({}, (512, 256, 32, 8, 8, True, 132)),  # more shared memory than there is
    ],
)
def test_choices_that_cannot_be(changes: dict[str, Any], config: tuple[Any, ...]) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    assert not kernel.takes(kernel.Config(*config), dataclasses.replace(PLAIN, **changes), H100)


@pytest.mark.parametrize("problem", [PLAIN, dataclasses.replace(POINTWISE, c=128, residual=True)])
def test_every_candidate(problem: Problem) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_int8")
    problem = dataclasses.replace(problem, n=1, h=4, w=4)
    a, tiles = example(problem), {}
    for config in kernel.candidates(dataclasses.replace(problem, n=8192), H100):
        tiles.setdefault((config.block_m, config.block_n, config.boxes, config.persistent > 0), config)
    assert len(tiles) > 6 and any(config.persistent for config in tiles.values())
    for config in tiles.values():
        run(a, problem, config)


def test_empty_batches() -> None:
    a = example(dataclasses.replace(PLAIN, n=0))
    assert torch.equal(check(a, FORMS[0]), reference(a))


def test_the_reference_is_torchs_own() -> None:
    """Of what torch computes itself: dequantized, convolved and quantized, in float64."""
    a = example(dataclasses.replace(PLAIN, shifted=True), activation="none", out_zero_point=90)
    sums = torch.nn.functional.conv2d(a.x.double() - 7, a.weight.double(), padding=1)
    real = sums * a.scale.double().view(1, -1, 1, 1) + a.shift.double().view(1, -1, 1, 1)
    quantized = torch.quantize_per_tensor(real.float(), 1.0, 90, torch.quint8).int_repr()
    assert (quantized.int() - reference(a).int()).abs().max() <= 1  # at halves, which float64 does not see as such
    assert (quantized != reference(a)).float().mean() < 1e-3


def test_without_a_gpu_the_reference_runs(launched: list[str]) -> None:
    a = example(PLAIN)
    assert torch.equal(OP.run(a), reference(a)) and not launched
    with backends.use("reference"):
        assert torch.equal(conv_int8.conv_int8(*a[:4], padding=(1, 1)), reference(a))


def test_a_gpu_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    old = dataclasses.replace(H100, capability=75)
    with backends.triton.assume(old), backends.use("triton"):
        with pytest.warns(backends.FallbackWarning, match=r"conv_int8: .* compute capability 8.0, this GPU has 7.5"):
            found = OP.run(example(PLAIN))
        assert torch.equal(found, reference(example(PLAIN)))
    assert not launched


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.zeros(1, 32, 4, 4)}, TypeError, "x must be uint8"),
        ({"weight": torch.zeros(48, 32, 3, 3)}, TypeError, "weight must be int8"),
        ({"weight": torch.zeros(48, 16, 3, 3, dtype=torch.int8)}, ValueError, "x has 32 channels, weight expects 16"),
        ({"scale": torch.ones(3)}, ValueError, "scale has shape"),
        ({"out": "fp64"}, ValueError, "out is 'fp64'; it must be one of"),
        ({"zero_point": 256}, ValueError, "zero_point is 256; it must be from 0 to 255"),
        ({"largest": -1}, ValueError, "largest is -1"),
        ({"stride": (0, 1)}, ValueError, "stride must be two ints >= 1"),
        ({"padding": (0, 0), "dilation": (9, 9)}, ValueError, "too small for kernel"),
        ({"residual": torch.zeros(2, 48, 9, 7)}, ValueError, "they must be the same"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        OP.run(example(PLAIN, **changes))


def test_sums_that_overflow_are_refused() -> None:
    weight = torch.zeros(1, conv_int8.MOST_PRODUCTS + 1, 1, 1, dtype=torch.int8)
    x = torch.zeros(1, weight.shape[1], 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="may not fit in 32 bits"):
        conv_int8.conv_int8(x, weight, torch.ones(1), torch.zeros(1))


def test_opcheck() -> None:
    a = example(dataclasses.replace(PLAIN, n=1, h=3, w=3, residual=True))
    torch.library.opcheck(torch.ops.resnet_fast.conv_int8.default, tuple(a))
