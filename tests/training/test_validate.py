"""``resnet-fast validate``, and that every command prepares images as the checkpoint says."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import resnet_fast as rf
from resnet_fast.models import Preprocessing
from resnet_fast.training import metrics
from resnet_fast.training.validation import class_positions
from tests.command_line import run
from tests.training.test_train_imagenet import make_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three classes, and a network trained at 32 pixels in `run`."""
    folder = tmp_path_factory.mktemp("validate")
    make_images(folder / "train")
    make_images(folder / "val", (5, 4, 4), seed=1)
    run(
        "train", "imagenet", "--data", folder, "--out", folder / "run", "--arch", "resnet18", "--image-size", 32,
        "--resize-size", 48, "--epochs", 1, "--batch-size", 4, "--workers", 0, "--lr", 0.01, "--device", "cpu",
    ).passed()  # fmt: skip
    return folder


def test_every_command_prepares_images_as_training_did(trained: Path, tmp_path: Path) -> None:
    weights = trained / "run" / "model.safetensors"
    row = metrics.read(trained / "run" / "metrics.csv")[-1]
    found = run("validate", trained / "val", "-w", weights, "--workers", 0, "--json", "-").json()
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-4)
    assert (found["top1"], found["top5"]) == (row["val_accuracy"], row["val_top5_accuracy"])
    assert (found["arch"], found["images"], found["classes"], found["skipped_images"]) == ("resnet18", 13, 3, 0)

    assert run("predict", trained / "val", "-w", weights, "-o", tmp_path / "out.csv", "-k", 3).code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [Path(row["path"]).parent.name for row in rows]
    assert sum(row["label"] == name for row, name in zip(rows, wanted, strict=True)) / 13 == found["top1"]
    loss = 0.0
    for each, name in zip(rows, wanted, strict=True):
        rank = next(suffix for suffix in ("", "_2", "_3") if each["label" + suffix] == name)
        loss -= math.log(float(each["probability" + rank])) / 13
    assert loss == pytest.approx(row["val_loss"], rel=1e-4)

    classified = run("classify", trained / "val", "-w", weights, "-k", 1, "--json", "-").json()["images"]
    predicted = rf.predict(trained / "val", weights, topk=1)
    for each, answer, prediction in zip(rows, classified, predicted, strict=True):
        assert each["path"] == answer["path"] == prediction.source
        assert float(each["probability"]) == pytest.approx(answer["predictions"][0]["probability"], rel=1e-4)
        assert float(each["probability"]) == pytest.approx(prediction.probability, rel=1e-4)
    other = run("validate", trained / "val", "-w", weights, "--workers", 0, "--image-size", 64, "--json", "-").json()
    assert other["loss"] != pytest.approx(found["loss"], rel=1e-3), "at another size the loss is another"


def test_text_and_file(trained: Path, tmp_path: Path) -> None:
    weights = trained / "run" / "model.safetensors"
    said = run("validate", trained / "val", "-w", weights, "--workers", 0, "--json", tmp_path / "a.json").passed()
    data = json.loads((tmp_path / "a.json").read_text())
    assert f"resnet18, {weights}, float32: 13 images of 3 classes: top-1 {data['top1']:.2%}, top-5 100.00%" in said


def test_damaged_images(trained: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "val", (3, 2, 2), seed=1)
    damaged = sorted((tmp_path / "val").rglob("*.*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:40])
    arguments = ["validate", tmp_path / "val", "-w", trained / "run" / "model.safetensors", "--workers", 0]
    assert "6 images of 3 classes, 1 damaged ones left out" in run(*arguments).passed()
    run(*arguments, "--on-error", "stop").failed(damaged.name)


def test_some_of_the_classes(trained: Path, tmp_path: Path) -> None:
    weights = trained / "run" / "model.safetensors"
    name = sorted(path.name for path in (trained / "val").iterdir())[1]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / name).symlink_to(trained / "val" / name)
    found = run("validate", tmp_path / "val", "-w", weights, "--workers", 0, "--json", "-").json()
    right = [each.label == name for each in rf.predict(trained / "val" / name, weights)]
    assert found["images"] == 4 and found["top1"] == sum(right) / 4
    (tmp_path / "val" / "other").symlink_to(trained / "val" / name)
    run("validate", tmp_path / "val", "-w", weights).failed("'other' is none of the network's 3 classes")
    run("validate", trained, "-w", weights).failed("none of the network's")
    run("validate", tmp_path / "absent", "-w", weights).failed("no such folder")
    run("validate", trained / "val", "-w", tmp_path / "absent.pth").failed("absent.pth")


def test_answers_that_are_not_finite(trained: Path, tmp_path: Path) -> None:
    model = rf.resnet18(num_classes=3)
    torch.nn.init.constant_(model.fc.bias, float("inf"))
    about = {"arch": "resnet18", **Preprocessing(36, 32).to_metadata()}
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors", about
    )
    run("validate", trained / "val", "-w", tmp_path / "w.safetensors", "--workers", 0).failed("not finite")


WORDNET = [f"n{number:08}" for number in range(1000)]
IMAGENET = ["crane", "crane", *(f"name {number}" for number in range(998))]


def test_class_positions() -> None:
    data = Path("val")
    assert class_positions(["b", "c"], ["c", "a", "b"], data) == ([2, 0], "")
    assert class_positions(WORDNET, IMAGENET, data) == (list(range(1000)), "")
    positions, note = class_positions(["x", "y"], ["class 0", "class 1"], data)
    assert positions == [0, 1] and "order of the folders' names" in note
    for folders, labels, mention in (
        (["crane", "name 3"], IMAGENET, "several classes called 'crane'"),
        (WORDNET[:10], IMAGENET, "all 1000 are needed"),
        (["train", "val"], ["a", "b"], "has folders train, val instead of classes; give val/val"),
        (["x", "y", "z"], ["class 0", "class 1"], "has 3 classes, the network 2 without names"),
        (["a", "x"], ["a", "b"], "'x' is none of the network's 2 classes"),
        (["x", "y"], ["a", "b"], "'x', 'y' are none of the network's 2 classes"),
    ):
        with pytest.raises(ValueError, match=mention):
            class_positions(folders, labels, data)
