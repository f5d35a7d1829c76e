"""The laws of checkpoints and exports; the modules `checkpoint_...` and `export` hold them."""

from __future__ import annotations

from lightrft.testing.law import Law
from lightrft.testing.laws import (
    checkpoint_code,
    checkpoint_damage,
    checkpoint_kill,
    checkpoint_latest,
    checkpoint_resume,
    checkpoint_retention,
    export,
)

__all__ = ["LAWS"]

LAWS: tuple[Law, ...] = (
    *checkpoint_resume.LAWS,
    *checkpoint_latest.LAWS,
    *checkpoint_retention.LAWS,
    *checkpoint_kill.LAWS,
    *checkpoint_damage.LAWS,
    *checkpoint_code.LAWS,
    *export.LAWS,
)
"""All of them."""
