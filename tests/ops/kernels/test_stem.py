"""stem on each kind of kernel, through the op and bound: values, layouts, bytes, gradients, what is not computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends import triton
from resnet_fast.backends.layouts import squares, squares_apart
from resnet_fast.kernels import gpus
from resnet_fast.roofline.measure import tf32
from tests.cuda_device import doubled
from tests.kernel_kinds import DTYPES, KINDS, Kind
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_stem import MEAN, STD, plain
from tests.triton_device import DEVICE as TRITON_DEVICE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # torch's own pooling of -inf, and the interpreter's numpy on NaN.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

OP = torch.ops.resnet_fast.stem.default


def problem(
    kind: Kind, n: int, c: int, h: int, w: int, k: int = 20, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Arguments of the op on the CPU, such as the kernels multiply exactly; scale takes both signs."""
    made = {
        "x": torch.randn(n, c, h, w).to(dtype),
        "weight": (torch.randn(k, c, 7, 7) / (c * 49) ** 0.5).to(dtype),
        "scale": torch.randn(k),
        "shift": torch.randn(k),
    }
    return kind.as_multiplied(made, "x", "weight")


def judge(ours: Tensor, given: dict[str, Any], ceil_mode: bool = False) -> None:
    """Hold a result to the error rule, beside torch's layers on the CPU."""
    assert ours.is_contiguous(memory_format=torch.channels_last)
    same, exact = plain(**given, ceil_mode=ceil_mode), plain(**doubled(given), ceil_mode=ceil_mode)
    assert_obeys_error_rule(ours.cpu(), same, exact)


def once(kind: Kind) -> list[str]:
    """Return the launches of one call."""
    return ["stem_squares", "stem"] if kind.name == "triton" else ["stem"]


def check(
    kind: Kind,
    given: dict[str, Any],
    launched: list[str],
    ceil_mode: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    launched.clear()
    there = kind.put(given)
    there["x"] = layout(there["x"])
    assert torch.equal(there["x"].nan_to_num(), given["x"].nan_to_num().to(kind.device))
    ours = rf.ops.stem(**there, ceil_mode=ceil_mode)
    assert launched == once(kind) * (ours.numel() > 0) and ours.device.type == kind.device
    judge(ours, given, ceil_mode)
    return ours.cpu()


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((5, 5), torch.float32),
        ((7, 8), torch.float16),
        ((13, 29), torch.bfloat16),
        ((26, 19), torch.float32),
        *itertools.product([(6, 7), (13, 10)], DTYPES),
    ],
    ids=str,
)
def test_sizes(kind: Kind, size: tuple[int, int], dtype: torch.dtype, ceil_mode: bool, launched: list[str]) -> None:
    check(kind, problem(kind, 1, 3, *size, dtype=dtype), launched, ceil_mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "c", "k"), [(0, 3, 17), (1, 1, 1), (3, 4, 64), (2, 2, 5)])
def test_batches_and_channels(kind: Kind, n: int, c: int, k: int, dtype: torch.dtype, launched: list[str]) -> None:
    check(kind, problem(kind, n, c, 11, 14, k, dtype), launched)


def test_no_output_channels(kind: Kind, launched: list[str]) -> None:
    assert rf.ops.stem(**kind.put(problem(kind, 1, 3, 15, 18, k=0))).shape == (1, 0, 4, 5)
    assert launched == []


