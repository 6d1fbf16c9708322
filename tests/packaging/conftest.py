"""A copy of the checkout for the tests of its installation."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, in which an earlier native build has left its traces."""
    source = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, source)
    for folder in (".github", "benchmarks", "csrc", "docs", "examples", "kernels", "resnet_fast", "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(
                ROOT / folder, source / folder, ignore=shutil.ignore_patterns("_C*.so", "_cpu*.so", "__pycache__")
            )
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "some-gpu.json").write_text("{}")
    (source / "resnet_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("of an earlier build")
    (source / "resnet_fast" / "_build_record.json").write_text('{"built": true, "reason": "an earlier build"}')
    return source
