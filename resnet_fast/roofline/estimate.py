"""An estimate of the time of one launch on a Hopper GPU: from its tiles, its occupancy and what its code waits for.

**Nothing here is measured.** A floor says what no kernel can beat; this says what these kernels should take, from a
few assumed latencies, so that what limits a launch has a name before a GPU is at hand. It is good to about 30 %, and
better at comparing two launches than at the time of one. Arithmetic alone: no graph, no kernel, no compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from resnet_fast._dtypes import ITEMSIZE
from resnet_fast.kernels.gpus import GPU
from resnet_fast.kernels.problems import BottleneckTail, ConvBNAct, ConvFp8, ConvInt8, Head, Problem, Stem

from .cost import work


@dataclass(frozen=True)
class Assumptions:
    """What the estimate takes as given. Times are seconds.

    Attributes:
        clock: cycles per second under load. flops: of a multiprocessor in a cycle, by precision.
        launch: from one kernel of a graph to the next, one after the other: the grid drains and fills.
        hidden: of that, what programmatic dependent launch does while the kernel before still runs: all that launching
            an empty kernel of a graph takes on an H100 (hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles). The
            rest is from the end of the last block to the end of the next ones' wait.
        start: of a block: its launch, addresses, barriers, descriptors.
        memory, cache: from the request of a box to its arrival, from device memory and from the level-2 cache.
        epilogue, store: behind the last product of 128 x 128 outputs: scale, shift and rounding; until its copy out
            of shared memory is over.
        wait: cycles that an instruction waits for the one before where a product cannot be left running. step: cycles
            of barriers and requests in a step; with the first operand through registers ``registers_step``.
        issue: instructions of all warps that a multiprocessor begins in a cycle. pace: cycles from one instruction of
            a warp to its next, where it has the multiprocessor to itself.
        port: bytes in a cycle that one multiprocessor takes from the level-2 cache at most.
        reached: of the rates of memory and matrix units, what a good kernel gets.
        few: images up to which activations and weights stay in the level-2 cache.
    """

    clock: float = 1.755e9
    flops: tuple[tuple[str, int], ...] = (
        ("int8", 8192), ("fp8", 8192), ("fp16", 4096), ("bf16", 4096), ("tf32", 2048), ("fp32", 256)
    )  # fmt: skip
    launch: float = 2.0e-6
    hidden: float = 1.3e-6
    start: float = 0.8e-6
    memory: float = 0.85e-6
    cache: float = 0.55e-6
    epilogue: float = 0.5e-6
    store: float = 0.4e-6
    wait: int = 40
    step: int = 80
    registers_step: int = 110
    issue: float = 2.5
    pace: float = 2.5
    port: int = 64
    reached: float = 0.92
    few: int = 8

    @property
    def gap(self) -> float:
        """From one kernel to the next."""
        return self.launch - self.hidden


ASSUMED = Assumptions()
AREA = 128 * 128
"""Outputs of a tile to which ``epilogue`` and ``store`` belong."""


@dataclass(frozen=True)
class Code:
    """What is known of a kernel's machine code.

    Attributes:
        blocks: how many of its blocks a multiprocessor holds at once. warps: of a block.
        serialised: whether each product waits for the one before. a: where the first operand comes from, "shared",
            "registers" or "" if that is not known.
    """

    registers: int
    blocks: int
    warps: int
    serialised: bool = False
    a: str = ""


@dataclass(frozen=True)
class Loop:
    """Steps of a program that each fetch ``bytes`` and multiply, ``stages`` of them on their way at once.

    Attributes:
        rows, columns, depth: of a step's product. each: seconds that a step takes besides.
        instructions: of a thread in a step, where they are many beside its products. products: that each wait for the
            one before.
        ahead: steps that pass while a copy is on its way; None: one less than there are stages, if there are several.
        whole: whether a step is a tile with its end, during which copies go on, of a program that takes several.
    """

    steps: int
    rows: int
    columns: int
    depth: int
    bytes: int
    stages: int
    each: float = 0.0
    instructions: int = 0
    products: int = 1
    ahead: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Program:
    """What each block of a launch does.

    Attributes:
        tiles: of the output, of the whole launch. programs: blocks; fewer than tiles where each takes several.
        loops: one behind the other, for a tile. area: outputs that are written behind them.
        exposed: loads of a tile that nothing overlaps, such as a residual's behind the loops.
        l2: bytes that all programs read through the level-2 cache.
        prepared: bytes that a launch before this one reads and writes, 0 if there is none.
        first: loads that a program waits for one after the other before its first product.
        finishing: instructions of a thread for an output behind the products, if they are many.
        summed: bytes of sums that the programs leave, and a launch behind this one adds up; 0 if there is none.
    """

    tiles: int
    programs: int
    loops: tuple[Loop, ...]
    area: int
    exposed: int
    l2: int
    prepared: int = 0
    first: int = 1
    finishing: int = 0
    summed: int = 0


@dataclass(frozen=True)
class Estimate:
    """Of one launch. Times are seconds.

    Attributes:
        programs, blocks: of the launch, and at once on a multiprocessor. waves: how often the GPU is filled.
        chain: what one block takes beside the others on its multiprocessor, from its start to its last store.
        floor: what no kernel can beat. l2: what its programs read, at the level-2 cache's rate.
        seconds: the estimate. binds: what limits it, in words.
    """

    programs: int
    blocks: int
    waves: float
    chain: float
    floor: float
    l2: float
    seconds: float
    binds: str


def require(gpu: GPU) -> None:
    """Raise ValueError if the model is not of such a GPU."""
    if gpu.capability != 90 or gpu.l2_bandwidth is None:
        raise ValueError(f"no estimate for {gpu.name}: the latencies assumed are Hopper's; known are h100 and h200")


def estimate(problem: Problem, program: Program, code: Code, gpu: GPU, assumed: Assumptions = ASSUMED) -> Estimate:
    """Return the estimate of a launch of ``problem`` on ``gpu``.

    Raises:
        ValueError: the model is not of such a GPU.
    """
    require(gpu)
    need, precision = work(problem), problem.precision
    few = getattr(problem, "n", 0) <= assumed.few
    latency = assumed.cache if few else assumed.memory
    slots = max(1, code.blocks) * gpu.multiprocessors
    taken = math.ceil(program.tiles / program.programs)
    seconds, first, inside = 0.0, 0.0, ""
    full, rest = divmod(program.programs, slots)
    for count, running in ((full, slots), (bool(rest), rest)):
        if count:
            shared = min(gpu.multiprocessors, running)
            beside = math.ceil(running / gpu.multiprocessors)
            rate = min((gpu.l2_bandwidth or 0.0) / shared, assumed.port * assumed.clock)
            chain, why = _chain(program, code, precision, latency, rate, beside, taken, assumed)
            seconds += count * chain
            first, inside = first or chain, inside or why
    memory, l2 = need.bytes / (assumed.reached * gpu.bandwidth), program.l2 / gpu.l2_bandwidth
    waves = program.programs / slots
    if memory >= max(seconds, l2):
        binds = "memory"
    elif l2 >= seconds:
        binds = "L2 traffic"
    elif program.programs < gpu.multiprocessors:
        binds = f"few blocks, {inside}"
    elif math.ceil(waves) / waves >= 1.25 and waves > 0.5:
        binds = f"part of a wave, {inside}"
    else:
        binds = inside
    total = max(seconds, memory, l2) + assumed.gap
    if program.prepared:
        copied = program.prepared / (assumed.reached * gpu.bandwidth)
        total += max(assumed.start + latency + assumed.store, copied) + assumed.gap
    if program.summed:
        total += assumed.start + latency + program.summed / gpu.l2_bandwidth + assumed.store + assumed.gap
    floor = need.floor(gpu, precision)
    return Estimate(program.programs, code.blocks, waves, first, floor, l2, max(total, floor), binds)


def _chain(
    program: Program, code: Code, precision: str, latency: float, rate: float, beside: int, tiles: int,
    assumed: Assumptions,
) -> tuple[float, str]:  # fmt: skip
    """Return the seconds of one of the ``beside`` programs on a multiprocessor, and what most of it is.

    Args:
        rate: bytes per second that the multiprocessor gets from the level-2 cache. tiles: that the program computes.
    """
    loops, causes = 0.0, {"block start and end": 0.0}
    size = max(0.25, program.area / AREA)
    issued = beside * program.area / 32 * program.finishing / assumed.issue / assumed.clock
    ends = max(assumed.epilogue * size, issued) + assumed.store * size if program.area else 0.0
    for loop in program.loops:
        within = ends if loop.whole else 0.0
        step, why = _step(loop, code, precision, latency, rate, beside, within, assumed)
        loops += loop.steps * step
        causes[why] = causes.get(why, 0.0) + loop.steps * step
    # A program of several tiles fetches the next one's operands during the last one's end. Not so a residual, unless it
    # is fetched as they are: Triton's loop over tiles and steps waits for it where it is added.
    exposed = program.exposed * latency
    ends = 0.0 if any(loop.whole for loop in program.loops) else ends
    fixed = assumed.start + program.first * latency
    causes["block start and end"] = fixed + tiles * (ends + exposed)
    found = fixed + tiles * (loops + ends + exposed)
    return found, max(causes, key=causes.__getitem__)


def _step(
    loop: Loop, code: Code, precision: str, latency: float, rate: float, beside: int, within: float,
    assumed: Assumptions,
) -> tuple[float, str]:  # fmt: skip
    """Return the seconds of one step of a loop, and what most of it is.

    Args:
        within: seconds of a tile's end that the step has behind its product.
    """
    flops = 2.0 * loop.rows * loop.columns * loop.depth
    product = flops / dict(assumed.flops)[precision] / assumed.clock
    through = code.a == "registers"
    instructions = max(1, loop.depth * ITEMSIZE[precision] // 32) * max(1, loop.rows // 64 // max(1, code.warps // 4))
    waits = (instructions * assumed.wait if code.serialised else loop.products * assumed.wait / 2) / assumed.clock
    copied = loop.rows * loop.depth * ITEMSIZE[precision] / 128 / assumed.clock if through else 0.0
    overhead = (assumed.registers_step if through else assumed.step) / assumed.clock
    own = loop.instructions * assumed.pace / assumed.clock
    name = "instructions" if own > product else "products that wait" if code.serialised else "product"
    ahead = loop.stages - 1 if loop.ahead is None else loop.ahead
    alone = own + product + waits + copied + overhead + within
    waited = alone if loop.stages == 1 else 0.0  # nothing is on its way while a step multiplies
    limits = {
        name: alone,
        "issue of instructions": beside * code.warps * loop.instructions / assumed.issue / assumed.clock,
        "matrix units": beside * product / assumed.reached,
        "L2 traffic": beside * loop.bytes / rate,
        "load latency": latency / max(1, ahead) + waited if loop.steps > 1 or loop.whole else 0.0,
    }
    why = max(limits, key=limits.__getitem__)
    return limits[why] + loop.each, why


# --- the programs of the ops, whose launch choices are those of their kernels' modules


FINISHING = 10, 14
"""Instructions of a thread for an output of an int8 kernel, without and with a residual, counted in the machine code of
triton 3.7.1: 9 to 12 and 13 to 16 in the forms in which a program takes several tiles, the loop's own included."""


