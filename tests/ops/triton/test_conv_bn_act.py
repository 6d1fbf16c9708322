"""conv_bn_act's Triton kernels, both forms, against plain torch layers; every candidate tile; the launch choice."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast.backends import triton
from resnet_fast.kernels import gpus
from resnet_fast.roofline.measure import tf32
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_conv_bn_act import plain, problem
from tests.triton_device import DEVICE, FORMS, kernels, launch_anew

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    kernel = importlib.import_module("resnet_fast.kernels.conv_bn_act")
    names: list[str] = []
    make: Callable[..., Any] = kernel.launch

    def launch(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        names.append(made.kernel.fn.__name__)
        return made

    monkeypatch.setattr(kernel, "launch", launch)
    launch_anew(monkeypatch)
    return names


def check(arguments: dict[str, Any], dtype: torch.dtype, form: str, **options: Any) -> Tensor:
    """Our kernel and torch's layers in ``dtype`` on the same rounded inputs, under the error rule."""
    narrow = {
        name: t if t is None else t.float() if name in ("scale", "shift") else t.to(dtype)
        for name, t in arguments.items()
    }
    exact = {name: t if t is None else t.double() for name, t in narrow.items()}
    with kernels(form):
        ours = rf.ops.conv_bn_act(**{n: t if t is None else t.to(DEVICE) for n, t in narrow.items()}, **options)
    assert ours.device.type == DEVICE and ours.is_contiguous(memory_format=torch.channels_last)
    ours = ours.cpu()
    assert_obeys_error_rule(ours, plain(**narrow, **options), plain(**exact, **options), f"{form} {dtype} {options}")
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 29)])
@pytest.mark.parametrize(("c", "kernel"), [(64, 1), (64, 3), (32, 7)])
def test_sizes(form: str, dtype: torch.dtype, size: tuple[int, int], c: int, kernel: int) -> None:
    check(problem(2, c, *size, 24, kernel), dtype, form, padding=kernel // 2)


@pytest.mark.parametrize("form", FORMS[-1:])  # an odd number of channels is always gathered
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 29)])
@pytest.mark.parametrize("c", [1, 3, 17])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_odd_channels(form: str, dtype: torch.dtype, size: tuple[int, int], c: int, kernel: int) -> None:
    check(problem(2, c, *size, 24, kernel), dtype, form, padding=kernel // 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_odd_image(form: str, dtype: torch.dtype) -> None:
    check(problem(1, 16, 97, 131, 16, 3), dtype, form, padding=1, stride=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "size", "kernel"),
    [
        ({"stride": 2, "padding": 1}, (12, 10), 3),
        ({"stride": 2, "padding": 1}, (13, 10), 3),
        ({"stride": 2}, (12, 10), 1),
        ({"stride": 2, "padding": 3}, (14, 8), 7),
        ({"stride": 2, "padding": 2}, (8, 8), 3),
        ({"stride": (2, 1), "padding": (1, 0)}, (13, 10), 3),
        ({"dilation": 2, "padding": 2}, (13, 10), 3),
        ({"dilation": (1, 3), "padding": (0, 3), "stride": 2}, (13, 10), 3),
        ({"padding": 2}, (5, 5), 1),
        ({"stride": 3, "padding": 1}, (13, 10), 3),
        ({"groups": 4, "padding": 1}, (13, 10), 3),
        ({"groups": 32, "padding": 1, "stride": 2}, (13, 10), 3),
        ({"groups": 2}, (6, 6), 1),
    ],
)
def test_geometry(form: str, dtype: torch.dtype, options: dict[str, Any], size: tuple[int, int], kernel: int) -> None:
    check(problem(2, 32, *size, 64, kernel, groups=options.get("groups", 1)), dtype, form, **options)


