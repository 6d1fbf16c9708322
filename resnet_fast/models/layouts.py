"""Find the networks in the files of training scripts, and translate the names of their tensors.

Names only: a ResNet is found by them, whatever dictionary and prefix it is under, and given torchvision's. Files and
tensors are the affair of `resnet_fast.models.checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Network", "Unclear", "choose", "dictionaries", "networks", "whose", "without_wrappers"]

_SHOWN = 3
_DEPTH = 8
_MOST = 16

_ANCHORS = {
    "layer1.0.conv1.weight": "conv1.weight",
    "encoder.stages.0.layers.0.layer.0.convolution.weight": "embedder.embedder.convolution.weight",
}
"""Two names that a ResNet has, torchvision's and Hugging Face transformers'."""

_TRANSFORMERS = re.compile(
    r"(?:embedder\.embedder|encoder\.stages\.(\d)\.layers\.(\d+)\.(?:(shortcut)|layer\.(\d)))"
    r"\.(convolution|normalization)\."
)

_CLASSIFIERS = (("", "last_linear."), ("backbone.", "head.fc."), ("resnet.", "classifier.1."))
"""Other names of `fc`, for a trunk under a prefix that ends so: pretrainedmodels, OpenMMLab, transformers."""

_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = re.compile(r"(?:^|\.)(?:n_averaged|steps)$")
"""Name of the number of updates in torch's and OpenMMLab's averaged models."""

_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow)(?:[._]|$)", re.IGNORECASE)

_OTHERS = (
    (r"(?:^|\.)stem\.conv1\.weight$", "detectron2's"),
    (r"(?:^|\.)(?:conv1|stem)\.0\.weight$", "those of a deep stem (resnet50d, ResNetV1c or V1d)"),
    (r"(?:^|\.)layer1\.0\.(?:se|se_module|attn)\.", "those of a network with attention (SE-ResNet)"),
    (r"^res2_0_branch2a_w$|^conv1_w$", "Caffe2's"),
    (r"^res2a_branch2a\.weight$", "Caffe's: resnet_fast.caffe has that network"),
    (r"^0\.4\.0\.conv1\.weight$", "fastai's, with a body and a head of its own"),
    (r"(?:^|\.)(?:cls_token|patch_embed\.proj\.weight)$", "a vision transformer's"),
    (r"(?:^|\.)layer1\.0\.conv1\.conv\.", "those of a network with anti-aliased convolutions"),
)


class Unclear(ValueError):
    """Raised if a file holds several networks; the message continues from the file's name."""


@dataclass(frozen=True)
class Network:
    """One ResNet in a file.

    Attributes:
        place: the dictionaries and prefixes that it is under, as `state_dict.module`; empty at the top of the file.
        entries: what is in the file by torchvision's names.
        holder: the dictionary that has them.
        left: names of the dictionary's other tensors, counters of averages apart.
        transformers: it had the names of Hugging Face transformers.
    """

    place: str
    entries: dict[str, Any]
    holder: Mapping[str, Any]
    left: tuple[str, ...]
    transformers: bool

    @property
    def whole(self) -> bool:
        return "fc.weight" in self.entries


def networks(content: Any, is_tensor: Callable[[Any], bool]) -> list[Network]:
    """Return all ResNets, with or without classifier, in nested dictionaries with leaves that `is_tensor` recognises.

    Raises:
        Unclear: if there are more than anybody can choose from.
    """
    found: list[Network] = []
    for keys, holder in dictionaries(content):
        found += _in(keys, holder, is_tensor, _MOST - len(found))
    return found


def dictionaries(content: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Yield every nested dictionary once, the outer first, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), content)] if isinstance(content, dict) else []
    seen = {id(content)}
    for keys, holder in waiting:
        yield keys, holder
        for key, value in dict.items(holder):
            if isinstance(key, str) and isinstance(value, dict) and id(value) not in seen and len(keys) < _DEPTH:
                seen.add(id(value))
                waiting.append(((*keys, key), value))


def _in(keys: tuple[str, ...], holder: dict[Any, Any], is_tensor: Callable[[Any], bool], most: int) -> list[Network]:
    names: dict[str, str] = {}  # without wrappers: as it is in the file
    for key in dict.keys(holder):
        if isinstance(key, str) and names.setdefault(without_wrappers(key), key) != key:
            raise Unclear(f"has {without_wrappers(key)!r} twice, with and without a prefix")
    found: list[tuple[str, dict[str, str]]] = []
    for name in names:
        for anchor, stem in _ANCHORS.items():
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                if f"{prefix}{stem}" in names:
                    if len(found) == most:
                        raise Unclear(f"holds more than {_MOST} ResNets")
                    found.append((prefix, _renamed(names, prefix)))
    used = {name for _, renamed in found for name in renamed.values()}
    left = tuple(
        name
        for name, key in names.items()
        if name not in used and is_tensor(dict.get(holder, key)) and not _COUNTERS.search(name)
    )
    return [
        Network(
            ".".join((*keys, *filter(None, [prefix.rstrip(".")]))),
            {new: dict.get(holder, names[name]) for new, name in renamed.items()},
            holder,
            left,
            f"{prefix}embedder.embedder.convolution.weight" in names,
        )
        for prefix, renamed in found
    ]


