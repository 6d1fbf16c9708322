"""Train the small residual network as its TensorFlow original is trained, and check the fused answers afterwards.

The summed cross entropy of each batch, Adam, accuracies after every epoch. Printing and files' names are the command's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.benchmarking.gate import judge
from resnet_fast.benchmarking.peers import plain
from resnet_fast.graph import optimize
from resnet_fast.models.checkpoint import one_line
from resnet_fast.models.residual_network import residual_network
from resnet_fast.training import checkpoint
from resnet_fast.training.digits import Digits, Images

ABOUT = {"arch": "residual_network"}
"""Metadata of the files, so that they are not taken for one of the ten ResNets."""

_PIECE = 250
"""Batch size without gradients."""


@dataclass(frozen=True)
class Settings:
    """Settings that, with the data, determine a run; with the same settings a CPU gives the same bits.

    Raises:
        ValueError: for a batch_size below 1, or an lr that is not a positive number.
    """

    batch_size: int = 50
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, it must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}, it must be a positive number")


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures. Losses are means per image, accuracies fractions; the training ones are means over the
    epoch's batches, each measured before its step."""

    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Run:
    """A training run that can be saved and continued to the same bits (on a CPU, with the same number of threads).

    Attributes:
        model: what is trained: the residual network, or the plain-layer copy of it.
        epochs_done: how many epochs it has seen.

    Args:
        data: whose images fit the network; its validation part is measured after every epoch.
        plain_layers: train the network's plain torch layers, called one by one, in place of the network itself. It
            starts from the same values.

    Raises:
        ValueError: if there are fewer training images than make a batch.
    """

    def __init__(
        self, data: Digits, settings: Settings, *, device: str | torch.device = "cpu", plain_layers: bool = False
    ) -> None:
        if len(data.train) < settings.batch_size:
            raise ValueError(
                f"batch_size is {settings.batch_size}, more than the {len(data.train)} training images of {data.name}"
            )
        self.settings, self.device = settings, torch.device(device)
        self.data = data
        self._train, self._validation = (_to(part, self.device) for part in (data.train, data.validation))
        with torch.random.fork_rng(devices=[]):  # the process's own generator stays as it is
            torch.manual_seed(settings.seed)
            network = residual_network(data.classes, data.train.images.shape[1])
        self.model: nn.Module = (plain(network) if plain_layers else network).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self._order = torch.Generator().manual_seed(settings.seed)
        self.epochs_done = 0

    @property
    def batches(self) -> int:
        """Steps in an epoch. Images left over from the last full batch wait for another epoch's order."""
        return len(self._train) // self.settings.batch_size

    def epoch(self, progress: Callable[[float], None] = lambda fraction: None) -> Epoch:
        """Train one epoch, evaluate it on the validation part, and leave the model in eval mode.

        Args:
            progress: called with the fraction of the epoch that is done.

        Raises:
            ValueError: if a loss is not finite, which nothing learns from any more.
        """
        start = time.perf_counter()
        size = self.settings.batch_size
        order = torch.randperm(len(self._train), generator=self._order).to(self.device)
        self.model.train()
        losses, correct = 0.0, 0
        for number in range(self.batches):
            chosen = order[number * size : (number + 1) * size]
            labels = self._train.labels[chosen]
            logits = self.model(self._train.images[chosen])
            loss = F.cross_entropy(logits, labels, reduction="sum")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses += loss.item()
            correct += int((logits.argmax(1) == labels).sum())
            if not math.isfinite(losses):
                raise ValueError(
                    f"the loss is {loss.item()} at batch {number + 1} of epoch {self.epochs_done + 1}; "
                    f"lr is {self.settings.lr:g}, try a smaller one"
                )
            progress((number + 1) / self.batches)
        self.epochs_done += 1
        count = self.batches * size
        valid_loss, valid_accuracy = self.measure(self._validation)
        return Epoch(losses / count, correct / count, valid_loss, valid_accuracy, time.perf_counter() - start)

    def measure(self, part: Images) -> tuple[float, float]:
        """Return mean loss and accuracy on ``part``, in eval mode, without gradients."""
        part = _to(part, self.device)
        logits = _logits(self.model.eval(), part.images)
        loss = F.cross_entropy(logits, part.labels, reduction="sum").item()
        return loss / max(1, len(part)), int((logits.argmax(1) == part.labels).sum()) / max(1, len(part))

    def save(self, path: Path) -> None:
        """Write the checkpoint that `resume` continues from."""
        checkpoint.save(
            path,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            state={"kind": "residual", "epochs_done": self.epochs_done, "arguments": self._arguments()},
            tensors={"order": self._order.get_state()},
            about=ABOUT,
        )

    def resume(self, path: Path) -> None:
        """Continue the run that was saved at ``path``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a checkpoint, or one of a run with other settings or data.
        """
        found = checkpoint.load(path)
        if found.state.get("kind") != "residual":
            raise ValueError(f"{path}: a checkpoint of another kind of training, one of `train residual` was expected")
        theirs, ours = found.state.get("arguments"), self._arguments()
        if not isinstance(theirs, dict) or theirs != ours:
            theirs = theirs if isinstance(theirs, dict) else {}
            different = [f"{name} {theirs.get(name)!r} (now {ours[name]!r})" for name in ours
                         if theirs.get(name) != ours[name]]  # fmt: skip
            raise ValueError(
                f"{path}: belongs to a run with {', '.join(different)}; give the same values to continue it"
            )
        done, order = found.state.get("epochs_done"), found.tensors.get("order")
        if not isinstance(done, int) or done < 0 or order is None:
            raise ValueError(f"{path}: epochs_done or the order of the images is missing or unusable")
        try:
            self.model.load_state_dict(found.model)
            self.optimizer.load_state_dict(found.optimizer)
            self._order.set_state(order)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: does not fit this network: {one_line(error)}") from error
        self.epochs_done = done

    def _arguments(self) -> dict[str, Any]:
        shape = list(self.data.train.images.shape)
        return {**asdict(self.settings), "data": self.data.name, "images": shape, "classes": self.data.classes}


