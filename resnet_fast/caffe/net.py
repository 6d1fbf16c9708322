"""A Caffe network as an ordinary module: one child per layer, blobs by name, any batch. It parses no file.

It runs layer by layer with Caffe's arithmetic and is not fused; ``resnet_fast.optimize`` does that.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from resnet_fast.nn.pristine import capturing

from . import definition as d
from . import layers
from .errors import CaffeError

MAX_PARAMETER_BYTES = 4 * 2**30
"""Networks with more bytes of float32 parameters are refused before any is allocated. ResNet-152 has 0.24 GB."""


_WITH_WEIGHT = (nn.Conv2d, nn.ConvTranspose2d, layers.InnerProduct)


class _Step(NamedTuple):
    """One layer's turn in a run; ``child`` is "" for a layer that only renames."""

    child: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    freed: tuple[str, ...]


class Net(nn.Module):
    """The network of a :class:`Definition`; ``eval()`` is Caffe's TEST phase, ``train()`` its TRAIN phase.

    Each layer with something to compute is a child named as the layer (characters that a module's name cannot have are
    replaced; :meth:`layer` takes Caffe's names). Sizes of inputs are free where the layers allow it: only an
    InnerProduct, or a Reshape to given sizes, fixes what it reads. Convolutions, Deconvolutions and InnerProducts begin
    with Kaiming's normal initialisation (arXiv:1502.01852), biases and shifts with 0, BatchNorm and Scale as identity;
    fillers of a prototxt are not read.

    Args:
        definition: what to build.
        outputs: the blobs that a call returns; those that no layer reads if None.

    Raises:
        CaffeError: for wiring or shapes that Caffe refuses, and for too many parameters.
        KeyError: for an output that is no blob.
    """

    def __init__(self, definition: d.Definition, outputs: Iterable[str] | None = None) -> None:
        if not isinstance(definition, d.Definition):
            raise TypeError(
                f"Net: definition is a {type(definition).__name__}; load(prototxt, caffemodel) reads files, "
                "Net(parse_prototxt(text)) takes a text"
            )
        super().__init__()
        d.check(definition)
        self.definition = definition
        self._child_of: dict[str, str] = {}
        self._outputs: tuple[str, ...] = ()
        self._output_plan: tuple[_Step, ...] = ()
        self._accepted: set[tuple[Any, ...]] = set()
        planned = [(layer, bottoms) for layer, bottoms, _ in d.walk(definition)]
        size = 0
        for layer, bottoms in planned:  # before anything is allocated
            size += 4 * sum(math.prod(shape) for shape in layer.parameters.blobs(bottoms).values())
            if size > MAX_PARAMETER_BYTES:
                raise CaffeError(
                    f"{definition.source or 'definition'}: {layer}: with its parameters the network has {size:,} bytes "
                    f"of them, more than the {MAX_PARAMETER_BYTES:,} that are allowed"
                )
        alike: collections.Counter[str] = collections.Counter()
        for layer, bottoms in planned:
            module = layer.parameters.module(bottoms, len(layer.tops))
            if module is not None:
                child = self._child_of[layer.name] = self._free_name(layer.name, alike)
                self.add_module(child, module)
        self._outputs = definition.outputs if outputs is None else self._known(outputs)
        self._output_plan = self._plan(self._outputs)
        self._initialise()

    def _free_name(self, name: str, alike: collections.Counter[str]) -> str:
        """``name`` as a child may be called; ``alike`` counts, so that many names for one need no search."""
        base = free = name.replace(".", "_") or "_"
        while hasattr(self, free):
            alike[base] += 1
            free = f"{base}_{alike[base]}"
        return free

    def _initialise(self) -> None:
        for module in self.children():
            if isinstance(module, _WITH_WEIGHT) and not module.weight.is_meta:
                weight = module.weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else module.weight
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # ------------------------------------------------------------------------------------------------------- running

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Any:
        """Run the network.

        Args:
            x: the input, a floating point tensor [N, C, H, W] or what the definition's only input is; a mapping by name
                for networks with several.

        Returns:
            The output blob; a dict by name for networks with several.

        Raises:
            CaffeError: for a shape that a layer cannot take, naming both.
            TypeError: for something other than tensors.
        """
        found = self._run(x, self._outputs)
        return found[self._outputs[0]] if len(self._outputs) == 1 else found

    def blobs(self, x: Tensor | Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return the blobs of these names after a run on ``x``, up to the last layer that is needed.

        A blob that layers overwrite in place has its last value, as in Caffe after ``net.forward()``.

        Raises:
            KeyError: for a name that is no blob of the network.
        """
        return self._run(x, self._known(names))

    def features(self, names: Iterable[str]) -> Net:
        """A network that ends at these blobs and returns them; it shares this one's modules, and so their parameters.

        For feature extraction at sizes that the classifier does not take, and for ``optimize``.

        Raises:
            KeyError: for a name that is no blob of the network.
        """
        names = self._known(names)
        kept = self.definition.layers[: self._end(names) + 1]
        if not kept:
            raise ValueError(f"features: {', '.join(names)}: inputs only, there is nothing to compute")
        definition = dataclasses.replace(self.definition, layers=kept)
        with torch.device("meta"):
            result = Net(definition, names)
        for name, child in result._child_of.items():
            result._modules[child] = self.layer(name)
        result.training = self.training
        return result

    def _known(self, names: Iterable[str]) -> tuple[str, ...]:
        if isinstance(names, str):
            raise TypeError(f"names is {names!r}; a list of names was expected, as [{names!r}]")
        names, known = tuple(dict.fromkeys(names)), self.blob_names
        if not names:
            raise ValueError("names is empty; at least one blob is needed")
        for name in names:
            if name not in known:
                close = ", ".join(difflib.get_close_matches(str(name), known, 3, 0.5)) or ", ".join(known[:5])
                raise KeyError(f"{name!r} is no blob of {self.definition.name or 'the network'}; it has {close}, ...")
        return names

    def _optimize_inputs(self, batch: int | None) -> tuple[Any, ...]:
        """Arguments without data in the definition's sizes, for ``optimize``; ``batch`` None: its batch as well."""
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())
        inputs = {
            entry.name: torch.empty((batch or entry.shape[0], *entry.shape[1:]), dtype=dtype, device="meta")
            for entry in self.definition.inputs
        }
        return tuple(inputs.values()) if len(inputs) == 1 else (inputs,)

    @property
    def blob_names(self) -> tuple[str, ...]:
        """All blobs: the inputs, then the layers' tops in the order of their first writing."""
        names = [entry.name for entry in self.definition.inputs]
        return tuple(dict.fromkeys(names + [top for layer in self.definition.layers for top in layer.tops]))

    def find(self, name: str) -> nn.Module | None:
        """Return the module of the layer with this Caffe name, None if it computes nothing, as a Split."""
        return self._modules[self._child_of[name]] if name in self._child_of else None

    def layer(self, name: str) -> nn.Module:
        """Return the module of the layer with this Caffe name.

        Raises:
            KeyError: if there is none, or it computes nothing, as a Split.
        """
        if name not in self._child_of:
            raise KeyError(f"{name!r} is no layer of {self.definition.name or 'the network'} that computes something")
        return self._modules[self._child_of[name]]  # type: ignore[return-value]

    def shapes(self, x: d.Shape | Mapping[str, d.Shape]) -> dict[str, d.Shape]:
        """Return the shape of every blob for an input of this shape, without running anything.

        Raises:
            CaffeError: for a shape that a layer cannot take.
        """
        inputs = self._by_name(x)
        for name, shape in inputs.items():
            if not isinstance(shape, tuple | list) or not all(isinstance(size, int) for size in shape):
                raise TypeError(f"shapes: the shape of {name!r} is {shape!r}; a tuple of integers was expected")
        return self._infer({name: tuple(shape) for name, shape in inputs.items()}, len(self.definition.layers) - 1)

    def _infer(self, inputs: Mapping[str, d.Shape], end: int) -> dict[str, d.Shape]:
        """Return the blobs' shapes up to layer ``end``, where the layers' parameters fit them."""
        source = self.definition.source or "definition"
        for entry in self.definition.inputs:
            if len(inputs[entry.name]) != len(entry.shape):
                raise CaffeError(
                    f"{source}: input {entry.name!r} is {d.times(inputs[entry.name])}; "
                    f"{d.times(('N', *entry.shape[1:]))} was expected"
                )
        found = dict(inputs)
        for layer, bottoms, tops in itertools.islice(d.walk(self.definition, inputs), end + 1):
            child = self._child_of.get(layer.name)
            own = () if child is None else layers.blobs(self.get_submodule(child)).values()
            needed = tuple(layer.parameters.blobs(bottoms).values())
            # Fewer or more where somebody put another module, or took a bias away: its own errors are right then.
            for have, need in zip(own, needed, strict=True) if len(own) == len(needed) else ():
                if tuple(have.shape) != need:
                    raise CaffeError(
                        f"{source}: {layer}: its bottom is {' and '.join(map(d.times, bottoms))}, which takes "
                        f"parameters of shape {d.times(need)}; it has {d.times(have.shape)}. {self._legal()} fits"
                    )
            found.update(zip(layer.tops, tops, strict=True))
        return found

    def _legal(self) -> str:
        return ", ".join(f"{entry.name!r} {d.times(('N', *entry.shape[1:]))}" for entry in self.definition.inputs)

    def _by_name(self, x: Any) -> dict[str, Any]:
        names = [entry.name for entry in self.definition.inputs]
        if isinstance(x, Mapping):
            if set(x) != set(names):
                raise TypeError(
                    f"inputs are {', '.join(map(repr, x))}; the network takes {', '.join(map(repr, names))}"
                )
            return dict(x)
        if len(names) != 1:
            raise TypeError(f"the network has the inputs {', '.join(map(repr, names))}; give a dict of them by name")
        return {names[0]: x}

    def _end(self, wanted: Iterable[str]) -> int:
        """Return the last layer that writes one of these blobs, -1 if none does."""
        end, names = -1, set(wanted)
        for index, layer in enumerate(self.definition.layers):
            if not names.isdisjoint(layer.tops):
                end = index
        return end

    def _plan(self, wanted: tuple[str, ...]) -> tuple[_Step, ...]:
        """Return what to run for these blobs, each layer with the blobs that nobody reads any more after it."""
        needed, kept = self.definition.layers[: self._end(wanted) + 1], set(wanted)
        reads: dict[str, int] = {}
        for index, layer in enumerate(needed):
            reads.update(dict.fromkeys(layer.bottoms, index))
        steps = []
        for index, layer in enumerate(needed):
            touched = dict.fromkeys((*layer.bottoms, *layer.tops))
            freed = tuple(name for name in touched if name not in kept and reads.get(name, -1) <= index)
            steps.append(_Step(self._child_of.get(layer.name, ""), layer.bottoms, layer.tops, freed))
        return tuple(steps)

    def _run(self, x: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        plan = self._output_plan if wanted == self._outputs else self._plan(wanted)
        blobs = self._inputs(x, len(plan) - 1)
        for step in plan:
            operands = [blobs[name] for name in step.bottoms]
            if not step.child:
                blobs.update(dict.fromkeys(step.tops, operands[0]))
            elif len(step.tops) == 1:
                blobs[step.tops[0]] = self._modules[step.child](*operands)  # type: ignore[misc]
            else:
                parts = self._modules[step.child](*operands)  # type: ignore[misc]
                blobs.update({name: parts[index] for index, name in enumerate(step.tops)})
            del operands
            for name in step.freed:
                del blobs[name]
        return {name: blobs[name] for name in wanted}

    def _inputs(self, x: Any, end: int) -> dict[str, Any]:
        names = [entry.name for entry in self.definition.inputs]
        if isinstance(x, torch.fx.Proxy):
            return {names[0]: x} if len(names) == 1 else {name: cast(Any, x)[name] for name in names}
        given = self._by_name(x)
        if capturing():
            return given
        for name, value in given.items():
            if not isinstance(value, Tensor):
                hint = ", as torch.from_numpy makes of it" if type(value).__name__ == "ndarray" else ""
                raise TypeError(f"input {name!r} is a {type(value).__name__}; a tensor{hint} was expected")
            if not value.is_floating_point():
                raise TypeError(f"input {name!r} is {value.dtype}; a floating point tensor was expected")
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return given
        shapes = tuple(tuple(given[name].shape) for name in names)
        if (end, shapes) not in self._accepted:
            self._infer({name: tuple(given[name].shape) for name in names}, end)
            if len(self._accepted) < 1024:
                self._accepted.add((end, shapes))
        return given

    def extra_repr(self) -> str:
        return f"{self.definition.name!r}, inputs: {self._legal()}, outputs: {', '.join(self._outputs)}"
