"""bottleneck_tail's Triton kernels, both forms, against torch layers: shapes, special values, every candidate tile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import triton
from resnet_fast.kernels import gpus
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_bottleneck_tail import in_dtype, pair, plain, problem
from tests.triton_device import DEVICE, FORMS

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("form", FORMS)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small(form: str) -> gpus.GPU:
    """The GPU with a single multiprocessor, so that a few pixels are enough for the kernel to be chosen."""
    gpu = triton.gpu_of(torch.device(DEVICE)) if DEVICE == "cuda" else gpus.known(form)
    return replace(gpu, multiprocessors=1)


@contextmanager
def kernels(form: str) -> Iterator[None]:
    with triton.assume(small(form)), backends.use("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    kernel = importlib.import_module("resnet_fast.kernels.bottleneck_tail")
    make, names = kernel.launch, []

    def launch(*args: Any) -> Any:
        made = make(*args)
        names.append(made.kernel.fn.__name__)
        return made

    monkeypatch.setattr(kernel, "launch", launch)
    return names


def check(arguments: dict[str, Any], dtype: torch.dtype, form: str) -> tuple[Tensor, ...]:
    """The op by its kernel and torch's layers in ``dtype`` on the same rounded inputs, under the error rule."""
    narrow, exact = in_dtype(arguments, dtype)
    there = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in narrow.items()}
    with kernels(form):
        ours = tuple(t.cpu() for t in pair(rf.ops.bottleneck_tail(**there)))
    same, want = plain(**narrow), plain(**exact)
    assert len(ours) == len(same)
    for name, a, b, c in zip(("y", "following"), ours, same, want, strict=False):
        assert_obeys_error_rule(a, b, c, f"{form} {dtype} {name}")
        assert a.is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mid", [16, 32, 64])
@pytest.mark.parametrize("project", [None, 48])
@pytest.mark.parametrize("following", [None, 32])
def test_shortcuts_and_followers(
    form: str, dtype: torch.dtype, mid: int, project: int | None, following: int | None, launched: list[str]
) -> None:
    check(problem(2, mid, (5, 9), 80, project=project, following=following), dtype, form)
    assert launched == ["_gather" if form == "a100" or small(form).capability < 90 else "_boxes"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 29), (6, 10)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_and_strides(form: str, dtype: torch.dtype, size: tuple[int, int], stride: int) -> None:
    check(problem(3, 16, size, 64, stride=stride), dtype, form)
    check(problem(1, 32, size, 64, stride=stride, project=24, following=16), dtype, form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(form: str, dtype: torch.dtype, n: int) -> None:
    y, following = check(problem(n, 16, (4, 6), 64, stride=2, project=32, following=16), dtype, form)
    assert y.shape == (n, 64, 2, 3) and following.shape == (n, 16, 2, 3)


@pytest.mark.parametrize(("mid", "k", "following"), [(17, 64, 16), (24, 64, None), (16, 40, 20), (16, 50, 16)])
def test_channel_counts_without_a_tile(form: str, mid: int, k: int, following: int | None, launched: list[str]) -> None:
    """MID and NEXT are tile sizes; if they are no powers of two the convolutions run one by one, on Triton too."""
    check(problem(2, mid, (5, 6), k, following=following), torch.float16, form)
    assert launched == (["_gather"] if (mid, following) == (16, 16) else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [None, 32])
def test_nan_and_infinities_pass_as_in_torch(form: str, dtype: torch.dtype, project: int | None) -> None:
    arguments = problem(2, 16, (7, 9), 64, project=project, following=16)
    arguments["a"][0, 3, 2, 2] = float("nan")
    arguments["a"][1, 3, 6, 8] = float("inf")
    arguments["residual"][0, 5, 6, 6] = float("nan")
    arguments["residual"][1, 5, 0, 0] = float("-inf")
    y, _ = check(arguments, dtype, form)
    assert y.isnan().any() and y.isinf().any()


@pytest.mark.parametrize("k", [40, 48, 64])
def test_infinity_in_the_middle_spreads_no_further_than_in_torch(form: str, k: int) -> None:
    """b is infinite: where the last slice of channels is not full, 0 times it must reach nothing."""
    arguments = problem(1, 16, (5, 6), k, following=16)
    arguments["a"][0, 3, 2, 2] = float("inf")
    arguments["weight3"] = -arguments["weight3"].abs()
    arguments["weight2"] = arguments["weight2"].abs()
    arguments["shift2"] = arguments["shift2"].abs()
    y, following = check(arguments, torch.float16, form)
    assert y.isfinite().all() and following.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16])
def test_any_strides_and_addresses(form: str, dtype: torch.dtype) -> None:
    narrow, _ = in_dtype(problem(2, 16, (6, 8), 64, following=16), dtype)
    there = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in narrow.items()}

    def odd_address(t: Tensor) -> Tensor:
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        return flat.as_strided(t.shape, (t[0].numel(), 1, t.shape[3] * t.shape[1], t.shape[1])).copy_(t)

    layouts = {
        "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "odd address": odd_address,
    }
    with kernels(form):
        want = pair(rf.ops.bottleneck_tail(**there))
        for name, layout in layouts.items():
            other = {key: layout(there[key]) for key in ("a", "residual", "weight2", "weight3", "weight1")}
            got = pair(rf.ops.bottleneck_tail(**(there | other)))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, msg=f"{name}: not the same answer")


