"""What users read: examples in docstrings run, the README's code runs, and files and commands that are named exist."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from PIL import Image

import resnet_fast as rf

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    "resnet_fast",
    "resnet_fast._info",
    "resnet_fast.graph.optimize",
    "resnet_fast.models",
    "resnet_fast.models.checkpoint",
    "resnet_fast.models.images",
    "resnet_fast.models.preprocessing",
    "resnet_fast.models.residual_network",
    "resnet_fast.models.weights",
    "resnet_fast.training.metrics",
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the file that examples name."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 427), "tan").save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, folder: Path) -> None:
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0 and found.failed == 0


def test_examples_of_the_models(folder: Path) -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    (example,) = finder.find(rf.resnet18, "resnet18", globs={})
    assert runner.run(example).attempted == 4 and runner.failures == 0


def test_every_public_function_has_an_example() -> None:
    functions = [getattr(rf.models, name) for name in rf.models.__all__ if name[0].islower()]
    for function in (rf.optimize, rf.info, *functions):
        assert "Examples:\n" in (function.__doc__ or ""), function.__name__


def test_completion_shows_the_public_names_alone() -> None:
    assert sorted(dir(rf)) == sorted(rf.__all__)
    assert set(rf.models.__all__) < set(dir(rf.models))
    assert all(name in rf.models.__all__ or name.endswith("_Weights") for name in dir(rf.models))
    assert all(hasattr(rf, name) for name in dir(rf)) and all(hasattr(rf.models, name) for name in dir(rf.models))


def test_reports_are_short_in_an_interpreter() -> None:
    report = rf.optimize(rf.resnet18().eval()).report()
    for shown in (report, rf.info()):
        assert len(repr(shown)) < 360 and "\n" not in repr(shown) and "print()" in repr(shown)
        assert len(str(shown).splitlines()) > 8
    assert "of 69 layers fused" in repr(report) and "bytes moved" in repr(report)
