"""The convolutions' training options in Triton: moments of the output, and x normalised while it is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tests.numerics import assert_obeys_error_rule
from tests.triton_device import DEVICE

pytest.importorskip("triton")
from resnet_fast.backends import triton as adapter
from resnet_fast.kernels import batch_norm_act as norm
from resnet_fast.kernels import conv_bn_act as kernel
from resnet_fast.kernels import gpus

EPS = 1e-5

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of the interpreter's NaN
]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution and the tile that computes it."""

    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.float16
    boxes: bool = False
    block_k: int = 16

    @property
    def problem(self) -> kernel.Problem:
        names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
        padding = (self.kernel // 2,) * 2
        sizes = (self.n, self.h, self.w, self.c, self.k, (self.kernel,) * 2, (self.stride,) * 2, padding, (1, 1))
        return kernel.Problem(*sizes, self.groups, names[self.dtype], False)

    @property
    def config(self) -> kernel.Config:
        return kernel.Config(64, 32, self.block_k, 4, 2, self.boxes)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(self.n, self.c, self.h, self.w, device=DEVICE) + 1.0
        weight = torch.randn(self.k, self.c // self.groups, self.kernel, self.kernel, device=DEVICE) + 0.3
        weight /= weight[0].numel() ** 0.5
        out = torch.empty(self.n, self.k, *self.problem.output, device=DEVICE)
        x, weight, out = (t.to(self.dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight, out))
        return x, weight, out

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv2d(x, weight, None, self.stride, self.kernel // 2, 1, self.groups)


def run(launches: Any) -> None:
    with adapter.on(torch.device(DEVICE)):
        for launch in launches:
            launch()


def check_moments(conv: Conv, out: Tensor, workspace: Tensor, tiles: int) -> None:
    """Merged, the moments are the mean and deviation of what was stored."""
    made = [torch.empty(conv.k, device=DEVICE) for _ in range(2)]
    running = torch.zeros(conv.k, device=DEVICE), torch.ones(conv.k, device=DEVICE)
    rows = conv.problem.pixels
    run(norm.merge_moments(workspace, *made, *running, rows, tiles, conv.k, eps=EPS, momentum=0.1))
    theirs = torch.zeros(conv.k, device=DEVICE), torch.ones(conv.k, device=DEVICE)
    _, *want = torch.native_batch_norm(out.float(), None, None, *theirs, True, 0.1, EPS)
    mean, variance = out.double().mean((0, 2, 3)), out.double().var((0, 2, 3), unbiased=False)
    exact = (mean, (variance + EPS).rsqrt(), 0.1 * mean, 0.9 + 0.1 * variance * rows / max(1, rows - 1))
    for name, mine, its, right in zip(
        ("mean", "invstd", "running_mean", "running_var"), (*made, *running), (*want, *theirs), exact, strict=True
    ):
        assert_obeys_error_rule(mine, its, right, name)
    variance_of_ours = torch.empty(conv.k, device=DEVICE)
    options: dict[str, Any] = {"eps": EPS, "momentum": 0.1, "variance": True}
    run(norm.merge_moments(workspace, made[0], variance_of_ours, None, None, rows, tiles, conv.k, **options))
    assert_obeys_error_rule(
        variance_of_ours.sqrt(), out.float().std((0, 2, 3), unbiased=False), variance.sqrt(), "deviation"
    )


GATHERED = [
    Conv(2, 9, 7, 24, 40, kernel=3),
    Conv(5, 9, 9, 32, 20, stride=2, dtype=torch.bfloat16),
    Conv(2, 17, 9, 3, 17, kernel=7, stride=2),  # several taps in a step
    Conv(2, 8, 5, 32, 24, kernel=3, groups=2, dtype=torch.float32),
]
BOXED = [
    Conv(2, 9, 7, 32, 40, boxes=True),  # a plain product
    Conv(3, 5, 7, 16, 40, kernel=3, boxes=True, dtype=torch.bfloat16),  # boxes that run over every edge
    Conv(3, 14, 10, 16, 24, kernel=3, stride=2, boxes=True),
    Conv(8, 6, 6, 16, 8, stride=2, boxes=True, dtype=torch.float32),
]


@pytest.mark.parametrize("conv", [*GATHERED, *BOXED], ids=str)
def test_moments_of_the_output(conv: Conv) -> None:
    x, weight, out = conv.tensors()
    problem, config = conv.problem, conv.config
    workspace = torch.empty(kernel.workspace_size(problem, config), device=DEVICE)
    launch, tiles = kernel.launch_raw(x, weight, out, problem, config, workspace=workspace)
    assert launch.kernel.__name__ == ("_boxes" if conv.boxes else "_gather") and tiles > 1
    run([launch])
    assert_obeys_error_rule(out, conv.convolve(x, weight), conv.convolve(x.double(), weight.double()), "out")
    check_moments(conv, out, workspace, tiles)
    plain = torch.empty_like(out)
    run([kernel.launch_raw(x, weight, plain, problem, config)[0]])
    assert torch.equal(plain, out)


@pytest.mark.parametrize("boxes", [True, False])
def test_moments_far_from_zero(boxes: bool) -> None:
    """Ones times a thousand and a little: the deviation is 1e-5 of the mean."""
    conv = Conv(2, 9, 9, 16, 16, boxes=boxes, dtype=torch.float32)
    x, weight, out = conv.tensors()
    x.mul_(0.01).add_(1000.0)
    weight.fill_(1 / 16)
    workspace = torch.empty(kernel.workspace_size(conv.problem, conv.config), device=DEVICE)
    launch, tiles = kernel.launch_raw(x, weight, out, conv.problem, conv.config, workspace=workspace)
    run([launch])
    assert out.mean() > 900
    check_moments(conv, out, workspace, tiles)


@pytest.mark.parametrize(("mean", "std"), [(3.0, 1.0), (1000.0, 0.1)])
def test_many_tiles_are_merged_by_two_launches(monkeypatch: pytest.MonkeyPatch, mean: float, std: float) -> None:
    monkeypatch.setattr(norm, "_MOST_TILES", 2)
    monkeypatch.setitem(norm._MERGE, "BLOCK_S", 4)
    conv = Conv(2, 19, 15, 16, 24, dtype=torch.float32)
    x, weight, out = conv.tensors()
    x.mul_(std).add_(mean)
    weight.abs_()
    workspace = torch.empty(kernel.workspace_size(conv.problem, conv.config), device=DEVICE)
    launch, tiles = kernel.launch_raw(x, weight, out, conv.problem, conv.config, workspace=workspace)
    options: dict[str, Any] = {"eps": EPS, "momentum": 0.1}
    launches = norm.merge_moments(workspace, x, x, None, None, 570, tiles, 24, **options)
    assert [each.kernel.__name__ for each in launches] == ["_thin_moments", "_merge_moments"]
    assert tiles == 9 and launches[1].args[8] == 3  # the last of one tile
    run([launch])
    check_moments(conv, out, workspace, tiles)


@pytest.mark.parametrize("boxes", [True, False])
def test_moments_that_are_not_finite(boxes: bool) -> None:
    conv = Conv(2, 9, 9, 16, 16, boxes=boxes, dtype=torch.float32)
    x, weight, out = conv.tensors()
    weight.abs_()
    weight[3] = float("nan")
    weight[5] *= 1e38
    x.abs_().mul_(100.0)
    workspace = torch.empty(kernel.workspace_size(conv.problem, conv.config), device=DEVICE)
    launch, tiles = kernel.launch_raw(x, weight, out, conv.problem, conv.config, workspace=workspace)
    mean, invstd = (torch.empty(16, device=DEVICE) for _ in range(2))
    run([launch, *norm.merge_moments(workspace, mean, invstd, None, None, 162, tiles, 16, eps=EPS, momentum=0.1)])
    assert mean[3].isnan() and mean[5].isposinf() and invstd[5].isnan()
    assert mean.isfinite().sum() == invstd.isfinite().sum() == 14


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("conv", GATHERED, ids=str)
def test_x_normalised_on_its_way_in(conv: Conv, moments: bool) -> None:
    """Padding is 0 behind the activation: a shift of 1 would show at the edges."""
    x, weight, out = conv.tensors()
    scale, shift = torch.randn(conv.c, device=DEVICE), torch.randn(conv.c, device=DEVICE) + 1.0
    a = torch.relu(x.float() * scale[:, None, None] + shift[:, None, None]).to(conv.dtype)
    workspace = torch.empty(kernel.workspace_size(conv.problem, conv.config), device=DEVICE) if moments else None
    launch, tiles = kernel.launch_raw(
        x, weight, out, conv.problem, conv.config, scale_in=scale, shift_in=shift, workspace=workspace
    )
    run([launch])
    assert_obeys_error_rule(out, conv.convolve(a, weight), conv.convolve(a.double(), weight.double()), "out")
    if workspace is not None:
        check_moments(conv, out, workspace, tiles)


def test_a_normalised_x_is_gathered_whatever_the_config() -> None:
    conv = dataclasses.replace(BOXED[1], dtype=torch.float16)
    x, weight, out = conv.tensors()
    scale, shift = torch.rand(conv.c, device=DEVICE), torch.ones(conv.c, device=DEVICE)
    x[0, 0, 0, 0] = float("nan")  # which a ReLU keeps
    workspace = torch.empty(kernel.workspace_size(conv.problem, conv.config), device=DEVICE)
    options: dict[str, Any] = {"scale_in": scale, "shift_in": shift, "workspace": workspace}
    launch, tiles = kernel.launch_raw(x, weight, out, conv.problem, conv.config, **options)
    run([launch])
    assert launch.kernel.__name__ == "_gather" and tiles == kernel.tiles(conv.problem, conv.config, False)
    a = torch.relu(x.float() * scale[:, None, None] + shift[:, None, None]).to(conv.dtype)
    assert_obeys_error_rule(out, conv.convolve(a, weight), conv.convolve(a.double(), weight.double()), "out")


@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_workspaces_are_large_enough(name: str) -> None:
    gpu = gpus.known(name)
    for conv in (*GATHERED, *BOXED, Conv(128, 56, 56, 64, 64, kernel=3), Conv(1, 97, 131, 64, 128, kernel=3)):
        problem = conv.problem
        for config in (kernel.heuristic(problem, gpu), *kernel.candidates(problem, gpu)):
            for boxes in {False, config.boxes}:
                assert kernel.tiles(problem, config, boxes) * config.block_m >= problem.pixels
                tiles = kernel.tiles(problem, dataclasses.replace(config, block_m=config.box), boxes)
                assert kernel.workspace_size(problem, config) >= 3 * tiles * conv.k + tiles
