"""Provide the ten ResNets, their weights and preprocessing, as drop-in replacements for torchvision.models.

The package also has the small `residual_network`, which torchvision does not have and `list_models` does not list.

`ResNet18_Weights` ... `Wide_ResNet101_2_Weights` are here too: torchvision's enums if torchvision is installed,
otherwise enums of the same names. They are created on first use, so importing this package imports no torchvision.
"""

from __future__ import annotations

from typing import Any

from resnet_fast.models import resnet
from resnet_fast.models.catalogue import ModelList, PublishedWeights, list_models
from resnet_fast.models.checkpoint import WeightsError, read_checkpoint
from resnet_fast.models.images import ImageError, read_image
from resnet_fast.models.preprocessing import Preprocessing
from resnet_fast.models.residual_network import ResidualNetwork, residual_network
from resnet_fast.models.resnet import *  # noqa: F403
from resnet_fast.models.resnet import BUILDERS, ResNet
from resnet_fast.models.weights import categories, enum_names, get_model_weights, get_weight, model_of, preprocessing

__all__ = [
    "ImageError",
    "ModelList",
    "Preprocessing",
    "PublishedWeights",
    "ResidualNetwork",
    "WeightsError",
    "categories",
    "get_model",
    "get_model_weights",
    "get_weight",
    "list_models",
    "preprocessing",
    "read_checkpoint",
    "read_image",
    "residual_network",
]
__all__ += resnet.__all__


def get_model(name: str, **config: Any) -> ResNet:
    """Return the model called `name`: `get_model("resnet50", weights="DEFAULT")` is `resnet50(weights="DEFAULT")`.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> import resnet_fast as rf
        >>> rf.models.get_model("resnet18", num_classes=10).fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(BUILDERS)}")
    return BUILDERS[name](**config)


def __getattr__(name: str) -> Any:
    model = model_of(name) if name.endswith("_Weights") else None
    if model is not None:
        return get_model_weights(model)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *enum_names()]
