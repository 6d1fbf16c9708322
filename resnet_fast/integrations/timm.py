"""Register the ten ResNets with timm: `timm.create_model("resnet50_fast", ...)`, with the surface of timm's ResNet.

`resnet_fast.register_models("timm")` imports this module, which registers them. The blocks are those of
`resnet_fast.models.resnet`; here is only what timm's callers expect around them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    SelectAdaptivePool2d,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    is_scriptable,
)
from timm.models import (
    FeatureListNet,
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from resnet_fast import models, ops
from resnet_fast.models.resnet import (
    ARCHITECTURES,
    TAKE_CHANNELS_LAST,
    BasicBlock,
    Bottleneck,
    check_images,
    run_stages,
    stage_input,
)
from resnet_fast.nn import fused
from resnet_fast.nn.pristine import know, ordinary, why_called

__all__ = ["DropPathBasicBlock", "DropPathBottleneck", "FeatureList", "ResNet"]  # timm adds the ten functions

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_STEM = ("conv1", "bn1", "act1", "maxpool")

_REFUSED: dict[str, Any] = {
    "stem_width": 64,
    "stem_type": "",
    "replace_stem_pool": False,
    "block_reduce_first": 1,
    "down_kernel_size": 1,
    "avg_down": False,
    "channels": (64, 128, 256, 512),
    "aa_layer": None,
    "drop_block_rate": 0.0,
    "block_args": None,
}
"""Arguments of timm's ResNet that make other networks, with the values that do not."""

know(SelectAdaptivePool2d)
know(DropPath)


class DropPathBasicBlock(BasicBlock):
    """A `BasicBlock` whose branch is left out for some images in train mode (stochastic depth, arXiv:1603.09382)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if (drop_path := _active(self.drop_path)) is None:
            return super().forward(x)
        out = fused.conv_bn_act(x, self.conv1, self.bn1, self.relu)
        return _dropped(self, drop_path, x, fused.conv_bn_act(out, self.conv2, self.bn2))


class DropPathBottleneck(Bottleneck):
    """A `Bottleneck` whose branch is left out for some images in train mode (stochastic depth, arXiv:1603.09382)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if (drop_path := _active(self.drop_path)) is None:
            return super().forward(x)
        out = fused.conv_bn_act(x, self.conv1, self.bn1, self.relu)
        out = fused.conv_bn_act(out, self.conv2, self.bn2, self.relu)
        return _dropped(self, drop_path, x, fused.conv_bn_act(out, self.conv3, self.bn3))


TAKE_CHANNELS_LAST |= {DropPathBasicBlock, DropPathBottleneck}


def _active(drop_path: nn.Module | None) -> nn.Module | None:
    """Return the layer if calling it does something, or is seen by somebody."""
    return None if drop_path is None or not (drop_path.training or why_called(drop_path)) else drop_path


