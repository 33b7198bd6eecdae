"""Checks of numbers that are sent to another process, made when a caller passes them."""

import numpy as np

from flexkv.errors import ArgumentError

MAX_STEP = (1 << 63) - 1
"""Largest fence: the largest number that a ring's record holds, less its sign bit."""


def integer_of(value: object, name: str, low: int, high: int) -> int:
    """Convert a Python or NumPy integer in ``[low, high]`` to ``int``; ArgumentError for any other value."""
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ArgumentError(f"{name} is {shortened(value)}: give an integer from {low} to {high}")
    return int(value)


def fence_of(value: object) -> int:
    """Convert the number of a step to ``int``; ArgumentError if it is not in ``[0, MAX_STEP]``."""
    return integer_of(value, "fence", 0, MAX_STEP)


def shortened(value: object) -> str:
    """Format a value for an error message: ASCII, at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
