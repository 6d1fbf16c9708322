"""conv_bn_act's programs that take several tiles, and its largest tiles: same bits as the usual ones; when they run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.kernels import gpus
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_conv_bn_act import plain, problem
from tests.triton_device import DEVICE

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.bfloat16, torch.float16]

EXPANDED = [(3, 13, 29, 64, 72, 1, 1, True), (2, 7, 7, 128, 256, 1, 1, True), (1, 5, 5, 256, 136, 1, 1, True)]
DEEP = [(2, 9, 11, 64, 40, 3, 1, False), (3, 10, 12, 64, 136, 3, 2, False), (2, 12, 10, 128, 72, 1, 2, False)]


def given(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A problem [n, h, w, c, k, taps, stride, residual] and its tensors."""
    from resnet_fast.kernels import conv_bn_act as module

    n, h, w, c, k, taps, stride, residual = shape
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    described = module.Problem(
        n, h, w, c, k, (taps, taps), (stride, stride), (taps // 2,) * 2, (1, 1), 1, precision, residual
    )
    arguments = problem(n, c, h, w, k, taps, residual=described.output if residual else None)
    return described, {
        name: t if t is None else t.float() if t.dim() == 1 else t.to(dtype) for name, t in arguments.items()
    }


def launch(described: Any, config: Any, tensors: dict[str, Any], **options: Any) -> tuple[Tensor, str, int]:
    """The answer, what was launched, and how many programs."""
    from resnet_fast.kernels import conv_bn_act as module

    out = torch.full((described.n, described.k, *described.output), float("nan"), dtype=tensors["x"].dtype)
    out = out.to(DEVICE).contiguous(memory_format=torch.channels_last)
    there = (None if t is None else t.to(DEVICE) for t in tensors.values())
    there = (t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last) for t in there)
    made = module.launch(*there, out, described, config, **options)
    made()
    return out.cpu(), made.kernel.fn.__name__, made.grid[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EXPANDED + DEEP, ids=str)
