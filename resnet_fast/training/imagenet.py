"""Training a ResNet on images in folders, with the usual recipe for ImageNet, in one process or in many.

Here are the options, the loop and what is kept in a checkpoint. It prints nothing and draws nothing: the command line
does, through the two functions that ``train`` is given. Schedules, moving averages, loss scaling and the connection of
processes are torch's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_fast import models
from resnet_fast.benchmarking.plot import PlotError
from resnet_fast.models.preprocessing import Preprocessing
from resnet_fast.training import checkpoint, distributed, imagefolder
from resnet_fast.training.distributed import Processes
from resnet_fast.training.imagefolder import ImageFolder
from resnet_fast.training.metrics import Metrics, draw

__all__ = [
    "CHECKPOINT",
    "EMA_MODEL",
    "METRICS",
    "MODEL",
    "PLOT",
    "PRECISIONS",
    "Diverged",
    "Evaluation",
    "Options",
    "Training",
    "build",
    "evaluate",
    "parameter_groups",
    "restore",
    "save",
    "take_step",
    "train",
    "warmup_cosine",
]

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
EMA_MODEL = "model_ema.safetensors"
METRICS = "metrics.csv"
PLOT = "metrics.png"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARMUP_FACTOR = 0.01
"""The first step's learning rate, as a part of the full one."""

Progress = Callable[[str, float], None]
"""Hears what is being done and the fraction of it that is done, between 0 and 1."""


class Diverged(RuntimeError):
    """The loss is no longer a finite number. The last checkpoint on disk is from before that."""


@dataclass(frozen=True)
class Options:
    """Everything that a training run depends on, apart from the processes it runs in.

    Args:
        data: folder with ``train/<class>/`` and ``val/<class>/``. out: folder for everything that is written.
        arch: one of the ten ResNets.
        epochs: how often every training image is seen.
        batch_size: images in one forward of one process.
        accumulate: forwards whose gradients make one step. A step sees ``batch_size * accumulate * processes`` images.
        lr: learning rate after the warm-up; None is 0.1 for 256 images a step, and proportional to that number.
        warmup_epochs: how long the rate rises linearly; it falls as a cosine to 0 afterwards.
        weight_decay: for the weights of convolutions and of the classifier; norms and biases have none.
        clip_norm: the gradient's 2-norm is cut to this; None leaves it.
        ema_decay: of the exponential moving average of parameters and statistics, per step; 0 keeps none.
        precision: "float32", or "bfloat16" or "float16" for autocast; the latter with loss scaling.
        compile: torch.compile the training step's forward and backward.
        memory_efficient: the models' keyword of that name: less is kept for the backward.
        sync_bn: BatchNorm's statistics are those of all processes together.
        resize_size: pixels of the shorter side in validation, before ``image_size`` is cut out; None: 8/7 of it.
        min_scale: the least part of an image that a training crop shows.
        workers: processes that read images, for each training process.
        checkpoint_every: steps between checkpoints; there is also one after every epoch.
        resume: continue from the checkpoint in ``out`` if there is one.

    Raises:
        ValueError: an option that is out of range.
    """

    data: Path
    out: Path
    arch: str = "resnet50"
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
    image_size: int = 224
    resize_size: int | None = None
    min_scale: float = 0.08
    workers: int = 4
    seed: int = 0
    checkpoint_every: int = 500
    resume: bool = False

    def __post_init__(self) -> None:
        if self.arch not in models.list_models():
            raise ValueError(f"arch is {self.arch!r}, it must be one of {', '.join(models.list_models())}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, it must be one of {', '.join(PRECISIONS)}")
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "workers", self.workers >= 0, "0 or more")
        _require(self, "seed", self.seed >= 0, "0 or more")
        _require(self, "image_size", self.image_size >= 32, "at least 32")
        if self.resize_size is not None:
            _require(self, "resize_size", self.resize_size >= 1, "at least 1")
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
        """What validation does to an image, and the mean and standard deviation for both."""
        resize = round(self.image_size * 256 / 224) if self.resize_size is None else self.resize_size
        return Preprocessing(resize_size=resize, crop_size=self.image_size)

    def images_per_step(self, processes: Processes) -> int:
        return self.batch_size * self.accumulate * processes.world_size

    def learning_rate(self, processes: Processes) -> float:
        """The rate after the warm-up (Goyal et al. 2017, arXiv:1706.02677: proportional to the images of a step)."""
        return 0.1 * self.images_per_step(processes) / 256 if self.lr is None else self.lr


