"""The compile check: every launch that the networks need, as machine code, against limits and a committed table.

``python -m resnet_fast.tuning.compile`` shows what was compiled; it fails on spills, on too much shared memory, on
fewer programs at once than a launch choice means, on products that miss Hopper's matrix units or do not overlap in
them, on kernels that start before others are over and do not wait for them first, with ``--check`` also on rows that
differ from ``kernels/resources.csv``; ``--write`` makes this Triton's rows of that table anew. No GPU is used or
needed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast._dtypes import QUANTIZED, STORED
from resnet_fast._files import write_text

from . import ops, shapes
from .compiler import GROUPED, Compiled, Compiler, Task, launch, launches

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

#: The GPU whose limits and heuristics stand for each architecture.
ARCHITECTURES = {80: "a100", 90: "h100", 100: "b200"}

#: The ops whose launches are checked: not the convolutions with statistics, which run only if a sweep has measured
#: them, and has refused what spills.
CHECKED = tuple(name for name in ops.names() if name != "conv_statistics")

_COLUMNS = (
    "triton",
    "arch",
    "kernel",
    "type",
    "constants",
    "registers",
    "shared",
    "occupancy",
    "matrix",
    "serialised",
    "a",
)
_RESOURCES = _COLUMNS[5:]

#: The warp-group products of quantized convolutions.
_GROUPED_BY = {"int8": "IGMMA", "fp8": "QGMMA"}


@dataclass(frozen=True, order=True)
class Key:
    """What one compiled kernel is made from: two launches with equal keys run the same machine code.

    Attributes:
        arch: as "sm_90". kernel: as "conv_bn_act._boxes". type: of the operands, as "fp16".
        constants: compile-time constants, what is known of the arguments, warps and stages.
    """

    arch: str
    kernel: str
    type: str
    constants: str


Row = tuple[str, ...]
"""Registers, shared memory, occupancy, matrix instructions, whether they are serialised, where their A comes from."""

Table = dict[Key, Row]
"""What one version of Triton makes."""


def table_path() -> Path:
    """Return where the committed table lies in a checkout; it is not installed."""
    from resnet_fast.kernels import gpus

    return Path(gpus.__file__).with_name("resources.csv")


# --- what is to be compiled


def tasks(gpu: GPU, cases: Iterable[ops.Case]) -> dict[Key, Task]:
    """What the heuristics choose for ``cases`` on ``gpu``: one launch for each kernel that the compiler would make."""
    found: dict[Key, Task] = {}
    for case in cases:
        _add(found, gpu, case, ops.get(case.op).kernel.heuristic(case.problem, gpu))
    return found


def _add(found: dict[Key, Task], gpu: GPU, case: ops.Case, config: Any) -> None:
    """Add the launches of a case that are compiled from something new."""
    for part, made in enumerate(launches(case, config)):
        task = Task(gpu.capability, case, config, part)
        found.setdefault(_key(task, made), task)


def table_tasks(gpu: GPU, folder: Path) -> tuple[dict[Key, Task], list[str]]:
    """Return every choice in the tables of ``folder`` for GPUs of this capability, and what is wrong with the tables.

    A table names problems by their keys alone, so they are looked up among those of all ten networks.

    Raises:
        ValueError: a file is no table.
    """
    from resnet_fast import models
    from resnet_fast.kernels import _tables, gpus

    found: dict[Key, Task] = {}
    wrong = []
    for path in sorted(folder.glob("*.json")):
        like = {known.name: known for known in gpus.GPUS}.get(path.stem)
        if like is None:
            wrong.append(f"{path.name}: no built-in GPU has this name, so its choices cannot be compiled")
        if like is None or like.capability != gpu.capability:
            continue
        table = _tables.read(path)
        names = [problem for problems in table.values() for problem in problems]
        batches = {int(number) for name in names for number in re.findall(r"\bn(\d+)\b", name)} | {*shapes.BATCHES}
        cases: dict[tuple[str, str], list[ops.Case]] = {}
        for case in shapes.problems(models.list_models(), sorted(batches), shapes.TYPES, gpu=like, training=True):
            cases.setdefault((case.op, case.problem.key()), []).append(case)
        for op, problems in table.items():
            for name, fields in problems.items():
                if (op.removesuffix(".cuda"), name) not in cases:
                    wrong.append(f"{path.name}: {op} {name}: no network has this launch")
                    continue
                if op.endswith(".cuda"):
                    continue  # of kernels that are compiled already: resnet_fast.tuning.native looks at those
                config = ops.get(op).kernel.Config
                needed = {each.name for each in dataclasses.fields(config) if each.default is dataclasses.MISSING}
                if missing := sorted(needed - set(fields)):
                    wrong.append(f"{path.name}: {op} {name}: has no {missing[0]}")
                    continue
                known = {each.name for each in dataclasses.fields(config)} & set(fields)
                chosen = config(**{field: fields[field] for field in known})
                for case in cases[op, name]:
                    _add(found, gpu, case, chosen)
    return found, wrong


def key(task: Task) -> Key:
    """Return what the task's launch is compiled from."""
    return _key(task, launch(task))


