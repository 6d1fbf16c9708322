"""stem on the CUDA kernel, through the op and prepared: values, layouts, bytes, gradients, what is not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends.layouts import squares
from resnet_fast.roofline.measure import tf32
from tests.cuda_device import (
    DEVICE,
    DTYPES,
    as_multiplied,
    assert_obeys_error_rule,
    doubled,
    kernels,
    on_device,
    watch,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # torch's own pooling of -inf
]

OP = torch.ops.resnet_fast.stem.default
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches, by the op's name."""
    return watch(monkeypatch)


def problem(n: int, c: int, h: int, w: int, k: int = 20, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Arguments of the op, such as tf32 holds exactly; scale takes both signs."""
    made = {
        "x": torch.randn(n, c, h, w).to(dtype),
        "weight": (torch.randn(k, c, 7, 7) / (c * 49) ** 0.5).to(dtype),
        "scale": torch.randn(k),
        "shift": torch.randn(k),
    }
    return as_multiplied(made, "x", "weight")


def plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, ceil_mode: bool = False) -> Tensor:
    y = nn.functional.conv2d(x, weight, None, 2, 3)
    y = nn.functional.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 1e-30)
    return nn.functional.max_pool2d(y.relu(), 3, 2, 0 if ceil_mode else 1, ceil_mode=ceil_mode)


def check(
    given: dict[str, Any],
    launched: list[str],
    ceil_mode: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    launched.clear()
    there = on_device(given)
    there["x"] = layout(there["x"])
    assert torch.equal(there["x"].nan_to_num(), given["x"].nan_to_num().to(DEVICE))
    with kernels():
        ours = rf.ops.stem(**there, ceil_mode=ceil_mode)
    assert launched == ["stem"] * (ours.numel() > 0)
    assert ours.device.type == DEVICE and ours.is_contiguous(memory_format=torch.channels_last)
    same, exact = plain(**given, ceil_mode=ceil_mode), plain(**doubled(given), ceil_mode=ceil_mode)
    assert_obeys_error_rule(ours.cpu(), same, exact)
    return ours.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [(6, 7), (13, 10)])
def test_sizes(size: tuple[int, int], ceil_mode: bool, dtype: torch.dtype, launched: list[str]) -> None:
    check(problem(1, 3, *size, dtype=dtype), launched, ceil_mode)


@pytest.mark.parametrize(("n", "c", "k"), [(0, 3, 17), (1, 1, 1), (3, 4, 64), (2, 2, 5)])
def test_batches_and_channels(n: int, c: int, k: int, launched: list[str]) -> None:
    check(problem(n, c, 9, 8, k), launched)


def test_no_output_channels(launched: list[str]) -> None:
    with kernels():
        assert rf.ops.stem(**on_device(problem(1, 3, 15, 18, k=0))).shape == (1, 0, 4, 5)
    assert launched == []


def test_smallest_images(launched: list[str]) -> None:
    check(problem(1, 3, 1, 1), launched)
    check(problem(1, 3, 3, 4), launched, ceil_mode=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of more": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "a part": lambda x: nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd address": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_strides(dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    check(problem(2, 3, 7, 10, dtype=dtype), launched, layout=LAYOUTS[layout])


def test_expanded_images_and_strided_constants(launched: list[str]) -> None:
    given = problem(1, 3, 7, 8)
    there = on_device(given)
    there["x"] = there["x"][:, :1].expand(2, 3, 7, 8)
    there["weight"] = there["weight"].repeat_interleave(2, 3)[..., ::2]
    there["scale"], there["shift"] = there["scale"][:1].expand(20), there["shift"].repeat_interleave(2)[::2]
    with kernels():
        ours = rf.ops.stem(**there).cpu()
    given = {name: t.cpu() for name, t in there.items()}
    assert launched == ["stem"]
    assert_obeys_error_rule(ours, plain(**given), plain(**doubled(given)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_in_float32_beside_narrower_images(dtype: torch.dtype, launched: list[str]) -> None:
    given = problem(1, 3, 9, 8, dtype=dtype) | {"weight": torch.randn(20, 3, 7, 7) / 12}
    with kernels():
        ours = rf.ops.stem(**on_device(given)).cpu()
    rounded = given | {"weight": given["weight"].to(dtype)}
    assert launched == ["stem"]
    assert_obeys_error_rule(ours, plain(**rounded), plain(**doubled(rounded)))


@pytest.mark.parametrize(
    ("dtype", "ceil_mode"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_bytes_are_normalised_before_the_zero_padding(dtype: torch.dtype, ceil_mode: bool, launched: list[str]) -> None:
    given = problem(2, 3, 1, 1, dtype=dtype)
    image = torch.randint(0, 256, (1, 9, 11, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    exact_x = ((image.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    constants = {name: given[name] for name in ("weight", "scale", "shift")}
    same = plain(as_multiplied({"x": exact_x.to(dtype)}, "x")["x"], **constants, ceil_mode=ceil_mode)
    exact = plain(exact_x, **doubled(constants), ceil_mode=ceil_mode)
    there = image.to(DEVICE)
    doubled_image = there.repeat(1, 1, 2, 1)
    # What torch makes by default is not what the kernel reads: its normalisation is float32 always.
    torch.set_default_dtype(torch.float64)
    try:
        with kernels():
            for form in (there, doubled_image[:, :, :11], there.transpose(1, 2).contiguous().transpose(1, 2)):
                launched.clear()
                ours = rf.ops.stem(form, **on_device(constants), mean=MEAN, std=STD, ceil_mode=ceil_mode)
                assert launched == ["stem"]
                assert_obeys_error_rule(ours.cpu(), same, exact)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("dtype", "ceil_mode"), [(torch.float16, False), (torch.float32, True)])
def test_nan_and_infinities_pass_as_in_torch(dtype: torch.dtype, ceil_mode: bool, launched: list[str]) -> None:
    given = problem(1, 4, 12, 30, dtype=dtype)
    given["scale"][3] = 0.0
    given["x"][0, 0, 0, 0] = float("nan")
    given["x"][0, 1, 5, 15] = float("inf")
    given["x"][0, 2, 10, 25] = float("-inf")
    ours = check(given, launched, ceil_mode)
    assert ours.isnan().any() and ours.isfinite().any()


def test_positions_that_the_convolution_has_not_never_win(launched: list[str]) -> None:
    """Every convolved value is far below 0, so a 0 taken from beyond the border would show."""
    given = problem(1, 3, 9, 9, dtype=torch.float32)
    given |= as_multiplied({"x": given["x"].abs() + 1, "weight": -given["weight"].abs() - 0.1}, "x", "weight")
    given |= {"scale": given["scale"].abs() + 0.1, "shift": torch.full((20,), 1e4)}
    ours = check(given, launched)
    assert (ours < 1e4).all() and (ours > 0).all()


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


# --- gradients, tracing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_references(dtype: torch.dtype) -> None:
    given = problem(1, 3, 9, 8, 5, dtype)
    gradients = []
    for backend in ("cuda", "reference"):
        leaves = {name: t.to(DEVICE).clone().requires_grad_() for name, t in given.items()}
        with kernels(), backends.use(backend):
            rf.ops.stem(**leaves).float().square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for name, ours, theirs in zip(given, *gradients, strict=True):
        assert ours is not None and theirs is not None and ours.dtype is theirs.dtype
        relative = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert relative <= (1e-5 if dtype is torch.float32 else 4e-3), (name, float(relative))


def test_opcheck() -> None:
    given = on_device(problem(1, 2, 7, 8, 5))
    image = torch.randint(0, 256, (1, 9, 8, 2), dtype=torch.uint8, device=DEVICE)
    with kernels():
        torch.library.opcheck(OP, (*(t.clone().requires_grad_() for t in given.values()), None, None, False))
        torch.library.opcheck(
            OP,
            (image, *list(given.values())[1:], MEAN[:2], STD[:2], True),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiled() -> None:
    given = on_device(problem(1, 3, 9, 8))
    with kernels():
        compiled = torch.compile(rf.ops.stem, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**given), rf.ops.stem(**given))


# --- prepared, and what the kernel does not compute


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_prepared(ceil_mode: bool, launched: list[str]) -> None:
    given = problem(1, 3, 9, 14)
    x, *constants = on_device(given).values()
    with kernels():
        stem = ops.ALL["stem"].bind(*constants, ceil_mode=ceil_mode, dtype=torch.float16)
        assert stem.backend == "cuda" and stem.backend_for(x.to("meta")) == "cuda"
        first, second = stem(x), stem(x)
        assert stem(x[:0]).shape[0] == 0
    assert launched == ["stem"] * 2 and torch.equal(first, second)
    same, exact = plain(**given, ceil_mode=ceil_mode), plain(**doubled(given), ceil_mode=ceil_mode)
    assert_obeys_error_rule(first.cpu(), same, exact)


@pytest.mark.parametrize(
    ("c", "dtype", "allowed", "said"),
    [
        (5, torch.float16, True, "the CUDA stem takes up to 4 channels, x has 5"),
        (3, torch.float32, False, "the CUDA stem multiplies float32 as tf32 only, which torch is set not to"),
        (3, torch.float64, True, "the CUDA kernels compute float32, float16 and bfloat16, not float64"),
    ],
)
def test_what_it_cannot_compute_falls_back_and_says_so(
    c: int, dtype: torch.dtype, allowed: bool, said: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    given = on_device(problem(1, c, 9, 8, dtype=dtype))
    with kernels(), tf32(allowed):
        with pytest.warns(backends.FallbackWarning, match=f"{said}; the plain torch reference runs instead"):
            y = rf.ops.stem(**given)
        with backends.use("reference"):
            assert torch.equal(y, rf.ops.stem(**given))
        if dtype is torch.float16:
            stem = ops.ALL["stem"].bind(*list(given.values())[1:], dtype=dtype)
            assert stem.backend_for(given["x"].to("meta")) == "reference" and torch.equal(stem(given["x"]), y)
    assert launched == []
