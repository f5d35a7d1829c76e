"""Laws of settings, and of building from them."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws.config import building, settings

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *settings.LAWS,
    *building.LAWS,
)
"""The laws of the section."""