def _key(task: Task, made: Any) -> Key:
    known = []
    for parameter, argument in zip(made.kernel.params, made.args, strict=False):
        known += _known(parameter, argument)
    # Beside int8 and float8 operands outputs and residuals may be of another type.
    out = getattr(task.case.problem, "out", "")
    known += [f"out:{out}"] if out not in ("", "uint8", "fp8") else []
    options = " ".join(f"{name}={int(v) if isinstance(v, bool) else v}" for name, v in made.options.items())
    dtype = STORED[task.case.problem.precision]
    types = {STORED[name]: name for name in ("fp16", "bf16", "fp32", *QUANTIZED)}
    return Key(
        f"sm_{task.capability}",
        f"{task.case.op}.{made.kernel.__name__}",
        types[dtype],
        " ".join([options, *known]),
    )


def _known(parameter: Any, argument: Any) -> list[str]:
    """Return what Triton compiles into a kernel about an argument, in words."""
    if hasattr(argument, "block_shape"):
        return [f"{parameter.name}[{'x'.join(map(str, argument.block_shape))}]"]
    if argument is None:
        return [f"{parameter.name}=None"]
    if not isinstance(argument, int):
        return []
    wide = [f"{parameter.name}:i64"] if argument >= 2**31 else []
    if parameter.do_not_specialize:
        return wide
    if argument == 1:
        return [f"{parameter.name}=1"]
    return wide + ([f"{parameter.name}%16"] if argument % 16 == 0 else [])


# --- what is wrong


def faults(compiled: Compiled, gpu: GPU) -> list[str]:
    """Return what is wrong with one compiled launch on ``gpu``, in words; empty if nothing is."""
    resources = compiled.resources
    if resources is None:
        return [f"does not compile: {compiled.error}"]
    found = []
    if resources.spills:
        found.append(f"spills registers: {resources.stack} bytes of stack, {resources.local} of local memory a thread")
    if resources.shared > gpu.shared_memory:
        found.append(f"takes {resources.shared} bytes of shared memory; {gpu.name} has {gpu.shared_memory}")
    case, config = compiled.task.case, compiled.task.config
    quantized = case.problem.precision in QUANTIZED
    convolution = case.op == "conv_bn_act" or quantized
    boxes = convolution and config.boxes
    # A warp group multiplies 64 rows at once; a config with fewer was chosen to use more multiprocessors.
    rows = config.block_n if boxes and not quantized else getattr(config, "block_m", 0)
    op, instruction = ops.get(case.op), _GROUPED_BY.get(case.problem.precision, "HGMMA")
    multiplies = op.matrix and compiled.task.part == op.product
    matrix = multiplies and case.problem.precision != "fp32" and rows >= 64
    if matrix and gpu.capability == 90 and instruction not in resources.matrix:
        found.append(f"multiplies with {resources.matrix or 'nothing'} instead of {instruction}")
    if resources.serialised and not _serialised_anyway(compiled.task):
        found.append(f"lets each {instruction} wait for the one before: ptxas has serialised them (C7510 to C7515)")
    # tf32 is rounded in registers, and bytes are made signed there.
    if boxes and case.problem.precision in ("fp16", "bf16") and "registers" in resources.a:
        found.append("takes the weights, HGMMA's A, through registers")
    occupancy, meant = resources.occupancy(gpu), config.programs(case.problem, gpu) if convolution else 0
    if 0 < occupancy < meant:
        found.append(f"has room for {occupancy} on a multiprocessor at once; the launch choice means {meant}")
    if case.problem.precision == "fp32" and resources.matrix not in ("FFMA", ""):
        found.append(f"multiplies float32 with {resources.matrix}, which rounds to tf32")
    if resources.drops_nan:
        found.append("takes a maximum that drops NaN (propagate_nan is not set)")
    if resources.early and resources.waits != "first":
        wait = "may touch memory before it waits for it" if resources.waits else "never waits for it"
        found.append(f"is launched while the kernel before still runs, and {wait}")
    if resources.waits and not resources.early:
        found.append("waits for the kernel before, which is over when it is launched")
    if resources.early is not (gpu.capability >= 90):
        found.append(f"is launched {'before' if resources.early else 'when'} the kernel before is over")
    return found


