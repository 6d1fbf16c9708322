"""The engine's convolutions: sizes, special values, what is written, errors, and the same bits however they are run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_obeys_error_rule
from tests.ops.cpu.engine import ALGORITHMS, DTYPES, Problem, _cpu, packed, same_bits
from tests.ops.cpu.sweep import check, sweep, whole

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[3]


def _problem(
    n: int,
    c: int,
    size: tuple[int, int],
    k: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: str = "",
    relu: bool = True,
) -> Problem:
    """Return whole numbers. ``residual``: "", "before" or "after" ReLU."""
    generator = torch.Generator().manual_seed(1)
    window = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    out = [(size[i] + 2 * padding[i] - window[i]) // stride[i] + 1 for i in range(2)]
    return Problem(
        whole((n, c, *size), 4, generator),
        whole((k, c // groups, *kernel), 3, generator),
        whole((k,), 9, generator),
        whole((n, k, *out), 50, generator) if residual else None,
        stride,
        padding,
        dilation,
        groups,
        relu,
        residual == "after",
        name=f"{n}x{c}x{size} to {k} by {kernel}",
    )


SIZES = [
    _problem(1, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3)),
    _problem(1, 17, (97, 131), 33, (3, 3), padding=(1, 1), residual="before"),
    _problem(1, 64, (56, 56), 64, (3, 3), padding=(1, 1), residual="after"),
    _problem(3, 100, (7, 7), 100, (3, 3), padding=(1, 1), residual="before"),
    _problem(3, 64, (1, 1), 17, (1, 1)),
    _problem(1, 1, (1, 1), 1, (1, 1)),
    _problem(1, 1, (1, 1), 1, (3, 3), padding=(1, 1), residual="before"),
    _problem(3, 1, (97, 131), 3, (5, 3), (3, 2), (4, 0)),
    _problem(1, 33, (31, 17), 100, (1, 7), padding=(0, 3), residual="after", relu=False),
    _problem(1, 33, (31, 17), 100, (7, 1), (1, 2), (6, 0)),
    _problem(1, 17, (9, 9), 65, (3, 3), padding=(5, 7)),
    _problem(1, 16, (28, 28), 48, (3, 3), (2, 2), (2, 2), (2, 2), residual="before"),
    _problem(1, 5, (23, 41), 7, (3, 3), (1, 3), (4, 2), (4, 2)),
    _problem(3, 64, (14, 14), 64, (3, 3), (2, 2), (1, 1), groups=64, residual="before"),
    _problem(1, 32, (14, 14), 64, (3, 3), padding=(1, 1), groups=32),
    _problem(1, 128, (14, 14), 128, (3, 3), padding=(1, 1), groups=32, residual="before"),
    _problem(1, 128, (14, 14), 128, (3, 3), padding=(1, 1), groups=16),
    _problem(1, 60, (9, 9), 140, (5, 5), (2, 1), (2, 2), groups=2),
    _problem(1, 512, (7, 7), 70, (1, 1), residual="before"),
    # Parts of wide lines; windows that are copied by themselves, for their distance or for what a stride leaves out.
    _problem(1, 20, (3, 700), 40, (3, 3), (1, 2), (1, 1), residual="before"),
    _problem(2, 6, (40, 33), 35, (3, 3), padding=(9, 12), dilation=(9, 12), residual="after"),
    _problem(1, 5, (12, 23), 35, (2, 1), (3, 4), (1, 0), groups=5),
    _problem(1, 3, (56, 56), 16, (4, 4), (4, 4)),
    # A line that does not fit into the cache; strides and dilations without a common divisor; less than 16 outputs.
    _problem(1, 512, (3, 1900), 8, (3, 3), padding=(1, 1)),
    _problem(2, 64, (19, 23), 40, (3, 4), (3, 2), (2, 3), (2, 3), residual="before"),
    _problem(1, 96, (3, 5), 130, (1, 1), residual="after"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", SIZES, ids=lambda problem: problem.name)
def test_sizes(problem: Problem, dtype: torch.dtype) -> None:
    problem = problem.to(dtype)
    for algorithm in problem.algorithms():
        check(problem, algorithm, threads=2)
    check(problem, "auto")


def test_random_problems() -> None:
    assert sweep(200, seed=0) > 250


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_other_instruction_sets(isa: str) -> None:
    """The tests of this folder that depend on it, in a process that has read RESNET_FAST_ISA."""
    if _cpu.build_info()["sanitizer"]:
        pytest.skip("the process would have the module without a sanitizer")
    if isa == _cpu.isa():
        pytest.skip("the one of this process, which the other tests run on")
    if isa not in _cpu.build_info()["isas"] or (isa != "portable" and not _cpu.features(of_machine=True)[isa]):
        pytest.skip(f"no {isa} in this build, or on this machine")
    files, left_out = ["plan", "uint8"], "instruction_sets or words or huge_image"
    if isa != "avx512_vnni":  # which has kernels of its own for uint8 alone
        files += ["convolution", "winograd"]
    if isa == "avx512" and _cpu.isa().startswith("avx512_"):
        left_out += " or dtype0"  # float32, by the kernels of this process
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({left_out})",
         *(str(folder / f"test_{name}.py") for name in files)],
        env={**os.environ, "RESNET_FAST_ISA": isa, "PYTEST_ADDOPTS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


_BEHIND = """
import ctypes, mmap, sys, torch
from torch.nn import functional as F
from tests.ops.cpu.engine import packed
size = 1 << 20
memory = mmap.mmap(-1, size + mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
for c, h, w, kernel in ((64, 3, 11, 1), (64, 7, 7, 1), (64, 3, 5, 1), (17, 5, 7, 1), (17, 5, 7, 3), (3, 31, 9, 7)):
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(40, c, kernel, kernel)
        layer = packed(weight, torch.zeros(40), padding=(kernel // 2, kernel // 2), dtype=dtype)
        count = c * h * w
        begin = size - count * dtype.itemsize
        x = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(1, h, w, c).fill_(1)
        out = torch.empty(1, h, w, 40, dtype=dtype)
        layer.run(x.data_ptr(), 1, h, w, 0, out.data_ptr(), False, False, 1)
        wanted = F.conv2d(torch.ones(1, c, h, w), weight, padding=kernel // 2).to(dtype)
        assert torch.equal(out.permute(0, 3, 1, 2), wanted), (c, h, w, kernel, dtype)
"""


def test_nothing_is_read_behind_an_image() -> None:
    """Images end where a page begins that no process may read."""
    if _cpu.build_info()["sanitizer"]:
        pytest.skip("the process would have the module without a sanitizer")
    run = subprocess.run([sys.executable, "-c", _BEHIND], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_empty_batch() -> None:
    layer = packed(torch.ones(4, 3, 3, 3), torch.zeros(4))
    problem = Problem(torch.empty(0, 3, 8, 8), torch.ones(4, 3, 3, 3), torch.zeros(4))
    for algorithm in ALGORITHMS:
        assert problem.run(algorithm, layer=layer).shape == (0, 4, 6, 6)
    layer.run(0, 0, 8, 8, 0, 0, False, False, 1)  # torch gives no address to an empty tensor


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_of_each_tensor(value: float, where: str, order: str, dtype: torch.dtype) -> None:
    for plain in (
        _problem(2, 33, (11, 9), 35, (3, 3), padding=(1, 1), residual=order),
        _problem(1, 6, (9, 9), 10, (5, 3), (2, 1), (2, 1), groups=2, residual=order),
    ):
        problem = plain.to(dtype)
        tensor = getattr(problem, where)
        for at in (0, tensor.numel() // 2 + 3, tensor.numel() - 1):
            before = tensor.view(-1)[at].item()
            tensor.view(-1)[at] = value
            for algorithm in problem.algorithms():
                check(problem, algorithm)
            tensor.view(-1)[at] = before


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_passes_nan_on(dtype: torch.dtype) -> None:
    problem = Problem(torch.full((1, 3, 4, 4), torch.nan), torch.ones(2, 3, 1, 1), torch.zeros(2), relu=True)
    assert problem.to(dtype).run().isnan().all()


def test_weights_and_results_are_rounded_to_the_nearest_bfloat16() -> None:
    """Weights as torch rounds them, halfway cases too, and NaN of any bits stays NaN, which rounding up would carry to
    zero."""
    bits = torch.arange(0x3F800000, 0x3F800000 + 33 * 5 * 9 * 0x1001, 0x1001, dtype=torch.int32)  # from 1 on
    weight = bits.view(torch.float32).view(33, 5, 3, 3)
    x, bias = torch.randn(2, 5, 9, 9).bfloat16(), torch.zeros(33)
    bias[7] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    given = Problem(x, weight, bias, padding=(1, 1), name="float32 weights")
    rounded = given.to(torch.bfloat16)
    for algorithm in given.algorithms():
        ours = given.run(algorithm)
        assert same_bits(ours, rounded.run(algorithm))
        assert ours[:, 7].isnan().all()
    halfway = Problem(torch.ones(1, 1, 1, 1).bfloat16(), torch.ones(3, 1, 1, 1), torch.tensor([2**-8, 3 * 2**-8, -2.0]))
    assert halfway.run().flatten().tolist() == [1.0, 1 + 2**-6, -1.0]  # to the even one of two as near


DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "after ReLU": torch.relu,
    "mean 100": lambda x: x + 100,
    "heavy tails": lambda x: x * x.abs() ** 3,
    "1e-20": lambda x: x * 1e-20,
    "1e20": lambda x: x * 1e20,
    "1e37": lambda x: x * 1e37,
}


def normal_weight(k: int, c: int, r: int = 3, s: int = 3) -> Tensor:
    """Return what a network is initialised with."""
    return torch.randn(k, c, r, s) * (2 / (c * r * s)) ** 0.5


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("c", [17, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_direct_obeys_the_error_rule(data: str, c: int, dtype: torch.dtype) -> None:
    for kernel, size in (((1, 1), 20), ((3, 3), 20), ((7, 7), 12)):
        x = DATA[data](torch.randn(1, c, size, size))
        weight = normal_weight(48, c, *kernel)
        bias = torch.randn(48) * x.std() / 9
        problem = Problem(x, weight, bias, padding=(kernel[0] // 2, kernel[1] // 2)).to(dtype)
        exact = problem.reference(torch.float64)
        assert_obeys_error_rule(problem.run("direct"), problem.reference(), exact, f"{kernel}, {data}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_same_bits_in_every_batch_and_on_every_number_of_threads(
    algorithm: str, dtype: torch.dtype
) -> None:
    # 14 pixels a side make a ragged last tile, 130 channels a ragged last panel; alone, an image is split finer.
    for c, k, size, kernel in ((64, 130, 14, 3), (3, 40, 30, 3), (100, 33, 6, 3)):
        x, weight, bias = torch.randn(7, c, size, size), normal_weight(k, c, kernel, kernel), torch.randn(k)
        residual = torch.randn(7, k, size, size)
        layer = packed(weight, bias, padding=(1, 1), dtype=dtype)

        def run(at: slice | list[int], threads: int) -> Tensor:
            part = Problem(x[at], weight, bias, residual[at], padding=(1, 1), relu=True)  # noqa: B023
            return part.to(dtype).run(algorithm, threads, layer)  # noqa: B023

        alone = torch.cat([run(slice(i, i + 1), 1) for i in range(7)])
        for threads in (1, 2, 3):
            assert same_bits(run(slice(0, 7), threads), alone)
            assert same_bits(run([4, 2, 6, 4], threads), alone[[4, 2, 6, 4]])
            assert same_bits(run([5], threads), alone[5:6])


def test_bad_arguments_have_words() -> None:
    weight, bias, x, out = torch.ones(4, 3, 3, 3), torch.zeros(4), torch.ones(1, 8, 8, 3), torch.ones(1, 6, 6, 4)
    layer = packed(weight, bias)
    address = x.data_ptr(), out.data_ptr()

    def run(
        h: int = 8, n: int = 1, x: int = address[0], out: int = address[1], threads: int = 1, algorithm: str = "auto"
    ) -> None:
        layer.run(x, n, h, 8, 0, out, False, False, threads, algorithm)

    with pytest.raises(ValueError, match="2x8 pixels is too small"):
        run(h=2)
    with pytest.raises(ValueError, match="too small"):
        run(n=-1)
    with pytest.raises(ValueError, match="x has the address 0"):
        run(x=0)
    with pytest.raises(ValueError, match="out has the address 0"):
        run(out=0)
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match=f"threads must be from 1 to 1024, got {threads}"):
            run(threads=threads)
    with pytest.raises(ValueError, match="algorithm must be auto, direct, winograd2 or winograd4, got 'fft'"):
        run(algorithm="fft")
    with pytest.raises(ValueError, match="too small"):  # (2 - 3) / 2 + 1 would be one pixel
        packed(weight, bias, stride=(2, 2)).run(address[0], 1, 2, 2, 0, address[1], False, False, 1)
    with pytest.raises(ValueError, match="3x3 windows of stride 1"):
        packed(weight, bias, stride=(1, 2)).run(address[0], 1, 8, 8, 0, address[1], False, False, 1, "winograd4")

    def make(**changed: object) -> None:
        given: dict[str, object] = {
            "weight": weight.data_ptr(),
            "bias": bias.data_ptr(),
            "k": 4,
            "c": 3,
            "groups": 1,
            "kernel": (3, 3),
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
        }
        _cpu.Convolution(**{**given, **changed})

    make()
    for changed, words in (
        ({"groups": 2}, "cannot have 2 groups"),
        ({"groups": 0}, "cannot have 0 groups"),
        ({"k": 0}, "3 to 0 channels"),
        ({"kernel": (0, 3)}, r"kernel of a convolution must be from 1 to \d+, got \(0, 3\)"),
        ({"stride": (1, 0)}, r"stride .* got \(1, 0\)"),
        ({"dilation": (-1, 1)}, r"dilation .* got \(-1, 1\)"),
        ({"padding": (0, -1)}, r"padding .* from 0 to \d+, got \(0, -1\)"),
        ({"padding": (2**62, 0)}, "padding"),
        ({"weight": 0}, "weight has the address 0"),
        ({"bias": 0}, "bias has the address 0"),
        ({"dtype": "float16"}, "dtype must be float32, bfloat16 or uint8, got 'float16'"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**changed)
