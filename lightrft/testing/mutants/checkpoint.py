"""Strategies that save, load, export and import wrongly; the modules `checkpoint_...` and `export` hold them."""

from __future__ import annotations

from lightrft.testing.mutants import checkpoint_files, checkpoint_refusals, checkpoint_state, export
from lightrft.testing.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS: tuple[Mutant, ...] = (
    *checkpoint_state.MUTANTS,
    *checkpoint_files.MUTANTS,
    *checkpoint_refusals.MUTANTS,
    *export.MUTANTS,
)
"""All of them."""
