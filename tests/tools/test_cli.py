"""The command line: its answers, its JSON, and that whatever a user does wrong gives one line and no traceback."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from typer.main import get_command

import resnet_fast as rf
from resnet_fast import models
from resnet_fast.cli import app, classify, common, demo, images
from resnet_fast.graph import optimize as real_optimize
from resnet_fast.inference.labels import labels_for
from resnet_fast.models import weights as registry
from tests.command_line import run, run_process

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and checkpoints, good and bad."""
    made = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (90, 120, 3), dtype=torch.uint8)
    photo = Image.frombytes("RGB", (120, 90), bytes(pixels.flatten().tolist()))
    photo.save(made / "photo.jpg", quality=90)
    photo.save(made / "photo [1].png")
    (made / "truncated.jpg").write_bytes((made / "photo.jpg").read_bytes()[:3000])
    (made / "truncated.png").write_bytes((made / "photo [1].png").read_bytes()[:9000])
    (made / "text.jpg").write_text("not an image")
    (made / "empty.jpg").write_bytes(b"")
    (made / "none").mkdir()
    (made / "loop.jpg").symlink_to("loop.jpg")

    state = models.resnet18(num_classes=10).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, made / "ten.safetensors")
    torch.save({"state_dict": state}, made / "ten.pth")
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, made / "shape.pth")
    torch.save(state | {"fc.bias": torch.full((10,), float("nan"))}, made / "nan.pth")
    (made / "text.pth").write_text("not a checkpoint")
    (made / "bomb.pth").write_bytes(pickle.dumps(Bomb(made / "exploded")))
    return made


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# --- classify


def test_classify_says_what_the_plain_network_says(folder: Path) -> None:
    arguments = ["classify", folder / "photo.jpg", folder / "photo [1].png"]
    found = run(*arguments, "-a", "resnet18", "-w", folder / "ten.safetensors", "--topk", "3", "--json", "-").json()
    assert set(found) == {"schema", "arch", "weights", "dtype", "images", "errors"}
    assert (found["schema"], found["arch"], found["dtype"], found["errors"]) == (1, "resnet18", "float32", [])
    assert [entry["path"] for entry in found["images"]] == [str(path) for path in arguments[1:]]

    model = models.resnet18(weights=None, num_classes=10).eval()
    model.load_state_dict(models.read_checkpoint(folder / "ten.safetensors"))
    for entry in found["images"]:
        with torch.no_grad():
            scores = model(models.preprocessing()(images.read_image(Path(entry["path"])))[None])[0].softmax(0)
        values, indices = scores.topk(3)
        assert [row["index"] for row in entry["predictions"]] == indices.tolist()
        assert [row["label"] for row in entry["predictions"]] == [f"class {index}" for index in indices.tolist()]
        assert [row["probability"] for row in entry["predictions"]] == pytest.approx(values.tolist(), rel=1e-4)


def test_classify_wires_the_network_as_the_file_says(folder: Path, tmp_path: Path) -> None:
    """As transformers' with downsample_in_bottleneck, whose weights fit either wiring."""
    model = models.resnet50(num_classes=3, stride_in_1x1=True).eval()
    save_file(model.state_dict(), tmp_path / "v1.safetensors", {"stride_in_1x1": "true"})
    image = folder / "photo [1].png"
    found = run(
        "classify", image, "-a", "resnet50", "-w", tmp_path / "v1.safetensors", "--topk", "3", "--json", "-"
    ).json()
    with torch.no_grad():
        wanted = model(models.preprocessing(models.ResNet50_Weights.IMAGENET1K_V1)(image)[None]).softmax(1)[0]
    given = sorted(each["probability"] for each in found["images"][0]["predictions"])
    assert given == pytest.approx(sorted(wanted.tolist()), rel=1e-3)


def test_classify_prints_a_table(folder: Path) -> None:
    found = run("classify", folder / "photo [1].png", "-a", "resnet18", "-w", folder / "ten.pth", "--dtype", "bfloat16")
    assert found.code == 0, found.err
    assert "[1]" in found.out
    assert "bfloat16" in found.out and "class" in found.out and "%" in found.out
    assert found.err == ""


def test_classify_goes_on_after_a_bad_image(folder: Path) -> None:
    arguments = ["-a", "resnet18", "-w", folder / "ten.pth", "--json", "-"]
    found = run("classify", folder / "truncated.jpg", folder / "photo.jpg", *arguments)
    found.failed("truncated.jpg: damaged or unreadable image")
    data = json.loads(found.out)
    assert [Path(entry["path"]).name for entry in data["images"]] == ["photo.jpg"]
    assert [Path(entry["path"]).name for entry in data["errors"]] == ["truncated.jpg"]


