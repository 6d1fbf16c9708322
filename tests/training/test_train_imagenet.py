"""Training on images in folders: data, recipe, checkpoints, and many processes; all on a CPU and on few small images.

Runs that are cut off and continued are compared bit for bit with runs that were not. Nothing is timed.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import models
from resnet_fast.benchmarking.peers import plain
from resnet_fast.cli.classify import load_network
from resnet_fast.models import Preprocessing
from resnet_fast.training import checkpoint, distributed, imagefolder, imagenet, metrics
from tests.command_line import Outcome
from tests.command_line import run as command
from tests.numerics import assert_obeys_error_rule, unit_roundoff
from tests.training import ddp_worker

ONE = distributed.Processes(torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dog", "owl")


pytestmark = pytest.mark.usefixtures("one_thread")


def make_images(folder: Path, counts: tuple[int, ...] = (6, 5, 5), seed: int = 0) -> Path:
    """Noise with one stronger colour for each class, of different sizes."""
    random = np.random.default_rng(seed)
    for channel, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 120, (40 + 7 * number, 60, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images to train on and 7, an odd number, to validate with; three classes."""
    made = tmp_path_factory.mktemp("imagenet")
    make_images(made / "train")
    make_images(made / "val", (3, 2, 2), seed=1)
    return made


USUAL = ddp_worker.OPTIONS | {"batch_size": 4, "image_size": 32}


def options(data: Path, output: Path, **changed: Any) -> imagenet.Options:
    return imagenet.Options(data=data, out=output, **USUAL | changed)


def same_files(left: Path, right: Path) -> None:
    """The trained parameters and averages in two folders are the same to the last bit."""
    for name in (imagenet.MODEL, imagenet.EMA_MODEL):
        a, b = load_file(left / name), load_file(right / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)


def same_rows(left: Path, right: Path) -> None:
    """The tables of two runs have the same numbers, apart from the speed."""
    a, b = (
        [{**row, "images_per_second": 0} for row in metrics.read(each / imagenet.METRICS)] for each in (left, right)
    )
    assert a == b


SMALL = Preprocessing(36, 32)
"""Of the images that the tests train with."""


