"""Train a ResNet on folders of images, with the usual recipe for ImageNet, in one process or several.

This file has the options, the loop and the checkpoint's content. It prints nothing: the command line does, through two
functions that it passes to ``train``. Schedules, moving averages, loss scaling and communication are torch's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_fast import models
from resnet_fast.models import weights as registry
from resnet_fast.models.checkpoint import WeightsError, read_with_metadata
from resnet_fast.models.images import ImageError, UnopenedImageError
from resnet_fast.models.preprocessing import MAX_SIZE, Preprocessing
from resnet_fast.training import checkpoint, distributed, imagefolder
from resnet_fast.training.distributed import Processes
from resnet_fast.training.imagefolder import ImageFolder
from resnet_fast.training.metrics import Metrics, try_to_draw
from resnet_fast.training.validation import Progress, autocast, evaluate

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
EMA_MODEL = "model_ema.safetensors"
METRICS = "metrics.csv"
PLOT = "metrics.png"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARMUP_FACTOR = 0.01
"""The first step's learning rate, as a fraction of the full one."""

TELL_SECONDS = 2.0
"""Seconds between reports of loss and speed during an epoch; each report waits for the device."""


class Diverged(RuntimeError):
    """Raised in every process if the loss is no longer finite. A checkpoint on disk is from before that."""


