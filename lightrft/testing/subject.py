"""What is held to the laws: a strategy with an engine, and where a program of a law stands when it meets them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, TypeAlias, TypeVar, cast

import attrs

from lightrft.backends.launch import world_size_of_launch
from lightrft.config import EngineConfig, StrategyConfig
from lightrft.errors import ConfigError, nearest
from lightrft.strategy.build import get_strategy
from lightrft.strategy.protocols import BuildEngine, BuildStrategy
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import ENGINES, registered_engines, registered_strategies
from lightrft.testing.conformance.failure import describe_error

__all__ = ["Program", "Rank", "RunOnRanks", "Subject", "SubjectKind", "find_builder", "subject_of"]

SubjectKind: TypeAlias = Literal["strategy", "engine"]
"""Which of the two is held to its laws; the other one is there to make it run."""

_Case_contra = TypeVar("_Case_contra", contravariant=True)
_Evidence_co = TypeVar("_Evidence_co", covariant=True)
_Case = TypeVar("_Case")
_Evidence = TypeVar("_Evidence")


@attrs.frozen(kw_only=True, eq=False)
class Subject:
    """A strategy and an engine, one of which is held to its laws.

    Attributes:
        name: what the user called it: a registry key or `package.module:build`.
        kind: which of the two it is.
        build: makes the strategy, whose `setup_inference_engine` knows the engine under `engine.type`.
        config: the settings that laws start from; each changes those that it is about.
        engine: the settings of the engine.
        build_engine: makes the engine that is held to its laws; None if that is the strategy.
    """

    name: str
    kind: SubjectKind
    build: BuildStrategy
    config: StrategyConfig
    engine: EngineConfig
    build_engine: BuildEngine | None = None


@attrs.frozen(kw_only=True, eq=False)
class Rank:
    """Where a program of a law runs, and what it is given there.

    Attributes:
        rank: number of this rank.
        world_size: number of ranks that run the program.
        directory: an empty directory, the same for all ranks, removed afterwards.
        build: makes a strategy; a program may build several, and they are torn down when it has ended.
        config: the settings to start from; change them with `attrs.evolve`.
        engine: the settings of the engine, for `strategy.setup_inference_engine`.
    """

    rank: int
    world_size: int
    directory: Path
    build: BuildStrategy
    config: StrategyConfig
    engine: EngineConfig


class Program(Protocol[_Case_contra, _Evidence_co]):
    """The part of a law that runs on every rank; a function of a module, so that another process can find it."""

    def __call__(self, rank: Rank, case: _Case_contra, /) -> _Evidence_co:
        """Return what was seen on this rank.

        Args:
            rank: its place, and what is held to the law.
            case: what was drawn, the same on every rank.
        """
        ...


class RunOnRanks(Protocol):
    """Runs a program on every rank."""

    def __call__(self, program: Program[_Case, _Evidence], case: _Case) -> list[_Evidence]:
        """Return what each rank saw, in rank order.

        Where ranks are processes, case and evidence travel as JSON by the types in the program's annotations: attrs
        records, tuples, lists, dicts with string keys, numbers, texts and tensors.

        Args:
            program: what to run.
            case: what to give it.

        Raises:
            StuckError: ranks wait for ever; where each of them is is named.
            LawError: a process ended; the last call of every rank is named.
            Exception: whatever the program raised on the first rank that failed, with a note of the rank.
        """
        ...


def find_builder(target: str, kind: SubjectKind) -> BuildStrategy | BuildEngine:
    """Return the builder that a target names.

    Args:
        target: a registry key, or `package.module:build`.
        kind: which registry.

    Raises:
        ConfigError: nothing is registered or found under this name.
    """
    module, separator, attribute = target.partition(":")
    if not separator:
        known = registered_strategies() if kind == "strategy" else registered_engines()
        if target not in known:
            raise ConfigError(f"target={target!r} is no registered {kind}; {nearest(target, known)}.")
        return known[target]
    try:
        found = getattr(_import(module, target), attribute)
    except AttributeError as error:
        raise ConfigError(f"target={target!r} cannot be imported ({error}); write package.module:function.") from error
    if not callable(found):
        a_kind = "an engine" if kind == "engine" else "a strategy"
        raise ConfigError(f"target={target!r} is of type {type(found).__name__}; name a function that builds {a_kind}.")
    return cast("BuildStrategy | BuildEngine", found)


def _import(module: str, target: str) -> ModuleType:
    try:
        return import_module(module)
    except (Exception, SystemExit) as error:  # a module of the user's can raise anything
        said = describe_error(error)
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if is_missing or not module.strip(".") or module.startswith("."):
            message = f"target={target!r} cannot be imported ({said}); write package.module:function."
        else:
            message = f"target={target!r} cannot be imported: {module!r} itself fails ({said}); mend that module."
        raise ConfigError(message) from error


def subject_of(
    target: str | BuildStrategy | BuildEngine,
    kind: SubjectKind,
    *,
    config: StrategyConfig | None = None,
    engine: EngineConfig | None = None,
) -> Subject:
    """Return the subject of a target.

    A strategy is tested with the engine "scripted", or the one that `engine` names; an engine is tested inside of the
    strategy "single", and where a launcher started several processes inside of `lightrft.testing.replicated`, so that
    each of them has one.

    Args:
        target: a registry key, `package.module:build`, or a builder.
        kind: what the target builds.
        config: settings that the strategy starts from; None takes the defaults.
        engine: settings of the engine; None takes the defaults.

    Raises:
        ConfigError: there is no such target.

    Example:
        >>> subject = subject_of("single", "strategy")
        >>> subject.build(subject.config).get_rank()
        0
    """
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    builder = find_builder(target, kind) if isinstance(target, str) else target
    base = config or StrategyConfig()
    if kind == "strategy":
        return Subject(
            name=name,
            kind=kind,
            build=cast("BuildStrategy", builder),
            config=base,
            engine=engine or EngineConfig(type="scripted"),
        )
    chosen = attrs.evolve(engine or EngineConfig(), type="subject")
    build_engine = cast("BuildEngine", builder)
    engines = {**ENGINES, "subject": build_engine}

    def build(config: StrategyConfig) -> Strategy:
        if world_size_of_launch() == 1:
            return get_strategy(attrs.evolve(config, strategy="single"), engines=engines)
        from lightrft.testing.replicated import build_gloo  # imports torch

        on_ranks = {"replicated": build_gloo}
        return get_strategy(attrs.evolve(config, strategy="replicated"), registry=on_ranks, engines=engines)

    return Subject(name=name, kind=kind, build=build, config=base, engine=chosen, build_engine=build_engine)
