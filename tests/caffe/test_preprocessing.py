"""Caffe's preprocessing: blue first, 0 to 255, the mean image cropped as the image is; against numpy by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fast.caffe import CaffeError
from resnet_fast.caffe.caffemodel import write_mean
from resnet_fast.caffe.preprocessing import Preprocessing


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def by_hand(image: Image.Image, short: int, crop: int) -> np.ndarray:
    """Blue first [3, crop, crop], for even margins."""
    height, width = image.height * short // min(image.size), image.width * short // min(image.size)
    values = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    top, left = (height - crop) // 2, (width - crop) // 2
    return values[top : top + crop, left : left + crop, ::-1].transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(300, 400), (412, 256), (64, 64)])
def test_published_pipeline(size: tuple[int, int]) -> None:
    image = picture(*size)
    made = Preprocessing()(image)
    assert made.dtype is torch.float32
    assert made.is_contiguous()
    mean = np.array([103.063, 115.903, 123.152], dtype=np.float32).reshape(3, 1, 1)
    np.testing.assert_array_equal(made.numpy(), by_hand(image, 256, 224) - mean)


def test_blue_is_first() -> None:
    red = Preprocessing(mean=(1, 2, 3))(Image.new("RGB", (30, 40), (200, 100, 50)))
    assert red.amax((1, 2)).tolist() == red.amin((1, 2)).tolist() == [49.0, 98.0, 197.0]


@pytest.mark.parametrize("larger", [(0, 0), (32, 32), (8, 40)])
def test_mean_image(tmp_path: Path, larger: tuple[int, int]) -> None:
    """Of the crop's size, or larger: its centre, as the image's is cropped."""
    image, mean = picture(256, 300), torch.rand(3, 224 + larger[0], 224 + larger[1]) * 255
    top, left = larger[0] // 2, larger[1] // 2
    wanted = by_hand(image, 256, 224) - mean[:, top : top + 224, left : left + 224].numpy()
    np.testing.assert_array_equal(Preprocessing(mean=mean)(image).numpy(), wanted)
    write_mean(tmp_path / "mean.binaryproto", mean)
    read = Preprocessing.with_mean_file(tmp_path / "mean.binaryproto")
    np.testing.assert_array_equal(read(image).numpy(), wanted)


def test_odd_margins_of_image_and_mean_agree() -> None:
    """Where the margin cannot be halved, both are cut at the same place: equal pictures cancel."""
    image = picture(235, 235)
    mean = torch.from_numpy(np.asarray(image, dtype=np.float32)[:, :, ::-1].copy()).permute(2, 0, 1)
    assert Preprocessing(resize_size=235, mean=mean)(image).abs().max() == 0


def test_scale() -> None:
    """After the mean, as in Caffe's DataTransformer; 0.017 goes with many published DenseNets and MobileNets."""
    image, mean = picture(256, 300), (103.94, 116.78, 123.68)
    made = Preprocessing(mean=mean, scale=0.017)(image)
    wanted = (by_hand(image, 256, 224) - np.array(mean, np.float32).reshape(3, 1, 1)) * np.float32(0.017)
    assert made.dtype is torch.float32
    np.testing.assert_array_equal(made.numpy(), wanted)
    whole = torch.rand(3, 224, 224) * 255
    np.testing.assert_array_equal(
        Preprocessing(mean=whole, scale=-2)(image).numpy(), (by_hand(image, 256, 224) - whole.numpy()) * np.float32(-2)
    )
    assert Preprocessing(mean=whole, scale=0.5).as_channel_means().scale == 0.5


def test_the_mean_is_a_copy() -> None:
    mean = torch.zeros(3, 8, 8)
    made = Preprocessing(8, 8, mean)
    mean.fill_(7)
    assert made(Image.new("RGB", (8, 8))).abs().max() == 0


def test_as_channel_means() -> None:
    mean = torch.rand(3, 10, 12) * 255
    made = Preprocessing(12, 9, mean, "bicubic").as_channel_means()
    np.testing.assert_allclose(made.mean, mean.double().numpy().mean((1, 2)), rtol=1e-12)
    assert (made.resize_size, made.crop_size, made.interpolation) == (12, 9, "bicubic")
    assert made.as_channel_means() is made


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="200x300, the crop 224x224"):
        Preprocessing(mean=torch.zeros(3, 200, 300))
    with pytest.raises(ValueError, match=r"\[4, 224, 224\]"):
        Preprocessing(mean=torch.zeros(4, 224, 224))
    with pytest.raises(ValueError, match="3 values"):
        Preprocessing(mean=(1.0, 2.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        Preprocessing(mean=(1.0, 2.0, float("nan")))
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"scale is {scale:g}; a finite number other than 0 was expected"):
            Preprocessing(scale=scale)
    with pytest.raises(ValueError, match="crop_size"):
        Preprocessing(crop_size=0)
    with pytest.raises(ValueError, match="interpolation"):
        Preprocessing(interpolation="cubic")
    with pytest.raises(FileNotFoundError):
        Preprocessing.with_mean_file(tmp_path / "missing.binaryproto")
    (tmp_path / "bad.binaryproto").write_bytes(b"\xff" * 20)
    with pytest.raises(CaffeError, match=r"bad\.binaryproto"):
        Preprocessing.with_mean_file(tmp_path / "bad.binaryproto")
    with pytest.raises(TypeError, match=r"PIL\.Image"):
        Preprocessing()(torch.zeros(3, 4, 4))  # type: ignore[arg-type]
