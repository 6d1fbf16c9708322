"""What models keep in memory: for images of many sizes, and once they are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from resnet_fast.backends import cpu

SIZES = 60

#: In a process of its own: what other tests have allocated and freed would be counted, too.
PROGRAM = """
import ctypes, gc, json, sys
import torch
import resnet_fast as rf

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept by the C library is nobody's
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.set_num_threads(1)
kind, dtype, sizes = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])

def make():
    model = rf.resnet18(num_classes=10).eval().to(dtype)
    return rf.optimize(model, check=False) if kind == "snapshot" else model

with torch.no_grad():
    make()(torch.rand(1, 3, 64, 64, dtype=dtype))  # what torch and the processor's libraries make once
    empty = resident()
    model = make()
    model(torch.rand(2, 3, 96, 96, dtype=dtype))
    first = resident()
    for i in range(sizes):
        model(torch.rand(1 + i % 3, 3, 33 + 7 * i % 64, 96 - 5 * i % 64, dtype=dtype))
    grown = resident() - first
    del model
    print(json.dumps({"grown": grown, "left": resident() - empty}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "dtype"), [("live", "float32"), ("snapshot", "float32"), ("live", "bfloat16")])
def test_memory_is_bounded_over_image_sizes_and_given_back(kind: str, dtype: str) -> None:
    """Sixty sizes may take twice the weights, where a packed copy for each size would be sixty times. What
    oneDNN runs leaves up to 1024 primitives, of a fixed size in all, after the model as well: torch lets nobody drop
    them.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, kind, dtype, str(SIZES)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = 11_200_000 * (4 if dtype == "float32" else 2)
    engine = dtype == "float32" and not cpu.unavailable() and cpu.module().isa() != "portable"
    primitives = 0 if engine else 80 * 2**20
    assert found["grown"] <= 2 * weights + primitives, found
    assert found["left"] <= 20 * 2**20 + primitives, found
