"""Run a server as a process, by the command, or in a thread, with a small network of random weights; no tests."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

import resnet_fast as rf
from resnet_fast import models
from resnet_fast.inference import Classifier

CLASSES = ("tench", "goldfish", "cock", "hen", "ostrich", "brambling", "goldfinch", "junco", "robin", "bulbul")


class Server(NamedTuple):
    """A server that answers; its messages are in a file."""

    process: subprocess.Popen[str]
    port: int
    weights: Path
    log: Path

    def errors(self) -> str:
        """Return what it has written to stderr, apart from the hint how to stop it and the log of requests."""
        expected = re.compile(r'Ctrl-C stops\.\n|\d{4}-.* - "[A-Z]+ \S+ HTTP/1\.1" \d{3}\n')
        return expected.sub("", self.log.read_text())

    def resident(self) -> int:
        """Return the bytes of its resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class InThread(NamedTuple):
    """A server in a thread of this process, with its parts."""

    port: int
    service: Any
    server: Any
    thread: threading.Thread


def ten_classes(folder: Path) -> Path:
    """Write weights of a ResNet-18 for ten classes and images of 64 pixels."""
    torch.manual_seed(0)
    weights = folder / "ten.safetensors"
    metadata = {"arch": "resnet18", "classes": json.dumps(CLASSES), **models.Preprocessing(72, 64).to_metadata()}
    save_file(rf.resnet18(num_classes=len(CLASSES)).state_dict(), weights, metadata)
    return weights


@contextmanager
def in_thread(classifier: Classifier, **limits: Any) -> Iterator[InThread]:
    """Serve on a free port, without a warm-up."""
    serve: Any = importlib.import_module("resnet_fast.inference.serve")  # which needs packages that may be missing
    service = serve._Service(classifier, serve.Limits(**limits))
    service.status = "ready"
    sock = serve.listen()
    server = serve._server(service, access_log=False, ready=lambda: None)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        yield InThread(sock.getsockname()[1], service, server, thread)
    finally:
        server.should_exit = True
        thread.join(120)
    assert not thread.is_alive() and service.queue == service.buffered == 0


@contextmanager
def started(folder: Path, *options: str) -> Iterator[Server]:
    """Serve `ten_classes` on a free port."""
    weights = ten_classes(folder)
    command = [sys.executable, "-m", "resnet_fast", "serve", "-w", str(weights), "--port", "0", *options]
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"}
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"serving resnet18, {weights}, float32: http://127.0.0.1:"), (
                line + (folder / "log").read_text()
            )
            yield Server(process, int(line.rsplit(":", 1)[1]), weights, folder / "log")
        finally:
            process.kill()
