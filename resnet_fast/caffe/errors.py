"""The one error of this package. It holds no more than that, so that every module here can import it."""

from __future__ import annotations


class CaffeError(ValueError):
    """A Caffe file or network that cannot be used. One line: file, layer, what is wrong, what would be right."""
