"""Make a live model of resnet_fast from a ResNet of torchvision, timm or transformers, or from its checkpoint.

A network is taken only if each of its layers is one that `resnet_fast.models.ResNet` has in that place, and nobody has
hooks in it or has replaced its methods. Anything else is refused: `resnet_fast.optimize` takes networks as they are.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.models import hub
from resnet_fast.models.checkpoint import WeightsError, load_into, read_with_metadata, state_of
from resnet_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from resnet_fast.nn.pristine import hooked, is_frozen_batch_norm
from resnet_fast.ops.common import as_pair

__all__ = ["from_timm", "from_torchvision", "from_transformers"]

Source = nn.Module | Mapping[str, Any] | str | os.PathLike[str]

_METHODS = (
    "forward", "_forward_impl", "forward_features", "forward_head", "_conv_forward", "_check_input_dim", "_call_impl",
    "__call__",
)  # fmt: skip
"""What a call of a module goes through, here or there."""


@dataclass(frozen=True)
class _Library:
    """What is to be known of another library's ResNets.

    Attributes:
        networks, parts: their classes, as `module:name`; parts are those of layers within layers.
        headless: the one of the networks that has no classifier.
        rename: the name of a layer in ours; None if ours has none. Called with the names of all layers too.
        pool: whether a layer is a global average that also flattens.
        problem: what the network does besides calling its layers that ours does not; "" if nothing.
    """

    name: str
    networks: tuple[str, ...]
    parts: tuple[str, ...]
    rename: Callable[[str, Mapping[str, nn.Module]], str | None]
    headless: str = ""
    pool: Callable[[Any], bool] = lambda pool: False
    problem: Callable[[Any], str] = lambda network: ""

    @property
    def function(self) -> str:
        return f"from_{self.name}"

    def classes(self, *names: str) -> list[type[nn.Module]]:
        """Return the classes, as far as their modules were imported: there are no instances of others."""
        pairs = (name.split(":") for name in names)
        return [getattr(sys.modules[module], name) for module, name in pairs if module in sys.modules]


def _of_timm(name: str, layers: Mapping[str, nn.Module]) -> str | None:
    if name == "global_pool":
        return "avgpool"
    if name.endswith(".drop_path"):  # of rate 0, or it would have been refused
        return None
    return re.sub(r"(^|\.)act\d$", r"\1relu", name)


def _timms_pool(pool: Any) -> bool:
    select, fast = _TIMM.classes(*_TIMM.parts[-2:])
    if type(pool) is not select:
        return False
    if type(pool.pool) is fast:
        return bool(pool.pool.flatten) and pool.pool.dim == (2, 3) and type(pool.flatten) is nn.Identity
    average = type(pool.pool) is nn.AdaptiveAvgPool2d and as_pair(pool.pool.output_size) == (1, 1)
    return average and type(pool.flatten) is nn.Flatten and pool.flatten.start_dim == 1


def _timms_problem(network: Any) -> str:
    if network.drop_rate:
        return f"drop_rate is {network.drop_rate}; resnet_fast's networks have no dropout, drop_rate = 0 leaves it out"
    if network.grad_checkpointing:
        return "grad_checkpointing is on; set_grad_checkpointing(False) turns it off, and memory_efficient replaces it"
    for name, module in network.named_modules():
        if getattr(module, "drop_prob", 0):
            return f"{name}.drop_prob is {module.drop_prob}; resnet_fast's networks have no stochastic depth"
    return ""


def _of_transformers(name: str, layers: Mapping[str, nn.Module]) -> str | None:
    name = name.removeprefix("resnet.")
    fixed = {
        "embedder.embedder.convolution": "conv1",
        "embedder.embedder.normalization": "bn1",
        "embedder.embedder.activation": "relu",
        "embedder.pooler": "maxpool",
        "pooler": "avgpool",
        "classifier.1": "fc",
    }
    if name in fixed:
        return fixed[name]
    match = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:(shortcut)\.|layer\.(\d)\.|)(\w+)", name)
    if match is None:
        return None
    stage, block, shortcut, index, kind = match.groups()
    place = f"layer{int(stage) + 1}.{block}"
    if kind == "activation":
        last = index is not None and f"{name.removesuffix(f'{index}.activation')}{int(index) + 1}" not in {
            each.removeprefix("resnet.") for each in layers
        }
        return None if last else f"{place}.relu"
    if kind not in ("convolution", "normalization") or not (shortcut or index):
        return None
    if shortcut:
        return f"{place}.downsample.{int(kind == 'normalization')}"
    return f"{place}.{'conv' if kind == 'convolution' else 'bn'}{int(index) + 1}"


_TORCHVISION = _Library(
    "torchvision",
    ("torchvision.models.resnet:ResNet",),
    ("torchvision.models.resnet:BasicBlock", "torchvision.models.resnet:Bottleneck"),
    lambda name, layers: name,
)
_TIMM = _Library(
    "timm",
    ("timm.models.resnet:ResNet",),
    (
        "timm.models.resnet:BasicBlock",
        "timm.models.resnet:Bottleneck",
        "timm.layers.drop:DropPath",
        "timm.layers.adaptive_avgmax_pool:SelectAdaptivePool2d",
        "timm.layers.adaptive_avgmax_pool:FastAdaptiveAvgPool",
    ),
    _of_timm,
    pool=_timms_pool,
    problem=_timms_problem,
)
_MODELING = "transformers.models.resnet.modeling_resnet"
_TRANSFORMERS = _Library(
    "transformers",
    (f"{_MODELING}:ResNetForImageClassification", f"{_MODELING}:ResNetModel"),
    tuple(
        f"{_MODELING}:ResNet{part}"
        for part in (
            "Model",
            "Embeddings",
            "ConvLayer",
            "ShortCut",
            "BasicLayer",
            "BottleNeckLayer",
            "Stage",
            "Encoder",
        )
    ),
    _of_transformers,
    headless=f"{_MODELING}:ResNetModel",
)


def from_torchvision(source: Source) -> ResNet:
    """Return a live model of resnet_fast with the layers of a torchvision ResNet, or of its checkpoint.

    Args:
        source: a `torchvision.models.resnet.ResNet`, with any classifier; or a state_dict, or what a training script
            saved it in; or the path of such a file, or `hf://OWNER/NAME`.

    Returns:
        Of a network, a copy: parameters, their dtype, device, memory format and `requires_grad`, the mode of each layer
        and BatchNorm's `eps` and `momentum` are the network's. Of a checkpoint, a float32 model in train mode, as
        `rf.resnet50(weights=FILE)` returns it, for the network that the names and shapes show.

    Raises:
        TypeError: if `source` is something else.
        ValueError: if the network is one that `resnet_fast.models.ResNet` is not; the message names the layer.
        WeightsError: if a checkpoint cannot be read, or holds no ResNet.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> model = rf.from_torchvision(torchvision.models.resnet18().eval())  # doctest: +SKIP
        >>> torch.save({"state_dict": rf.resnet18(num_classes=7).state_dict()}, "last.pth")
        >>> rf.from_torchvision("last.pth").fc.out_features
        7
    """
    return _convert(source, _TORCHVISION)


def from_timm(source: Source) -> ResNet:
    """Return a live model of resnet_fast with the layers of a timm ResNet, or of its checkpoint.

    Dropout, stochastic depth, anti-aliasing, attention, deep stems and pools other than the average are refused. Of a
    folder that timm has saved for the hub, `config.json` is obeyed; a file alone shows names and shapes only.

    Args:
        source: a `timm.models.resnet.ResNet`, or a checkpoint or folder, as for `from_torchvision`.

    Returns, Raises:
        As `from_torchvision`.

    Examples:
        >>> import resnet_fast as rf
        >>> model = rf.from_timm(timm.create_model("resnet50.a1_in1k", pretrained=True).eval())  # doctest: +SKIP
    """
    return _convert(source, _TIMM)


def from_transformers(source: Source) -> ResNet:
    """Return a live model of resnet_fast with the layers of a transformers ResNet, or of its checkpoint.

    The result returns the scores alone, [N, num_labels], where transformers returns an object with `logits`; of a
    `ResNetModel` it returns `pooler_output`, flattened to [N, C].

    Args:
        source: a `ResNetForImageClassification` or a `ResNetModel`; or a checkpoint, or a folder of `save_pretrained`,
            as for `from_torchvision`.

    Returns, Raises:
        As `from_torchvision`.

    Examples:
        >>> import resnet_fast as rf
        >>> model = rf.from_transformers("hf://microsoft/resnet-50").eval()  # doctest: +SKIP
    """
    return _convert(source, _TRANSFORMERS)


def _convert(source: Source, library: _Library) -> ResNet:
    if isinstance(source, nn.Module):
        return _from_network(source, library)
    if isinstance(source, Mapping):
        return _from_state(*state_of(source, name="state_dict"), "state_dict")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{library.function}: expected a module, a state_dict or a path, got {type(source).__name__}")
    at_hub = isinstance(source, str) and source.startswith(hub.PREFIX)
    path = hub.fetch(source) if at_hub else Path(source).expanduser()  # type: ignore[arg-type]
    return _from_state(*read_with_metadata(path), str(source))


def _from_state(state: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> ResNet:
    stages = _depths(state)
    try:
        wide, narrow = state["layer1.0.conv1.weight"].shape[0], state["layer1.0.conv2.weight"].shape[1]
        bottleneck = "layer1.0.conv3.weight" in state
        groups = max(1, wide // narrow)
        classes = state["fc.weight"].shape[0] if "fc.weight" in state else 1000
    except (KeyError, IndexError, ZeroDivisionError):
        stages = ()
    if len(stages) != 4:
        raise WeightsError(f"{name}: holds no ResNet of four stages under names that are known")
    try:
        model = ResNet(
            Bottleneck if bottleneck else BasicBlock,
            stages,
            num_classes=classes,
            groups=groups,
            width_per_group=wide // groups,
            stride_in_1x1=bottleneck and metadata.get("stride_in_1x1") == "true",
            unpadded_pool=metadata.get("unpadded_pool") == "true",
        )
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from None
    load_into(model, state, source=name, name="the ResNet that its shapes show")
    return model


def _depths(names: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the number of blocks in each stage, by the names of layers or tensors."""
    blocks = {match[0] for name in names if (match := re.match(r"layer\d+\.\d+(?=\.)", name))}
    stages = sorted({block.partition(".")[0] for block in blocks})
    return tuple(sum(block.startswith(f"{stage}.") for block in blocks) for stage in stages)


