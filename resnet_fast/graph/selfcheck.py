"""A snapshot against the code that it was made from, on random images, before anybody uses it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calling import flatten
from .capture import plain_modes
from .guards import Refused
from .shapes import first_line

if TYPE_CHECKING:
    from .parts import Call

#: How far the results may be apart, relative to their length as vectors. Rounding alone gives 1e-6 and 1e-2 of these
#: dtypes; a wrong layer changes everything.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}


class Answers:
    """What a model's own code gives for one image, and for two of another size.

    It is run before it is captured, so that what it keeps elsewhere than in itself, as caches do, are real tensors. A
    model that gives two results for the same image is not compared later.

    Args:
        plain: the code; it may change what it belongs to.
        call: its arguments without data. device: where they are. compared: whether results are needed.

    Attributes:
        takes_other_sizes: whether the code takes larger images too.
    """

    def __init__(self, plain: Callable[..., Any], call: Call, device: torch.device, compared: bool) -> None:
        from .parts import drawn

        self._plain = plain
        self._known: list[tuple[Any, Any]] = []
        self.takes_other_sizes = True
        for other in _inputs(call):
            given = drawn(other, device)
            try:
                result = _result(plain, given)
            except Exception:
                self.takes_other_sizes = False
                continue
            if compared:
                self._known.append((given, result))

    def compare(
        self, snapshot: Callable[..., Any], written: torch.dtype, target: torch.dtype, parts: Sequence[str] = ()
    ) -> str:
        """Run a snapshot on the same images, and return a remark if they cannot tell much.

        A network that amplifies rounding, as one with random weights may, or that picks boxes by their rank, gives
        another result for an image, or for results of its parts, that differ by roundings: its snapshot may be four
        times as far away.

        Args:
            written, target: what the plain code and the snapshot compute in.
            parts: names of the modules that the snapshot computes; the plain code is a module then.

        Raises:
            Refused: it fails, or a result has another form or is too far away.
        """
        tolerance, remark = TOLERANCES.get(target, 0.2), ""
        for given, expected in self._known:
            try:
                found = _result(snapshot, given)
            except Exception as error:
                raise Refused(f"its snapshot fails: {first_line(error)}") from error
            if written.itemsize > target.itemsize and not _finite(found):  # the range of the type, not another answer
                continue
            distance, where = _difference(found, expected)
            if distance <= tolerance:
                continue
            own = max(_difference(_result(self._plain, other), expected) for other in rounded(given, target))
            changed = "of the image"
            if distance > 4 * own[0] and isinstance(self._plain, nn.Module) and parts:
                with rounded_parts(self._plain, parts, target):
                    own = max(_difference(_result(self._plain, given), expected) for _ in range(6))
                changed = "of what its parts give"
            if distance > 4 * own[0]:
                raise Refused(f"its snapshot gave another answer: {where}")
            remark = f"it was compared loosely: a few roundings {changed} change the network's own answer, {own[1]}"
        return remark


def rounded(given: Any, dtype: torch.dtype) -> Iterator[Any]:
    """Yield the same arguments, and six times changed by up to eight roundings to ``dtype``, as layers add them up."""
    generator = torch.Generator().manual_seed(0)

    def one(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return leaf * (1 + 16 * torch.finfo(dtype).eps * (torch.rand(leaf.shape, generator=generator) - 0.5).to(leaf))

    yield given
    for _ in range(6):
        yield pytree.tree_map_only(Tensor, one, given)


@contextlib.contextmanager
def rounded_parts(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> Iterator[None]:
    """Change what the modules of these names give at each call, by up to eight roundings to ``dtype`` of values of the
    usual size, as a sum in another order changes it. In an image such errors average out before they reach boxes."""
    generator = torch.Generator().manual_seed(0)

    def one(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        usual = leaf.double().square().mean().sqrt().to(leaf)
        return leaf + 16 * torch.finfo(dtype).eps * usual * (torch.rand(leaf.shape, generator=generator) - 0.5).to(leaf)

    def change(module: nn.Module, args: Any, result: Any) -> Any:
        return pytree.tree_map_only(Tensor, one, result)

    hooks = [model.get_submodule(name).register_forward_hook(change) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(call: Call) -> Iterator[Call]:
    """Yield one image, and two of another size."""

    def sized(tensor: Tensor, batch: int, more: int) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        rest = [size + more for size in tensor.shape[2:]] if tensor.dim() == 4 else tensor.shape[2:]
        return tensor.new_empty((batch, *tensor.shape[1:2], *rest))

    for batch, more in ((1, 0), (2, 32)):
        yield pytree.tree_map_only(Tensor, functools.partial(sized, batch=batch, more=more), call)


def _result(function: Callable[..., Any], given: Any) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)
    with plain_modes():
        return function(*args, **kwargs)


def _finite(result: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in flatten(result)[0] if isinstance(leaf, Tensor))


def _difference(found: Any, expected: Any) -> tuple[float, str]:
    """Return how far two results are apart relative to the second's length, inf for another form, and it in words."""
    ours, form = flatten(found)
    theirs, expected_form = flatten(expected)
    if form != expected_form:
        return math.inf, f"{form} in place of {expected_form}"
    furthest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return math.inf, f"a {type(a).__name__} in place of a {type(b).__name__}"
        if not isinstance(b, Tensor):
            continue
        if a.shape != b.shape or a.dtype is not b.dtype:
            return math.inf, f"{list(a.shape)} {a.dtype} in place of {list(b.shape)} {b.dtype}"
        if b.is_floating_point() and b.isfinite().all():
            distance, length = (a.double() - b.double()).norm().item(), b.double().norm().item()
            furthest = max(furthest, distance / (length + 1e-6) if math.isfinite(distance) else math.inf)
    return furthest, f"off by {furthest:.2g} of its length"
