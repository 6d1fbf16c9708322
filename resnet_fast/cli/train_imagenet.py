"""``resnet-fast train imagenet``: train a ResNet on folders of images, alone or under torchrun.

This file has the options, the progress bar and the display of errors; ``resnet_fast.training.imagenet`` trains.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from resnet_fast.cli.common import (
    Device,
    OnError,
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


_data, _recipe, _computing, _files = (
    functools.partial(typer.Option, rich_help_panel=heading) for heading in ("Data", "Recipe", "Computing", "Files")
)
"""Options under one heading of --help each."""


def imagenet(
    data: Annotated[Path, _data("--data", metavar="DIR", help="Folder with train/<class>/ and val/<class>/.")],
    image_size: Annotated[
        int | None,
        _data(
            "--image-size", min=32, max=4096, help="Height and width of the images (default: the weights' own, or 224)."
        ),
    ] = None,
    resize_size: Annotated[
        int | None,
        _data(
            "--resize-size",
            min=1,
            max=4096,
            help="Shorter side in validation before cropping (default: in the weights' proportion, or 8/7).",
        ),
    ] = None,
    min_scale: Annotated[
        float, _data("--min-scale", help="Smallest training crop, as a fraction of the image's area.")
    ] = 0.08,
    workers: Annotated[int, _data("--workers", min=0, help="Data-loading workers per training process.")] = 4,
    on_error: Annotated[
        OnError,
        _data("--on-error", help="skip: leave damaged images out and count them; stop: end at the first one."),
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
    epochs: Annotated[int, _recipe("--epochs", min=1, help="Number of epochs.")] = 90,
    batch_size: Annotated[int, _recipe("--batch-size", "-b", min=1, help="Images per forward and process.")] = 128,
    accumulate: Annotated[int, _recipe("--accumulate", min=1, help="Forwards per optimizer step.")] = 1,
    lr: Annotated[
        float | None,
        _recipe("--lr", help="Learning rate after the warm-up (default: 0.1 per 256 images in a step)."),
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        _recipe("--warmup-epochs", help="Epochs of linear warm-up (default: 5, or a tenth of fewer than 50 epochs)."),
    ] = None,
    momentum: Annotated[float, _recipe("--momentum", help="Nesterov momentum.")] = 0.9,
    weight_decay: Annotated[
        float, _recipe("--weight-decay", help="Weight decay of filters and matrices; norms and biases have none.")
    ] = 1e-4,
    label_smoothing: Annotated[float, _recipe("--label-smoothing", help="Label smoothing of the training loss.")] = 0.1,
    clip_norm: Annotated[
        float | None, _recipe("--clip-norm", help="Clip the gradient norm to this value (default: off).")
    ] = None,
    ema_decay: Annotated[
        float, _recipe("--ema-decay", help="Keep a moving average with this decay per step; 0 for none.")
    ] = 0.0,
    zero_init_residual: Annotated[
        bool, _recipe("--zero-init-residual", help="Start every block as the identity.")
    ] = False,
    sync_bn: Annotated[bool, _recipe("--sync-bn", help="Compute BatchNorm's statistics over all processes.")] = False,
    seed: Annotated[int, _recipe("--seed", min=0, help="Random seed.")] = 0,
    precision: Annotated[
        TrainPrecision, _computing("--dtype", help="Precision of the computation, by autocast.")
    ] = TrainPrecision.float32,
    device: Annotated[Device, _computing("--device", help="auto: a CUDA GPU if there is one.")] = Device.auto,
    compile_it: Annotated[bool, _computing("--compile", help="Run the training step under torch.compile.")] = False,
    memory_efficient: Annotated[
        bool, _computing("--memory-efficient", help="Keep less memory for the backward pass.")
    ] = False,
    threads: Threads = None,
    out: Annotated[Path, _files("--out", "-o", metavar="FOLDER", help="Output folder.")] = Path("runs/imagenet"),
    checkpoint_every: Annotated[
        int, _files("--checkpoint-every", min=1, metavar="STEPS", help="Steps between checkpoints within an epoch.")
    ] = 500,
    resume: Annotated[bool, _files("--resume", help="Continue from the checkpoint in --out if there is one.")] = False,
    allow_changes: Annotated[
        bool, _files("--allow-changes", help="Resume even if images were added or removed.")
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
                with (
                    progress_bar(lines=console)
                    if first
                    else contextlib.nullcontext(lambda what, fraction: None) as show
                ):
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
