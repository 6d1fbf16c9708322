"""``resnet-fast train imagenet``: train a ResNet on folders of images, alone or under torchrun.

This file has the options, the progress bar and the display of errors; ``resnet_fast.training.imagenet`` trains.
"""

from __future__ import annotations

import contextlib
import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from resnet_fast.cli.common import (
    Threads,
    UserError,
    as_user_errors,
    check_arch,
    if_stopped,
    one_line,
    out_console,
    printable,
    progress_bar,
    set_threads,
    training_stopped,
)


class TrainPrecision(str, enum.Enum):
    """Precision of a training step; parameters and optimizer are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TrainDevice(str, enum.Enum):
    """Where to train."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class OnError(str, enum.Enum):
    """What to do about a damaged image."""

    skip = "skip"
    stop = "stop"


def _silent(what: str, fraction: float) -> None:
    pass


DATA, RECIPE, COMPUTING, FILES = "Data", "Recipe", "Computing", "Files"
"""Headings of the options in --help."""


def imagenet(
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="DIR", help="Folder with train/<class>/ and val/<class>/.", rich_help_panel=DATA
        ),
    ],
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            min=32,
            max=4096,
            help="Height and width of the images (default: the weights' own, or 224).",
            rich_help_panel=DATA,
        ),
    ] = None,
    resize_size: Annotated[
        int | None,
        typer.Option(
            "--resize-size",
            min=1,
            max=4096,
            help="Shorter side in validation before cropping (default: in the weights' proportion, or 8/7).",
            rich_help_panel=DATA,
        ),
    ] = None,
    min_scale: Annotated[
        float,
        typer.Option(
            "--min-scale", help="Smallest training crop, as a fraction of the image's area.", rich_help_panel=DATA
        ),
    ] = 0.08,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Data-loading workers per training process.", rich_help_panel=DATA)
    ] = 4,
    on_error: Annotated[
        OnError,
        typer.Option(
            "--on-error",
            help="skip: leave damaged images out and count them; stop: end at the first one.",
            rich_help_panel=DATA,
        ),
    ] = OnError.skip,
    arch: Annotated[
        str | None,
        typer.Option("--arch", "-a", metavar="NAME", help="Model name (default: the weights' own, or resnet50)."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH",
            help="Start from published weights or a file; a classifier for other classes is replaced.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Number of epochs.", rich_help_panel=RECIPE)] = 90,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", "-b", min=1, help="Images per forward and process.", rich_help_panel=RECIPE),
    ] = 128,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Forwards per optimizer step.", rich_help_panel=RECIPE)
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate after the warm-up (default: 0.1 per 256 images in a step).",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        typer.Option(
            "--warmup-epochs",
            help="Epochs of linear warm-up (default: 5, or a tenth of fewer than 50 epochs).",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    momentum: Annotated[float, typer.Option("--momentum", help="Nesterov momentum.", rich_help_panel=RECIPE)] = 0.9,
    weight_decay: Annotated[
        float,
        typer.Option(
            "--weight-decay",
            help="Weight decay of filters and matrices; norms and biases have none.",
            rich_help_panel=RECIPE,
        ),
    ] = 1e-4,
    label_smoothing: Annotated[
        float,
        typer.Option(
            "--label-smoothing",
            help="Label smoothing of the training loss.",
            rich_help_panel=RECIPE,
        ),
    ] = 0.1,
    clip_norm: Annotated[
        float | None,
        typer.Option(
            "--clip-norm", help="Clip the gradient norm to this value (default: off).", rich_help_panel=RECIPE
        ),
    ] = None,
    ema_decay: Annotated[
        float,
        typer.Option(
            "--ema-decay", help="Keep a moving average with this decay per step; 0 for none.", rich_help_panel=RECIPE
        ),
    ] = 0.0,
    zero_init_residual: Annotated[
        bool,
        typer.Option("--zero-init-residual", help="Start every block as the identity.", rich_help_panel=RECIPE),
    ] = False,
    sync_bn: Annotated[
        bool,
        typer.Option(
            "--sync-bn",
            help="Compute BatchNorm's statistics over all processes.",
            rich_help_panel=RECIPE,
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.", rich_help_panel=RECIPE)] = 0,
    precision: Annotated[
        TrainPrecision,
        typer.Option("--precision", help="Precision of the computation, by autocast.", rich_help_panel=COMPUTING),
    ] = TrainPrecision.float32,
    device: Annotated[
        TrainDevice, typer.Option("--device", help="auto: a CUDA GPU if there is one.", rich_help_panel=COMPUTING)
    ] = TrainDevice.auto,
    compile_it: Annotated[
        bool, typer.Option("--compile", help="Run the training step under torch.compile.", rich_help_panel=COMPUTING)
    ] = False,
    memory_efficient: Annotated[
        bool,
        typer.Option("--memory-efficient", help="Keep less memory for the backward pass.", rich_help_panel=COMPUTING),
    ] = False,
    threads: Threads = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.", rich_help_panel=FILES),
    ] = Path("runs/imagenet"),
    checkpoint_every: Annotated[
        int,
        typer.Option(
            "--checkpoint-every",
            min=1,
            metavar="STEPS",
            help="Steps between checkpoints within an epoch.",
            rich_help_panel=FILES,
        ),
    ] = 500,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the checkpoint in --out if there is one.", rich_help_panel=FILES),
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Resume even if images were added or removed.", rich_help_panel=FILES),
    ] = False,
) -> None:
    """Train one of the ten ResNets on folders of images, ImageNet's or your own.

    Runs alone, or under torchrun with one process per GPU, on one machine or several:
    torchrun --standalone --nproc-per-node 8 -m resnet_fast.cli train imagenet --data DIR

    Writes checkpoint.safetensors and metrics.csv after every epoch, model.safetensors and a plot at the end.
    """
    if arch is not None:
        check_arch(arch)
    set_threads(threads)

    import torch

    from resnet_fast.models import ImageError
    from resnet_fast.training import distributed, imagenet
    from resnet_fast.training.imagefolder import reason

    with as_user_errors(ValueError):
        options = imagenet.Options(
            data=data, out=out, arch=arch, weights=weights, epochs=epochs, batch_size=batch_size,
            accumulate=accumulate, lr=lr, momentum=momentum, weight_decay=weight_decay, label_smoothing=label_smoothing,
            warmup_epochs=min(5.0, epochs / 10) if warmup_epochs is None else warmup_epochs,
            clip_norm=clip_norm, ema_decay=ema_decay, precision=precision.value, compile=compile_it,
            memory_efficient=memory_efficient, sync_bn=sync_bn, zero_init_residual=zero_init_residual,
            image_size=image_size, resize_size=resize_size, min_scale=min_scale, workers=workers, seed=seed,
            on_error=on_error.value, checkpoint_every=checkpoint_every, resume=resume, allow_changes=allow_changes,
        )  # fmt: skip
    console = out_console()
    with as_user_errors(OSError):
        first = True
        try:
            with distributed.start(device.value) as processes:
                first = processes.first
                if_stopped(lambda: training_stopped(out / imagenet.CHECKPOINT, resume) if first else None)
                torch.backends.cudnn.benchmark = True  # all batches have the same shape
                with progress_bar(lines=console) if first else contextlib.nullcontext(_silent) as show:
                    imagenet.train(
                        options, processes, progress=show,
                        say=lambda line: console.print(escape(printable(line)), soft_wrap=True),
                    )  # fmt: skip
        except (distributed.AgreedError, imagenet.Diverged) as error:
            if not first:  # process 0 reports it
                raise typer.Exit(1) from error
            raise UserError(one_line(error)) from error
        except ImageError as error:
            raise UserError(reason(error)) from error
        except ValueError as error:
            raise UserError(one_line(error)) from error
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is too small for --batch-size {batch_size}; a smaller one with --accumulate, or "
                "--memory-efficient, may fit"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads images died ({one_line(error, 200)}), perhaps because memory or /dev/shm is "
                "full; fewer --workers need less, and 0 reads in the training process. --resume continues from the "
                "last checkpoint"
            ) from error
