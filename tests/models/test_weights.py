"""Weights by name, from files and over a connection: what is accepted, what is refused, and what is left behind.

Nothing here needs the internet: downloads come from file:// and from a server on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast.models as models
from resnet_fast.models import checkpoint, weights

torchvision_models = pytest.importorskip("torchvision.models")
pil = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=7)
    return {
        key: value + torch.rand(()) if value.is_floating_point() else value for key, value in model.state_dict().items()
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder for checkpoints, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_torchvision_models", lambda: None)


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())


@contextlib.contextmanager
def refused(*parts: str, begins: str = "", ends: str = "") -> Iterator[None]:
    """Weights are refused here, by an error of one line that has these parts."""
    with pytest.raises(models.WeightsError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and message.startswith(begins) and message.endswith(ends), message
    for part in parts:
        assert part in message


# Local files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".pth.tar"])
@pytest.mark.parametrize("kind", [str, Path])
def test_local_file(tmp_path: Path, state: dict[str, Tensor], suffix: str, kind: type) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    model = models.resnet18(weights=kind(path))
    assert model.fc.out_features == 7
    assert_loaded(model, state)
    assert_loaded(models.resnet18(weights=kind(path), num_classes=7), state)


def test_relative_path_and_old_format(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, "mine", _use_new_zipfile_serialization=False)
    assert_loaded(models.resnet18(weights="mine"), state)


def test_batch_counters_may_be_missing_or_left_over(tmp_path: Path, state: dict[str, Tensor]) -> None:
    from torchvision.ops.misc import FrozenBatchNorm2d

    path = tmp_path / "mine.pth"
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, path)
    assert_loaded(models.resnet18(weights=path), old)
    torch.save(state, path)
    assert_loaded(models.resnet18(weights=path, norm_layer=FrozenBatchNorm2d), old)


def test_half_checkpoint_fills_a_float_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "mine.pth"
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, path)
    model = models.resnet18(weights=path)
    assert model.conv1.weight.dtype is torch.float32
    assert torch.equal(model.conv1.weight, half["conv1.weight"].float())


def _edited(state: dict[str, Tensor], edit: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    changed = dict(state)
    edit(changed)
    return changed


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda s: s.pop("fc.bias"), ["1 missing (fc.bias)"]),
        (lambda s: s.update({"head.weight": torch.ones(2)}), ["1 unexpected (head.weight)"]),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("layer4")],
            ["25 missing (layer4.0.conv1.weight, layer4.0.bn1.weight, layer4.0.bn1.bias, ...)"],
        ),
        (
            lambda s: s.update({"conv1.weight": torch.ones(64, 1, 7, 7), "fc.bias": torch.ones(9)}),
            [
                "2 of another shape",
                "conv1.weight: [64, 1, 7, 7] in the file, [64, 3, 7, 7] in the model",
                "fc.bias: [9] in the file, [7] in the model",
            ],
        ),
        (lambda s: s.update({"fc.bias": torch.ones(7, dtype=torch.int64)}), ["1 of an unusable dtype", "torch.int64"]),
        (lambda s: s.update({"x": s.pop("fc.bias")}), ["1 missing (fc.bias); 1 unexpected (x)"]),
    ],
    ids=["missing", "unexpected", "many", "shapes", "dtype", "both"],
)
def test_checkpoint_that_does_not_fit(
    tmp_path: Path, state: dict[str, Tensor], edit: Callable[[dict[str, Tensor]], Any], parts: list[str]
) -> None:
    path = tmp_path / "mine.pth"
    torch.save(_edited(state, edit), path)
    with refused(*parts, begins="mine.pth does not fit resnet18 with 122 entries: "):
        models.resnet18(weights=path)


def test_another_architecture_and_number_of_classes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    with pytest.raises(models.WeightsError, match=r"does not fit resnet34 with 218 entries: 80 missing"):
        models.resnet34(weights=path)
    with pytest.raises(models.WeightsError, match=r"fc.weight: \[7, 512\] in the file, \[10, 512\] in the model"):
        models.resnet18(weights=path, num_classes=10)


def test_nothing_is_loaded_from_a_checkpoint_that_does_not_fit(state: dict[str, Tensor]) -> None:
    model = models.resnet18(num_classes=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = _edited(state, lambda s: s.update({"fc.bias": torch.ones(9)}))
    with pytest.raises(models.WeightsError):
        checkpoint.load_into(model, wrong, source="x", name="resnet18")
    assert_loaded(model, before)


class _Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def _torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda path, bomb: torch.save(bomb, path), "mkdir"),
        (lambda path, bomb: torch.save({"fc.weight": torch.ones(2, 2), "x": bomb}, path), "mkdir"),
        (lambda path, bomb: torch.save({"x": bomb}, path, _use_new_zipfile_serialization=False), "mkdir"),
        (lambda path, bomb: path.write_bytes(pickle.dumps(bomb)), "mkdir"),
        (lambda path, bomb: path.write_bytes(pickle.dumps(bomb, protocol=2)), "mkdir"),
        (lambda path, bomb: torch.save(nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
        (lambda path, bomb: torch.save({"args": argparse.Namespace(lr=1)}, path), "argparse.Namespace"),
        (lambda path, bomb: _torchscript(path), "TorchScript"),
    ],
    ids=["zip", "in a dictionary", "old format", "pickle 4", "pickle 2", "module", "namespace", "TorchScript"],
)
def test_code_is_refused_and_not_run(tmp_path: Path, write: Callable[[Path, Any], Any], named: str) -> None:
    path, trace = tmp_path / "bomb.pth", tmp_path / "exploded"
    write(path, _Bomb(trace))
    with refused("refused: contains code, not just tensors", named):
        models.resnet18(weights=path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello world", "not a PyTorch checkpoint"),
        (b"<!DOCTYPE html><html>404</html>", "not a PyTorch checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a PyTorch checkpoint"),
        (b"PK\x03\x04" + bytes(1000), "truncated"),
    ],
    ids=["empty", "text", "html", "png", "broken zip"],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    with refused(message):
        models.resnet18(weights=path)
    path = path.rename(tmp_path / "mine.safetensors")
    with pytest.raises(models.WeightsError, match=r"not a safetensors file|empty|truncated"):
        models.resnet18(weights=path)


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.999999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".old"])
def test_truncated_file(tmp_path: Path, state: dict[str, Tensor], suffix: str, keep: float) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with refused("truncated"):
        models.resnet18(weights=path)


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody replace a file that is open")
def test_weights_replaced_while_they_are_opened(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes are read first, the data by another opening of the file: both must be of one file."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    path, opening = tmp_path / "mine.safetensors", torch.UntypedStorage.from_file
    renamed = {name.upper(): torch.full_like(tensor, 7) for name, tensor in state.items()}
    save_file(state, path)

    def replace_then_open(*args: Any, **kwargs: Any) -> Any:
        if (new := tmp_path / "new").exists():
            new.replace(path)
        return opening(*args, **kwargs)

    save_file(renamed, tmp_path / "new")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_then_open)
    assert same(checkpoint.read_checkpoint(path), renamed)

    def delete_then_open(*args: Any, **kwargs: Any) -> Any:
        path.unlink()
        return opening(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", delete_then_open)
    with pytest.raises(models.WeightsError, match=rf"^{path}: cannot be read \(No such file"):
        checkpoint.read_checkpoint(path)


class OrderedDictWith:
    """Unpickled as an OrderedDict with attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.attributes = attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.attributes, None, iter({"a": torch.ones(2)}.items())


