"""Read what the configuration next to a file of weights says of them: timm's and transformers' `config.json`.

Both libraries publish a folder with it, on Hugging Face's hub and elsewhere. What it says becomes metadata by the names
that this project's own files use: `arch`, `classes`, `stride_in_1x1` and those of `Preprocessing.to_metadata`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["COMPANIONS", "WEIGHT_FILES", "Unfit", "metadata_of"]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in such a folder; the first that exists counts."""

COMPANIONS = ("config.json", "preprocessor_config.json")

_MAX_BYTES = 4 * 2**20
_SQUASHING = 384
"""From this size on transformers' ConvNext processor resizes to a square, without a crop."""


_OF_TRANSFORMERS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
"""Those of the ten that its configuration can describe, by `layer_type` and `depths`."""

_PLAIN = {*_OF_TRANSFORMERS.values(), "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"}
_PLAIN |= {"wide_resnet50_2", "wide_resnet101_2"}
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "zero_init_last", "global_pool"}
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


class Unfit(ValueError):
    """Raised if the configuration describes a network that none of the ten is; continues from the file's name."""


def metadata_of(path: Path, transformers: bool) -> dict[str, str]:
    """Return the metadata of a file of weights by the configuration in its folder; empty without one.

    Args:
        path: of the weights.
        transformers: whether they have the names of transformers; then its configuration counts, else timm's.

    Raises:
        Unfit: if the configuration is of another network.
    """
    config = _read(path.with_name("config.json"))
    if transformers and config.get("model_type") == "resnet":
        return _transformers(config, _read(path.with_name("preprocessor_config.json")))
    if (
        not transformers
        and isinstance(config.get("architecture"), str)
        and isinstance(config.get("pretrained_cfg"), dict)
    ):
        return _timm(config)
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _transformers(config: dict[str, Any], processor: dict[str, Any]) -> dict[str, str]:
    if config.get("downsample_in_first_stage") or config.get("hidden_act", "relu") != "relu":
        raise Unfit(
            "config.json next to it has a stride in the first stage, or an activation other than ReLU, which none of "
            "the ten ResNets has"
        )
    metadata = {"stride_in_1x1": "true"} if config.get("downsample_in_bottleneck") else {}
    layers, depths = config.get("layer_type", "bottleneck"), config.get("depths", [3, 4, 6, 3])
    if isinstance(layers, str) and isinstance(depths, list) and all(type(depth) is int for depth in depths):
        expansion = 1 if layers == "basic" else 4
        usual = [64 * 2**stage * expansion for stage in range(4)]
        arch = _OF_TRANSFORMERS.get((layers, tuple(depths)))
        if arch is not None and config.get("hidden_sizes", usual) == usual:
            metadata["arch"] = arch
    labels = config.get("id2label")
    if isinstance(labels, dict):
        metadata |= _classes([labels.get(str(index)) for index in range(len(labels))])
    return metadata | _followed("preprocessor_config.json", processor, _by_processor)


def _timm(config: dict[str, Any]) -> dict[str, str]:
    arch, args = config["architecture"].removesuffix("_fast"), config.get("model_args") or {}
    if arch not in _PLAIN:
        raise Unfit(f"config.json next to it calls its network {arch[:40]!r}, which none of the ten ResNets is")
    if not isinstance(args, dict):
        raise Unfit("config.json next to it has model_args that are no dictionary")
    pools = [holder.get("global_pool", "avg") for holder in (config, args)]
    if pools != ["avg", "avg"] or args.keys() - _HARMLESS:
        raise Unfit("config.json next to it has a global_pool or model_args that none of the ten ResNets has")
    labels = config.get("label_names") or config["pretrained_cfg"].get("label_names")
    return {"arch": arch} | _classes(labels) | _followed("config.json", config["pretrained_cfg"], _by_timm)


def _classes(labels: Any) -> dict[str, str]:
    """Return the metadata for names of classes, which transformers makes up if nobody has given any."""
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        return {}
    made_up = labels == [f"LABEL_{index}" for index in range(len(labels))]
    return {} if made_up else {"classes": json.dumps(labels)}


def _followed(name: str, config: dict[str, Any], reader: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, str]:
    """Return the metadata of the preprocessing, or warn that it is one that `Preprocessing` does not do."""
    from resnet_fast.models.preprocessing import Preprocessing  # which reads images, and that needs `checkpoint`

    if not config:
        return {}
    try:
        metadata = Preprocessing(**reader(config)).to_metadata()
        Preprocessing.from_metadata(metadata)  # which checks all values
        return metadata
    except (LookupError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:100]
        warnings.warn(
            f"{name}: its preprocessing is not followed ({type(error).__name__}: {reason}); give it yourself",
            stacklevel=2,
        )
        return {}


def _by_processor(config: dict[str, Any]) -> dict[str, Any]:
    """Read transformers' `preprocessor_config.json`, of its ConvNext processor or of one with a centre crop."""
    size = config["size"]
    shorter = size["shortest_edge"] if isinstance(size, dict) else size
    if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3 or not config.get("do_resize", True):
        raise ValueError("it does not resize, or does not scale by 1/255")
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ConvNext")
    if kind.startswith("ConvNext"):
        if shorter >= _SQUASHING:
            raise ValueError(f"it resizes to a square of {shorter} pixels")
        crop, shorter = shorter, int(shorter / config["crop_pct"])
    elif config.get("do_center_crop"):
        crop = config["crop_size"]
        crop = crop["height"] if isinstance(crop, dict) and crop["height"] == crop["width"] else crop
    else:
        raise ValueError("it has no centre crop")
    normalise = config.get("do_normalize", True)
    return {
        "resize_size": shorter,
        "crop_size": crop,
        "mean": tuple(config["image_mean"]) if normalise else (0.0, 0.0, 0.0),
        "std": tuple(config["image_std"]) if normalise else (1.0, 1.0, 1.0),
        "interpolation": _RESAMPLING[config.get("resample", 2)],
    }


def _by_timm(config: dict[str, Any]) -> dict[str, Any]:
    _, height, width = config["input_size"]
    if height != width or config.get("crop_mode", "center") != "center":
        raise ValueError("it is no centre crop of a square")
    return {
        "resize_size": math.floor(height / config.get("crop_pct", 0.875)),
        "crop_size": height,
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config.get("interpolation", "bicubic"),
    }
