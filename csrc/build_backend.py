"""setuptools' build backend, except that what CMake needs is required only if a native build will be tried.

So a machine that gets the pure package needs nothing but setuptools. What is tried is decided in native_build.py.
"""

from __future__ import annotations

from typing import Any

import native_build
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - every other hook is setuptools' own


def _requirements(found: list[str], editable: bool) -> list[str]:
    try:
        return [*found, *native_build.requirements(editable)]
    except native_build.BuildError as error:
        raise SystemExit(str(error)) from None


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings), editable=False)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings), editable=True)
