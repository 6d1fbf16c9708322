"""``optimize(dtype=torch.int8)`` on a CPU: the answers of ``quantize``, errors and warnings in the caller's terms."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.graph import OptimizedModule
from tests.networks import conv_bn, randomise

CALIBRATION = [torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))]

Quantize = Callable[[nn.Module, Any], OptimizedModule]


def network() -> nn.Module:
    torch.manual_seed(3)
    return randomise(nn.Sequential(conv_bn(3, 16), nn.ReLU(), conv_bn(16, 16), nn.ReLU(), conv_bn(16, 8))).eval()


def by_optimize(model: nn.Module, batches: Any) -> OptimizedModule:
    return rf.optimize(model, dtype=torch.int8, calibration=batches, check=False)


def by_quantize(model: nn.Module, batches: Any) -> OptimizedModule:
    return rf.quantize(model, batches, check=False)


def test_it_is_quantize() -> None:
    fast = by_optimize(network(), CALIBRATION)
    assert fast.quantization is not None
    assert torch.equal(fast(CALIBRATION[0]), by_quantize(network(), CALIBRATION)(CALIBRATION[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "optimize: dtype=torch.int8 needs calibration"),
        ({"calibration": []}, "calibration goes with dtype=torch.int8 or torch.float8_e4m3fn, and dtype is None"),
        ({"dtype": torch.int8, "calibration": []}, "optimize: calibration holds no image"),
        ({"dtype": torch.int8, "calibration": [torch.full((1, 3, 8, 8), float("nan"))]}, r"optimize: calibration\[0\]"),
        ({"dtype": torch.int8, "calibration": [torch.rand(1, 5, 8, 8)]}, r"optimize: .*calibration\[0\]"),
        ({"dtype": torch.int8, "calibration": [], "backend": "cpu"}, "are not taken with dtype=torch.int8"),
        ({"dtype": torch.int8, "calibration": [], "example_inputs": np.ones(3)}, "are not taken with dtype=torch.int8"),
        ({"dtype": torch.uint8}, "or torch.int8 or torch.float8_e4m3fn with calibration"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rf.optimize(network(), **options)


@pytest.mark.parametrize("quantize", [by_optimize, by_quantize])
@pytest.mark.parametrize("fail", [lambda: json.loads("{"), lambda: b"\xff".decode(), lambda: int("quantize: x")])
def test_an_error_of_the_batches_is_their_own(quantize: Quantize, fail: Callable[[], object]) -> None:
    def batches() -> Iterator[Tensor]:
        yield CALIBRATION[0]
        fail()

    with pytest.raises(ValueError, match=r".") as own:
        fail()
    with pytest.raises(type(own.value)) as found:
        quantize(network(), batches())
    assert str(found.value) == str(own.value)
    assert vars(found.value) == vars(own.value)


def _hooked(model: nn.Module) -> nn.Module:
    model[2].register_forward_hook(lambda *_: None)  # type: ignore[index]
    return model


CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "int8": lambda model, batches: rf.optimize(model, dtype=torch.int8, calibration=batches),
    "quantize": lambda model, batches: rf.quantize(model, batches),
    "float": lambda model, batches: rf.optimize(model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", [_hooked, nn.Module.double])
def test_warnings_are_at_the_line_of_the_call(call: str, change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(network())
    batches = [CALIBRATION[0].to(next(model.parameters()).dtype)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        CALLS[call](model, batches)
    seen = [warning for warning in seen if warning.category is UserWarning]  # not of float64, which runs plain
    assert bool(seen) == (call != "float" or change is _hooked)
    line = CALLS[call].__code__.co_firstlineno
    assert {(warning.filename, warning.lineno) for warning in seen} <= {(__file__, line)}
    called = "quantize" if call == "quantize" else "optimize"
    assert {str(warning.message).partition(": ")[0] for warning in seen} <= {called}


def test_sizes_alone() -> None:
    fast = by_quantize(network(), CALIBRATION).to("meta")
    assert fast(torch.empty(3, 3, 9, 8, device="meta")).shape == (3, 8, 9, 8)
