"""Cases of the emulator itself, of the kernels in selftest.cu: no op's. tests/emulator/test_emulator.py expects the
wrong ones to fail with the words given here, some of them not under every seed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.emulator.cases._tensors import Results, asserted, rounded_to_tf32
from tests.emulator.harness import Case
from tests.numerics import assert_obeys_error_rule


def launch(native: ctypes.CDLL, kernel: str, x: Tensor, out: Tensor, count: int = 0) -> Tensor:
    """``out`` after the kernel; both tensors end their allocations.

    Raises:
        RuntimeError: the launch failed, with the emulator's words.
    """
    words = native.selftest(kernel.encode(), x.data_ptr(), out.data_ptr(), count).decode()
    if words:
        raise RuntimeError(words)
    return out


def values(count: int) -> Tensor:
    """[count] float32, random and always the same."""
    return torch.randn(count, generator=torch.Generator().manual_seed(20))


def numbers() -> Tensor:
    """[60000] float32 of all sizes: every two-byte number and its halfway points, zeros, infinities, NaN."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    some = every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(20))[:28000]]
    bits = torch.randint(-(1 << 31), 1 << 31, (31990,), generator=torch.Generator().manual_seed(20)).to(torch.int32)
    halfway = (some.view(torch.int32) | 0x1000 << 3 * (torch.arange(28000) % 2).int()).view(torch.float32)
    edges = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0, 3.4e38, 6e-8, 2.98e-8]
    )
    return torch.cat([torch.where(torch.arange(28000) % 3 == 0, some, halfway), bits.view(torch.float32), edges])


# --- right kernels


def holds(native: ctypes.CDLL, kernel: str, x: Tensor, expected: Tensor, count: int) -> Results:
    ours = launch(native, kernel, x.clone(), torch.full_like(expected, float("nan")), count)
    yield kernel, ours, expected, expected.double()


def right(kernel: str, x: Tensor, expected: Tensor, count: int = 0) -> Case:
    return Case(kernel, functools.partial(holds, kernel=kernel, x=x, expected=expected, count=count))


def exactly(native: ctypes.CDLL, kernel: str, x: Tensor, expected: Tensor) -> Results:
    ours = launch(native, kernel, x.clone(), torch.full_like(expected, float("nan")), x.numel())
    differs = ours.view(torch.int32) != expected.view(torch.int32)
    differs &= ~(ours.isnan() & expected.isnan())
    assert not differs.any(), [(a.item(), b.item()) for a, b in zip(ours[differs], expected[differs], strict=True)][:5]
    yield kernel, ours, expected, expected.double()


