"""Image files from anywhere, read with Pillow: upright, RGB, 8 bits, and refused with a clear word where they are bad.

No preprocessing for a network happens here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_fast.cli.common import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded: a small file can unfold to gigabytes."""

FORMATS = ("JPEG", "PNG")


def read_image(path: Path) -> Image:
    """The image in ``path``, turned as its EXIF tag says, in RGB with 8 bits a channel.

    Raises UserError for anything but a whole JPEG or PNG of at most ``MAX_PIXELS`` pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: an image file was expected, this is a directory or device")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit only warns; ours is below and refuses
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UserError(
                        f"{path}: refused: {width} x {height} pixels, more than the limit of {MAX_PIXELS:,} pixels"
                    )
                image.load()
                upright = ImageOps.exif_transpose(image)
                return _eight_bits(upright).convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a JPEG or PNG image") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: refused: {one_line(error)}") from error
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: damaged or truncated image: {one_line(error)}") from error


def _eight_bits(image: Image) -> Image:
    """16-bit grey images scaled to 8 bits; Pillow's own conversion would clip them to white."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image
