"""Laws of backward and optimizer_step."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws.step import accumulation, clipping, isolation, parity, promise, window

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *accumulation.LAWS,
    *window.LAWS,
    *promise.LAWS,
    *clipping.LAWS,
    *isolation.LAWS,
    *parity.LAWS,
)
"""The laws of the section."""
