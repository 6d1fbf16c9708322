"""conv_bn_act's tiles whose steps several programs share, and the launch that adds up their sums; when they run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast.backends import triton
from resnet_fast.kernels import gpus
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_conv_bn_act import plain, problem
from tests.ops.triton.test_conv_many_tiles import DTYPES, given
from tests.triton_device import DEVICE, kernels, launch_anew

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

H200 = gpus.known("h200")

#: n, h, w, c, k, taps, stride, residual; tile; shares.
CASES = [
    ((1, 1, 1, 64, 64, 3, 1, True), (16, 64), 3),
    ((2, 7, 7, 64, 128, 3, 1, False), (64, 64), 9),
    ((3, 7, 7, 192, 128, 1, 1, True), (32, 64), 3),
    ((1, 13, 29, 48, 64, 3, 1, True), (128, 64), 9),  # steps of 16 channels
    ((1, 97, 131, 128, 64, 1, 1, False), (128, 64), 2),
    ((5, 14, 10, 64, 128, 3, 2, True), (64, 128), 3),  # boxes run over every edge, of images too
    ((3, 6, 6, 128, 128, 1, 2, False), (128, 128), 2),
]


def module() -> Any:
    return importlib.import_module("resnet_fast.kernels.conv_bn_act")


def run(described: Any, config: Any, tensors: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """What the two launches leave: the output and the sums before."""
    kernel = module()
    there = {n: t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last)
             for n, t in ((n, None if t is None else t.to(DEVICE)) for n, t in tensors.items())}  # fmt: skip
    out = torch.full((described.n, described.k, *described.output), float("nan"), dtype=tensors["x"].dtype)
    out = out.to(DEVICE).contiguous(memory_format=torch.channels_last)
    sums = torch.full(kernel.sums_shape(described, config), float("nan"), device=DEVICE)
    with triton.on(torch.device(DEVICE)):
        kernel.launch_shares(there["x"], there["weight"], sums, described, config)()
        vectors = there["scale"], there["shift"], there["residual"]
        kernel.launch_sum(sums, *vectors, out, described, config, **options)()
    return out.cpu(), sums.cpu()


def divided(described: Any, tile: tuple[int, int], shares: int) -> Any:
    kernel = module()
    config = kernel.Config(*tile, kernel._widest_k(described, True), 4, 2, True, 0, shares)
    assert kernel.takes(config, described, H200)
    return config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "tile", "shares"), CASES, ids=str)
def test_shares_obey_the_error_rule(
    shape: tuple[Any, ...], tile: tuple[int, int], shares: int, dtype: torch.dtype
) -> None:
    described, tensors = given(shape, dtype)
    if described.pixels > 10_000 and dtype is torch.bfloat16:
        pytest.skip("an interpreter takes long for so many pixels, and float16 shows the same")
    geometry = {"stride": described.stride[0], "padding": described.padding[0]}
    wide = {n: t if t is None else t.double() for n, t in tensors.items()}
    config = divided(described, tile, shares)
    every = (("relu", False), ("none", False), ("relu", True))
    for activation, after in every if described.pixels < 50 else every[:1]:
        options: dict[str, Any] = {"activation": activation, "residual_after_activation": after}
        ours, _ = run(described, config, tensors, **options)
        same, exact = (plain(**given, **geometry, **options) for given in (tensors, wide))
        assert_obeys_error_rule(ours, same, exact, f"{config} {options}")


@pytest.mark.parametrize(("shape", "tile", "shares"), [CASES[1], CASES[3], CASES[6]], ids=str)
def test_each_share_has_its_steps_and_they_are_added_in_order(
    shape: tuple[Any, ...], tile: tuple[int, int], shares: int
) -> None:
    """A share is the convolution with all other steps' weights at zero. Scale 1 and shift 0 do not round."""
    described, tensors = given(shape, torch.float16)
    described = dataclasses.replace(described, residual=False)
    tensors |= {"scale": torch.ones(described.k), "shift": torch.zeros(described.k), "residual": None}
    config = divided(described, tile, shares)
    ours, sums = run(described, config, tensors, activation="none")
    steps = module()._steps(described, config.block_k) // shares * config.block_k
    flat = tensors["weight"].permute(0, 2, 3, 1).flatten(1)
    taps, c = described.kernel[0], described.c
    total = torch.zeros(sums[..., 0, :].shape)
    for share in range(shares):
        some = torch.zeros_like(flat)
        some[:, share * steps : (share + 1) * steps] = flat[:, share * steps : (share + 1) * steps]
        weight = some.unflatten(1, (taps, taps, c)).permute(0, 3, 1, 2)
        geometry = {"stride": described.stride, "padding": described.padding}
        same, exact = (
            torch.conv2d(tensors["x"].to(d), weight.to(d), **geometry).permute(0, 2, 3, 1)
            for d in (torch.float32, torch.float64)
        )
        assert_obeys_error_rule(sums[..., share, :], same, exact, f"share {share}")
        total += sums[..., share, :]
    assert torch.equal(ours, total.to(torch.float16).permute(0, 3, 1, 2))