def _require(options: Options, name: str, holds: bool, right: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(options, name)}, it must be {right}")


@dataclass
class Training:
    """A run at one moment: everything that a checkpoint keeps, and what it is computed with.

    Args:
        model: the network itself. forward: it, or what DistributedDataParallel and torch.compile made of it.
        epoch, step: the next epoch, from 0, and how many of its steps are done.
        sums: [3] float64, of this process in this epoch: loss times images, images classified right, images.
        settings: what must be the same for another process to continue this run.
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
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy and the fractions of images whose class was the first guess, or among the first five."""

    loss: float
    top1: float
    top5: float
    images: int


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices and filters with ``weight_decay``; scales, shifts and biases with none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.dim() <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int) -> LRScheduler:
    """One ``scheduler.step()`` for each step: up linearly from ``WARMUP_FACTOR``, then down as a cosine to 0.

    The full rate is that of step ``warmup_steps``, the first after the warm-up (Loshchilov & Hutter 2016,
    arXiv:1608.03983, without restarts).
    """
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
    if warmup_steps == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=WARMUP_FACTOR, total_iters=warmup_steps)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup_steps])


def build(options: Options, processes: Processes, folder: ImageFolder) -> Training:
    """A run at its beginning: the network with parameters drawn from the seed, and everything around it.

    Raises:
        ValueError: the training images are fewer than one step takes.
    """
    per_step = options.images_per_step(processes)
    steps_per_epoch = len(folder) // processes.world_size // options.batch_size // options.accumulate
    if steps_per_epoch < 1:
        raise ValueError(
            f"{folder.root}: has {len(folder)} images, one step takes {per_step} (batch_size {options.batch_size} x "
            f"accumulate {options.accumulate} x {processes.world_size} processes); a smaller batch_size would do"
        )
    torch.manual_seed(options.seed)
    extra = {"memory_efficient": True} if options.memory_efficient else {}
    model: nn.Module = models.get_model(
        options.arch, num_classes=len(folder.classes), zero_init_residual=options.zero_init_residual, **extra
    )
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
        sums=torch.zeros(3, dtype=torch.float64, device=processes.device),
        settings=_settings(options, processes, folder),
    )


def _settings(options: Options, processes: Processes, folder: ImageFolder) -> dict[str, Any]:
    """What decides the numbers of a run, by the name that a user knows."""
    same = (
        "arch", "epochs", "batch_size", "accumulate", "momentum", "weight_decay", "label_smoothing", "warmup_epochs",
        "clip_norm", "ema_decay", "precision", "sync_bn", "image_size", "min_scale", "seed",
    )  # fmt: skip
    found = {name: getattr(options, name) for name in same}
    lr = options.learning_rate(processes)
    data = {"classes": len(folder.classes), "images": len(folder), "image names": folder.digest()}
    return found | {"lr": lr, "processes": processes.world_size} | data


