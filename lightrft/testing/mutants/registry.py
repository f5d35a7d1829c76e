"""All planted bugs, by id."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightrft.testing.mutants import (
    checkpoint,
    collectives,
    composition,
    engine,
    engine_life,
    life,
    promise,
    record,
    rollout,
    step,
    training,
)
from lightrft.testing.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_ALL = (
    *record.MUTANTS,
    *collectives.MUTANTS,
    *step.MUTANTS,
    *promise.MUTANTS,
    *training.MUTANTS,
    *checkpoint.MUTANTS,
    *rollout.MUTANTS,
    *composition.MUTANTS,
    *life.MUTANTS,
    *engine.MUTANTS,
    *engine_life.MUTANTS,
)

MUTANTS: Mapping[str, Mutant] = MappingProxyType({mutant.id: mutant for mutant in _ALL})
"""Every planted bug; each is found by at least one law."""
