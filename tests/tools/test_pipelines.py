"""The pipelines in examples/ run, each with the library that it is about."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_pipeline(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(library)
    path = EXAMPLES / f"{library}_pipeline.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
