"""Laws of engines."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws.engine import images, life, requests, sampling, weights

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *requests.LAWS,
    *sampling.LAWS,
    *weights.LAWS,
    *images.LAWS,
    *life.LAWS,
)
"""The laws of the section."""
