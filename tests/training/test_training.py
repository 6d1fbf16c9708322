"""Training: checkpoints that are whole and run no code, metrics, digits, and a run that resumes bit for bit."""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resnet_fast.models.checkpoint import read_with_metadata
from resnet_fast.training import checkpoint, digits, metrics
from resnet_fast.training.digits import Digits, Images
from resnet_fast.training.residual import Run, Settings, agreement
from tests.command_line import run

pytestmark = pytest.mark.usefixtures("one_thread")


# --- checkpoints


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model with tied, channels_last and bfloat16 parameters, an optimizer with a tensor for lr, a scheduler."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
    )
    model[0].to(memory_format=torch.channels_last)
    model[1].to(torch.bfloat16)
    model[4].weight = model[3].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype is b.dtype and a.shape == b.shape
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b) and type(a) is type(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)
        assert type(a) is type(b)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained()
    base = torch.randn(12)
    state = {
        "epoch": 3, "best": -math.inf, "nan": math.nan, "nothing": None, "yes": True, "pair": (1, [2.5, ("x",)]),
        "$": "a key like the format's own", "by number": {3: "three", -1: {"$": "tensor", "v": "model/0.weight"}},
        "large": 2**200, "scheduler": {**scheduler.state_dict(), "milestones": {3: 1, 5: 1}}, "ünï": "\u2028",
    }  # fmt: skip
    tensors = {
        "generator": torch.get_rng_state(), "step": torch.tensor(7), "flag": torch.tensor(True),
        "empty": torch.empty(0, 3), "also empty": torch.empty(0, 3), "expanded": torch.ones(1).expand(5),
        "a view": base[:5], "an overlapping view": base[2:], "reshaped": base.view(3, 4), "all": base,
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(), "strided": torch.randn(4, 6).t()[::2],
    }  # fmt: skip
    path = checkpoint.save(
        tmp_path / "run.safetensors", model=model.state_dict(), optimizer=optimizer.state_dict(), state=state,
        tensors=tensors,
    )  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.safetensors"]
    found = checkpoint.load(path)
    assert_same({**model.state_dict()}, {name: found.model[name] for name in model.state_dict()})
    assert_same(state, found.state)
    assert_same(tensors, {name: found.tensors[name] for name in tensors})
    assert found.model["3.weight"] is found.model["4.weight"]
    assert found.optimizer["param_groups"][0]["betas"] == (0.9, 0.999)

    other, fresh, schedule = trained()
    fresh.load_state_dict(found.optimizer)
    other.load_state_dict(found.model)
    schedule.load_state_dict(found.state["scheduler"])
    assert_same(fresh.state_dict(), optimizer.state_dict())
    for one, steps in ((model, optimizer), (other, fresh)):
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter)
        steps.step()
    assert_same({**model.state_dict()}, {**other.state_dict()})


def test_the_names_in_the_file_are_the_documented_ones(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, optimizer, _ = trained()
    path = checkpoint.save(tmp_path / "x", model=model.state_dict(), optimizer=optimizer.state_dict(), state={})
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert {"model/0.weight", "optimizer/0/exp_avg", "optimizer/param_groups/0/lr"} <= names
    assert sum(name in names for name in ("model/3.weight", "model/4.weight")) == 1  # tied: written once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": {"a": {"b": object()}}}, "state/a/b is a object"),
        ({"state": {1.5: 0}}, "key 1.5"),
        ({"model": {"w": [1.0]}}, "model/w is a list"),
        ({"optimizer": {"lr": 1.0}}, "state_dict"),
        ({"tensors": {"t": torch.empty(2, device="meta")}}, "tensors/t is a meta"),
        ({"tensors": {"t": torch.eye(2).to_sparse()}}, "tensors/t is a torch.sparse"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        checkpoint.save(tmp_path / "x", **{"model": {}, "optimizer": {}, "state": {}, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model, optimizer, _ = trained()
    path = tmp_path_factory.mktemp("checkpoint") / "good"
    checkpoint.save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), state={"epoch": 1})
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, good: bytes, kept: float) -> None:
    path = tmp_path / "cut"
    path.write_bytes(good[: int(kept * len(good)) if isinstance(kept, float) else kept])
    with pytest.raises(
        ValueError, match=rf"{path}: truncated, or not a safetensors.*resnet_fast.training.checkpoint.save"
    ):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(BOMB),)