def _dropped(block: BasicBlock | Bottleneck, drop_path: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    identity = x if block.downsample is None else fused.shortcut(x, block.downsample)
    return fused.laid_out(block.relu(drop_path(out) + identity), x, block.conv1, block.conv2)


def _levels(
    net: Any, images: Tensor, taken: Collection[int], until: int = 4, checkpointing: bool = False
) -> Iterator[Tensor]:
    """Yield the feature maps of the levels in `taken`, in order, and then the last one computed.

    Args:
        net: has timm's children `conv1, bn1, act1, maxpool, layer1..4`, as far as they are used.
        taken: 0 for the stem in front of its pool, 1 to 4 for the stages.
        until: the last stage that runs; with 0 not even the pool does.
        checkpointing: run each block again in the backward instead of keeping what it computes.
    """
    check_images(images, net.conv1)
    if 0 in taken or not until:
        x = fused.laid_out(fused.conv_bn_act(images, net.conv1, net.bn1, net.act1), images, net.conv1)
        if 0 in taken:
            yield x
        x = net.maxpool(x) if until else x
    else:
        x = fused.stem(images, net.conv1, net.bn1, net.act1, net.maxpool, getattr(net, "memory_efficient", False))
    nchw = fused.torch_gives_nchw(images if type(net.conv1) is nn.Conv2d else x, net.conv1)
    done = 0
    for level in range(1, until + 1):
        if level < until and level not in taken and not checkpointing:
            continue  # together with the next
        names, done = _STAGES[done:level], level
        if checkpointing:
            stage = getattr(net, names[0])
            x = checkpoint_seq(stage, stage_input(x, stage, nchw))
        else:
            x = run_stages(net, names, x, nchw)
        if level in taken:
            yield fused.laid_out(x, images, net.conv1)
    yield fused.laid_out(x, images, net.conv1)


class ResNet(nn.Module):
    """A ResNet with the children, methods and state_dict of `timm.models.resnet.ResNet`, run by fused ops.

    Args:
        block, layers, num_classes, in_chans, output_stride, global_pool, cardinality, base_width, drop_rate,
            drop_path_rate, zero_init_last, device, dtype: as timm's; an `output_stride` below 32 needs `Bottleneck`.
        act_layer: ReLU, by timm's name or as a class. norm_layer: timm's name, or called with the number of channels.
        memory_efficient: as of `resnet_fast.models.ResNet`: keep about half as much for the backward.
        others: timm's remaining arguments, at their defaults: others make networks that this class does not have.

    Raises:
        ValueError: for an argument that makes another network.
    """

    maxpool: nn.Module
    global_pool: SelectAdaptivePool2d
    fc: Any

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        cardinality: int = 1,
        base_width: int = 64,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        memory_efficient: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _check(others, output_stride, act_layer)
        if drop_path_rate:
            block = DropPathBottleneck if issubclass(block, Bottleneck) else DropPathBasicBlock
        with torch.device(torch.get_default_device() if device is None else device):
            net = models.ResNet(
                block,
                layers,
                num_classes=1,
                groups=cardinality,
                width_per_group=base_width,
                replace_stride_with_dilation=(False, output_stride == 8, output_stride < 32),
                norm_layer=get_norm_layer(norm_layer),
                memory_efficient=memory_efficient,
            )
            if in_chans != 3:
                net.conv1 = nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.conv1, self.bn1, self.act1, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.memory_efficient = memory_efficient
        self.grad_checkpointing = False
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        blocks = [block for name in _STAGES for block in getattr(self, name)]
        for index, made in enumerate(blocks[1:], 1):
            if drop_path_rate:
                made.drop_path = DropPath(drop_path_rate * index / (len(blocks) - 1))
        self.feature_info: list[dict[str, Any]] = [{"num_chs": 64, "reduction": 2, "module": "act1"}]
        for index, name in enumerate(_STAGES):
            channels, reduction = 64 * 2**index * block.expansion, min(4 * 2**index, output_stride)
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": name})
        self.num_features = 512 * block.expansion
        self.to(dtype)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(zero_init_last)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Draw the convolutions' weights anew, and start the last BatchNorm of each block at zero, as timm does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(weight := getattr(last, "weight", None), Tensor):
                    nn.init.zeros_(weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return regular expressions of the parameters' names, for learning rates by stage or by block."""
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Run each block again in the backward instead of keeping what it computes."""
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """Return the classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier with `num_classes` outputs; 0 for none.

        global_pool: timm's name of the pool, "" for none; that of now if None.
        """
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        made = create_classifier(self.num_features, num_classes, pool_type=pool, **get_device_dtype(self))
        self.global_pool, self.fc = (layer.train(self.training) for layer in made)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last feature map and a list of those asked for, or the list alone.

        Args:
            indices: 0 for the stem in front of its pool, 1 to 4 for the stages; a number for the last so many.
            norm: there is none to apply. stop_early: compute no stage after the last one asked for.

        Raises:
            ValueError: for an `output_fmt` other than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(5, indices)
        *found, final = _levels(self, x, taken, last if stop_early else 4, self.grad_checkpointing)
        return found if intermediates_only else (final, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one of `indices`, and the classifier; return the levels that are kept."""
        taken, last = feature_take_indices(5, indices)
        for name in _STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if last < 4:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < 4:
            self.reset_classifier(0, "")
        return list(taken)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's feature map [N, C, H, W] of images [N, in_chans, H, W]."""
        (features,) = _levels(self, x, (), checkpointing=self.grad_checkpointing)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the classifier's scores for a feature map; with `pre_logits` what the classifier is given."""
        if not pre_logits and not (self.drop_rate and self.training) and _fusable(x, self.global_pool, self.fc):
            return ops.head(x, self.fc.weight, self.fc.bias)
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [N, num_classes] of a floating point batch [N, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


def _check(others: dict[str, Any], output_stride: int, act_layer: Any) -> None:
    for name, value in others.items():
        if name not in _REFUSED:
            raise TypeError(f"unexpected argument {name!r}")
        if value != _REFUSED[name]:
            raise ValueError(
                f"{name} must be {_REFUSED[name]!r} for a fast ResNet, got {value!r}; timm's own ResNet has it, and "
                "resnet_fast.optimize takes that as it is"
            )
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    if get_act_layer(act_layer) is not nn.ReLU:
        raise ValueError(
            f"act_layer must be ReLU for a fast ResNet, got {act_layer!r}; timm's own ResNet has others, and "
            "resnet_fast.optimize takes that as it is"
        )
    if is_scriptable():
        raise ValueError("scriptable must be False: torch.jit.script does not take fused ops; timm's own ResNet can")


def _fusable(x: Tensor, pool: Any, fc: nn.Module) -> bool:
    """Return whether pool and classifier are a global average and a linear layer that nobody watches."""
    return (
        type(pool) is SelectAdaptivePool2d
        and type(pool.pool) is nn.AdaptiveAvgPool2d
        and pool.pool.output_size == 1
        and type(pool.flatten) is nn.Flatten
        and type(fc) is nn.Linear
        and not fused.must_be_plain(x)
        and fused.untouched(pool, pool.pool, pool.flatten, fc)
        and ordinary(fc.weight, fc.bias)
    )


class FeatureList(FeatureListNet):  # type: ignore[misc]  # timm is only partly typed
    """What `features_only=True` gives: timm's `FeatureListNet`, with the same children and keys, run by fused ops."""

    def _collect(self, x: Tensor) -> OrderedDict[str, Tensor]:
        names = ("act1", *_STAGES)
        if not {"conv1", "bn1", "act1"} <= self.keys() <= {*_STEM, *_STAGES}:
            collected: OrderedDict[str, Tensor] = super()._collect(x)
            return collected
        taken = [level for level, name in enumerate(names) if name in self.return_layers]
        found = _levels(self, x, taken, max(taken), self.grad_checkpointing)
        return OrderedDict((self.return_layers[names[level]], y) for level, y in zip(taken, found, strict=False))


def _pretrained() -> Any:
    """Return the configurations of timm's weights of the ten plain networks, which fit these too."""
    return generate_default_cfgs(
        {
            f"{arch}_fast.{name.partition('.')[2]}": replace(config, architecture=None, tag=None)
            for arch in ARCHITECTURES
            for name, config in get_arch_pretrained_cfgs(arch).items()
        }
    )


default_cfgs = _pretrained()
"""Where timm's registry looks for them."""


def _register(arch: str) -> None:
    made_of = ARCHITECTURES[arch]
    args = {"cardinality": made_of.groups, "base_width": made_of.width_per_group}

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {"block": made_of.block, "layers": made_of.layers, **args, **kwargs}
        features = {"feature_cls": FeatureList}
        return build_model_with_cfg(ResNet, create.__name__, pretrained, feature_cfg=features, **options)

    create.__name__ = create.__qualname__ = f"{arch}_fast"
    create.__doc__ = f"Return the `{arch}` of resnet_fast with timm's arguments and surface."
    globals()[create.__name__] = register_model(create)


for _arch in ARCHITECTURES:
    _register(_arch)
