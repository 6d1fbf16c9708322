"""The fused ops by pytest-benchmark, one statistic for each contestant: ``pytest benchmarks/test_ops.py -k head``.

``--benchmark-json FILE`` writes the figures, ``--benchmark-compare`` compares them with earlier ones. A contestant that
breaks the error rule is not timed. ``bench_ops`` interleaves contestants for ratios; here each is timed alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import ops
from resnet_fast._dtypes import DTYPES
from resnet_fast.roofline.measure import tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = tuple(DTYPES) if DEVICE == "cuda" else ("fp32", "bf16")
CASES = {
    f"{ops.op_of(make)}-{precision}-{number}": (make, precision)
    for precision in PRECISIONS
    for number, make in enumerate(ops.full(precision, 1, DEVICE))
}


@pytest.mark.parametrize("contestant", ["plain", "op", "prepared"])
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark: Any, name: str, contestant: str) -> None:
    make, precision = CASES[name]
    case = make()
    if contestant not in case.contestants:
        pytest.skip(f"{case.op} has no contestant {contestant!r}")
    run, data = case.contestants[contestant], case.data(0)
    benchmark.group = case.title
    with torch.no_grad(), tf32(precision == "tf32"):
        error, allowed, reason = case.judge(contestant)
        assert not reason, reason
        benchmark.extra_info.update(error=error, allowed=allowed, torch=torch.__version__, device=DEVICE)

        def timed() -> None:
            run(*data)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(timed)