BOMB = Path("exploded")


def test_nothing_in_a_foreign_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "bomb")
    Path("text").write_text("not a checkpoint")
    Path("folder").mkdir()
    for name in ("bomb", "text", "folder"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            checkpoint.load(name)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.load("missing")
    save_file({"w": torch.ones(2)}, "weights.safetensors")
    with pytest.raises(ValueError, match="not a training checkpoint"):
        checkpoint.load("weights.safetensors")
    assert not BOMB.exists()


def forged(content: Any, **metadata: str) -> dict[str, str]:
    text = content if isinstance(content, str) else json.dumps(content)
    return {"format": "resnet_fast checkpoint", "version": "1", "content": text, **metadata}


REST: dict[str, Any] = {"optimizer": {}, "state": {}, "aliases": {}}


@pytest.mark.parametrize(
    "metadata",
    [
        forged("{"),
        forged("[" * 100_000),
        forged([1]),
        forged({}),
        forged({**REST, "state": [1]}),
        forged({**REST, "aliases": {"model/b": "model/nowhere"}}),
        forged({**REST, "aliases": {"model/b": ["model/w"]}}),
        forged({**REST, "aliases": 3}),
        forged({**REST, "optimizer": {"state": 1, "param_groups": []}}),
        forged({**REST, "optimizer": {"state": {}, "param_groups": [1]}}),
        forged({**REST, "optimizer": [1]}),
        forged({**REST, "state": {"a": {"$": "tensor", "v": "model/nowhere"}}}),
        forged({**REST, "state": {"a": {"$": "os.system", "v": "true"}}}),
        forged({**REST, "state": {"a": {"$": "items", "v": [[[1], 2]]}}}),
        forged({**REST, "state": {"a": {"$": "items", "v": [1]}}}),
        forged({**REST, "state": {"a": {"$": ["list"], "v": 1}}}),
        forged(REST, version="2"),
    ],
)
def test_a_forged_file_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "forged"
    save_file({"model/w": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"^{path}: "):
        checkpoint.load(path)


def test_limits(tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good").write_bytes(good)
    monkeypatch.setattr(checkpoint, "MAX_BYTES", len(good) - 1)
    with pytest.raises(ValueError, match="at most"):
        checkpoint.load(tmp_path / "good")
    with pytest.raises(ValueError, match="the limit is"):
        checkpoint.save(tmp_path / "x", model={"w": torch.zeros(len(good))}, optimizer={}, state={})
    monkeypatch.setattr(checkpoint, "MAX_STATE_BYTES", 100)
    with pytest.raises(ValueError, match="as JSON"):
        checkpoint.save(tmp_path / "x", model={}, optimizer={}, state={"text": "x" * 100})
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path / "x", model={"w": torch.ones(3)}, optimizer={}, state={})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, model={"w": torch.zeros(3)}, optimizer={}, state={})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        checkpoint.save(tmp_path / "nowhere" / "x", model={}, optimizer={}, state={})


KILLED = """
import os, sys, torch
from resnet_fast.training import checkpoint
path = sys.argv[1]
checkpoint.save(path, model={"w": torch.zeros(1000)}, optimizer={}, state={"epoch": 0})
print("ready", flush=True)
epoch = 0
while True:
    epoch += 1
    checkpoint.save(path, model={"w": torch.full((300_000,), float(epoch))}, optimizer={}, state={"epoch": epoch})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process the POSIX way")
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    try:
        for _ in range(30):
            found = checkpoint.load(path)
            assert bool((found.model["w"] == found.state["epoch"]).all())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    found = checkpoint.load(path)
    assert bool((found.model["w"] == found.state["epoch"]).all())


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody replace a file that is open")
@pytest.mark.parametrize("size", [10, 1000, 100_000])
@pytest.mark.parametrize("times", [1, 3])
def test_a_checkpoint_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, times: int
) -> None:
    """safetensors opens a file twice, for the header and then for the data; here others put a new one in between."""
    path, saved = tmp_path / "x", [0]
    opening = torch.UntypedStorage.from_file

    def save(elements: int) -> None:
        saved[0] += 1
        model = {"w": torch.full((elements,), float(saved[0]))}
        checkpoint.save(path, model=model, optimizer={}, state={"epoch": saved[0]})

    def replace_then_open(*args: Any, **kwargs: Any) -> Any:
        if saved[0] <= times:
            save(size)
        return opening(*args, **kwargs)

    save(1000)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_then_open)
    found = checkpoint.load(path)
    assert found.state["epoch"] == saved[0] == times + 1
    assert found.model["w"].shape == (size,) and bool((found.model["w"] == saved[0]).all())

    times = 10**9
    with pytest.raises(ValueError, match=rf"^{path}: cannot be read \(replaced by another file each of the 100 "):
        checkpoint.load(path)


# --- metrics


def test_metrics_keep_bits_and_drop_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "made" / "metrics.csv"
    written = metrics.Metrics(path, ["train_loss", "count"])
    values = [math.pi, 1e-320, math.inf]
    for epoch, value in enumerate(values):
        written.append(epoch, train_loss=value, count=epoch)
        assert metrics.read(path) == written.rows  # whole after every epoch
    assert path.read_text().splitlines()[0] == "epoch,train_loss,count"
    again = metrics.Metrics(path, ["train_loss", "count"], resume_after=0)
    assert len(metrics.read(path)) == 3
    again.append(1, train_loss=0.5, count=7)
    assert metrics.read(path) == [
        {"epoch": 0, "train_loss": math.pi, "count": 0},
        {"epoch": 1, "train_loss": 0.5, "count": 7},
    ]
    with pytest.raises(ValueError, match="epoch 1 comes after epoch 1"):
        again.append(1, train_loss=0.5, count=7)
    with pytest.raises(ValueError, match="the columns are train_loss, count"):
        again.append(2, loss=0.5)
    with pytest.raises(ValueError, match=f"{path}: has the columns epoch, train_loss, count"):
        metrics.Metrics(path, ["other"], resume_after=1)
    metrics.Metrics(path, ["other"]).append(0, other=1.0)
    assert metrics.read(path) == [{"epoch": 0, "other": 1.0}]


@pytest.mark.parametrize("text", ["", "loss\n1\n", "epoch,loss\n1\n", "epoch,loss\n1,x\n", "epoch,epoch\n", "\xff\x00"])
def test_what_is_no_metrics_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{path}: "):
        metrics.read(path)


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"epoch": i, "train_loss": 1 / (i + 1), "valid_accuracy": i / 9} for i in range(4)]
    assert (
        metrics.draw(rows, tmp_path / "a.svg", "title").read_bytes()
        == metrics.draw(rows, tmp_path / "b.svg", "title").read_bytes()
    )
    text = (tmp_path / "a.svg").read_text()
    assert all(part in text for part in ("title", "train loss", "valid accuracy", "epoch"))
    names = ("train_loss", "val_loss", "ema_loss", "val_accuracy", "val_top5_accuracy", "ema_top5_accuracy")
    (upper, lower), curves = metrics._figure([{"epoch": 1, **dict.fromkeys(names, 0.5)}], "").axes, set()
    for line in (*upper.lines, *lower.lines):
        curves.add((line.get_color(), line.get_linestyle(), line.axes is upper))
    assert len(curves) == len(names)  # all can be told apart
    metrics.draw([{"epoch": 0, "train_loss": math.nan, "valid_accuracy": 0.0}], tmp_path / "c.png", "")
    with pytest.raises(ValueError, match="no rows"):
        metrics.draw([], tmp_path / "d.png", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'resnet_fast\[plot\]'"):
        metrics.draw(rows, tmp_path / "d.png", "")


# --- digits


def test_scikit_learns_digits() -> None:
    pytest.importorskip("sklearn")
    found, again, other = digits.load("digits", 3), digits.load("digits", 3), digits.load("digits", 4)
    assert found.train.images.shape == (1437, 1, 28, 28) and found.validation.images.shape == (360, 1, 28, 28)
    assert found.train.images.dtype is torch.float32 and found.train.labels.dtype is torch.int64
    assert found.train.images.min() >= 0 and 230 < found.train.images.max() <= 255 * (1 + 1e-6)
    counts = [torch.bincount(part.labels, minlength=10) / len(part) for part in (found.train, found.validation)]
    assert (counts[0] - counts[1]).abs().max() < 0.003
    assert torch.equal(found.validation.labels, again.validation.labels)
    assert not torch.equal(found.validation.labels, other.validation.labels)
    seen = {image.numpy().tobytes() for image in found.train.images}
    assert sum(image.numpy().tobytes() in seen for image in found.validation.images) <= 2


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (24, 9, 7), np.uint8), "y_train": rng.integers(0, 4, 24, np.uint8),
        "x_test": rng.integers(0, 256, (6, 9, 7), np.uint8), "y_test": rng.integers(0, 4, 6, np.uint8),
    }  # fmt: skip


def write_idx(folder: Path, made: dict[str, np.ndarray[Any, Any]]) -> None:
    for index, (name, array) in enumerate(zip(digits.MNIST_FILES, made.values(), strict=True)):
        if index % 2:
            (folder / name).write_bytes(idx(array))
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))


def test_idx_and_npz_files_give_the_same(tmp_path: Path) -> None:
    made = arrays()
    write_idx(tmp_path, made)
    np.savez(tmp_path / "digits.npz", **made)
    np.savez(tmp_path / "floats.npz", **{k: v / 255 if k[0] == "x" else v.astype(np.int32) for k, v in made.items()})
    for source in (tmp_path, tmp_path / "digits.npz", tmp_path / "floats.npz"):
        found = digits.load(str(source))
        assert (len(found.validation), len(found.train), len(found.held_out)) == (2, 22, 6)
        expected = torch.from_numpy(made["x_train"]).float().unsqueeze(1) / 255
        assert torch.allclose(torch.cat([found.validation.images, found.train.images]), expected, rtol=0, atol=1e-7)
        assert found.held_out.labels.tolist() == made["y_test"].tolist()
        assert found.classes == 1 + max(made["y_train"].max(), made["y_test"].max())


def replaced(**changes: Any) -> dict[str, Any]:
    return {**arrays(), **changes}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (replaced(x_test=np.zeros((6, 9, 8), np.uint8)), r"test images \[9, 8\]"),
        (replaced(y_train=np.zeros(23, np.uint8)), r"labels of shape \[23\]"),
        (replaced(x_train=np.zeros((24, 63), np.uint8)), r"\[N, H, W\]"),
        (replaced(y_train=np.full(24, -1)), "whole numbers"),
        (replaced(y_train=np.full(24, 10**6)), "whole numbers"),
        (replaced(y_train=np.zeros(24)), "whole numbers"),
        (replaced(x_train=np.full((24, 9, 7), 2.0)), "outside 0 to 1"),
        (replaced(x_train=np.full((24, 9, 7), np.nan)), "outside 0 to 1"),
        (replaced(x_train=np.zeros((24, 9, 7), np.int64)), "int64"),
        (replaced(x_train=np.array([Bomb()] * 24, object)), "allow_pickle"),
        (replaced(x_train=np.zeros((5, 9, 7), np.uint8), y_train=np.zeros(5, np.uint8)), "at least 12"),
    ],
)
def test_wrong_arrays(tmp_path: Path, made: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "x.npz", **made)
    with pytest.raises(ValueError, match=message):
        digits.load("x.npz")
    assert not BOMB.exists()


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path, arrays())
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    whole, whole_labels = images.read_bytes(), labels.read_bytes()
    inside = gzip.decompress(whole)
    for data in (whole[:-20], whole[:5], b"text", gzip.compress(b"\0\0\x08"), gzip.compress(inside[:-1]),
                 gzip.compress(b"\0\0\x08\x09" + b"\0" * 90), gzip.compress(inside + b"x")):  # fmt: skip
        images.write_bytes(data)
        with pytest.raises(ValueError, match=str(images)):
            digits.load(str(tmp_path))
    images.write_bytes(whole)
    labels.write_bytes(whole_labels[:2] + b"\x0d" + whole_labels[3:])  # of floats
    with pytest.raises(ValueError, match="unsigned bytes"):
        digits.load(str(tmp_path))
    labels.unlink()
    with pytest.raises(ValueError, match="has no train-labels-idx1-ubyte"):
        digits.load(str(tmp_path))
    np.savez_compressed(tmp_path / "bomb.npz", x_train=np.zeros(2_000_000, np.uint8))
    monkeypatch.setattr(digits, "MAX_BYTES", 1_000_000)
    images.write_bytes(gzip.compress(b"\0" * 50_000_000, 1))
    tracemalloc.start()
    for source in (tmp_path, tmp_path / "bomb.npz"):
        with pytest.raises(ValueError, match="1,000,000"):
            digits.load(str(source))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000  # refused without unpacking it
    tracemalloc.stop()


def test_mnist_is_looked_for_before_it_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    asked: list[tuple[str, Any]] = []

    def refuse(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(OSError, match=rf"no route to host.*put MNIST's four idx files into {tmp_path}"):
        digits.load("mnist")
    assert asked[0][0].endswith("train-images-idx3-ubyte.gz") and len(asked[0][1]) == 64
    write_idx(tmp_path / "datasets" / "mnist", arrays())
    assert len(digits.load("mnist").held_out) == 6 and len(asked) == 1


# --- the run


def few(count: int = 20, classes: int = 3) -> Digits:
    """Small images of a bar whose place is the class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    images = 0.1 * torch.rand(count, 1, 6, 6, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.8
    part = Images(images, labels)
    return Digits(part, Images(images[:6], labels[:6]), Images(images[6:12], labels[6:12]), classes, "bars")


def test_the_fused_network_trains_as_its_plain_layers_do() -> None:
    """The same orders and initial values; the sums of a batch are the loss, so lr does not depend on its size."""
    ours, theirs = (Run(few(), Settings(batch_size=10), plain_layers=layers) for layers in (False, True))
    assert type(theirs.model) is not type(ours.model)
    for _ in range(2):
        a, b = ours.epoch(), theirs.epoch()
        assert abs(a.train_loss - b.train_loss) < 1e-5 * b.train_loss
    logits = ours.model(few().train.images)
    expected = nn.functional.cross_entropy(logits, few().train.labels).item()
    assert abs(ours.measure(few().train)[0] - expected) < 1e-6
    other = Run(few(), Settings(batch_size=10, seed=1))
    assert not torch.equal(other.model.conv1.weight, Run(few(), Settings(batch_size=10)).model.conv1.weight)
    first = Run(few(20), Settings(batch_size=20))
    start = nn.functional.cross_entropy(first.model(few().train.images), few().train.labels).item()
    assert abs(first.epoch().train_loss - start) < 1e-6  # measured before the step, per image


def test_it_learns() -> None:
    run = Run(few(30), Settings(batch_size=30, lr=3e-3))
    assert run.epoch().train_accuracy < 0.6
    assert any(run.epoch().valid_accuracy == 1.0 for _ in range(40))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    run = Run(few(), Settings(batch_size=5, lr=1e30))
    with pytest.raises(ValueError, match=r"the loss is .* at batch \d of epoch 1; lr is 1e\+30"):
        run.epoch()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"lr": 0.0}, "lr is 0.0"), ({"lr": math.nan}, "lr is nan"),
     ({"batch_size": 21}, "more than the 20")],
)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(few(), Settings(**settings))


