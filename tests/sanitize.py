"""Runs tests on a CPU engine that is built with sanitizers, in build/, beside the one that is installed.

    python -m tests.sanitize address,undefined [arguments of pytest]
    python -m tests.sanitize thread tests/ops/test_conv_bn_act.py

Needs GCC's libasan, libubsan or libtsan. It stops at the first finding, whose report is the end of the output. Only
what _cpu does is seen, and memory that others allocate: torch and Python are not sanitized. As a plugin of pytest
(``-p``) it puts the sanitized module in place.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MODULE = "RESNET_FAST_SANITIZED"  # the file of the module, for the plugin
KINDS = ("address,undefined", "thread")

OPTIONS = {
    # Python never frees all, and torch catches what new throws.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    # What torch's own threads do to each other is not this test's matter.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0:die_after_fork=0"
    ":exitcode=66",
}


def pytest_configure() -> None:
    path = os.environ[_MODULE]
    import resnet_fast
    from resnet_fast.backends import cpu

    loader = importlib.machinery.ExtensionFileLoader("resnet_fast._cpu", path)
    spec = importlib.util.spec_from_file_location("resnet_fast._cpu", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["resnet_fast._cpu"] = module
    setattr(resnet_fast, "_cpu", module)  # noqa: B010 - as an import does; mypy knows of no such attribute
    assert module.build_info()["sanitizer"] and not cpu.unavailable(), cpu.unavailable()


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        print(f"usage: python -m tests.sanitize {'|'.join(KINDS)} [arguments of pytest]", file=sys.stderr)
        return 2
    kind, arguments = sys.argv[1], sys.argv[2:]
    sys.path.insert(0, str(ROOT / "csrc"))
    import native_build

    folder = ROOT / "build" / f"sanitize-{kind.partition(',')[0]}"
    try:
        native_build.build_engine(folder / "module", build_dir=folder, sanitize=kind)
        libraries = native_build.sanitizer_libraries(kind)
    except native_build.BuildError as error:
        print(f"resnet_fast: not built: {error}", file=sys.stderr)
        return 1
    (module,) = native_build.modules(folder / "module", native_build.ENGINE)
    environment = {**OPTIONS, **os.environ, _MODULE: str(module), "LD_PRELOAD": libraries}
    # The report goes to the file descriptor that pytest would capture.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.sanitize",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-q",
        *arguments,
    ]
    if kind == "thread" and (setarch := shutil.which("setarch")):
        # Older libraries of ThreadSanitizer cannot live with addresses as random as those of newer kernels.
        command = [setarch, platform.machine(), "--addr-no-randomize", *command]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
