"""Models that nobody here wrote, through ``optimize``: what is captured, what is fused, and how far the answers are.

    python -m benchmarks.foreign_models --out foreign_models.csv [--source timm] [--only PATTERN] [--speed]

timm and transformers are asked if they are installed (``pip install timm transformers``); weights are random. An error
is relative to the largest value. If it is above 1e-5, "rounding" is how far the original's own answers are apart for an
image, or results of the parts, that are rounded otherwise: boxes of an untrained detector have nearly equal ranks.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.graph.calling import flatten
from resnet_fast.graph.plan import Fused
from resnet_fast.graph.selfcheck import rounded, rounded_parts
from resnet_fast.graph.snapshot import OptimizedModule, PartlyOptimizedModule

#: Errors above it are explained.
TOLERANCE = 1e-5


def _names(source: str) -> list[str]:
    """Return the names of the models of a source, from the list beside this file."""
    found: list[str] = []
    for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
        if not line.startswith(" "):
            here = line == f"{source}:"
        elif here:
            found += line.split()
    return found


class Foreign:
    """A model of somebody's: where it comes from, and what makes it and an input for it."""

    def __init__(self, source: str, name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
        self.source, self.name, self.make, self.shape = source, name, make, shape


def models() -> Iterator[Foreign]:
    """Yield every model that can be made here."""
    importlib.import_module("tests._torchvision_stub")  # before torchvision
    from torchvision.models import get_model

    _provide_nms()
    for source in ("torchvision", "torchvision.segmentation", "torchvision.detection", "torchvision.video"):
        for name in _names(source):
            shape = (1, 3, 8, 64, 64) if source.endswith("video") else (1, 3, *_size(name))
            options: dict[str, Any] = {"weights": None}
            if not source.endswith("video"):
                options |= {"weights_backbone": None} if "." in source else {}
            if any(part in name for part in ("rcnn", "retinanet", "fcos")):
                options |= {"min_size": 160, "max_size": 200}  # images are scaled to it: 800 pixels otherwise
            if "keypoint" in name:
                options["box_detections_per_img"] = 8  # 4 GFLOP of keypoints each, of up to 100 otherwise
            if name in ("googlenet", "inception_v3"):
                options["init_weights"] = False
            yield Foreign(source, name, lambda name=name, options=options: get_model(name, **options), shape)
    yield from _timm()
    yield from _transformers()
    yield from _own()


def _provide_nms() -> None:
    """Register torchvision's nms if its C++ library does not go with this torch: detectors need it."""
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        from torchvision.ops import box_iou

        def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
            order = scores.argsort(descending=True)
            overlaps, kept = box_iou(boxes[order], boxes[order]) > threshold, []
            left = torch.ones(len(order), dtype=torch.bool)
            for best in range(len(order)):
                if left[best]:
                    kept.append(order[best])
                    left &= ~overlaps[best]
            return torch.stack(kept) if kept else order

        import torchvision

        torchvision.ops.boxes._assert_has_ops = lambda: None
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.impl("nms", nms, "CPU")
        _kept.append(library)


_kept: list[Any] = []


def _size(name: str) -> tuple[int, int]:
    for parts, size in _SIZES.items():
        if any(part in name for part in parts):
            return size, size
    return 128, 128


_SIZES = {
    ("vit_", "swin", "maxvit", "deit", "xcit", "visformer", "coat", "levit", "efficientformer"): 224,
    ("botnet", "lambda", "halonet"): 256,
    ("inception", "nasnet", "rcnn", "retina", "fcos", "ssd"): 160,
}


def _timm() -> Iterator[Foreign]:
    try:
        import timm
    except ImportError:
        return
    for name in _names("timm"):
        yield Foreign("timm", name, lambda name=name: timm.create_model(name), (1, 3, *_size(name)))
    for name in _names("timm.features_only"):
        make = lambda name=name: timm.create_model(name, features_only=True)  # noqa: E731
        yield Foreign("timm.features_only", name, make, (1, 3, 128, 128))


def _transformers() -> Iterator[Foreign]:
    try:
        import transformers as t
    except ImportError:
        return
    made = {
        "ResNetForImageClassification": t.ResNetConfig(depths=[1, 1, 1, 1]),
        "ResNetModel": t.ResNetConfig(),
        "ResNetBackbone": t.ResNetConfig(depths=[1, 1, 1, 1], out_features=["stage2", "stage4"]),
        "RegNetForImageClassification": t.RegNetConfig(depths=[1, 1, 2, 1]),
        "ConvNextForImageClassification": t.ConvNextConfig(depths=[1, 1, 2, 1]),
        "ConvNextV2ForImageClassification": t.ConvNextV2Config(depths=[1, 1, 2, 1]),
        "MobileNetV1ForImageClassification": t.MobileNetV1Config(),
        "MobileNetV2ForImageClassification": t.MobileNetV2Config(),
        "EfficientNetForImageClassification": t.EfficientNetConfig(depth_coefficient=0.3, image_size=128),
        "LevitForImageClassification": t.LevitConfig(),
        "PoolFormerForImageClassification": t.PoolFormerConfig(),
        "BitForImageClassification": t.BitConfig(depths=[1, 1, 1, 1]),
        "ViTForImageClassification": t.ViTConfig(num_hidden_layers=2),
        "SegformerForSemanticSegmentation": t.SegformerConfig(),
        "MobileViTForImageClassification": t.MobileViTConfig(),
        "CvtForImageClassification": t.CvtConfig(),
        "SwinForImageClassification": t.SwinConfig(depths=[1, 1, 1, 1]),
    }
    for name, config in made.items():
        size = 224 if any(part in name for part in ("ViT", "Levit", "Swin", "Cvt")) else 128
        size = 256 if "MobileViT" in name else size
        yield Foreign("transformers", name, lambda name=name, c=config: getattr(t, name)(c), (1, 3, size, size))


def _own() -> Iterator[Foreign]:
    from tests.graph.user_models import MODELS

    for name, make in MODELS.items():
        yield Foreign("user", name, make, (1, 3, 64, 64))


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Give batch norms the statistics of an image, times random factors, so that no layer is trivial and values stay
    near 1, as in a trained network: else rounding may decide the answer."""
    generator = torch.Generator().manual_seed(0)

    def measure(norm: Any, args: tuple[Tensor, ...]) -> None:
        y = args[0].float().transpose(0, 1).flatten(1)
        norm.running_mean.copy_(y.mean(1) + 0.1 * torch.randn(y.shape[0], generator=generator))
        factors = torch.rand(y.shape[0], generator=generator) + 0.5
        norm.running_var.copy_(y.var(1, correction=0).clamp(min=0.1) * factors)

    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms if norm.running_var is not None]
    with torch.no_grad():
        model(x.clone())
    for hook in hooks:
        hook.remove()
    return model


def calls_of_convolutions(model: nn.Module, x: Tensor) -> int:
    """Return how many 2-D convolutions run for an image."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                Count.found += args[1].dim() == 4 and not args[6]
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        model(x)
    return Count.found


def fused_convolutions(fast: nn.Module) -> int:
    """Return how many convolutions the fused ops of a snapshot compute."""
    count = 0
    for module in fast.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
                if isinstance(part, Fused):
                    count += sum(name.startswith("weight") for name in part.constants()) if part.op != "head" else 0
    return count


def parts_of(fast: nn.Module) -> list[str]:
    """Return the names of the modules that a snapshot in parts computes; none if it is one graph."""
    modules = fast.model.named_modules() if isinstance(fast, PartlyOptimizedModule) else ()
    return [name for name, module in modules if isinstance(vars(module).get("forward"), OptimizedModule)]


def distance(found: Any, expected: Any) -> float:
    """Return how far apart two results are, relative to the largest value."""
    worst = 0.0
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() and b.is_floating_point():
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item())
    return worst


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor)]