def test_smallest_images(kind: Kind, launched: list[str]) -> None:
    check(kind, problem(kind, 1, 3, 1, 1), launched)
    check(kind, problem(kind, 1, 3, 3, 4), launched, ceil_mode=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of more": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "every other each way": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
    "a part": lambda x: nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd address": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_strides(kind: Kind, dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    check(kind, problem(kind, 2, 3, 7, 10, dtype=dtype), launched, layout=LAYOUTS[layout])


def test_expanded_images_and_strided_constants(kind: Kind, launched: list[str]) -> None:
    there = kind.put(problem(kind, 1, 3, 7, 8))
    there["x"] = there["x"][:, :1].expand(2, 3, 7, 8)
    there["weight"] = there["weight"].repeat_interleave(2, 3)[..., ::2]
    there["scale"], there["shift"] = there["scale"][:1].expand(20), there["shift"].repeat_interleave(2)[::2]
    ours = rf.ops.stem(**there)
    assert launched == once(kind)
    judge(ours, {name: t.cpu() for name, t in there.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_in_float32_beside_narrower_images(kind: Kind, dtype: torch.dtype, launched: list[str]) -> None:
    given = problem(kind, 1, 3, 9, 8, dtype=dtype) | {"weight": torch.randn(20, 3, 7, 7) / 12}
    ours = rf.ops.stem(**kind.put(given))
    assert launched == once(kind)
    judge(ours, given | {"weight": given["weight"].to(dtype)})


def normalised(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [N, H, W, C] as [N, C, H, W] in float64."""
    shift, scale = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    return ((image.double() / 255 - shift) / scale).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("dtype", "ceil_mode"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_bytes_are_normalised_before_the_zero_padding(
    kind: Kind, dtype: torch.dtype, ceil_mode: bool, launched: list[str]
) -> None:
    image = torch.randint(0, 256, (1, 12, 21, 3), dtype=torch.uint8)
    constants = {name: t for name, t in problem(kind, 2, 3, 1, 1, dtype=dtype).items() if name != "x"}
    exact_x = normalised(image, MEAN, STD)
    same = plain(**kind.as_multiplied({"x": exact_x.to(dtype)}, "x"), **constants, ceil_mode=ceil_mode)
    exact = plain(exact_x, **doubled(constants), ceil_mode=ceil_mode)
    there = image.to(kind.device)
    # What torch makes by default is not what the kernels read: their normalisation is float32 always.
    torch.set_default_dtype(torch.float64)
    try:
        for form in (there, there.repeat(1, 1, 2, 1)[:, :, :21], there.transpose(1, 2).contiguous().transpose(1, 2)):
            launched.clear()
            ours = rf.ops.stem(form, **kind.put(constants), mean=MEAN, std=STD, ceil_mode=ceil_mode)
            assert launched == once(kind)
            assert_obeys_error_rule(ours.cpu(), same, exact)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "ceil_mode"),
    [(torch.float16, False), (torch.float32, True), (torch.bfloat16, False)],
)
def test_nan_and_infinities_pass_as_in_torch(
    kind: Kind, dtype: torch.dtype, ceil_mode: bool, launched: list[str]
) -> None:
    """Four channels: with an odd count torch's own bfloat16 convolution lets NaN spread to neighbours on a CPU."""
    given = problem(kind, 1, 4, 12, 50, dtype=dtype)
    given["scale"][3] = 0.0
    given["x"][0, 0, 0, 0] = float("nan")
    given["x"][0, 1, 5, 20] = float("inf")
    given["x"][0, 2, 10, 40] = float("-inf")
    ours = check(kind, given, launched, ceil_mode)
    assert ours.isnan().any() and ours.isfinite().any()


def test_positions_that_the_convolution_has_not_never_win(kind: Kind, launched: list[str]) -> None:
    """Every convolved value is far below 0, so a 0 taken from beyond the border would show."""
    given = problem(kind, 1, 3, 9, 9, dtype=torch.float32)
    given |= kind.as_multiplied({"x": given["x"].abs() + 1, "weight": -given["weight"].abs() - 0.1}, "x", "weight")
    given |= {"scale": given["scale"].abs() + 0.1, "shift": torch.full((20,), 1e4)}
    ours = check(kind, given, launched)
    assert (ours < 1e4).all() and (ours > 0).all()


def test_an_image_gives_the_same_bits_in_any_place(kind: Kind) -> None:
    a = kind.put(problem(kind, 1, 3, 9, 14, dtype=torch.float32))
    if kind.name == "triton" and kind.device == "cpu":
        # Sums are numpy's there, whose order may depend on the place; of small integers no matter.
        a |= {name: (4 * a[name]).round() for name in ("x", "weight")}
        a["weight"] = a["weight"] + torch.arange(20).view(20, 1, 1, 1) % 5 - 2
    many = rf.ops.stem(**{**a, "x": a["x"].expand(5, 3, 9, 14)})
    assert all(torch.equal(image, many[0]) for image in many)


# --- the weight as the kernels read it


def test_the_packed_weight_is_the_7x7_over_squares_of_pixels() -> None:
    """As csrc/kernels/stem.h has it: tap (r, s) of channel i; what no tap fills is 0."""
    for c in (1, 3, 4):
        weight = torch.randn(2, c, 7, 7)
        want = torch.zeros(2, 4, 4, 16)
        for r in range(7):
            for s in range(7):
                inside = (r + 1) % 2 * 2 + (s + 1) % 2
                want[:, (r + 1) // 2, (s + 1) // 2, inside * c : (inside + 1) * c] = weight[:, :, r, s]
        packed = squares(weight, torch.float32)
        assert torch.equal(packed, want) and packed.is_contiguous()


def test_tritons_weight_has_a_place_for_each_pixel_of_a_square() -> None:
    for c, padded in ((1, 4), (3, 4), (5, 8)):
        weight = torch.randn(2, c, 7, 7)
        want = torch.zeros(2, 4, 4, 2, 2, padded)
        for r in range(7):
            for s in range(7):
                want[:, (r + 1) // 2, (s + 1) // 2, (r + 1) % 2, (s + 1) % 2, :c] = weight[:, :, r, s]
        packed = squares_apart(weight, torch.float32)
        assert torch.equal(packed, want) and packed.is_contiguous()


# --- gradients, tracing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_references(kind: Kind, dtype: torch.dtype) -> None:
    given = problem(kind, 1, 3, 9, 8, 5, dtype)
    gradients = []
    for backend in (kind.name, "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in kind.put(given).items()}
        with backends.use(backend):
            rf.ops.stem(**leaves).float().square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for name, ours, theirs in zip(given, *gradients, strict=True):
        assert ours is not None and theirs is not None and ours.dtype is theirs.dtype
        relative = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert relative <= (1e-5 if dtype is torch.float32 else 4e-3), (name, float(relative))


def test_opcheck(kind: Kind) -> None:
    given = kind.put(problem(kind, 1, 2, 7, 8, 5, torch.float32))
    image = torch.randint(0, 256, (1, 9, 8, 2), dtype=torch.uint8, device=kind.device)
    torch.library.opcheck(OP, (*(t.clone().requires_grad_() for t in given.values()), None, None, False))
    torch.library.opcheck(
        OP, (image, *list(given.values())[1:], MEAN[:2], STD[:2], True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.triton
def test_gradients_are_torchs() -> None:
    kind = KINDS["triton"]
    given = kind.put(problem(kind, 1, 2, 7, 8, 5, torch.float32))
    gradients = []
    for run in (rf.ops.stem, plain):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        with kind.kernels():
            run(**leaves).square().sum().backward()
        gradients.append([t.grad for t in leaves.values()])
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_compiled(kind: Kind) -> None:
    given = kind.put(problem(kind, 1, 3, 9, 8))
    compiled = torch.compile(rf.ops.stem, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), rf.ops.stem(**given))


# --- bound, and what the kernels do not compute


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bound(kind: Kind, dtype: torch.dtype, ceil_mode: bool, launched: list[str]) -> None:
    given = problem(kind, 1, 3, 9, 14, dtype=dtype)
    x, weight, *vectors = kind.put(given).values()
    stem = ops.ALL["stem"].bind(weight.float(), *vectors, ceil_mode=ceil_mode, dtype=dtype)
    assert stem.backend == kind.name and stem.backend_for(x.to("meta")) == kind.name
    first, second = stem(x), stem(x)
    assert stem(x[:0]).shape == (0, *first.shape[1:])
    assert launched == once(kind) * 2 and torch.equal(first, second)
    judge(first, given, ceil_mode)
    assert ops.ALL["stem"].bind(weight, *vectors, backend="reference").backend == "reference"


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("c", "dtype", "allowed", "said"),
    [
        (5, torch.float16, True, "the CUDA stem takes up to 4 channels, x has 5"),
        (3, torch.float32, False, "the CUDA stem multiplies float32 as tf32 only, which torch is set not to"),
        (3, torch.float64, True, "the CUDA kernels compute float32, float16 and bfloat16, not float64"),
    ],
)
def test_what_cuda_cannot_compute_falls_back_and_says_so(
    c: int, dtype: torch.dtype, allowed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    kind = KINDS["cuda"]
    launched, given = kind.watch(monkeypatch), kind.put(problem(kind, 1, c, 9, 8, dtype=dtype))
    with kind.kernels(), tf32(allowed):
        with pytest.warns(backends.FallbackWarning, match=f"{said}; the plain torch reference runs instead"):
            y = rf.ops.stem(**given)
        with backends.use("reference"):
            assert torch.equal(y, rf.ops.stem(**given))
        if dtype is torch.float16:
            stem = ops.ALL["stem"].bind(*list(given.values())[1:], dtype=dtype)
            assert stem.backend_for(given["x"].to("meta")) == "reference" and torch.equal(stem(given["x"]), y)
    assert launched == []


# --- Triton's alone


@pytest.mark.triton
def test_more_channels_than_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["triton"]
    with kind.kernels():
        check(kind, problem(kind, 1, 9, 11, 14, 5, torch.float32), kind.watch(monkeypatch))


@pytest.mark.triton
@pytest.mark.parametrize("c", [1, 5])
def test_bytes_of_other_channel_counts(c: int) -> None:
    kind = KINDS["triton"]
    constants = {name: t for name, t in problem(kind, 1, c, 1, 1, dtype=torch.float32).items() if name != "x"}
    image = torch.randint(0, 256, (1, 12, 9, c), dtype=torch.uint8)
    mean, std = [0.1 * i for i in range(c)], [0.2 + 0.1 * i for i in range(c)]
    with kind.kernels():
        ours = rf.ops.stem(image.to(kind.device), **kind.put(constants), mean=mean, std=std)
    x = normalised(image, mean, std)
    assert_obeys_error_rule(ours.cpu(), plain(x.float(), **constants), plain(x, **doubled(constants)))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("config", "dtype", "ceil_mode"),
    [
        ((16, 16, 64, 1, 4, 1, False), torch.bfloat16, False),  # two blocks of channels
        ((32, 32, 32, 2, 4, 1, False), torch.float16, True),  # two steps for a row of taps; a last strip that runs over
        ((32, 32, 32, 3, 4, 1, False), torch.float32, False),
        ((16, 32, 64, 8, 8, 1, False), torch.bfloat16, True),  # more rows than there are
        ((64, 32, 64, 5, 4, 2, True), torch.float16, False),  # weights that stay
    ],
)
def test_rows_per_program(config: tuple[Any, ...], dtype: torch.dtype, ceil_mode: bool) -> None:
    from resnet_fast.kernels import stem as kernel

    described = kernel.Problem(2, 18, 37, 3, 20, False, ceil_mode, triton.precision(dtype))
    chosen = kernel.Config(*config)
    a = ops.ALL["stem"].example(described, torch.device(TRITON_DEVICE))
    out = ops.ALL["stem"].empty(a).fill_(float("nan"))
    # With NaN behind it, and in the last rows, which only strips that run over the image may read.
    pixels = torch.full(kernel.squares_shape(described), float("nan"), dtype=dtype, device=a.x.device)
    constants = squares_apart(a.weight, dtype), a.scale, a.shift
    with triton.on(a.x.device):
        kernel.launch_squares(a.x, None, pixels, described, chosen)()
        kernel.launch(pixels, *constants, out, described, chosen)()
    assert not pixels.isnan().any()
    judge(out, {name: getattr(a, name).cpu() for name in ("x", "weight", "scale", "shift")}, ceil_mode)


@pytest.mark.triton
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_nan_stays_with_the_windows_that_see_it(ceil_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel at a time, at every place in a square and at the borders: an 8x8 window would see it once more."""
    kind = KINDS["triton"]
    with kind.kernels():
        launched = kind.watch(monkeypatch)
        for y, x in ((0, 0), (0, 7), (4, 4), (4, 5), (5, 4), (5, 5), (12, 0), (12, 10)):
            given = problem(kind, 1, 3, 13, 11, 8, torch.float32)
            given["x"][0, 1, y, x] = float("nan")
            ours = check(kind, given, launched, ceil_mode)
            assert torch.equal(ours.isnan(), plain(**given, ceil_mode=ceil_mode).isnan()), (y, x)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["a100", "h100", "b200", "l4"])
@pytest.mark.parametrize("precision", gpus.PRECISIONS)
def test_choices(name: str, precision: str) -> None:
    from resnet_fast.kernels import stem as kernel

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
            assert chosen.rows == 1 if n == 1 else chosen.rows <= kernel.MOST_ROWS
            assert chosen.resident is (name == "h100" and precision in ("fp16", "bf16"))
            launched = kernel.programs(described, chosen.block_m, chosen.block_n, chosen.rows)
            assert n < 128 or launched >= gpu.multiprocessors
