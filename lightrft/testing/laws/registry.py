"""All laws, by id, in the order in which people read them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lightrft.errors import ConfigError, nearest
from lightrft.testing.law import Law
from lightrft.testing.laws import (
    checkpoint,
    collectives,
    composition,
    config,
    engine,
    life,
    record,
    rollout,
    step,
    training,
)
from lightrft.testing.subject import SubjectKind

__all__ = ["ENGINE_LAWS", "STRATEGY_LAWS", "choose_laws", "laws_of"]

STRATEGY_LAWS: Mapping[str, Law] = MappingProxyType(
    {
        law.id: law
        for law in (
            *config.LAWS,
            *record.LAWS,
            *collectives.LAWS,
            *step.LAWS,
            *training.LAWS,
            *checkpoint.LAWS,
            *rollout.LAWS,
            *composition.LAWS,
            *life.LAWS,
        )
    }
)
"""What every strategy obeys."""

ENGINE_LAWS: Mapping[str, Law] = MappingProxyType({law.id: law for law in (*record.ENGINE_RECORD_LAWS, *engine.LAWS)})
"""What every engine obeys."""


def laws_of(kind: SubjectKind) -> Mapping[str, Law]:
    """Return the laws of strategies or of engines, by id.

    Args:
        kind: which.
    """
    return STRATEGY_LAWS if kind == "strategy" else ENGINE_LAWS


def choose_laws(kind: SubjectKind, patterns: Sequence[str] = ()) -> tuple[Law, ...]:
    """Return the laws that at least one pattern names, in their own order.

    Args:
        kind: laws of strategies or of engines.
        patterns: ids, or with a wildcard such as "step.*"; none at all names every law.

    Raises:
        ConfigError: a pattern names no law.

    Example:
        >>> [law.id for law in choose_laws("strategy", ["step.acc*"])]
        ['step.accumulation']
    """
    known = laws_of(kind)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(f"laws={pattern!r} names no {kind} law; {nearest(pattern, known)}.")
    return tuple(
        law for name, law in known.items() if not patterns or any(fnmatch.fnmatchcase(name, each) for each in patterns)
    )