def conv(problem: ConvBNAct, config: Any, tiles: int, programs: int) -> Program:
    """Return the program of a convolution's launch.

    Args:
        tiles: of the output. programs: the launch's blocks: fewer where each takes several tiles, more where several
            share the sums of one.
    """
    m, n, k, item = config.block_m, config.block_n, config.block_k, ITEMSIZE[problem.precision]
    depth = math.prod(problem.kernel) * problem.c // problem.groups
    finishing = FINISHING[problem.residual] if isinstance(problem, ConvInt8) else 0
    # Of float8 each step is waited for, and its sums of at most 128 products are added to the whole ones.
    added = math.ceil(k / 128) * m * n // (32 * config.num_warps)
    instructions, products = (added, 2) if isinstance(problem, ConvFp8) else (0, 1)
    if config.resident(problem):
        # A tile's copies begin behind the epilogue of the one that had their place, all but one stage before.
        fetched = (m * k + (m * n if problem.residual else 0)) * item
        ahead = max(0, config.num_stages - 2)
        loop = Loop(1, m, n, k, fetched, config.num_stages, 0.0, instructions, products, ahead, True)
        return Program(tiles, programs, (loop,), m * n, 0, tiles * fetched + programs * n * k * item, 0, 2, finishing)
    shares = max(1, programs // tiles)
    steps = math.ceil(math.ceil(depth / k) / shares)
    loop = Loop(steps, m, n, k, (m + n) * k * item, config.num_stages, 0.0, instructions, products)
    residual = problem.pixels * problem.k * item if problem.residual else 0
    fetched = tiles * (m + n) * depth * item
    if shares > 1:  # what is behind the sums, the residual too, is the second launch's
        summed = shares * problem.pixels * problem.k * 4
        return Program(tiles * shares, programs, (loop,), m * n, 0, fetched + summed, summed=summed)
    exposed = int(problem.residual)
    return Program(tiles, programs, (loop,), m * n, exposed, fetched + residual, finishing=finishing)


def tail(problem: BottleneckTail, config: Any, programs: int) -> Program:
    """Return the program of a fused bottleneck block: the 3x3's loop, then one over slices of the output channels."""
    m, n, c, item = config.block_m, config.block_n, config.block_c, ITEMSIZE[problem.precision]
    depth, fetched = problem.mid + problem.following, (problem.mid + problem.following) * n
    if problem.shortcut is None:
        fetched += m * n
    else:
        depth += problem.shortcut[0]
        fetched += problem.shortcut[0] * (m + n)
    spatial = Loop(9 * problem.mid // c, m, problem.mid, c, (m + problem.mid) * c * item, config.stages)
    ends = (ASSUMED.epilogue + ASSUMED.store) * m * n / AREA
    slices = Loop(math.ceil(problem.k / n), m, n, depth, fetched * item, config.slice_stages, ends)
    return Program(programs, programs, (spatial, slices), m * problem.following, 0, config.l2_reads(problem))


STEM_INSTRUCTIONS = {"fp16": 520, "bf16": 520, "tf32": 1330, "fp32": 5400}
"""Of a thread for each position that it computes, counted in the machine code of triton 3.7.1: 23,433 for the 45
positions of 64 x 64 outputs that 128 threads walk down in half precision, what comes before and behind included."""


def stem(problem: Stem, config: Any, programs: int) -> Program:
    """Return the program of a stem: a step for each row of the convolution at each of the pool's three columns.

    The squares of pixels that it reads are written by a launch before.
    """
    item = ITEMSIZE[problem.precision]
    m, n, row = config.block_m, config.block_n, 16 * max(4, 1 << (problem.c - 1).bit_length())
    steps = (2 * config.rows + 1) * 3
    p, q = problem.output
    # Weights that do not stay in shared memory are read in each step.
    fetched = 4 * row * (m if config.resident else m + n) * item
    waiting = 4 if config.resident else 4 * row // config.block_k
    loop = Loop(steps, m, n, 4 * row, fetched, 2, 0.0, STEM_INSTRUCTIONS[problem.precision], 2 * waiting)
    squares = problem.n * 4 * (p + 9) * (q + 2) * row // 4 * item
    image = problem.n * problem.h * problem.w * problem.c * (1 if problem.uint8 else item)
    # The instructions of a row's end are among those of the steps.
    return Program(programs, programs, (loop,), m * n, 0, programs * steps * fetched, squares + image)


def head(problem: Head, config: Any, programs: int) -> Program:
    """Return the program of a head: pooled in rounds, which wait for their loads if few are on their way at once."""
    m, n, c, item = config.block_m, config.block_n, config.block_c, ITEMSIZE[problem.precision]
    pixels = problem.h * problem.w
    rounds = math.ceil(problem.c / c) * math.ceil(pixels / config.block_p)
    loop = Loop(rounds, m, n, c, (m * min(config.block_p, pixels) + n) * c * item, config.num_stages)
    return Program(programs, programs, (loop,), m * n, 0, programs * (m * pixels + n) * problem.c * item)
