"""Define the ten ResNets with torchvision's signatures, module names, state_dict keys and initialisation.

Only the wiring is here: how a layer is computed is decided by `resnet_fast.nn.fused`, where checkpoints come from by
`resnet_fast.models.weights`. This file has no kernels and chooses no backend.
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import GenericAlias
from typing import Any, ParamSpec, TypeAlias, Union

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from resnet_fast.models import hub, stages
from resnet_fast.models import weights as _weights
from resnet_fast.models.checkpoint import WeightsError, load_into, read_checkpoint, read_with_metadata
from resnet_fast.nn import fused
from resnet_fast.nn.pristine import hooked, ordinary, watched, why_called

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

NormLayer: TypeAlias = Callable[..., nn.Module]
WeightsArgument: TypeAlias = Enum | str | os.PathLike[str] | None


def _conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_planes, out_planes, 3, stride=stride, padding=dilation, groups=groups, bias=False, dilation=dilation
    )


def _conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)


#: What runs the inner layers of a block, and its last one.
_USUAL: tuple[Any, Any] = (fused.conv_bn_act, fused.conv_bn_act)
_LEAN: tuple[Any, Any] = (fused.lean_inner, fused.lean_last)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385, figure 5 left).

    Raises:
        ValueError: for `groups` other than 1 or `base_width` other than 64.
        NotImplementedError: for `dilation` above 1.
    """

    expansion: int = 1
    memory_efficient: bool = False

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock: groups must be 1 and base_width 64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: dilation must be 1, got {dilation}; Bottleneck supports dilation")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        inner, last = _LEAN if self.memory_efficient else _USUAL
        out = inner(x, self.conv1, self.bn1, self.relu)
        identity = x if self.downsample is None else fused.shortcut(x, self.downsample, self.memory_efficient)
        out = last(out, self.conv2, self.bn2, self.relu, identity)
        return fused.laid_out(out, x, self.conv1, self.conv2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (arXiv:1512.03385, figure 5 right).

    The stride is in the 3x3 convolution ("ResNet v1.5"), where torchvision has it. With `stride_in_1x1` it is in the
    first 1x1, where the paper and its Caffe models have it ("v1"; transformers: `downsample_in_bottleneck`); a dilation
    belongs to the 3x3 either way.
    """

    expansion: int = 4
    memory_efficient: bool = False

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv1x1(inplanes, width, first)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        inner, last = _LEAN if self.memory_efficient else _USUAL
        out = inner(x, self.conv1, self.bn1, self.relu)
        out = inner(out, self.conv2, self.bn2, self.relu)
        identity = x if self.downsample is None else fused.shortcut(x, self.downsample, self.memory_efficient)
        out = last(out, self.conv3, self.bn3, self.relu, identity)
        return fused.laid_out(out, x, self.conv1, self.conv2, self.conv3)


for _block, _count in ((BasicBlock, 2), (Bottleneck, 3)):
    stages.know(_block, _count, functions=((fused, "shortcut"), (fused, "laid_out")))


class ResNet(nn.Module):
    """A ResNet for images of shape [N, 3, H, W] with `num_classes` outputs.

    Arguments (the last three excepted), attributes, children and state_dict are those of
    `torchvision.models.ResNet`; with the same seed the initial parameters are too. `conv1, bn1, relu, maxpool,
    layer1..4, avgpool, fc` can be called one by one, in order.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: how many blocks each of the four stages has.
        zero_init_residual: start the last BatchNorm of every block at zero, so that each block starts as identity.
        groups, width_per_group: groups and width of the 3x3 convolutions (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: three flags, one for each of layer2, layer3 and layer4.
        norm_layer: called with the number of channels; `torch.nn.BatchNorm2d` when None.
        memory_efficient: in training keep about half as much for the backward, with the same gradients: of a block its
            output and the outputs of all convolutions but the last, which the backward runs once more.
        stride_in_1x1: ResNet "v1", as first published (arXiv:1512.03385) and in Caffe: a `Bottleneck` has its stride
            in the first 1x1 instead of the 3x3. Where `replace_stride_with_dilation` takes a stride away there is
            none to place; the dilation stays in the 3x3. The state_dict does not say which of the two it is for.
        unpadded_pool: pool as the Caffe models do, 3x3 with stride 2 without padding, the size rounded up, instead of
            with padding 1. Of 224x224 images both make 56x56, with different numbers.

    Raises:
        ValueError: for a `replace_stride_with_dilation` without exactly three items, and for `stride_in_1x1` with
            blocks that are no `Bottleneck`.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        memory_efficient: bool = False,
        stride_in_1x1: bool = False,
        unpadded_pool: bool = False,
    ) -> None:
        super().__init__()
        self._norm_layer: NormLayer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.inplanes = 64
        self.dilation = 1
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must be None or have 3 items, got {dilate!r}")
        if stride_in_1x1 and not issubclass(block, Bottleneck):
            raise ValueError(f"stride_in_1x1 must be False for {block.__name__}, which has no 1x1 in front of its 3x3")
        self.stride_in_1x1 = stride_in_1x1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        padding = 0 if unpadded_pool else 1
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=padding, ceil_mode=unpadded_pool)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self.memory_efficient = memory_efficient
        self._initialise(zero_init_residual)

    @property
    def memory_efficient(self) -> bool:
        """Whether training keeps less for the backward; setting it changes every block."""
        return bool(self.__dict__.get("_memory_efficient", False))

    @memory_efficient.setter
    def memory_efficient(self, value: bool) -> None:
        self.__dict__["_memory_efficient"] = value
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                module.memory_efficient = value

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.constant_(module.weight, 1)
                nn.init.constant_(module.bias, 0)
        if not zero_init_residual:
            return
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                weight = getattr(last, "weight", None)
                if isinstance(weight, Tensor):
                    nn.init.constant_(weight, 0)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm = self._norm_layer
        out_planes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(_conv1x1(self.inplanes, out_planes, stride), norm(out_planes))

        # Passed only if it is set: a user's own block class need not accept it.
        option: dict[str, Any] = {"stride_in_1x1": True} if self.stride_in_1x1 else {}
        first = block(
            self.inplanes, planes, stride, downsample, self.groups, self.base_width, first_dilation, norm, **option
        )
        self.inplanes = out_planes
        rest = (
            block(
                out_planes,
                planes,
                groups=self.groups,
                base_width=self.base_width,
                dilation=self.dilation,
                norm_layer=norm,
            )
            for _ in range(1, blocks)
        )
        return nn.Sequential(first, *rest)

    def _forward_impl(self, x: Tensor) -> Tensor:
        images = x
        x = fused.stem(x, self.conv1, self.bn1, self.relu, self.maxpool, self.memory_efficient)
        nchw = fused.torch_gives_nchw(images if type(self.conv1) is nn.Conv2d else x, self.conv1)
        x = run_stages(self, ("layer1", "layer2", "layer3", "layer4"), x, nchw)
        return fused.head(stage_input(x, self.avgpool, nchw), self.avgpool, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [N, num_classes] of a floating point batch [N, 3, H, W], in any memory format.

        What another first layer in place of `conv1` takes is its affair.

        Raises:
            TypeError: if `x` is not a tensor, not floating point or, outside autocast, not of the parameters' dtype.
            ValueError: if `x` is not 4-D or has another number of channels than `conv1` takes.
        """
        check_images(x, self.conv1)
        return self._forward_impl(x)


TAKE_CHANNELS_LAST: set[type[nn.Module]] = {nn.Sequential, BasicBlock, Bottleneck, nn.AdaptiveAvgPool2d}
"""Layers of a network that compute the same, and no slower, whatever the memory format of their input."""


def stage_input(x: Tensor, layer: nn.Module, nchw: bool) -> Tensor:
    """Return the input for a layer: channels_last, which fused ops read without a copy.

    nchw: whether torch's layers would give it NCHW; then it gets that if it, or a hook, could tell the difference.
    """
    if not nchw:
        return x
    parts = (layer, *layer.children())
    seen = _has_any_global_hook() or hooked(*parts)
    for part in parts:
        seen = seen or type(part) not in TAKE_CHANNELS_LAST or "forward" in part.__dict__
    return x.contiguous() if seen else x.contiguous(memory_format=torch.channels_last)


def run_stages(net: nn.Module, names: Sequence[str], x: Tensor, nchw: bool) -> Tensor:
    """Return what stages of a network, one after the other, make of x; ``nchw`` as for :func:`stage_input`."""
    made = stages.run(net, names, x)
    if made is not None:
        return made
    for name in names:
        stage = getattr(net, name)
        x = stage(stage_input(x, stage, nchw))
    return x


def check_images(x: Tensor, first: Any) -> None:
    """Refuse images that a convolution as first layer cannot take; any other first layer checks for itself.

    Reads no symbolic size other than the channel count.
    """
    if isinstance(x, Proxy) or type(first) is not nn.Conv2d or why_called(first) or watched():
        return
    weight = first.weight
    if not ordinary(weight) or weight.dim() != 4 or (isinstance(x, Tensor) and not ordinary(x)):
        return
    channels = weight.shape[1] * first.groups
    expected = f"expected a floating point NCHW tensor of shape [N, {channels}, H, W]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{expected}, got {type(x).__name__}")
    if not x.is_floating_point():
        advice = "; convert it with x.float() / 255, then normalise" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{expected}, got {x.dtype} of shape {list(x.shape)}{advice}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"the image is {x.dtype}, the model's parameters are {weight.dtype}; convert one with "
            f"x.to({weight.dtype}) or model.to({x.dtype}), or use torch.autocast"
        )
    if x.dim() != 4:
        advice = "; x.unsqueeze(0) adds the batch dimension" if x.dim() == 3 else ""
        raise ValueError(f"{expected}, got {x.dim()}-D {x.dtype} of shape {list(x.shape)}{advice}")
    # Under torch.jit.trace sizes are tensors, and comparing them warns.
    if not torch.jit.is_tracing() and x.shape[1] != channels:  # type: ignore[attr-defined, no-untyped-call]
        advice = "; is it NHWC? x.permute(0, 3, 1, 2) makes it NCHW" if x.shape[3] == channels else ""
        raise ValueError(f"{expected}, got {x.dtype} of shape {list(x.shape)}{advice}")


def _fix(kwargs: dict[str, Any], name: str, value: Any, advice: str = "") -> None:
    """Set a keyword that the architecture or the weights decide; another value given by the caller is an error."""
    if kwargs.setdefault(name, value) != value:
        raise ValueError(f"{name} must be {value} here, got {kwargs[name]}{advice}")


@dataclass(frozen=True)
class Architecture:
    """What makes one of the ten: the arguments of `ResNet` that its function gives."""

    block: type[BasicBlock | Bottleneck]
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


ARCHITECTURES = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Architecture(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": Architecture(Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Architecture(Bottleneck, (3, 4, 23, 3), width_per_group=128),
}


def _resnet(name: str, weights: WeightsArgument, progress: bool, kwargs: dict[str, Any]) -> ResNet:
    """Make a model with the arguments of `ResNet`; those that make the architecture are given."""
    architecture = ARCHITECTURES[name]
    block, layers = architecture.block, architecture.layers
    for argument in ("groups", "width_per_group"):
        if (value := getattr(architecture, argument)) != getattr(Architecture, argument):
            _fix(kwargs, argument, value)
    chosen = _weights.resolve(name, weights)
    if chosen is None:
        return ResNet(block, layers, **kwargs)
    if isinstance(chosen, Enum):
        replace = "; for other classes replace the head afterwards: model.fc = nn.Linear(model.fc.in_features, ...)"
        _fix(kwargs, "num_classes", _weights.num_classes(chosen), replace)
        path = _weights.download(_weights.url(chosen), progress=progress)
        source, state = path.name, read_checkpoint(path)
    else:
        path = chosen
        source = weights if isinstance(weights, str) and weights.startswith(hub.PREFIX) else path.name
        state, metadata = read_with_metadata(path)
        if metadata.get("arch", name) in ARCHITECTURES.keys() - {name}:
            raise WeightsError(f"{source}: weights of {metadata['arch']}, not of {name}, by what is said of them")
        _check_wiring(path, metadata, kwargs)
        classifier = state.get("fc.weight")
        if classifier is not None and classifier.dim() == 2:
            kwargs.setdefault("num_classes", classifier.shape[0])
    model = ResNet(block, layers, **kwargs)
    load_into(model, state, source=source, name=name)
    return model


def _check_wiring(path: os.PathLike[str], metadata: Mapping[str, str], kwargs: dict[str, Any]) -> None:
    """Refuse weights with metadata of another wiring than asked for, which keys and shapes do not show.

    `resnet-fast convert --to torchvision` writes such files.
    """
    wrong = {
        name: metadata[name] == "true"
        for name in ("stride_in_1x1", "unpadded_pool")
        if name in metadata and (metadata[name] == "true") != bool(kwargs.get(name, False))
    }
    if wrong:
        needed = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise WeightsError(
            f"{path}: its weights belong to a network made with {needed}; with another one they would load, and give "
            "other answers"
        )


class _WeightsOf(GenericAlias):
    """``WeightsArgument`` of one model, in which its enum is found: torchvision's registry reads it there.

    The enum is looked up when the arguments are read, since torchvision is not imported before that.
    """

    def __new__(cls, model: str) -> "_WeightsOf":
        return super().__new__(cls, Union, (model,))  # type: ignore[arg-type]

    @property
    def __args__(self) -> tuple[Any, ...]:
        (model,) = super().__args__
        return (_weights.get_model_weights(model), str, os.PathLike[str], type(None))

    def __repr__(self) -> str:
        return " | ".join(getattr(kind, "__name__", str(kind)) for kind in self.__args__)


_P = ParamSpec("_P")

BUILDERS: dict[str, Callable[..., ResNet]] = {}
"""The functions of the ten models by name, in the order of their definition."""

_ARGUMENTS = """

    Args:
        weights: None for fresh parameters; a member of `resnet_fast.models.{enum}` (or torchvision's) or its name, such
            as "DEFAULT"; the path of a local `.pth`, `.pt` or `.safetensors` file, or of a folder of timm or
            transformers; or `hf://OWNER/NAME[@REVISION][/FILE]` on Hugging Face's hub.
        progress: show a progress bar while downloading.
        **kwargs: passed to `ResNet`. `num_classes` is taken from the weights if they are given.

    Raises:
        ValueError: for unknown weights, or a `num_classes` that is not theirs.
        WeightsError: if the weights cannot be downloaded or read, or do not fit.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> model = rf.{name}(num_classes=10).eval()
        >>> model(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
"""The rest of each model function's docstring."""


def _builder(builder: Callable[_P, ResNet]) -> Callable[_P, ResNet]:
    """Make a model's function behave as torchvision's: registrable, and callable in the deprecated ways.

    `builder(True)`, `builder(None, False)` and `builder(pretrained=True)` work with torchvision's warnings.
    """
    name = builder.__name__
    builder.__annotations__["weights"] = _WeightsOf(name)
    if builder.__doc__:  # python -OO drops docstrings
        builder.__doc__ += _ARGUMENTS.format(name=name, enum=_weights.enum_name(name))

    @functools.wraps(builder)
    def wrapper(*args: Any, **kwargs: Any) -> ResNet:
        if len(args) > 2:
            raise TypeError(f"{name}: at most weights and progress may be positional, got {len(args)} arguments")
        if args:
            positional = dict(zip(("weights", "progress"), args, strict=False))
            twice = sorted(positional.keys() & kwargs.keys())
            if twice:
                raise TypeError(f"{name}: got {twice[0]} both as a positional and as a keyword argument")
            warnings.warn(
                f"{name}: {' and '.join(positional)} given as positional argument(s); this is deprecated, "
                "please use keywords",
                stacklevel=2,
            )
            kwargs.update(positional)

        if "weights" in kwargs:
            value = kwargs["weights"]
            legacy = isinstance(value, int) or (isinstance(value, str) and value == "legacy")
            if legacy:
                pretrained = kwargs.pop("weights")
                kwargs.pop("pretrained", None)
        else:
            legacy = "pretrained" in kwargs
            if legacy:
                pretrained = kwargs.pop("pretrained")
                warnings.warn(
                    f"{name}: the parameter 'pretrained' is deprecated, please use 'weights' instead", stacklevel=2
                )
        if legacy:
            kwargs["weights"] = _weights.legacy_default(name) if pretrained else None
            better = f" ({type(kwargs['weights']).__name__}.DEFAULT is the most up-to-date)" if pretrained else ""
            warnings.warn(
                f"{name}: anything but a weights enum, a name, a path or None for 'weights' is deprecated; this call "
                f"means weights={kwargs['weights']}{better}",
                stacklevel=2,
            )
        return builder(**kwargs)  # type: ignore[call-arg]

    BUILDERS[name] = wrapper
    return wrapper


@_builder
def resnet18(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-18 (arXiv:1512.03385)."""
    return _resnet("resnet18", weights, progress, kwargs)


@_builder
def resnet34(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-34 (arXiv:1512.03385)."""
    return _resnet("resnet34", weights, progress, kwargs)


@_builder
def resnet50(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-50 (arXiv:1512.03385), stride in the 3x3 convolutions."""
    return _resnet("resnet50", weights, progress, kwargs)


@_builder
def resnet101(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-101 (arXiv:1512.03385), stride in the 3x3 convolutions."""
    return _resnet("resnet101", weights, progress, kwargs)


@_builder
def resnet152(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNet-152 (arXiv:1512.03385), stride in the 3x3 convolutions."""
    return _resnet("resnet152", weights, progress, kwargs)


@_builder
def resnext50_32x4d(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNeXt-50 32x4d (arXiv:1611.05431)."""
    return _resnet("resnext50_32x4d", weights, progress, kwargs)


@_builder
def resnext101_32x8d(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNeXt-101 32x8d (arXiv:1611.05431)."""
    return _resnet("resnext101_32x8d", weights, progress, kwargs)


@_builder
def resnext101_64x4d(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a ResNeXt-101 64x4d (arXiv:1611.05431)."""
    return _resnet("resnext101_64x4d", weights, progress, kwargs)


@_builder
def wide_resnet50_2(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a Wide ResNet-50-2 (arXiv:1605.07146), 3x3 convolutions twice as wide."""
    return _resnet("wide_resnet50_2", weights, progress, kwargs)


@_builder
def wide_resnet101_2(*, weights: WeightsArgument = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return a Wide ResNet-101-2 (arXiv:1605.07146), 3x3 convolutions twice as wide."""
    return _resnet("wide_resnet101_2", weights, progress, kwargs)
