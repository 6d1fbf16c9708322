"""``resnet-fast tune``: measures launch choices on this machine's GPU and writes them to the user's table.

Here are the options, the progress bar and what is printed; the work is ``resnet_fast.tuning``.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from resnet_fast.cli.common import (
    UserError,
    as_user_errors,
    check_arch,
    err_console,
    if_stopped,
    one_line,
    out_console,
    progress_bar,
    table,
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
        typer.Option("--batch-size", "-b", min=1, help="Images in a batch, by default 128; repeatable."),
    ] = None,
    precisions: Annotated[
        list[Arithmetic] | None,
        typer.Option(
            "--dtype",
            parser=arithmetic,
            metavar="|".join(NAMES),
            help="How to multiply, by default float16; repeatable.",
        ),
    ] = None,
    chosen: Annotated[
        list[Op] | None,
        typer.Option(
            "--op", help="Only this op; may be repeated. The last two run in training only, and are measured if named."
        ),
    ] = None,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Height and width of the images.")] = 224,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Stop after about this long.")] = 300,
    again: Annotated[bool, typer.Option("--again", help="Measure also what a table has.")] = False,
    checked_in: Annotated[
        bool, typer.Option("--checked-in", help="Write the table that comes with the package, not the user's.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the problems and how many candidates each has; needs triton, no GPU."),
    ] = False,
    gpu_name: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help=f"With --dry-run: for this GPU; by default {DEFAULT_GPU}."),
    ] = None,
) -> None:
    """Measure which launch of each kernel is fastest on this machine's GPU, and remember it for later runs.

    Where resnet_fast._C is built its CUDA kernels are measured beside Triton's (as conv_bn_act.cuda), and run from then
    on where they take less time. Triton's come first, so that a CUDA kernel which breaks costs none of their times.

    The most expensive layers come first, and the table is written after each, so that it can be stopped at any time.
    """
    names = tuple(check_arch(name) for name in (models or ["resnet50"]))
    if gpu_name is not None and not dry_run:
        raise UserError("--gpu goes with --dry-run; measured is this machine's own GPU")
    gpu = _dry_gpu(gpu_name) if dry_run else _this_gpu()

    from resnet_fast.kernels import _tables
    from resnet_fast.tuning import ops, shapes, sweep

    wanted = [each.precision for each in (precisions or [Arithmetic.float16])]
    with as_user_errors(ValueError):
        training = any(op in shapes.TRAINING for op in chosen or ())
        cases = shapes.problems(names, batches or [128], wanted, image_size, gpu, training)
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
        asked = f"{', '.join(names)} at batch {', '.join(map(str, batches or [128]))}"
        what = f"{', '.join(chosen)} launch" if chosen else "launch"
        raise UserError(f"tune: {asked} has no {what} that is worth one on {gpu.name}")
    waiting = sweep.pending(cases, gpu, table, again)
    if dry_run:
        return _list(waiting, gpu)
    if not waiting:
        out_console().print(
            f"nothing to measure: the tables for {escape(gpu.name)} have all of it (--again repeats it)"
        )
        return None
    return _measure(waiting, gpu, path, seconds, again)


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


def _list(waiting: tuple[Case, ...], gpu: GPU) -> None:
    from resnet_fast.tuning import sweep

    shown = table(f"to measure on {escape(gpu.name)}", ("op", "problem"), ("candidates", "floor µs"))
    whole = 0
    for case in waiting:
        count = len(sweep.configs(case, gpu))
        whole += count
        shown.add_row(case.op, case.problem.key(), str(count), f"{1e6 * sweep.floor(case, gpu):.2f}")
    console = out_console()
    console.print(shown)
    console.print(f"{len(waiting)} problems, {whole} candidates")


def _measure(waiting: tuple[Case, ...], gpu: GPU, path: Path, seconds: float, again: bool) -> None:
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
                    measured_with=cuda.versions(device), seconds=seconds, again=again,
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