def _renamed(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return torchvision's names of the tensors under the prefix, with their names there."""
    inside: dict[str, str] = {}
    for name in names:
        if name.startswith(prefix):
            new = _torchvision(name.removeprefix(prefix))
            if inside.setdefault(new, name) != name:
                raise Unclear(f"has {new!r} by two names, {inside[new]!r} and {name!r}")
    if not any(name.startswith("fc.") for name in inside):
        for ending, classifier in _CLASSIFIERS:
            if not prefix.endswith(ending) or (ending and prefix != ending and not prefix.endswith(f".{ending}")):
                continue
            outside = prefix.removesuffix(ending) + classifier
            if {f"{outside}weight", f"{outside}bias"} <= names.keys():
                inside = {new: name for new, name in inside.items() if not name.startswith(outside)}
                inside |= {f"fc.{part}": f"{outside}{part}" for part in ("weight", "bias")}
                break
    return inside


def _torchvision(name: str) -> str:
    """Translate a name of transformers to torchvision's; return others unchanged."""
    if not (match := _TRANSFORMERS.match(name)):
        return name
    stage, block, shortcut, index, kind = match.groups()
    module = "bn" if kind == "normalization" else "conv"
    if stage is None:
        new = f"{module}1"
    elif shortcut:
        new = f"layer{int(stage) + 1}.{block}.downsample.{int(module == 'bn')}"
    else:
        new = f"layer{int(stage) + 1}.{block}.{module}{int(index) + 1}"
    return f"{new}.{name[match.end() :]}"


def without_wrappers(name: str) -> str:
    """Return the name without the parts that torch.compile, FSDP and activation checkpointing insert."""
    return _WRAPPER.sub("", name)


def choose(
    found: Sequence[Network], part: str | None, same: Callable[[Network, Network], bool]
) -> tuple[Network, str | None]:
    """Return the network that is meant, and a remark if there are others.

    Of several state_dicts those with a classifier count, and of a network and its averages the network is taken.

    Args:
        part: the place, or the beginning or the end of it; None for a file with one network, or one and averages.
        same: whether two are the same tensors.

    Raises:
        Unclear: if several remain, or `part` is none; the message names them.
    """
    places = ", ".join(repr(network.place or "the file itself") for network in found)
    if part is not None:
        meant = [network for network in found if network.place == part] or [
            network for network in found if f".{network.place}.".find(f".{part}.") >= 0
        ]
        if not meant:
            raise Unclear(f"has no ResNet under {part!r}; there are {places}")
        found = meant
    # If one state_dict has a whole network and a trunk, the trunk is a part of something else.
    with_whole = [id(network.holder) for network in found if network.whole]
    candidates = [network for network in found if id(network.holder) in with_whole] or list(found)
    distinct = [one for i, one in enumerate(candidates) if not any(same(one, other) for other in candidates[:i])]
    plain = [network for network in distinct if not _AVERAGE.search(network.place)] or distinct
    if len(plain) > 1:
        places = ", ".join(repr(network.place) for network in plain)
        raise Unclear(f"holds {len(plain)} ResNets ({places}); say which one by FILE:{plain[0].place}")
    chosen = plain[0]
    if part is None and chosen.left:
        shown = ", ".join(chosen.left[:_SHOWN]) + (", ..." if len(chosen.left) > _SHOWN else "")
        others = f"{len(chosen.left)} further tensors ({shown})"
        if not chosen.place:
            return chosen, None  # they are unexpected then, and loading says so
        raise Unclear(
            f"holds a ResNet under {chosen.place!r} and {others}; if the ResNet alone is meant, say FILE:{chosen.place}"
        )
    rest = [network.place for network in distinct if network is not chosen]
    if rest and part is None:
        return chosen, f"{chosen.place!r} is taken; it also holds {rest[0]!r}, which FILE:{rest[0]} takes"
    return chosen, None


def whose(names: Mapping[str, Any]) -> str | None:
    """Return the library or network these names belong to, if it is known not to be a plain ResNet."""
    return next((whom for pattern, whom in _OTHERS if any(re.search(pattern, name) for name in names)), None)