def environment() -> dict[str, str]:
    """For another process: none of torchrun's variables, one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in distributed._VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1"}


# --- data


def test_crops_and_flips_depend_on_seed_epoch_and_index_alone(data: Path) -> None:
    folder = imagefolder.scan(data / "train")

    def epoch(number: int, *, seed: int = 3, skip: int = 0, workers: int = 0) -> list[tuple[Tensor, Tensor]]:
        images = imagefolder.TrainImages(folder, SMALL, seed=seed)
        batches = list(imagefolder.train_loader(images, number, batch=5, skip=skip, workers=workers))
        assert not any(int(standing_in.sum()) for _, _, standing_in in batches)
        return [(pixels, targets) for pixels, targets, _ in batches]

    def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
        pairs = zip(left, right, strict=True)
        return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)

    first = epoch(0)
    assert [tuple(x.shape) for x, _ in first] == [(5, 32, 32, 3)] * 3  # 16 images, full batches only
    torch.rand(1)  # the global generator has no part in it
    assert same(epoch(0, workers=2), first)
    assert same(epoch(0, skip=2), first[2:])
    assert not same(epoch(1), first)
    assert not same(epoch(0, seed=4), first)
    orders = [
        list(imagefolder.train_loader(imagefolder.TrainImages(folder, SMALL), number, batch=5).batch_sampler)
        for number in (0, 1)
    ]
    assert orders[0] != orders[1]
    # The same image in the same order is cropped differently in another epoch.
    images = imagefolder.TrainImages(folder, SMALL)
    before = images[3][0]
    images.epoch = 1
    assert not torch.equal(images[3][0], before)


def test_every_process_has_its_own_training_images(data: Path) -> None:
    images = imagefolder.TrainImages(imagefolder.scan(data / "train"), SMALL)
    shares = [
        {index for batch in imagefolder.train_loader(images, 0, batch=2, rank=rank, world_size=3).batch_sampler
         for index in batch}
        for rank in range(3)
    ]  # fmt: skip
    assert [len(share) for share in shares] == [4, 4, 4]
    assert len(set.union(*shares)) == 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_validation_counts_every_image_once(data: Path, world_size: int) -> None:
    images = imagefolder.ValImages(imagefolder.scan(data / "val"), SMALL)
    seen = [
        index
        for rank in range(world_size)
        for index in imagefolder.val_loader(images, batch=2, rank=rank, world_size=world_size).sampler
    ]
    assert sorted(seen) == list(range(7))


def test_validation_images_are_those_of_preprocessing(data: Path) -> None:
    folder = imagefolder.scan(data / "val")
    images = imagefolder.ValImages(folder, SMALL)
    batch, _ = next(iter(imagefolder.val_loader(images, batch=7)))
    found = imagefolder.normalize(batch, SMALL)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([SMALL(Image.open(folder.path(index))) for index in range(7)])
    assert torch.equal(found, expected)


def test_crop_boxes_lie_inside_and_have_the_asked_area_and_aspect() -> None:
    random = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        left, top, right, bottom = imagefolder.crop_box(300, 200, random, min_scale=0.25)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        width, height = right - left, bottom - top
        assert 0.74 < width / height < 1.35  # 3/4 to 4/3 and the rounding of both to pixels
        areas.append(width * height / (300 * 200))
    assert 0.24 < min(areas) < 0.26 and max(areas) > 0.85
    assert imagefolder.crop_box(1000, 10, random) == (493, 0, 506, 10)  # nothing fits: 4/3 from the middle
    assert imagefolder.crop_box(1, 1, random) == (0, 0, 1, 1)


def test_scan_sorts_and_reads_deep_folders(tmp_path: Path) -> None:
    make_images(tmp_path / "train", (1, 1, 1))
    (tmp_path / "train" / "cat" / "deep").mkdir()
    os.replace(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "cat" / "deep" / "x.PNG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    folder = imagefolder.scan(tmp_path / "train")
    assert folder.classes == CLASSES
    assert [folder.path(index).relative_to(tmp_path).as_posix() for index in range(3)] == [
        "train/cat/deep/x.PNG", "train/dog/0.png", "train/owl/0.png",
    ]  # fmt: skip
    assert folder.targets.tolist() == [0, 1, 2]
    before = folder.digest()
    os.replace(tmp_path / "train" / "dog" / "0.png", tmp_path / "train" / "dog" / "1.png")
    assert imagefolder.scan(tmp_path / "train").digest() != before


# --- recipe


def built(data: Path, **changed: Any) -> imagenet.Training:
    return imagenet.build(options(data, data, **changed), ONE, imagefolder.scan(data / "train"))


def batch_of(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 3, (count,), generator=generator)


def parameters(training: imagenet.Training) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = imagenet.warmup_cosine(optimizer, warmup_steps=10, steps=50)
    for step in range(50):
        if step < 10:
            expected = 0.4 * (0.01 + 0.99 * step / 10)
        else:
            expected = 0.4 * (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        # torch multiplies its way from step to step: 50 roundings.
        assert abs(optimizer.param_groups[0]["lr"] - expected) < 50 * 2**-52 * 0.4, step
        optimizer.step()
        scheduler.step()
    assert abs(optimizer.param_groups[0]["lr"]) < 1e-15


def test_default_learning_rate_is_proportional_to_the_images_of_a_step(data: Path) -> None:
    four = replace(ONE, world_size=4)
    assert options(data, data, lr=None, batch_size=64, accumulate=2).learning_rate(four) == 0.2
    assert options(data, data, lr=0.3).learning_rate(four) == 0.3


def test_norms_and_biases_have_no_weight_decay(data: Path) -> None:
    training = built(data, weight_decay=0.1)
    decayed, rest = training.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        name for name in names.values() if "conv" in name or name.endswith(("downsample.0.weight", "fc.weight"))
    }
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_loss_is_smoothed_and_accumulated_gradients_are_those_of_the_joint_batch(data: Path) -> None:
    images, targets = batch_of(8)
    changes = {}
    for accumulate in (1, 2):
        training = built(data, batch_size=8 // accumulate, accumulate=accumulate, momentum=0.0, weight_decay=0.0)
        training.model.eval()  # statistics of a batch would differ between the two
        before = parameters(training)
        with torch.no_grad():
            scores = training.model(imagefolder.normalize(images, training.options.preprocessing))
        parts = zip(images.split(8 // accumulate), targets.split(8 // accumulate), strict=True)
        imagenet.take_step(training, parts)
        changes[accumulate] = parameters(training) - before
        logarithms = scores.double().log_softmax(1)
        smoothed = -0.9 * logarithms[torch.arange(8), targets].sum() - 0.1 * logarithms.mean(1).sum()
        loss, right, count, standing_in = training.sums.tolist()
        assert abs(loss - float(smoothed)) < 1e-6 * float(smoothed)
        assert (right, count, standing_in) == (float((scores.argmax(1) == targets).sum()), 8, 0)
    # Both are float32 sums of the same terms, in another order: parameters of size 1 that change by 1e-4.
    assert (changes[1] - changes[2]).norm() < 1e-3 * changes[1].norm()


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_limits_the_norm_of_the_step(data: Path, scaled: bool) -> None:
    training = built(data, momentum=0.0, weight_decay=0.0, warmup_epochs=0, lr=1.0, clip_norm=0.01)
    if scaled:
        training.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = parameters(training)
    imagenet.take_step(training, [batch_of(4)])
    assert abs(float((parameters(training) - before).norm()) - 0.01) < 1e-4


def test_moving_average_of_parameters_and_statistics(data: Path) -> None:
    training = built(data, ema_decay=0.9)
    assert training.ema is not None
    imagenet.take_step(training, [batch_of(4)])
    first = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    imagenet.take_step(training, [batch_of(4, seed=1)])
    averaged = training.ema.module.state_dict()
    for name, second in training.model.state_dict().items():
        if not second.is_floating_point():
            continue
        exact = 0.9 * first[name].double() + 0.1 * second.double()
        assert_obeys_error_rule(averaged[name], 0.9 * first[name] + 0.1 * second, exact, name)
        if name in ("conv1.weight", "bn1.running_mean"):
            assert not torch.equal(averaged[name], second) and not torch.equal(averaged[name], first[name])


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step", "ignore::resnet_fast.backends.FallbackWarning"
)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_keeps_float32_parameters(data: Path, precision: str) -> None:
    training = built(data, precision=precision)
    assert training.scaler.is_enabled() == (precision == "float16")
    seen: list[torch.dtype] = []
    training.model.layer1[0].conv1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    before = parameters(training)
    loss = imagenet.take_step(training, [batch_of(4)])
    assert seen == [getattr(torch, precision)]
    assert torch.isfinite(loss) and loss.dtype is torch.float32
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    if precision == "bfloat16":  # the scaler's first step may be left out
        assert not torch.equal(parameters(training), before)


# --- one process


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_whole_run_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole = options(data, tmp_path / "whole", checkpoint_every=100)
    lines: list[str] = []
    training = imagenet.train(whole, ONE, say=lines.append)
    assert len(lines) == 5 and lines[1].startswith("epoch 1/2: ") and lines[2].startswith("epoch 2/2: ")
    rows = metrics.read(whole.out / imagenet.METRICS)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[name]) for row in rows for name in ("train_loss", "val_loss", "ema_loss"))
    assert (whole.out / imagenet.PLOT).exists()
    model = rf.resnet18(weights=whole.out / "model.safetensors").eval()
    assert model.fc.out_features == 3
    network = load_network("resnet18", str(whole.out / "model.safetensors"))
    assert network.labels == tuple(sorted(path.name for path in (data / "train").iterdir()))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in training.model.state_dict().items())
    assert not torch.equal(load_file(whole.out / imagenet.EMA_MODEL)["conv1.weight"], state["conv1.weight"])

    cut = replace(whole, out=tmp_path / "cut", checkpoint_every=3)
    command = ["-m", "resnet_fast.cli", "train", "imagenet", "--data", data, "--out", cut.out, "--device", "cpu"]
    for name, value in (USUAL | {"threads": 1}).items():
        command += [f"--{name.replace('_', '-')}", value]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not (cut.out / imagenet.CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (cut.out / "model.safetensors").exists(), "it ended before it was killed"
    resumed: list[str] = []
    imagenet.train(replace(cut, resume=True), ONE, say=resumed.append)
    assert "; resumed in epoch " in resumed[0]
    same_files(whole.out, cut.out)
    same_rows(whole.out, cut.out)

    with pytest.raises(ValueError, match=r"exists; --resume continues it, another folder for --out starts anew"):
        imagenet.train(cut, ONE)
    with pytest.raises(
        ValueError, match=r"made with batch_size 4, not 8; lr 0.02, not 0.1\. Resume with the same settings"
    ):
        imagenet.train(replace(cut, resume=True, batch_size=8, lr=0.1), ONE)
    imagenet.train(replace(cut, resume=True), ONE, say=resumed.append)
    assert "nothing left to train" in resumed[-3]

    damaged = checkpoint.load(cut.out / imagenet.CHECKPOINT)
    del damaged.model["conv1.weight"]
    checkpoint.save(cut.out / imagenet.CHECKPOINT, **vars(damaged))
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: damaged.*conv1\.weight"):
        imagenet.train(replace(cut, resume=True), ONE)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    training = built(data)
    training.sums[0] = math.nan
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(imagenet.Diverged, match=r"not finite in epoch 1; there is no checkpoint .*lower learning rate"):
        imagenet.save(training, path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"before")
    with pytest.raises(imagenet.Diverged, match=r"epoch 1; .*checkpoint\.safetensors is from before that"):
        imagenet.save(training, path)
    assert path.read_bytes() == b"before"


# --- the command line


def run(*arguments: str | Path) -> Outcome:
    return command("train", "imagenet", "--arch", "resnet18", *arguments)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    def attempt(data: Path) -> Outcome:
        return run(
            "--data", data, "--out", tmp_path / "out", "--image-size", "64", "--batch-size", "1", "--workers", "0",
            "--on-error", "stop",
        )  # fmt: skip

    attempt(tmp_path / "none").failed("none/train: no such folder", "expected", "<class>/ with images")
    good = tmp_path / "good"
    make_images(good / "train", (1, 1, 1))
    attempt(good).failed("good/val: no such folder")
    make_images(good / "val", (1, 1, 1))
    (good / "val" / "fox").mkdir()
    (good / "val" / "dog" / "0.png").unlink()
    (good / "val" / "dog").rmdir()
    attempt(good).failed("val: lacks 'dog' and also has 'fox'; its classes must be the 3 of the training images")
    (good / "val" / "fox").rmdir()
    (good / "val" / "dog").mkdir()
    attempt(good).failed("val/dog: has no images", ".png")
    (good / "val" / "dog" / "0.png").write_bytes(b"no image")
    (good / "train" / "cat" / "0.png").write_bytes((good / "train" / "cat" / "0.png").read_bytes()[:200])
    attempt(good).failed("val/dog/0.png: not an image", "--on-error skip would go on without it")
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    attempt(empty).failed("empty/train: has no folders")
    (empty / "train" / "cat").mkdir()
    attempt(empty).failed("empty/train: has one class only, 'cat'")


def test_an_unreadable_image_is_named_by_reading_processes_too(tmp_path: Path) -> None:
    make_images(tmp_path / "train", (1, 1, 1))
    (tmp_path / "train" / "dog" / "0.png").write_text("no image")
    images = imagefolder.TrainImages(imagefolder.scan(tmp_path / "train"), SMALL, on_error="stop")
    path = tmp_path / "train" / "dog" / "0.png"
    for expected in (f"{path}: not an image that Pillow reads", f"{path}: no such file"):
        with pytest.raises(models.ImageError) as caught:
            list(imagefolder.train_loader(images, 0, batch=3, workers=1))
        assert imagefolder.reason(caught.value) == expected
        path.unlink(missing_ok=True)


def test_wrong_options_are_named(data: Path, tmp_path: Path) -> None:
    usual = ("--data", data, "--out", tmp_path / "out", "--image-size", "32")
    for arguments, mentions in (
        (("--lr", "-1"), ("lr is -1.0, it must be a positive number",)),
        (("--lr", "nan"), ("lr is nan, it must be a positive number",)),
        (("--warmup-epochs", "90"), ("warmup_epochs is 90.0", "less than the 90 epochs")),
        (("--momentum", "1"), ("momentum is 1.0, it must be from 0 to less than 1",)),
        (("--label-smoothing", "-0.1"), ("label_smoothing is -0.1",)),
        (("--ema-decay", "1"), ("ema_decay is 1.0",)),
        (("--min-scale", "0"), ("min_scale is 0.0",)),
        (("--clip-norm", "0"), ("clip_norm is 0.0",)),
        (("--batch-size", "17"), ("train: has 16 images, one step takes 17", "a smaller batch_size would do")),
        (("--arch", "resnet1"), ("unknown arch 'resnet1'", "resnet18")),
        (("--out", data / "train" / "cat" / "0.png"), ("a file; it must be a folder",)),
    ):
        run(*usual, *arguments).failed(*mentions)
    run(*usual, "--dtype", "int8").failed("'int8'", "bfloat16", code=2)
    if not torch.cuda.is_available():
        run(*usual, "--device", "cuda").failed("device is cuda, and torch sees no CUDA GPU here; use cpu")


# --- one reader and one preprocessing


def test_training_validation_classify_and_the_library_predict_the_same(tmp_path: Path) -> None:
    """Files that two readers would see differently: turned, 16-bit, transparent, with a palette, of other formats."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 6)):
        for channel, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (90, 70 + 9 * number, 3))
                pixels[..., channel] += 100
                image = Image.fromarray(pixels.astype(np.uint8))
                path, exif = tmp_path / part / name / f"{number}", Image.Exif()
                exif[0x0112] = 6
                if number == 0:
                    image.save(f"{path}.jpg", exif=exif)
                elif number == 1:
                    Image.fromarray((pixels[..., 0] * 257).astype(np.uint16)).save(f"{path}.png")
                elif number == 2:
                    image.save(f"{path}.webp", lossless=True, exif=exif)
                elif number == 3:
                    image.quantize(32).save(f"{path}.gif")
                elif number == 4:
                    image.save(f"{path}.tif", tiffinfo={0x0112: 8})
                else:
                    image.putalpha(128)
                    image.save(f"{path}.png")
    out = tmp_path / "out"
    failed_or_not = run(
        "--data", tmp_path, "--out", out, "--image-size", "64", "--resize-size", "70", "--batch-size", "4", "--workers",
        "0", "--epochs", "2", "--device", "cpu",
    )  # fmt: skip
    assert failed_or_not[0] == 0, failed_or_not
    folder = imagefolder.scan(tmp_path / "val")
    files = [folder.path(index) for index in range(len(folder))]
    assert len(files) == 12
    for file in (imagenet.MODEL, imagenet.CHECKPOINT):
        weights = out / file
        prepare, classes = models.preprocessing(weights), models.categories(weights)
        assert (prepare, classes) == (Preprocessing(70, 64), ("cat", "dog"))
        model = rf.resnet18(weights=weights).eval()
        validation = imagefolder.ValImages(folder, prepare)
        with torch.no_grad():
            scores = model(torch.stack([prepare(path) for path in files]))
            pixels = torch.stack([validation[index][0] for index in range(len(folder))])
            assert torch.equal(model(imagefolder.normalize(pixels, prepare)), scores)
        right = int((scores.argmax(1) == torch.from_numpy(folder.targets)).sum())
        assert metrics.read(out / imagenet.METRICS)[-1]["val_accuracy"] == right / len(files)
        code, said, err = command("classify", tmp_path / "val", "--weights", weights, "--json", "-")
        assert code == 0, err
        answer = json.loads(said)
        assert answer["arch"] == "resnet18"  # the file says it
        assert [each["path"] for each in answer["images"]] == [str(path) for path in files]
        for each, row in zip(answer["images"], scores.softmax(1), strict=True):
            assert each["predictions"][0]["label"] == classes[int(row.argmax())]
            assert each["predictions"][0]["probability"] == pytest.approx(float(row.max()), rel=1e-4)
    # What is given wins over what the file says.
    code, said, _ = command(
        "classify", files[0], "--weights", out / imagenet.MODEL, "--image-size", "48", "--json", "-"
    )
    with torch.no_grad():
        row = model(Preprocessing(52, 48)(files[0])[None]).softmax(1)[0]
    assert json.loads(said)["images"][0]["predictions"][0]["probability"] == pytest.approx(float(row.max()), rel=1e-4)
    command("classify", files[0], "-a", "resnet50", "-w", out / imagenet.MODEL).failed(
        "weights of resnet18 by its metadata, but --arch is resnet50"
    )


