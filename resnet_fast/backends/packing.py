"""Folded and packed weights for the CPU: built once, found again by the weight's storage, dropped with it.

Live modules must see every change of their parameters at the next forward, whoever made it: torch counts no edit
through ``.data`` or ``.numpy()``, by a fused optimizer, or by another process in shared memory. So a packed copy counts
only while a hash of all bytes of weight, scale and shift is what it was when the copy was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import backends
from . import cpu, onednn
from .layouts import channels_last, owned

_xxhash: Any = None  # as in a checkout that runs without being installed
with contextlib.suppress(ImportError):
    import xxhash as _xxhash

_SHAPES_KEPT = 256
#: Packed copies of a weight, each as large as it, give or take a few per cent. oneDNN wants up to three layouts for the
#: sizes of images that a layer may meet, and the third is rare.
_LAYOUTS_KEPT = 2
#: Weights on one storage of which packed copies are kept: the parts of a bank of weights, say.
_WEIGHTS_KEPT = 64
#: More would wait for memory.
_HASHING_THREADS = 4

#: Stride, padding, dilation and groups of a convolution.
Geometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]

#: What runs a convolution: of oneDNN, or of the CPU engine.
Packed: TypeAlias = "PackedConv | EngineConv"

#: Makes the plain folded weight, and says whether it belongs to the packed convolution, or was edited meanwhile.
Folded = Callable[[], tuple[Tensor, bool]]


def fold(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight * scale`` per output channel, computed in float32 or wider and rounded once to ``dtype``."""
    return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)).to(dtype)


@dataclass(eq=False)
class Layouts:
    """Packed copies of a weight by the shapes of inputs: one for each layout that these ask for.

    What is kept is bounded whatever sizes the inputs have: the oldest layouts are dropped.
    """

    by_shape: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    by_layout: dict[bytes, Tensor] = field(default_factory=dict)

    def add(self, size: tuple[int, ...], packed: Tensor) -> Tensor:
        """Keep a weight packed for inputs of ``size``, and return it, or one of the same layout that is there."""
        # New dictionaries, so that other threads may read the old ones meanwhile.
        layouts = dict(self.by_layout)
        packed = layouts.setdefault(onednn.layout(packed), packed)
        if len(layouts) > _LAYOUTS_KEPT:
            del layouts[next(iter(layouts))]
        kept = {id(each) for each in layouts.values()}
        shapes = {size: each for size, each in self.by_shape.items() if id(each) in kept}
        if len(shapes) >= _SHAPES_KEPT:
            del shapes[next(iter(shapes))]
        shapes[size] = packed
        self.by_layout, self.by_shape = layouts, shapes
        return packed


@dataclass(eq=False)
class PackedConv:
    """A convolution with its scale folded in, run by oneDNN; a packed copy for each layout that input shapes ask for.

    ``bias`` is the shift [K], in the inputs' dtype as oneDNN wants it. It holds no plain weight: whoever calls passes a
    function that makes it, used when an input shape comes for the first time.
    """

    bias: Tensor
    weight_shape: torch.Size
    window: onednn.Window
    layouts: Layouts = field(default_factory=Layouts)

    def __post_init__(self) -> None:
        channels = self.weight_shape[1]
        # oneDNN multiplies bfloat16 channels in pairs. With an odd count the last pair reaches into the next pixel,
        # times 0: harmless for numbers, but there a NaN or infinity spreads. A channel of zeros keeps pixels apart.
        self._pads = self.bias.dtype is torch.bfloat16 and channels % 2 == 1 and self.window[-1] == 1

    def _input(self, x: Tensor) -> Tensor:
        """``x`` in the bias' dtype, dense and channels_last, with a channel of zeros behind an odd bfloat16 count."""
        if not self._pads:
            return channels_last(x.to(self.bias.dtype))
        n, c, h, w = x.shape
        padded = torch.empty(
            (n, c + 1, h, w), dtype=self.bias.dtype, device=x.device, memory_format=torch.channels_last
        )
        padded[:, :c] = x
        padded[:, c:] = 0
        return padded

    def _packed(self, size: tuple[int, ...], folded: Folded) -> Tensor:
        weight, keep = folded()
        if self._pads:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 1))
        packed = onednn.pack_conv(weight, self.window, list(size))
        return self.layouts.add(size, packed) if keep else packed

    def run(
        self,
        x: Tensor,
        folded: Folded,
        residual: Tensor | None = None,
        *,
        overwrite_residual: bool = False,
        activation: str = "none",
        residual_after_activation: bool = False,
        finite: bool = False,
    ) -> Tensor:
        """Return the op; ``finite``: the caller knows that no NaN can reach the ReLU."""
        _, c, h, w = shape = x.shape
        if self._pads or x.dtype is not self.bias.dtype or x.stride() != (h * w * c, 1, w * c, c):
            x = self._input(x)
            shape = x.shape
        if residual is not None:
            _, c, h, w = residual.shape
            if residual.stride() != (h * w * c, 1, w * c, c):
                residual = channels_last(residual)
        relu = activation == "relu"
        late = residual if residual_after_activation else None
        early = None if residual_after_activation else residual
        post_op = relu and finite
        packed = self.layouts.by_shape.get(shape)
        if packed is None:
            packed = self._packed(shape, folded)
        if early is None:
            y = onednn.conv(x, packed, self.bias, self.window, relu=post_op)
        elif overwrite_residual:
            y = onednn.conv_sum_(early, x, packed, self.bias, self.window, relu=post_op)
        else:
            y = onednn.conv_sum(x, early, packed, self.bias, self.window, relu=post_op)
        if relu and not post_op:
            y.relu_()
        if late is not None:
            y += late
        _, c, h, w = y.shape
        usual = y.stride() == (h * w * c, 1, w * c, c) and y.numel() and not y._is_view()
        return y if usual else owned(y)


