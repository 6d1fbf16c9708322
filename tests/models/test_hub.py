"""Weights at `hf://...`, through huggingface_hub's own client and a server on this machine that stands for the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fast as rf
from resnet_fast.models import WeightsError, hub

pytest.importorskip("huggingface_hub")
from safetensors.torch import save_file

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/1": "c" * 40}


class Hub:
    """A hub of the repositories in a folder, `owner/name/file`, that counts what it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                owner, name, _, rest = self.path.lstrip("/").split("/", 3)
                revision, _, file = rest.partition("/")
                revision = revision.replace("%2F", "/")
                commit = COMMITS.get(revision, revision if revision in COMMITS.values() else "")
                path = hub.root / owner / name / file
                if not (hub.root / owner / name).is_dir():
                    return self.refuse("RepoNotFound", 401)
                if name == "gated":
                    return self.refuse("GatedRepo", 403)
                if not commit:
                    return self.refuse("RevisionNotFound", 404)
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", commit)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def refuse(self, code: str, status: int) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo: str, model: torch.nn.Module, config: dict[str, Any] | None = None, file: str = "") -> None:
        path = self.root / repo / (file or "model.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(model.state_dict(), path)
        else:
            torch.save(model.state_dict(), path)
        if config is not None:
            path.with_name("config.json").write_text(json.dumps(config))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, file_download

    made = Hub(tmp_path / "hub")
    for module in (constants, file_download):
        for name, value in (
            ("ENDPOINT", made.address),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_OFFLINE", False),
        ):
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
    yield made
    made.close()


def model(seed: int = 0, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return rf.resnet18(num_classes=2, **kwargs).eval()


PRETRAINED = {"input_size": [3, 96, 96], "crop_pct": 0.75, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5],
              "std": [0.2, 0.2, 0.2]}  # fmt: skip
CONFIG = {"architecture": "resnet18", "num_classes": 2, "label_names": ["cat", "dog"], "pretrained_cfg": PRETRAINED}


def test_weights_and_what_is_said_of_them(served: Hub) -> None:
    theirs = model()
    served.add("me/mine", theirs, CONFIG)
    with torch.no_grad():
        for ours in (rf.resnet18(weights="hf://me/mine"), rf.from_timm("hf://me/mine")):
            assert torch.equal(ours.eval()(X), theirs(X))
    assert rf.models.categories("hf://me/mine") == ("cat", "dog")
    found = rf.models.preprocessing("hf://me/mine")
    assert (found.crop_size, found.resize_size, found.interpolation) == (96, 128, "bicubic")
    assert sum(line.startswith("GET") and line.endswith("model.safetensors") for line in served.asked) == 1
    assert sum("preprocessor_config.json" in line for line in served.asked) == 1  # a commit does not change
    with pytest.raises(WeightsError, match=r"^hf://me/mine: weights of resnet18, not of resnet50, by what is said of"):
        rf.resnet50(weights="hf://me/mine")
    with pytest.raises(WeightsError, match=r"^hf://me/mine does not fit resnet18 .* 2 of another shape"):
        rf.resnet18(weights="hf://me/mine", num_classes=3)


def test_without_a_connection(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is used; what is not is one line, by a server that is gone and by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    served.add("me/mine", model(), CONFIG)
    expected = rf.resnet18(weights="hf://me/mine").state_dict()
    served.close()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        again = rf.resnet18(weights="hf://me/mine").state_dict()
        assert all(torch.equal(again[name], value) for name, value in expected.items())
        for address in ("hf://me/other", "hf://me/mine@v2"):
            with pytest.raises(WeightsError, match=f"^{address}: cannot be downloaded.* not in the cache$"):
                rf.resnet18(weights=address)


def test_files_and_revisions(served: Hub) -> None:
    first, second = model(1), model(2)
    served.add("me/mine", first, file="pytorch_model.bin")
    served.add("me/mine", second, CONFIG, file="runs/last/best.pth")
    for address, theirs in (
        ("hf://me/mine", first),
        ("hf://me/mine@v2", first),
        ("hf://me/mine@refs%2Fpr%2F1", first),
        ("hf://me/mine/runs/last/best.pth", second),
        ("hf://me/mine@v2/runs/last/best.pth", second),
    ):
        with torch.no_grad():
            assert torch.equal(rf.resnet18(weights=address).eval()(X), theirs(X)), address
    assert rf.models.categories("hf://me/mine/runs/last/best.pth") == ("cat", "dog")
    assert hub.fetch("hf://me/mine@v2").parent.name == COMMITS["v2"]


def test_strides_of_transformers(served: Hub) -> None:
    """The configuration decides where a bottleneck's strides are, and another wiring is refused."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(num_labels=3, downsample_in_bottleneck=True)
    theirs = transformers.ResNetForImageClassification(config).eval()
    theirs.save_pretrained(served.root / "me/v1")
    with torch.no_grad():
        expected = theirs(X).logits
        ours = rf.resnet50(weights="hf://me/v1", stride_in_1x1=True).eval()
        torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(WeightsError, match="stride_in_1x1=True"):
        rf.resnet50(weights="hf://me/v1")


def test_pretrained_weights_of_timm(served: Hub) -> None:
    """timm's own way to its weights, for our entry point: `resnet18_fast.tv_in1k` has those of timm's resnet18."""
    timm = pytest.importorskip("timm")
    rf.register_models("timm")
    theirs = rf.resnet18().eval()
    served.add("timm/resnet18.tv_in1k", theirs)
    ours = timm.create_model("resnet18_fast.tv_in1k", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://nobody/nothing", "there is no such repository, or it is private"),
        ("hf://me/gated", "its owner asks for an agreement"),
        ("hf://me/mine@v9", "the repository has no such revision"),
        ("hf://me/empty", "has no model.safetensors and no pytorch_model.bin"),
        ("hf://me/mine/best.pth", "has no best.pth"),
    ],
)
def test_what_is_not_there(address: str, message: str, served: Hub) -> None:
    for name in ("gated", "mine", "empty"):
        (served.root / "me" / name).mkdir(parents=True)
    with pytest.raises(WeightsError, match=f"^{address}: {message}") as caught:
        rf.resnet18(weights=address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://me", "hf://me/", "hf://me/mine/", "hf://me/mine@", "hf://me/mine/../x.pth", "hf://me/mine//x",
     "hf://me /mine", "hf://me/mine@v1@v2"],
)  # fmt: skip
def test_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME"):
        rf.resnet18(weights=address)


def test_other_addresses_and_a_missing_client() -> None:
    with pytest.raises(ValueError, match="weights is a URL"):
        rf.resnet18(weights="https://huggingface.co/me/mine")
    code = """
import sys
sys.modules["huggingface_hub"] = None
import resnet_fast as rf
try:
    rf.resnet18(weights="hf://me/mine")
except rf.models.WeightsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf://me/mine: needs the package huggingface_hub: pip install 'resnet_fast[hub]'")


def test_damaged_weights(served: Hub) -> None:
    served.add("me/mine", model())
    path = served.root / "me/mine/model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="truncated or not a safetensors file"):
        rf.resnet18(weights="hf://me/mine")


def test_command_line(served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from resnet_fast.cli import app

    served.add("me/mine", model(), CONFIG)
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as ended:
        app(["classify", str(tmp_path / "a.png"), "--weights", "hf://me/mine", "--topk", "1"])
    output = capsys.readouterr()
    assert ended.value.code == 0 and ("cat" in output.out or "dog" in output.out), output