def _serialised_anyway(task: Task) -> bool:
    """Triton 3.6.0 alone: wide projections in a tail, whose loop of products stands inside the loop over slices.

    Overlapping, but without copies on their way meanwhile, they would take longer (docs/kernels/bottleneck_tail.md).
    """
    from triton import __version__

    problem = task.case.problem
    wide = task.case.op == "bottleneck_tail" and problem.shortcut is not None and problem.mid > 64
    return wide and __version__ == "3.6.0"


def row(compiled: Compiled, gpu: GPU) -> Row:
    """Return the table's row of a launch that compiled."""
    resources = compiled.resources
    assert resources is not None
    numbers = resources.registers, resources.shared, resources.occupancy(gpu)
    grouped = any(product in resources.matrix for product in GROUPED)
    serialised = ("no", "yes")[resources.serialised] if grouped else ""
    return *map(str, numbers), resources.matrix, serialised, resources.a


def read_table(path: Path) -> dict[str, Table]:
    """Return the committed table: the rows of each version of Triton.

    Raises:
        ValueError: the file is no such table.
    """
    lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    if len(lines) < 2 or tuple(lines[1]) != _COLUMNS:
        raise ValueError(f"{path} is no table of resources; --write makes one")
    tables: dict[str, Table] = {}
    for line in lines[2:]:
        if len(line) != len(_COLUMNS):
            raise ValueError(f"{path} has a row of {len(line)} columns, not {len(_COLUMNS)}: {','.join(line)}")
        tables.setdefault(line[0], {})[Key(*line[1:5])] = tuple(line[5:])
    return tables