@pytest.mark.parametrize("project", [None, 48])
def test_every_candidate_gives_the_answer(form: str, project: int | None) -> None:
    module = importlib.import_module("resnet_fast.kernels.bottleneck_tail")
    arguments = problem(2, 32, (6, 10), 128, stride=2, project=project, following=16)
    narrow, exact = in_dtype(arguments, torch.float16)
    same, want = plain(**narrow), plain(**exact)
    n, mid, h, w = narrow["a"].shape
    shortcut = None if project is None else (project, *narrow["residual"].shape[2:], narrow["shortcut_stride"])
    described = module.Problem(n, h, w, mid, 128, 2, shortcut, 16, "fp16")
    there = {
        key: t.to(DEVICE).contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.to(DEVICE)
        for key, t in narrow.items()
        if isinstance(t, Tensor)
    }
    tiles = {(t.block_m, t.block_n, t.block_c, t.boxes): t for t in module.candidates(described, small(form))}
    assert len(tiles) >= 4
    for config in tiles.values():
        y, following = (torch.empty_like(t, device=DEVICE).contiguous(memory_format=torch.channels_last) for t in same)
        constants = {
            suffix: tuple(there[f"{name}{suffix}"] for name in ("weight", "scale", "shift"))
            for suffix in ("1", "2", "3", "_shortcut")
            if f"weight{suffix}" in there
        }
        module.launch(
            there["a"], *constants["2"], *constants["3"], there["residual"], constants.get("_shortcut"), y,
            constants["1"], following, described, config,
        )()  # fmt: skip
        for ours, theirs, truth in zip((y, following), same, want, strict=True):
            assert_obeys_error_rule(ours.cpu(), theirs, truth, str(config))


def test_offsets_of_64_bits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("resnet_fast.kernels.bottleneck_tail")
    monkeypatch.setattr(kernel, "wide", lambda *_: True)
    check(problem(2, 16, (7, 5), 72, stride=2, project=20, following=16), torch.float16, form)


def test_few_pixels_run_convolution_by_convolution(form: str, launched: list[str]) -> None:
    """A program does a whole tile of pixels alone, so a GPU with many multiprocessors needs many tiles."""
    gpu = replace(small(form), multiprocessors=132)
    narrow, exact = in_dtype(problem(2, 16, (6, 6), 64, following=16), torch.float16)
    there = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in narrow.items()}
    with triton.assume(gpu), backends.use("triton"):
        ours = pair(rf.ops.bottleneck_tail(**there))
    assert not launched
    for a, b, c in zip(ours, plain(**narrow), plain(**exact), strict=True):
        assert_obeys_error_rule(a.cpu(), b, c)


def test_the_prepared_form_runs_the_kernel(form: str, launched: list[str]) -> None:
    from resnet_fast import ops

    narrow, exact = in_dtype(problem(2, 16, (6, 8), 64, project=32, following=16), torch.float16)
    there = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in narrow.items()}
    data = [there.pop(name) for name in ("a", "residual")]
    strides = {name: [value] * 2 for name, value in there.items() if name.endswith("stride")}
    with triton.assume(small(form)):
        tail = ops.ALL["bottleneck_tail"].bind(**(there | strides), dtype=torch.float16, backend="triton")
        ours = pair(tail(*data))
    assert tail.backend == "triton" and len(launched) == 1
    for a, b, c in zip(ours, plain(**narrow), plain(**exact), strict=True):
        assert_obeys_error_rule(a.cpu(), b, c)


def test_gradients_and_opcheck(form: str) -> None:
    narrow, _ = in_dtype(problem(2, 16, (4, 6), 64, stride=1, project=32, following=16), torch.float32)
    there = {n: t.to(DEVICE).requires_grad_() if isinstance(t, Tensor) else t for n, t in narrow.items()}
    names = ("a", "weight2", "scale2", "shift2", "weight3", "scale3", "shift3", "residual", "weight_shortcut",
             "scale_shortcut", "shift_shortcut", "weight1", "scale1", "shift1")  # fmt: skip
    tensors = tuple(there[name] for name in names)
    with kernels(form):
        torch.library.opcheck(torch.ops.resnet_fast.bottleneck_tail.default, (*tensors, [1, 1], [1, 1]))
        y, following = rf.ops.bottleneck_tail(**there)
        got = torch.autograd.grad(y.sum() + following.sum(), tensors)
    want = torch.autograd.grad(sum(t.sum() for t in plain(**there)), tensors)
    for name, a, b in zip(names, got, want, strict=True):
        assert ((a - b).double().norm() / b.double().norm()).item() <= 1e-4, name
