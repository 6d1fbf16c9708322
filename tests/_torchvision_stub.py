"""Makes torchvision importable beside a torch build whose C++ ops it lacks: defines the two schemas it looks up."""

from __future__ import annotations

import sys

import torch

try:
    # First, since its C++ library, where it loads, ends the process if somebody else has defined its ops.
    import torchvision  # noqa: F401
except RuntimeError:  # "operator torchvision::nms does not exist"
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
