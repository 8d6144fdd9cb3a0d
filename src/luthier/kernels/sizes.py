"""Numbers that kernels, shapes and plans are rounded to. No torch here."""

from __future__ import annotations


def power_of_2(number: int) -> int:
    """The least that is not below `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()
