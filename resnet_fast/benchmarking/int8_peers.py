"""The contestants in int8: this package, and the runtimes that run a quantized ONNX file; and what "right" is there.

ONNX Runtime's own static quantizer writes the file (QDQ, a scale for each output channel of a weight), which OpenVINO
reads as well. Everybody is calibrated on the same images. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.benchmarking.network import seeded_batches
from resnet_fast.benchmarking.peers import (
    Contestant,
    Peer,
    Task,
    export_onnx,
    plain,
    quiet,
    run_onnxruntime,
    run_openvino,
    torch_contestant,
)  # fmt: skip

_IMAGES = 8


def calibration(image_size: tuple[int, ...]) -> list[Tensor]:
    """Return the images that ranges are taken from: seeded, and others than those that are timed and judged."""
    return seeded_batches((1, *image_size), _IMAGES, seed=1001)


def simulated(model: nn.Module, batch: Tensor) -> Tensor:
    """Return what plain torch layers answer if convolutions, linear layers and the scores are rounded to 8 bits.

    By the simplest recipe: inputs and scores by their extremes over the calibration images, weights by the largest
    magnitude of each output channel. It is what answers in int8 are judged by.
    """
    layers = copy.deepcopy(plain(model)).float().eval()
    rounded = [module for module in layers.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    extremes: dict[nn.Module, tuple[float, float]] = {}

    def see(module: nn.Module, value: Tensor) -> None:
        low, high = extremes.get(module, (0.0, 0.0))
        extremes[module] = min(low, float(value.min())), max(high, float(value.max()))

    def to_8_bits(module: nn.Module, value: Tensor) -> Tensor:
        low, high = extremes[module]
        scale = max((high - low) / 255, 1e-18)
        return torch.fake_quantize_per_tensor_affine(value, scale, round(-low / scale), 0, 255)

    watching = [module.register_forward_pre_hook(lambda module, args: see(module, args[0])) for module in rounded]
    for image in calibration(tuple(batch.shape[1:])):
        see(layers, layers(image))
    for handle, module in zip(watching, rounded, strict=True):
        handle.remove()
        scale = module.weight.abs().flatten(1).amax(1).clamp_min(1e-18) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        module.weight.copy_(torch.fake_quantize_per_channel_affine(module.weight, scale, zero, 0, -127, 127))
        module.register_forward_pre_hook(lambda module, args: (to_8_bits(module, args[0]),))
    return to_8_bits(layers, layers(batch.float()))


def _build_quantized(task: Task) -> Contestant:
    from resnet_fast.graph import quantize

    model = copy.deepcopy(task.model).eval()
    fast = quantize(model, calibration(tuple(task.example.shape[1:])), round_image=True)
    layers = Counter(row.backend for row in fast.report().rows if row.backend)
    return replace(torch_contestant(fast, torch.float32), details={"layers_by_backend": dict(layers)})


def _quantized_file(task: Task) -> Path:
    """Write the quantized ONNX file once."""
    source = export_onnx(task)
    path = source.with_name(source.stem + "-int8.onnx")
    if path.exists():
        return path
    from onnxruntime import quantization

    shape = tuple(task.example.shape)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            images = torch.cat(calibration(shape[1:])).repeat(-(-shape[0] // _IMAGES), 1, 1, 1)
            self._batches: Iterator[Tensor] = iter(images.split(shape[0]))  # whole ones: the file has the batch's size

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None or len(batch) < shape[0] else {"image": batch.numpy()}

    with quiet():
        quantization.quantize_static(
            str(source), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
    return path


def _build_onnxruntime(task: Task) -> Contestant:
    return run_onnxruntime(_quantized_file(task), task)


def _build_openvino(task: Task) -> Contestant:
    return run_openvino(_quantized_file(task), task, "f32")


_NEEDS = ("onnxruntime", "onnx")
_INT8: dict[str, Any] = {"devices": ("cpu",), "dtypes": (torch.int8,)}
INT8_PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "optimize",
            "resnet_fast.quantize()",
            _build_quantized,
            **_INT8,
            ours=True,
            note="in int8 rf.quantize(round_image=True): the others round the image, too",
        ),
        Peer("onnxruntime", "ONNX Runtime, int8", _build_onnxruntime, _NEEDS, **_INT8),
        Peer("openvino", "OpenVINO, int8", _build_openvino, ("openvino", *_NEEDS), **_INT8),
    )
}
"""As ``peers.PEERS``; what `optimize` is there is `quantize` here, so that tables have one column for this package."""
