"""The one reader of images, and what prepares them: orientation, broken EXIF, modes, formats, sizes, folders."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from resnet_fast import models
from resnet_fast.models import Preprocessing, read_image
from resnet_fast.models import images as reader

ORIENTATION = 0x0112


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and left.tobytes() == right.tobytes()


# --- orientation


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_pillows(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    noise(6, 4).save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(file) as opened:
        expected = ImageOps.exif_transpose(opened)
    found = read_image(file)
    assert found.size == ((4, 6) if 5 <= orientation <= 8 else (6, 4))
    assert found.mode == "RGB" and same(found, expected.convert("RGB"))


def photo(*entries: tuple[int, int, int, bytes]) -> io.BytesIO:
    """A JPEG of 60 x 40 pixels with these entries in its EXIF block: tag, type, count, value."""
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 30, 30)).save(file, "JPEG")
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    block += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    return with_exif(file.getvalue(), block)


def with_exif(jpeg: bytes, block: bytes) -> io.BytesIO:
    app1 = b"Exif\0\0" + block
    return io.BytesIO(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + jpeg[2:])


TURNED = (ORIENTATION, 3, 1, struct.pack("<H2x", 6))


@pytest.mark.parametrize(
    "entry",
    [
        (0x010F, 11, 1, struct.pack("<f", 1.5)),  # Make as a float
        (0x0200, 2, 1, b"x\0\0\0"),  # JPEGProc as text
        (0x013E, 7, 4, b"abc\0"),  # WhitePoint as bytes
        (0x8769, 2, 1, b"x\0\0\0"),  # the EXIF folder as text
        (0x8769, 4, 1, struct.pack("<I", 0xFFFFFF)),  # beyond the end
        (0x011A, 5, 1, struct.pack("<I", 2**31)),  # a resolution beyond the end
        (0x0103, 99, 1, bytes(4)),  # no such type
        (0x0100, 4, 2**31, bytes(4)),  # no such count
    ],
)
def test_a_mistyped_tag_beside_the_orientation_is_harmless(entry: tuple[int, int, int, bytes]) -> None:
    assert read_image(photo(*sorted([entry, TURNED]))).size == (40, 60)


@pytest.mark.parametrize(
    "entry",
    [
        (ORIENTATION, 2, 4, b"six\0"),
        (ORIENTATION, 11, 1, struct.pack("<f", float("nan"))),
        (ORIENTATION, 3, 1, struct.pack("<H2x", 600)),
        (ORIENTATION, 7, 4, b"\6\0\0\0"),
    ],
)
def test_an_orientation_that_is_none_counts_as_upright(entry: tuple[int, int, int, bytes]) -> None:
    assert read_image(photo(entry)).size == (60, 40)


def test_no_exif_block_is_fatal() -> None:
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "JPEG")
    for _ in range(300):
        entries = b"".join(
            struct.pack("<HHI", *(int(random.choice([0x010F, 0x0112, 0x0132, 0x0200, 0x8769, 0x8825, 0xA005])),
                                  int(random.integers(0, 14)), int(random.integers(0, 9)))) + random.bytes(4)
            for _ in range(4)
        )  # fmt: skip
        block = b"II*\0" + struct.pack("<IH", 8, 4) + entries + bytes(4)
        assert sorted(read_image(with_exif(file.getvalue(), block)).size) == [40, 60]
    for block in (b"", b"II", b"II*\0", b"no TIFF at all", random.bytes(50), b"II*\0" + b"\xff" * 8):
        assert read_image(with_exif(file.getvalue(), block)).size == (60, 40)
    for text in ("\n\n\nno hexadecimal digits", "\n\n\n4949"):
        info = PngInfo()
        info.add_text("Raw profile type exif", text)
        Image.new("RGB", (60, 40)).save(png := io.BytesIO(), "PNG", pnginfo=info)
        assert read_image(png).size == (60, 40)


def test_a_tiff_whose_tags_cannot_be_written_again_is_turned() -> None:
    file = io.BytesIO()
    noise(6, 4).save(file, "TIFF", tiffinfo={ORIENTATION: 6, 0x010F: "maker"})
    data = bytearray(file.getvalue())
    make = data.index(struct.pack("<HH", 0x010F, 2))
    data[make : make + 12] = struct.pack("<HHIf", 0x010F, 11, 1, 1.5)
    assert same(read_image(io.BytesIO(bytes(data))), noise(6, 4).transpose(Image.Transpose.ROTATE_270))


# --- modes and formats


def test_16_bits_are_scaled_as_png_says() -> None:
    values = np.arange(2**16)
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")):
        image = Image.frombytes(mode, (256, 256), values.astype(kind).tobytes())
        found = np.asarray(reader.to_rgb(image)).reshape(-1, 3)
        assert np.array_equal(found, np.repeat(np.floor(values / 257 + 0.5)[:, None], 3, 1)), mode


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.new("F", (3, 2), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(models.ImageError, match=r"float\.tif: .*floating point pixels, whose range is not known"):
        read_image(tmp_path / "float.tif")
    for value in (-1, 65536):
        with pytest.raises(ValueError, match=f"pixels from {value} to {value}"):
            reader.to_rgb(Image.new("I", (3, 2), value))


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    clear = pixels.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert same(read_image(tmp_path / "clear.png"), pixels)
    few = pixels.quantize(16)
    few.save(tmp_path / "few.png", transparency=3)
    assert same(read_image(tmp_path / "few.png"), few.convert("RGB"))
    grey = pixels.convert("L")
    grey.save(tmp_path / "grey.png")
    assert same(read_image(tmp_path / "grey.png"), Image.merge("RGB", [grey] * 3))
    for mode in ("La", "RGBa", "PA", "YCbCr", "HSV", "CMYK", "1"):
        assert reader.to_rgb(Image.new(mode, (2, 2))).mode == "RGB"


@pytest.mark.parametrize(
    "kind", ["BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
             "TIFF", "WEBP"],
)  # fmt: skip
def test_every_format_of_pillow_whatever_its_name(kind: str, tmp_path: Path) -> None:
    noise(32, 32).convert("P" if kind == "GIF" else "RGB").save(tmp_path / "a.jpg", kind)
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = opened.convert("RGB")
    assert same(read_image(tmp_path / "a.jpg"), expected)
    endings = [ending for ending, name in Image.registered_extensions().items() if name == kind]
    assert {*endings} <= reader.suffixes()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_counts(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], **{"lossless": True})
    found = read_image(tmp_path / "a").resize((2, 2))  # the file is closed by now
    assert same(found, Image.new("RGB", (2, 2), "red"))


def test_no_other_program_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(8, 8).save(tmp_path / "a.jpg", "EPS")
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(models.ImageError, match=r"a\.jpg: not an image that Pillow reads"):
        read_image(tmp_path / "a.jpg")
    assert not {".eps", ".ps", ".h5", ".mpg", ".wmf"} & reader.suffixes()


def test_what_is_no_file_is_told_from_what_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    for name, message in (
        ("pipe.jpg", "device or pipe"),
        ("loop.jpg", "symbolic links"),
        ("gone.jpg", "no such file"),
        (".", "directory"),
    ):
        for read in (read_image, reader.check_image):
            with pytest.raises(reader.UnopenedImageError, match=message):
                read(tmp_path / name)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/new\nline\xff.png")
    Path(odd).touch()
    with pytest.raises(models.ImageError, match=r"/new\\nline\\udcff\.png: not an image that Pillow reads$"):
        read_image(odd)
    noise(40, 40).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    reader.check_image(tmp_path / "cut.png")  # the header is whole
    with pytest.raises(models.ImageError, match=r"cut\.png: damaged or unreadable image") as caught:
        read_image(tmp_path / "cut.png")
    assert not isinstance(caught.value, reader.UnopenedImageError) and "\n" not in str(caught.value)


# --- folders


def test_links_are_followed_unless_they_lead_back(tmp_path: Path) -> None:
    for name in ("cat/deep", "dog", "far"):
        (tmp_path / "top" / name if name != "far" else tmp_path / name).mkdir(parents=True)
    for path in ("top/cat/0.png", "top/cat/deep/1.PNG", "top/dog/2.webp", "far/3.tif", "top/cat/notes.txt",
                 "top/cat/.4.png"):  # fmt: skip
        (tmp_path / path).touch()
    odd = os.fsencode(tmp_path) + b"/top/cat/new\nline\xff.jpg"
    open(odd, "wb").close()
    links = {"cat/self": ".", "cat/up": "..", "cat/deep/root": "../../..", "cat/far": "../../far", "cat/ring": "ring",
             "cat/mate": "../dog", "dog/mate": "../cat"}  # fmt: skip
    for name, target in links.items():
        (tmp_path / "top" / name).symlink_to(target)
    with pytest.warns(UserWarning, match="a link to a folder that it lies in, not followed") as caught:
        found = list(reader.find_images(tmp_path / "top" / "cat"))
    assert [os.fsencode(os.path.relpath(path, tmp_path / "top/cat")) for path in found] == [
        b"0.png", b"deep/1.PNG", b"far/3.tif", b"mate/2.webp", b"new\nline\xff.jpg",
    ]  # fmt: skip
    assert sorted(Path(str(each.message).split(": ")[0]).name for each in caught) == ["mate", "root", "self", "up"]


# --- preprocessing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "hamming"])
@pytest.mark.parametrize("size", [(3, 900), (900, 3), (640, 427), (50, 37), (1, 1), (7, 301)])
def test_the_crop_alone_is_what_the_whole_would_show(
    size: tuple[int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resize, crop in ((256, 224), (32, 40), (100, 7)):
        prepare = Preprocessing(resize, crop, interpolation=interpolation)
        whole = np.asarray(prepare.crop(noise(*size))).astype(int)
        with monkeypatch.context() as context:
            context.setattr(sys.modules[Preprocessing.__module__], "_MAX_RESIZED", 0)
            part = np.asarray(prepare.crop(noise(*size))).astype(int)
        # Two passes of a filter whose weights add up to at most 1.6, each rounded to 8 bits.
        assert abs(whole - part).max() <= 3, (resize, crop)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2, 60_000)])
def test_no_more_is_resized_than_is_shown(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *rest: Any, **more: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return real(image, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", resize)
    x = Preprocessing()(Image.new("RGB", size, (200, 30, 30)))
    assert x.shape == (3, 224, 224) and max(made) == 224 * 224
    assert torch.equal(x, Preprocessing()(Image.new("RGB", (256, 256), (200, 30, 30))))


def test_paths_and_files_are_read_as_everywhere(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise(60, 40).save(tmp_path / "a.png", exif=exif)
    prepare = Preprocessing(36, 32)
    expected = prepare(read_image(tmp_path / "a.png"))
    with open(tmp_path / "a.png", "rb") as file:
        assert torch.equal(prepare(file), expected)
    assert torch.equal(prepare(tmp_path / "a.png"), expected) and torch.equal(
        prepare(str(tmp_path / "a.png")), expected
    )
    with Image.open(tmp_path / "a.png") as opened:  # as torchvision's presets take it
        assert torch.equal(prepare(opened), prepare(noise(60, 40)))


def test_preprocessing_goes_through_metadata(tmp_path: Path) -> None:
    ours = Preprocessing(64, 60, (0.1, 0.2, 1 / 3), (0.5, 0.25, 1.0), "bicubic")
    text = ours.to_metadata()
    assert Preprocessing.from_metadata(text) == ours and Preprocessing.from_metadata({"arch": "resnet18"}) is None
    model = models.resnet18(num_classes=2)
    from resnet_fast.training.checkpoint import write_model

    path = write_model(tmp_path / "a.safetensors", model.state_dict(), {**text, "classes": '["a", "b"]'})
    assert models.preprocessing(path) == models.preprocessing(str(path)) == ours
    assert models.categories(path) == ("a", "b")
    plain = write_model(tmp_path / "plain.safetensors", model.state_dict())
    assert models.preprocessing(plain) == Preprocessing()
    with pytest.raises(models.WeightsError, match=r"plain\.safetensors: does not name its classes"):
        models.categories(plain)
    for key, value in (
        ("crop_size", "0"), ("crop_size", "4097"), ("crop_size", "true"), ("crop_size", "[" * 10**5),
        ("resize_size", "1.5"), ("mean", "[1, 2]"), ("mean", "[NaN, 1, 1]"), ("std", "[0, 1, 1]"), ("std", '"abc"'),
        ("mean", f"[1{'0' * 400}, 1, 1]"), ("interpolation", "cubic"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"its metadata's {key} is "):
            Preprocessing.from_metadata(text | {key: value})
    del text["std"]
    write_model(path, model.state_dict(), text)
    with pytest.raises(models.WeightsError, match=r"a\.safetensors: its metadata's std is ''"):
        models.preprocessing(path)
    assert json.loads(ours.to_metadata()["mean"])[2] == 1 / 3
