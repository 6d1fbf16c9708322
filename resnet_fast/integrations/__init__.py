"""Connect resnet_fast with timm, torchvision and transformers: their registries, and their models as ours.

Nothing here imports those libraries before it is asked to, and importing resnet_fast registers nothing anywhere.
"""

from __future__ import annotations

import importlib

from resnet_fast.integrations.convert import from_timm, from_torchvision, from_transformers

__all__ = ["from_timm", "from_torchvision", "from_transformers", "register_models"]

_LIBRARIES = ("timm", "torchvision")


def register_models(*libraries: str) -> None:
    """Register the ten models, as `resnet50_fast` and so on, with the registries of other libraries.

    After that `timm.create_model("resnet50_fast")` and `torchvision.models.get_model("resnet50_fast")` make them.
    Registering twice changes nothing.

    Args:
        libraries: "timm" and "torchvision", or one of them.

    Raises:
        ValueError: for any other name, or none.
        ImportError: if the library is not installed.

    Examples:
        >>> import resnet_fast as rf
        >>> rf.register_models("timm")  # doctest: +SKIP
        >>> model = timm.create_model("resnet50_fast", num_classes=10)  # doctest: +SKIP
        >>> rf.register_models("keras")
        Traceback (most recent call last):
        ValueError: register_models: libraries must be of 'timm', 'torchvision', got 'keras'
    """
    wrong = [name for name in libraries if name not in _LIBRARIES]
    if wrong or not libraries:
        given = f"got {wrong[0]!r}" if wrong else "got none"
        raise ValueError(f"register_models: libraries must be of {', '.join(map(repr, _LIBRARIES))}, {given}")
    for name in libraries:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"register_models: {name} cannot be imported ({error}); pip install {name}") from error
        importlib.import_module(f"resnet_fast.integrations.{name}")
