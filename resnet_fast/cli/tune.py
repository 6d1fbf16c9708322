"""``resnet-fast tune``: measures choices on this machine's GPU, or its CPU, and writes them to the user's table.

Here are the options, the progress bar and what is printed; the work is ``resnet_fast.tuning``.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from resnet_fast.cli.common import (
    Device,
    JsonTarget,
    Threads,
    UserError,
    as_user_errors,
    check_arch,
    check_results,
    err_console,
    if_stopped,
    one_line,
    out_console,
    progress_bar,
    set_threads,
    table,
    warn_if_disturbed,
    write_json,
)
from resnet_fast.cli.roofline import DEFAULT_GPU, NAMES, Arithmetic, arithmetic
from resnet_fast.kernels import problems

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU
    from resnet_fast.tuning.ops import Case
    from resnet_fast.tuning.sweep import Outcome, Progress


if TYPE_CHECKING:
    Op = str
else:
    Op = enum.Enum("Op", {name: name for name in problems.OPS}, type=str)
    Op.__doc__ = "The ops whose launches can be measured."


def tune(
    models: Annotated[
        list[str] | None,
        typer.Option("--arch", "-a", metavar="NAME", help="Model name, by default resnet50; repeatable."),
    ] = None,
    batches: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size", "-b", min=1, help="Images in a batch, by default 128, on the CPU 1; repeatable on a GPU."
        ),
    ] = None,
    precisions: Annotated[
        list[Arithmetic] | None,
        typer.Option(
            "--dtype",
            parser=arithmetic,
            metavar="|".join(NAMES),
            help="How to multiply, by default float16, on the CPU float32; int8 and float8: as quantize() makes the "
            "network for a GPU, with float16 beside it; repeatable.",
        ),
    ] = None,
    chosen: Annotated[
        list[Op] | None,
        typer.Option(
            "--op", help="Only this op; may be repeated. The last two run in training only, and are measured if named."
        ),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="What to measure: its kernels.")] = Device.cuda,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Height and width of the images.")] = 224,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Stop after about this long.")] = 300,
    most: Annotated[
        int,
        typer.Option(
            "--candidates",
            min=0,
            help="Of a problem, measure at most so many launch choices on h100 and h200, the best by the estimate of "
            "resnet-fast roofline --estimate; 0: all.",
        ),
    ] = 6,
    again: Annotated[bool, typer.Option("--again", help="Measure also what a table has.")] = False,
    checked_in: Annotated[
        bool, typer.Option("--checked-in", help="Write the table that comes with the package, not the user's.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List the problems and, for a GPU, how many candidates each has; needs triton, no GPU."
        ),
    ] = False,
    gpu_name: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help=f"With --dry-run: for this GPU; by default {DEFAULT_GPU}."),
    ] = None,
    json_target: JsonTarget = None,
) -> None:
    """Measure which launch of each kernel is fastest on this machine's GPU, and remember it for later runs.

    With --device cpu: which algorithm of the CPU engine is fastest for each 3x3 convolution, with this processor,
    precision and number of threads. No choice depends on the batch, and F(4x4) is never taken for weights with which
    its rounding errors would be too large.

    Where resnet_fast._C is built its CUDA kernels are measured beside Triton's (as conv_bn_act.cuda), and run from then
    on where they take less time. Triton's come first, so that a CUDA kernel which breaks costs none of their times.

    The most expensive layers come first, and the table is written after each, so that it can be stopped at any time.
    """
    names = tuple(check_arch(name) for name in (models or ["resnet50"]))
    if device is not Device.cuda and device.found == "cpu":
        for option, given in (("--op", chosen), ("--gpu", gpu_name), ("--checked-in", checked_in)):
            if given:
                raise UserError(f"{option} is for a GPU's kernels; --device is {device.value}, the CPU here")
        check_results(json_target, None)
        set_threads(threads)
        return _tune_cpu(
            names, batches or [1], precisions or [Arithmetic.float32], image_size, seconds, again, dry_run, json_target
        )
    for option, unfit in (("--threads", threads), ("--json", json_target)):
        if unfit is not None:
            raise UserError(f"{option} goes with --device cpu")
    if gpu_name is not None and not dry_run:
        raise UserError("--gpu goes with --dry-run; measured is this machine's own GPU")
    gpu = _dry_gpu(gpu_name) if dry_run else _this_gpu()

    from resnet_fast.kernels import _tables
    from resnet_fast.tuning import ops, shapes, sweep

    asked = precisions or [Arithmetic.float16]
    wanted = [each.precision for each in asked if not each.quantized]
    with as_user_errors(ValueError):
        training = any(op in shapes.TRAINING for op in chosen or ())
        cases = shapes.problems(names, batches or [128], wanted, image_size, gpu, training)
        for each in asked:
            if each.quantized:
                cases += shapes.quantized(names, batches or [128], image_size, gpu, each.quantized)
    if chosen:
        cases = tuple(case for case in cases if case.op in chosen)
    cases = needed = ops.with_cuda(cases, gpu)
    folder = _tables.checked_in_folder() if checked_in else _tables.user_folder()
    if not (again or checked_in):
        # The user's table is for what is better or not in the one of the package.
        cases = tuple(case for case in cases if _tables.lookup(case.op, case.problem.key(), gpu.name) is None)
    path = folder / f"{gpu.name}.json"
    with as_user_errors(ValueError, OSError):
        table = _tables.read(path) if path.is_file() else {}
    if not needed:
        network = f"{', '.join(names)} at batch {', '.join(map(str, batches or [128]))}"
        what = f"{', '.join(chosen)} launch" if chosen else "launch"
        raise UserError(f"tune: {network} has no {what} that is worth one on {gpu.name}")
    waiting = sweep.pending(cases, gpu, table, again)
    if dry_run:
        return _list(waiting, gpu, most)
    if not waiting:
        out_console().print(
            f"nothing to measure: the tables for {escape(gpu.name)} have all of it (--again repeats it)"
        )
        return None
    return _measure(waiting, gpu, path, seconds, again, most)


def _dry_gpu(name: str | None) -> GPU:
    from resnet_fast.backends import triton
    from resnet_fast.kernels import gpus

    with as_user_errors(ValueError):
        found = gpus.known(DEFAULT_GPU if name is None else name)
    if triton.missing():
        raise UserError(f"tune: {triton.missing()}")
    return found


def _this_gpu() -> GPU:
    import torch

    from resnet_fast.backends import triton

    reason = triton.unavailable()
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU"
    elif triton.interpreted():
        reason = "TRITON_INTERPRET is set, and the interpreter's times mean nothing"
    if not reason:
        reason = triton.unsupported(torch.float16, torch.device("cuda"))
    if reason:
        raise UserError(f"tune: nothing can be measured here: {reason} (--dry-run lists what would be)")
    return triton.gpu_of(torch.device("cuda"))


def _list(waiting: tuple[Case, ...], gpu: GPU, most: int) -> None:
    from resnet_fast.tuning import sweep

    shown = table(f"to measure on {escape(gpu.name)}", ("op", "problem"), ("candidates", "floor µs"))
    whole = 0
    for case in waiting:
        count = len(sweep.configs(case, gpu, most))
        whole += count
        shown.add_row(case.op, case.problem.key(), str(count), f"{1e6 * sweep.floor(case, gpu):.2f}")
    console = out_console()
    console.print(shown)
    console.print(f"{len(waiting)} problems, {whole} candidates")


def _measure(waiting: tuple[Case, ...], gpu: GPU, path: Path, seconds: float, again: bool, most: int) -> None:
    import torch

    from resnet_fast.tuning import cuda, sweep

    outcomes: list[Outcome] = []
    device = torch.device("cuda", torch.cuda.current_device())
    stopped: KeyboardInterrupt | None = None
    broken, at = "", ""
    if_stopped(lambda: f"stopped; {path} keeps what was measured, and the same command goes on")
    with cuda.CudaRunner(gpu, device) as runner, progress_bar() as show:

        def progress(state: Progress) -> None:
            nonlocal at
            at = str(state.case)
            fraction = max(state.done / state.total, state.elapsed / seconds)
            show(f"{state.done}/{state.total} {state.case}", min(1.0, fraction))

        try:
            with as_user_errors(OSError):
                sweep.sweep(
                    waiting, gpu, runner, path,
                    measured_with=cuda.versions(device), seconds=seconds, again=again, most=most,
                    progress=progress, finished=outcomes.append,
                )  # fmt: skip
        except KeyboardInterrupt as error:
            stopped = error
        except torch.OutOfMemoryError as error:
            raise UserError("the GPU's memory is too small for a problem; a smaller --batch-size would fit") from error
        except RuntimeError as error:  # not one launch that is refused: the GPU takes no more of this process
            broken = f"tune: the GPU failed at {at}: {one_line(error, 200)}; what was measured before is kept"
    _show(outcomes, gpu)
    measured = sum(outcome.finished and outcome.config is not None for outcome in outcomes)
    err_console().print(f"{measured} of {len(waiting)} problems written to {escape(str(path))}", soft_wrap=True)
    if stopped is not None:
        raise stopped
    if broken:
        raise UserError(broken)


def _show(outcomes: list[Outcome], gpu: GPU) -> None:
    numbers = ("µs", "floor µs", "of floor", "tried", "refused")
    shown = table(f"measured on {escape(gpu.name)}", ("op", "problem", "choice"), numbers)
    for outcome in outcomes:
        times = ["", f"{1e6 * outcome.floor:.2f}", ""]
        choice = "none is right" if outcome.finished else "the time was up"
        if outcome.config is not None and outcome.finished:
            fields = vars(outcome.config)
            choice = (
                " ".join(f"{name}={int(v) if isinstance(v, bool) else v}" for name, v in fields.items()) or "its one"
            )
            times[0] = f"{1e6 * outcome.seconds:.2f}"
            times[2] = f"{outcome.seconds / outcome.floor:.2f}x"
        tried, refused = str(outcome.tried), str(len(outcome.refused))
        shown.add_row(outcome.case.op, outcome.case.problem.key(), choice, *times, tried, refused)
    out_console().print(shown)
    for outcome in outcomes:
        for config, reason in outcome.refused:
            err_console().print(f"refused: {escape(f'{outcome.case} {config}: {reason}')}", soft_wrap=True)


def _tune_cpu(
    models: tuple[str, ...], batches: list[int], precisions: list[Arithmetic], image_size: int, seconds: float,
    again: bool, dry_run: bool, json_target: str | None,
) -> None:  # fmt: skip
    from resnet_fast.backends import cpu
    from resnet_fast.kernels import _tables
    from resnet_fast.tuning import cpu as tuner

    if len(batches) > 1:
        raise UserError("--batch-size may be given once with --device cpu: a choice holds for any batch")
    if Arithmetic.float8 in precisions:
        raise UserError("--dtype float8: the CPU engine computes no float8")
    if Arithmetic.int8 in precisions:
        raise UserError("--dtype int8: in int8 the CPU engine has one algorithm, so there is nothing to measure")
    for each in precisions:
        if reason := cpu.unsupported(each.dtype) if each is not Arithmetic.tf32 else "the CPU engine has no tf32":
            raise UserError(f"tune: nothing can be measured here: {reason}")
    path = _tables.user_folder() / f"{cpu.machine()}.json"
    with as_user_errors(ValueError, OSError):
        found = tuner.problems(models, image_size)
        wanted = [(problem, each.dtype) for each in precisions for problem in found]
        waiting = tuner.pending(wanted, path, again)
    if dry_run:
        shown = table(f"to measure on {escape(cpu.machine())}", ("problem",), ())
        for problem, dtype in waiting:
            shown.add_row(problem.key(dtype))
        console = out_console()
        console.print(shown)
        console.print(f"{len(waiting)} problems")
        return
    if not waiting and json_target is None:
        out_console().print(f"nothing to measure: {escape(str(path))} has all of it (--again repeats it)")
        return
    _measure_cpu(waiting, path, batches[0], seconds, json_target)


def _measure_cpu(waiting: list[Any], path: Path, batch: int, seconds: float, json_target: str | None) -> None:
    from resnet_fast.benchmarking import machine
    from resnet_fast.tuning import cpu as tuner

    if_stopped(lambda: f"stopped; {path} keeps what was measured, and the same command goes on")
    disturbance = machine.Disturbance()
    outcomes: list[tuner.Outcome] = []
    stopped: KeyboardInterrupt | None = None
    with progress_bar() as show, as_user_errors(ValueError, OSError):

        def progress(done: int, total: int, problem: tuner.Problem, elapsed: float) -> None:
            show(f"{done}/{total} {problem}", min(1.0, max(done / total, elapsed / seconds)))

        try:
            tuner.sweep(
                waiting, path, batch=batch, seconds=seconds, again=True, progress=progress, finished=outcomes.append
            )
        except KeyboardInterrupt as error:
            stopped = error
    busy = disturbance.cores()
    if json_target is not None:
        rows = [
            {
                "problem": outcome.problem.key(outcome.dtype),
                "algorithm": outcome.algorithm if outcome.finished else None,
                "without_table": outcome.usual,
                "seconds": dict(outcome.seconds),
                "refused": dict(outcome.refused),
            }
            for outcome in outcomes
        ]
        described = {"schema": 1, "machine": machine.describe().as_dict(), "batch": batch, "table": str(path)}
        write_json({**described, "choices": rows}, json_target)
    if json_target != "-":
        names = ("direct", "winograd2", "winograd4")
        shown = table("measured, ms", ("problem", "choice", "without"), names)
        for outcome in outcomes:
            choice = outcome.algorithm if outcome.finished else "the time was up"
            times = (f"{1e3 * outcome.seconds[name]:.3f}" if name in outcome.seconds else "" for name in names)
            shown.add_row(outcome.problem.key(outcome.dtype), choice or "none is right", outcome.usual, *times)
        out_console().print(shown)
    for outcome in outcomes:
        for name, reason in outcome.refused:
            line = f"refused: {outcome.problem.key(outcome.dtype)} {name}: {reason}"
            err_console().print(escape(line), soft_wrap=True)
    warn_if_disturbed(err_console(), busy)
    measured = sum(outcome.finished and outcome.algorithm != "" for outcome in outcomes)
    err_console().print(f"{measured} of {len(waiting)} problems written to {escape(str(path))}", soft_wrap=True)
    if stopped is not None:
        raise stopped