def examine(entry: Foreign, speed: bool) -> dict[str, Any]:
    """Return a row of the table."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"source": entry.source, "name": entry.name}
    x = torch.rand(entry.shape)
    model = calibrate(entry.make(), x)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fast = rf.optimize(model, example_inputs=x)
        except Exception as error:
            return row | {"captured": "refused", "reason": str(error).splitlines()[0][:160]}
    row["seconds"] = f"{time.perf_counter() - began:.1f}"
    row["captured"] = "parts" if isinstance(fast, PartlyOptimizedModule) else "whole"
    row["convolutions"], row["fused"] = calls_of_convolutions(model, x), fused_convolutions(fast)
    own = 0.0
    for label, batch, more in (("error", 1, 0), ("error_larger", 2, 32)):
        image = torch.rand(batch, 3, *(size + more * (len(entry.shape) == 4) for size in entry.shape[2:]))
        with torch.no_grad():
            try:
                expected = model(image.clone())
            except Exception:
                continue
        furthest = distance(fast(image), expected)
        row[label] = f"{furthest:.1e}"
        if furthest > TOLERANCE:
            with torch.no_grad():
                varied = [distance(model(other.clone()), expected) for other in rounded(image, torch.float32)]
                with rounded_parts(model, parts_of(fast), torch.float32):
                    varied += [distance(model(image.clone()), expected) for _ in range(6)]
            own = max(own, *varied)
    if own:
        row["rounding"] = f"{own:.1e}"
    report = fast.report()
    reasons = Counter(row_.reason for row_ in report.not_fused if row_.kind in ("Conv2d", "conv2d", "BatchNorm2d"))
    notes = [note for note in report.notes if "own code" in note or "nothing is fused" in note]
    row["reason"] = "; ".join((*notes[:2], *(f"{n}x {reason}" for reason, n in reasons.most_common(2))))[:300]
    if speed:
        row["speed"] = f"{ratio(model, fast, x):.2f}"
    return row


def ratio(model: nn.Module, fast: OptimizedModule, x: Tensor) -> float:
    """Return the median time of the original over that of the snapshot, one after the other in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(12):
            for module, found in zip((model, fast), times, strict=True):
                began = time.perf_counter()
                module(x)
                found.append(time.perf_counter() - began)
    slow, quick = (sorted(found[2:])[len(found[2:]) // 2] for found in times)
    return slow / quick


_COLUMNS = (
    "source", "name", "captured", "convolutions", "fused", "error", "error_larger", "rounding", "speed", "seconds",
    "reason",
)  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table, as CSV")
    parser.add_argument("--source", default="*", help="a pattern: timm, torchvision.*, user")
    parser.add_argument("--only", default="*", help="a pattern of names")
    parser.add_argument("--speed", action="store_true", help="time each model too, on an idle machine")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for entry in models():
        if fnmatch.fnmatch(entry.source, given.source) and fnmatch.fnmatch(entry.name, given.only):
            try:
                rows.append(examine(entry, given.speed))
            except Exception as error:  # the table says so, the others follow
                rows.append(
                    {"source": entry.source, "name": entry.name, "captured": "failed", "reason": repr(error)[:200]}
                )
            print(" ".join(str(rows[-1].get(column, "-")) for column in _COLUMNS)[:200], file=sys.stderr, flush=True)
            with given.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
