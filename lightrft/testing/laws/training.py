"""Laws of models, optimizers and data around the step, from the modules that hold them by concern."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws import loading, preparing, weights

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (*preparing.LAWS, *weights.LAWS, *loading.LAWS)
"""The laws of the section."""
