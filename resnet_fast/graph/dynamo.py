"""``torch.compile(model, backend="resnet_fast")``: the passes of this package on Dynamo's graphs.

torch finds `backend` by the entry point of the installed package; where none is installed, pass the function itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from . import live

__all__ = ["backend"]

_log = logging.getLogger(__name__)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a graph of ``torch.compile``: fuse the layers of ResNets, and hand the rest to another backend.

    Parameters stay inputs: folded weights are packed again when somebody has changed them, gradients flow, and running
    statistics are brought up to date. ``torch._dynamo.utils.counters["resnet_fast"]`` counts the fused ops.

    Args:
        gm: the graph, which is changed. example_inputs: fake tensors and symbolic sizes.
        mode: as for ``torch.compile``; for the rest if that is inductor's.
        options: ``rest`` names the backend that compiles what is left: "inductor" (the default), "eager", or another of
            ``torch.compiler.list_backends()``. All others are inductor's.

    Raises:
        ValueError: there is no such backend, or it takes no mode or no further options.

    Examples:
        >>> import torch, torchvision
        >>> model = torchvision.models.resnet18().eval()
        >>> fast = torch.compile(model, backend="resnet_fast", options={"rest": "eager"})
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.utils import counters

    further = dict(options or {})
    rest = further.pop("rest", "inductor")
    names = _names()
    if rest not in names:
        raise ValueError(f"torch.compile: resnet_fast's option rest is {rest!r}; it must be one of {names}")
    if rest == "inductor" and (unknown := [name for name in further if name not in _options_of_inductor()]):
        raise ValueError(f"torch.compile: option {unknown[0]!r} is none of inductor's, and of resnet_fast's only rest")
    if rest != "inductor" and (further or mode):
        wrong = f"option {next(iter(further))!r}" if further else f"mode={mode!r}"
        raise ValueError(f"torch.compile: {wrong} is for inductor, and resnet_fast's option rest is {rest!r}")
    made = live.fuse(gm)
    counters["resnet_fast"].update(made)
    _log.info("fused %s", ", ".join(f"{op} {count} times" for op, count in made.items()) or "nothing")
    if rest != "inductor":
        return lookup_backend(rest)(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **further}
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def _names() -> list[str]:
    from torch._dynamo.backends.registry import list_backends

    return [name for name in list_backends(exclude_tags=()) if name != "resnet_fast"]


def _options_of_inductor() -> list[str]:
    from torch._inductor import list_options

    return list_options()
