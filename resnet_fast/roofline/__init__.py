"""Floors: the least time that a model's layers can take on a GPU, from the bytes and operations they cannot avoid."""

from .cost import Work
from .schedule import LAUNCH, Kernel, Schedule, Seconds, Totals, fits_on_chip

__all__ = ["LAUNCH", "Kernel", "Schedule", "Seconds", "Totals", "Work", "fits_on_chip"]