def _from_network(network: nn.Module, library: _Library) -> ResNet:
    where, allowed = library.function, library.classes(*library.networks)
    if type(network) not in allowed:
        shown = " or ".join(name.replace(":", ".") for name in library.networks)
        inner = next(
            (name for name in ("module", "_orig_mod") if isinstance(getattr(network, name, None), nn.Module)), ""
        )
        advice = f"pass its .{inner}" if inner else "rf.optimize(model) takes networks as they are"
        given = f"{type(network).__module__}.{type(network).__qualname__}"
        raise TypeError(f"{where}: expected a {shown}, got a {given}; {advice}")
    try:
        return _transplanted(network, library)
    except _Differs as error:
        raise ValueError(f"{where}: {error}; rf.optimize(model) takes the network as it is") from None


class _Differs(Exception):
    """Raised with what the network has that ours has not."""


def _transplanted(network: nn.Module, library: _Library) -> ResNet:
    """Return our network with copies of the other's layers, after each was compared."""
    if problem := library.problem(network):
        raise _Differs(problem)
    found = dict(_layers(network, library))
    if library.headless and type(network) in library.classes(library.headless):
        found["fc"] = "fc", nn.Identity()
    target = _like({new: layer for new, (_, layer) in found.items()})
    parts = (BasicBlock, Bottleneck, nn.Sequential, ResNet)
    expected = {name: layer for name, layer in target.named_modules() if not isinstance(layer, parts)}
    for new, (name, theirs) in found.items():
        if new not in expected:
            raise _Differs(f"{name} is {type(theirs).__name__}, which a ResNet of resnet_fast does not have there")
        if new != "fc" and not (new == "avgpool" and library.pool(theirs)):
            _compare(name, theirs, expected[new], new)
    if missing := [new for new in expected if new not in found]:
        raise _Differs(f"it has no layer that is {missing[0]} in a ResNet of resnet_fast")
    target.train(network.training)
    memo: dict[int, Any] = {}  # of all, so that what is shared stays shared
    for new, (_, theirs) in found.items():
        if new == "fc" or isinstance(theirs, nn.Conv2d) or _is_norm(theirs):
            parent, _, last = new.rpartition(".")
            setattr(target.get_submodule(parent), last, copy.deepcopy(theirs, memo))
    return target