def write_table(path: Path, tables: Mapping[str, Mapping[Key, Row]]) -> None:
    """Replace the table; rows are sorted, so that equal results give equal files."""
    text = io.StringIO()
    text.write("# made by: python -m resnet_fast.tuning.compile --write\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for version in sorted(tables):
        for each, cells in sorted(tables[version].items()):
            writer.writerow((version, each.arch, each.kernel, each.type, each.constants, *cells))
    write_text(path, text.getvalue())


def differences(committed: Table, now: Mapping[Key, Row], archs: Iterable[str]) -> list[str]:
    """Return where ``now`` differs from the rows of ``committed`` on these architectures, in words."""
    wanted = set(archs)
    found = []
    for each in sorted({k for k in committed if k.arch in wanted} | set(now)):
        before, after = committed.get(each), now.get(each)
        if before == after:
            continue
        name = f"{each.arch} {each.kernel} {each.type} {each.constants}"
        if before is None:
            found.append(f"{name}: not in the table")
        elif after is None:
            found.append(f"{name}: in the table, but no launch needs it")
        else:
            changed = (f"{n} {b} -> {a}" for n, b, a in zip(_RESOURCES, before, after, strict=True) if b != a)
            found.append(f"{name}: {', '.join(changed)}")
    return found


# --- the command


def run(
    wanted: Mapping[GPU, Mapping[Key, Task]],
    jobs: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Table, list[str]]:
    """Compile everything; the rows of what compiled, and what is wrong, in words."""
    keys = {task: (each, gpu) for gpu, made in wanted.items() for each, task in made.items()}
    table: Table = {}
    wrong = []
    with Compiler(jobs) as compiler:
        for done, compiled in enumerate(compiler.run(keys), 1):
            each, gpu = keys[compiled.task]
            if compiled.resources is not None:
                table[each] = row(compiled, gpu)
            name = f"{each.arch} {compiled.task.case} {compiled.task.config}"
            wrong += [f"{name}: {fault}" for fault in faults(compiled, gpu)]
            if progress is not None:
                progress(done, len(keys))
    return table, sorted(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fast.tuning.compile", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table too")
    parser.add_argument("--write", action="store_true", help="write this Triton's rows of the table anew")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(ARCHITECTURES), default=sorted(ARCHITECTURES))
    parser.add_argument("--op", nargs="+", choices=CHECKED, default=list(CHECKED), help="only these ops")
    parser.add_argument(
        "--model", nargs="+", choices=shapes.MODELS, default=list(shapes.MODELS), help="only these networks"
    )
    parser.add_argument(
        "--type", nargs="+", choices=shapes.TYPES, default=list(shapes.TYPES), help="only these precisions"
    )
    parser.add_argument("--jobs", type=int, default=None, help="processes; by default one for each core")
    given = parser.parse_args(arguments)

    narrowed = any(
        set(chosen) != set(all_of_them)
        for chosen, all_of_them in ((given.op, CHECKED), (given.model, shapes.MODELS), (given.type, shapes.TYPES))
    )

    os.environ.pop("TRITON_INTERPRET", None)  # before the first import of triton
    os.environ.pop("RESNET_FAST_PDL", None)
    import triton

    from resnet_fast.kernels import _tables, gpus

    began = time.perf_counter()
    wanted: dict[GPU, dict[Key, Task]] = {}
    unsound: list[str] = []
    for arch in given.arch:
        gpu = gpus.known(ARCHITECTURES[arch])
        cases = shapes.problems(given.model, shapes.BATCHES, given.type, gpu=gpu, training=True)
        measured, doubts = table_tasks(gpu, _tables.checked_in_folder())
        both = measured | tasks(gpu, (case for case in cases if case.op in given.op))
        wanted[gpu] = {each: task for each, task in both.items() if task.case.op in given.op}
        unsound += [line for line in doubts if line not in unsound]
    count = sum(map(len, wanted.values()))
    listed = ", ".join(f"{len(made)} for sm_{gpu.capability}" for gpu, made in wanted.items())
    print(f"{count} kernels to compile ({listed}), Triton {triton.__version__}", flush=True)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done % 50 == 0 or done == total:
            print(f"{done}/{total} after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    table, found = run(wanted, given.jobs, progress)
    wrong = unsound + found
    if given.write:
        _write(table, triton.__version__, None if narrowed else given.arch)
    elif given.check:
        wrong += _compare(table, triton.__version__, given.arch, narrowed)
    else:
        for each in sorted(table):
            print(",".join((each.arch, each.kernel, each.type, each.constants, *table[each])))
    for line in wrong:
        print(f"WRONG {line}")
    print(f"{count} kernels in {time.perf_counter() - began:.0f} s: {f'{len(wrong)} faults' if wrong else 'all well'}")
    return 1 if wrong else 0


def _compare(table: Table, version: str, archs: Iterable[int], narrowed: bool) -> list[str]:
    """Return differences from the committed rows; rows that a narrowed check did not make are none."""
    path = table_path()
    if not path.is_file():
        return [f"there is no {path}; --write makes it"]
    committed = read_table(path).get(version, {})
    if narrowed:
        committed = {each: cells for each, cells in committed.items() if each in table}
    known = {each.arch for each in committed}
    wanted = [f"sm_{arch}" for arch in archs]
    if missing := [arch for arch in wanted if arch not in known]:
        print(f"rows of {', '.join(missing)} are not compared: the table has none of Triton {version}")
    made = {each: cells for each, cells in table.items() if each.arch in known}
    return differences(committed, made, [arch for arch in wanted if arch in known])


def _write(table: Table, version: str, archs: Iterable[int] | None) -> None:
    """Write the rows in place of those of ``archs``; None: of those with the same keys."""
    path = table_path()
    tables = read_table(path) if path.is_file() else {}
    replaced = {f"sm_{arch}" for arch in archs or ()}
    kept = {each: cells for each, cells in tables.get(version, {}).items() if each.arch not in replaced}
    write_table(path, {**tables, version: kept | table})
    print(f"{len(table)} rows written to {path}")


if __name__ == "__main__":
    sys.exit(main())