def _autocast(options: Options, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    dtype = PRECISIONS[options.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def take_step(training: Training, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """One optimizer step on ``options.accumulate`` batches: images uint8 [N, H, W, 3] and targets int64 [N].

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
            with _autocast(options, device):
                scores = training.forward(x)
                loss = training.criterion(scores, wanted)
            training.scaler.scale(loss / options.accumulate).backward()
        loss = loss.detach()
        count = len(wanted)
        right = (scores.detach().argmax(1) == wanted).sum()
        training.sums += torch.stack([loss.double() * count, right.double(), torch.full_like(right, count).double()])
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


def evaluate(
    model: nn.Module, images: imagefolder.ValImages, options: Options, processes: Processes, progress: Progress
) -> Evaluation:
    """The model in eval mode on all images, each counted once whatever the number of processes.

    Without label smoothing. With fewer than five classes "top 5" means all of them.
    """
    device = processes.device
    loader = imagefolder.val_loader(
        images, batch=options.batch_size, rank=processes.rank, world_size=processes.world_size, workers=options.workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    before = model.training
    model.eval()
    with torch.no_grad():
        for number, (pixels, targets) in enumerate(loader, 1):
            x = imagefolder.normalize(pixels.to(device, non_blocking=True), images.preprocessing)
            wanted = targets.to(device, non_blocking=True)
            with _autocast(options, device):
                scores = model(x)
            scores = scores.float()
            loss += nn.functional.cross_entropy(scores, wanted, reduction="none").double().sum()
            hits = scores.topk(min(5, scores.shape[1])).indices == wanted[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.full_like(counts[0], len(wanted))])
            progress("validation", number / len(loader))
    model.train(before)
    counts, loss = distributed.total(counts, processes), distributed.total(loss, processes)
    top1, top5, seen = (int(count) for count in counts)
    return Evaluation(float(loss) / seen, top1 / seen, top5 / seen, seen)


def save(training: Training, path: Path) -> None:
    """Writes the checkpoint, by process 0; all processes must call it.

    Raises:
        Diverged: a loss since the beginning of the epoch was infinite or NaN. Nothing is written then.
    """
    processes = training.processes
    sums = distributed.gather(training.sums, processes)
    _require_finite(sums, training.epoch)
    tensors = {"sums": sums, "rng.cpu": distributed.gather(torch.get_rng_state(), processes)}
    if processes.device.type == "cuda":
        tensors["rng.cuda"] = distributed.gather(torch.cuda.get_rng_state(processes.device), processes)
    if not processes.first:
        return
    if training.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in training.ema.state_dict().items()}
    state = {
        "settings": training.settings,
        "epoch": training.epoch,
        "step": training.step,
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict(),
    }
    checkpoint.save(
        path, model=training.model.state_dict(), optimizer=training.optimizer.state_dict(), state=state, tensors=tensors
    )


def _require_finite(sums: Tensor, epoch: int) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise Diverged(
            f"the loss is not finite in epoch {epoch + 1}; the last checkpoint is from before that. A lower learning "
            "rate, a longer warm-up or clipping the gradient helps"
        )


def restore(training: Training, path: Path) -> None:
    """Continues where the checkpoint was written. Process 0 reads it for all; all must call this.

    Raises:
        ValueError: it is of a run with other settings, no checkpoint of such a run, or damaged.
    """
    processes = training.processes
    found: Any = None
    with distributed.agreed(processes):
        if processes.first:
            loaded = checkpoint.load(path)
            _check_settings(path, loaded.state, training.settings)
            found = (loaded.model, loaded.optimizer, loaded.state, loaded.tensors)
    found = distributed.from_first(found, processes)
    try:
        _adopt(training, *found)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: damaged, it does not fit its own settings ({text[:200]})") from error


def _adopt(
    training: Training,
    model: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    processes = training.processes
    training.model.load_state_dict(model)
    training.optimizer.load_state_dict(optimizer)
    for parameter, buffers in training.optimizer.state.items():
        for name, value in buffers.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter).copy_(value)  # in the parameter's memory format
    training.scheduler.load_state_dict(dict(state["scheduler"]))
    training.scaler.load_state_dict(dict(state["scaler"]))
    training.epoch, training.step = int(state["epoch"]), int(state["step"])
    training.sums.copy_(tensors["sums"][processes.rank])
    if training.ema is not None:
        averaged = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
        training.ema.load_state_dict(averaged)
    # Copies: torch reads a generator's state from where the tensor's storage begins, whatever the offset.
    torch.set_rng_state(tensors["rng.cpu"][processes.rank].clone())
    if processes.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"][processes.rank].clone(), processes.device)


def _check_settings(path: Path, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    theirs = state.get("settings")
    if not isinstance(theirs, Mapping) or not {"epoch", "step", "scheduler", "scaler"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of train imagenet; give another out folder to start anew")
    differing = [name for name in own if theirs.get(name) != own[name]]
    if differing:
        parts = "; ".join(f"{name} {theirs.get(name)}, not {own[name]}" for name in differing)
        raise ValueError(f"{path}: made with {parts}. Resume with the same settings, or start anew in another folder")


def train(
    options: Options,
    processes: Processes,
    *,
    progress: Progress = lambda what, fraction: None,
    say: Callable[[str], None] = lambda line: None,
) -> Training:
    """Trains to the last epoch, and writes into ``options.out`` a checkpoint, the table and picture of what each
    epoch gave, and the trained parameters.

    Args:
        progress, say: for a bar and for lines of text; called in process 0 only.

    Returns:
        the run at its end.

    Raises:
        ValueError: data, options or checkpoint are wrong; in every process.
        ImageError: an image cannot be read; in the process that tried.
        Diverged: the loss is not finite.
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
        training = build(options, processes, train_folder)
    _settle(training)
    resumed = distributed.from_first(options.resume and path.is_file(), processes)
    if resumed:
        restore(training, path)
    table = None
    with distributed.agreed(processes):
        if processes.first:
            table = Metrics(options.out / METRICS, _columns(options), training.epoch if resumed else None)
    say(_opening(training, train_folder, val_folder, resumed))
    if training.scaler.is_enabled():
        # Where the scaler leaves out a step, the schedule still goes on, which torch would remark upon.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    images = imagefolder.TrainImages(
        train_folder, image_size=options.image_size, min_scale=options.min_scale, seed=options.seed
    )
    val_images = imagefolder.ValImages(val_folder, options.preprocessing)
    while training.epoch < options.epochs:
        speed = _train_epoch(training, images, path, progress)
        row = _row(training, val_images, speed, progress)
        training.epoch, training.step = training.epoch + 1, 0
        training.sums.zero_()
        if table is not None:  # before the checkpoint: a row that no checkpoint knows is dropped when the run resumes
            table.append(training.epoch, **row)
        save(training, path)
        say(_closing(training.epoch, options.epochs, row))
    if table is not None:
        _write_models(training, train_folder.classes)
        _draw(table, say)
        say(f"written: {options.out / MODEL}" + ("" if training.ema is None else f" and {EMA_MODEL}"))
    return training


def _train_epoch(training: Training, images: imagefolder.TrainImages, path: Path, progress: Progress) -> float:
    """The rest of the current epoch. Returns images a second, over all processes."""
    options, processes = training.options, training.processes
    skipped = training.step
    loader = imagefolder.train_loader(
        images, training.epoch, batch=options.batch_size, skip=skipped * options.accumulate, rank=processes.rank,
        world_size=processes.world_size, workers=options.workers, pin_memory=processes.device.type == "cuda",
    )  # fmt: skip
    training.model.train()
    batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)
    what = f"epoch {training.epoch + 1}/{options.epochs}"
    started = time.perf_counter()
    while training.step < training.steps_per_epoch:
        loss = take_step(training, itertools.islice(batches, options.accumulate))
        if training.step % 50 == 1:
            what = f"epoch {training.epoch + 1}/{options.epochs}, loss {float(loss):.3f}"
        progress(what, training.step / training.steps_per_epoch)
        if training.step % options.checkpoint_every == 0 and training.step < training.steps_per_epoch:
            save(training, path)
    float(training.sums.sum())  # waits for the device
    done = (training.steps_per_epoch - skipped) * options.images_per_step(processes)
    return done / (time.perf_counter() - started)


def _row(training: Training, images: imagefolder.ValImages, speed: float, progress: Progress) -> dict[str, float]:
    """What is known of an epoch at its end; all processes get the same numbers, apart from the speed."""
    options, processes = training.options, training.processes
    sums = distributed.total(training.sums, processes)
    _require_finite(sums, training.epoch)
    loss, right, count = sums.tolist()
    row = {
        "lr": training.scheduler.get_last_lr()[0],
        "train_loss": loss / count,
        "train_accuracy": right / count,
    }
    contestants = [("val", training.model)]
    if training.ema is not None:
        contestants.append(("ema", training.ema.module))
    for name, model in contestants:
        distributed.broadcast_buffers(model, processes)
        result = evaluate(model, images, options, processes, progress)
        row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.top1, f"{name}_top5_accuracy": result.top5}
    return row | {"images_per_second": speed}


