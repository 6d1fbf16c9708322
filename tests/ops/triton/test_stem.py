"""The Triton kernel of stem against torch: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytest.importorskip("triton")
from resnet_fast import ops
from resnet_fast.backends import triton as adapter
from resnet_fast.backends.layouts import taps_first
from resnet_fast.kernels import gpus
from resnet_fast.kernels import stem as kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.resnet_fast.stem.default
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.triton,
    # torch's own pooling of -inf, and the interpreter's numpy on NaN.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    with rf.backends.use("triton"):
        yield


def problem(n: int, c: int, h: int, w: int, k: int = 20, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of the op; scale takes both signs."""
    return {
        "x": torch.randn(n, c, h, w, device=DEVICE).to(dtype),
        "weight": (torch.randn(k, c, 7, 7, device=DEVICE) / (c * 49) ** 0.5).to(dtype),
        "scale": torch.randn(k, device=DEVICE),
        "shift": torch.randn(k, device=DEVICE),
    }


def plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, ceil_mode: bool = False) -> Tensor:
    y = nn.functional.conv2d(x, weight, None, 2, 3)
    y = nn.functional.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 1e-30)
    return nn.functional.max_pool2d(y.relu(), 3, 2, 0 if ceil_mode else 1, ceil_mode=ceil_mode)


def compare(a: dict[str, Tensor], ceil_mode: bool = False, ours: Tensor | None = None) -> Tensor:
    ours = rf.ops.stem(**a, ceil_mode=ceil_mode) if ours is None else ours
    exact = plain(**{name: t.double() for name, t in a.items()}, ceil_mode=ceil_mode)
    assert_obeys_error_rule(ours, plain(**a, ceil_mode=ceil_mode), exact)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((5, 5), torch.float32),
        ((7, 8), torch.float16),
        ((13, 29), torch.bfloat16),
        ((26, 19), torch.float32),
    ],
)
def test_sizes(size: tuple[int, int], dtype: torch.dtype, ceil_mode: bool) -> None:
    compare(problem(1, 3, *size, dtype=dtype), ceil_mode)


@pytest.mark.parametrize(("n", "c", "k"), [(0, 3, 17), (1, 1, 1), (3, 4, 64), (1, 9, 5)])
def test_batches_and_channels(n: int, c: int, k: int) -> None:
    compare(problem(n, c, 11, 14, k))


def test_smallest_images() -> None:
    compare(problem(1, 3, 1, 1))
    compare(problem(1, 3, 3, 4), ceil_mode=True)


@pytest.mark.parametrize(
    ("config", "dtype", "ceil_mode"),
    [
        ((16, 16, 32, 1, 4), torch.bfloat16, False),  # two blocks of channels
        ((32, 32, 16, 2, 4), torch.float16, True),  # two steps for a row of taps; rows that do not divide the height
        ((32, 32, 32, 3, 4), torch.float32, False),
        ((16, 32, 32, 5, 8), torch.bfloat16, True),  # more rows than there are
    ],
)
def test_rows_per_program(config: tuple[int, int, int, int, int], dtype: torch.dtype, ceil_mode: bool) -> None:
    a = problem(1, 3, 18, 15, 20, dtype)
    n, c, h, w = a["x"].shape
    described = kernel.Problem(n, h, w, c, 20, False, ceil_mode, adapter.precision(dtype))
    out = torch.empty(n, 20, *described.output, device=DEVICE, dtype=dtype)
    out = out.contiguous(memory_format=torch.channels_last).fill_(float("nan"))
    weight = a["weight"].contiguous(memory_format=torch.channels_last)  # the other way to store it
    with adapter.on(DEVICE):
        kernel.launch(a["x"], weight, a["scale"], a["shift"], None, out, described, kernel.Config(*config))()
    compare(a, ceil_mode, out)


def test_strided_and_expanded_inputs() -> None:
    a = problem(2, 3, 9, 14)
    x = a["x"]
    wide = torch.cat([x, x], 1).repeat(1, 1, 2, 2)
    forms = [
        x.contiguous(memory_format=torch.channels_last),
        wide[:, 1:4, 3:12, 5:19],
        wide[:, ::2, ::2, ::2],
        x[:1, :1].expand(2, 3, 9, 14),
        x.transpose(2, 3),
    ]
    for form in forms:
        compare({**a, "x": form})
    a["weight"] = torch.randn(40, 3, 7, 14, device=DEVICE)[::2, ..., ::2]
    a["scale"] = torch.randn(40, device=DEVICE)[::2]
    compare(a)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_weight_in_float32_beside_narrower_images(dtype: torch.dtype) -> None:
    a = problem(1, 3, 9, 14)
    a["x"] = a["x"].to(dtype)
    exact = plain(**{name: t.double() for name, t in a.items()})
    assert_obeys_error_rule(rf.ops.stem(**a), plain(**{**a, "weight": a["weight"].to(dtype)}), exact)