@pytest.mark.parametrize("tile", [(64, 64), (64, 128), (256, 128), (512, 64)], ids=str)
def test_programs_of_several_tiles_have_the_bits_of_programs_of_one(
    shape: tuple[Any, ...], tile: tuple[int, int], dtype: torch.dtype
) -> None:
    """One program alone, numbers that divide the tiles and do not, more than there are tiles."""
    from resnet_fast.kernels import conv_bn_act as module

    described, tensors = given(shape, dtype)
    c, stride, taps = described.c, described.stride[0], described.kernel[0]
    options = {"stride": stride, "padding": taps // 2}
    exact = plain(**{n: t if t is None else t.double() for n, t in tensors.items()}, **options)
    for block_k in (64, c) if described.residual else (64,):
        one = module.Config(*tile, block_k, 8, 3, True)
        wanted, name, tiles = launch(described, one, tensors)
        assert name == "_boxes" and tiles == module.blocks(described, one)
        assert_obeys_error_rule(wanted, plain(**tensors, **options), exact, f"{one}")
        for programs in (1, 2, 3, 5, 4096):
            several = module.Config(*tile, block_k, 8, 3, True, programs)
            columns = -(-described.k // tile[1])
            if several.resident(described) and programs < columns:
                continue
            found, name, grid = launch(described, several, tensors)
            assert name == ("_resident" if described.residual and block_k == c else "_boxes")
            assert grid == min(tiles, programs // columns * columns if name == "_resident" else programs)
            assert torch.equal(found, wanted), several


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("box", [16, 64, 128])
@pytest.mark.parametrize("shape", [DEEP[0], DEEP[1], (4, 7, 7, 32, 128, 3, 1, False), DEEP[2]], ids=str)
def test_three_boxes_have_the_bits_of_one(
    shape: tuple[Any, ...], box: int, activation: str, dtype: torch.dtype
) -> None:
    """One tile and several, the last of one box, two and three; channels that fill a tile and do not."""
    from resnet_fast.kernels import conv_bn_act as module

    described, tensors = given(shape, dtype)
    tensors["x"][0, 0, 0, 0], tensors["x"][-1, 1, -1, -1] = float("nan"), float("inf")
    block_k = min(64, described.c)
    one, three = (module.Config(pixels, 64, block_k, 8, 3, True) for pixels in (box, 3 * box))
    wanted, name, alone = launch(described, one, tensors, activation=activation)
    assert name == "_boxes"
    found, name, grid = launch(described, three, tensors, activation=activation)
    columns = -(-described.k // 64)
    assert name == "_three_boxes" and grid == -(-alone // columns // 3) * columns == module.blocks(described, three)
    assert torch.equal(found.nan_to_num(9, 8, 7), wanted.nan_to_num(9, 8, 7))
    assert module.takes(three, described, H200)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("after", [False, True])
def test_programs_that_keep_their_weights_add_the_residual_where_asked(activation: str, after: bool) -> None:
    from resnet_fast.kernels import conv_bn_act as module

    described, tensors = given(EXPANDED[0], torch.float16)
    tensors["x"][0, 0, 0, 0], tensors["residual"][1, 1, 1, 1] = float("nan"), float("inf")
    options = {"activation": activation, "residual_after_activation": after}
    config = module.Config(64, 64, 64, 8, 3, True)
    wanted, _, _ = launch(described, config, tensors, **options)
    found, name, _ = launch(described, dataclasses.replace(config, persistent=4), tensors, **options)
    assert name == "_resident" and torch.equal(found.nan_to_num(9, 8, 7), wanted.nan_to_num(9, 8, 7))
    assert bool(found[0, :, 0, 0].isnan().all()) and float(found[1, 1, 1, 1]) == float("inf")


@pytest.mark.parametrize("shape", [EXPANDED[0], DEEP[0], DEEP[1]], ids=str)
def test_large_tiles_are_gathered_smaller_if_an_address_is_odd(shape: tuple[Any, ...]) -> None:
    """What the copy engine cannot address: the masked form has no registers for such tiles."""
    from resnet_fast.kernels import conv_bn_act as module

    described, tensors = given(shape, torch.float16)
    config = module.Config(512, 64, 64, 8, 8, True, 3)
    wanted, _, _ = launch(described, config, tensors)
    whole = torch.empty(tensors["x"].numel() + 1, dtype=torch.float16, device=DEVICE)
    n, c, h, w = tensors["x"].shape
    x = whole[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(tensors["x"])
    out = torch.empty_like(wanted, device=DEVICE).contiguous(memory_format=torch.channels_last)
    others = [None if t is None else t.to(DEVICE) for name, t in tensors.items() if name != "x"]
    others = [t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last) for t in others]
    made = module.launch(x, *others, out, described, config)
    assert made.kernel.fn.__name__ == "_gather" and made.options["BLOCK_M"] == 128 and made.options["num_stages"] == 4
    made()
    torch.testing.assert_close(out.cpu(), wanted, rtol=2e-3, atol=2e-3)


H200 = gpus.known("h200")


def chosen(shape: tuple[Any, ...], **changes: Any) -> Any:
    """The heuristic's choice on an H200, and the problem."""
    from resnet_fast.kernels import conv_bn_act as module

    described = dataclasses.replace(given((*shape[:1], 2, 2, *shape[3:]), torch.float16)[0], h=shape[1], w=shape[2])
    described = dataclasses.replace(described, **changes)
    return module, described, module.heuristic(described, H200)


@pytest.mark.parametrize(
    ("shape", "tile", "persistent"),
    [
        ((128, 56, 56, 64, 256, 1, 1, True), (64, 128, 64), 264),
        ((128, 28, 28, 128, 512, 1, 1, True), (64, 128, 128), 132),
        ((128, 14, 14, 256, 1024, 1, 1, True), (64, 128, 256), 132),
        ((128, 7, 7, 512, 2048, 1, 1, True), (128, 128, 64), 0),  # its weights leave no room
        ((1, 14, 14, 256, 1024, 1, 1, True), (32, 64, 64), 0),  # few tiles
        ((1, 14, 14, 256, 256, 3, 1, False), (16, 64, 64), 0),  # 28 of 32 pixels
        ((1, 7, 7, 2048, 512, 1, 1, False), (16, 64, 64), 0),
        ((1, 14, 14, 1024, 512, 1, 1, False), (32, 64, 64), 0),  # 56 of 32 pixels
        ((1, 56, 56, 256, 128, 1, 1, False), (64, 64, 64), 0),  # 196 of 32 pixels would read a half more
        ((8, 14, 14, 1024, 512, 1, 1, False), (64, 128, 64), 0),
        ((128, 28, 28, 128, 128, 3, 1, False), (384, 128, 64), 0),  # two rounds of 131
        ((96, 28, 28, 128, 128, 3, 1, False), (384, 128, 64), 0),  # 196: the second half empty, and yet less time
        ((128, 28, 28, 128, 136, 3, 1, False), (256, 128, 64), 132),  # a tile of three boxes would be half empty
        ((128, 28, 28, 128, 128, 3, 1, True), (256, 128, 64), 0),
        ((128, 56, 56, 64, 64, 3, 1, False), (512, 64, 64), 0),
        ((128, 7, 7, 512, 512, 3, 1, False), (256, 128, 64), 0),  # one round of 112
        ((128, 14, 14, 256, 256, 3, 1, False), (384, 128, 64), 0),  # one round of 132
        ((64, 14, 14, 256, 256, 3, 1, False), (128, 128, 64), 0),
        ((256, 7, 7, 512, 512, 3, 1, False), (384, 128, 64), 0),
        ((128, 28, 28, 512, 1024, 1, 2, False), (256, 128, 64), 132),
        ((128, 56, 56, 256, 64, 1, 1, False), (128, 64, 64), 0),
    ],
    ids=str,
)
def test_when_programs_take_several_tiles_and_when_tiles_are_large(
    shape: tuple[Any, ...], tile: tuple[int, int, int], persistent: int
) -> None:
    module, described, config = chosen(shape)
    assert (config.block_m, config.block_n, config.block_k, config.persistent) == (*tile, persistent)
    assert module.takes(config, described, H200) and config.shared_memory(described) <= H200.shared_memory
    assert module.tiled(described, H200).persistent == 0
    for changes in ({"precision": "tf32"}, {"precision": "fp32"}, {"groups": 2}):
        module, described, config = chosen(shape, **changes)
        assert config == module.tiled(described, H200), changes
    for name in ("a100", "b200", "l4"):
        assert module.heuristic(described, gpus.known(name)) == module.tiled(described, gpus.known(name))


def test_choices_of_several_tiles_that_no_kernel_takes() -> None:
    module, described, config = chosen((128, 28, 28, 128, 512, 1, 1, True))
    assert module.takes(config, described, H200)
    for changes in (
        {"persistent": 3},  # fewer than columns of tiles
        {"num_stages": 8},
        {"boxes": False},
    ):
        assert not module.takes(dataclasses.replace(config, **changes), described, H200), changes
    module, described, _ = chosen((128, 28, 28, 192, 512, 1, 1, True))
    assert not module.takes(dataclasses.replace(config, block_k=192), described, H200)  # no power of two
    assert not module.takes(config, described, gpus.known("a100"))
    module, described, config = chosen((128, 14, 14, 256, 256, 3, 1, False))
    assert config.block_m == 3 * config.box == 384 and module.takes(config, described, H200)
    for changes in ({"persistent": 132}, {"shares": 2}, {"boxes": False}, {"block_m": 5 * 64}):
        assert not module.takes(dataclasses.replace(config, **changes), described, H200), changes
    assert not module.takes(config, dataclasses.replace(described, residual=True), H200)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("taps", [1, 3])
def test_candidates_of_several_tiles(residual: bool, taps: int) -> None:
    """They fit, differ, and no residual is waited for in the loop of tiles and steps."""
    module, described, config = chosen((128, 28, 28, 128, 512 if taps == 1 else 128, taps, 1, residual))
    found = list(module.candidates(described, H200))
    several = [each for each in found if each.persistent]
    assert len(found) == len(set(found)) and all(module.takes(each, described, H200) for each in found)
    assert bool(several) is not (residual and taps == 3)
    assert all(each.resident(described) for each in several) is residual or not several
    assert config in found or not config.persistent
    from resnet_fast.kernels import conv_statistics, problems

    training = problems.ConvStatistics(*dataclasses.astuple(dataclasses.replace(described, residual=False)))
    assert not any(each.persistent for each in conv_statistics.candidates(training, H200))
    assert conv_statistics.heuristic(training, H200).persistent == 0