def _settle(training: Training) -> None:
    """Lets DistributedDataParallel choose its buckets, which it does in the first backward, before the first step.

    In which order more than two processes add a gradient depends on where it lies in its bucket. A run that is resumed
    would otherwise add those of its first step in another order than the run that was not interrupted.
    """
    if training.ddp is None or training.processes.world_size <= 2:
        return
    options, device = training.options, training.processes.device
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.model.train()
    x = torch.zeros(options.batch_size, 3, options.image_size, options.image_size, device=device)
    with _autocast(options, device):
        scores = training.forward(x.contiguous(memory_format=torch.channels_last))
    scores.sum().backward()
    training.optimizer.zero_grad(set_to_none=True)
    training.model.load_state_dict(before)


def _columns(options: Options) -> list[str]:
    names = ["val", "ema"] if options.ema_decay else ["val"]
    measured = [f"{name}_{kind}" for name in names for kind in ("loss", "accuracy", "top5_accuracy")]
    return ["lr", "train_loss", "train_accuracy", *measured, "images_per_second"]


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
        f"{options.arch}, {options.precision}, {len(train_folder.classes)} classes, {len(train_folder):,} training and "
        f"{len(val_folder):,} validation images, {where}, {options.images_per_step(processes)} images a step, "
        f"{training.steps_per_epoch:,} steps an epoch, learning rate {options.learning_rate(processes):.4g}"
    )
    if resumed:
        return f"{line}; resumed in epoch {training.epoch + 1} after {training.step:,} of its steps"
    return f"{line}; {f'no checkpoint in {options.out} yet, ' if options.resume else ''}starting anew"


