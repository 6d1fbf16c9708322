"""Compare `resnet-fast predict` in one process with Ray's workers, one of which is killed half-way.

Makes 2,000 images with 20 damaged ones, classifies them both ways, and checks that every image has its row once and
that both tables are the same, but for rounding. Prints one line of JSON.

    python -m benchmarks.bench_predict [--images 2000] [--damaged 20] [--workers 2]
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import resnet_fast as rf
from resnet_fast.benchmarking import machine


def make_images(folder: Path, count: int, damaged: int) -> None:
    """Write JPEG files of 500x375 pixels; damaged ones are cut off or no images at all."""
    folder.mkdir()
    random = np.random.default_rng(0)
    wrong = set(np.linspace(0, count - 1, damaged).astype(int).tolist())
    for number in range(count):
        path = folder / f"{number:06}.jpg"
        small = random.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        if number in wrong:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3] if number % 2 else b"no image")


def make_weights(path: Path) -> None:
    torch.manual_seed(0)
    model = rf.resnet18(num_classes=10)
    model(torch.randn(8, 3, 128, 128))  # measures BatchNorm's statistics
    with torch.no_grad():
        model.fc.weight.mul_(8)  # as far apart as trained answers are
    about = {"arch": "resnet18", **rf.models.Preprocessing().to_metadata()}
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, about)


def predict(folder: Path, out: Path, weights: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "resnet_fast.cli", "predict", folder, "--out", out, "--weights", weights, *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


def kill_a_worker(process: subprocess.Popen[str], journal: Path, answers: int) -> bool:
    """Kill one of Ray's processes that classify once there are so many answers; return whether there was one."""
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > answers:
            for pid in descendants(process.pid):
                if b"ray::MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return True
        time.sleep(0.1)
    return False


def descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def finished(process: subprocess.Popen[str], began: float) -> tuple[float, float]:
    """Return seconds from start to end, and the images per second that the command says, without its start-up."""
    said, _ = process.communicate()
    if process.returncode not in (0, 1) or " images/s" not in said:
        raise SystemExit(f"predict failed: {said}")
    return time.monotonic() - began, float(said.rpartition(" images/s")[0].rpartition(" ")[2])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same(left: dict[str, str], right: dict[str, str]) -> bool:
    """Return whether two rows agree; an equal probability may have come out in another order."""
    return left["path"] == right["path"] and left["error"] == right["error"] and (
        bool(left["error"]) or math.isclose(float(left["probability"]), float(right["probability"]), rel_tol=1e-4)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 2000), ("damaged", 20), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine.describe().summary, **vars(options)}
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name) / "images", Path(name) / "weights.safetensors"
        make_images(folder, options.images, options.damaged)
        make_weights(weights)
        plain, ray = Path(name) / "plain.csv", Path(name) / "ray.csv"
        for kind in ("plain", "ray", "ray_killed"):
            busy = machine.Disturbance()
            began = time.monotonic()
            if kind == "plain":
                process = predict(folder, plain, weights)
            else:
                arguments = ("--engine", "ray", "--workers", str(options.workers), "--overwrite")
                process = predict(folder, ray, weights, *arguments)
            if kind == "ray_killed":
                found["killed"] = kill_a_worker(process, Path(f"{ray}.partial"), options.images // 2)
            seconds, speed = finished(process, began)
            found[kind] = {"seconds": round(seconds, 1), "images_per_second": speed, "cores_busy": busy.cores()}
            if kind != "plain":
                left, right = rows(plain), rows(ray)
                found[kind] |= {
                    "rows": len(right),
                    "paths": len({row["path"] for row in right}),
                    "errors": sum(bool(row["error"]) for row in right),
                    "same_as_plain": len(left) == len(right) and all(map(same, left, right)),
                }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