def _layers(network: nn.Module, library: _Library) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Yield our name, and name and layer of theirs, for each layer that is called and computes something."""
    everything = dict(network.named_modules(remove_duplicate=False))
    containers = (*library.classes(*library.networks, *library.parts), nn.Sequential, nn.ModuleList)
    whole = ""
    for name, module in everything.items():
        if reason := _touched(module):
            raise _Differs(f"{name or 'the network'} {reason}")
        if whole and name.startswith(whole):
            continue
        new = library.rename(name, everything) if name else None
        if new == "fc" or (new == "avgpool" and library.pool(module)):
            whole = f"{name}."  # copied, or replaced, with all that is in it
        elif (
            (type(module) in containers and (new is None or len(list(module.children()))))
            or (type(module) is nn.Identity and not (new or "").endswith("relu"))
            or (
                type(module) is nn.Flatten and name == "classifier.0" and module.start_dim == 1 and module.end_dim == -1
            )
        ):
            continue
        elif new is None:
            raise _Differs(f"{name} is {type(module).__name__}, which a ResNet of resnet_fast does not have")
        elif new.endswith("relu") and type(module) is not nn.ReLU:
            raise _Differs(f"{name} is {type(module).__name__}, a ResNet of resnet_fast has ReLU there")
        yield str(new), (name, module)


def _touched(module: nn.Module) -> str:
    """Return what makes a module compute, or show, something else than its class does; "" if nothing."""
    if hooked(module):
        return "has hooks"
    kind = type(module)
    for name, value in vars(module).items():
        if callable(value) and hasattr(kind, name):
            return "was compiled" if name == "_compiled_call_impl" else f"has a {name} of its own"
    for name in _METHODS:
        method = getattr(kind, name, None)
        for function in (method, inspect.unwrap(method) if method is not None else None):
            package = str(getattr(function, "__globals__", {}).get("__name__", "torch")).partition(".")[0]
            if package not in ("torch", kind.__module__.partition(".")[0]):
                return f"is a {kind.__name__}, of which somebody replaced {name}"
    return ""


def _like(layers: Mapping[str, nn.Module]) -> ResNet:
    """Return a network without data of the architecture that these layers have, as far as ours can have it."""
    convs = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    depths = _depths(layers)
    if len(depths) != 4 or not {"layer1.0.conv1", "layer1.0.conv2"} <= convs.keys():
        raise _Differs("it has not four stages of basic or bottleneck blocks")

    def strided(name: str) -> bool:
        return name in convs and _pair(convs[name].stride) != (1, 1)

    def dilated(stage: int) -> bool:
        """Whether a dilation replaces the stride: a stage's first block has that of the stage before."""
        behind = [conv for name, conv in convs.items() if f"layer{stage}" <= name.partition(".")[0] <= "layer4"]
        seen = any(_pair(conv.dilation) != (1, 1) for conv in behind)
        return not any(first[stage - 2]) and (seen or depths[stage - 1] == 1)

    bottleneck = "layer1.0.conv3" in convs
    groups = convs["layer1.0.conv2"].groups if bottleneck else 1
    first = [(strided(f"layer{stage}.0.conv1"), strided(f"layer{stage}.0.conv2")) for stage in (2, 3, 4)]
    pool = layers.get("maxpool")
    try:
        with torch.device("meta"):
            return ResNet(
                Bottleneck if bottleneck else BasicBlock,
                depths,
                num_classes=1,
                groups=groups,
                width_per_group=convs["layer1.0.conv1"].out_channels // groups if bottleneck else 64,
                replace_stride_with_dilation=[dilated(stage) for stage in (2, 3, 4)],
                stride_in_1x1=bottleneck and any(one for one, _ in first),
                unpadded_pool=isinstance(pool, nn.MaxPool2d) and pool.ceil_mode,
            )
    except (ValueError, NotImplementedError) as error:
        raise _Differs(str(error)) from None