@dataclass(frozen=True)
class Options:
    """Everything that a training run depends on, except its processes.

    Args:
        data: folder with ``train/<class>/`` and ``val/<class>/``. out: folder for everything that is written.
        arch: one of the ten ResNets; None: that of the resumed checkpoint, of ``weights``, or resnet50.
        weights: published weights by name, or a file, to start from; None draws parameters from the seed. The
            classifier is kept if it has the same number of classes, and the same names if the file has names.
        epochs: number of passes over the training images.
        batch_size: images in one forward of one process.
        accumulate: forwards whose gradients make one step. A step sees ``batch_size * accumulate * processes`` images.
        lr: learning rate after the warm-up; None is 0.1 for 256 images a step, and proportional to that number.
        warmup_epochs: epochs in which the rate rises linearly; afterwards it falls as a cosine to 0.
        weight_decay: for the weights of convolutions and of the classifier; norms and biases have none.
        clip_norm: the gradient's 2-norm is clipped to this; None: no clipping.
        ema_decay: of the exponential moving average of parameters and statistics, per step; 0 keeps none.
        precision: "float32", or "bfloat16" or "float16" for autocast; the latter with loss scaling.
        compile: run the training step's forward and backward under torch.compile.
        memory_efficient: the models' keyword of that name: less is kept for the backward.
        sync_bn: BatchNorm's statistics are those of all processes together.
        image_size: height and width; None: that of the checkpoint, of ``weights``, or 224.
        resize_size: pixels of the shorter side in validation, before ``image_size`` is cut out; None: in the
            proportion of ``expected``, usually 8/7.
        expected: the preprocessing of the checkpoint or ``weights``; ``train`` sets it.
        min_scale: smallest training crop, as a fraction of the image's area.
        workers: data-loading processes per training process.
        on_error: "skip" replaces a damaged image by the next one, "stop" ends the run. A file that cannot be opened or
            read ends it in any case.
        checkpoint_every: steps between checkpoints; there is also one after every epoch.
        resume: continue from the checkpoint in ``out`` if there is one.
        allow_changes: resume even if images were added or removed.

    Raises:
        ValueError: an option that is out of range.
    """

    data: Path
    out: Path
    arch: str | None = None
    weights: str | None = None
    epochs: int = 90
    batch_size: int = 128
    accumulate: int = 1
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    warmup_epochs: float = 5.0
    clip_norm: float | None = None
    ema_decay: float = 0.0
    precision: str = "float32"
    compile: bool = False
    memory_efficient: bool = False
    sync_bn: bool = False
    zero_init_residual: bool = False
    image_size: int | None = None
    resize_size: int | None = None
    min_scale: float = 0.08
    workers: int = 4
    on_error: str = "skip"
    seed: int = 0
    checkpoint_every: int = 500
    resume: bool = False
    allow_changes: bool = False
    expected: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if self.arch is not None and self.arch not in models.list_models():
            raise ValueError(f"arch is {self.arch!r}, it must be one of {', '.join(models.list_models())}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, it must be one of {', '.join(PRECISIONS)}")
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "workers", self.workers >= 0, "0 or more")
        _require(self, "seed", self.seed >= 0, "0 or more")
        if self.image_size is not None:
            _require(self, "image_size", 32 <= self.image_size <= MAX_SIZE, f"from 32 to {MAX_SIZE}")
        if self.resize_size is not None:
            _require(self, "resize_size", 1 <= self.resize_size <= MAX_SIZE, f"from 1 to {MAX_SIZE}")
        _require(self, "on_error", self.on_error in imagefolder.ON_ERROR, " or ".join(imagefolder.ON_ERROR))
        if self.weights is not None and self.zero_init_residual:
            raise ValueError("zero_init_residual sets parameters that weights replace; give one of the two")
        if self.lr is not None:
            _require(self, "lr", 0 < self.lr < math.inf, "a positive number")
        if self.clip_norm is not None:
            _require(self, "clip_norm", 0 < self.clip_norm < math.inf, "a positive number")
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        _require(self, "momentum", 0 <= self.momentum < 1, "from 0 to less than 1")
        _require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to less than 1")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "from 0 (none) to less than 1")
        _require(self, "min_scale", 0 < self.min_scale <= 1, "more than 0 and at most 1")
        most = f"0 or more and less than the {self.epochs} epochs"
        _require(self, "warmup_epochs", 0 <= self.warmup_epochs < self.epochs, most)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of validation; training has the same size, mean, standard deviation and interpolation."""
        return self.expected.for_size(self.image_size, self.resize_size)

    @property
    def model(self) -> str:
        """The name of the network."""
        return self.arch or "resnet50"

    def images_per_step(self, processes: Processes) -> int:
        return self.batch_size * self.accumulate * processes.world_size

    def learning_rate(self, processes: Processes) -> float:
        """Return the rate after the warm-up (Goyal et al., arXiv:1706.02677: proportional to the images of a step)."""
        return 0.1 * self.images_per_step(processes) / 256 if self.lr is None else self.lr


def _require(options: Options, name: str, holds: bool, right: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(options, name)}, it must be {right}")


@dataclass
class Training:
    """A run at one moment: everything that a checkpoint keeps, and the objects that compute it.

    Args:
        model: the network itself. forward: it, or what DistributedDataParallel and torch.compile made of it.
        epoch, step: the next epoch, from 0, and how many of its steps are done.
        sums: [4] float64, of this process in this epoch: loss times images, images classified right, images, and how
            many of these stood in for a damaged one.
        settings: what must be the same for another process to continue this run.
        names: of the images, packed, by the folder.
        started: how the parameters began, in words, if not from the seed.
    """

    options: Options
    processes: Processes
    steps_per_epoch: int
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    ddp: DistributedDataParallel | None
    ema: AveragedModel | None
    optimizer: torch.optim.SGD
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    criterion: nn.CrossEntropyLoss
    sums: Tensor
    settings: dict[str, Any]
    names: dict[str, Tensor]
    started: str = ""
    epoch: int = 0
    step: int = 0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: matrices and filters with ``weight_decay``, norms and biases without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.dim() <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int) -> LRScheduler:
    """Return a schedule of one ``step()`` per training step: linearly up from ``WARMUP_FACTOR``, then a cosine to 0.

    The full rate is that of step ``warmup_steps``, the first after the warm-up (Loshchilov & Hutter 2016,
    arXiv:1608.03983, without restarts).
    """
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
    if warmup_steps == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=WARMUP_FACTOR, total_iters=warmup_steps)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup_steps])


def build(options: Options, processes: Processes, folder: ImageFolder) -> Training:
    """Return a run at its beginning: the network with parameters from the seed or from weights, and all else it needs.

    Raises:
        ValueError: the training images are fewer than one step takes, a step is too small for BatchNorm, or the
            weights cannot be had or do not fit.
    """
    per_step = options.images_per_step(processes)
    steps_per_epoch = len(folder) // processes.world_size // options.batch_size // options.accumulate
    if steps_per_epoch < 1:
        raise ValueError(
            f"{folder.root}: has {len(folder)} images, one step takes {per_step} (batch_size {options.batch_size} x "
            f"accumulate {options.accumulate} x {processes.world_size} processes); a smaller batch_size would do"
        )
    size = options.preprocessing.crop_size
    if options.batch_size == 1 and size <= 32 and not (options.sync_bn and processes.world_size > 1):
        raise ValueError(
            f"batch_size is 1 and image_size {size}: the last stage has one pixel of one image, of which BatchNorm can "
            "take no variance; --batch-size 2 or --image-size 33 would do"
        )
    torch.manual_seed(options.seed)
    extra = {"memory_efficient": True} if options.memory_efficient else {}
    model: nn.Module = models.get_model(
        options.model, num_classes=len(folder.classes), zero_init_residual=options.zero_init_residual, **extra
    )
    started = "" if options.weights is None else _load_weights(model, options, folder.classes)
    model = model.to(processes.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = None
    if options.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
    ddp = None
    if processes.connected:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if options.sync_bn and processes.world_size > 1:
        # Not before: on a CPU DistributedDataParallel refuses a module that has such layers. They take over the very
        # parameters and buffers that it knows.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    called = model if ddp is None else ddp
    lr = options.learning_rate(processes)
    optimizer = torch.optim.SGD(
        parameter_groups(model, options.weight_decay), lr=lr, momentum=options.momentum, nesterov=options.momentum > 0
    )
    warmup_steps = round(options.warmup_epochs * steps_per_epoch)
    return Training(
        options=options,
        processes=processes,
        steps_per_epoch=steps_per_epoch,
        model=model,
        forward=torch.compile(called) if options.compile else called,
        ddp=ddp,
        ema=ema,
        optimizer=optimizer,
        scheduler=warmup_cosine(optimizer, warmup_steps=warmup_steps, steps=options.epochs * steps_per_epoch),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=options.precision == "float16"),
        criterion=nn.CrossEntropyLoss(label_smoothing=options.label_smoothing),
        sums=torch.zeros(4, dtype=torch.float64, device=processes.device),
        settings=_settings(options, processes, folder),
        names={"train": imagefolder.pack_names(folder)} if processes.first else {},
        started=started,
    )


def _load_weights(model: nn.Module, options: Options, classes: Sequence[str]) -> str:
    """Copy ``options.weights`` into ``model``, without a classifier for other classes; return a line about it."""
    try:
        source = registry.resolve(options.model, options.weights)
        named = registry.named_classes(read_with_metadata(source)[1]) if isinstance(source, Path) else None
        pretrained = models.get_model(options.model, weights=source)
    except (WeightsError, OSError, TypeError) as error:
        raise ValueError(str(error)) from error
    state = pretrained.state_dict()
    theirs = pretrained.fc.out_features
    kept = theirs == len(classes) and (named is None or named == tuple(classes))
    if not kept:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    model.load_state_dict(state, strict=kept)
    what = "kept" if kept else f"of {theirs} classes replaced by a new one of {len(classes)}"
    return f"starting from {source}, its classifier {what}"


def _settings(options: Options, processes: Processes, folder: ImageFolder) -> dict[str, Any]:
    """Return the options that decide a run's numbers, by their names on the command line."""
    same = (
        "epochs", "batch_size", "accumulate", "momentum", "weight_decay", "label_smoothing", "warmup_epochs",
        "clip_norm", "ema_decay", "precision", "sync_bn", "min_scale", "seed",
    )  # fmt: skip
    found = {name: getattr(options, name) for name in same}
    size = {"image_size": options.preprocessing.crop_size, "resize_size": options.preprocessing.resize_size}
    lr = options.learning_rate(processes)
    network = {"arch": options.model, "classes": list(folder.classes)}
    return network | found | size | {"lr": lr, "processes": processes.world_size}