@pytest.mark.parametrize(
    ("image", "mention"),
    [
        ("truncated.jpg", "damaged or unreadable image"),
        ("truncated.png", "damaged or unreadable image"),
        ("text.jpg", "not an image that Pillow reads"),
        ("empty.jpg", "not an image that Pillow reads"),
        ("absent.jpg", "no such file"),
        ("none", "a directory without images"),
        ("loop.jpg", "cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_bad_images(image: str, mention: str, folder: Path) -> None:
    run("classify", folder / image, "-w", folder / "ten.pth").failed(mention, str(folder / image))


@pytest.mark.parametrize(
    ("weights", "mentions"),
    [
        ("absent.pth", ["absent.pth", "no such"]),
        ("shape.pth", ["conv1.weight: [64, 1, 7, 7] in the file, [64, 3, 7, 7] in the model"]),
        ("text.pth", ["text.pth"]),
        ("bomb.pth", ["contains code"]),
        ("nan.pth", ["not finite"]),
        ("photo.jpg", ["photo.jpg"]),
    ],
)
def test_bad_weights(weights: str, mentions: list[str], folder: Path) -> None:
    found = run("classify", folder / "photo.jpg", "-a", "resnet18", "-w", folder / weights)
    found.failed(*mentions)
    assert not (folder / "exploded").exists()


def test_unknown_weights_name(folder: Path) -> None:
    run("classify", folder / "photo.jpg", "-w", "IMAGENET9K").failed("unknown weights 'IMAGENET9K'", "IMAGENET1K_V2")


@pytest.mark.parametrize("command", [["classify", "photo.jpg"], ["bench"], ["demo"]])
def test_unknown_arch_lists_the_ten(command: list[str]) -> None:
    run(*command, "-a", "resnet19").failed("unknown arch 'resnet19'", *models.list_models())


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["classify"], "IMAGE"),
        (["classify", "photo.jpg", "--dtype", "int3"], "int3"),
        (["classify", "photo.jpg", "--topk", "0"], "topk"),
        (["classify", "photo.jpg", "--threads", "none"], "threads"),
        (["bench", "--batch-size", "0"], "batch"),
        (["bench", "--nonsense"], "nonsense"),
        (["clasify"], "Did you mean 'classify'"),
    ],
)
def test_wrong_arguments(arguments: list[str], mention: str) -> None:
    run(*arguments).failed(mention, code=2)


def test_offline_says_which_file_belongs_where(folder: Path, tmp_path: Path) -> None:
    nowhere = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    found = run_process("classify", folder / "photo.jpg", **nowhere)
    found.failed("resnet50-11ad3fa6.pth", str(tmp_path / "hub" / "checkpoints"))
    assert found.out == ""


def test_labels_and_preprocessing_of_local_files() -> None:
    assert labels_for(1000)[0] == "tench"
    assert labels_for(3) == ("class 0", "class 1", "class 2")
    assert labels_for(2, {"classes": '["cat", "dog"]'}) == ("cat", "dog")
    for unusable in (
        "",
        "[",
        "[" * 10**5,
        "3",
        '["cat"]',
        '["cat", 3]',
    ):
        assert labels_for(2, {"classes": unusable}) == ("class 0", "class 1")
    assert common.printable("cat \udcff\x1b[31m\n") == r"cat \udcff\x1b[31m\n"
    assert registry.preprocessing_of(Path("x/resnet50-11ad3fa6.pth"), {}).resize_size == 232
    assert registry.preprocessing_of(Path("x/mine.pth"), {}).resize_size == 256