def test_metadata_in_a_state_dict(tmp_path: Path) -> None:
    path, told = tmp_path / "mine.pth", {"names": "caffe", "x": ""}
    linear = nn.Linear(2, 2)
    state = checkpoint.with_metadata(linear.state_dict(), told)
    for content in (state, {"state_dict": state, "epoch": 3}, {"model": state}):
        torch.save(content, path)
        found, metadata = checkpoint.read_with_metadata(path)
        assert metadata == told and same(found, linear.state_dict())
    torch.save(state, path)
    loaded = torch.load(path, weights_only=True)
    nn.Linear(2, 2).load_state_dict(loaded)  # others do not mind
    torch.save(loaded, path)
    assert checkpoint.read_with_metadata(path)[1] == told
    torch.save(linear.state_dict(), path)
    assert checkpoint.read_with_metadata(path)[1] == {}
    assert not hasattr(checkpoint.with_metadata(linear.state_dict(), {}), "_metadata")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_was_read_can_be_saved_and_read_again(tmp_path: Path, suffix: str) -> None:
    state, path = nn.Linear(2, 2).state_dict(), tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(checkpoint.with_metadata(state, {"a": "b"}), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path, {"a": "b"})
    torch.save(checkpoint.read_checkpoint(path), tmp_path / "again.pth")
    assert same(torch.load(tmp_path / "again.pth", weights_only=True), state)
    assert same(checkpoint.read_checkpoint(tmp_path / "again.pth"), state)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (dict.fromkeys("0123456789", "x" * 2**22), "refused: 41,943,050 characters of metadata"),
        ({"a": "\ud800"}, r"damaged: its metadata is not text \(surrogates not allowed\)"),
        ({"\ud800": "a"}, "damaged: its metadata is not text"),
    ],
    ids=["long", "surrogate", "surrogate as key"],
)
def test_unusable_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    """The first is a file of 4 MB, in which ten entries are one string."""
    path = tmp_path / "mine.pth"
    torch.save(checkpoint.with_metadata({"a": torch.ones(2)}, metadata), path)
    assert path.stat().st_size < 5e6
    with pytest.raises(models.WeightsError, match=rf"^{path}: {message}"):
        checkpoint.read_checkpoint(path)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"_metadata": 3},
        {"_metadata": {}},
        {"_metadata": {"": 3}},
        {"_metadata": {"": {"resnet_fast": 3}}},
        {"_metadata": {"": {"resnet_fast": {"stride_in_1x1": True}}}},
        {"_metadata": {"": {"resnet_fast": {3: "x"}}}},
        {"_metadata": OrderedDictWith(get=3)},
        {"_metadata": {"": {"resnet_fast": OrderedDictWith(items=3)}}},
        {"items": 3, "get": 3, "keys": 3, "__class__": 3},
    ],
)
def test_odd_metadata_of_a_state_dict(tmp_path: Path, attributes: dict[str, Any]) -> None:
    torch.save(OrderedDictWith(**attributes), tmp_path / "mine.pth")
    found, metadata = checkpoint.read_with_metadata(tmp_path / "mine.pth")
    assert metadata == {} and list(found) == ["a"] and torch.equal(found["a"], torch.ones(2))


