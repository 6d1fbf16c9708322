"""Read image files, for training, validation and prediction alike: upright, RGB, 8 bits, or an error of one line.

No preprocessing for a network happens here; that is `resnet_fast.models.preprocessing`. Pillow is imported on use.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import IO, TYPE_CHECKING, cast

from resnet_fast.models.checkpoint import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    Source = str | os.PathLike[str] | IO[bytes]

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "ImageTooLargeError",
    "NamedBytes",
    "UnopenedImageError",
    "check_image",
    "find_images",
    "read_image",
    "suffixes",
    "to_rgb",
]

MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded: a small file can decode to gigabytes."""

_REFUSED = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5")
"""Formats that Pillow lists but does not decode itself. For EPS it would run another program, Ghostscript."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


class ImageError(ValueError):
    """Raised for an image that cannot be read; the message is one line and begins with the image's name."""


class UnopenedImageError(ImageError):
    """Raised if the operating system cannot open or read an image file, so that its content is unknown."""


class ImageTooLargeError(ImageError):
    """Raised, before anything is decoded, for an image with more pixels than the limit."""


def read_image(source: Source, *, max_pixels: int = MAX_PIXELS, formats: Collection[str] | None = None) -> Image:
    """Return the image in `source` as RGB with 8 bits per channel, rotated as its EXIF tag says.

    Every format that Pillow decodes is read; of an animation the first frame. Colours become RGB as by Pillow's
    `convert`: a palette is looked up, transparency is dropped, grey is repeated, CMYK inverted. 16-bit grey is scaled
    to 8 bits. Broken EXIF data is ignored.

    Args:
        source: a path, or a seekable binary file.
        max_pixels: width times height of the largest image that is decoded.
        formats: the only formats to decode, by Pillow's names in upper case; None for all of them.

    Raises:
        UnopenedImageError: if there is no such file, it may not be read, or is a folder, a device or a pipe.
        ImageTooLargeError: if it has more than max_pixels.
        ImageError: if it is not an image, damaged, or has floating point pixels.

    Examples:
        >>> import resnet_fast as rf
        >>> image = rf.models.read_image("photo.jpg")
        >>> image.mode, image.size
        ('RGB', (640, 427))
    """
    with _opened(source, max_pixels, formats) as image:
        method = _UPRIGHT.get(_orientation(image))  # type: ignore[call-overload]
        image.load()
        if method is None:
            return to_rgb(image)
        from PIL.Image import Transpose

        return to_rgb(image.transpose(Transpose[method]))


class NamedBytes(io.BytesIO):
    """A file in memory that has a name for errors."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def check_image(source: Source) -> tuple[int, int]:
    """Read the header alone, which finds files that are not images, but not damage further on.

    Returns:
        width and height in pixels, before any rotation.

    Raises:
        UnopenedImageError, ImageError: as `read_image`.
    """
    with _opened(source) as image:
        return image.size


def to_rgb(image: Image) -> Image:
    """Convert a Pillow image of any mode to RGB, as described for `read_image`.

    Raises:
        ValueError: for floating point pixels, integers outside of 16 bits, and modes that Pillow does not convert.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("has floating point pixels, whose range is not known; 8 or 16 bits a channel are read")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Convert 16-bit grey to 8 bits, rounded as PNG's specification says; Pillow's own conversion clips to white."""
    image = image.convert("I")
    low, high = cast("tuple[int, int]", image.getextrema())
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"has pixels from {low} to {high}; 8 or 16 bits a channel are read")
    return image.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def find_images(folder: str | os.PathLike[str], on_error: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """Yield the paths of image files below `folder`, by their suffixes, folder by folder in the order of their names.

    Hidden files and folders are left out. Links are followed, apart from those to a folder that they lie in.

    Args:
        on_error: called with the error of a folder that cannot be listed, whose `filename` is that folder; None raises.

    Raises:
        OSError: if a folder cannot be listed.
    """
    return _walk(os.fspath(folder), (os.path.realpath(folder),), suffixes(), on_error)


def _walk(
    folder: str, above: tuple[str, ...], endings: frozenset[str], on_error: Callable[[OSError], None] | None
) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = sorted((each for each in found if not each.name.startswith(".")), key=lambda each: each.name)
    except OSError as error:
        if on_error is None:
            raise
        on_error(error)
        return
    for entry in entries:
        if is_folder(entry):
            path = os.path.realpath(entry.path)
            if any(os.path.commonpath((path, each)) == path for each in above):
                warnings.warn(f"{entry.path}: a link to a folder that it lies in, not followed", stacklevel=2)
                continue
            yield from _walk(entry.path, (*above, path), endings, on_error)
        elif os.path.splitext(entry.name)[1].lower() in endings:
            yield entry.path


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a folder or a link to one; False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the image formats that are read."""
    from PIL import Image

    read = {*_formats(), "MPO"}  # JPEG's reader opens that as well
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in read)


def _formats(wanted: Collection[str] | None = None) -> list[str]:
    from PIL import Image

    Image.init()
    return [kind for kind in Image.ID if kind not in _REFUSED and (wanted is None or kind in wanted)]


@contextlib.contextmanager
def _opened(source: Source, max_pixels: int = MAX_PIXELS, formats: Collection[str] | None = None) -> Iterator[Image]:
    """Open an image, read its header and check its size; any error with it becomes an ImageError."""
    from PIL import Image, UnidentifiedImageError

    name = str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "image"))
    name = name if name.isprintable() else repr(name)[1:-1]
    try:
        if isinstance(source, str | os.PathLike) and not stat.S_ISREG(os.stat(source).st_mode):
            kind = "directory" if os.path.isdir(source) else "device or pipe"
            raise UnopenedImageError(f"{name}: an image file was expected, this is a {kind}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF tags and palettes; Pillow's own limit only warns
            with Image.open(source, formats=_formats(formats)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageTooLargeError(
                        f"{name}: refused: {width} x {height} pixels, more than the limit of {max_pixels:,} pixels"
                    )
                yield image
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise UnopenedImageError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        kinds = "that Pillow reads" if formats is None else f"of the formats {', '.join(formats)}"
        raise ImageError(f"{name}: not an image {kinds}") from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{name}: refused: {one_line(error)}") from error
    except Exception as error:  # decoders have no common error: OSError, SyntaxError, struct.error, AttributeError, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise UnopenedImageError(f"{name}: cannot be read ({error.strerror})") from error
        raise ImageError(f"{name}: damaged or unreadable image: {one_line(error)}") from error


def _orientation(image: Image) -> object:
    """Return EXIF's orientation, 1 if it is unreadable. Pillow's TIFF reader is kept from rotating the image itself."""
    try:
        exif = image.getexif()
        found: object = exif.get(_ORIENTATION, 1)
        exif[_ORIENTATION] = 1
        hash(found)
    except OSError as error:
        if error.errno is not None:
            raise
        return 1
    except Exception:  # the block's parsers have no common error, and what it says of the pixels is advice
        return 1
    return found
