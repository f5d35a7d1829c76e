"""One part of a memory estimate, and sums of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import attrs

__all__ = ["Line", "Place", "readable_bytes", "summary_of", "total_bytes"]

Place: TypeAlias = Literal["device", "host", "not counted"]
"""Where something lies: with what computes, in main memory, or nowhere because the settings leave it out."""


@attrs.frozen(kw_only=True)
class Line:
    """One part of the memory.

    Attributes:
        name: what it is.
        num_bytes: its size.
        formula: where the size comes from.
        place: where it lies.
    """

    name: str
    num_bytes: int
    formula: str
    place: Place = "device"


def total_bytes(lines: Iterable[Line], place: Place) -> int:
    """Return the bytes of all lines of a place.

    Args:
        lines: the parts.
        place: which of them count.
    """
    return sum(line.num_bytes for line in lines if line.place == place)


def readable_bytes(num_bytes: float) -> str:
    """Return a number of bytes with a unit.

    Args:
        num_bytes: the number.

    Example:
        >>> readable_bytes(1536), readable_bytes(12), readable_bytes(3 * 2**40)
        ('1.50 KiB', '12 B', '3072.00 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def summary_of(lines: Iterable[Line], device: str) -> str:
    """Return in words what all lines come to.

    Args:
        lines: the parts.
        device: what is called the device.

    Example:
        >>> summary_of([Line(name="parameters", num_bytes=2**30, formula="", place="host")], "cuda")
        'about 0 B on cuda, 1.00 GiB in main memory'
    """
    parts = list(lines)
    on_host = total_bytes(parts, "host")
    words = f"about {readable_bytes(total_bytes(parts, 'device'))} on {device}"
    return words + (f", {readable_bytes(on_host)} in main memory" if on_host else "")
