"""``python -m tests.emulator.launches``: every launch of the networks through Triton's launcher, on libcuda.c.

Kernels are compiled for capability 9.0, or come from Triton's cache, where ``make kernels`` leaves them. The tensors
are memory that nobody touches; the driver sees their addresses and sizes, and the parameters of the machine code.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast.tuning import ops, shapes
from tests.emulator.driver import Driver, with_memory

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU


def launches(case: ops.Case, config: Any) -> tuple[Any, ...]:
    """Return the launches of a case on tensors of their own."""
    op = ops.get(case.op)
    example = op.example(case, torch.device("meta"))
    made: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        return made.setdefault(id(value), with_memory(value)) if isinstance(value, Tensor) else value

    example = dataclasses.replace(
        example,
        arguments=example.arguments._make(map(real, example.arguments)),
        outputs=tuple(map(real, example.outputs)),
        others=tuple(map(real, example.others)),
    )
    with torch.no_grad():
        launch = op.launch(op.kernel, example, case, config)
    return launch.parts if isinstance(launch, ops.Launches) else (launch,)


def tensors(launch: Any) -> Iterator[Tensor]:
    """Yield what a launch reads and writes."""
    for value in (*launch.args, *launch.options.values()):
        value = getattr(value, "base", value)
        if isinstance(value, Tensor):
            yield value


def fault(driver: Driver, launch: Any) -> str:
    """Launch it; return what the driver, or Triton, has against it, "" if nothing."""
    before, early = driver.launches, driver.early
    try:
        with driver.memory(tensors(launch)):
            launch()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).removeprefix('Triton Error [CUDA]: ').splitlines()[0]}"
    if driver.launches != before + 1:
        return f"{launch.kernel.__name__}: nothing was launched"
    return "" if driver.early == early + 1 else f"{launch.kernel.__name__}: it starts when the kernel before is over"


def sweep(driver: Driver, cases: Iterable[ops.Case], gpu: GPU) -> Iterator[tuple[int, list[str]]]:
    """Yield, for each case, how many launches it has, and what is wrong with them."""
    for case in cases:
        config = ops.get(case.op).kernel.heuristic(case.problem, gpu)
        made = launches(case, config)
        found = [f"{case} with {config}: {wrong}" for wrong in (fault(driver, launch) for launch in made) if wrong]
        yield len(made), found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    from resnet_fast.kernels import gpus

    parser = argparse.ArgumentParser(prog="python -m tests.emulator.launches", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(shapes.MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(shapes.BATCHES))
    parser.add_argument("--precisions", nargs="+", default=list(shapes.TYPES), choices=shapes.TYPES)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--gpu", default="h100", help="of capability 9.0, whose heuristics choose")
    parser.add_argument("--inference", action="store_true", help="without the launches that training adds")
    given = parser.parse_args(arguments)
    gpu = gpus.known(given.gpu)
    if gpu.capability != 90:
        parser.error(f"--gpu is {given.gpu}, of capability {gpu.capability}: this driver is of a GPU of 90")

    os.environ.pop("TRITON_INTERPRET", None)  # before the first import of triton
    torch.set_num_threads(1)
    began, used = time.perf_counter(), time.process_time()
    driver = Driver()
    training = not given.inference
    cases = shapes.problems(given.models, given.batches, given.precisions, given.image_size, gpu, training)
    count, wrong = 0, []
    for launched, found in sweep(driver, cases, gpu):
        count += launched
        wrong += found
    for line in wrong:
        print(f"WRONG {line}")
    spent = os.times()
    seconds = time.process_time() - used + spent.children_user + spent.children_system
    print(
        f"{count} launches, {driver.tensor_maps} tensor maps in {time.perf_counter() - began:.0f} s "
        f"({seconds:.0f} s of a core): {f'{len(wrong)} faults' if wrong else 'no violation'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
