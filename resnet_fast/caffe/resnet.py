"""The published ResNet-50, 101 and 152 as Caffe has them: definitions, and conversion to torchvision's state_dict.

The definitions are those of KaimingHe/deep-residual-networks (arXiv:1512.03385), made by loops. Blocks have their
stride in the first 1x1 and the first pool is not padded, so a state_dict belongs to a model with ``stride_in_1x1=True``
and ``unpadded_pool=True``, which its keys do not say. No file is read or written here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from resnet_fast.models.resnet import Bottleneck, ResNet

from . import definition as d
from . import prototxt
from .errors import CaffeError
from .net import Net

#: How many blocks each of the four stages has, by depth.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

_EPS = 1e-5
"""What torch adds to a variance, and Caffe's default."""


def deploy_prototxt(depth: int) -> str:
    """The deploy definition of ResNet-50, 101 or 152 as a prototxt: input 1x3x224x224, 1000 classes, output ``prob``.

    Raises:
        ValueError: for another depth.
    """
    return prototxt.emit(deploy_definition(depth))


def deploy_definition(depth: int, num_classes: int = 1000) -> d.Definition:
    """What :func:`deploy_prototxt` says, as data. The classifier is named ``fc1000`` after its number of classes.

    Raises:
        ValueError: for a depth other than 50, 101 and 152, or less than one class.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    layers: list[d.Layer] = []

    def add(name: str, parameters: d.Parameters, *bottoms: str, in_place: bool = False) -> str:
        layers.append(d.Layer(name, parameters, bottoms, bottoms if in_place else (name,)))
        return bottoms[0] if in_place else name

    def conv(name: str, bottom: str, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> str:
        # Of all convolutions only ResNet-50's first has a bias.
        bias, pad = depth == 50 and name == "conv1", kernel // 2
        add(name, d.Convolution(outputs, (kernel,) * 2, (stride,) * 2, (pad,) * 2, bias_term=bias), bottom)
        batch_norm, scale = _norm_names(name)
        add(batch_norm, d.BatchNorm(use_global_stats=True), name, in_place=True)
        add(scale, d.Scale(bias_term=True), name, in_place=True)
        if relu:
            add(f"{name}_relu", d.ReLU(), name, in_place=True)
        return name

    x = add("pool1", d.Pooling("MAX", (3, 3), (2, 2)), conv("conv1", "data", 64, 7, 2))
    for stage, index, name in _blocks(depth):
        width, stride = 2 ** (stage + 4), 2 if stage > 2 and index == 0 else 1
        shortcut = x if index else conv(f"{name}_branch1", x, 4 * width, 1, stride, relu=False)
        y = conv(f"{name}_branch2a", x, width, 1, stride)
        y = conv(f"{name}_branch2b", y, width, 3)
        y = conv(f"{name}_branch2c", y, 4 * width, 1, relu=False)
        x = add(name, d.Eltwise(), shortcut, y)
        add(f"{name}_relu", d.ReLU(), x, in_place=True)
    x = add("pool5", d.Pooling("AVE", (7, 7)), x)
    x = add(f"fc{num_classes}", d.InnerProduct(num_classes), x)
    add("prob", d.Softmax(), x)
    return d.Definition(f"ResNet-{depth}", (d.Input("data", (1, 3, 224, 224)),), tuple(layers))


def _blocks(depth: int) -> Iterator[tuple[int, int, str]]:
    """Stage (2 to 5), index in the stage and Caffe's name of every block: res4a to res4f, or res4a, res4b1, ..."""
    for stage, count in enumerate(BLOCKS[depth], start=2):
        numbered = depth > 50 and stage in (3, 4)
        for index in range(count):
            yield stage, index, f"res{stage}{f'b{index}' if numbered and index else 'abcdef'[index]}"


def _norm_names(conv: str) -> tuple[str, str]:
    """Return the BatchNorm and the Scale layer behind a convolution."""
    rest = "_conv1" if conv == "conv1" else conv.removeprefix("res")
    return f"bn{rest}", f"scale{rest}"


def _pairs(depth: int) -> Iterator[tuple[str, str, str]]:
    """A convolution and its norm by torchvision's names, and the convolution by Caffe's, in torchvision's order."""
    yield "conv1", "bn1", "conv1"
    for stage, index, name in _blocks(depth):
        block = f"layer{stage - 1}.{index}"
        for number, letter in zip("123", "abc", strict=True):
            yield f"{block}.conv{number}", f"{block}.bn{number}", f"{name}_branch2{letter}"
        if index == 0:
            yield f"{block}.downsample.0", f"{block}.downsample.1", f"{name}_branch1"


# ------------------------------------------------------------------------------------------------ to torchvision's keys