def _about(training: Training) -> dict[str, str]:
    """Return the metadata of the files, which everything that reads weights obeys."""
    names = {"arch": training.options.model, "classes": json.dumps(training.settings["classes"])}
    return names | training.options.preprocessing.to_metadata()


def take_step(training: Training, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Take one optimizer step on ``options.accumulate`` batches: images uint8 [N, H, W, 3] and targets int64 [N].

    Returns the last batch's mean loss, on the device.
    """
    options, device = training.options, training.processes.device
    loss = training.sums.new_zeros(())
    for number, (images, targets) in enumerate(batches, 1):
        # Gradients are summed over the processes once, in the backward of the last batch.
        joint = training.ddp is None or number == options.accumulate
        with contextlib.nullcontext() if joint or training.ddp is None else training.ddp.no_sync():
            x = imagefolder.normalize(images.to(device, non_blocking=True), options.preprocessing)
            wanted = targets.to(device, non_blocking=True)
            with autocast(device, PRECISIONS[options.precision]):
                scores = training.forward(x)
                loss = training.criterion(scores, wanted)
            training.scaler.scale(loss / options.accumulate).backward()
        loss = loss.detach()
        count = len(wanted)
        right = (scores.detach().argmax(1) == wanted).sum()
        training.sums[:3] += torch.stack(
            [loss.double() * count, right.double(), torch.full_like(right, count).double()]
        )
    if options.clip_norm is not None:
        training.scaler.unscale_(training.optimizer)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), options.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    training.scheduler.step()
    if training.ema is not None:
        training.ema.update_parameters(training.model)
    training.step += 1
    return loss


def save(training: Training, path: Path) -> None:
    """Write the checkpoint in process 0; all processes must call this.

    Raises:
        Diverged: a loss since the beginning of the epoch was infinite or NaN. Nothing is written then.
        OSError: it cannot be written; the previous file stays complete.
    """
    processes = training.processes
    sums = distributed.gather(training.sums, processes)
    if not bool(torch.isfinite(sums).all()):
        before = f"{path} is from before that" if path.exists() else "there is no checkpoint from before that"
        raise Diverged(
            f"the loss is not finite in epoch {training.epoch + 1}; {before}. A lower learning rate, a longer warm-up "
            "or clipping the gradient helps"
        )
    tensors = {"sums": sums, "rng.cpu": distributed.gather(torch.get_rng_state(), processes)}
    if processes.device.type == "cuda":
        tensors["rng.cuda"] = distributed.gather(torch.cuda.get_rng_state(processes.device), processes)
    if not processes.first:
        return
    if training.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in training.ema.state_dict().items()}
    tensors |= {f"names.{part}": packed for part, packed in training.names.items()}
    state = {
        "settings": training.settings,
        "epoch": training.epoch,
        "step": training.step,
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict(),
    }
    checkpoint.save(
        path, model=training.model.state_dict(), optimizer=training.optimizer.state_dict(), state=state,
        tensors=tensors, about=_about(training),
    )  # fmt: skip


def restore(training: Training, path: Path, folders: Mapping[str, ImageFolder]) -> list[str]:
    """Continue from the checkpoint. Process 0 reads it for all; all must call this.

    Args:
        folders: the present images by part, "train" and "val".

    Returns:
        what has changed, in words.

    Raises:
        ValueError: it is of a run with other settings, no checkpoint of such a run, or damaged; or training images
            were added or removed, and the options do not allow it.
    """
    processes = training.processes
    found: Any = None
    with distributed.agreed(processes):
        if processes.first:
            loaded = checkpoint.load(path)
            _check_settings(path, loaded.state, training.settings)
            packed = {part: loaded.tensors.pop(f"names.{part}", torch.empty(0)) for part in folders}
            changes = {part: _changes(packed[part], folder, path) for part, folder in folders.items()}
            if changes["train"] and not training.options.allow_changes:
                raise ValueError(
                    f"{path}: since it was made, {changes['train']}. --allow-changes goes on with the images that "
                    "there are now; another folder for --out starts anew"
                )
            found = (loaded.model, loaded.optimizer, loaded.state, loaded.tensors, changes)
    *parts, changes = distributed.from_first(found, processes)
    try:
        _adopt(training, *parts, other_images=bool(changes["train"]))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: damaged, it does not fit its own settings ({text[:200]})") from error
    said = []
    if changes["train"]:
        said.append(
            f"since the checkpoint, {changes['train']}. Order and steps of what is left are drawn anew, for the images "
            "that there are now, so the run is not the one that was begun, bit for bit"
        )
    if changes["val"]:
        said.append(f"since the checkpoint, {changes['val']}. Figures of earlier epochs are of other images")
    return said


def _changes(packed: Tensor, folder: ImageFolder, path: Path) -> str:
    """Return which images were added or removed, in words; "" if none."""
    try:
        before = imagefolder.unpack_names(packed)
    except ValueError as error:
        raise ValueError(f"{path}: damaged, or written by another version of resnet_fast: {error}") from error
    now = set(folder.files.tolist())
    parts = [
        f"{len(names):,} {what} {folder.root} ({imagefolder.some([os.fsdecode(name) for name in sorted(names)])})"
        for names, what in (
            (before - now, f"of {len(before):,} images were removed from"),
            (now - before, "images were added to"),
        )
        if names
    ]
    return " and ".join(parts)


def _adopt(
    training: Training,
    model: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    other_images: bool,
) -> None:
    processes = training.processes
    training.model.load_state_dict(model)
    training.epoch, training.step = int(state["epoch"]), min(int(state["step"]), training.steps_per_epoch)
    if other_images:  # an epoch may have another number of steps: move the schedule to where the run is
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each
            for _ in range(training.epoch * training.steps_per_epoch + training.step):
                training.scheduler.step()
    rates = [group["lr"] for group in training.optimizer.param_groups]
    training.optimizer.load_state_dict(optimizer)
    for parameter, buffers in training.optimizer.state.items():
        for name, value in buffers.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter).copy_(value)  # in the parameter's memory format
    if other_images:
        for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    else:
        training.scheduler.load_state_dict(dict(state["scheduler"]))
    training.scaler.load_state_dict(dict(state["scaler"]))
    training.sums.copy_(tensors["sums"][processes.rank])
    if training.ema is not None:
        averaged = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
        training.ema.load_state_dict(averaged)
    # Copies: torch reads a generator's state from the start of the tensor's storage, ignoring the offset.
    torch.set_rng_state(tensors["rng.cpu"][processes.rank].clone())
    if processes.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"][processes.rank].clone(), processes.device)


def _check_settings(path: Path, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    theirs = state.get("settings")
    if not isinstance(theirs, Mapping) or not {"epoch", "step", "scheduler", "scaler"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of train imagenet; give another out folder to start anew")
    if absent := own.keys() - theirs.keys():
        raise ValueError(f"{path}: written by another version of resnet_fast, it lacks {', '.join(sorted(absent))}")
    differing = [name for name in own if theirs[name] != own[name]]
    if differing:
        shown = {name: [_shown(settings[name]) for settings in (theirs, own)] for name in differing}
        parts = "; ".join(f"{name} {before}, not {now}" for name, (before, now) in shown.items())
        raise ValueError(f"{path}: made with {parts}. Resume with the same settings, or start anew in another folder")


def _shown(setting: Any) -> str:
    return imagefolder.some(setting) if isinstance(setting, list) else str(setting)


def _described(options: Options, resumed: Path | None, processes: Processes) -> Options:
    """Return the options with network and preprocessing from the checkpoint's metadata, or else the weights'.

    Options that are given stay. Process 0 needs the checkpoint, each machine the weights.
    """
    found: tuple[str | None, Preprocessing] | None = None
    with distributed.agreed(processes):
        try:
            if resumed is not None and processes.first:
                metadata = checkpoint.read_about(resumed)
                found = registry.arch_of(resumed, metadata), registry.preprocessing_of(resumed, metadata)
            elif resumed is None and options.weights is not None and processes.local_rank == 0:
                found = _of_weights(options.weights, options.arch)
        except (WeightsError, OSError, TypeError) as error:
            raise ValueError(str(error)) from error
    found = distributed.from_first(found, processes)
    return options if found is None else replace(options, arch=options.arch or found[0], expected=found[1])


def _of_weights(weights: str, arch: str | None) -> tuple[str | None, Preprocessing]:
    """Return the network named by weights, if any, and their preprocessing; download published ones."""
    arch = arch or registry.model_of(weights.partition(".")[0])
    source = registry.resolve(arch or "resnet50", weights)
    if isinstance(source, Enum):
        registry.download(registry.url(source))
        return arch, registry.preprocessing(source)
    assert source is not None
    metadata = read_with_metadata(source)[1]
    return arch or registry.arch_of(source, metadata), registry.preprocessing_of(source, metadata)


def train(
    options: Options,
    processes: Processes,
    *,
    progress: Progress = lambda what, fraction: None,
    say: Callable[[str], None] = lambda line: None,
) -> Training:
    """Train to the last epoch. Write a checkpoint, figures and plot of the epochs, and the trained parameters.

    Args:
        progress, say: functions for a bar and for lines of text; called in process 0 only.

    Returns:
        the run at its end.

    Raises:
        ValueError: data, options, weights or checkpoint are wrong; in every process.
        ImageError: an image cannot be read; in the process that tried.
        Diverged: the loss is not finite; in every process.
        OSError: a file cannot be written; in process 0.
    """
    if not processes.first:
        progress, say = (lambda what, fraction: None), (lambda line: None)
    path = options.out / CHECKPOINT
    with distributed.agreed(processes):
        train_folder = imagefolder.scan(options.data / "train")
        val_folder = imagefolder.scan(options.data / "val", train_folder.classes)
        if processes.first:
            _check_output(options)
    seen = (train_folder.digest(), val_folder.digest())
    first = distributed.from_first(seen, processes)
    with distributed.agreed(processes):
        if seen != first:
            raise ValueError(f"{options.data}: other images than process 0 has; all must see the same")
    resumed = distributed.from_first(options.resume and path.is_file(), processes)
    options = _described(options, path if resumed else None, processes)
    with distributed.agreed(processes):
        training = build(replace(options, weights=None) if resumed else options, processes, train_folder)
    if processes.first:
        training.names["val"] = imagefolder.pack_names(val_folder)
    _settle(training)
    if resumed:
        for line in restore(training, path, {"train": train_folder, "val": val_folder}):
            say(line)
    table = None
    with distributed.agreed(processes):
        if processes.first:
            table = Metrics(options.out / METRICS, _columns(options), training.epoch if resumed else None)
    say(_opening(training, train_folder, val_folder, resumed))
    if training.scaler.is_enabled():
        # If the scaler skips a step, the schedule continues nevertheless, which torch would warn about.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    images = imagefolder.TrainImages(
        train_folder, options.preprocessing, min_scale=options.min_scale, seed=options.seed, on_error=options.on_error
    )
    val_images = imagefolder.ValImages(val_folder, options.preprocessing, on_error=options.on_error)
    if not resumed:
        # Decode the validation images, as one evaluation does; of the training images read only the headers.
        _check_images(training, train_folder, "training", whole=False, progress=progress, say=say)
        _check_images(training, val_folder, "validation", whole=True, progress=progress, say=say)
    while training.epoch < options.epochs:
        speed = _train_epoch(training, images, path, progress)
        save(training, path)  # validation may fail, and has cost nothing then
        row = _row(training, val_images, speed, progress)
        training.epoch, training.step = training.epoch + 1, 0
        training.sums.zero_()
        if table is not None:  # before the checkpoint: a row that no checkpoint knows is dropped when the run resumes
            table.append(training.epoch, **row)
        save(training, path)
        say(_closing(training.epoch, options.epochs, row, len(val_folder)))
    if table is not None:
        _write_models(training)
        classes = f"{len(train_folder.classes)} classes of {options.data}"
        plot = options.out / PLOT
        if table.rows:
            error = try_to_draw(table.rows, plot, f"{options.model}, {options.precision}, {classes}")
            say(f"plot: {plot}" if error is None else f"no plot: {error}")
        say(f"written: {options.out / MODEL}" + ("" if training.ema is None else f" and {EMA_MODEL}"))
    return training


def _check_images(
    training: Training, folder: ImageFolder, what: str, *, whole: bool, progress: Progress, say: Callable[[str], None]
) -> None:
    """Find images that cannot be read before training an epoch with them.

    Raises:
        ValueError: in every process, for one that cannot be opened or read, a damaged one that must not be skipped,
            or if all are damaged.
    """
    options, processes = training.options, training.processes
    share = range(processes.rank, len(folder), processes.world_size)
    damaged: list[ImageError] = []
    with distributed.agreed(processes):
        for done, errors in imagefolder.unreadable(folder, whole=whole, share=share, workers=options.workers):
            for error in errors:
                if isinstance(error, UnopenedImageError):
                    raise error
                if options.on_error == "stop":
                    raise ImageError(f"{error}; --on-error skip would go on without it")
            damaged += errors
            progress(f"checking {what} images", done / len(share))
    count = int(distributed.total(torch.tensor(len(damaged), device=processes.device), processes))
    shown = f", such as {damaged[0]}" if damaged else ""
    with distributed.agreed(processes):
        if count == len(folder):
            raise ValueError(f"{folder.root}: none of its {count:,} images can be read{shown}")
    if count:
        say(f"{count:,} of {len(folder):,} {what} images are damaged and skipped{shown}")


def _train_epoch(training: Training, images: imagefolder.TrainImages, path: Path, progress: Progress) -> float:
    """Train the rest of the current epoch; return images per second over all processes."""
    options, processes = training.options, training.processes
    skipped = training.step
    loader = imagefolder.train_loader(
        images, training.epoch, batch=options.batch_size, skip=skipped * options.accumulate, rank=processes.rank,
        world_size=processes.world_size, workers=options.workers, pin_memory=processes.device.type == "cuda",
    )  # fmt: skip
    training.model.train()
    batches = _counted(training, loader)
    epoch = what = f"epoch {training.epoch + 1}/{options.epochs}"
    per_step = options.images_per_step(processes)
    started = told = time.perf_counter()
    told_step = training.step
    while training.step < training.steps_per_epoch:
        loss = take_step(training, itertools.islice(batches, options.accumulate))
        if time.perf_counter() - told > TELL_SECONDS:
            what = f"{epoch}, loss {float(loss):.3f}"  # waits for the device, so the clock is read after it
            now = time.perf_counter()
            what += f", {(training.step - told_step) * per_step / (now - told):.4g} images/s"
            told, told_step = now, training.step
        progress(what, training.step / training.steps_per_epoch)
        if training.step % options.checkpoint_every == 0 and training.step < training.steps_per_epoch:
            save(training, path)
    float(training.sums.sum())  # waits for the device
    done = (training.steps_per_epoch - skipped) * per_step
    return done / (time.perf_counter() - started)


def _counted(training: Training, loader: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and targets; count the replacements of damaged images."""
    for images, targets, standing_in in loader:
        if count := int(standing_in.sum()):
            training.sums[3] += count
        yield images, targets


def _row(training: Training, images: imagefolder.ValImages, speed: float, progress: Progress) -> dict[str, float]:
    """Return the figures of an epoch at its end, the same in all processes except the speed."""
    options, processes = training.options, training.processes
    loss, right, count, skipped = distributed.total(training.sums, processes).tolist()
    row = {
        "lr": training.scheduler.get_last_lr()[0],
        "train_loss": loss / count,
        "train_accuracy": right / count,
        "skipped_images": int(skipped),
    }
    contestants = [("val", training.model)]
    if training.ema is not None:
        contestants.append(("ema", training.ema.module))
    for name, model in contestants:
        distributed.broadcast_buffers(model, processes)
        result = evaluate(
            model, images, processes, batch_size=options.batch_size, workers=options.workers,
            dtype=PRECISIONS[options.precision], progress=progress,
        )  # fmt: skip
        row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.top1, f"{name}_top5_accuracy": result.top5}
        row["val_images"] = result.images
    return row | {"images_per_second": speed}