@dataclass(frozen=True)
class Agreement:
    """The comparison of plain layers, the network itself (fused) and ``optimize``'s snapshot.

    Attributes:
        images: how many were compared. accuracy: of the plain layers on them.
        different: images for which a fused prediction is another class than the plain one, ties apart.
        ties: differing predictions whose classes' exact scores are closer than the error rule's bound.
        largest: the largest difference of a logit, for "fused" and "optimize". scale: the largest logit.
    """

    images: int
    accuracy: float
    different: int
    ties: int
    largest: dict[str, float]
    scale: float

    @property
    def agrees(self) -> bool:
        return self.different == 0


def agreement(model: nn.Module, part: Images) -> Agreement:
    """Compare the predictions for ``part`` of the plain torch layers of ``model``, ``model``, and ``optimize(model)``.

    Args:
        model: on the CPU or a GPU; it is in eval mode afterwards.
    """
    model.eval()
    device = next(model.parameters()).device
    part = _to(part, device)
    ordinary = _logits(plain(model), part.images)
    answers = {
        "fused": _logits(model, part.images),
        "optimize": _logits(optimize(model, example_inputs=part.images[:1]), part.images),
    }
    predicted = ordinary.argmax(1)
    different = ties = 0
    for answer in answers.values():
        where = (answer.argmax(1) != predicted).nonzero().flatten()
        tied = _ties(model, part.images[where], ordinary[where], answer[where])
        ties += tied
        different += len(where) - tied
    return Agreement(
        images=len(part),
        accuracy=int((predicted == part.labels).sum()) / max(1, len(part)),
        different=different,
        ties=ties,
        largest={name: float((answer - ordinary).abs().max()) for name, answer in answers.items()},
        scale=float(ordinary.abs().max()),
    )


def _ties(model: nn.Module, images: Tensor, ordinary: Tensor, answer: Tensor) -> int:
    """Return how many of ``answer`` obey the error rule, with classes no farther from the plain ones than it allows."""
    count = 0
    if len(images):
        exact = _logits(plain(model).double(), images.double()).cpu()
        for theirs, ours, row in zip(ordinary, answer, exact, strict=True):
            verdict = judge(ours, theirs, row, ours.dtype)
            gap = float((row[ours.argmax()] - row[theirs.argmax()]).abs())
            count += verdict.passed and gap <= 2 * verdict.allowed * float(row.norm())
    return count


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(piece) for piece in images.split(_PIECE)])


def _to(part: Images, device: torch.device) -> Images:
    return Images(part.images.to(device), part.labels.to(device))
