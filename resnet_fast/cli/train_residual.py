"""``resnet-fast train residual``: train the small residual network, and compare fused with plain answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from resnet_fast.cli.common import (
    Device,
    DeviceName,
    Threads,
    UserError,
    as_user_errors,
    if_stopped,
    one_line,
    out_console,
    progress_bar,
    set_threads,
    training_stopped,
)

if TYPE_CHECKING:
    from resnet_fast.training.digits import Digits
    from resnet_fast.training.residual import Epoch, Run, Settings

CHECKPOINT, MODEL, METRICS, PLOT = "checkpoint.safetensors", "model.safetensors", "metrics.csv", "metrics.png"
EPOCHS = 5
"""As in the original."""


def residual(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="digits|mnist|PATH",
            help="scikit-learn's digits, MNIST (downloaded), a folder with MNIST's idx files, or an .npz file with "
            "x_train, y_train, x_test, y_test.",
        ),
    ] = "digits",
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Number of epochs, those before --resume included.")
    ] = EPOCHS,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per step.")] = 50,
    lr: Annotated[float, typer.Option("--lr", help="Adam's learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed (initial values, order, split).")] = 0,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help=f"Folder for {CHECKPOINT}, {MODEL}, {METRICS}, {PLOT}."),
    ] = Path("residual_network"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in FOLDER.")] = False,
    device: DeviceName = Device.auto,
    threads: Threads = None,
) -> int:
    """Train the small TensorFlow-style residual network on digits, and check that fused predictions are the same.

    Prints the accuracies of each epoch, keeps a checkpoint of the last one, and runs the held-out images through plain
    torch layers, the fused network and optimize().
    The exit status is 1 if a prediction differs.
    """
    from resnet_fast.training import checkpoint, digits
    from resnet_fast.training.residual import Settings

    where = device.found
    path = out / CHECKPOINT
    if resume and not path.is_file():
        raise UserError(f"{path}: no checkpoint to continue from; leave --resume out to start")
    if not resume and path.exists():
        raise UserError(f"{path} exists; give --resume to continue it, or another folder")
    if_stopped(lambda: training_stopped(path, resume))
    set_threads(threads)
    console = out_console()
    with as_user_errors(ValueError, ImportError, OSError):
        settings = Settings(batch_size, lr, seed)
        found = digits.load(data, seed)
        checkpoint.check_folder(out)
        run = train(console, found, settings, epochs, device=where, out=out, resume=resume)
    return 0 if show_agreement(console, run) else 1


def train(
    console: Console,
    data: Digits,
    settings: Settings,
    epochs: int,
    *,
    device: str = "cpu",
    out: Path | None = None,
    resume: bool = False,
) -> Run:
    """Train up to ``epochs`` epochs, with a progress bar and a line for each; keep files in ``out`` if it is given."""
    from resnet_fast.training import checkpoint
    from resnet_fast.training.metrics import Metrics, try_to_draw
    from resnet_fast.training.residual import ABOUT, Epoch, Run

    run = Run(data, settings, device=device)
    if out is not None and resume:
        run.resume(out / CHECKPOINT)
    columns = list(Epoch.__dataclass_fields__)
    metrics = None
    if out is not None:
        metrics = Metrics(out / METRICS, columns, resume_after=run.epochs_done - 1 if resume else None)
    console.print(
        f"{escape(data.name)}: {len(data.train)} images to learn from in batches of {settings.batch_size}, "
        f"{len(data.validation)} for validation; {run.epochs_done} of {epochs} epochs done",
        soft_wrap=True,
    )
    if run.epochs_done >= epochs:
        console.print(f"nothing left to train: --epochs {epochs} or more are done", soft_wrap=True)
    with progress_bar(lines=console) as progress:
        while run.epochs_done < epochs:
            number = run.epochs_done
            found = run.epoch(lambda fraction, n=number: progress(f"epoch {n}", fraction))  # type: ignore[misc]
            console.print(_line(number, found), soft_wrap=True)
            if out is not None and metrics is not None:
                # In this order: --resume drops a row without its checkpoint, but could not restore a missing row.
                metrics.append(number, **found.as_dict())
                run.save(out / CHECKPOINT)
    if out is not None:
        checkpoint.write_model(out / MODEL, run.model.state_dict(), ABOUT)
    if out is not None and metrics is not None and metrics.rows:
        error = try_to_draw(metrics.rows, out / PLOT, f"residual network, {data.name}")
        plot = f"Plot: {escape(str(out / PLOT))}"
        console.print(plot if error is None else f"[yellow]No plot:[/] {escape(one_line(error))}", soft_wrap=True)
    return run


def _line(number: int, found: Epoch) -> str:
    """Return the line the original prints: epochs from 0, mean accuracy of the batches, validation accuracy."""
    return f"epoch: {number} , train: {found.train_accuracy:.4f} , valid: {found.valid_accuracy:.4f}"


def show_agreement(console: Console, run: Run) -> bool:
    """Print how plain, fused and optimized answers to the held-out images compare; return whether they agree."""
    from resnet_fast.training.residual import agreement

    held_out = run.data.held_out
    with progress_bar(total=None, lines=console) as progress:
        progress("comparing answers", 0.0)
        found = agreement(run.model, held_out)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in found.largest.items())
    ties = f" (apart from {found.ties} tie{'s'[: found.ties != 1]})" if found.ties else ""
    console.print(
        f"held out: {found.images} images, {found.accuracy:.2%} right with plain torch layers; "
        f"largest difference of a logit (up to {found.scale:.1f}): {differences}",
        soft_wrap=True,
    )
    if found.agrees:
        console.print(f"[bold green]All predictions agree[/]: plain layers, the fused network, optimize(){ties}.")
    else:
        noun = "prediction differs" if found.different == 1 else "predictions differ"
        console.print(
            f"[bold red]{found.different} {noun}[/] between plain layers and the fused network or optimize(){ties}."
        )
    return found.agrees
