"""What the single-op benchmarks share: seeded channels_last tensors, the error rule, and how a case is timed.

Run them with ``pytest benchmarks/bench_<op>.py``; ``--benchmark-json`` writes a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.benchmarking.gate import judge

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


def tensor(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Seeded noise, channels_last where it has four dimensions."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def check(answer: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Nothing that breaks the error rule is timed."""
    verdict = judge(answer.double(), plain, exact, dtype)
    assert verdict.passed, verdict.reason


def time(benchmark: Any, run: Callable[[], Tensor], **extra: Any) -> None:
    """Times ``run`` without gradients, after one call to warm up; ``extra`` lands in the result file."""
    benchmark.extra_info.update(extra, threads=torch.get_num_threads(), torch=torch.__version__)
    with torch.no_grad():
        run()
        benchmark(run)
