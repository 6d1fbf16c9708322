"""The part of the build that pyproject.toml cannot say: where the packages lie, and what goes into the source archive.

It imports no torch and needs no compiler. kernels/ at the top level installs as the package resnet_fast.kernels.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent

# Everything that a source archive has beyond the packages, so that it can be tested and built like a checkout.
SOURCE_ARCHIVE = (
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
    "hubconf.py",
    "kernels/resources.csv",
    "benchmarks/**/*",
    "csrc/**/*",
    "docs/**/*",
    "examples/**/*",
    "tests/**/*",
)


class SourceArchive(sdist):
    """Adds SOURCE_ARCHIVE to what setuptools packs by itself."""

    def make_distribution(self) -> None:
        for pattern in SOURCE_ARCHIVE:
            found = (path for path in ROOT.glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
            self.filelist.extend(sorted(str(path.relative_to(ROOT)) for path in found))
        super().make_distribution()


def check_build_choice() -> None:
    """Obey RESNET_FAST_BUILD, or say plainly why that is impossible."""
    choice = os.environ.get("RESNET_FAST_BUILD", "auto")
    if choice not in ("auto", "off", "require"):
        raise SystemExit(f"RESNET_FAST_BUILD is {choice!r}; it must be one of 'auto', 'off' or 'require'")
    if choice == "require":
        raise SystemExit(
            "RESNET_FAST_BUILD=require: setup.py of this version has no native extension to build yet; "
            "set it to 'auto' or 'off' (or unset it) for the pure-Python package, which is complete without one"
        )


check_build_choice()
setup(
    package_dir={"resnet_fast": "resnet_fast", "resnet_fast.kernels": "kernels"},
    packages=[
        *find_packages(str(ROOT), include=["resnet_fast", "resnet_fast.*"]),
        "resnet_fast.kernels",
        *(f"resnet_fast.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
    ],
    cmdclass={"sdist": SourceArchive},
)