# --- damaged images


@pytest.fixture
def damaged(data: Path, tmp_path: Path) -> Path:
    """As ``data``, with one damaged training image, whose header is whole, and one damaged validation image."""
    copied = tmp_path / "damaged"
    shutil.copytree(data, copied)
    path = copied / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:2000])
    (copied / "val" / "cat" / "1.png").write_bytes(b"")
    return copied


def test_the_next_image_stands_in_for_a_damaged_one(data: Path, damaged: Path) -> None:
    good, bad = (imagefolder.TrainImages(imagefolder.scan(each / "train"), SMALL, seed=3) for each in (data, damaged))
    index = good.folder.files.tolist().index(b"dog/2.png")
    for position in range(len(good)):
        if position != index:
            assert torch.equal(good[position][0], bad[position][0]) and good[position][1:] == bad[position][1:]
    pixels, target, standing_in = bad[index]
    assert (target, standing_in) == (int(good.folder.targets[index + 1]), 1)
    assert torch.equal(pixels, bad[index][0]) and not torch.equal(pixels, good[index][0])
    counts = [
        sum(int(batch[2].sum()) for rank in range(world_size)
            for batch in imagefolder.train_loader(bad, 0, batch=1, rank=rank, world_size=world_size, workers=workers))
        for world_size, workers in ((1, 0), (1, 2), (2, 0))
    ]  # fmt: skip
    assert counts == [1, 1, 1]
    last = len(good) - 1
    for each in range(last):
        bad.folder.path(each).write_bytes(b"")
    assert bad[0][1:] == (int(good.folder.targets[last]), 1)
    bad.folder.path(last).unlink()
    with pytest.raises(models.ImageError, match=r"owl/4\.png: no such file"):  # not damaged: perhaps a disk is gone
        bad[0]


