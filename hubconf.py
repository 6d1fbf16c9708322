"""Entry points for torch.hub: torch.hub.load("<owner>/<repository>", "resnet50", weights=...)."""

from resnet_fast import (  # noqa: F401
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

dependencies = ["torch"]
