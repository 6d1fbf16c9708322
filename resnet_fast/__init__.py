"""Provide ResNets that run as fused kernels, with torchvision's parameters and answers.

This file lists the public names. The subpackages hold the code, and import downward only:
inference -> caffe, integrations -> models, graph -> nn -> ops -> backends and kernels.

Examples:
    >>> import torch
    >>> import resnet_fast as rf
    >>> model = rf.resnet18().eval()  # weights="DEFAULT" for the published parameters
    >>> fast = rf.optimize(model)  # a frozen, fused copy for inference
    >>> fast(torch.rand(1, 3, 224, 224)).shape
    torch.Size([1, 1000])
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The command line shows its help without torch. Everywhere else `import resnet_fast` imports everything but Caffe and
# inference, because importing also registers torch.ops.resnet_fast, which exported programs need. Under `python -m`,
# sys.argv[0] is "-m" instead of the module's name.
_COMMAND_LINE = "resnet_fast_cli" in sys.modules or (
    sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] in (["resnet_fast"], ["resnet_fast.cli"])
)

# Each class that is made below counts toward a garbage collection, and those go through all of torch's objects: a fifth
# of the time that importing takes.
_COLLECTS = gc.isenabled()
gc.disable()
try:
    if TYPE_CHECKING or not _COMMAND_LINE:
        from . import backends, models, nn, ops
        from ._info import Info, info
        from .graph.export import exportable
        from .graph.optimize import optimize  # not from .graph: mypy would take the module of the same name
        from .graph.quantize import quantize
        from .integrations import from_timm, from_torchvision, from_transformers, register_models
        from .models import (
            list_models,
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
        from .models.residual_network import residual_network
finally:
    if _COLLECTS:
        gc.enable()

__all__ = [
    "Info",
    "__version__",
    "backends",
    "caffe",
    "exportable",
    "from_timm",
    "from_torchvision",
    "from_transformers",
    "inference",
    "info",
    "list_models",
    "models",
    "nn",
    "ops",
    "optimize",
    "predict",
    "quantize",
    "register_models",
    "residual_network",
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

if TYPE_CHECKING:
    from . import caffe, inference
    from .inference import predict
else:
    _HOMES = {
        "Info": "._info",
        "info": "._info",
        "exportable": ".graph",
        "optimize": ".graph",
        "quantize": ".graph",
        "predict": ".inference",
    }
    _HOMES |= dict.fromkeys(("from_timm", "from_torchvision", "from_transformers", "register_models"), ".integrations")

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("backends", "caffe", "inference", "models", "nn", "ops"):
            return importlib.import_module(f".{name}", __name__)
        home = _HOMES.get(name, ".models")
        return getattr(importlib.import_module(home, __name__), name)

    def __dir__() -> list[str]:
        return list(__all__)
