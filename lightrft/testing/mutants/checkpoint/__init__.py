"""Strategies that save, load, export and import wrongly."""

from __future__ import annotations

from lightrft.testing.mutants.checkpoint import background, export, files, refusals, state
from lightrft.testing.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS: tuple[Mutant, ...] = (
    *state.MUTANTS,
    *files.MUTANTS,
    *refusals.MUTANTS,
    *background.MUTANTS,
    *export.MUTANTS,
)
"""The planted bugs of the section."""