def test_numbers_that_are_not_finite_and_zeros() -> None:
    described, tensors = given((3, 7, 7, 64, 64, 3, 1, True), torch.float16)
    tensors["x"][1] = 0.0
    tensors["residual"][1] = 0.0
    tensors["x"][0, 50, 3, 3] = float("inf")
    tensors["x"][2, 5, 0, 0] = float("nan")
    tensors["residual"][2, 1, 6, 6] = float("inf")
    tensors["weight"][7, 63, 2, 2] = float("nan")
    tensors["weight"][8] = 0.0
    config = divided(described, (64, 64), 3)
    for after in (False, True):
        options: dict[str, Any] = {"residual_after_activation": after}
        ours, _ = run(described, config, tensors, **options)
        same = plain(**tensors, padding=1, **options)
        exact = plain(**{n: t.double() for n, t in tensors.items()}, padding=1, **options)
        others = torch.arange(64) != 7  # where padding meets that NaN, torch on a CPU may leave the product out
        assert_obeys_error_rule(ours[:, others], same[:, others], exact[:, others], f"after {after}")
        assert ours[:, 7, 1:-1, 1:-1].isnan().all()
        assert ours[2, others][:, :2, :2].isnan().all() and not ours[1, others].isnan().any()
        assert torch.equal(ours[1, others], tensors["shift"].relu().half()[others, None, None].expand(-1, 7, 7))
        assert float(ours[2, 1, 6, 6]) == float("inf")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    kernel, names = module(), []
    for function in ("launch", "launch_shares", "launch_sum"):
        make: Callable[..., Any] = getattr(kernel, function)

        def launch(*args: Any, _make: Any = make, **kwargs: Any) -> Any:
            made = _make(*args, **kwargs)
            names.append(made.kernel.fn.__name__)
            return made

        monkeypatch.setattr(kernel, function, launch)
    launch_anew(monkeypatch)
    return names


@pytest.mark.skipif(DEVICE == "cuda", reason="which launches run is the GPU's own choice")
@pytest.mark.parametrize("residual", [False, True])
def test_the_op_gives_the_same_bits_at_each_run_and_at_any_place_of_a_batch(
    residual: bool, launched: list[str]
) -> None:
    a = problem(2, 512, 7, 7, 64, 3, residual=(7, 7) if residual else None)
    half = {n: t if t is None else t.float() if t.dim() == 1 else t.half() for n, t in a.items()}
    with kernels("h200"):
        ours = rf.ops.conv_bn_act(**half, padding=1)
        again = rf.ops.conv_bn_act(**half, padding=1)
        turned = {n: t.flip(0) if n in ("x", "residual") and t is not None else t for n, t in half.items()}
        other = rf.ops.conv_bn_act(**turned, padding=1)
    assert launched == ["_boxes", "_sum"] * 3
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, again) and torch.equal(ours, other.flip(0))
    exact = plain(**{n: t if t is None else t.double() for n, t in half.items()}, padding=1)
    assert_obeys_error_rule(ours, plain(**half, padding=1), exact)


@pytest.mark.skipif(DEVICE == "cuda", reason="which launches run is the GPU's own choice")
def test_an_odd_address_is_gathered_by_one_launch(launched: list[str]) -> None:
    a = problem(1, 512, 7, 7, 64, 3)
    half = {n: t if t is None else t.float() if t.dim() == 1 else t.half() for n, t in a.items()}
    whole = torch.empty(half["x"].numel() + 1, dtype=torch.float16)
    x = whole[1:].view(1, 7, 7, 512).permute(0, 3, 1, 2).copy_(half["x"])
    with kernels("h200"):
        ours = rf.ops.conv_bn_act(**{**half, "x": x}, padding=1)
        assert launched == ["_gather"]
        aligned = rf.ops.conv_bn_act(**half, padding=1)
    assert launched == ["_gather", "_boxes", "_sum"]
    exact = plain(**{n: t if t is None else t.double() for n, t in half.items()}, padding=1)
    for found in (ours, aligned):
        assert_obeys_error_rule(found, plain(**half, padding=1), exact)