def test_every_argument_has_its_row_under_the_name_it_was_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside" / "deep").mkdir(parents=True)
    for name in ("a.webp", "inside/b.bmp", "inside/deep/c.tif", "inside/.hidden.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    (tmp_path / "inside" / "notes.txt").touch()
    arguments = ["./a.webp", "inside", "absent.jpg", "./a.webp"]
    found = run("classify", *arguments, "-a", "resnet18", "-w", folder / "ten.pth", "--json", "-")
    found.failed("absent.jpg: no such file")
    data = json.loads(found.out)
    assert [each["path"] for each in data["images"]] == ["./a.webp", "inside/b.bmp", "inside/deep/c.tif", "./a.webp"]
    assert [each["path"] for each in data["errors"]] == ["absent.jpg"]
    assert len({str(each["predictions"]) for each in data["images"]}) == 1


def test_images_from_pipes(folder: Path) -> None:
    command = f"{sys.executable} -m resnet_fast.cli classify --json - -a resnet18 -w {folder / 'ten.pth'} --threads 1"
    done = subprocess.run(
        ["bash", "-c", f"cat {folder / 'photo.jpg'} | {command} - <(cat {folder / 'photo.jpg'}) /dev/stdin"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["images"]
    assert [row["path"] for row in rows][::2] == ["-", "/dev/stdin"]
    assert len({str(row["predictions"]) for row in rows}) == 1


def test_pipes_are_held_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIPE_BYTES", 10)
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["bash", "-c", f"echo 0123456789 > {tmp_path / 'pipe'}"])
    run("classify", tmp_path / "pipe").failed("pipe: refused: gives more than the limit of 10 bytes")
    assert writer.wait(60) == 0
    run("classify", "/dev/zero").failed("/dev/zero: an image file was expected, this is a device or pipe")


def test_odd_names_are_shown_with_escapes(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/new\nline\xff\x1b[31m.png")
    Image.new("RGB", (60, 40)).save(odd)
    state = models.resnet18(num_classes=2).state_dict()
    labels = {"arch": "resnet18", "classes": json.dumps(["cat\x1b[31m", "\udcff"])}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors", labels)
    found = run("classify", odd, "-w", tmp_path / "w.safetensors")
    assert found.code == 0, found.err
    assert r"\n" in found.out and r"\udcff" in found.out and "\x1b" not in found.out
    told = run("classify", odd, "-w", tmp_path / "w.safetensors", "--json", "-").json()["images"][0]
    assert told["path"] == odd and {row["label"] for row in told["predictions"]} == {"cat\x1b[31m", "\udcff"}
    Path(odd).write_bytes(b"")
    run("classify", odd).failed(r"\udcff\x1b[31m.png: not an image")


def test_the_file_says_which_network_it_is_of(folder: Path, tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in models.resnet18(num_classes=10).state_dict().items()}
    save_file(state, tmp_path / "small.safetensors", {"arch": "residual_network"})
    run("classify", folder / "photo.jpg", "-w", tmp_path / "small.safetensors").failed(
        "'residual_network', which is none"
    )
    save_file(state, tmp_path / "small.safetensors", {"arch": "resnet18"})
    run("classify", folder / "photo.jpg", "-a", "resnet50", "-w", tmp_path / "small.safetensors").failed(
        "weights of resnet18 by its metadata, but --arch is resnet50; leave --arch out"
    )
    facts = models.Preprocessing(40, 32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic")
    save_file(state, tmp_path / "w.safetensors", {"arch": "resnet18", **facts.to_metadata()})
    network = classify.load_network(None, str(tmp_path / "w.safetensors"))
    assert (network.arch, network.preprocessing) == ("resnet18", facts)
    save_file(state, tmp_path / "w.safetensors", {"arch": "resnet18", **facts.to_metadata(), "std": "[0, 1, 1]"})
    run("classify", folder / "photo.jpg", "-w", tmp_path / "w.safetensors").failed(
        "w.safetensors: its metadata's std is"
    )
    run("classify", folder / "photo.jpg", "--prototxt", "x", "--caffemodel", "y", "--image-size", "64").failed(
        "--image-size and --resize-size belong to the ten ResNets"
    )


# --- images


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side, name in ((13_000, "large.png"), (60_000, "huge.png")):
        header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        with pytest.raises(common.UserError, match=r"refused: .* pixels"):
            images.read_image(tmp_path / name)


# --- bench


def test_bench_json() -> None:
    arguments = ["--image-size", "64", "--runs", "2", "--peers", "eager", "--batch-size", "2"]
    found = run("bench", "-a", "resnet18", *arguments, "--json", "-").json()
    keys = {"schema", "kind", "setting", "machine", "resnet_fast", "time", "contestants", "ratios", "samples"}
    assert set(found) == keys | {"others_busy_cores"}
    assert found["setting"]["arch"] == "resnet18" and found["setting"]["batch"] == 2
    assert "random" in found["setting"]["parameters"]
    assert list(found["contestants"]) == ["optimize", "eager"]
    for row in found["contestants"].values():
        assert row["status"] == "timed" and row["gate"]["passed"]
        assert set(row["seconds"]) == {"p10", "p50", "p90", "min", "max", "count"}
    assert set(found["ratios"]["against"]) == {"eager"}
    assert set(found["machine"]) >= {"cpu", "cores", "flags", "threads", "versions", "commit", "system", "python"}


def test_bench_table_plot_and_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--image-size", "64", "--runs", "1", "--peers", "live", "--dtype", "bfloat16"]
    targets = ["--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg", "-w", folder / "ten.pth"]
    found = run("bench", "-a", "resnet18", *arguments, *targets)
    assert found.code == 0, found.err
    assert "live module" in found.out
    setting = json.loads((tmp_path / "a.json").read_text())["setting"]
    assert setting["dtype"] == "bfloat16" and setting["parameters"].endswith("ten.pth")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--peers", "tensorflow"], "unknown peer 'tensorflow'"),
        (["--json", "/no/such/folder/a.json"], "there is no folder /no/such/folder"),
        (["--plot", "a.txt"], ".svg"),
        (["--plot", "."], "is a folder"),
        (["-w", "IMAGENET9K"], "unknown weights"),
    ],
)
def test_bench_refuses_before_it_measures(arguments: list[str], mention: str) -> None:
    run("bench", "-a", "resnet18", *arguments).failed(mention)


# --- progress


def test_lines_are_printed_above_the_bar() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with common.progress_bar(lines=console) as show:
        show("epoch 1/2", 0.5)
        console.print("a line")
    # The bar is erased, the line written, and the bar drawn again below it.
    assert re.search(r"\r\x1b\[2Ka line\n[^\n]* left", file.getvalue()), file.getvalue()
    piped = io.StringIO()
    with common.progress_bar(lines=Console(file=piped)) as show:
        show("epoch 1/2", 0.5)
    assert piped.getvalue() == ""


def test_the_bars_clock_goes_on_and_has_the_time_left_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now, file, bars = [100.0], io.StringIO(), []

    class ByHand(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, auto_refresh=False, **options)
            bars.append(self)

    monkeypatch.setattr(common, "Progress", ByHand)
    console = Console(file=file, force_terminal=True, width=100, color_system=None, get_time=lambda: now[0])
    with common.progress_bar(lines=console) as show:

        def drawn(stage: str, fraction: float, seconds: float) -> str:
            now[0] += seconds
            show(stage, fraction)
            file.truncate(0)
            bars[0].refresh()
            return file.getvalue()

        drawn("epoch 1", 0.25, 10)
        assert re.search(r"epoch 1 .* 50% 0:00:20 00:20 left", drawn("epoch 1", 0.5, 10))
        assert re.search(r"epoch 1 .* 100% 0:00:40 ", drawn("epoch 1", 1.0, 20))
        drawn("validation", 0.25, 20)
        drawn("validation", 0.5, 1)
        assert re.search(r"validation .* 75% 0:01:02 00:01 left", drawn("validation", 0.75, 1))


# --- info, version, help, errors


def test_info() -> None:
    assert "torch" in run("info").out
    assert run("info", "--json", "-").json()["torch"] == torch.__version__


def test_version_and_help() -> None:
    assert run("--version").out == f"resnet-fast {rf.__version__}\n"
    for arguments in (["--help"], ["classify", "-h"], ["bench", "-h"], ["demo", "-h"], ["info", "-h"],
                      ["train", "-h"], ["train", "residual", "-h"]):  # fmt: skip
        found = run(*arguments)
        assert found.code == 0
        assert "Usage" in found.out
    nothing = run()
    assert nothing.code == 2
    assert "classify" in nothing.out


def test_commands_have_one_vocabulary() -> None:
    """An option has the same short form everywhere, and what loads a network takes the same options."""
    forms: dict[str, set[tuple[str, ...]]] = {}
    options: dict[str, set[str]] = {}

    def collect(name: str, command: Any) -> None:
        for inner, below in getattr(command, "commands", {}).items():
            collect(f"{name} {inner}".strip(), below)
        for parameter in command.params:
            for option in (each for each in parameter.opts if each.startswith("--")):
                forms.setdefault(option, set()).add(tuple(sorted(parameter.opts)))
                options.setdefault(name, set()).add(option)

    collect("", get_command(app))
    assert {option for option, found in forms.items() if len(found) > 1} == {"--prototxt"}  # -p is a port elsewhere
    network = {"--arch", "--weights", "--labels", "--image-size", "--resize-size", "--dtype", "--device", "--threads"}
    caffe = {"--prototxt", "--caffemodel", "--mean", "--scale"}
    assert {name for name, found in options.items() if network <= found} == {"classify", "predict", "serve", "validate"}
    assert {name for name, found in options.items() if caffe <= found} == {"classify", "predict", "serve"}
    assert options["train residual"] >= {"--batch-size", "--device", "--threads"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["classify", "serve", "train residual"])
def test_a_gpu_that_is_not_there_is_named(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "serve":
        pytest.importorskip("uvicorn", reason="the server is the extra 'serve'")
        monkeypatch.setattr("resnet_fast.inference.serve.serve", lambda *arguments, **options: None)
    image = [folder / "photo.jpg"] if command == "classify" else []
    other = ["--out", tmp_path] if command == "train residual" else ["-w", folder / "ten.safetensors", "-a", "resnet18"]
    outcome = run(*command.split(), *image, *other, "--device", "cuda")
    outcome.failed("--device is cuda, and torch sees no CUDA GPU here; use cpu")


def test_unexpected_errors_are_one_line_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr("resnet_fast.inference.classifier.optimized", fail)
    arguments = ["classify", folder / "photo.jpg", "-a", "resnet18", "-w", folder / "ten.pth"]
    run(*arguments).failed("unexpected ZeroDivisionError: a bug", "--debug", code=70)
    for shown in (run("--debug", *arguments), run(*arguments, "--debug")):
        assert shown.code == 70
        assert "Traceback" in shown.err
    monkeypatch.setenv("RESNET_FAST_DEBUG", "1")
    assert "Traceback" in run(*arguments).err


# --- demo


SMALL = ("-a", "resnet18", "-w", "random", "--image-size", "64", "--seconds", "0.2", "--epochs", "0")


def test_demo_agrees_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from resnet_fast.benchmarking import plot

    bars: dict[str, dict[str, float]] = {}
    draw = plot.breakdown
    monkeypatch.setattr(plot, "breakdown", lambda title, made: draw(title, bars.update(made) or made))
    found = run("demo", *SMALL, "-o", tmp_path / "demo.png")
    assert found.code == 0, (found.out, found.err)
    for part in ("Random weights", "china.jpg", "flower.jpg", "error rule", "speed-up of fusing", "batch norm",
                 "fused stem", "bytes moved", "The answers agree"):  # fmt: skip
        assert part in found.out, part
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch" not in found.out
    # Table and picture show the same figures.
    row = next(line for line in found.out.splitlines() if re.match(r"│ float32 +│ +\d+\.\d \(", line))
    shown = [cell.split()[0] for cell in row.split("│")[2:4]]
    assert shown == [f"{1e3 * sum(bars[f'{who}, float32'].values()):.1f}" for who in ("plain", "fused")]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_second_act_trains_and_compares(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    pytest.importorskip("sklearn")
    from resnet_fast.training import digits, residual

    whole = digits.load("digits", side=6)
    few = digits.Images(whole.train.images[:50], whole.train.labels[:50])
    monkeypatch.setattr(digits, "load", lambda source, side: digits.Digits(few, few, few, 10, f"{source} {side}"))
    if wrong:
        real = residual.optimize
        monkeypatch.setattr(residual, "optimize", lambda model, **o: Negated(real(model, **o)))
    console = common.out_console()
    with console.capture() as captured:
        agreed = demo._train_on_digits(console, 1)
    out = captured.get()
    assert "digits 16: 50 images" in out and "epoch: 0 , train: " in out and "largest difference" in out
    assert agreed is not wrong and ("All predictions agree" in out) is agreed


class Negated(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.model(x)


def test_demo_fails_when_the_answers_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")

    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        other = models.resnet18(num_classes=1000)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.fc.bias += torch.randn(1000) / 10
        return real_optimize(other.eval(), **options)

    monkeypatch.setattr("resnet_fast.graph.optimize", wrong)
    found = run("demo", *SMALL, "-o", tmp_path / "demo.png")
    assert found.code == 1
    assert "NO" in found.out and "BROKEN" in found.out and "The answers disagree" in found.out


def test_demo_does_not_wait_for_a_server_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    reason = demo._out_of_reach("resnet50")
    assert "resnet50-11ad3fa6.pth is not in" in reason and str(tmp_path) in reason


def test_demo_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run("demo", *SMALL).failed("pip install 'resnet_fast[demo]'")
