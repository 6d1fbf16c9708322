"""Caffe networks with random weights in which every term counts, and their files on disk. No tests here."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fast import caffe
from resnet_fast.caffe import caffemodel, layers, schema
from resnet_fast.caffe import definition as d

FACTOR = 999.98
"""What BatchNorm's sums are divided by: about where Caffe's own arrives, and no power of two."""

BRANCH_GAIN = 0.25
"""Of the last Scale of a residual branch, without which rounding errors double every few blocks."""


def randomize(net: caffe.Net, seed: int = 0) -> caffe.Net:
    """Gives every layer of ``net`` random values, in place; activations keep their size through 152 layers.

    Convolutions and InnerProducts keep the variance of what they read (doubled where a ReLU follows), with biases.
    BatchNorm's blobs are a mean around 0 and a variance around 1, times a factor of 999.98.
    """
    generator = torch.Generator().manual_seed(seed)
    rectified = _rectified(net.definition)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    with torch.no_grad():
        for layer in net.definition.layers:
            module = net.find(layer.name)
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | layers.InnerProduct):
                fan_in = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose2d):  # of the pixels that meet in one
                    fan_in = max(module.weight[:, 0].numel() // module.groups // math.prod(module.stride), 1)
                if isinstance(module, layers.InnerProduct) and module.transpose:
                    fan_in = module.weight.shape[0]
                bound = (3 * (2 if layer.tops[0] in rectified else 1) / max(fan_in, 1)) ** 0.5
                module.weight.copy_(uniform(module.weight, -bound, bound))
                if module.bias is not None:
                    module.bias.copy_(uniform(module.bias, -0.3, 0.3))
            elif isinstance(module, layers.BatchNorm):
                module.factor.fill_(FACTOR)
                module.mean.copy_(uniform(module.mean, -0.2, 0.2) * FACTOR)
                module.variance.copy_(uniform(module.variance, 0.7, 1.4) * FACTOR)
                if module.weight is not None and module.bias is not None:
                    module.weight.copy_(uniform(module.weight, 0.7, 1.3) * FACTOR**0.5)
                    module.bias.copy_(uniform(module.bias, 3.0, 9.0))
            elif isinstance(module, layers.PReLU):
                module.weight.copy_(uniform(module.weight, -0.5, 0.5))
            elif isinstance(module, layers.Scale):
                gain = BRANCH_GAIN if layer.name.endswith("branch2c") else 1.0
                if module.weight is not None:
                    module.weight.copy_(uniform(module.weight, 0.7 * gain, 1.3 * gain))
                if module.bias is not None:
                    module.bias.copy_(uniform(module.bias, -0.2 * gain, 0.2 * gain))
    return net


def _rectified(definition: d.Definition) -> set[str]:
    """The blobs that a ReLU overwrites."""
    return {layer.tops[0] for layer in definition.layers if layer.type == "ReLU" and layer.tops == layer.bottoms}


def definition(
    inputs: dict[str, d.Shape],
    *entries: tuple[str, d.Parameters, str] | tuple[str, d.Parameters, str, str],
) -> d.Definition:
    """A definition from entries of name, parameters, bottoms and tops (the name if left out), names split at spaces."""
    made = [
        d.Layer(name, p, tuple(bottoms.split()), tuple((tops or [name])[0].split()))
        for name, p, bottoms, *tops in entries
    ]
    return d.Definition("net", tuple(d.Input(name, shape) for name, shape in inputs.items()), tuple(made))


def network(source: str | d.Definition, seed: int = 0) -> caffe.Net:
    """The network of a prototxt's text, or of a definition, with random weights, in eval mode."""
    with torch.device("meta"):
        net = caffe.Net(caffe.parse_prototxt(source) if isinstance(source, str) else source)
    return randomize(net.to_empty(device="cpu"), seed).eval()


def resnet(depth: int, seed: int = 0) -> caffe.Net:
    """The published ResNet of this depth with random weights, in eval mode."""
    return network(caffe.deploy_prototxt(depth), seed)


def write(folder: Path, net: caffe.Net, name: str = "net") -> tuple[str, str]:
    """Writes prototxt and caffemodel into ``folder``; their paths."""
    files = str(folder / f"{name}.prototxt"), str(folder / f"{name}.caffemodel")
    caffe.save(net, *files)
    return files


