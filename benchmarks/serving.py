"""Load on ``resnet-fast serve`` from another process: ``python -m benchmarks.serving``.

Throughput and latency at several numbers of clients, interleaved with the plain loop of the same network; then more
clients than the server takes, then requests that mean harm. A network of random weights is served on a free port.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.book import Options
from resnet_fast import inference, models
from resnet_fast.benchmarking import machine, results
from resnet_fast.benchmarking.timing import quantile

CLIENTS = (1, 4, 16, 64)
OVERLOAD = 192
"""Clients that send at the same time, against a queue of 64."""


def photos(count: int) -> list[bytes]:
    """Return JPEG files of 500 x 375 pixels, a usual size of ImageNet's: coarse colours with fine noise."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randint(256, (8, 10, 3), generator=generator, dtype=torch.uint8)
        noise = torch.randint(256, (375, 500, 3), generator=generator, dtype=torch.uint8)
        image = Image.frombytes("RGB", (10, 8), coarse.numpy().tobytes()).resize((500, 375), Image.Resampling.BICUBIC)
        image = Image.blend(image, Image.frombytes("RGB", (500, 375), noise.numpy().tobytes()), 0.1)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG file of a few bytes with the header of an image of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1_000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Client:
    """One connection that is kept, and opened again if the server has closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def post(self, body: bytes) -> tuple[int, float]:
        """Return the status and the seconds of one request; status 0 for a connection that broke."""
        began = time.perf_counter()
        try:
            self._connection.request("POST", "/predict", body, {"Content-Type": "image/jpeg"})
            response = self._connection.getresponse()
            response.read()
            return response.status, time.perf_counter() - began
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return 0, time.perf_counter() - began


def page(port: int, path: str) -> str:
    """Return the text of one of the server's pages."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=120) as answer:
        text: str = answer.read().decode()
        return text