@pytest.mark.parametrize(
    "options",
    [{"dilation": (2, 3), "padding": (2, 3)}, {"stride": (2, 3), "padding": (0, 2)}, {"groups": 5, "dilation": (3, 1)}],
)
def test_geometry_of_few_channels(form: str, options: dict[str, Any]) -> None:
    """One step of the product runs over several taps."""
    check(problem(2, 5, 11, 12, 10, 3, groups=options.get("groups", 1)), torch.float32, form, **options)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_resnext_groups(form: str, width: int) -> None:
    """32 groups of 4 to 16 channels, as ResNeXt's stages have them."""
    check(problem(1, 32 * width, 5, 6, 32 * width, 3, groups=32), torch.float16, form, padding=1, groups=32)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("c", "k", "kernel", "stride", "residual"), [(32, 48, 3, 1, True), (64, 32, 1, 1, False), (32, 64, 3, 2, False)]
)
def test_every_candidate_gives_the_answer(
    form: str, precision: str, c: int, k: int, kernel: int, stride: int, residual: bool
) -> None:
    from resnet_fast.kernels import conv_bn_act as module

    dtype = torch.float16 if precision == "fp16" else torch.float32
    gpu = triton.gpu_of(torch.device(DEVICE)) if DEVICE == "cuda" else gpus.known(form)
    described = module.Problem(
        3, 10, 6, c, k, (kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1), 1, precision, residual
    )
    p, q = described.output
    arguments = problem(3, c, 10, 6, k, kernel, residual=(p, q) if residual else None)
    narrow = {n: t if t is None else t.to(dtype) for n, t in arguments.items() if n not in ("scale", "shift")}
    narrow |= {n: arguments[n].float() for n in ("scale", "shift")}
    options = {"stride": stride, "padding": kernel // 2}
    same = plain(**narrow, **options)
    exact = plain(**{n: t if t is None else t.double() for n, t in narrow.items()}, **options)
    there = {
        n: t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last)
        for n, t in ((n, t if t is None else t.to(DEVICE)) for n, t in narrow.items())
    }
    tried = list(module.candidates(described, gpu))
    assert module.heuristic(described, gpu).boxes is (gpu.capability >= 90)
    tiles = {(t.block_m, t.block_n, t.block_k, t.boxes): t for t in tried}  # warps and stages mean nothing here
    assert len(tiles) >= 2
    for config in tiles.values():
        out = torch.empty_like(same, device=DEVICE).contiguous(memory_format=torch.channels_last)
        module.launch(
            there["x"], there["weight"], there["scale"], there["shift"], there["residual"], out, described, config
        )()
        assert_obeys_error_rule(out.cpu(), same, exact, str(config))


def test_which_form_runs(form: str, launched: list[str]) -> None:
    """Boxes where the GPU has a copy engine and the shape allows it, gathers elsewhere; neither for no images."""
    gpu = triton.gpu_of(torch.device(DEVICE)) if DEVICE == "cuda" else gpus.known(form)
    engine = gpu.capability >= 90
    cases = [
        ((2, 16, 8, 8, 16, 3), {"padding": 1}, engine),
        ((2, 16, 8, 8, 16, 3), {"padding": 1, "stride": 2}, engine),
        ((2, 16, 7, 8, 16, 3), {"padding": 1, "stride": 2}, False),
        ((2, 17, 8, 8, 16, 3), {"padding": 1}, False),
        ((2, 16, 8, 8, 17, 3), {"padding": 1}, False),
        ((2, 32, 8, 8, 32, 3, 2), {"padding": 1, "groups": 2}, False),
        ((2, 16, 8, 8, 16, 3), {"padding": 2, "dilation": 2}, False),
    ]
    for shape, options, boxes in cases:
        launched.clear()
        check(problem(*shape), torch.float16, form, **options)
        assert launched == ["_boxes" if boxes else "_gather"], (shape, options)
    launched.clear()
    check(problem(0, 16, 8, 8, 16, 3), torch.float16, form, padding=1)
    assert not launched


def test_offsets_of_64_bits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.conv_bn_act")
    monkeypatch.setattr(kernel, "wide", lambda *_: True)
    check(problem(2, 17, 9, 7, 20, 3, residual=(9, 7)), torch.float16, form, padding=1)
    check(problem(2, 12, 9, 7, 20, 3, groups=4), torch.float32, form, groups=4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [1, 3])
def test_tf32_follows_torchs_setting(form: str, kernel: int) -> None:
    a = {n: t if t is None else t.float().cuda() for n, t in problem(2, 64, 14, 14, 64, kernel).items()}
    exact = plain(**{n: t if t is None else t.double() for n, t in a.items()}, padding=kernel // 2)
    errors = {}
    for allowed in (False, True):
        with tf32(allowed):
            ours, torchs = rf.ops.conv_bn_act(**a, padding=kernel // 2), plain(**a, padding=kernel // 2)
        assert_obeys_error_rule(ours, torchs, exact, f"tf32 {allowed}")
        errors[allowed] = float((ours.double() - exact).norm() / exact.norm())
    assert errors[False] < 1e-6 < 1e-5 < errors[True]


@pytest.mark.gpu
def test_tensors_beyond_2_to_the_31_elements(form: str) -> None:
    x = torch.randn(1, 1, 32768, 40000, device="cuda", dtype=torch.float16).expand(1, 2, -1, -1)
    weight = torch.randn(2, 2, 1, 1, device="cuda", dtype=torch.float16)
    one, zero = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    y = rf.ops.conv_bn_act(x, weight, one, zero)
    want = rf.ops.conv_bn_act(x[:, :, -1:], weight, one, zero)
    assert torch.equal(y[:, :, -1:], want)
