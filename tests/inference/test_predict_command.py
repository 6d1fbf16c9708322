"""``resnet-fast predict``: each image once whatever happens, the answers of `classify`, one line per fault."""

from __future__ import annotations

import csv
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import resnet_fast as rf
from resnet_fast import inference
from resnet_fast.cli import predict as command
from resnet_fast.inference import bulk, journal, sources
from tests.command_line import Outcome, run
from tests.inference.conftest import NAMES, encoded, picture

pytestmark = pytest.mark.usefixtures("one_thread")

DAMAGED = {3: b"not an image", 11: encoded(picture(11))[:-60]}


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Let the commands of this process share what they load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "load", functools.cache(inference.load))
        yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images in folders, two of them damaged."""
    for number in range(20):
        path = tmp_path / "photos" / f"{number // 8}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DAMAGED.get(number) or encoded(picture(number)))
    return tmp_path / "photos"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def go(checkpoint: Path, *arguments: object) -> Outcome:
    return run("predict", *arguments, "-w", checkpoint, "--device", "cpu", "--batch-size", 4, "--workers", 2)


def files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.png"))]


# --- answers


def test_answers_are_those_of_classify_and_rf_predict(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    found = go(checkpoint, photos, "--out", out, "-k", 2)
    assert found.code == 1 and found.err == "", found
    assert "20 images, 2 of them with an error" in found.out
    rows = read(out)
    assert list(rows[0]) == ["path", "label", "index", "probability", "label_2", "index_2", "probability_2", "error"]
    assert [row["path"] for row in rows] == files(photos)
    expected = rf.predict(photos, checkpoint, topk=2, on_error="return", batch_size=4)
    told = json.loads(run("classify", photos, "-w", checkpoint, "-k", 2, "--json", "-").out)
    classified = {each["path"]: each["predictions"] for each in told["images"]}
    for row, each in zip(rows, expected, strict=True):
        assert row["path"] == each.source
        if each.error is not None:
            assert row["error"] == str(each.error) and not row["label"] and not row["probability_2"]
            assert each.source not in classified
            continue
        for suffix, label, entry in zip(("", "_2"), each.labels, classified[each.source], strict=True):
            assert (row["label" + suffix], int(row["index" + suffix])) == (label.label, label.index)
            assert float(row["probability" + suffix]) == pytest.approx(label.probability, rel=1e-6)
            assert entry["index"] == label.index and entry["probability"] == pytest.approx(label.probability, rel=1e-4)
    assert os.listdir(tmp_path) == ["photos", "out.csv"] or sorted(os.listdir(tmp_path)) == ["out.csv", "photos"]


def test_parquet_and_json_lines_have_the_same_rows(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for suffix in ("csv", "parquet", "jsonl"):
        assert go(checkpoint, photos, "-o", tmp_path / f"out.{suffix}", "-k", 9).code == 1
    rows = read(tmp_path / "out.csv")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == list(rows[0]) and table.num_rows == 20 and len(table.column_names) == 2 + 3 * 7
    shown = [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in table.to_pylist()]
    assert shown == rows
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line, row in zip(lines, rows, strict=True):
        assert line["path"] == row["path"] and (line["error"] or "") == row["error"]
        assert [str(each["probability"]) for each in line["predictions"]][:1] == [row["probability"]][
            : len(line["predictions"])
        ]
        assert sorted(each["label"] for each in line["predictions"]) == (sorted(NAMES) if line["predictions"] else [])


# --- sources


def test_sources_of_every_kind(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    every = [os.path.relpath(path) for path in files(photos)]
    (tmp_path / "list.txt").write_text("".join(f"{path}\r\n" for path in every) + "\n\n")
    (tmp_path / "zero.txt").write_bytes(b"\0".join(os.fsencode(path) for path in every) + b"\0")
    (tmp_path / "deep.txt").write_text("\n".join(os.path.relpath(path, "photos") for path in every))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("n", "path"), *enumerate(every)])
    for given in (["photos"], every, ["photos/*"], ["photos/**/*.png"], ["list.txt"], ["zero.txt"], ["table.csv"]):
        assert sources.collect(given).paths == every, given
    assert sources.collect(["deep.txt"], root="photos").paths == every
    assert sources.collect(["-"], stdin=(tmp_path / "list.txt").open("rb")).paths == every
    again = sources.collect(["photos/1", "list.txt", f"./{every[9]}", every[9]])
    assert again.paths == every[8:16] + every[:8] + every[16:] and again.repeated == 10
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfpath,x\na.png,1\n")
    assert sources.collect(["bom.csv"]).paths == ["a.png"]


def test_parquet_as_a_source(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    texts = pyarrow.array(["a.png", "b.png"])
    for name, column in (("plain", texts), ("large", texts.cast("large_string")), ("dict", texts.dictionary_encode())):
        parquet.write_table(pyarrow.table({"file": column, "n": [1, 2]}), tmp_path / f"{name}.parquet")
        found = sources.collect([str(tmp_path / f"{name}.parquet")], column="file", root="r")
        assert found.paths == ["r/a.png", "r/b.png"], name
    for column, mention in (
        ("n", "is of int64, not of strings"),
        ("path", "has no column 'path'; there are 'file', 'n'"),
    ):
        with pytest.raises(sources.ClassifierError, match=mention):
            sources.collect([str(tmp_path / "plain.parquet")], column=column)
    parquet.write_table(pyarrow.table({"path": pyarrow.array(["a", None])}), tmp_path / "null.parquet")
    with pytest.raises(sources.ClassifierError, match="row 2 has no path"):
        sources.collect([str(tmp_path / "null.parquet")])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(sources.ClassifierError, match="not a Parquet table"):
        sources.collect([str(tmp_path / "bad.parquet")])


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("absent.jpg", None, "absent.jpg: no such file"),
        ("*.absent", None, "*.absent: matches no file"),
        ("empty.txt", b"\n \n", "empty.txt: names no images"),
        ("empty.csv", b"", "empty.csv: has no column 'path'; there are none"),
        ("head.csv", b"path\n", "head.csv: names no images"),
        ("other.csv", b"file,n\na,1\n", "has no column 'path'; there are 'file', 'n'. Give --column NAME"),
        ("short.csv", b"n,path\n1\n", "short.csv: row 1 has no path"),
        ("blank.csv", b"path,n\nx,1\n,2\n", "blank.csv: row 2 has no path"),
        ("long.csv", b"path\n" + b"x" * 70000, "long.csv: not a CSV table"),
        ("-", None, "-: standard input"),
    ],
)
def test_wrong_sources(
    name: str, content: bytes | None, mention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_stdin", lambda: None)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    run("predict", name, "--out", "out.csv").failed(mention)
    assert not list(tmp_path.glob("out*"))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    run("predict", tmp_path / "in", "-o", tmp_path / "out.csv").failed("a directory without images")


def test_folders_that_cannot_be_listed_have_a_row(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("photos/1"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert go(checkpoint, photos, "-o", tmp_path / "out.csv").code == 1
    rows = read(tmp_path / "out.csv")
    assert [row["path"] for row in rows][7:10] == [str(photos / each) for each in ("0/07.png", "1", "2/16.png")]
    assert rows[8]["error"] == f"{photos / '1'}: a folder that cannot be listed (Permission denied)"


def test_odd_names(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [b"new\nline.png", b"return\r.png", b'quo"te,comma.png', b"no\xffutf8.png", "ünï.png".encode(), b"=1+1.png",
             b"[1].png", b" .png"]  # fmt: skip
    for number, name in enumerate(names):
        (folder / os.fsdecode(name)).write_bytes(encoded(picture(number)))
    assert go(checkpoint, folder, "-o", tmp_path / "out.csv").code == 0
    found = {Path(row["path"]).name: row["label"] for row in read(tmp_path / "out.csv")}
    assert found.keys() == {os.fsdecode(name).replace("\udcff", "\\udcff") for name in names}
    assert go(checkpoint, folder, "-o", tmp_path / "out.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in lines} == {os.fsdecode(name) for name in names}
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    assert go(checkpoint, folder, "-o", tmp_path / "out.parquet").code == 0
    from_table = go(checkpoint, tmp_path / "out.parquet", "-o", tmp_path / "again.csv")
    assert from_table.code == 1, "the name that is no UTF-8 has an escape in the table"
    again = {Path(row["path"]).name: row["label"] for row in read(tmp_path / "again.csv")}
    assert {name: label for name, label in again.items() if "\\" not in name} == {
        name: label for name, label in found.items() if "\\" not in name
    }


def test_output_inside_the_source(checkpoint: Path, photos: Path) -> None:
    (photos / "0" / "03.png").unlink()
    (photos / "1" / "11.png").unlink()
    for _ in range(2):
        assert go(checkpoint, photos, "-o", photos / "0" / "out.csv", "--overwrite").code == 0
        assert len(read(photos / "0" / "out.csv")) == 18


# --- the output


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["-o", "out.xlsx"], "out.xlsx: must end in .csv, .parquet or .jsonl"),
        (["-o", "absent/out.csv"], "there is no folder absent"),
        (["-o", "folder.csv"], "folder.csv is a folder"),
        (["-o", "old.csv"], "old.csv: exists; --overwrite replaces it"),
        (["old.csv", "-o", "old.csv", "--overwrite"], "old.csv: is a source"),
        (["-o", "out.csv", "--arch", "resnet5"], "unknown arch 'resnet5'"),
        (["-o", "out.csv", "--mean", "1,2,3"], "--mean belongs to a Caffe network"),
        (["-o", "out.csv", "-w", "absent.pth"], "absent.pth"),
    ],
)
def test_wrong_outputs(
    arguments: list[str], mention: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").write_text("path\n")
    (tmp_path / "folder.csv").mkdir()
    run("predict", photos, *arguments).failed(mention)
    assert sorted(os.listdir(tmp_path)) == ["folder.csv", "old.csv", "photos"]
    assert (tmp_path / "old.csv").read_text() == "path\n"


def test_missing_extras(photos: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    run("predict", photos, "-o", tmp_path / "out.parquet").failed("pip install 'resnet_fast[parquet]'")
    (tmp_path / "in.parquet").touch()
    run("predict", tmp_path / "in.parquet", "-o", tmp_path / "out.csv").failed("pip install 'resnet_fast[parquet]'")
    go(checkpoint, photos, "-o", tmp_path / "out.csv", "--engine", "ray").failed("pip install 'resnet_fast[ray]'")
    assert sorted(os.listdir(tmp_path)) == ["in.parquet", "photos"]


# --- interruptions


class _Killed(BaseException):
    pass


def work(classifier: Any, photos: Path, out: Path, *, topk: int = 2, restart: bool = False) -> bulk.Bulk:
    return bulk.Bulk(sources.collect([str(photos)]), out, classifier, topk, restart=restart)


def die_after(classifier: Any, photos: Path, out: Path, batches: int) -> None:
    """Answer some batches of four, then leave as a killed process does, with half a line written."""
    unfinished = work(classifier, photos, out)

    def engine(paths: list[str]) -> bulk.Lines:
        for number, lines in enumerate(bulk.here(classifier, 2, batch_size=4, workers=2)(paths)):
            if number == batches:
                os.pwrite(unfinished.journal._file, lines[0][:-7], unfinished.journal._end)
                raise _Killed
            yield lines

    with pytest.raises(_Killed):
        unfinished.run(engine)


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_interrupted_anywhere_the_output_is_the_same(
    classifier: Any, checkpoint: Path, photos: Path, tmp_path: Path, batches: int
) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert go(checkpoint, photos, "-o", whole, "-k", 2).code == 1
    die_after(classifier, photos, out, batches)
    assert not out.exists()
    if batches:
        die_after(classifier, photos, out, 0)
    found = go(checkpoint, photos, "-o", out, "-k", 2)
    assert found.code == 1 and out.read_bytes() == whole.read_bytes()
    assert not bulk.journal_of(out).exists()
    mention = f"{4 * batches} of 20 images were done before; continuing from {out}.partial"
    assert (mention in found.out) == bool(batches)


def test_only_what_remains_is_read_again(classifier: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    die_after(classifier, photos, out, 2)
    for path in files(photos)[:8]:
        os.unlink(path)  # answered, and gone by now
    (photos / "2" / "20.png").write_bytes(encoded(picture(20)))
    with pytest.raises(sources.ClassifierError, match="begun with topk 2, not 3"):
        work(classifier, photos, out, topk=3)
    asked: list[str] = []
    rest = work(classifier, photos, out)
    engine = bulk.here(classifier, 2)
    assert rest.run(lambda paths: asked.extend(paths) or engine(paths)) == 1  # type: ignore[func-returns-value]
    assert asked == files(photos)
    assert [row["path"] for row in read(out)] == files(photos)


def test_an_answer_that_comes_twice_counts_once(classifier: Any, photos: Path, tmp_path: Path) -> None:
    def twice(paths: list[str]) -> bulk.Lines:
        for lines in bulk.here(classifier, 2, batch_size=5)(paths):
            yield lines[::-1]
            yield [*lines, lines[0]]

    once, again = tmp_path / "once.csv", tmp_path / "again.csv"
    work(classifier, photos, once).run(bulk.here(classifier, 2, batch_size=5))
    unsteady = work(classifier, photos, again)
    seen: list[int] = []
    assert unsteady.run(twice, seen.append) == 2
    assert again.read_bytes() == once.read_bytes() and max(seen) == 20


def test_an_answer_that_never_comes(classifier: Any, photos: Path, tmp_path: Path) -> None:
    forgetful = work(classifier, photos, tmp_path / "out.csv")
    with pytest.raises(sources.ClassifierError, match=r"3 images have no answer, such as .*17\.png"):
        forgetful.run(lambda paths: bulk.here(classifier, 2)(paths[:-3]))
    assert not (tmp_path / "out.csv").exists() and bulk.journal_of(tmp_path / "out.csv").exists()


def test_killed_between_output_and_journal(
    classifier: Any, checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "remove", lambda self: os.close(self._file))
        work(classifier, photos, out).run(bulk.here(classifier, 2))
    before = out.read_bytes()
    found = go(checkpoint, photos, "-o", out, "-k", 2)
    assert found.code == 1 and "20 of 20 images were done before" in found.out
    assert out.read_bytes() == before and not bulk.journal_of(out).exists()


def test_a_full_disk(classifier: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.pwrite, 2000

    def pwrite(file: int, content: bytes, at: int) -> int:
        if at + len(content) <= room:
            return real(file, content, at)
        if at < room:
            return real(file, content[: room - at], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out.csv"
    full = work(classifier, photos, out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(
            OSError, match=r"out.csv.partial: cannot be written \(No space left on device\); the answers"
        ):
            full.run(bulk.here(classifier, 2, batch_size=4))
    rest = work(classifier, photos, out)
    assert 4 <= rest.resumed < 20
    assert rest.run(bulk.here(classifier, 2)) == 2
    assert [row["path"] for row in read(out)] == files(photos)


def test_no_two_processes_at_once(classifier: Any, checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    first = work(classifier, photos, tmp_path / "out.csv")
    go(checkpoint, photos, "-o", tmp_path / "out.csv").failed("out.csv.partial: in use by another")
    assert bulk.journal_of(tmp_path / "out.csv").exists()
    first.journal.close()
    assert go(checkpoint, photos, "-o", tmp_path / "out.csv", "-k", 2).code == 1


def test_other_weights_and_restart(
    classifier: Any, checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    die_after(classifier, photos, out, 2)
    with safe_open(checkpoint, "pt") as file:
        state, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    state["fc.bias"] = state["fc.bias"] + torch.eye(7)[3]
    save_file(state, tmp_path / "other.safetensors", about)
    kept = bulk.journal_of(out).read_bytes()
    go(tmp_path / "other.safetensors", photos, "-o", out, "-k", 2).failed(
        "begun with weights", "begin anew by --restart"
    )
    go(checkpoint, photos, "-o", out, "-k", 2, "--dtype", "bfloat16").failed("begun with dtype 'torch.float32'")
    go(checkpoint, photos, "-o", out, "-k", 2, "--image-size", 48).failed("begun with weights")
    assert bulk.journal_of(out).read_bytes()[: len(kept)] == kept
    found = go(tmp_path / "other.safetensors", photos, "-o", out, "-k", 2, "--restart")
    assert found.code == 1 and "done before" not in found.out and len(read(out)) == 20


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        (b"my own notes\n", "not written by `resnet-fast predict`"),
        (b"my own notes", "not written by `resnet-fast predict`"),
        (b"[1]\n", "not written by `resnet-fast predict`"),
        (b'{"format": "resnet_fast predictions", "version": 9, "settings": {}}\n', "another version of resnet_fast"),
        (
            b'{"format": "resnet_fast predictions", "version": 1, "settings": {}}\n["a",[0],[0.5],null]\n',
            "begun with network None",
        ),
        (b'{"format": "resnet_fast predictions", "version": 1, "settings": 3}\n', "not written by"),
    ],
)
def test_foreign_journals_stay(content: bytes, mention: str, classifier: Any, photos: Path, tmp_path: Path) -> None:
    path = bulk.journal_of(tmp_path / "out.csv")
    path.write_bytes(content)
    with pytest.raises(sources.ClassifierError, match=mention):
        work(classifier, photos, tmp_path / "out.csv")
    assert path.read_bytes() == content


def test_a_journal_without_answers_binds_nobody(classifier: Any, photos: Path, tmp_path: Path) -> None:
    def stop(paths: list[str]) -> bulk.Lines:
        raise _Killed

    path = bulk.journal_of(tmp_path / "out.csv")
    with pytest.raises(_Killed):
        work(classifier, photos, tmp_path / "out.csv").run(stop)
    assert not path.exists()
    path.write_bytes(b'{"format": "resnet_fast predictions", "version": 1, "settings": {"topk": 9}}\n["torn",[1')
    assert work(classifier, photos, tmp_path / "out.csv").run(bulk.here(classifier, 2)) == 2


@pytest.mark.parametrize("damage", [b"\0" * 50 + b"\n", b'["x",[1],[0.5],null\n', b"[" * 10**5 + b"\n",
                                    b'["x",[1],[0.5,0.5],null]\n', b'["x",[],[],null]\n', b'["x",[1.5],[1.0],null]\n',
                                    b'{"a":1,"b":2,"c":3,"d":4}\n'])  # fmt: skip
def test_what_follows_damage_is_done_again(damage: bytes, classifier: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    die_after(classifier, photos, out, 2)
    path = bulk.journal_of(out)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], damage, *lines[5:]]))
    rest = work(classifier, photos, out)
    assert rest.resumed == 4 and path.read_bytes() == b"".join(lines[:5])
    rest.run(bulk.here(classifier, 2))
    assert [row["path"] for row in read(out)] == files(photos)


def start(checkpoint: Path, photos: Path, out: Path) -> subprocess.Popen[str]:
    """Start a prediction in its own process, which dawdles after three images, and wait until it has these."""
    path = bulk.journal_of(out)
    before = path.read_bytes().count(b"\n") if path.exists() else 0
    command_line = [sys.executable, "-m", "resnet_fast.cli", "predict", photos, "-o", out, "-w", checkpoint, "-k", "2",
                    "--batch-size", "1", "--device", "cpu"]  # fmt: skip
    code = (
        "import itertools, time; from resnet_fast.inference import classifier as c; real = c.Classifier.predict\n"
        "calls = itertools.count()\n"
        "c.Classifier.predict = lambda *a: (time.sleep(0.1 if next(calls) < 3 else 60), real(*a))[1]\n"
        "import resnet_fast_cli; resnet_fast_cli.main()"
    )
    slow = [sys.executable, "-c", code, *map(str, command_line[3:])]
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1_800):
        if path.exists() and path.read_bytes().count(b"\n") > before + 2:
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_killed_and_stopped_processes(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert go(checkpoint, photos, "-o", whole, "-k", 2).code == 1
    process = start(checkpoint, photos, out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    process = start(checkpoint, photos, out)
    process.send_signal(signal.SIGINT)
    try:
        said, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert f"images; the same command continues from {out}.partial" in told and "Traceback" not in told
    assert "images were done before" in said and not out.exists()
    found = go(checkpoint, photos, "-o", out, "-k", 2)
    assert "images were done before" in found.out
    for row, expected in zip(read(out), read(whole), strict=True):  # batches of one and of four differ by rounding
        for name in list(row):
            if "probability" in name and row[name]:
                assert float(row.pop(name)) == pytest.approx(float(expected.pop(name)), rel=1e-4)
        assert row == expected
    assert sorted(os.listdir(tmp_path)) == ["out.csv", "photos", "whole.csv"]


# --- Ray


@pytest.mark.slow
def test_ray_gives_the_same_though_a_worker_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="ray is not installed")
    folder = tmp_path / "in"
    folder.mkdir()
    content = [encoded(picture(number, (400, 300))) for number in range(8)]
    for number in range(300):
        (folder / f"{number:03}.png").write_bytes(b"no image" if number % 50 == 7 else content[number % 8])
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert go(checkpoint, folder, "-o", whole).code == 1
    command_line = [sys.executable, "-m", "resnet_fast.cli", "predict", folder, "-o", out, "-w", checkpoint,
                    "--engine", "ray", "--workers", "2", "--batch-size", "4", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(list(map(str, command_line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = _kill_a_worker(process, bulk.journal_of(out))
    said, told = process.communicate(timeout=300)
    assert process.returncode == 1, told
    assert killed and "300 images, 6 of them with an error" in said
    assert out.read_bytes() == whole.read_bytes()


def _kill_a_worker(process: subprocess.Popen[str], path: Path) -> bool:
    """Kill one of the descendants that classify as soon as some answers are there."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") > 20:
            for worker in _descendants(process.pid):
                if b"ray::MapWorker" in _command_line(worker):
                    os.kill(worker, signal.SIGKILL)
                    return True
        time.sleep(0.02)
    return False


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from _descendants(int(child))