def test_damaged_images_are_skipped_and_counted_or_stop_the_run(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    usual = ("--data", damaged, "--image-size", "32", "--batch-size", "8", "--workers", "0", "--epochs", "1")
    run(*usual, "--out", out, "--on-error", "stop").failed("val/cat/1.png: not an image", "--on-error skip would go on")
    assert not list(out.iterdir())  # nothing was trained
    code, said, err = run(*usual, "--out", out)
    assert code == 0 and err == "", err
    assert f"1 of 7 validation images are damaged and skipped, such as {damaged / 'val' / 'cat' / '1.png'}" in said
    assert "1 damaged training images skipped, 1 damaged validation images left out" in said
    row = metrics.read(out / imagenet.METRICS)[0]
    assert (row["skipped_images"], row["val_images"]) == (1, 6)
    shutil.copy(damaged / "val" / "cat" / "0.png", damaged / "val" / "cat" / "1.png")
    run(*usual, "--out", tmp_path / "stop", "--on-error", "stop").failed("train/dog/2.png: damaged or unreadable image")
    (damaged / "train" / "cat" / "9.png").symlink_to("nowhere")
    run(*usual, "--out", tmp_path / "gone").failed("train/cat/9.png: no such file")
    assert not list((tmp_path / "gone").iterdir())


def test_an_epoch_is_kept_if_validation_fails(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    made = options(data, tmp_path, epochs=1, ema_decay=0.0)
    with monkeypatch.context() as context:
        context.setattr(imagenet, "evaluate", vanished)
        with pytest.raises(OSError, match="Input/output"):
            imagenet.train(made, ONE)
    kept = checkpoint.load(tmp_path / imagenet.CHECKPOINT)
    assert (kept.state["epoch"], kept.state["step"]) == (0, 4)
    with monkeypatch.context() as context:
        context.setattr(imagenet, "take_step", None)  # no step is left
        lines: list[str] = []
        ended = imagenet.train(replace(made, resume=True), ONE, say=lines.append)
    assert "resumed in epoch 1 after 4 of its steps" in lines[0] and lines[1].startswith("epoch 1/1: ")
    assert all(torch.equal(kept.model[name], tensor) for name, tensor in ended.model.state_dict().items())


def test_a_full_disk_leaves_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    training = built(data)
    path = tmp_path / imagenet.CHECKPOINT
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # stands for a full disk
    try:
        with pytest.raises(
            OSError, match=r"checkpoint\.safetensors: cannot be written \(File too large\); nothing is left"
        ):
            imagenet.save(training, path)
        assert not list(tmp_path.iterdir())
        path.write_bytes(b"before")
        with pytest.raises(
            OSError, match=r"safetensors: cannot be written \(File too large\); what was there before is whole"
        ):
            imagenet.save(training, path)
        table = metrics.Metrics(tmp_path / "metrics.csv", ["x" * 30_000])
        with pytest.raises(OSError, match=r"metrics\.csv: cannot be written \(File too large\)"):
            table.append(1, **{"x" * 30_000: 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_reading_process_that_is_killed_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagefolder, "crop_box", lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    usual = ("--data", data, "--out", tmp_path / "out", "--image-size", "32", "--batch-size", "4", "--epochs", "1")
    run(*usual, "--workers", "1").failed("a process that reads images died", "fewer --workers", "--resume")


def test_a_batch_that_batchnorm_cannot_train_on_is_refused_before_the_start(data: Path, tmp_path: Path) -> None:
    usual = ("--data", data, "--out", tmp_path / "out", "--batch-size", "1", "--workers", "0")
    run(*usual, "--image-size", "32").failed("batch_size is 1 and image_size 32", "--batch-size 2 or --image-size 33")
    imagenet.take_step(
        built(data, batch_size=1, image_size=33), [(batch_of(1)[0].new_zeros(1, 33, 33, 3), batch_of(1)[1])]
    )
    two = replace(ONE, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 1"):
        imagenet.build(options(data, data, batch_size=1), two, imagefolder.scan(data / "train"))
    imagenet.build(options(data, data, batch_size=1, sync_bn=True), two, imagefolder.scan(data / "train"))


# --- other images, other starts


def begun(made: imagenet.Options, epoch: int, step: int) -> Path:
    """Writes the checkpoint of a run that is so far, untrained."""
    train, val = (imagefolder.scan(made.data / part) for part in ("train", "val"))
    training = imagenet.build(made, ONE, train)
    training.names["val"] = imagefolder.pack_names(val)
    training.epoch, training.step = epoch, step
    made.out.mkdir()
    imagenet.save(training, made.out / imagenet.CHECKPOINT)
    return made.out / imagenet.CHECKPOINT


def test_resuming_says_which_images_changed(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(data, own)
    made = options(own, tmp_path / "out", epochs=2, ema_decay=0.0, warmup_epochs=0)
    path = begun(made, 0, 4)
    (own / "train" / "dog" / "2.png").unlink()
    for number in range(5):
        shutil.copy(own / "train" / "cat" / "0.png", own / "train" / "cat" / f"new{number}.png")
    (own / "val" / "owl" / "0.png").unlink()
    changed = (
        rf"1 of 16 images were removed from {own}/train \('dog/2\.png'\) and 5 images were added to {own}/train "
        r"\('cat/new0\.png', 'cat/new1\.png', 'cat/new2\.png' and 2 more\)"
    )
    resumed = replace(made, resume=True)
    with pytest.raises(ValueError, match=rf"since it was made, {changed}\. --allow-changes goes on"):
        imagenet.train(resumed, ONE)
    lines: list[str] = []
    ended = imagenet.train(replace(resumed, allow_changes=True), ONE, say=lines.append)
    assert re.match(f"since the checkpoint, {changed}.*not the one that was begun, bit for bit", lines[0])
    assert lines[1].startswith("since the checkpoint, 1 of 7 images were removed") and "earlier epochs" in lines[1]
    assert "resumed in epoch 1 after 4 of its steps" in lines[2]
    # Five steps an epoch in place of four: the cosine is where it belongs, and ends with the last step.
    rates = [row["lr"] for row in metrics.read(made.out / imagenet.METRICS)]
    assert rates == pytest.approx([0.01, 0.0], abs=1e-15) and ended.steps_per_epoch == 5
    before = checkpoint.load(path)
    tensors = before.tensors | {"names.train": torch.zeros(3, dtype=torch.uint8)}
    checkpoint.save(path, **{**vars(before), "tensors": tensors})
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: damaged, or written by another version"):
        imagenet.train(resumed, ONE)


def test_resuming_takes_network_and_sizes_from_the_checkpoint(data: Path, tmp_path: Path) -> None:
    made = options(data, tmp_path / "out", epochs=1, resize_size=40, ema_decay=0.0)
    path = begun(made, 1, 0)
    assert checkpoint.read_about(path) == {
        "arch": "resnet18", "classes": json.dumps(CLASSES), **Preprocessing(40, 32).to_metadata(),
    }  # fmt: skip
    resumed = replace(made, resume=True, arch=None, image_size=None, resize_size=None)
    with pytest.raises(ValueError, match=r"made with resize_size 40, not 37"):
        imagenet.train(replace(resumed, image_size=32, resize_size=37), ONE)
    again = imagenet.train(resumed, ONE)
    assert (again.options.model, again.options.preprocessing) == ("resnet18", Preprocessing(40, 32))


@pytest.mark.parametrize("kind", ["other classes", "other names", "the same classes", "names unknown"])
def test_weights_to_start_from(data: Path, tmp_path: Path, kind: str) -> None:
    expected = Preprocessing(50, 40, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic")
    names = {"other classes": "abcd", "other names": "abc", "the same classes": CLASSES, "names unknown": "abc"}[kind]
    torch.manual_seed(1)
    theirs = models.resnet18(num_classes=len(names)).state_dict()
    about = {"arch": "resnet18", "classes": json.dumps(list(names)), **expected.to_metadata()}
    if kind == "names unknown":
        del about["classes"]
    path = checkpoint.write_model(tmp_path / "theirs.safetensors", theirs, about)
    start = options(data, tmp_path / "out", weights=str(path), arch=None, image_size=None, epochs=1, ema_decay=0.0)
    folder = imagefolder.scan(data / "train")
    training = imagenet.build(imagenet._described(start, None, ONE), ONE, folder)
    assert (training.options.model, training.options.preprocessing) == ("resnet18", expected)
    own = training.model.state_dict()
    assert all(torch.equal(theirs[name], own[name]) for name in own if not name.startswith("fc."))
    kept = kind in ("the same classes", "names unknown")
    assert torch.equal(theirs["fc.weight"], own["fc.weight"]) is kept and own["fc.weight"].shape == (3, 512)
    said = "kept" if kept else f"of {len(names)} classes replaced by a new one of 3"
    assert training.started == f"starting from {path}, its classifier {said}"
    given = imagenet.build(imagenet._described(replace(start, image_size=80), None, ONE), ONE, folder)
    assert given.options.preprocessing == replace(expected, resize_size=100, crop_size=80)
    if kind == "other classes":
        lines: list[str] = []
        imagenet.train(start, ONE, say=lines.append)
        assert lines[0].endswith(training.started)
        assert models.preprocessing(start.out / imagenet.MODEL) == expected
        assert models.categories(start.out / imagenet.MODEL) == CLASSES


def test_wrong_weights_to_start_from(data: Path, tmp_path: Path) -> None:
    state = models.resnet18(num_classes=3).state_dict()
    checkpoint.write_model(tmp_path / "caffe.safetensors", state, {"arch": "resnet18", "stride_in_1x1": "true"})
    checkpoint.write_model(tmp_path / "small.safetensors", state, {"arch": "residual_network"})
    usual = ("--data", data, "--out", tmp_path / "out", "--image-size", "32", "--batch-size", "4")
    for arguments, mention in (
        (("-w", tmp_path / "absent.pth"), "absent.pth: no such weights file"),
        (("-w", "IMAGENET9K"), "unknown weights 'IMAGENET9K'"),
        (("-a", "resnet50", "-w", tmp_path / "caffe.safetensors"), "weights of resnet18, not of resnet50"),
        (("-a", "resnet34", "-w", tmp_path / "small.safetensors"), "does not fit resnet34"),
        (("-w", tmp_path / "caffe.safetensors", "--zero-init-residual"), "give one of the two"),
    ):
        run(*usual, *arguments).failed(mention)
    command("train", "imagenet", *usual, "-w", tmp_path / "small.safetensors").failed(
        "'residual_network', which is none"
    )


# --- many processes


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that ddp_worker.py filled in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("together")
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 16, 64, 64, 3), dtype=torch.uint8, generator=generator)
    save_file({"images": images, "targets": torch.randint(0, 3, (3, 16), generator=generator)}, out / "batches")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *map(str, (*launch, ddp_worker.__file__, out / "batches", data, out))],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_two_processes_with_joint_statistics_are_one_with_the_joint_batch(together: tuple[Path, str]) -> None:
    folder, _ = together
    batches = load_file(folder / "batches")

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        """Plain layers in one process, with torch's SGD and loss."""
        torch.manual_seed(0)
        model = plain(ddp_worker.smooth(models.resnet18(num_classes=3))).to(dtype).train()
        groups = imagenet.parameter_groups(model, 1e-4)
        optimizer = torch.optim.SGD(groups, lr=ddp_worker.LR, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        for x, wanted in zip(batches["images"], batches["targets"], strict=True):
            scores = model(imagefolder.normalize(x, Preprocessing()).to(dtype))
            nn.functional.cross_entropy(scores, wanted, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return model.state_dict()

    ours, single, exact = load_file(folder / "joint.safetensors"), alone(torch.float32), alone(torch.float64)
    assert ours.keys() == single.keys()

    def joined(state: dict[str, Tensor], kind: str) -> Tensor:
        return torch.cat([state[name].flatten() for name in single if kind in name])

    for kind in ("weight", "bias", "running_mean", "running_var"):
        assert_obeys_error_rule(joined(ours, kind), joined(single, kind), joined(exact, kind), kind)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(together: tuple[Path, str]) -> None:
    folder, printed = together
    lines = printed.splitlines()  # of process 0 alone
    assert sum("2 processes on cpu, 4 images a step, 4 steps an epoch" in line for line in lines) == 2
    assert sum("resumed in epoch 2 after 3 of its steps" in line for line in lines) == 1
    assert [line.partition(":")[0] for line in lines if line.startswith("epoch")] == [
        "epoch 1/2", "epoch 2/2", "epoch 2/2",
    ]  # fmt: skip
    same_files(folder / "whole", folder / "cut")
    same_rows(folder / "whole", folder / "cut")


@pytest.mark.slow
def test_two_processes_count_each_validation_image_once(together: tuple[Path, str], data: Path) -> None:
    folder, _ = together
    row = metrics.read(folder / "whole" / imagenet.METRICS)[-1]
    images = imagefolder.ValImages(imagefolder.scan(data / "val"), Preprocessing(73, 64))
    batch, targets = next(iter(imagefolder.val_loader(images, batch=7)))
    x = imagefolder.normalize(batch, images.preprocessing)
    for name, file in (("val", imagenet.MODEL), ("ema", imagenet.EMA_MODEL)):
        model = rf.resnet18(weights=folder / "whole" / file).eval()
        with torch.no_grad():
            scores, exact = plain(model)(x), plain(model).double()(x.double())
        assert row[f"{name}_accuracy"] == int((exact.argmax(1) == targets).sum()) / 7
        single, losses = (nn.functional.cross_entropy(each, targets, reduction="none") for each in (scores, exact))
        error, allowed = abs(row[f"{name}_loss"] - float(losses.mean())), 2 * (single - losses).abs().mean()
        assert error <= allowed + unit_roundoff(torch.float32) * losses.mean(), (name, error, allowed)