def test_size_limit(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    monkeypatch.setattr(checkpoint, "MAX_CHECKPOINT_BYTES", 2**20)
    with pytest.raises(models.WeightsError, match="more than the limit of 1,048,576"):
        models.resnet18(weights=path)
    # A small file that unpacks to a large one.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mine/data.pkl", bytes(2**21))
    assert path.stat().st_size < 2**20
    with pytest.raises(models.WeightsError, match="more than the limit"):
        models.resnet18(weights=path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such weights file"):
        models.resnet18(weights="nowhere.pth")
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        models.resnet18(weights=str(tmp_path / "IMAGENET1K_V1"))
    with pytest.raises(models.WeightsError, match="directory"):
        models.resnet18(weights=tmp_path)


# Names and enums


@pytest.mark.parametrize("name", models.list_models())
def test_own_table_is_torchvisions(name: str, without_torchvision: None) -> None:
    own, theirs = models.get_model_weights(name), torchvision_models.get_model_weights(name)
    assert own is not theirs
    assert own.__name__ == theirs.__name__
    assert list(own.__members__) == list(theirs.__members__)
    assert own["DEFAULT"].name == theirs["DEFAULT"].name
    for mine, reference in zip(own, theirs, strict=True):
        assert mine.url == reference.url
        assert weights._table()[name]["weights"][mine.name]["sha256_prefix"] in mine.url
        assert repr(mine) == str(mine) == str(reference)
        for key in ("categories", "num_params", "min_size", "_ops", "_file_size"):
            assert mine.meta[key] == reference.meta[key]
        assert mine.meta["_metrics"] == reference.meta["_metrics"]
        assert mine.transforms() == models.Preprocessing.from_transforms(reference.transforms())
        assert weights.num_classes(mine) == 1000


def test_lookup(without_torchvision: None) -> None:
    member = models.ResNet50_Weights.IMAGENET1K_V2
    assert isinstance(member, weights.WeightsEnum)
    assert models.ResNet50_Weights.DEFAULT is member
    assert models.get_weight("ResNet50_Weights.IMAGENET1K_V2") is member
    assert models.get_model_weights(models.resnet50) is models.ResNet50_Weights
    assert {"ResNet18_Weights", "Wide_ResNet101_2_Weights"} <= set(dir(models))
    assert pickle.loads(pickle.dumps(member)) is member
    assert models.preprocessing(member).resize_size == 232
    assert models.preprocessing("ResNet50_Weights.IMAGENET1K_V1").resize_size == 256
    assert models.preprocessing() == models.Preprocessing()
    with pytest.raises(AttributeError):
        models.ResNet20_Weights  # noqa: B018
    for wrong in ("ResNet50_Weights.V9", "ResNet50_Weights", "V1", "ResNet20_Weights.DEFAULT"):
        with pytest.raises(ValueError, match="unknown weights"):
            models.get_weight(wrong)
    with pytest.raises(ValueError, match=r"does not say which model's weights; 'ResNet50_Weights\.IMAGENET1K_V1'"):
        models.preprocessing("IMAGENET1K_V1")
    with pytest.raises(ValueError, match="unknown model 'resnet20'"):
        models.get_model_weights("resnet20")


def test_torchvisions_enums_are_used_where_it_imports() -> None:
    assert models.ResNet50_Weights is torchvision_models.ResNet50_Weights
    assert models.preprocessing(torchvision_models.ResNet50_Weights.DEFAULT).resize_size == 232


def test_a_torchvision_that_does_not_import_counts_as_none() -> None:
    code = """
import sys, types
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" or name.startswith("torchvision."):
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken())
import resnet_fast.models as models
assert type(models.ResNet18_Weights.DEFAULT).__module__ == "resnet_fast.models"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            "IMAGENET1K_V9",
            ValueError,
            "resnet18: unknown weights 'IMAGENET1K_V9', expected one of IMAGENET1K_V1, DEFAULT",
        ),
        ("ResNet50_Weights.IMAGENET1K_V1", ValueError, "resnet18: unknown weights"),
        ("https://example.org/x.pth", ValueError, "is a URL"),
        ({"a": 1}, TypeError, "must be None, a member of ResNet18_Weights, a name or a path, got dict"),
        (
            torchvision_models.ResNet50_Weights.DEFAULT,
            TypeError,
            "member of ResNet18_Weights, got ResNet50_Weights.IMAG",
        ),
    ],
)
def test_wrong_weights_argument(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.resnet18(weights=given)


# Downloads


class _Server:
    """Serves one file on 127.0.0.1; can promise more bytes than it sends."""

    def __init__(self, content: bytes, sent: int | None = None, status: int = 200) -> None:
        self.requests: list[str] = []
        requests = self.requests

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                requests.append("HEAD")
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                requests[-1] = "GET"
                if status == 200:
                    self.wfile.write(content[:sent])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., _Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with contextlib.ExitStack() as stack:

        def start(content: bytes, **options: Any) -> _Server:
            server = _Server(content, **options)
            stack.callback(server.close)
            return server

        yield start


def named_by_hash(content: bytes, name: str = "resnet18") -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"


@pytest.mark.parametrize("progress", [True, False])
def test_download(hub: Path, serve: Callable[..., _Server], capfd: pytest.CaptureFixture[str], progress: bool) -> None:
    content = os.urandom(300_000)
    server, name = serve(content), named_by_hash(content)
    path = weights.download(f"{server.url}/{name}", progress=progress)
    assert path == hub / name
    assert path.read_bytes() == content
    assert os.listdir(hub) == [name]
    assert ("100" in capfd.readouterr().err) == progress
    requests = len(server.requests)
    assert weights.download(f"{server.url}/{name}") == path
    assert len(server.requests) == requests, "a verified file is not fetched again"


@pytest.mark.parametrize(
    "options", [{"sent": 100_000}, {"status": 404}, {"status": 500}], ids=["cut off", "not found", "server error"]
)
def test_failed_transfer_leaves_nothing(hub: Path, serve: Callable[..., _Server], options: dict[str, int]) -> None:
    content = os.urandom(300_000)
    server, name = serve(content, **options), named_by_hash(content)
    advice = f"); without a connection, put the file {name} into {hub}"
    with refused(begins=f"cannot download {server.url}/{name} (", ends=advice):
        weights.download(f"{server.url}/{name}", progress=False)
    assert os.listdir(hub) == []


def test_wrong_hash_leaves_nothing(hub: Path, serve: Callable[..., _Server]) -> None:
    server = serve(b"something else")
    with pytest.raises(models.WeightsError, match="invalid hash value"):
        weights.download(f"{server.url}/{named_by_hash(b'what was promised')}", progress=False)
    assert os.listdir(hub) == []


def test_interrupted_download_leaves_nothing(
    hub: Path, serve: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(300_000)
    monkeypatch.setattr(torch.hub, "tqdm", lambda **options: contextlib.nullcontext(_Interrupt()))
    with pytest.raises(KeyboardInterrupt):
        weights.download(f"{serve(content).url}/{named_by_hash(content)}")
    assert os.listdir(hub) == []


class _Interrupt:
    def update(self, count: int) -> None:
        raise KeyboardInterrupt


def test_offline(hub: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/resnet50-11ad3fa6.pth"
        with refused(url, f"put the file resnet50-11ad3fa6.pth into {hub}"):
            weights.download(url)


def test_damaged_file_is_reported_and_not_used(hub: Path, serve: Callable[..., _Server]) -> None:
    content = b"the right content"
    server, name = serve(content), named_by_hash(content)
    hub.mkdir(parents=True)
    (hub / name).write_bytes(b"half of it")
    with pytest.raises(models.WeightsError, match=r"damaged: its SHA-256 begins with .* delete the file") as caught:
        weights.download(f"{server.url}/{name}")
    assert str(hub / name) in str(caught.value)
    assert server.requests == []
    (hub / name).unlink()
    assert weights.download(f"{server.url}/{name}", progress=False).read_bytes() == content


def test_folder_that_cannot_be_made(hub: Path) -> None:
    hub.parent.write_text("a file where a folder should be")
    with pytest.raises(models.WeightsError, match=r"cannot download .*put the file"):
        weights.download("file:///nowhere/resnet50-11ad3fa6.pth")


def test_url_without_hash(hub: Path) -> None:
    with pytest.raises(models.WeightsError, match="no SHA-256 prefix"):
        weights.download("https://example.org/resnet50.pth")


def _publish(folder: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> str:
    """Makes the own table's ResNet-18 weights come from a file:// URL. Returns the file's name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = named_by_hash(buffer.getvalue())
    (folder / name).write_bytes(buffer.getvalue())
    entry = dict(weights._table()["resnet18"]["weights"]["IMAGENET1K_V1"], url=(folder / name).as_uri())
    table = {**weights._table(), "resnet18": {**weights._table()["resnet18"], "weights": {"IMAGENET1K_V1": entry}}}
    monkeypatch.setattr(weights, "_table", lambda: table)
    return name


@pytest.mark.filterwarnings("ignore::UserWarning")  # each old way warns twice; one of them is expected below
def test_weights_by_name_end_to_end(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, without_torchvision: None
) -> None:
    torch.manual_seed(1)
    published = models.resnet18().state_dict()
    weights._own_enum.cache_clear()
    try:
        name = _publish(tmp_path, monkeypatch, published)
        member = models.ResNet18_Weights.IMAGENET1K_V1
        for given in ("IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.DEFAULT", member):
            assert_loaded(models.resnet18(weights=given, progress=False), published)
        assert os.listdir(hub) == [name]
        assert list(member.get_state_dict(progress=False)) == list(published)
        assert_loaded(models.get_model("resnet18", weights="DEFAULT", num_classes=1000), published)
        with pytest.raises(ValueError, match=r"num_classes must be 1000 here, got 10; .* model.fc = "):
            models.resnet18(weights="DEFAULT", num_classes=10)
        for arguments, keywords in (
            ((True,), {}),
            ((), {"pretrained": True}),
            (("legacy",), {}),
            ((), {"weights": True}),
        ):
            with pytest.warns(UserWarning, match=r"weights=ResNet18_Weights\.IMAGENET1K_V1"):
                assert_loaded(models.resnet18(*arguments, **keywords), published)
    finally:
        weights._own_enum.cache_clear()


def test_weights_of_a_torchvision_enum(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in torch.hub's folder serves torchvision's members, and ours checks its hash."""
    torch.manual_seed(1)
    published = torchvision_models.resnet18()
    buffer = io.BytesIO()
    torch.save(published.state_dict(), buffer)
    hub.mkdir(parents=True)
    member = torchvision_models.ResNet18_Weights.IMAGENET1K_V1
    file = hub / Path(member.url).name
    file.write_bytes(buffer.getvalue())
    with pytest.raises(models.WeightsError, match="damaged"):
        models.resnet18(weights=member)
    monkeypatch.setattr(weights, "_sha256", lambda path: "f37072fd" + "0" * 56)
    assert_loaded(models.resnet18(weights=member), published.state_dict())
    assert_loaded(models.resnet18(weights="DEFAULT"), published.state_dict())


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_has_weights_for_pretrained(name: str) -> None:
    assert weights.legacy_default(name) is torchvision_models.get_model_weights(name).IMAGENET1K_V1


# Labels and preprocessing


def test_categories() -> None:
    assert list(models.categories()) == torchvision_models.ResNet50_Weights.DEFAULT.meta["categories"]


def _photograph(width: int, height: int, mode: str = "RGB") -> Any:
    generator = torch.Generator().manual_seed(width * 1000 + height)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    noisy = (smooth * 255 + torch.randint(-20, 20, smooth.shape, generator=generator)).clamp(0, 255).byte()
    return pil.frombytes("RGB", (width, height), noisy[0].permute(1, 2, 0).numpy().tobytes()).convert(mode)


@pytest.mark.parametrize(
    "size", [(640, 427), (427, 640), (256, 256), (224, 224), (1, 1), (1, 300), (231, 233), (1023, 257), (50, 37)]
)
@pytest.mark.parametrize("member", list(torchvision_models.ResNet50_Weights), ids=lambda member: member.name)
def test_preprocessing_gives_torchvisions_numbers(member: Any, size: tuple[int, int]) -> None:
    image = _photograph(*size)
    actual = models.preprocessing(member)(image)
    assert actual.shape == (3, 224, 224)
    assert actual.dtype is torch.float32
    assert actual.is_contiguous()
    assert torch.equal(actual, member.transforms()(image))


@pytest.mark.parametrize("crop", [224, 301, 300])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_preprocessing_with_other_facts(crop: int, interpolation: str) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    facts: dict[str, Any] = {"crop_size": crop, "resize_size": 250, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    preset = ImageClassification(**facts, interpolation=InterpolationMode(interpolation))
    ours = models.Preprocessing(**facts, interpolation=interpolation)
    assert models.Preprocessing.from_transforms(preset) == ours
    image = _photograph(333, 251)
    assert torch.equal(ours(image), preset(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_preprocessing_of_other_modes(mode: str) -> None:
    image = _photograph(300, 260, mode)
    assert torch.equal(models.Preprocessing()(image), models.Preprocessing()(image.convert("RGB")))


def test_preprocessing_errors() -> None:
    with pytest.raises(ValueError, match="floating point pixels"):
        models.Preprocessing()(pil.new("F", (10, 10)))
    with pytest.raises(TypeError, match=r"expected a PIL\.Image\.Image, got Tensor"):
        models.Preprocessing()(torch.zeros(3, 10, 10))
    with pytest.raises(ValueError, match="0x5"):
        models.Preprocessing()(pil.new("RGB", (0, 5)))
    for facts in ({"crop_size": 0}, {"mean": (0.5,)}, {"std": (1.0, 0.0, 1.0)}, {"interpolation": "cubic"}):
        with pytest.raises(ValueError, match=next(iter(facts))):
            models.Preprocessing(**facts)
