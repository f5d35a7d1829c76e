"""Laws of what ranks do together."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws.collectives import disagreement, floats, values, world

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *values.LAWS,
    *floats.LAWS,
    *world.LAWS,
    *disagreement.LAWS,
)
"""The laws of the section."""
