"""Load handwritten digits as tensors: scikit-learn's, MNIST, or your own files. No training, no model.

Images are float32 [N, 1, H, W], labels int64 [N]. Files are read with limits and never unpickled.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_fast.models.checkpoint import one_line

SIDE = 28
"""Height and width of MNIST's images, to which scikit-learn's 8x8 are enlarged."""

WHITE = 255.0
"""The brightest value of scikit-learn's digits, as in 8-bit images; MNIST's values go to 1, as is usual for it.

An epoch of the digits has 28 batches of 50, one of MNIST 1100. With values up to 1 the network, whose initial weights
have a deviation of 0.02 and no BatchNorm to enlarge them, answers at random for about 150 steps; up to 255, for 40.
"""

MAX_BYTES = 512 * 2**20
"""Largest unpacked size of a file. MNIST's largest has 47 MB."""

MAX_CLASSES = 1000

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
"""MNIST's four files and the SHA-256 of each one's .gz."""

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Images:
    """Images float32 [N, 1, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """A data set.

    Attributes:
        train, validation: what is learnt from, and what each epoch is measured on.
        held_out: images used neither in training nor to choose an epoch; the validation part if there are no others.
        classes: labels are below it. name: for people.
    """

    train: Images
    validation: Images
    held_out: Images
    classes: int
    name: str


def load(source: str, seed: int = 0, side: int = SIDE) -> Digits:
    """Return the data set that ``source`` names.

    ``digits``: the 1797 that come with scikit-learn, 8x8, enlarged to ``side`` x ``side`` (bilinear), from 0 to 255, a
    fifth of every class for validation, chosen by ``seed``. ``mnist``: downloaded into torch.hub's folder
    `datasets/mnist` and verified. Otherwise a folder with MNIST's four idx files (with or without .gz), or an .npz file
    with x_train, y_train, x_test, y_test, images [N, H, W] of uint8, or of floats from 0 to 1. Of these and of MNIST
    images are from 0 to 1.

    From files the first twelfth of the training images (5000 of MNIST's 60000) is for validation, and the test images
    are held out.

    Raises:
        ValueError: for what is none of these, or a file that is damaged, too large, or does not fit the others.
        ImportError, OSError: if scikit-learn is missing, or a download fails.
    """
    if source == "digits":
        return _scikit_learn(seed, side)
    if source == "mnist":
        return _from_files(_idx_arrays(_mnist_folder()), "MNIST")
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_files(_idx_arrays(path), path.name)
    if path.is_file() and path.suffix == ".npz":
        return _from_files(_npz_arrays(path), path.name)
    raise ValueError(
        f"data is {source!r}; it must be digits, mnist, a folder with MNIST's idx files, or an .npz file"
        f"{'' if path.exists() else ' (there is no such file or folder)'}"
    )


def _scikit_learn(seed: int, side: int) -> Digits:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'resnet_fast[demo]'") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16 * WHITE
    images = torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    labels = torch.tensor(found.target, dtype=torch.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=found.target, random_state=seed)
    train, validation = (Images(images[part], labels[part]) for part in map(torch.from_numpy, parts))
    return Digits(train, validation, validation, 10, "scikit-learn's digits")


def _mnist_folder() -> Path:
    """Return the folder of MNIST's files, downloaded if needed. Each is verified before it gets its final name."""
    folder = Path(torch.hub.get_dir()).expanduser() / "datasets" / "mnist"
    for name, digest in MNIST_FILES.items():
        path = folder / f"{name}.gz"
        if path.exists() or (folder / name).exists():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(MNIST_URL + path.name, str(path), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot download {MNIST_URL}{path.name} ({one_line(error)}); without a connection, put MNIST's four "
                f"idx files into {folder}, or give their folder as data"
            ) from error
    return folder


def _from_files(arrays: dict[str, np.ndarray[Any, Any]], name: str) -> Digits:
    parts = {}
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.ndim != 3 or 0 in images.shape:
            raise ValueError(f"{name}: the {part} images have shape {list(images.shape)}, [N, H, W] was expected")
        if labels.ndim != 1 or len(labels) != len(images):
            raise ValueError(f"{name}: {len(images)} {part} images, but labels of shape {list(labels.shape)}")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise ValueError(f"{name}: the {part} labels must be whole numbers from 0 to {MAX_CLASSES - 1}")
        parts[part] = Images(_pixels(images, f"{name}: the {part} images"), torch.from_numpy(labels.astype(np.int64)))
    train, test = parts["train"], parts["test"]
    if train.images.shape[2:] != test.images.shape[2:]:
        raise ValueError(
            f"{name}: training images are {list(train.images.shape[2:])}, test images {list(test.images.shape[2:])}"
        )
    first = len(train) // 12
    if first == 0:
        raise ValueError(
            f"{name}: {len(train)} training images; a twelfth is for validation, so at least 12 are needed"
        )
    classes = 1 + max(int(part.labels.max()) for part in parts.values())
    return Digits(
        Images(train.images[first:], train.labels[first:]),
        Images(train.images[:first], train.labels[:first]),
        test,
        max(2, classes),
        name,
    )


def _pixels(images: np.ndarray[Any, Any], what: str) -> Tensor:
    if images.dtype == np.uint8:
        pixels = torch.from_numpy(images.astype(np.float32)) / 255
    elif images.dtype.kind == "f":
        pixels = torch.from_numpy(images.astype(np.float32))
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(f"{what} are {images.dtype} with values outside 0 to 1")
    else:
        raise ValueError(f"{what} are {images.dtype}; uint8, or floats from 0 to 1, were expected")
    return pixels.unsqueeze(1)


# ------------------------------------------------------------------------------------------------------------- files


def _idx_arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {}
    for array, name in zip(_ARRAYS, MNIST_FILES, strict=True):
        candidates = [folder / form for form in (name, f"{name}.gz", name.replace("-idx", ".idx"))]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise ValueError(f"{folder}: has no {name} (or {name}.gz); MNIST's four idx files were expected")
        arrays[array] = _idx(path)
    return arrays


def _idx(path: Path) -> np.ndarray[Any, Any]:
    """Read an idx file of unsigned bytes (Y. LeCun's format: 0, 0, 8, dimensions, sizes as big-endian int32, data)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged ({one_line(error)})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES:,} bytes, refused")
    dimensions = data[3] if len(data) >= 4 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    if not 1 <= dimensions <= 4 or len(data) < start:
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    sizes = struct.unpack(f">{dimensions}I", data[4:start])
    if math.prod(sizes) != len(data) - start:
        raise ValueError(f"{path}: {len(data) - start:,} bytes of data for sizes {list(sizes)}; truncated or damaged")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def _npz_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"unpacks to {size:,} bytes, at most {MAX_BYTES:,} are read")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _ARRAYS if name not in file.files]
            if missing:
                raise ValueError(f"has no {', '.join(missing)}; {', '.join(_ARRAYS)} were expected")
            return {name: file[name] for name in _ARRAYS}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