def _is_norm(layer: nn.Module) -> bool:
    return type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_frozen_batch_norm(layer)


def _compare(name: str, theirs: nn.Module, ours: nn.Module, new: str) -> None:
    """Raise if a layer is not what ours is there."""
    if type(theirs) is not type(ours) and not (type(ours) is nn.BatchNorm2d and _is_norm(theirs)):
        given = type(theirs).__name__
        raise _Differs(f"{name} is {given}, a ResNet of resnet_fast has {type(ours).__name__} there")
    facts, expected = _facts(theirs), _facts(ours)
    if new == "conv1":
        expected["in_channels"] = facts["in_channels"]  # the stem takes any number
    for fact, value in expected.items():
        if facts[fact] != value:
            raise _Differs(f"{name} has {fact} {facts[fact]}, a ResNet of resnet_fast has {value} there")


def _facts(layer: Any) -> dict[str, Any]:
    """Return all that a layer computes by, but the values of its tensors and BatchNorm's `eps` and `momentum`."""
    if isinstance(layer, nn.Conv2d):
        return {
            "in_channels": layer.weight.shape[1] * layer.groups,
            "out_channels": layer.weight.shape[0],
            "kernel_size": tuple(layer.weight.shape[2:]),
            "padding_mode": layer.padding_mode,
            "groups": layer.groups,
            "bias": layer.bias is not None,
            "tensors": _kinds(layer),
            **{name: _pair(getattr(layer, name)) for name in ("stride", "padding", "dilation")},
        }
    if _is_norm(layer):
        return {
            "channels": layer.weight.shape[0] if layer.weight is not None else None,
            "running statistics": layer.running_mean is not None,
            "tensors": _kinds(layer),
        }
    if isinstance(layer, nn.MaxPool2d):
        sizes = {name: _pair(getattr(layer, name)) for name in ("kernel_size", "stride", "padding", "dilation")}
        return {**sizes, "ceil_mode": layer.ceil_mode, "return_indices": layer.return_indices}
    return {"output_size": _pair(layer.output_size)} if isinstance(layer, nn.AdaptiveAvgPool2d) else {}


def _kinds(layer: nn.Module) -> str:
    """Return the classes of a layer's tensors, which may have an arithmetic of their own."""
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return ", ".join(sorted({type(tensor).__name__ for tensor in tensors} - {"Parameter", "Tensor"})) or "plain"


def _pair(value: Any) -> Any:
    return as_pair(value) if isinstance(value, int | tuple | list) else value