def to_state_dict(net: Net) -> dict[str, Tensor]:
    """Return the weights of a Caffe ResNet under torchvision's keys, for ``rf.resnet50(stride_in_1x1=True,
    unpadded_pool=True)``, or 101 or 152: copies, in ``net``'s dtypes.

    A convolution's bias becomes part of the running mean behind it, blobs of BatchNorm are divided by their factor,
    and an eps other than 1e-5 becomes part of the running variance; all in float64, rounded once.

    Args:
        net: as the published definitions, with any number of classes, any name of the classifier, any size of the
            input that ``pool5`` averages over as a whole, any eps, and biases or none.

    Raises:
        CaffeError: naming the first layer that differs from the published definitions, or whose variance would
            become negative.
    """
    return _state(net)[1]


def to_resnet(net: Net) -> ResNet:
    """The same network as :class:`resnet_fast.models.ResNet`, in eval mode; it takes any size of image, and its output
    are scores, what Caffe's ``prob`` is the softmax of.

    Raises:
        CaffeError: as :func:`to_state_dict`.
    """
    depth, state = _state(net)
    with torch.device("meta"):
        classes = state["fc.weight"].shape[0]
        model = ResNet(Bottleneck, BLOCKS[depth], num_classes=classes, stride_in_1x1=True, unpadded_pool=True)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _state(net: Net) -> tuple[int, dict[str, Tensor]]:
    if not isinstance(net, Net):
        raise TypeError(f"expected the module that load() gives, got {type(net).__name__}")
    depth = _depth(net)
    source = net.definition.source or net.definition.name or "definition"
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for conv_key, norm_key, name in _pairs(depth):
            conv, batch_norm, scale = (_module(net, layer) for layer in (name, *_norm_names(name)))
            mean, variance = batch_norm.statistics(wide=True)
            if conv.bias is not None:
                mean = mean - conv.bias.double()
            if not math.isclose(batch_norm.eps, _EPS, rel_tol=1e-6):  # float32's 1e-5 is no other
                variance = variance + (batch_norm.eps - _EPS)
            if (variance < 0).any():
                raise CaffeError(
                    f"{source}: layer {_norm_names(name)[0]!r}: its variance, with eps {batch_norm.eps:.3g} expressed "
                    f"as torch's {_EPS:g}, would be {variance.min().item():.3g}; it must not be negative"
                )
            state[f"{conv_key}.weight"] = conv.weight.clone()
            state[f"{norm_key}.weight"] = scale.weight.clone()
            state[f"{norm_key}.bias"] = scale.bias.clone()
            state[f"{norm_key}.running_mean"] = mean.to(batch_norm.mean.dtype)
            state[f"{norm_key}.running_var"] = variance.to(batch_norm.variance.dtype)
            state[f"{norm_key}.num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)
        classifier = _module(net, _classifier(net.definition).name)
        weight, bias = classifier.weight, classifier.bias
        state["fc.weight"] = weight.clone()
        state["fc.bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
    return depth, state


def _module(net: Net, name: str) -> Any:
    return net.layer(name)


def _classifier(definition: d.Definition) -> d.Layer:
    return next(layer for layer in definition.layers if layer.type == "InnerProduct")


_ONLY = "; ResNet-50, 101 and 152 as published are what can be converted"


def _depth(net: Net) -> int:
    """Return which of the three the network is.

    Raises:
        CaffeError: if it is none of them.
    """
    definition = net.definition
    source = definition.source or definition.name or "definition"
    shapes = [entry.shape for entry in definition.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        shown = " and ".join("x".join(map(str, shape)) for shape in shapes)
        raise CaffeError(f"{source}: its input is {shown}; a ResNet has one input of Nx3xHxW")
    sizes = net.shapes(shapes[0])
    found = [_comparable(layer, definition, sizes) for layer in definition.layers]
    depth = min(BLOCKS, key=lambda depth: abs(len(deploy_definition(depth).layers) - len(found)))
    published = deploy_definition(depth)
    expected = [_comparable(layer, published, {"res5c": (1, 2048, 7, 7)}) for layer in published.layers]
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=False)):
        if ours != theirs:
            difference = "; ".join(_differences(theirs, ours))
            raise CaffeError(f"{source}: {definition.layers[index]}: not as in ResNet-{depth}: {difference}{_ONLY}")
    if len(found) > len(expected):
        raise CaffeError(
            f"{source}: {definition.layers[len(expected)]}: ResNet-{depth} has no layer behind 'prob'{_ONLY}"
        )
    if len(found) < len(expected):
        raise CaffeError(
            f"{source}: ends early: ResNet-{depth} has a layer {published.layers[len(found)].name!r} there{_ONLY}"
        )
    return depth


def _comparable(layer: d.Layer, definition: d.Definition, sizes: Mapping[str, tuple[int, ...]]) -> d.Layer:
    """The layer without what conversion takes as it is, see :func:`to_state_dict`; ``sizes`` are the blobs' shapes."""
    parameters = layer.parameters
    if isinstance(parameters, d.Convolution):
        return dataclasses.replace(layer, parameters=dataclasses.replace(parameters, bias_term=False))
    if isinstance(parameters, d.BatchNorm):
        # Stored statistics are used in inference unless it says false.
        stored = parameters.use_global_stats is not False
        return dataclasses.replace(layer, parameters=d.BatchNorm(stored, scale_bias=parameters.scale_bias))
    if isinstance(parameters, d.Pooling) and parameters.method == "AVE" and parameters.padding == (0, 0):
        whole = parameters.kernel in (None, sizes[layer.bottoms[0]][2:])
        return dataclasses.replace(layer, parameters=d.Pooling("AVE")) if whole else layer
    classifiers = [other for other in definition.layers if other.type == "InnerProduct"]
    if len(classifiers) != 1:
        return layer
    name = dict.fromkeys(classifiers[0].tops, "classifier")
    bottoms = tuple(name.get(bottom, bottom) for bottom in layer.bottoms)
    if isinstance(parameters, d.InnerProduct):
        parameters = dataclasses.replace(parameters, num_output=1, bias_term=True)
        return d.Layer("classifier", parameters, bottoms, tuple(name.values()), layer.line)
    return dataclasses.replace(layer, bottoms=bottoms)


def _differences(found: d.Layer, expected: d.Layer) -> Iterator[str]:
    """What of a layer is otherwise than it should be."""
    for name in ("name", "type", "bottoms", "tops"):
        have, want = getattr(found, name), getattr(expected, name)
        if have != want:
            yield f"{name} {_shown(have)}, {_shown(want)} was expected"
    if found.type == expected.type:
        for field in dataclasses.fields(found.parameters):
            have, want = getattr(found.parameters, field.name), getattr(expected.parameters, field.name)
            if have != want and want is None:
                yield f"{field.name} {_shown(have)} is not all of its input"
            elif have != want:
                yield f"{field.name} {_shown(have)}, {_shown(want)} was expected"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


# ---------------------------------------------------------------------------------------------- from torchvision's keys


def from_state_dict(state: Mapping[str, Tensor], depth: int) -> Net:
    """Return a Caffe ResNet with the weights of a state_dict with torchvision's keys, in eval mode; the way back.

    conv1's bias, where the definition has one, is 0, and every factor 1. The network gives what the model gives only
    if that has its strides in the first 1x1s and the unpadded pool, which torchvision's models do not have.

    Args:
        state: of a ResNet with bottleneck blocks; the number of classes is that of ``fc.weight``, and the widest dtype
            in it becomes the network's.
        depth: 50, 101 or 152.

    Raises:
        ValueError: for another depth.
        CaffeError: naming the first key that is missing, too many, or of another shape.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"from_state_dict: state is a {type(state).__name__}; a dict of tensors by name was expected")
    classifier = state.get("fc.weight")
    classes = classifier.shape[0] if classifier is not None and classifier.dim() == 2 else 1000
    net = Net(deploy_definition(depth, classes)).eval()
    dtypes = [value.dtype for value in state.values() if value.is_floating_point()]
    if dtypes:
        net.to(functools.reduce(torch.promote_types, dtypes))
    left = {key: value for key, value in state.items() if not key.endswith(".num_batches_tracked")}
    with torch.no_grad():
        for key, target in _targets(net, depth):
            if key not in left:
                raise CaffeError(f"state_dict: {key!r} is missing; ResNet-{depth} has it")
            value = left.pop(key)
            if value.shape != target.shape or not value.is_floating_point():
                raise CaffeError(
                    f"state_dict: {key!r} is {value.dtype} of shape {list(value.shape)}; ResNet-{depth} has floating "
                    f"point values of shape {list(target.shape)} there"
                )
            target.copy_(value)
    if left:
        others = f", nor {len(left) - 1} more of its keys" if len(left) > 1 else ""
        raise CaffeError(f"state_dict: ResNet-{depth} has no {min(left)!r}{others}")
    return net


def _targets(net: Net, depth: int) -> Iterator[tuple[str, Tensor]]:
    """torchvision's keys, and the tensor of ``net`` that each fills."""
    for conv_key, norm_key, name in _pairs(depth):
        conv, batch_norm, scale = (_module(net, layer) for layer in (name, *_norm_names(name)))
        yield f"{conv_key}.weight", conv.weight
        yield f"{norm_key}.weight", scale.weight
        yield f"{norm_key}.bias", scale.bias
        yield f"{norm_key}.running_mean", batch_norm.mean
        yield f"{norm_key}.running_var", batch_norm.variance
    classifier = _module(net, _classifier(net.definition).name)
    yield "fc.weight", classifier.weight
    yield "fc.bias", classifier.bias
