"""Floors: the least time that a model's layers can take on a GPU, from the bytes and operations they cannot avoid."""

from .cost import Work
from .schedule import Conv, Kernel, Schedule, Totals, fits_on_chip, rotated

__all__ = ["Conv", "Kernel", "Schedule", "Totals", "Work", "fits_on_chip", "rotated"]