def _closing(epoch: int, epochs: int, row: Mapping[str, float]) -> str:
    ema = f", EMA top-1 {row['ema_accuracy']:.2%}" if "ema_accuracy" in row else ""
    return (
        f"epoch {epoch}/{epochs}: train loss {row['train_loss']:.4f} top-1 {row['train_accuracy']:.2%}, val loss "
        f"{row['val_loss']:.4f} top-1 {row['val_accuracy']:.2%} top-5 {row['val_top5_accuracy']:.2%}{ema}, "
        f"{row['images_per_second']:.4g} images/s"
    )


def _draw(table: Metrics, say: Callable[[str], None]) -> None:
    path = table.path.with_name(PLOT)
    if not table.rows:
        return
    try:
        draw(table.rows, path, "training")
    except (PlotError, ImportError, OSError) as error:
        say(f"no plot: {error}")
    else:
        say(f"plot: {path}")


def _write_models(training: Training, classes: Sequence[str]) -> None:
    """Parameters and statistics, and beside them the names of the classes, in the order of the outputs."""
    models_by_file = {MODEL: training.model}
    if training.ema is not None:
        models_by_file[EMA_MODEL] = training.ema.module
    for name, model in models_by_file.items():
        about = {"classes": json.dumps(list(classes)), "arch": training.options.arch}
        checkpoint.write_model(training.options.out / name, model.state_dict(), about)
