"""`resnet_fast.predict`: every kind of image gives the answer that plain torch gives in float64, or one clear error."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import inference
from resnet_fast.models import ImageError, Preprocessing
from tests.command_line import run
from tests.inference.conftest import FACTS, NAMES, encoded, picture

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_says(found: inference.Prediction, expected: Tensor) -> None:
    """The rule for float32: all seven classes, in the order of their float64 probabilities."""
    assert found.error is None
    assert [each.index for each in found.labels] == expected.argsort(descending=True).tolist()
    given = torch.tensor([each.probability for each in found.labels], dtype=torch.float64)
    assert torch.allclose(given, expected.sort(descending=True).values, atol=2e-5, rtol=0)
    assert [each.label for each in found.labels] == [NAMES[each.index] for each in found.labels]


# --- kinds of images


def kinds(image: Image.Image, folder: Path) -> dict[str, Any]:
    """The same picture as everything that `predict` takes."""
    path = folder / "a.png"
    image.save(path)
    array = np.asarray(image)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn of 90 degrees clockwise
    return {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "memoryview": memoryview(path.read_bytes()),
        "file": io.BytesIO(path.read_bytes()),
        "pillow": image,
        "pillow, opened": Image.open(path),
        "array": array,
        "array, not contiguous": np.asfortranarray(array),
        "array, read-only": np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),
        "array, BGR reversed": np.ascontiguousarray(array[..., ::-1])[..., ::-1],
        "array, RGBA": np.dstack([array, np.full(array.shape[:2], 128, np.uint8)]),
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "exif": encoded(turned, exif=exif),
        "exif, pillow": Image.open(io.BytesIO(encoded(turned, exif=exif))),
        "exif, tiff": encoded(turned, "tiff", exif=exif),
        "exif, tiff, pillow": Image.open(io.BytesIO(encoded(turned, "tiff", exif=exif))),
        "animation": encoded(image, "png", save_all=True, append_images=[picture(9)]),
        "webp": encoded(image, "webp", lossless=True),
        "bmp": encoded(image, "bmp"),
        "RGBA": encoded(image.convert("RGBA")),
        "CMYK": encoded(image.convert("CMYK"), "tiff"),
    }


def test_every_kind_of_image(classifier: inference.Classifier, exact: Any, tmp_path: Path) -> None:
    image = picture()
    given = kinds(image, tmp_path)
    for name, found in zip(given, rf.predict(list(given.values()), classifier, topk=9, batch_size=5), strict=True):
        try:
            assert_says(found, exact(image))
        except AssertionError as error:
            raise AssertionError(name) from error
    for name, value in kinds(image, tmp_path).items():  # alone, not in a list
        [found] = rf.predict(value, classifier, topk=9)
        assert_says(found, exact(image)), name


def test_palettes_grey_and_sixteen_bits(classifier: inference.Classifier, exact: Any) -> None:
    few = picture(1).quantize(16)
    grey = picture(2).convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    threefold = Image.merge("RGB", [grey] * 3)
    found = rf.predict(
        [encoded(few), encoded(grey), encoded(wide), np.asarray(grey), np.asarray(grey)[..., None],
         torch.from_numpy(np.asarray(grey).copy())[None], encoded(few, "gif")],
        classifier, topk=7,
    )  # fmt: skip
    for prediction, image in zip(found, [few.convert("RGB"), *[threefold] * 5, few.convert("RGB")], strict=True):
        assert_says(prediction, exact(image))


def test_several_at_once(classifier: inference.Classifier, exact: Any, tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(7)]
    (tmp_path / "deep").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / ("deep" if number > 4 else "") / f"{number}.png")
    (tmp_path / "notes.txt").touch()
    stacked = np.stack([np.asarray(image) for image in images])
    order = [*images[:5], *images[5:]]
    for given in (
        tmp_path,
        stacked,
        [stacked[:3], stacked[3:]],
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
        (image for image in images),
        iter([tmp_path]),
        str(tmp_path / "**" / "*.png"),
    ):
        found = rf.predict(given, classifier, topk=7, batch_size=3, workers=2)
        if given is tmp_path or isinstance(given, str):
            assert [Path(each.source).name for each in found] == [f"{n}.png" for n in range(7)]
        for prediction, image in zip(found, order, strict=True):
            assert_says(prediction, exact(image))
    assert rf.predict([], classifier) == []
    assert [each.source for each in rf.predict(stacked[:2], classifier)] == ["images[0][0]", "images[0][1]"]


def test_memory_that_its_owner_writes_again(classifier: inference.Classifier, exact: Any) -> None:
    images = [picture(seed) for seed in range(6)]

    def frames() -> Iterator[np.ndarray[Any, Any]]:
        buffer = np.empty((44, 60, 3), np.uint8)
        for image in images:
            buffer[:] = np.asarray(image)
            yield buffer

    for prediction, image in zip(rf.predict(frames(), classifier, topk=7), images, strict=True):
        assert_says(prediction, exact(image))


def test_at_most_two_batches_are_taken_ahead(classifier: inference.Classifier) -> None:
    taken = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal taken
        while True:
            taken += 1
            yield picture()

    found = inference.stream.stream(endless(), classifier, lambda image: image, batch_size=4, workers=2)
    for _ in range(9):
        next(found)
    found.close()
    assert taken <= 9 + 3 + 8


def test_files_that_give_their_content_in_pieces(classifier: inference.Classifier, exact: Any) -> None:
    reading, writing = os.pipe()
    os.write(writing, encoded(picture(), "jpeg", quality=20)[:300])
    threading.Timer(
        0.2, lambda: (os.write(writing, encoded(picture(), "jpeg", quality=20)[300:]), os.close(writing))
    ).start()
    with open(reading, "rb", buffering=0) as file:
        [found] = rf.predict(file, classifier, topk=7)
    [expected] = rf.predict(encoded(picture(), "jpeg", quality=20), classifier, topk=7)
    assert found.labels == expected.labels


def test_an_image_is_not_changed(classifier: inference.Classifier) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture(), exif=exif)))
    assert rf.predict(image, classifier) == rf.predict(image, classifier)
    assert image.getexif()[0x0112] == 6
    assert image.size == (60, 44)


# --- wrong images


def test_errors_are_raised_or_returned(classifier: inference.Classifier, tmp_path: Path) -> None:
    good = encoded(picture())
    broken: list[tuple[Any, str]] = [
        (tmp_path / "absent.jpg", f"{tmp_path / 'absent.jpg'}: no such file"),
        (b"no image", "images[2]: not an image that Pillow reads"),
        (good[:-60], "images[3]: damaged or unreadable image"),
        (Image.new("F", (9, 9)), "images[4]: has floating point pixels"),
        (np.zeros((0, 4, 3), np.uint8), "images[5]: has no pixels"),
        (b"", "images[6]: not an image"),
    ]
    given = [good, *(each for each, _ in broken), good]
    found = rf.predict(given, classifier, on_error="return")
    assert [each.error is None for each in found] == [True, *[False] * 6, True]
    for each, (_, mention) in zip(found[1:-1], broken, strict=True):
        assert str(each.error).startswith(mention), each
        assert each.labels == () and each.label is None and each.probability is None
        assert repr(each).startswith("Prediction(") and "error: " in repr(each)
    assert found[0].labels == found[-1].labels
    for bad, mention in broken:
        with pytest.raises(ImageError, match=mention.split(": ")[1]):
            rf.predict(bad, classifier)


@pytest.mark.parametrize(
    ("images", "error", "mention"),
    [
        (3, TypeError, "images is a int; a path, bytes"),
        ({"a.jpg": 1}, TypeError, "images is a dict; a path, bytes"),
        ([3], TypeError, r"images\[0\] is a int"),
        ([["a.jpg"]], TypeError, r"images\[0\] is a list"),
        (io.StringIO("text"), TypeError, "open it in binary mode"),
        (np.zeros((4, 4, 3)), ValueError, "dtype float64, whose range is not known"),
        (torch.zeros(3, 4, 4), ValueError, "torch.float32, whose range is not known"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"shape \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), ValueError, r"shape \[4\]"),
        (torch.zeros(4, 4, dtype=torch.uint8), ValueError, r"shape \[4, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), ValueError, r"shape \[2, 4, 4\]"),
        ("*.absent", ValueError, r"\*.absent: matches no file"),
    ],
    ids=lambda each: each if isinstance(each, str) and " " not in each else "",
)
def test_what_is_no_image(images: Any, error: type[Exception], mention: str, classifier: inference.Classifier) -> None:
    with pytest.raises(error, match=mention):
        rf.predict(images, classifier)


def test_folders_and_patterns(classifier: inference.Classifier, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a directory without images"):
        rf.predict(tmp_path, classifier)
    picture().save(tmp_path / "a[1].png")
    [found] = rf.predict(str(tmp_path / "a[1].png"), classifier)  # a file of that name exists
    assert found.source == str(tmp_path / "a[1].png")
    [found] = rf.predict(str(tmp_path / "a*.png"), classifier)
    assert found.source == str(tmp_path / "a[1].png")


@pytest.mark.parametrize(
    ("options", "mention"),
    [({"topk": 0}, "topk is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"workers": 0}, "workers is 0"),
     ({"on_error": "skip"}, "on_error is 'skip'"), ({"labels": NAMES}, "labels is part of the Classifier"),
     ({"preprocessing": FACTS}, "preprocessing is part")],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], mention: str, classifier: inference.Classifier) -> None:
    with pytest.raises(ValueError, match=mention):
        rf.predict(picture(), classifier, **options)


# --- models


def test_models_of_every_kind(checkpoint: Path, exact: Any) -> None:
    image = picture(3)
    network = inference.classifier.load_network(None, str(checkpoint))
    for model, options in (
        (checkpoint, {}),
        (str(checkpoint), {}),
        (network.model, {"preprocessing": FACTS, "labels": NAMES}),
        (rf.optimize(network.model), {"preprocessing": FACTS, "labels": NAMES}),
        (nn.Sequential(network.model).eval(), {"preprocessing": lambda given: FACTS(given), "labels": list(NAMES)}),
    ):
        [found] = rf.predict(image, model, topk=7, **options)
        assert_says(found, exact(image))
    [other] = rf.predict(image, checkpoint, preprocessing=Preprocessing(64, 64), topk=7)
    assert [each.probability for each in other.labels] != pytest.approx([each.probability for each in found.labels])
    assert not network.model.training and next(network.model.parameters()).dtype == torch.float32


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "options", "mention"),
    [
        (nn.Conv2d(3, 4, 3).eval(), {}, "give preprocessing="),
        (nn.Conv2d(3, 4, 3), {"preprocessing": FACTS}, r"call model.eval\(\) first"),
        (nn.Conv2d(3, 4, 3).eval(), {"preprocessing": FACTS}, r"returns \[2, 4, 30, 30\] for two images"),
        (_Pair().eval(), {"preprocessing": FACTS}, "returns a tuple"),
        (nn.Conv2d(5, 4, 3).eval(), {"preprocessing": FACTS}, "does not run on images"),
        (nn.Flatten().eval(), {"preprocessing": FACTS, "labels": ["a"]}, "labels has 1 names, the network has 3072"),
        (nn.Flatten().eval(), {"preprocessing": lambda image: image}, "preprocessing returns a Image"),
        (nn.Flatten().eval(), {"preprocessing": lambda image: 1 / 0}, "fails on a black Pillow image"),
        (nn.Flatten().eval(), {"preprocessing": lambda image: torch.zeros(1, 3, 8, 8)}, r"\[1, 3, 8, 8\]; a tensor"),
        ("resnet5000", {}, "unknown weights 'resnet5000'"),
        ("absent.pth", {}, "absent.pth"),
    ],
)
def test_wrong_models(model: Any, options: dict[str, Any], mention: str) -> None:
    with pytest.raises(inference.ClassifierError, match=mention):
        rf.predict(picture(), model, **options)


def test_a_model_of_another_type() -> None:
    with pytest.raises(TypeError, match="model is a int"):
        rf.predict(picture(), 3)  # type: ignore[arg-type]


def test_answers_that_are_not_finite(checkpoint: Path) -> None:
    network = inference.classifier.load_network(None, str(checkpoint))
    with torch.no_grad():
        network.model.fc.bias[0] = float("nan")
    with pytest.raises(inference.ClassifierError, match="not finite"):
        rf.predict(picture(), network.model, preprocessing=FACTS)


def test_repr(classifier: inference.Classifier) -> None:
    [found] = rf.predict(picture(), classifier, topk=2)
    first, second = found.labels
    assert repr(found) == (
        f"Prediction('images[0]': {first.label} {first.probability * 100:.1f} %, "
        f"{second.label} {second.probability * 100:.1f} %)"
    )
    assert (found.label, found.probability) == (first.label, first.probability)


def test_predict_is_classify(checkpoint: Path, tmp_path: Path) -> None:
    for seed in range(3):
        picture(seed).save(tmp_path / f"{seed}.jpg")
    rows = run("classify", tmp_path, "-w", checkpoint, "--topk", 3, "--json", "-").json()["images"]
    found = rf.predict(tmp_path, checkpoint, topk=3)
    assert [row["path"] for row in rows] == [each.source for each in found]
    for row, each in zip(rows, found, strict=True):
        assert [entry["label"] for entry in row["predictions"]] == [label.label for label in each.labels]
        assert [entry["probability"] for entry in row["predictions"]] == pytest.approx(
            [label.probability for label in each.labels], abs=1e-6
        )


def test_large_images_are_decoded_one_at_a_time(
    classifier: inference.Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(size=(200, 200)).save(tmp_path / "a.png")
    lock, most, now = threading.Lock(), 0, 0
    real = inference.stream.read_image

    def read(source: Any) -> Image.Image:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        image = real(source)
        with lock:
            now -= 1
        return image

    monkeypatch.setattr(inference.stream, "read_image", read)
    for limit, expected in ((39_999, [1]), (40_000, [2, 3, 4])):
        monkeypatch.setattr(inference.stream, "_LARGE", limit)
        most = 0
        rf.predict([tmp_path / "a.png"] * 12, classifier, workers=4)
        assert most in expected