def _settle(training: Training) -> None:
    """Let DistributedDataParallel choose its buckets, as it does in the first backward, before the first step.

    The order in which more than two processes add a gradient depends on its place in its bucket. A resumed run would
    otherwise add those of its first step in another order than an uninterrupted run.
    """
    if training.ddp is None or training.processes.world_size <= 2:
        return
    options, device = training.options, training.processes.device
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.model.train()
    size = options.preprocessing.crop_size
    x = torch.zeros(options.batch_size, 3, size, size, device=device)
    with autocast(device, PRECISIONS[options.precision]):
        scores = training.forward(x.contiguous(memory_format=torch.channels_last))
    scores.sum().backward()
    training.optimizer.zero_grad(set_to_none=True)
    training.model.load_state_dict(before)


def _columns(options: Options) -> list[str]:
    names = ["val", "ema"] if options.ema_decay else ["val"]
    measured = [f"{name}_{kind}" for name in names for kind in ("loss", "accuracy", "top5_accuracy")]
    return ["lr", "train_loss", "train_accuracy", "skipped_images", *measured, "val_images", "images_per_second"]


def _check_output(options: Options) -> None:
    path = options.out / CHECKPOINT
    if path.exists() and not options.resume:
        raise ValueError(f"{path}: exists; --resume continues it, another folder for --out starts anew")
    checkpoint.check_folder(options.out)


