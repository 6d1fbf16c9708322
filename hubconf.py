"""Entry points for torch.hub: torch.hub.load("<owner>/<repository>", "resnet50", weights=...).

A hub checkout is not installed, so resnet_fast.kernels, which lies in kernels/ at the top, is put in its place here.
"""

import importlib.util
import os
import sys

dependencies = ["torch"]

_ROOT = os.path.dirname(os.path.abspath(__file__))


def _register_kernels() -> None:
    """Make kernels/ importable as resnet_fast.kernels, if the resnet_fast that will be imported is this checkout's."""
    package = importlib.util.find_spec("resnet_fast")
    from_here = package is not None and package.origin == os.path.join(_ROOT, "resnet_fast", "__init__.py")
    if not from_here or "resnet_fast.kernels" in sys.modules:
        return
    folder = os.path.join(_ROOT, "kernels")
    spec = importlib.util.spec_from_file_location(
        "resnet_fast.kernels", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["resnet_fast.kernels"] = kernels
    spec.loader.exec_module(kernels)

    import resnet_fast

    resnet_fast.kernels = kernels


_register_kernels()

from resnet_fast import (  # noqa: E402, F401
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
