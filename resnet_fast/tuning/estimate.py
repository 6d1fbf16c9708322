"""The launches of a network with an estimate of the time of each: ``roofline.estimate`` of what would be launched.

Launch choices are the kernels' own, registers and occupancy those of ``kernels/resources.csv``. What is not there, in
an installed package say, is compiled. **No time here is measured** but what a committed result file may hold.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resnet_fast._dtypes import QUANTIZED
from resnet_fast.graph import fuse_tail, inventory, optimize, schedules
from resnet_fast.kernels._launch import cdiv
from resnet_fast.kernels.problems import BottleneckTail, ConvBNAct, ConvFp8, ConvInt8, Head, Stem
from resnet_fast.roofline import Seconds, estimate
from resnet_fast.roofline.estimate import Code, Estimate

from . import compile as resources
from . import compiler, ops
from .ops import Case

if TYPE_CHECKING:
    from resnet_fast.graph.inventory import Layer
    from resnet_fast.kernels.gpus import GPU

PER_CONV, PLANNED = "per-conv", "planned"

_PROGRAMS: Mapping[type, Callable[[Any, Any, int], Any]] = {
    BottleneckTail: estimate.tail,
    Stem: estimate.stem,
    Head: estimate.head,
}


@dataclass(frozen=True)
class Launch:
    """One kernel of a schedule.

    Attributes:
        parts: the layers it computes, by name. case, config: what is launched. code: what it is compiled to.
    """

    parts: tuple[str, ...]
    case: Case
    config: Any
    code: Code
    estimate: Estimate

    def as_dict(self, measured: Seconds | None) -> dict[str, Any]:
        """Plain values, times in seconds."""
        return {
            "parts": list(self.parts),
            "op": self.case.op,
            "problem": self.case.problem.key(),
            "config": asdict(self.config),
            **{f"code_{name}": value for name, value in asdict(self.code).items()},
            **{f"estimated_{name}": value for name, value in asdict(self.estimate).items()},
            "measured_seconds": None if measured is None else measured.get(frozenset(self.parts)),
        }


@cache
def _captured(arch: str, image_size: int) -> tuple[tuple[Layer, ...], Mapping[str, tuple[str, ...]]]:
    """Return the fused ops of a network, one for each convolution, and the layers in each by the name of its node."""
    from resnet_fast import models

    with torch.device("meta"):
        network = models.get_model(arch).eval()
        image = torch.empty(1, 3, image_size, image_size)
    fused = optimize(network, example_inputs=image, backend="reference")
    inside = schedules.parts(fused)
    named = {node.name: inside.get(str(node.target), (node.name,)) for node in fused.graph_module.graph.nodes}
    return inventory.layers(fused.graph_module, (image,)), named


def launched(
    schedule: str, arch: str, batch: int, image_size: int, precision: str, gpu: GPU
) -> tuple[tuple[tuple[str, ...], Case], ...]:
    """Return the launches of a network in order: the layers in each, and its case.

    Args:
        schedule: ``per-conv``, a kernel for each convolution; ``planned``, with bottleneck blocks fused as
            ``optimize`` plans it for ``gpu``; or ``int8`` or ``fp8``, per-conv as ``quantize`` makes it, without what
            makes bytes of the first layer's result, which are torch's own kernels.

    Raises:
        ValueError: the network does not take such images, or there is no kernel for one of its ops.
    """
    layers, named = _captured(arch, image_size)
    layers = tuple(layer.at(batch, precision) for layer in layers)
    found: dict[str, tuple[tuple[str, ...], Case] | None] = {}
    quantized = schedules.quantized_problems(layers, schedule) if schedule in QUANTIZED else [None] * len(layers)
    for layer, problem in zip(layers, quantized, strict=True):
        case = next(_cases(layer), None) if problem is None else Case(problem.op, problem, layer.activation)
        if case is None:
            raise ValueError(f"{layer.name}: no estimate is known for {layer.op}")
        found[layer.name] = named[layer.name], case
    for block in inventory.blocks(layers) if schedule == PLANNED else ():
        tail = fuse_tail.decide(block, gpu)[0].tail
        if tail is None or tail.problem is None:
            continue
        names = [layer.name for layer in tail.layers]
        parts = tuple(part for name in names for part in named[name])
        found |= dict.fromkeys(names)
        found[tail.expand.name] = parts, Case(tail.problem.op, tail.problem)
    return tuple(each for each in found.values() if each is not None)


def _cases(layer: Layer) -> Iterator[Case]:
    return ops.get(layer.op).cases(layer) if layer.op in _ESTIMATED else iter(())


_ESTIMATED = (ConvBNAct.op, Stem.op, Head.op)


def estimates(
    wanted: Sequence[tuple[tuple[str, ...], Case]], gpu: GPU, progress: Callable[[int, int], None] | None = None
) -> tuple[Launch, ...]:
    """Return the launches with their estimates. Those that are not in the table of resources are compiled.

    Raises:
        ValueError: the model is not of such a GPU, or a launch does not compile.
    """
    made = {case: _made(case, gpu) for _, case in wanted}
    known = table(resources.table_path())
    keys = {case: resources.key(task) for case, (task, _) in made.items()}
    missing = {keys[case]: made[case][0] for case in made if keys[case] not in known}
    known |= compiled(missing, gpu, progress)
    found = {}
    for case, (task, grid) in made.items():
        code = known[keys[case]]
        program = _program(case.problem, task.config, grid)
        found[case] = task.config, code, estimate.estimate(case.problem, program, code, gpu)
    return tuple(Launch(parts, case, *found[case]) for parts, case in wanted)


def tasks(wanted: Sequence[tuple[tuple[str, ...], Case]], gpu: GPU) -> dict[resources.Key, compiler.Task]:
    """Return what is compiled for launches, each kernel once."""
    cases = dict.fromkeys(case for _, case in wanted)
    made = (task for case in cases for task in compiler.tasks(gpu.capability, case, _chosen(case, gpu)))
    return {resources.key(task): task for task in made}


def kernel_name(case: Case, gpu: GPU) -> str:
    """Return the name of the function that a case launches."""
    return str(compiler.launch(_made(case, gpu)[0]).kernel.__name__)


def _chosen(case: Case, gpu: GPU) -> Any:
    config = ops.get(case.op).kernel.choose(case.problem, gpu)
    if config is None:
        raise ValueError(f"{case}: there is no launch for it on {gpu.name}")
    return config


def _made(case: Case, gpu: GPU) -> tuple[compiler.Task, int]:
    """Return what is compiled for the launch that multiplies, and its programs."""
    config = _chosen(case, gpu)
    part = ops.get(case.op).product  # the model of its program has the launches before and behind it
    return compiler.Task(gpu.capability, case, config, part), compiler.launches(case, config)[part].grid[0]


def _program(problem: Any, config: Any, grid: int) -> estimate.Program:
    if isinstance(problem, ConvBNAct):
        return estimate.conv(problem, config, _tiles(problem, config), grid)
    return _PROGRAMS[type(problem)](problem, config, grid)


def _tiles(problem: Any, config: Any) -> int:
    """Return how many tiles a launch computes: its blocks, unless a block takes several or shares one."""
    if isinstance(problem, BottleneckTail):
        return cdiv(problem.pixels, config.block_m)
    if isinstance(problem, Head):
        return cdiv(problem.n, config.block_m) * cdiv(problem.k, config.block_n)
    kernel = ops.get(problem.op).kernel
    if isinstance(problem, Stem):
        return int(kernel.programs(problem, config.block_m, config.block_n, config.rows))
    columns = cdiv(problem.k // problem.groups, config.block_n) * problem.groups
    return int(kernel.tiles(problem, config, config.boxes)) * columns


def table(path: Path) -> dict[resources.Key, Code]:
    """Return what ``kernels/resources.csv`` says of the machine code of each kernel; nothing if there is no such file.

    Columns are found by their names: those that a table has not are taken as the kernel's best. Of several versions of
    Triton the one in use comes first, if the table tells them apart.
    """
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    version = importlib.metadata.version("triton")
    found: dict[resources.Key, Code] = {}
    for row in sorted(rows, key=lambda row: row.get("triton", "") != version):
        key = resources.Key(row["arch"], row["kernel"], row["type"], row["constants"])
        serialised = row.get("serialised", "").lower() in ("1", "true", "yes", "serialised")
        code = Code(
            int(row["registers"]), int(row["occupancy"]), _warps(row["constants"]), serialised, row.get("a") or ""
        )
        found.setdefault(key, code)
    return found


def _warps(constants: str) -> int:
    return next((int(word.partition("=")[2]) for word in constants.split() if word.startswith("num_warps=")), 4)


def compiled(
    tasks: Mapping[resources.Key, compiler.Task], gpu: GPU, progress: Callable[[int, int], None] | None = None
) -> dict[resources.Key, Code]:
    """Return the same of launches that are compiled now, without a GPU.

    Raises:
        ValueError: one does not compile.
    """
    found: dict[resources.Key, Code] = {}
    if not tasks:
        return found
    keys = {task: key for key, task in tasks.items()}
    with compiler.Compiler(min(len(tasks), 4)) as pool:
        for done, each in enumerate(pool.run(keys), 1):
            made = each.resources
            if made is None:
                raise ValueError(f"{each.task.case} does not compile: {each.error}")
            serialised, a = getattr(made, "serialised", False), getattr(made, "a", "")
            blocks, warps = made.occupancy(gpu), made.threads // 32
            found[keys[each.task]] = Code(made.registers, blocks, warps, serialised, a)
            if progress is not None:
                progress(done, len(tasks))
    return found


# --- which choices are worth measuring


def known(case: Case, gpu: GPU) -> bool:
    """Return whether there is an estimate for the launches of a case on ``gpu``."""
    try:
        estimate.require(gpu)
    except ValueError:
        return False
    return not ops.is_cuda(case) and case.op in (*_ESTIMATED, BottleneckTail.op, ConvInt8.op, ConvFp8.op)


def ranked(case: Case, configs: Sequence[Any], gpu: GPU) -> tuple[Any, ...]:
    """Return launch choices of a case by their estimates, the best first, before anything is compiled.

    Registers are guessed from the sums that a thread holds. The choices stay as they are if there is no estimate: of
    other GPUs, of CUDA's kernels, of ops whose choices are few.
    """
    if not known(case, gpu):
        return tuple(configs)

    def cost(config: Any) -> tuple[bool, float]:
        """Masked gathers, which the model does not tell from boxes, come last where there are boxes."""
        tiles = _tiles(case.problem, config)
        several = getattr(config, "persistent", 0) or getattr(config, "shares", 1) > 1
        grid = ops.get(case.op).kernel.blocks(case.problem, config) if several else tiles
        program = _program(case.problem, config, grid)
        # Bytes are made signed there, and pixels of a window are reshaped.
        a = "registers" if isinstance(case.problem, ConvInt8) else ""
        code = Code(0, _blocks(case.problem, config, gpu), config.num_warps, a=a)
        return not getattr(config, "boxes", True), estimate.estimate(case.problem, program, code, gpu).seconds

    return tuple(sorted(configs, key=cost))


_BESIDE_SUMS = 50
"""Registers of a thread beside its sums, as the compiled kernels have them."""


def _blocks(problem: Any, config: Any, gpu: GPU) -> int:
    """Return how many blocks a multiprocessor can hold at once, as far as the choice tells; at least one."""
    threads = 32 * config.num_warps
    columns = problem.mid + problem.following if isinstance(problem, BottleneckTail) else config.block_n
    sums = config.block_m * columns // threads * (2 if isinstance(problem, ConvFp8) else 1)
    registers = min(255, sums + _BESIDE_SUMS)
    by_shared = gpu.shared_memory_per_multiprocessor // (config.shared_memory(problem) + 1024)
    return max(1, min(gpu.registers // (registers * threads), by_shared, 2048 // threads))


# --- what was measured


def results_folder(gpu: GPU) -> Path:
    """Return where a checkout keeps what ``make gpu`` measured on such a GPU."""
    return resources.table_path().parents[1] / "benchmarks" / "results" / gpu.name


def measured(name: str, gpu: GPU, folder: Path | None = None) -> tuple[Seconds | None, float | None]:
    """Return what result files say of a network: seconds of its launches by the layers in each, and of an image.

    Args:
        name: network, precision and batch as in result files: ``resnet50-fp16-b128``.
        folder: of the result files; None: ``results_folder(gpu)``.

    Returns:
        None in place of either that was not run.
    """
    folder = results_folder(gpu) if folder is None else folder
    launches = None
    for schedule in _read(folder / f"layers-{name}.json").get("schedules", []):
        if schedule["name"] == PLANNED:
            rows = ((frozenset(row["parts"]), row["measured_seconds"]) for row in schedule["rows"])
            launches = {parts: seconds for parts, seconds in rows if seconds is not None} or None
    case = _read(folder / "models.json").get("cases", {}).get(name, {})
    rate = case.get("contestants", {}).get("optimize", {}).get("images_per_second")
    return launches, 1 / rate if rate else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}