def write_layers(
    path: Path, layers: Iterable[tuple[str, str, Sequence[Tensor | np.ndarray]]], name: str = "net"
) -> None:
    """Writes a caffemodel of layers with these names, types and blobs."""
    net, blobs = schema.message("NetParameter"), []
    net.name = name
    for layer, kind, own in layers:
        net.layer.add(name=layer, type=kind)
        blobs.append(own)
    caffemodel.write(path, net, blobs)


_READ = """
import sys
from resnet_fast import caffe
from resnet_fast.caffe import caffemodel

def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) // 1024

for path in sys.argv[1:]:
    before = peak()
    try:
        caffe.read_prototxt(path) if path.endswith(".prototxt") else caffemodel.read(path)
        message = "was read"
    except caffe.CaffeError as error:
        message = str(error)
    print(peak() - before, message, sep="|")
"""


def peak_memory(*paths: Path) -> list[tuple[int, str]]:
    """By how many MiB a process grows that reads these files, one after the other, and what it says of each."""
    command = [sys.executable, "-c", _READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = (line.split("|", 1) for line in done.stdout.splitlines())
    return [(int(grown), text) for grown, text in lines]


def feeds(net: caffe.Net, batch: int | None = None, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Inputs for ``net`` by name, of the declared shapes except for the batch and the size of images."""
    found = {}
    for number, entry in enumerate(net.definition.inputs):
        shape = list(entry.shape)
        shape[0] = shape[0] if batch is None else batch
        if size is not None and len(shape) == 4:
            shape[2:] = size
        found[entry.name] = image(*shape, seed=number + 1)
    return found


def image(*shape: int, seed: int = 1) -> Tensor:
    """A float32 normal random input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- references


def reference(net: caffe.Net, inputs: dict[str, Tensor], dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Every blob of ``net`` in inference, by numpy from Caffe's definitions of the layers, computed in ``dtype``."""
    blobs = {name: value.detach().numpy().astype(dtype) for name, value in inputs.items()}
    for layer in net.definition.layers:
        bottoms = [blobs[name] for name in layer.bottoms]
        own = [] if (module := net.find(layer.name)) is None else list(layers.blobs(module).values())
        values = [tensor.detach().double().numpy().astype(dtype) for tensor in own]
        if isinstance(layer.parameters, d.Slice):
            p, parts = layer.parameters, len(layer.tops)
            blobs.update(zip(layer.tops, np.split(bottoms[0], p.slice_point or parts, p.axis), strict=True))
            continue
        top = _computed(layer.parameters, bottoms, values)
        assert top.dtype == dtype
        blobs.update(dict.fromkeys(layer.tops, top))
    return blobs


def _computed(p: d.Parameters, bottoms: list[np.ndarray], own: list[np.ndarray]) -> np.ndarray:
    x = bottoms[0]
    if isinstance(p, d.Convolution):
        return _convolved(p, x, *own)
    if isinstance(p, d.BatchNorm):
        mean, variance, factor, *affine = own
        inverse = 0 if factor[0] == 0 else 1 / factor[0]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        if affine:  # NVIDIA's: the third blob is not used
            spread = np.sqrt(variance + x.dtype.type(max(p.eps, np.float32(1e-5)))).reshape(shape)
            return (x - mean.reshape(shape)) / spread * affine[0].reshape(shape) + affine[1].reshape(shape)
        spread = np.sqrt(variance * inverse + x.dtype.type(p.eps))
        return (x - (mean * inverse).reshape(shape)) / spread.reshape(shape)
    if isinstance(p, d.Scale):
        operands = (bottoms[1:] + own)[:2]  # the second bottom takes the place of the first parameter
        axis = p.axis % x.ndim
        shape = (*operands[0].shape, *(1,) * (x.ndim - axis - operands[0].ndim))
        result = x * operands[0].reshape(shape)
        return result + operands[1].reshape(shape) if p.bias_term else result
    if isinstance(p, d.ReLU):
        return np.where(x > 0, x, x * x.dtype.type(p.negative_slope))
    if isinstance(p, d.Eltwise):
        if p.operation == "SUM":
            return sum(y * x.dtype.type(c) for y, c in zip(bottoms, p.coeff or (1,) * len(bottoms), strict=True))
        return (np.multiply if p.operation == "PROD" else np.maximum).reduce(bottoms)
    if isinstance(p, d.Pooling):
        return pooled(p, x)
    if isinstance(p, d.InnerProduct):
        axis = p.axis % x.ndim
        flat = x.reshape(*x.shape[:axis], int(np.prod(x.shape[axis:])))
        result = flat @ (own[0] if p.transpose else own[0].T)
        return result + own[1] if p.bias_term else result
    if isinstance(p, d.Softmax):
        raised = np.exp(x - x.max(p.axis, keepdims=True))
        return raised / raised.sum(p.axis, keepdims=True)
    if isinstance(p, d.Concat):
        return np.concatenate(bottoms, p.axis)
    if isinstance(p, d.Deconvolution):
        return _deconvolved(p, x, *own)
    if isinstance(p, d.LRN):
        return _normalised(p, x)
    if isinstance(p, d.PReLU):
        slope = own[0] if p.channel_shared else own[0].reshape(-1, *(1,) * (x.ndim - 2))
        return np.maximum(x, 0) + slope * np.minimum(x, 0)
    if isinstance(p, d.ELU):
        return np.maximum(x, 0) + x.dtype.type(p.alpha) * np.expm1(np.minimum(x, 0))
    if isinstance(p, d.Sigmoid):
        return 1 / (1 + np.exp(-x))
    if isinstance(p, d.TanH):
        return np.tanh(x)
    if isinstance(p, d.Power):
        power, scale, shift = (x.dtype.type(value) for value in (p.power, p.scale, p.shift))
        if power * scale == 0:
            return np.full_like(x, 1 if power == 0 else shift**power)
        return (shift + scale * x) ** power
    if isinstance(p, d.Axpy):
        return x.reshape(*x.shape[:2], *(1,) * (bottoms[1].ndim - 2)) * bottoms[1] + bottoms[2]
    if isinstance(p, d.Crop):
        return _cropped(p, x, bottoms[1])
    if isinstance(p, d.Flatten | d.Reshape):
        return x.reshape(reshaped(p, x.shape))
    assert isinstance(p, d.Dropout | d.Split)
    return x


def reshaped(p: d.Flatten | d.Reshape, x: d.Shape) -> list[int]:
    """The shape that Caffe's Flatten or Reshape gives a blob of shape ``x``."""
    if isinstance(p, d.Flatten):
        begin, end = p.axis % len(x), p.end_axis % len(x)
        return [*x[:begin], int(np.prod(x[begin : end + 1])), *x[end + 1 :]]
    begin = p.axis if p.axis >= 0 else len(x) + p.axis + 1
    end = len(x) if p.num_axes == -1 else begin + p.num_axes
    top = [*x[:begin], *p.dims, *x[end:]]
    for index, size in enumerate(p.dims):
        if size == 0:
            top[begin + index] = x[begin + index]
    if -1 in p.dims:
        place = begin + p.dims.index(-1)
        top[place] = int(np.prod(x)) // int(np.prod(top[:place] + top[place + 1 :]))
    return top


def _cropped(p: d.Crop, x: np.ndarray, like: np.ndarray) -> np.ndarray:
    for axis in range(p.axis % x.ndim, x.ndim):
        begin = 0
        if p.offset:
            begin = p.offset[0] if len(p.offset) == 1 else p.offset[axis - p.axis % x.ndim]
        x = np.take(x, range(begin, begin + like.shape[axis]), axis)
    return x


def _normalised(p: d.LRN, x: np.ndarray) -> np.ndarray:
    """One window after the other, cut at the blob's edges."""
    reach, kind = p.local_size // 2, x.dtype.type
    square, scale = x * x, np.empty_like(x)
    if p.norm_region == "ACROSS_CHANNELS":
        for c in range(x.shape[1]):
            total = square[:, max(c - reach, 0) : c + reach + 1].sum(1)
            scale[:, c] = kind(p.k) + kind(p.alpha) / kind(p.local_size) * total
    else:
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                window = square[
                    :, :, max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1
                ]
                scale[:, :, row, column] = 1 + kind(p.alpha) * (window.sum((2, 3)) / kind(p.local_size**2))
    return x * scale ** kind(-p.beta)


def _deconvolved(p: d.Deconvolution, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Every pixel adds its multiple of the kernel to the top, of which the padding is cut off."""
    (top, left), (down, right), (far, wide) = p.padding, p.stride, p.dilation
    rows = down * (x.shape[2] - 1) + far * (p.kernel[0] - 1) + 1
    columns = right * (x.shape[3] - 1) + wide * (p.kernel[1] - 1) + 1
    result = np.zeros((x.shape[0], p.num_output, rows, columns), x.dtype)
    each_in, each_out = x.shape[1] // p.group, p.num_output // p.group
    for g in range(p.group):
        part = x[:, g * each_in : (g + 1) * each_in]
        filters = weight[g * each_in : (g + 1) * each_in]
        for r in range(p.kernel[0]):
            for s in range(p.kernel[1]):
                added = np.einsum("nchw,ck->nkhw", part, filters[:, :, r, s])
                place = result[:, g * each_out : (g + 1) * each_out, r * far :: down, s * wide :: right]
                place[:, :, : x.shape[2], : x.shape[3]] += added
    result = result[:, :, top : rows - top, left : columns - left]
    return result if bias is None else result + bias[:, None, None]


def _convolved(p: d.Convolution, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    (top, left), (down, right), (far, wide) = p.padding, p.stride, p.dilation
    x = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    rows = (x.shape[2] - far * (p.kernel[0] - 1) - 1) // down + 1
    columns = (x.shape[3] - wide * (p.kernel[1] - 1) - 1) // right + 1
    x = x.reshape(x.shape[0], p.group, x.shape[1] // p.group, *x.shape[2:])
    weight = weight.reshape(p.group, -1, *weight.shape[1:])
    result = np.zeros((x.shape[0], p.group, weight.shape[1], rows, columns), x.dtype)
    for r in range(p.kernel[0]):
        for s in range(p.kernel[1]):
            place = x[..., r * far :: down, s * wide :: right][..., :rows, :columns]
            result += np.einsum("ngchw,gkc->ngkhw", place, weight[..., r, s])
    result = result.reshape(len(result), p.num_output, rows, columns)
    return result if bias is None else result + bias[:, None, None]


def window_counts(p: d.Pooling, size: tuple[int, int]) -> list[int]:
    """How many windows Caffe takes in each direction; 0 or less where it fails."""
    assert p.kernel is not None
    rounded = np.ceil if p.round_mode == "CEIL" else np.floor
    counts = []
    for length, kernel, stride, pad in zip(size, p.kernel, p.stride, p.padding, strict=True):
        count = int(rounded((length + 2 * pad - kernel) / stride)) + 1
        if p.padding != (0, 0) and (count - 1) * stride >= length + pad:  # it has to begin within image and padding
            count -= 1
        counts.append(count)
    return counts


def pooled(p: d.Pooling, x: np.ndarray) -> np.ndarray:
    """Pooling of x [N, C, H, W] as Caffe's loops do it, one window after the other.

    Sizes, windows and divisors follow the prose in Caffe's documentation and src/caffe/layers/pooling_layer.cpp.
    """
    height, width = x.shape[2:]
    if p.kernel is None:
        p = d.Pooling(p.method, (height, width))
    assert p.kernel is not None
    rows, columns = window_counts(p, (height, width))
    lowest = np.finfo(x.dtype).min
    result = np.full((*x.shape[:2], rows, columns), lowest, x.dtype)
    for row in range(rows):
        top = row * p.stride[0] - p.padding[0]
        for column in range(columns):
            left = column * p.stride[1] - p.padding[1]
            window = x[:, :, max(top, 0) : max(top + p.kernel[0], 0), max(left, 0) : max(left + p.kernel[1], 0)]
            if p.method == "MAX":
                result[:, :, row, column] = window.max((2, 3), initial=lowest)
                continue
            lines = min(top + p.kernel[0], height + p.padding[0]) - top
            places = min(left + p.kernel[1], width + p.padding[1]) - left
            with np.errstate(invalid="ignore", divide="ignore"):
                result[:, :, row, column] = window.sum((2, 3), dtype=x.dtype) / x.dtype.type(lines * places)
    return result


# -------------------------------------------------------------------------------------------------------------- graphs

_DATA = {"data": (2, 6, 13, 29)}
_NORM = d.BatchNorm(eps=1e-3)


def _conv(outputs: int, kernel: int = 3, bias: bool = True) -> d.Convolution:
    return d.Convolution(outputs, (kernel,) * 2, padding=(kernel // 2,) * 2, bias_term=bias)


GRAPHS: dict[str, d.Definition] = {
    "convolution": definition(
        _DATA,
        ("groups", d.Convolution(8, (3, 5), (2, 1), (1, 3), group=2), "data"),
        ("dilated", d.Convolution(6, (3, 2), (1, 2), (3, 1), (2, 3), bias_term=False), "groups"),
        ("depthwise", d.Convolution(12, (1, 3), (1, 1), (0, 1), group=6), "dilated"),
    ),
    "sum with coefficients": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("b", _conv(6, 1), "data"),
        ("sum", d.Eltwise("SUM", (0.5, -1.0)), "a b"),
        ("sum_relu", d.ReLU(), "sum", "sum"),
    ),
    "difference": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("norm", _NORM, "a", "a"),
        ("scale", d.Scale(bias_term=True), "a", "a"),
        ("difference", d.Eltwise("SUM", (-1.0, 1.0)), "a data"),
    ),
    "sum of three": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("b", _conv(6, 1), "data"),
        ("sum", d.Eltwise("SUM", (1.0, 2.0, 0.25)), "a b data"),
    ),
    "product": definition(_DATA, ("a", _conv(6), "data"), ("product", d.Eltwise("PROD"), "a data")),
    "maximum": definition(_DATA, ("a", _conv(6), "data"), ("maximum", d.Eltwise("MAX"), "a data")),
    "product of three": definition(
        _DATA, ("a", _conv(6), "data"), ("b", _conv(6, 1), "data"), ("product", d.Eltwise("PROD"), "a b data")
    ),
    "scale alone": definition(
        _DATA, ("a", _conv(5), "data"), ("scale", d.Scale(bias_term=True), "a", "a"), ("relu", d.ReLU(), "a", "a")
    ),
    "scale without bias": definition(
        _DATA, ("a", _conv(5, bias=False), "data"), ("scale", d.Scale(), "a", "a"), ("relu", d.ReLU(), "a", "a")
    ),
    "scale of many axes": definition(
        {"data": (2, 3, 4, 5)},
        ("columns", d.Scale(axis=3, bias_term=True), "data"),
        ("sizes", d.Scale(axis=2, num_axes=-1), "columns"),
        ("middle", d.Scale(axis=1, num_axes=2, bias_term=True), "sizes"),
    ),
    "scale from the back": definition({"data": (2, 3, 4, 5)}, ("a", d.Scale(axis=-2, num_axes=2), "data")),
    "scale by one number": definition(
        {"data": (2, 3, 4, 5)}, ("a", _conv(4), "data"), ("one", d.Scale(num_axes=0, bias_term=True), "a", "a")
    ),
    "scale of a column": definition(
        {"data": (2, 6, 3, 3)},
        ("a", d.Convolution(4, (3, 3)), "data"),
        ("scale", d.Scale(num_axes=-1, bias_term=True), "a", "a"),
        ("relu", d.ReLU(), "a", "a"),
    ),
    "scale by a blob": definition({"data": (2, 3, 4, 5), "gate": (2, 3)}, ("gated", d.Scale(axis=0), "data gate")),
    "scale by a line": definition(
        {"data": (2, 3, 4, 5), "line": (5,)}, ("lined", d.Scale(axis=3, bias_term=True), "data line")
    ),
    "leaky": definition(_DATA, ("a", _conv(5), "data"), ("norm", _NORM, "a", "a"), ("leaky", d.ReLU(0.125), "a", "a")),
    "norm first": definition(
        _DATA,
        ("norm", _NORM, "data"),
        ("scale", d.Scale(bias_term=True), "norm", "norm"),
        ("relu", d.ReLU(), "norm", "norm"),
        ("a", _conv(5), "norm"),
    ),
    "concat": definition(
        _DATA,
        ("a", _conv(5), "data"),
        ("a_relu", d.ReLU(), "a", "a"),
        ("b", _conv(3, 1), "data"),
        ("b_norm", _NORM, "b", "b"),
        ("b_relu", d.ReLU(), "b", "b"),
        ("channels", d.Concat(), "a b"),
        ("rows", d.Concat(-2), "channels channels"),
    ),
    "pools": definition(
        _DATA,
        ("a", _conv(5), "data"),
        ("average", d.Pooling("AVE", (3, 3), (2, 2), (1, 1)), "a"),
        ("largest", d.Pooling("MAX", (2, 3), (1, 2), (1, 0), "FLOOR"), "average"),
        ("all", d.Pooling("AVE"), "largest"),
    ),
    "stem": definition(
        {"data": (2, 3, 29, 37)},
        ("a", d.Convolution(8, (7, 7), (2, 2), (3, 3)), "data"),
        ("norm", _NORM, "a", "a"),
        ("scale", d.Scale(bias_term=True), "a", "a"),
        ("relu", d.ReLU(), "a", "a"),
        ("pool", d.Pooling("MAX", (3, 3), (2, 2)), "a"),
        ("largest", d.Pooling("MAX"), "pool"),
    ),
    "head": definition(
        {"data": (2, 6, 7, 5)},
        ("a", _conv(5), "data"),
        ("pool", d.Pooling("AVE", (7, 5)), "a"),
        ("drop", d.Dropout(0.4), "pool", "pool"),
        ("score", d.InnerProduct(7), "pool"),
        ("prob", d.Softmax(), "score"),
    ),
    "inner products": definition(
        {"data": (2, 3, 4, 5)},
        ("last", d.InnerProduct(6, axis=-1), "data"),
        ("sizes", d.InnerProduct(7, bias_term=False, axis=2), "last"),
        ("all", d.InnerProduct(4), "sizes"),
    ),
    "transposed": definition(
        {"data": (2, 3, 4, 5)},
        ("sizes", d.InnerProduct(7, axis=2, transpose=True), "data"),
        ("all", d.InnerProduct(4, bias_term=False, transpose=True), "sizes"),
    ),
    "softmax": definition(_DATA, ("rows", d.Softmax(2), "data"), ("channels", d.Softmax(-3), "rows")),
    "split": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("split", d.Split(), "a", "left right"),
        ("left_relu", d.ReLU(), "left", "left"),
        ("norm", d.BatchNorm(), "right", "right"),
        ("sum", d.Eltwise(), "left right"),
    ),
    "overwritten": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("early", d.ReLU(0.5), "a"),
        ("norm", _NORM, "a", "a"),
        ("scale", d.Scale(bias_term=True), "a", "a"),
        ("relu", d.ReLU(), "a", "a"),
        ("sum", d.Eltwise(), "early a"),
    ),
    "sum behind norm": definition(
        _DATA, ("norm", d.BatchNorm(), "data"), ("relu", d.ReLU(), "norm"), ("sum", d.Eltwise(), "norm relu")
    ),
    "squeeze and excitation": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("norm", _NORM, "a", "a"),
        ("scale", d.Scale(bias_term=True), "a", "a"),
        ("squeeze", d.Pooling("AVE"), "a"),
        ("up", _conv(6, 1), "squeeze"),
        ("gate", d.Sigmoid(), "up", "up"),
        ("sum", d.Axpy(), "up a data"),
        ("sum_relu", d.ReLU(), "sum", "sum"),
    ),
    "axpy of columns": definition(
        {"data": (2, 3, 5, 4)}, ("gate", d.InnerProduct(3), "data"), ("sum", d.Axpy(), "gate data data")
    ),
    "activations": definition(
        _DATA,
        ("a", _conv(5), "data"),
        ("elu", d.ELU(0.5), "a"),
        ("b", _conv(4), "elu"),
        ("tanh", d.TanH(), "b", "b"),
        ("c", _conv(3), "b"),
        ("prelu", d.PReLU(), "c", "c"),
        ("sigmoid", d.Sigmoid(), "c"),
    ),
    "prelu of one slope": definition(
        _DATA, ("a", _conv(5), "data"), ("prelu", d.PReLU(channel_shared=True), "a", "a"), ("b", _conv(3), "a")
    ),
    "prelu of columns": definition({"data": (2, 7)}, ("prelu", d.PReLU(), "data")),
    "powers": definition(
        {"data": (2, 3, 5, 4)},
        ("square", d.Power(2.0, 0.5, -0.25), "data"),
        ("root", d.Power(0.5, 2.0, 1.0), "square"),
        ("inverse", d.Power(-1.0, 1.0, 0.5), "root"),
        ("linear", d.Power(1.0, -3.0, 0.0), "inverse", "inverse"),
        ("cube", d.Power(3.0), "inverse"),
    ),
    "power of nothing": definition(
        {"data": (2, 3, 5, 4)}, ("one", d.Power(0.0, 2.0, 3.0), "data"), ("sum", d.Eltwise(), "data one")
    ),
    "power of a constant": definition(
        {"data": (2, 3, 5, 4)}, ("nine", d.Power(2.0, 0.0, 3.0), "data"), ("sum", d.Eltwise(), "data nine")
    ),
    "responses": definition(
        {"data": (2, 7, 6, 5)},
        ("across", d.LRN(5, 2.0, 0.75), "data"),
        ("few", d.LRN(3, 0.5, 0.5), "across"),
        ("within", d.LRN(3, 3.0, 0.75, "WITHIN_CHANNEL"), "few"),
    ),
    "response of all channels": definition({"data": (2, 7, 6, 5)}, ("across", d.LRN(15, 0.5, 0.5, k=2.0), "data")),
    "response of a channel": definition(
        {"data": (2, 3, 3, 4)}, ("within", d.LRN(9, 3.0, 0.75, "WITHIN_CHANNEL", k=5.0), "data")
    ),
    "deconvolution": definition(
        {"data": (2, 6, 5, 4)},
        ("a", d.Deconvolution(4, (4, 3), (2, 3), (1, 0), group=2), "data"),
        ("relu", d.ReLU(), "a", "a"),
        ("b", d.Deconvolution(4, (4, 4), (2, 2), (1, 1), group=4, bias_term=False), "a"),
        ("c", d.Deconvolution(3, (2, 3), (1, 1), (0, 2)), "b"),
    ),
    "deconvolution with holes": definition(
        {"data": (2, 4, 5, 4)}, ("a", d.Deconvolution(6, (3, 2), (2, 1), (1, 2), (2, 3)), "data")
    ),
    "segmentation": definition(
        {"data": (1, 3, 13, 18)},
        ("a", d.Convolution(4, (3, 3), (2, 2), (1, 1)), "data"),
        ("a_relu", d.ReLU(), "a", "a"),
        ("b", d.Convolution(5, (3, 3), (2, 2), (1, 1)), "a"),
        ("up2", d.Deconvolution(5, (4, 4), (2, 2), bias_term=False), "b"),
        ("skip", _conv(5, 1), "a"),
        ("up2c", d.Crop(offset=(1,)), "up2 skip"),
        ("sum", d.Eltwise(), "up2c skip"),
        ("up4", d.Deconvolution(5, (4, 4), (2, 2), bias_term=False), "sum"),
        ("score", d.Crop(2, (1, 2)), "up4 data"),
    ),
    "crop of channels": definition(
        {"data": (2, 7, 5, 4), "like": (2, 3, 4, 4)}, ("crop", d.Crop(-3, (2, 1, 0)), "data like")
    ),
    "crop of nothing": definition({"data": (2, 3, 5, 4), "like": (9, 9, 5, 2)}, ("crop", d.Crop(), "data like")),
    "slices": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("cut", d.Slice(1, (1, 3)), "a", "one two three"),
        ("one_relu", d.ReLU(), "one", "one"),
        ("b", _conv(2), "two"),
        ("together", d.Concat(), "three one b"),
    ),
    "slices of lines": definition(
        {"data": (2, 3, 6, 4)},
        ("cut", d.Slice(-2), "data", "one two three"),
        ("sum", d.Eltwise("SUM", (1.0, -2.0, 0.5)), "one two three"),
    ),
    "shapes": definition(
        {"data": (2, 6, 4, 3)},
        ("a", _conv(6), "data"),
        ("shuffled", d.Reshape((0, 2, 3, -1)), "a"),
        ("middle", d.Reshape((3, -1), 1, 2), "shuffled"),
        ("flat", d.Flatten(), "middle"),
        ("score", d.InnerProduct(5), "flat"),
    ),
    "shape of an image": definition({"data": (2, 3)}, ("image", d.Reshape((1, 1), -1, 0), "data")),
    "flat in the middle": definition({"data": (2, 3, 4, 5)}, ("flat", d.Flatten(-3, 2), "data")),
    "shape to the end": definition({"data": (2, 3, 4, 5)}, ("last", d.Reshape((5, 4), -3), "data")),
    "norm of five blobs": definition(
        _DATA,
        ("a", _conv(6), "data"),
        ("norm", d.BatchNorm(True, eps=1e-6, scale_bias=True), "a", "a"),
        ("relu", d.ReLU(), "a", "a"),
        ("after", d.BatchNorm(scale_bias=True), "a"),
    ),
    "dropout of any ratio": definition(
        _DATA,
        ("a", _conv(3), "data"),
        ("none", d.Dropout(0.0), "a", "a"),
        ("b", _conv(3), "a"),
        ("all", d.Dropout(1.0), "b"),
        ("more", d.Dropout(7.0), "all"),
    ),
}
"""Small networks that are no ResNets, by what is special about them."""