class Negative(nn.Module):
    """Takes optimize's place and gives every logit the other sign."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return -self.model(x)


def test_agreement_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(few(), Settings(batch_size=10))
    for parameter in run.model.parameters():
        parameter.data *= 4
    run.model.train()  # as a run leaves it that was finished before it was resumed
    found = agreement(run.model, few().held_out)
    assert found.agrees and found.images == 6 and 0 < max(found.largest.values()) < 1e-4 * found.scale
    import resnet_fast.training.residual as module

    monkeypatch.setattr(module, "optimize", Negative)
    found = agreement(run.model, few().held_out)
    assert not found.agrees and found.different > 0


# --- the command


run_command = partial(run, "train", "residual")


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    made = few(60)
    values = {}
    for part, slice_ in (("train", slice(0, 48)), ("test", slice(48, 60))):
        values[f"x_{part}"] = (made.train.images[slice_, 0] * 255).byte().numpy()
        values[f"y_{part}"] = made.train.labels[slice_].numpy()
    np.savez(tmp_path / "bars.npz", **values)
    return tmp_path / "bars.npz"


def test_the_command_resumes_to_the_same_files(bars: Path, tmp_path: Path) -> None:
    options = ("--data", bars, "--batch-size", 11, "--seed", 2)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    code, out, err = run_command(*options, "--out", straight, "--epochs", 2)
    assert (code, err) == (0, "")
    assert "epoch: 0 , train: " in out and "epoch: 1 , train: " in out and ", valid: " in out
    assert "All predictions agree" in out and "12 images" in out
    assert run_command(*options, "--out", parts, "--epochs", 1)[0] == 0
    # As if the run had been killed behind the second row and before its checkpoint.
    (row,) = metrics.read(parts / "metrics.csv")
    columns = [name for name in row if name != "epoch"]
    metrics.Metrics(parts / "metrics.csv", columns, resume_after=0).append(1, **dict.fromkeys(columns, 0.5))
    code, rest, _ = run_command(*options, "--out", parts, "--epochs", 2, "--resume")
    assert code == 0 and "epoch: 0" not in rest and rest.splitlines()[1] == out.splitlines()[2]
    files = [checkpoint.load(folder / "checkpoint.safetensors") for folder in (straight, parts)]
    assert_same(files[0].model, files[1].model)
    assert files[1].about == read_with_metadata(parts / "model.safetensors")[1] == {"arch": "residual_network"}
    assert_same(files[0].optimizer, files[1].optimizer)
    rows = [metrics.read(folder / "metrics.csv") for folder in (straight, parts)]
    timeless = [[{name: row[name] for name in row if name != "seconds"} for row in found] for found in rows]
    assert timeless[0] == timeless[1] and [row["epoch"] for row in rows[1]] == [0, 1]

    for changes, mention in (
        (("--out", parts), "exists; give --resume"),
        (("--out", parts, "--resume", "--seed", 3), "seed 2 (now 3)"),
        (("--out", tmp_path / "new", "--resume"), "no checkpoint to continue from"),
        (("--out", bars), "bars.npz, a file; it must be a folder"),
        (("--out", "/proc/none"), "cannot be written to"),
        (("--out", tmp_path / "new", "--data", "nonsense"), "data is"),
        (("--out", tmp_path / "new", "--lr", "-1"), "lr is -1"),
        (("--out", tmp_path / "new", "--batch-size", 45), "more than the 44"),
    ):
        run_command(*options, "--epochs", 2, *changes).failed(mention)
    run_command(*options, "--seed", -1).failed("--seed", code=2)
    run_command(*options, "--device", "tpu").failed("for '--device': 'tpu' is not one of 'auto', 'cuda', 'cpu'", code=2)
    (parts / "checkpoint.safetensors").write_bytes(b"cut")
    run_command(*options, "--out", parts, "--resume").failed("truncated")


def test_the_command_fails_when_answers_differ(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resnet_fast.training.residual as module

    monkeypatch.setattr(module, "optimize", Negative)
    code, out, _ = run_command("--data", bars, "--epochs", 1, "--batch-size", 22, "--out", tmp_path / "x")
    assert code == 1 and "differ" in out
