"""Declare what pyproject.toml cannot: the packages' folders, the content of the source archive, the native modules.

This file imports no torch and needs no compiler: CMake builds csrc/ as far as csrc/native_build.py finds that possible.
The top-level folder kernels/ is installed as resnet_fast/kernels/.
"""

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import native_build  # noqa: E402 - it lies in csrc/, which is not a package

# Everything but the packages that a source archive needs to be tested and built like a checkout.
SOURCE_ARCHIVE = (
    ".github/**/*",
    ".pre-commit-config.yaml",
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
    """Add SOURCE_ARCHIVE to the files that setuptools packs by itself."""

    def make_distribution(self) -> None:
        for pattern in SOURCE_ARCHIVE:
            found = (path for path in ROOT.glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
            self.filelist.extend(sorted(str(path.relative_to(ROOT)) for path in found))
        super().make_distribution()


class BuildPython(build_py):
    """Take the files of resnet_fast.kernels from kernels/, and its __init__.py from resnet_fast/kernels/."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.package_dir["resnet_fast.kernels"] = "kernels"

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        if package == "resnet_fast.kernels":
            found.append((package, "__init__", "resnet_fast/kernels/__init__.py"))
        return found


class Build(build):
    """Runs build_ext whether or not there is anything to compile: it also records why there is not."""

    sub_commands: ClassVar = [(name, None if name == "build_ext" else need) for name, need in build.sub_commands]


class BuildNative(build_ext):
    """Builds the modules as PLAN and ENGINE say, writes the record of that, and deletes what earlier builds left."""

    def run(self) -> None:
        source = Path(self.get_finalized_command("build_py").get_package_dir("resnet_fast"))
        out = source if self.inplace else Path(self.build_lib, "resnet_fast")
        built = {
            f"resnet_fast.{native_build.KERNELS}": self.kernels(out),
            f"resnet_fast.{native_build.ENGINE}": self.engine(out),
        }
        self.extensions = self.distribution.ext_modules = [each for each in self.extensions if built[each.name]]

    def kernels(self, out: Path) -> bool:
        if PLAN.keep and self.inplace and native_build.modules(out):
            return True
        try:
            if PLAN.reason:
                native_build.remove_module(out)
                raise native_build.BuildError(PLAN.reason)
            native_build.build(out, PLAN.archs, sm90=PLAN.sm90, strict=PLAN.strict)
        except native_build.BuildError as error:
            native_build.Record(False, str(error)).write(out)
            if PLAN.strict:
                raise SystemExit(f"RESNET_FAST_BUILD=require: {error}") from None
            print(f"resnet_fast: without _C, the CUDA kernels: {error}", flush=True)
            return False
        return True

    def engine(self, out: Path) -> bool:
        try:
            if ENGINE.reason:
                native_build.remove_module(out, native_build.ENGINE)
                raise native_build.BuildError(ENGINE.reason)
            if not (self.inplace and native_build.engine_is_current(out)):
                native_build.build_engine(out)
        except native_build.BuildError as error:
            native_build.EngineRecord(False, str(error)).write(out)
            if ENGINE.strict:
                raise SystemExit(f"RESNET_FAST_CPU=require: {error}") from None
            print(f"resnet_fast: without _cpu, the CPU engine: {error}", flush=True)
            return False
        return True


class Wheel(bdist_wheel):
    """Build before asking whether the wheel is pure, since it is pure if no module could be built."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True  # or installing into the wheel's folder would run build_ext once more
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


try:
    PLAN, ENGINE = native_build.plan(), native_build.engine_plan()
except native_build.BuildError as error:
    raise SystemExit(str(error)) from None
setup(
    # With this single root an editable installation is a line with a path, which type checkers follow, not a hook.
    package_dir={"": "."},
    packages=find_packages(str(ROOT), include=["resnet_fast", "resnet_fast.*"]),
    py_modules=["resnet_fast_cli"],
    # CMakeLists.txt lists the sources. Declaring extensions here only marks the wheel as platform-specific.
    ext_modules=[
        Extension(f"resnet_fast.{name}", sources=[])
        for name, plan in ((native_build.KERNELS, PLAN), (native_build.ENGINE, ENGINE))
        if not plan.reason
    ],
    cmdclass={
        "sdist": SourceArchive,
        "build": Build,
        "build_py": BuildPython,
        "build_ext": BuildNative,
        "bdist_wheel": Wheel,
    },
)
