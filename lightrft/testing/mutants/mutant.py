"""A planted bug: a right strategy or engine with one thing wrong."""

from __future__ import annotations

from typing import Protocol

import attrs

from lightrft.config import EngineConfig, StrategyConfig
from lightrft.strategy.protocols import BuildStrategy
from lightrft.strategy.protocols.rollout import Engine
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import ENGINES, STRATEGIES
from lightrft.testing.subject import Subject, subject_of

__all__ = ["BreakEngine", "BreakStrategy", "Mutant", "engine_mutant", "strategy_mutant"]


class BreakStrategy(Protocol):
    """Plants a bug in a strategy."""

    def __call__(self, strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        """Return the strategy with one thing wrong.

        Args:
            strategy: a right one.
            config: what it was built from.
        """
        ...


class BreakEngine(Protocol):
    """Plants a bug in an engine."""

    def __call__(self, engine: Engine, config: EngineConfig, /) -> Engine:
        """Return the engine with one thing wrong.

        Args:
            engine: a right one.
            config: what it was built from.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Mutant:
    """A planted bug.

    Attributes:
        id: the law that finds it, and its name, such as "step.accumulation.summed".
        defect: what is wrong, in words.
        subject: the wrong strategy or engine.
        world_size: on how many ranks it is run; several are simulated.
    """

    id: str
    defect: str
    subject: Subject
    world_size: int

    @property
    def law(self) -> str:
        """Id of the law that finds it."""
        return self.id.rpartition(".")[0]


def strategy_mutant(
    id: str,  # noqa: A002 (it is the field's name)
    defect: str,
    breaks: BreakStrategy,
    *,
    of: BuildStrategy = STRATEGIES["single"],
    world_size: int = 1,
) -> Mutant:
    """Return the mutant of a strategy.

    Args:
        id: law and name.
        defect: what is wrong, in words.
        breaks: plants the bug.
        of: builds the right strategy.
        world_size: on how many ranks it is run.
    """

    def build(config: StrategyConfig) -> Strategy:
        return breaks(of(config), config)

    return Mutant(id=id, defect=defect, subject=_named(subject_of(build, "strategy"), id), world_size=world_size)


def engine_mutant(id: str, defect: str, breaks: BreakEngine, *, of: str = "hf") -> Mutant:  # noqa: A002 (as above)
    """Return the mutant of an engine.

    Args:
        id: law and name.
        defect: what is wrong, in words.
        breaks: plants the bug.
        of: registry key of the right engine.
    """

    def build(config: EngineConfig) -> Engine:
        return breaks(ENGINES[of](config), config)

    return Mutant(id=id, defect=defect, subject=_named(subject_of(build, "engine"), id), world_size=1)


def _named(subject: Subject, name: str) -> Subject:
    return attrs.evolve(subject, name=name)
