"""What two processes do together for test_train_imagenet: a script for torchrun, no tests.

    torchrun --nproc-per-node 2 tests/training/ddp_worker.py BATCHES DATA OUT

Some steps with joint statistics on the given batches, of which process r of n takes every n-th image from the r-th on;
their result is OUT/joint.safetensors. Then a whole run into OUT/whole, and one into OUT/cut that stops and is resumed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resnet_fast.training import distributed, imagenet
from resnet_fast.training.imagefolder import ImageFolder

LR = 0.05
OPTIONS: dict[str, Any] = {
    "arch": "resnet18", "epochs": 2, "batch_size": 2, "lr": 0.02, "warmup_epochs": 0.5, "image_size": 64, "workers": 0,
    "ema_decay": 0.5, "checkpoint_every": 3,
}  # fmt: skip
"""Of the runs into OUT/whole and OUT/cut."""


class Stop(Exception):
    """Ends a run in all processes at the same step."""


def smooth(model: nn.Module) -> nn.Module:
    """The same network where no rounding can decide: far from the ReLUs' kink, and without a maximum.

    Otherwise one of millions of activations changes sign, the gradient jumps, and what differs afterwards is chance.
    """
    model.maxpool = nn.AvgPool2d(3, 2, 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            nn.init.constant_(module.bias, 4)
    return model


def joint(source: Path, target: Path, processes: distributed.Processes) -> None:
    """A step on each of the batches, images [steps, N, H, W, 3] and targets [steps, N]."""
    batches = load_file(source)
    images, targets = batches["images"], batches["targets"]
    steps, count, size = images.shape[:3]
    options = imagenet.Options(
        data=Path(), out=Path(), arch="resnet18", epochs=1, lr=LR, warmup_epochs=0, image_size=size, sync_bn=True,
        batch_size=count // processes.world_size,
    )  # fmt: skip
    names = np.zeros(count * steps, dtype="S1")
    training = imagenet.build(
        options, processes, ImageFolder(Path(), ("a", "b", "c"), names, np.zeros(len(names), dtype=np.int64))
    )
    smooth(training.model).train()
    share = slice(processes.rank, None, processes.world_size)
    for x, wanted in zip(images, targets, strict=True):
        imagenet.take_step(training, [(x[share], wanted[share])])
    if processes.first:
        save_file({name: tensor.contiguous() for name, tensor in training.model.state_dict().items()}, target)


@contextlib.contextmanager
def stopping(after: int) -> Iterator[None]:
    """Whoever takes more than ``after`` steps is stopped."""
    real, taken = imagenet.take_step, 0

    def take_step(*arguments: Any) -> Any:
        nonlocal taken
        if taken == after:
            raise Stop
        taken += 1
        return real(*arguments)

    imagenet.take_step = take_step
    try:
        yield
    except Stop:
        pass
    finally:
        imagenet.take_step = real


def main(batches: Path, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with distributed.start("cpu") as processes:
        joint(batches, out / "joint.safetensors", processes)
        seldom = OPTIONS | {"checkpoint_every": 100}
        imagenet.train(imagenet.Options(data=data, out=out / "whole", **seldom), processes, say=print)
        with stopping(4 + 3):  # after the third of the second epoch's four steps, where there is a checkpoint
            imagenet.train(imagenet.Options(data=data, out=out / "cut", **OPTIONS), processes)
            raise AssertionError("the run was not stopped")
        torch.manual_seed(123 + processes.rank)  # another process would begin with another state
        imagenet.train(imagenet.Options(data=data, out=out / "cut", resume=True, **OPTIONS), processes, say=print)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
