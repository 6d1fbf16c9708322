"""`resnet-fast serve`: answers, limits and endings, over real connections; the page is in test_serve_page.py."""

from __future__ import annotations

import asyncio
import http.client
import importlib
import importlib.util
import io
import json
import re
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from resnet_fast import inference, models
from resnet_fast.inference.classifier import Classifier
from tests.command_line import run
from tests.inference.server import Server, in_thread, started

for package in ("starlette", "prometheus_client", "python_multipart"):
    pytest.importorskip(package, reason="the server is the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="the server is the extra 'serve'")
serve: Any = importlib.import_module("resnet_fast.inference.serve")


class Answer(NamedTuple):
    status: int
    data: Any
    headers: dict[str, str]


def ask(
    port: int,
    body: bytes = b"",
    path: str = "/predict",
    method: str = "POST",
    kind: str | None = "image/png",
    **headers: str,
) -> Answer:
    """Send one request; the data is JSON's value if the answer is JSON, else text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, {**({"Content-Type": kind} if kind else {}), **named})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    found = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, json.loads(text) if "json" in found.get("content-type", "") else text, found)


def png(seed: int, size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.frombytes("RGB", (6, 6), coarse.numpy().tobytes()).resize(size).save(file, "PNG", **options)
    return file.getvalue()


def form(*files: bytes, name: str = "photo.png") -> tuple[bytes, str]:
    head = f'--edge\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    return b"".join(head + file + b"\r\n" for file in files) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def huge_png(width: int, height: int) -> bytes:
    """Return a file of a few bytes whose header claims that many pixels."""
    file = io.BytesIO(png(0))
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    checked = io.BytesIO()
    PngImagePlugin.putchunk(checked, b"IHDR", bytes(content[16:29]))
    return bytes(content[:8]) + checked.getvalue() + bytes(content[33:])


# -------------------------------------------------------------------------------------------- the command, as a process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ["--max-bytes", "1000000", "--max-pixels", "1000000", "--access-log"]
    options = ["--image-size", "56", "--resize-size", "60", "--device", "cpu"]
    with started(tmp_path_factory.mktemp("serve"), *limits, *options) as running:
        yield running


def test_answers_are_the_classifiers(server: Server) -> None:
    classifier = inference.load(weights=str(server.weights), image_size=56, resize_size=60, optimize=False)
    images = [png(seed, (60 + 9 * seed, 50 + 20 * seed)) for seed in range(12)]
    turned = Image.Exif()
    turned[0x0112] = 6
    images.append(png(99, exif=turned))
    expected = classifier([models.read_image(io.BytesIO(image)) for image in images])
    body, kind = form(images[0])
    with ThreadPoolExecutor(13) as threads:
        answers = list(threads.map(lambda image: ask(server.port, image, "/predict?topk=7"), images))
    answers.append(ask(server.port, body, "/predict?topk=7", kind=kind))
    for answer, wanted in zip(answers, [*expected, expected[0]], strict=True):
        assert answer.status == 200, answer.data
        rows = classifier.top(wanted[None], 7)[0]
        assert [row["label"] for row in answer.data["predictions"]] == [row.label for row in rows]
        assert [row["index"] for row in answer.data["predictions"]] == [row.index for row in rows]
        found = torch.tensor([row["probability"] for row in answer.data["predictions"]], dtype=torch.float64)
        torch.testing.assert_close(
            found, torch.tensor([row.probability for row in rows]).double(), rtol=1e-5, atol=1e-7
        )
        assert answer.data["model"] == "resnet18" and answer.data["weights"] == server.weights.name
        assert answer.data["milliseconds"] > 0
    assert len(ask(server.port, images[0]).data["predictions"]) == 5
    assert len(ask(server.port, images[0], "/predict?topk=99999").data["predictions"]) == 10


GOOD = png(1)
TWO, TWO_KIND = form(GOOD, GOOD)


@pytest.mark.parametrize(
    ("request_", "status", "error"),
    [
        ({"body": b""}, 400, "the request holds no image"),
        ({"body": b"not an image"}, 400, "not an image of the formats AVIF, BMP, GIF"),
        ({"body": GOOD[: len(GOOD) // 2]}, 400, "damaged or unreadable image"),
        ({"body": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 400, "not an image of the formats"),
        ({"body": b"P6 2 2 255\n" + bytes(12)}, 400, "not an image of the formats"),
        ({"body": huge_png(25_000, 20_000)}, 413, "the image has more than 1,000,000 pixels"),
        ({"body": huge_png(1_001, 1_000)}, 413, "the image has more than 1,000,000 pixels"),
        ({"body": bytes(1_000_001)}, 413, "the request has more than 1,000,000 bytes"),
        ({"body": bytes(30_000_000)}, 413, "the request has more than 1,000,000 bytes"),
        ({"body": GOOD, "kind": "application/x-www-form-urlencoded"}, 415, "is not supported; send an image as"),
        ({"body": GOOD, "kind": "text/plain"}, 415, "'text/plain' is not supported"),
        ({"body": GOOD, "Content_Encoding": "gzip"}, 415, "Content-Encoding is not supported"),
        ({"body": TWO, "kind": TWO_KIND}, 400, "the form cannot be read: Too many files"),
        ({"body": TWO[:200], "kind": TWO_KIND}, 400, "the form"),
        ({"body": TWO, "kind": "multipart/form-data"}, 400, "the form cannot be read: Missing boundary"),
        ({"body": b"--edge--\r\n", "kind": TWO_KIND}, 400, "the form has no file"),
        ({"body": GOOD, "path": "/predict?topk=0"}, 400, "topk is '0'; a number of classes, at least 1, was expected"),
        ({"body": GOOD, "path": "/predict?topk=two"}, 400, "topk is 'two'"),
        ({"body": GOOD, "path": "/predict?topk=1&topk=2"}, 400, "topk is '1, 2'"),
        ({"body": GOOD, "path": "/predict?top_k=3"}, 400, "unknown parameter 'top_k'; there is topk"),
        ({"method": "GET"}, 405, "Method Not Allowed"),
        ({"method": "PUT", "body": GOOD}, 405, "Method Not Allowed"),
        ({"path": "/health"}, 405, "Method Not Allowed"),
        ({"path": "/nothing", "body": GOOD}, 404, "Not Found"),
        ({"path": "/predict/", "body": GOOD}, 404, "Not Found"),
        ({"method": "GET", "path": "/static/../serve.py"}, 404, "Not Found"),
        ({"method": "GET", "path": "/static/%2e%2e/serve.py"}, 404, "Not Found"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:40],
)
def test_what_is_refused(server: Server, request_: dict[str, Any], status: int, error: str) -> None:
    answer = ask(server.port, **request_)
    assert answer.status == status
    assert list(answer.data) == ["error"] and error in answer.data["error"] and "\n" not in answer.data["error"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_chunked_bodies_are_counted_while_they_arrive(server: Server) -> None:
    def chunks(count: int) -> Iterator[bytes]:
        yield from ([GOOD] if count == 0 else [bytes(100_000)] * count)

    answers = []
    for count in (0, 10, 11, 40):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.request("POST", "/predict", chunks(count), {"Content-Type": "image/png"}, encode_chunked=True)
        answers.append(connection.getresponse().status)
        connection.close()
    assert answers == [200, 400, 413, 413]
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as endless:
        endless.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            for _ in range(1_000):  # far more than is thrown away for politeness
                endless.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        with suppress(ConnectionError):
            assert endless.recv(1_000).startswith(b"HTTP/1.1 413 ")


def test_malformed_requests_leave_the_server_as_it_was(server: Server) -> None:
    generator = torch.Generator().manual_seed(0)
    ask(server.port, GOOD)
    before = server.resident()
    statuses = set()
    for number in range(100):
        content = bytearray(GOOD if number % 2 else TWO)
        for position in torch.randint(len(content), (number % 20 + 1,), generator=generator).tolist():
            content[position] ^= 0x55
        statuses.add(ask(server.port, bytes(content), kind=TWO_KIND if number % 2 == 0 else "image/png").status)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:  # and what is no HTTP, or half of it
            connection.sendall(bytes(content)[: number * 3] if number % 3 else b"POST /predict HTTP/1.1\r\nConte")
    assert statuses <= {200, 400, 413, 415} and 400 in statuses
    assert ask(server.port, GOOD).status == 200
    assert server.resident() - before < 100 * 2**20
    assert server.errors() == ""


def test_state(server: Server) -> None:
    assert ask(server.port, method="GET", path="/health")[:2] == (200, {"status": "ready"})
    ask(server.port, GOOD)
    ask(server.port, b"bad")
    ask(server.port, path="/made-up-1", method="GET")
    metrics = ask(server.port, method="GET", path="/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in metrics.data.splitlines() if not line.startswith("#"))
    assert float(lines['resnet_fast_requests_total{path="/predict",status="200"}']) >= 1
    assert float(lines['resnet_fast_requests_total{path="/predict",status="400"}']) >= 1
    assert float(lines['resnet_fast_requests_total{path="other",status="404"}']) >= 1 and "made-up" not in metrics.data
    assert float(lines["resnet_fast_batch_size_sum"]) == float(lines["resnet_fast_request_seconds_count"])
    assert lines["resnet_fast_queue_length"] == lines["resnet_fast_body_bytes"] == "0.0"
    assert float(lines["process_resident_memory_bytes"]) > 2**20
    assert re.search(r'^2.* - "GET /made-up-1 HTTP/1.1" 404$', server.log.read_text(), re.MULTILINE)
    info = ask(server.port, method="GET", path="/info").data
    assert (info["model"], info["classes"], info["image_size"]) == ("resnet18", 10, 56)
    assert info["limits"]["max_bytes"] == 1_000_000 and str(server.weights.parent) not in json.dumps(info)


def test_the_example_client(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(images):
        path.write_bytes(png(number))
    monkeypatch.setattr(sys, "argv", ["serve_client.py", f"http://127.0.0.1:{server.port}", *map(str, images)])
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "serve_client.py"), run_name="__main__")
    best = [ask(server.port, path.read_bytes()).data["predictions"][0] for path in images]
    expected = [f"{path}: {row['label']} {row['probability']:.1%}" for path, row in zip(images, best, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected


def test_port_in_use(server: Server) -> None:
    run("serve", "--port", server.port).failed(f"cannot listen on 127.0.0.1 port {server.port}: Address already in use")
    run("serve", "--host", "no.such.host.invalid").failed("cannot listen on no.such.host.invalid port 8000: ")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else real(name, *rest)
    )
    run("serve").failed("serving needs uvicorn: pip install 'resnet_fast[serve]'")


def test_sigterm_ends_it(server: Server) -> None:  # the last with this server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 143
    assert server.errors() == "resnet-fast: stopped; what had begun was answered\n"
    with pytest.raises(ConnectionRefusedError):
        ask(server.port, GOOD)


# ------------------------------------------------------------------------------- a model that waits until it is told to


class Gate(nn.Module):
    """Records the batches that it is given, and computes each only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Semaphore(0)
        self.batches: list[list[int]] = []
        self.bad: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        reds = [round(255 * value) for value in images[:, 0, 0, 0].tolist()]
        self.batches.append(reds)
        assert self.opened.acquire(timeout=120), "the test did not open the gate"
        scores = torch.zeros(len(images), 256)
        scores[range(len(reds)), reds] = 9.0
        if self.bad in reds:
            scores[0, 0] = float("nan")
        return scores


def red(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Gated(NamedTuple):
    gate: Gate
    port: int
    service: Any
    server: Any
    thread: threading.Thread
    send: Callable[[int], Future[Answer]]


@contextmanager
def gated(**limits: Any) -> Iterator[Gated]:
    """Serve a network that names an image's red value."""
    gate = Gate()
    prepare = models.Preprocessing(2, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    classifier = Classifier(gate, "gate", "none", prepare, 2, tuple(map(str, range(256))))
    with in_thread(classifier, **{"batch_timeout": 0.0, **limits}) as running, ThreadPoolExecutor(32) as clients:
        try:
            yield Gated(gate, *running, lambda value: clients.submit(ask, running.port, red(value)))
        finally:
            gate.opened.release(1_000)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen within two minutes"
        time.sleep(0.005)


def labels(answers: list[Future[Answer]]) -> list[str]:
    return [answer.result(120).data["predictions"][0]["label"] for answer in answers]


def test_what_waits_becomes_one_batch() -> None:
    with gated(batch_size=4) as on:
        answers = [on.send(7)]
        until(lambda: on.gate.batches == [[7]])
        answers += [on.send(value) for value in range(10, 16)]
        until(lambda: on.service.batcher._waiting.qsize() == 6)
        on.gate.opened.release(3)
        assert labels(answers) == ["7", *map(str, range(10, 16))]
        assert [len(batch) for batch in on.gate.batches] == [1, 4, 2]


def test_an_image_waits_for_others_no_longer_than_the_timeout() -> None:
    with gated(batch_size=3, batch_timeout=2.0) as on:
        on.gate.opened.release(3)
        answers = [on.send(1), on.send(2)]
        assert labels(answers) == ["1", "2"] and sorted(on.gate.batches[0]) == [1, 2]
    with gated(batch_size=3, batch_timeout=100.0) as on:
        on.gate.opened.release(3)
        began = time.monotonic()
        answers = [on.send(1), on.send(2), on.send(3)]
        assert labels(answers) == ["1", "2", "3"]
        assert time.monotonic() - began < 90  # a full batch does not wait


def test_a_full_queue_refuses_and_recovers() -> None:
    with gated(queue=3, batch_size=1) as on:
        answers = [on.send(value) for value in (1, 2, 3)]
        until(lambda: on.service.queue == 3)
        refused = [on.send(value).result(120) for value in range(4, 10)]
        assert {(answer.status, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
        assert "3 images wait already" in refused[0].data["error"]
        assert ask(on.port, method="GET", path="/health").status == 200
        on.gate.opened.release(4)
        assert labels(answers) == ["1", "2", "3"] and on.send(4).result(120).status == 200


def test_work_of_clients_that_left_is_dropped() -> None:
    with gated(batch_size=1) as on:
        kept = [on.send(1)]
        until(lambda: on.gate.batches == [[1]])
        leaving = [socket.create_connection(("127.0.0.1", on.port)) for _ in range(5)]
        for connection in leaving:
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(red(2))}\r\n\r\n"
            connection.sendall(head.encode() + red(2))
        until(lambda: on.service.batcher._waiting.qsize() == 5)
        kept.append(on.send(3))
        until(lambda: on.service.queue == 7)
        for connection in leaving:
            connection.close()
        until(lambda: on.service.queue == 2)
        on.gate.opened.release(2)
        assert labels(kept) == ["1", "3"] and on.gate.batches == [[1], [3]]
        gone = 'resnet_fast_requests_total{path="/predict",status="499"} 5.0'
        assert gone in ask(on.port, method="GET", path="/metrics").data


def test_an_error_of_the_model_is_500_and_the_server_goes_on() -> None:
    with gated(batch_size=1) as on:
        on.gate.opened.release(3)
        on.gate.bad = 5
        assert on.send(5).result(120)[:2] == (500, {"error": "internal error"})
        with mock.patch.object(Gate, "forward", side_effect=RuntimeError("secret\npath")):
            assert on.send(6).result(120)[:2] == (500, {"error": "internal error"})
        assert labels([on.send(7)]) == ["7"]


def test_a_worker_that_ends_ends_the_server() -> None:
    with gated(batch_size=1) as on:
        on.gate.opened.release(9)
        assert labels([on.send(1)]) == ["1"]
        with mock.patch.object(serve.Batcher, "_collect", side_effect=KeyError("bug")):
            assert labels([on.send(2)]) == ["2"]  # the worker was waiting in the real function
            on.thread.join(120)
        assert isinstance(on.service.failed, KeyError) and not on.thread.is_alive()


def test_stopping_answers_what_has_begun() -> None:
    with gated(batch_size=1) as on:
        answers = [on.send(1), on.send(2)]
        until(lambda: on.service.queue == 2)
        on.server.should_exit = True
        until(lambda: not on.server.servers[0].is_serving())
        time.sleep(0.2)
        on.gate.opened.release(2)
        assert labels(answers) == ["1", "2"]
        on.thread.join(120)
        with pytest.raises(ConnectionError):
            ask(on.port, red(1))


def test_slow_clients_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 1.0)
    with gated(read_timeout=1.0) as on:

        def ended(begin: bytes, then: bytes) -> bytes:
            """Send a byte now and then, as slow as a client can be; return what comes back before the end."""
            found = b""
            with socket.create_connection(("127.0.0.1", on.port), timeout=0.05) as slow, suppress(ConnectionError):
                slow.sendall(begin)
                for _ in range(1_200):
                    with suppress(TimeoutError):
                        received = slow.recv(10_000)
                        found += received
                        if not received:
                            return found
                    slow.sendall(then)
                pytest.fail(f"still connected after {begin!r}")
            return found

        health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        body = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        assert ended(b"", b"") == b""
        assert ended(b"GET /health HTTP/1.1\r\n", b"X: y\r\n") == b""
        assert ended(health, b"G").startswith(b"HTTP/1.1 200 ")
        assert ended(body, b"x").startswith(b"HTTP/1.1 408 ")
        with mock.patch.object(serve, "_LINGER_SECONDS", 0.4):
            assert ended(body.replace(b"/predict", b"/other"), b"x").startswith(b"HTTP/1.1 404 ")


def test_bodies_in_memory_are_bounded_together() -> None:
    with gated(max_bytes=10_000) as on:
        held = [socket.create_connection(("127.0.0.1", on.port)) for _ in range(16)]
        for connection in held:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n" + bytes(9_999))
        until(lambda: on.service.buffered == 16 * 9_999)
        assert on.send(1).result(120)[:2] == (503, {"error": "too many large requests at once"})
        for connection in held:
            connection.close()
        until(lambda: on.service.buffered == 0)
        on.gate.opened.release()
        assert on.send(1).result(120).status == 200


def test_connections_are_bounded() -> None:
    with mock.patch.object(serve.Limits, "max_connections", 5), gated() as on:
        held = [socket.create_connection(("127.0.0.1", on.port)) for _ in range(5)]
        until(lambda: len(on.server.server_state.connections) == 5)
        assert ask(on.port, method="GET", path="/health").status == 503
        for connection in held:
            connection.close()
        until(lambda: not on.server.server_state.connections)
        assert ask(on.port, method="GET", path="/health").status == 200
    assert serve.Limits(queue=3).max_connections == 259


# --------------------------------------------------------------------------------------------------------------- parts


def test_limits_are_checked() -> None:
    for name, value in (("batch_size", 0), ("batch_timeout", -1.0), ("queue", 0), ("max_bytes", 0), ("workers", 0)):
        with pytest.raises(ValueError, match=rf"{name} must be (above|at least) 0, got {value}"):
            serve.Limits(**{name: value})


def test_two_workers_compute_at_the_same_time() -> None:
    together = threading.Barrier(2)

    def compute(images: Tensor) -> Tensor:
        together.wait(120)
        return images + 1

    async def both() -> Any:
        batcher = serve.Batcher(compute, size=1, timeout=0.0, workers=2)
        failures: list[BaseException] = []
        async with batcher.running(failures.append):
            found = await asyncio.gather(batcher(torch.tensor([1.0])), batcher(torch.tensor([2.0])))
        assert not failures
        return found

    assert [row.item() for row in asyncio.run(both())] == [2.0, 3.0]


def test_the_reader_of_images_takes_limits(tmp_path: Path) -> None:
    content = png(0, (30, 20))
    assert models.read_image(io.BytesIO(content), max_pixels=600, formats=("PNG",)).size == (30, 20)
    with pytest.raises(models.images.ImageTooLargeError, match="30 x 20 pixels, more than the limit of 599"):
        models.read_image(io.BytesIO(content), max_pixels=599)
    with pytest.raises(models.ImageError, match="not an image of the formats GIF, JPEG"):
        models.read_image(io.BytesIO(content), formats=("GIF", "JPEG"))