class Kept(NamedTuple):
    """Layers that `models.stages` runs as one call: what they are, the call, and what watches that all are packed."""

    layers: Any
    network: cpu.Network
    others: list[weakref.ref[Any]]


@dataclass(eq=False)
class EngineConv:
    """As :class:`PackedConv`, run by the CPU engine; packed at the first run.

    Attributes:
        made: the convolution, None before that. network: layers that run as one call, this one first, if there are.
    """

    bias: Tensor
    geometry: Geometry
    dtype: torch.dtype
    made: cpu.Convolution | None = None
    network: Kept | None = None

    def run(
        self,
        x: Tensor,
        folded: Folded,
        residual: Tensor | None = None,
        *,
        overwrite_residual: bool = False,
        activation: str = "none",
        residual_after_activation: bool = False,
        finite: bool = False,
    ) -> Tensor:
        layer = self.made
        if layer is None:
            weight, keep = folded()
            layer = cpu.Convolution(weight, self.bias, self.geometry, self.dtype)
            if keep:
                self.made = layer
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        return layer.run(x, residual, activation == "relu", residual_after_activation)


#: By storage, so that an entry goes with the last tensor on the weight's memory: a digest, and what it is valid for.
_cache: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[object, ...], tuple[bytes, Packed]]] = WeakKeyDictionary()


def _digest(*tensors: Tensor) -> bytes:
    """Return 128 bits of the tensors' bytes, at the speed of memory: of random edits one in 2^128 would be missed."""
    if _xxhash is None:
        backends.fallback("packed weights", "xxhash is not installed; finding edits of live models takes 20x the time")
    state = hashlib.blake2b(digest_size=16) if _xxhash is None else _xxhash.xxh3_128()
    for tensor in tensors:
        if tensor.dim() == 4 and not tensor.is_contiguous():
            tensor = tensor.permute(0, 2, 3, 1)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        content: Any = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        state.update(content.numpy(force=True))
    digest: bytes = state.digest()
    return digest


