"""Laws of checkpoints and exports."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws.checkpoint import (
    background,
    background_order,
    code,
    damage,
    export,
    kill,
    latest,
    resume,
    retention,
)

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *resume.LAWS,
    *latest.LAWS,
    *retention.LAWS,
    *kill.LAWS,
    *background.LAWS,
    *background_order.LAWS,
    *damage.LAWS,
    *code.LAWS,
    *export.LAWS,
)
"""The laws of the section."""
