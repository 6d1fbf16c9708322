"""What users read: examples in docstrings run, the README's code runs, and files and commands that are named exist."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

import resnet_fast as rf
from resnet_fast.cli import app

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "resnet_fast").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8") and path.stem != "resnet"  # whose functions have one text
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
    integrations = (rf.from_timm, rf.from_torchvision, rf.from_transformers, rf.register_models)
    for function in (rf.optimize, rf.info, rf.list_models, *integrations, *functions):
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


# --- the README and the other pages


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readmes_code_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "resnet50.pth"
    torch.save(rf.resnet50().state_dict(), weights)
    monkeypatch.setattr("resnet_fast.models.weights.download", lambda url, progress=True: weights)
    net = rf.caffe.from_state_dict(rf.resnet50(stride_in_1x1=True, unpadded_pool=True).state_dict(), 50)
    rf.caffe.save(net, "deploy.prototxt", "weights.caffemodel")
    names = {"your_model": rf.resnet18(), "images": torch.rand(1, 3, 224, 224)}
    with torch.no_grad():
        for block in blocks(ROOT / "README.md", "python"):
            exec(block, names)
    out = capsys.readouterr().out
    assert re.search(r"^.+ \d+\.\d%$", out.splitlines()[0]) and "layers fused" in out
    assert set(names["blobs"]) == {"res2a", "pool5"}  # type: ignore[call-overload]


def commands() -> list[str]:
    """The commands in the shell blocks of the README, CONTRIBUTING.md and docs/, fenced or indented."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = "".join(re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).splitlines()
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    return [re.split(r"\s#\s", line.strip())[0] for line in lines if re.match(r" *(resnet-fast|make) [a-z]", line)]


@pytest.mark.parametrize("command", sorted({line for line in commands() if line.lstrip().startswith("resnet-fast")}))
def test_commands_have_their_options(command: str) -> None:
    node: Any = typer.main.get_command(app)
    words = shlex.split(re.sub(r"\\$", "", command))[1:]
    while words and hasattr(node, "commands"):
        node = node.commands[words.pop(0)]
    known = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
    assert used <= known, used - known


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_make_has_the_targets_that_are_named() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    lines = commands() + re.findall(r"\bmake .*", "\n".join(path.read_text(encoding="utf-8") for path in workflows))
    used = {word for line in lines if line.startswith("make ") for word in line.split()[1:2] if word[0].islower()}
    assert {"test", "demo", "lint", "wheel"} <= used <= targets(), used - targets()


def test_pre_commit_has_the_versions_of_make_lint() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^([a-z-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for repository, tool in (("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format")):
        assert f"/{repository}\n    rev: v{versions[tool]}\n" in config
    for package in ("mypy", "torch"):
        assert f"- {package}=={versions[package]}\n" in config


@pytest.mark.parametrize(
    ("subject", "right"),
    [
        ("ops: fold the convolution bias into shift", True),
        ("train imagenet: survive bad files", True),
        ("Merge branch 'main' into gpu", True),
        ("docs: pass, process, embed, seed and bring", True),
        ("fold the convolution bias into shift", False),
        ("ops: folds the convolution bias into shift", False),
        ("ops: folded the convolution bias", False),
        ("ops: folding the convolution bias", False),
        ("ops: the convolution bias is folded into shift", False),
        ("docs: what changed for GPUs", False),
        (f"ops: fold {'x' * 63}", False),
    ],
)
def test_the_hook_for_commit_subjects(subject: str, right: bool) -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"entry: >-\n +(.+)$", config, re.MULTILINE)
    message = f"{subject}\n\nThe body: explains {'at length ' * 20}\n# what changed"
    assert bool(re.search(pattern, message, re.MULTILINE | re.DOTALL)) is not right  # as pygrep's --multiline


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "csrc/README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))],
)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = {
        target for target in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / page).parent.joinpath(target).exists()
    }
    assert not links
    quoted = re.findall(r"`((?:resnet_fast|kernels|csrc|tests|benchmarks|docs)/[\w./*-]+)`", text)
    written = ("benchmarks/results/", "kernels/tuned/")  # by commands
    absent = [name for name in quoted if not name.startswith(written) and not list(ROOT.glob(name))]
    assert not absent


@pytest.mark.slow
def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "drop_in.py"], capture_output=True, text=True, timeout=300, check=True
    )
    assert "largest difference" in done.stdout