def of(n: int, size: int, c: int, k: int, taps: int, **changes: Any) -> Any:
    stride = changes.pop("stride", 1)
    geometry = ((taps, taps), (stride, stride), (taps // 2,) * 2, (1, 1), 1)
    return dataclasses.replace(module().Problem(n, size, size, c, k, *geometry, "fp16", False), **changes)


@pytest.mark.parametrize(
    ("asked", "tile", "shares"),
    [
        (of(1, 7, 512, 512, 3), (64, 64), 12),
        (of(1, 14, 512, 512, 3, stride=2), (64, 64), 12),
        (of(2, 7, 512, 512, 3), (64, 128), 12),
        (of(4, 7, 512, 512, 3), (128, 128), 12),
        (of(8, 7, 512, 512, 3, residual=True), (128, 128), 8),
        (of(32, 7, 512, 512, 3), (128, 128), 2),
        (of(1, 14, 256, 256, 3), (16, 64), 1),  # a second launch would take what it saves
        (of(1, 7, 2048, 512, 1), (16, 64), 1),
        (of(1, 56, 64, 64, 3), (32, 64), 1),
        (of(128, 7, 512, 512, 3), (256, 128), 1),
    ],
    ids=str,
)
def test_when_tiles_have_several_shares(asked: Any, tile: tuple[int, int], shares: int) -> None:
    kernel = module()
    for precision in ("fp16", "bf16"):
        config = kernel.heuristic(dataclasses.replace(asked, precision=precision), H200)
        assert ((config.block_m, config.block_n), config.shares) == (tile, shares)
        assert kernel.takes(config, asked, H200)
        if shares > 1:  # the next launch's programs find room beside these
            assert config.programs(asked, H200) == 2 and kernel.blocks(asked, config) <= H200.multiprocessors


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 520},  # a tile would run into the sums of the next share
        {"groups": 2},
        {"dilation": (2, 2), "padding": (2, 2)},
        {"c": 510},
        {"c": 513, "k": 513},
        {"stride": (2, 2)},  # an odd height
        {"stride": (1, 2)},
        {"precision": "fp32"},
        {"precision": "tf32"},
    ],
    ids=str,
)
def test_what_has_no_shares(changes: dict[str, Any]) -> None:
    """Neither chosen nor tried, and not taken from a table."""
    kernel = module()
    usual = of(1, 7, 512, 512, 3)
    config, asked = kernel.heuristic(usual, H200), dataclasses.replace(usual, **changes)
    assert config.shares > 1 and kernel.heuristic(asked, H200).shares == 1
    assert all(each.shares == 1 for each in kernel.candidates(asked, H200))
    if "precision" not in changes:
        assert not kernel.takes(config, asked, H200)


def test_choices_that_no_kernel_takes() -> None:
    kernel, asked = module(), of(1, 7, 512, 512, 3)
    config = kernel.heuristic(asked, H200)
    assert kernel.takes(config, asked, H200)
    for changes in (
        {"shares": 5},
        {"shares": 18},
        {"shares": 144},
        {"persistent": 132},
        {"boxes": False},
        {"block_n": 32},
    ):
        assert not kernel.takes(dataclasses.replace(config, **changes), asked, H200), changes
    large = of(4000, 14, 512, 512, 3)
    assert kernel.takes(dataclasses.replace(config, shares=2), large, H200)
    assert not kernel.takes(dataclasses.replace(config, shares=4), large, H200)  # 2^30 sums and more
    for name in ("a100", "b200", "l4"):
        assert kernel.heuristic(asked, gpus.known(name)) == kernel.tiled(asked, gpus.known(name))
    assert not kernel.takes(config, asked, gpus.known("a100"))


def test_candidates_with_shares() -> None:
    from resnet_fast.kernels import conv_statistics, problems

    kernel, asked = module(), of(1, 7, 512, 512, 3)
    found = list(kernel.candidates(asked, H200))
    assert len(found) == len(set(found)) and kernel.heuristic(asked, H200) in found
    assert {each.shares for each in found} > {1, 2, 12}
    assert all(kernel.takes(each, asked, H200) for each in found)
    training = problems.ConvStatistics(*dataclasses.astuple(asked))
    assert all(each.shares == 1 for each in conv_statistics.candidates(training, H200))
    assert conv_statistics.heuristic(training, H200).shares == 1
    assert all(each.shares == 1 for each in kernel.candidates(of(128, 56, 64, 64, 3), H200))