def unsupported(name: str, chosen: bool, dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> str:
    """Return why a backend of ``backends.ON_CPU`` is not to run this convolution, or "" if it is.

    Args:
        chosen: somebody asked for that backend, be it slower or not.
    """
    if name == cpu.NAME:
        return cpu.unsupported(dtype) or ("" if chosen else cpu.slower(dtype, weight_shape, groups))
    depthwise = weight_shape[1] == 1 and weight_shape[0] == groups
    if dtype is torch.bfloat16 and groups > 1 and weight_shape[1] % 2 and not depthwise:
        return f"oneDNN mixes pixels for bfloat16 groups of an odd number of channels ({weight_shape[1]})"
    return onednn.unsupported(dtype)


def engine(
    weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry, dtype: torch.dtype,
    stored: cpu.Stored | None = None,
) -> cpu.Convolution:  # fmt: skip
    """Return a convolution of the CPU engine with ``scale`` folded in; ``stored``: how, if its outputs are uint8."""
    return cpu.Convolution(fold(weight, scale, dtype), shift, geometry, dtype, stored=stored)


#: Which of ``backends.ON_CPU`` runs what, by the weight's shape, groups and dtype, and by what users may switch.
_runs: dict[tuple[object, ...], str] = {}


def _pack(backend: str, shift: Tensor, dtype: torch.dtype, shape: torch.Size, geometry: Geometry) -> Packed:
    stride, padding, dilation, groups = geometry
    if backend == cpu.NAME:
        return EngineConv(shift.to(torch.float32), geometry, dtype)
    return PackedConv(shift.to(dtype), shape, (list(padding), list(stride), list(dilation), groups))


def _able(dtype: torch.dtype, shape: torch.Size, groups: int, device: str) -> tuple[object, ...]:
    return dtype, shape, groups, torch.backends.mkldnn.enabled, backends.selected, device


def _key(weight: Tensor, dtype: torch.dtype, geometry: Geometry, backend: str) -> tuple[object, ...]:
    stride, padding, dilation, groups = geometry
    return (
        weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, dtype, tuple(stride), tuple(padding),
        tuple(dilation), groups, backend,
    )  # fmt: skip


class Found(NamedTuple):
    """A packed convolution for a weight, scale and shift if their digest is still this one."""

    tensors: tuple[Tensor, Tensor, Tensor]
    digest: bytes
    conv: EngineConv
    made: cpu.Convolution


def find(dtype: torch.dtype, weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry) -> Found | None:
    """Return what :func:`packed` keeps for the CPU engine, None if nothing; :func:`unchanged` is still to be asked."""
    backend = _runs.get(_able(dtype, weight.shape, geometry[3], weight.device.type), "")
    entries = _cache.get(weight.untyped_storage(), {})
    digest, conv = entries.get(_key(weight, dtype, geometry, backend), (b"", None))
    if not isinstance(conv, EngineConv) or conv.made is None:
        return None
    return Found((weight, scale, shift), digest, conv, conv.made)


def unchanged(found: Sequence[Found]) -> bool:
    """Return whether all contents are what they were when they were packed; hashed by as many threads as torch has."""
    threads = min(torch.get_num_threads(), _HASHING_THREADS)
    parts: list[list[Found]] = [[] for _ in range(threads)]
    sizes, sums = [each.tensors[0].nbytes for each in found], [0] * threads
    for index in sorted(range(len(found)), key=sizes.__getitem__, reverse=True):
        least = sums.index(min(sums))
        parts[least].append(found[index])
        sums[least] += sizes[index]

    def same(part: list[Found]) -> bool:
        with torch.no_grad():
            return all(_digest(*each.tensors) == each.digest for each in part)

    others: list[Future[bool]] = []
    with ThreadPoolExecutor(max(1, threads - 1), "resnet_fast-hash") as pool:
        for part in parts[1:]:
            try:
                others.append(pool.submit(same, part))
            except RuntimeError:  # no thread can be started any more
                parts[0] += part
        mine = same(parts[0])
        return mine and all(other.result() for other in others)


def packed(
    op: str,
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    geometry: Geometry,
    bound: Any = None,
) -> tuple[Packed, Folded] | None:
    """Return a convolution packed for ``x`` in ``dtype``, and what packs more of it; None if no backend runs it packed.

    Cached while weight, scale and shift do not change. Whoever edits them while this runs gets one answer of the old
    values, the new ones or both, but none later: what is packed was hashed.

    Args:
        bound: the op on constants (``ops._op.Bound``), which keeps their packed form and does not look at them again;
            None if they are none.
    """
    groups, shape = geometry[3], weight.shape
    if bound is not None:
        made: tuple[Packed, Folded] = bound.keep(
            "packed",
            lambda: (_pack(bound.backend, shift, bound.dtype, shape, geometry),
                     lambda: (fold(weight, scale, bound.dtype), True)),
        )  # fmt: skip
        return made
    if not x.numel():
        return None
    able = _able(dtype, shape, groups, x.device.type)
    backend = _runs.get(able)
    if backend is None:
        backend = backends.on_cpu(
            op, x.device.type, "auto", lambda name, chosen: unsupported(name, chosen, dtype, shape, groups)
        )
        if not backend:
            return None
        if len(_runs) > _SHAPES_KEPT:
            _runs.clear()
        _runs[able] = backend
    key = _key(weight, dtype, geometry, backend)
    entries = _cache.setdefault(weight.untyped_storage(), {})
    digest = _digest(weight, scale, shift)
    found = entries.get(key)
    if found is None or found[0] != digest:
        own = shift.clone()
        digest = _digest(weight, scale, own)
        conv = _pack(backend, own, dtype, shape, geometry)
        entries.pop(key, None)
        entries[key] = found = (digest, conv)
        for old in list(entries)[:-_WEIGHTS_KEPT]:
            entries.pop(old, None)

    def folded() -> tuple[Tensor, bool]:
        now = (weight.clone(), scale.clone())
        return fold(*now, dtype), _digest(*now, shift) == digest

    return found[1], folded