def metrics(port: int) -> dict[str, float]:
    """Return the values of /metrics by their names and labels."""
    lines = (line.rsplit(" ", 1) for line in page(port, "/metrics").splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


COUNTS = ("resnet_fast_batch_size_sum", "resnet_fast_batch_size_count", "process_cpu_seconds_total")


def counts(port: int) -> list[float]:
    """Return how many images, and batches of them, the server has computed, and the processor seconds it has used."""
    found = metrics(port)
    return [found[name] for name in COUNTS]


@contextmanager
def serving(weights: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run the command on a free port; yield the port and the process."""
    command = [sys.executable, "-m", "resnet_fast", "serve", "-w", str(weights), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            yield int(line.rsplit(":", 1)[1]), process
        finally:
            process.terminate()


@dataclass
class Load:
    """Status and seconds of every request, and the seconds that they took together."""

    requests: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Load) -> None:
        self.requests += other.requests
        self.seconds += other.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return throughput and latency of the answers with 200, and how many answers there were of each status."""
        good = [taken for status, taken in self.requests if status == 200]
        statuses = sorted(Counter(status for status, _ in self.requests).items())
        return {
            "statuses": {str(status): count for status, count in statuses},
            "images_per_second": len(good) / self.seconds,
            "p50": quantile(good, 0.5) if good else None,
            "p99": quantile(good, 0.99) if good else None,
        }


def load(port: int, images: list[bytes], clients: int, seconds: float) -> Load:
    """Let each client begin image after image for that long, and wait for the last answers."""
    began = time.perf_counter()
    end = began + seconds

    def one(number: int) -> list[tuple[int, float]]:
        client, found = Client(port), []
        while time.perf_counter() < end:
            found.append(client.post(images[(number + len(found)) % len(images)]))
            if found[-1][0] == 429:
                time.sleep(1)  # as Retry-After says
        return found

    with ThreadPoolExecutor(clients) as threads:
        requests = [request for requests in threads.map(one, range(clients)) for request in requests]
    return Load(requests, time.perf_counter() - began)


def plain_loop(classifier: inference.Classifier, images: list[bytes], seconds: float) -> Load:
    """Read and classify image after image in this process for that long."""
    found = Load()
    while found.seconds < seconds:
        began = time.perf_counter()
        classifier.top(classifier([models.read_image(io.BytesIO(images[len(found.requests) % len(images)]))]))
        taken = time.perf_counter() - began
        found.add(Load([(200, taken)], taken))
    return found


def capacity(port: int, classifier: inference.Classifier, images: list[bytes], rounds: int, seconds: float) -> Any:
    """Measure the plain loop and the server at each number of clients in turn, several times."""
    loop, loop_cpu = Load(), 0.0
    loads, sums = {clients: Load() for clients in CLIENTS}, {clients: [0.0] * len(COUNTS) for clients in CLIENTS}
    for _ in range(rounds):
        before = time.process_time()
        loop.add(plain_loop(classifier, images, seconds))
        loop_cpu += time.process_time() - before
        for clients in CLIENTS:
            began = counts(port)
            loads[clients].add(load(port, images, clients, seconds))
            sums[clients] = [
                sum_ + now - then for sum_, now, then in zip(sums[clients], counts(port), began, strict=True)
            ]
    found = {"plain loop": {**loop.as_dict(), "cpu_seconds_per_image": loop_cpu / len(loop.requests)}}
    for clients in CLIENTS:
        computed, batches, cpu = sums[clients]
        found[str(clients)] = {
            **loads[clients].as_dict(), "mean_batch": computed / batches, "cpu_seconds_per_image": cpu / computed
        }  # fmt: skip
    return found


class Memory:
    """The largest resident memory of the server, in MB, while a block runs."""

    def __init__(self, port: int) -> None:
        self._port, self._done = port, threading.Event()
        self.before = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _now(self) -> float:
        return metrics(self._port)["process_resident_memory_bytes"] / 1e6

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            with suppress(OSError, http.client.HTTPException):
                self.peak = max(self.peak, self._now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def as_dict(self) -> dict[str, float]:
        return {"before_mb": self.before, "peak_mb": self.peak, "after_mb": self._now()}


def beyond(port: int, images: list[bytes], seconds: float) -> dict[str, Any]:
    """Send from more clients than there is room for, then from one."""
    with Memory(port) as memory:
        found = load(port, images, OVERLOAD, seconds).as_dict()
    return {"clients": OVERLOAD, **found, **memory.as_dict(), "then": load(port, images, 1, seconds).as_dict()}


def harm(port: int, images: list[bytes]) -> dict[str, Any]:
    """Send a hundred damaged files, and headers that claim 500 megapixels, and see whether the server goes on."""
    generator = torch.Generator().manual_seed(0)
    damaged = []
    for number in range(100):
        content = bytearray(images[number % len(images)])
        positions = torch.randint(20, len(content), (50,), generator=generator).tolist()
        for position in positions:
            content[position] ^= 0xFF
        damaged.append(bytes(content[: positions[0]] if number % 2 else content))
    client = Client(port)
    with Memory(port) as memory:
        statuses = Counter(client.post(content)[0] for content in damaged)
        claims = [client.post(png_that_claims(25_000, 20_000)) for _ in range(20)]
    return {
        "damaged": {str(status): count for status, count in sorted(statuses.items())},
        "500 megapixels": {str(status): count for status, count in Counter(status for status, _ in claims).items()},
        "500 megapixels_seconds": max(taken for _, taken in claims),
        **memory.as_dict(),
        "then": client.post(images[0])[0],
    }


def main() -> int:
    parser = Options("serving", __doc__, ("cpu",))
    parser.add_argument("--arch", default="resnet50", help="default: resnet50")
    parser.add_argument("--rounds", type=int, default=3, help="how often each number of clients is tried (default: 3)")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of each try (default: 5)")
    given = parser.parse()
    images = photos(32)
    disturbance = machine.Disturbance()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = Path(folder) / f"{given.arch}.safetensors"
        save_file(models.get_model(given.arch).state_dict(), weights, {"arch": given.arch})
        classifier = inference.load(weights=str(weights))
        with serving(weights) as (port, process):
            info = json.loads(page(port, "/info"))
            found = capacity(port, classifier, images, given.rounds, given.turn)
            overload = beyond(port, images, 2 * given.turn)
            hostile = harm(port, images)
        ended = process.returncode
    path = results.write(given.out / "serving.json", {
        "schema": results.SCHEMA,
        "kind": "serving",
        "setting": {
            "arch": given.arch, "dtype": "float32", "image_size": classifier.size, "photo": [500, 375],
            "threads": torch.get_num_threads(), "seconds": given.rounds * given.turn, "limits": info["limits"],
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        },
        "machine": machine.describe().as_dict(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "busy_cores_but_for_the_clients": disturbance.cores(),
        "capacity": found,
        "beyond": overload,
        "harm": hostile,
        "exit_status": ended,
    })  # fmt: skip
    print("clients | images/s | p50 ms | p99 ms | processor ms an image | mean batch")
    for clients, each in found.items():
        print(f"{clients} | {each['images_per_second']:.1f} | {1e3 * each['p50']:.0f} | {1e3 * each['p99']:.0f} | "
              f"{1e3 * each['cpu_seconds_per_image']:.0f} | {each.get('mean_batch', 1):.1f}")  # fmt: skip
    print(f"beyond: {overload}\nharm: {hostile}\nexit status after SIGTERM: {ended}")
    print(f"written: {path}", file=sys.stderr)
    return int(hostile["then"] != 200 or overload["then"]["statuses"].keys() != {"200"} or ended != 143)


if __name__ == "__main__":
    sys.exit(main())