def _opening(training: Training, train_folder: ImageFolder, val_folder: ImageFolder, resumed: bool) -> str:
    options, processes = training.options, training.processes
    if training.epoch >= options.epochs:
        return f"nothing left to train: {options.out / CHECKPOINT} has all {options.epochs} epochs"
    where = f"{processes.world_size} process{'es' if processes.world_size > 1 else ''} on {processes.device.type}"
    line = (
        f"{options.model}, {options.precision}, {len(train_folder.classes)} classes, {len(train_folder):,} training "
        f"and {len(val_folder):,} validation images, {where}, {options.images_per_step(processes)} images a step, "
        f"{training.steps_per_epoch:,} steps an epoch, learning rate {options.learning_rate(processes):.4g}"
    )
    if resumed:
        return f"{line}; resumed in epoch {training.epoch + 1} after {training.step:,} of its steps"
    none_yet = f"no checkpoint in {options.out} yet, " if options.resume else ""
    return f"{line}; {none_yet}{training.started or 'starting anew'}"


def _closing(epoch: int, epochs: int, row: Mapping[str, float], val_images: int) -> str:
    more = f", EMA top-1 {row['ema_accuracy']:.2%}" if "ema_accuracy" in row else ""
    if row["skipped_images"]:
        more += f", {row['skipped_images']:,} damaged training images skipped"
    if row["val_images"] < val_images:
        more += f", {val_images - row['val_images']:,} damaged validation images left out"
    return (
        f"epoch {epoch}/{epochs}: train loss {row['train_loss']:.4f} top-1 {row['train_accuracy']:.2%}, val loss "
        f"{row['val_loss']:.4f} top-1 {row['val_accuracy']:.2%} top-5 {row['val_top5_accuracy']:.2%}{more}, "
        f"{row['images_per_second']:.4g} images/s"
    )


def _write_models(training: Training) -> None:
    """Write parameters and statistics, with the model's metadata."""
    models_by_file = {MODEL: training.model}
    if training.ema is not None:
        models_by_file[EMA_MODEL] = training.ema.module
    for name, model in models_by_file.items():
        checkpoint.write_model(training.options.out / name, model.state_dict(), _about(training))