def warp_functions(x: Tensor) -> Tensor:
    """[14, threads]"""
    i = torch.arange(x.numel())
    warp, lane = i // 32 * 32, i % 32

    def of(lane: Tensor, mine: Tensor | None = None) -> Tensor:
        return x[warp + lane] if mine is None else torch.where(mine, x, x[warp + lane % 32])

    positive = (x > 0).view(-1, 32)
    ballot = (positive[:, :16] * 2 ** torch.arange(16)).sum(1)
    per_warp = torch.stack([ballot, positive.any(1), positive.all(1)]).repeat_interleave(32, 1).float()
    ones = torch.ones_like(x)
    return torch.stack(
        [
            *(of(lane ^ 5), of(lane * 0 + 3), of(lane // 8 * 8 + (lane + 1) % 8)),
            *(of(lane + 3, lane + 3 > 31), of(lane + 3, lane % 16 + 3 > 15)),
            *(of(lane - 2, lane < 2), of(lane - 2, lane % 8 < 2)),
            *per_warp,
            *(ones, 0 * ones, 0 * ones, ones),
        ]
    )


def product(native: ctypes.CDLL, precision: str) -> Results:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[precision]
    k = 16 if precision == "tf32" else 32
    a, b = values(16 * k).view(16, k).to(dtype), values(24 * k)[16 * k :].view(k, 8).to(dtype)
    x = torch.cat([a.flatten(), b.t().flatten()]).float()
    out = launch(native, f"product of {precision}", x, torch.full((16, 8), float("nan")))
    if precision == "tf32":  # the low 13 bits are cut off
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    yield "product", out, a.float() @ b.float(), a.double() @ b.double()


def schedules(native: ctypes.CDLL) -> list[bytes]:
    """For 20 seeds the order in which three blocks of 96 threads came past six places."""

    def schedule(seed: int) -> bytes:
        native.emulator_seed(seed)
        out = torch.zeros(1 + 3 * 96 * 6, dtype=torch.int32)
        return launch(native, "order", out, out, 6).numpy().tobytes()

    made = [schedule(seed) for seed in range(20)]
    assert made == [schedule(seed) for seed in range(20)], "the same seed gave another schedule"
    return made


def seeds_are_schedules(native: ctypes.CDLL) -> Results:
    assert len(set(schedules(native))) == 20, "two seeds gave the same schedule"
    yield from asserted("schedules")


def tell_schedules(native: ctypes.CDLL) -> Results:
    raise AssertionError(hashlib.sha256(b"".join(schedules(native))).hexdigest())


# --- wrong kernels


@dataclass(frozen=True)
class Wrong:
    """``words`` is a regular expression for what is said of it under seed 0.

    Where ``seeds`` is given, it does not show under every seed: at least under so many of 20.
    """

    words: str
    count: int = 0
    values: int = 512
    seeds: int = 0


WRONG = {
    "reverse, no barrier": Wrong("NaN differs", values=128, seeds=20),
    "one way, no barrier": Wrong("NaN differs", values=64, seeds=12),
    "rotate, no second barrier": Wrong("error .* is above", count=5, values=128, seeds=19),
    "neighbour lane, no syncwarp": Wrong("NaN differs", values=64, seeds=20),
    "unwritten": Wrong("NaN differs from torch in 3 of 64", count=61, values=64),
    "copies, no wait": Wrong("NaN differs|exited with copies on their way", seeds=16),
    "copies, one group early": Wrong("NaN differs", seeds=16),
    "copies, no barrier": Wrong("NaN differs", seeds=20),
    "copies, no commit": Wrong(r"thread \d+ exited with copies on their way"),
    "barrier of a few": Wrong(r"selftest.cu:\d+: a barrier without all threads: 1 exited .* waiting at the barrier"),
    "exit before barrier": Wrong(r"a barrier without all threads: .*1 exited \(thread 5\)"),
    "two barriers": Wrong("not the barrier at which others wait: .*waiting at the barrier .*selftest.cu"),
    "barrier or shuffle": Wrong("deadlock: 7 waiting at the barrier .*; 25 waiting at the collective"),
    "shuffle of some": Wrong("the mask does not name all lanes"),
    "shuffle without one": Wrong(
        "lane 31 of the warp has exited|a barrier without|deadlock: 31 waiting at the collective"
    ),
    "shuffle in branches": Wrong(r"lane \d+ of the warp is at .*selftest.cu:\d+"),
    "shuffle of half a warp": Wrong("the warp has fewer than 32 threads"),
    "read behind": Wrong("AddressSanitizer: heap-buffer-overflow READ of size 4 at .*selftest.cu", count=512),
    "read before": Wrong("AddressSanitizer: heap-buffer-overflow READ of size 4 at .*selftest.cu"),
    "write behind": Wrong("AddressSanitizer: heap-buffer-overflow WRITE of size 4 at .*selftest.cu", count=512),
    "copy from behind": Wrong("AddressSanitizer: heap-buffer-overflow READ of size 4", count=512),
    "copy to behind": Wrong("selftest.cu:.* the address is outside shared memory", count=256),
    "shared write behind": Wrong("AddressSanitizer: heap-buffer-overflow WRITE of size 4 at .*selftest.cu", count=256),
    "matrix behind": Wrong(r"selftest.cu:.* the address is outside shared memory \(block 0, thread 31\)", count=256),
    "matrix misaligned": Wrong("the address in shared memory is misaligned"),
    "vector misaligned": Wrong("UndefinedBehaviorSanitizer: .*misaligned address"),
    "copy from misaligned": Wrong("the copy's source is not aligned to its size"),
    "copy to misaligned": Wrong("the address in shared memory is misaligned"),
    "array behind": Wrong("UndefinedBehaviorSanitizer: index 7 out of bounds", count=7),
    "overflow": Wrong("UndefinedBehaviorSanitizer: signed integer overflow", count=3),
    "wide shift": Wrong("UndefinedBehaviorSanitizer: shift exponent 40 is too large", count=40),
    "null pointer": Wrong("AddressSanitizer: SEGV"),
    "too many threads": Wrong("invalid configuration argument"),
    "too much shared memory": Wrong("invalid argument"),
    "no blocks": Wrong("invalid configuration argument"),
}
# Wrong too, but each in more than one run, or for ever.
FIRST_BLOCK_WINS, ENDLESS, TELL_SCHEDULES = "first block wins", "endless", "tell schedules"
OFTEN = "enough seeds find"  # before the name of a wrong one


def fails(native: ctypes.CDLL, kernel: str, expected: Tensor, wrong: Wrong) -> Results:
    ours = launch(native, kernel, values(wrong.values), torch.full_like(expected, float("nan")), wrong.count)
    yield kernel, ours, expected, expected.double()


def share(native: ctypes.CDLL, kernel: str, expected: Tensor, wrong: Wrong) -> Results:
    """That enough seeds find it, without a new process for each."""
    found = 0
    for seed in range(20):
        native.emulator_seed(seed)
        try:
            for what, ours, same_dtype, exact in fails(native, kernel, expected, wrong):
                assert_obeys_error_rule(ours, same_dtype, exact, what)
        except (AssertionError, RuntimeError) as error:
            if not re.search(wrong.words, str(error)):
                raise
            found += 1
    assert found >= wrong.seeds, f"found under {found} of 20 seeds"
    yield from asserted(f"found under {found} of 20 seeds")


def block_number(native: ctypes.CDLL) -> Results:
    out = launch(native, FIRST_BLOCK_WINS, values(1), torch.tensor([-1.0]))
    yield "block", out, out, out.double()


def right_cases() -> list[Case]:
    x, expected = values(512), outputs()
    n = numbers()
    fp16, bf16 = n.half().float(), n.bfloat16().float()
    exact = {
        "rounded to fp16": fp16,
        "rounded to bf16": bf16,
        "rounded to tf32": rounded_to_tf32(n),
        "larger": _larger(n, n.flip(0)),
        "larger of fp16 pairs": _larger(fp16, _pairs_reversed(fp16)),
        "larger of bf16 pairs": _larger(bf16, _pairs_reversed(bf16)),
    }
    return [
        right("reverse", x[:128], expected["reverse"]),
        right("one way", x[:64], expected["one way"]),
        right("rotate", x[:128], expected["rotate"], 5),
        right("neighbour lane", x[:64], expected["neighbour lane"]),
        right("copies", x, expected["copies"]),
        right("warp functions", x[:96], warp_functions(x[:96])),
        *(right(f"masked copies of {4 * m}", x[: 8 * m], _ending(x[: 32 * m], 8 * m), 8 * m) for m in (1, 2, 4)),
        *(Case(f"product of {each}", functools.partial(product, precision=each)) for each in ("fp16", "bf16", "tf32")),
        *(Case(name, functools.partial(exactly, kernel=name, x=n, expected=result)) for name, result in exact.items()),
        Case("seeds are schedules", seeds_are_schedules),
    ]


def outputs() -> dict[str, Tensor]:
    """What kernels compute that have wrong variants."""
    x = values(512)
    return {
        "reverse": x[:128].flip(0),
        "one way": x[:32],
        "rotate": x[:128].roll(-32 * 5),
        "neighbour lane": x[:64].view(-1, 2).flip(1).flatten(),
        "unwritten": x[:64],
        "copies": x.view(2, 2, 32, 4).flip(1).flatten(),
    }


def wrong_cases() -> list[Case]:
    made = []
    for name, wrong in WRONG.items():
        expected = outputs().get(name.split(",")[0], torch.zeros(1))
        made.append(Case(name, functools.partial(fails, kernel=name, expected=expected, wrong=wrong)))
        if wrong.seeds:
            run = functools.partial(share, kernel=name, expected=expected, wrong=wrong)
            made.append(Case(f"{OFTEN} {name}", run))
    endless = functools.partial(fails, kernel=ENDLESS, expected=torch.zeros(1), wrong=Wrong(""))
    return [
        *made,
        Case(ENDLESS, endless),
        Case(FIRST_BLOCK_WINS, block_number),
        Case(TELL_SCHEDULES, tell_schedules),
    ]


def cases() -> list[Case]:
    return right_cases() + wrong_cases()


def _ending(x: Tensor, count: int) -> Tensor:
    """x with zeros from ``count`` on."""
    return torch.where(torch.arange(x.numel()) < count, x, 0.0)


def _larger(x: Tensor, y: Tensor) -> Tensor:
    """max with NaN, and 0 above -0."""
    return torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y))


def _pairs_reversed(x: Tensor) -> Tensor:
    return x.view(-1, 2).flip(0).flatten()


#: The names of the kernels without a mistake.
RIGHT = [case.name for case in right_cases()]