@pytest.mark.parametrize(
    ("dtype", "ceil_mode"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, False)]
)
def test_bytes_are_normalised_before_the_zero_padding(dtype: torch.dtype, ceil_mode: bool) -> None:
    a = problem(2, 3, 1, 1, dtype=dtype)
    image = torch.randint(0, 256, (1, 12, 21, 3), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(values, dtype=torch.float64, device=DEVICE) for values in (MEAN, STD))
    x = ((image.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    vectors = {name: a[name] for name in ("scale", "shift")}
    exact = plain(x, a["weight"].double(), **{n: v.double() for n, v in vectors.items()}, ceil_mode=ceil_mode)
    torchs = plain(x.to(dtype), a["weight"], **vectors, ceil_mode=ceil_mode)
    doubled = image.repeat(1, 1, 2, 1)
    for form in (image, doubled[:, :, :21], image.transpose(1, 2).contiguous().transpose(1, 2)):
        ours = rf.ops.stem(form, a["weight"], **vectors, mean=MEAN, std=STD, ceil_mode=ceil_mode)
        assert_obeys_error_rule(ours, torchs, exact)


@pytest.mark.parametrize("c", [1, 5])
def test_bytes_of_other_channel_counts(c: int) -> None:
    a = problem(1, c, 1, 1)
    image = torch.randint(0, 256, (1, 12, 9, c), dtype=torch.uint8, device=DEVICE)
    mean, std = [0.1 * i for i in range(c)], [0.2 + 0.1 * i for i in range(c)]
    as_tensors = (torch.tensor(values, dtype=torch.float64, device=DEVICE) for values in (mean, std))
    m, s = as_tensors
    x = ((image.double() / 255 - m) / s).permute(0, 3, 1, 2)
    vectors = {name: a[name] for name in ("scale", "shift")}
    ours = rf.ops.stem(image, a["weight"], **vectors, mean=mean, std=std)
    exact = plain(x, a["weight"].double(), **{n: v.double() for n, v in vectors.items()})
    assert_obeys_error_rule(ours, plain(x.float(), a["weight"], **vectors), exact)


@pytest.mark.parametrize(
    ("dtype", "ceil_mode"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, False)]
)
def test_nan_and_infinities_pass_as_in_torch(dtype: torch.dtype, ceil_mode: bool) -> None:
    """Four channels: with an odd count torch's own bfloat16 convolution lets NaN spread to neighbours on a CPU."""
    a = problem(1, 4, 12, 50, dtype=dtype)
    a["scale"][3] = 0.0
    a["x"][0, 0, 0, 0] = float("nan")
    a["x"][0, 1, 5, 20] = float("inf")
    a["x"][0, 2, 10, 40] = float("-inf")
    ours = compare(a, ceil_mode)
    assert ours.isnan().any() and ours.isfinite().any()


def test_positions_that_the_convolution_has_not_never_win() -> None:
    """Every convolved value is far below 0, so a 0 taken from beyond the border would show."""
    a = problem(1, 3, 9, 9)
    a["x"], a["weight"], a["scale"] = a["x"].abs() + 1, -a["weight"].abs() - 0.1, a["scale"].abs() + 0.1
    a["shift"] = torch.full((20,), 1e4, device=DEVICE)
    ours = compare(a)
    assert (ours < 1e4).all() and (ours > 0).all()


def test_an_image_gives_the_same_bits_in_any_place() -> None:
    a = problem(1, 3, 9, 14)
    if DEVICE.type == "cpu":  # sums are numpy's there, whose order may depend on the place; of small integers no matter
        a |= {name: (4 * a[name]).round() for name in ("x", "weight")}
        a["weight"] = a["weight"] + torch.arange(20).view(20, 1, 1, 1) % 5 - 2
    many = rf.ops.stem(**{**a, "x": a["x"].expand(5, 3, 9, 14)})
    assert all(torch.equal(image, many[0]) for image in many)


def test_no_output_channels() -> None:
    a = problem(1, 3, 15, 18, k=0)
    assert rf.ops.stem(**a).shape == (1, 0, 4, 5)


def test_opcheck_and_autograd() -> None:
    a = problem(1, 2, 7, 8, 5)
    torch.library.opcheck(OP, (*(t.clone().requires_grad_() for t in a.values()), None, None, False))
    image = torch.randint(0, 256, (1, 9, 8, 2), dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(
        OP, (image, *list(a.values())[1:], MEAN[:2], STD[:2], True), test_utils=("test_schema", "test_faketensor")
    )
    grads = []
    for run in (rf.ops.stem, plain):
        leaves = {name: t.clone().requires_grad_() for name, t in a.items()}
        run(**leaves).square().sum().backward()
        grads.append([t.grad for t in leaves.values()])
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_prepared() -> None:
    a = problem(1, 3, 9, 14)
    x = a.pop("x")
    stem = ops.ALL["stem"].bind(*a.values(), ceil_mode=True)
    assert stem.backend == "triton"
    compare({"x": x, **a}, True, stem(x))
    half = ops.ALL["stem"].bind(*a.values(), dtype=torch.float16)
    a["weight"] = a["weight"].half()
    compare({"x": x.half(), **a}, False, half(x.half()))
    assert half(x[:0].half()).shape == (0, 20, 3, 4)
    assert ops.ALL["stem"].bind(*a.values(), backend="reference").backend == "reference"


@pytest.mark.parametrize("name", ["a100", "h100", "b200", "l4"])
@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_choices(name: str, precision: str) -> None:
    gpu = gpus.known(name)
    for n in (1, 8, 32, 128, 256):
        for uint8 in (False, True):
            described = kernel.Problem(n, 224, 224, 3, 64, uint8, False, precision)
            assert described.output == (56, 56)
            configs = list(kernel.candidates(described, gpu))
            chosen = kernel.heuristic(described, gpu)
            assert chosen in configs and len(set(configs)) == len(configs)
            assert kernel.choose(described, gpu) == chosen
            assert all(config.shared_memory(described) <= gpu.shared_memory for config in configs)
            assert precision != "fp32" or all(config.block_m <= 32 for config in configs)
            assert chosen.rows == (1 if n == 1 else 8 if n >= 128 else chosen.rows)


def test_the_kernels_weight_is_stored_with_output_channels_innermost() -> None:
    weight = torch.randn(6, 3, 7, 7, device=DEVICE)
    stored = taps_first(weight, torch.float16)
    assert torch.equal(stored, weight.half()) and stored.stride() == (1, 6, 7 * 3 * 6, 3 * 6)
