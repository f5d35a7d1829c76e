"""Laws of models, optimizers and data around the step."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws.training import loading, preparing, weights

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *preparing.LAWS,
    *weights.LAWS,
    *loading.LAWS,
)
"""The laws of the section."""
