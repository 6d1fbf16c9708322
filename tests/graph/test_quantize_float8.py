"""``quantize`` in float8: a network of blocks on Triton's kernels, in the interpreter if there is no GPU."""

from __future__ import annotations

import pytest
import torch

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast._dtypes import FLOAT8
from resnet_fast.graph.quantize_layers import Convolution
from tests.graph.test_quantize_gpu import convolutions, images, network
from tests.triton_device import DEVICE, FORMS, kernels

pytestmark = pytest.mark.triton


def test_a_network_of_blocks_computes_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    with kernels(FORMS[0]):
        model = network().to(DEVICE)
        fast = rf.optimize(model, dtype=FLOAT8, calibration=[images()])
        found = convolutions(fast)
        assert len(found) == 6 and {module.backend for module in found} == {"triton float8"}
        assert {module.weight.dtype for module in found} == {FLOAT8} and not backends.fallbacks()
        y, exact = fast(images()), model(images())
        assert 0 < (y - exact).norm() < 0.1 * exact.norm()
        assert torch.equal(fast(images()[:1]), y[:1])
        assert fast(images()[:0]).shape == (0, 5)
        with backends.use("reference"):
            assert (fast(images()) - y).norm() < 0.02 * y.norm()
        x = images(3)
        x[1, 0, 2, 2] = float("inf")
        with pytest.warns(backends.FallbackWarning, match="runs again, exactly"):
            y = fast(x)
        assert torch.equal(y.isnan(), model(x).isnan())
    quantization = fast.quantization
    assert quantization is not None and quantization.precision == "float8" and quantization.bits == 8
    assert len(quantization.quantized) == 6 and "6 of 8 layers in float8" in repr(quantization)
    inputs = {layer.name: layer.input for layer in quantization.quantized}
    assert all(each is not None and each[0] > 0 and each[1] == 0 for each in inputs.values())
    with pytest.warns(
        backends.FallbackWarning, match="float8 is computed in float32, slowly: float8 is computed on GPUs"
    ):
        fast.cpu()(images().cpu())


def test_where_there_is_no_float8_nothing_is_quantized_and_a_warning_says_why() -> None:
    with pytest.warns(UserWarning, match="optimize: nothing is quantized: .*float8 is computed on GPUs only"):
        fast = rf.optimize(network(), dtype=FLOAT8, calibration=[images().cpu()], check=False)
    assert not convolutions(fast)
    if DEVICE == "cpu":
        with kernels("a100"), pytest.warns(UserWarning, match="float8 needs compute capability 8.9 or 9.0, .* has 8.0"):
            rf.quantize(network(), [images()], dtype=FLOAT8, float_dtype=torch.float32, check=False)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimize: dtype=torch.float8_e4m3fn needs calibration"):
        rf.optimize(network(), dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"quantize: dtype is torch.float8_e5m2; it must be torch.int8 or"):
        rf.quantize(network(), [images()], dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"round_image goes with dtype=torch.int8"):
        rf.quantize(network(), [images()], dtype=FLOAT8, round_image=True)


@pytest.mark.parametrize("fails", [True, False])
def test_a_wrong_convolution_stays_in_half_precision(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Convolution.forward

    def broken(self: Convolution, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if fails:
            raise RuntimeError("no such kernel")
        return forward(self, x, residual).zero_()

    monkeypatch.setattr(Convolution, "forward", broken)
    with kernels(FORMS[0]), pytest.warns(UserWarning, match="nothing is quantized"):
        fast = rf.optimize(network().to(DEVICE), dtype=FLOAT8, calibration=[images()], check=False)
    said = "fails: no such kernel" if fails else "gives other numbers than its definition"
    assert fast.quantization is not None and not fast.quantization.quantized
    assert f"Triton's float8 convolution {said}" in {layer.reason for layer in fast.quantization.layers}
