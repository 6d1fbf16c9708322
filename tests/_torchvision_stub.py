"""Makes torchvision importable beside a torch build whose C++ ops it lacks: defines the two schemas it looks up."""

from __future__ import annotations

import contextlib

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    # Already there where torchvision's own C++ library was loaded.
    with contextlib.suppress(RuntimeError):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
