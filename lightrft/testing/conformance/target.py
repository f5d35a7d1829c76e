"""What a command line calls a strategy or an engine: what kind it is of, what it claims, how it is called again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import TypeVar, cast, get_args

import attrs

from lightrft.config import EngineConfig, ModelConfig, StrategyConfig, as_mapping
from lightrft.errors import ConfigError, LightRFTError, MissingPackageError, UnsupportedError, nearest
from lightrft.strategy.protocols import Capabilities, Capability, Engine
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import find_engine, registered_engines, registered_strategies
from lightrft.testing.conformance.failure import describe_error
from lightrft.testing.subject import Subject, SubjectKind, find_builder

__all__ = ["claims_of", "kind_of_target", "target_words"]

_Config = TypeVar("_Config")
_Record = TypeVar("_Record")


def kind_of_target(target: str) -> SubjectKind:
    """Return whether a target is a strategy or an engine: by its registry, or by the annotations of its function.

    Args:
        target: a registry key, or `package.module:build`.

    Raises:
        ConfigError: it is not found, or is neither or both.

    Example:
        >>> kind_of_target("hf")
        'engine'
    """
    found = _kinds_of_builder(target) if ":" in target else _kinds_of_key(target)
    if len(found) != 1:
        raise ConfigError(f"target={target!r} does not say what it builds; add --kind strategy or --kind engine.")
    return found.pop()


def claims_of(subject: Subject) -> Capabilities:
    """Return what a subject claims: the strategy's capabilities and those of its engine, of which each rank has one.

    Args:
        subject: what is built for that; an engine is started on a small model, and closed.

    Raises:
        ConfigError: it cannot be built, or is no strategy or engine at all.
        LightRFTError: it says itself why it cannot be built here.
    """
    if subject.build_engine is None:
        strategy = _built(subject, subject.build, subject.config, Strategy)
        return strategy.capabilities | find_engine(subject.engine.type)(subject.engine).capabilities
    _built(subject, subject.build_engine, subject.engine, Engine)
    strategy = subject.build(subject.config)
    # what several ranks run together claims what one runs, and here is one
    alone = attrs.evolve(subject.engine, tensor_parallel_size=1)
    one_each: Capabilities = frozenset({"ranks"})
    return strategy.capabilities | _claims_of_engine(strategy, alone) | one_each


def _built(subject: Subject, build: Callable[[_Config], _Record], config: _Config, record: type[_Record]) -> _Record:
    try:
        built = build(config)
    except (ConfigError, MissingPackageError, UnsupportedError):
        raise
    except (Exception, SystemExit) as error:  # a builder of the user's can raise anything
        raise _unbuildable(subject, describe_error(error), config, record) from error
    problem = _problem_of_record(built, record)
    if problem:
        raise _unbuildable(subject, problem, config, record)
    return built


def _problem_of_record(built: object, record: type) -> str:
    """Return why a law could not even be asked about what was built; a missing function is told by the laws."""
    # each of the two would be a record with many wrong fields of the other
    is_other = isinstance(built, (Engine, Strategy)) and not isinstance(built, record)
    if built is None or isinstance(built, type):
        return f"it returned {built if built is None else f'the class {built.__name__}'}"
    if is_other or not hasattr(built, "capabilities"):
        return f"it returned an object of type {type(built).__name__}"
    claims = cast("object", getattr(built, "capabilities"))  # noqa: B009 (not every record has it)
    return "" if isinstance(claims, frozenset) else f"its capabilities are no frozenset but {claims!r}"


def _unbuildable(subject: Subject, problem: str, config: object, record: type) -> ConfigError:
    return ConfigError(
        f"target={subject.name!r} cannot be built ({problem}); make it a function of one argument, "
        f"{type(config).__name__}, that returns {'an' if record is Engine else 'a'} {record.__name__}."
    )


def _claims_of_engine(strategy: Strategy, config: EngineConfig) -> Capabilities:
    from lightrft.models.build import build_model_and_tokenizer

    size = ModelConfig(hidden_size=32, intermediate_size=4, num_layers=1, num_heads=1, max_length=8)
    model, tokenizer = build_model_and_tokenizer(size, seed=0)
    try:
        with strategy.setup_inference_engine(config, actor=model, tokenizer=tokenizer) as handle:
            return handle.engine.capabilities
    except LightRFTError:
        raise
    except Exception:  # noqa: BLE001 (an engine that breaks while it starts is held to everything: laws say what is wrong)
        return frozenset(get_args(Capability))


def target_words(subject: Subject) -> list[str]:
    """Return the words of a command line that name a subject and its settings.

    Args:
        subject: the strategy or engine.

    Example:
        >>> from lightrft.testing.subject import subject_of
        >>> target_words(subject_of("single", "strategy", config=StrategyConfig(zero_stage=3)))
        ['single', 'zero_stage=3']
    """
    is_strategy = subject.kind == "strategy"
    plain = EngineConfig(type=subject.engine.type)
    settings = _changed(subject.config, StrategyConfig()) if is_strategy else _changed(subject.engine, plain)
    engine = ["--engine", subject.engine.type] if is_strategy and subject.engine.type != "scripted" else []
    return [subject.name, *settings, *engine, *_kind_words(subject)]


def _kind_words(subject: Subject) -> list[str]:
    try:
        return [] if kind_of_target(subject.name) == subject.kind else ["--kind", subject.kind]
    except ConfigError:
        return ["--kind", subject.kind]


def _changed(config: attrs.AttrsInstance, default: attrs.AttrsInstance) -> list[str]:
    plain = as_mapping(default)
    changed = {name: value for name, value in as_mapping(config).items() if value != plain[name]}
    for name in [name for name, value in changed.items() if isinstance(value, Mapping)]:
        table = cast("Mapping[str, object]", changed.pop(name))
        changed |= {f"{name}.{key}": value for key, value in table.items()}
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items()]


def _kinds_of_key(key: str) -> set[SubjectKind]:
    strategies, engines = registered_strategies(), registered_engines()
    if key not in strategies and key not in engines:
        known = nearest(key, [*strategies, *engines])
        raise ConfigError(f"target={key!r} is not registered; {known}, or your own as package.module:build.")
    return _kinds(is_strategy=key in strategies, is_engine=key in engines)


def _kinds_of_builder(target: str) -> set[SubjectKind]:
    try:
        signature = inspect.signature(find_builder(target, "strategy"))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        return set()  # functions of C have none
    written = [signature.return_annotation, *(parameter.annotation for parameter in signature.parameters.values())]
    names = {_last_name(annotation) for annotation in written}
    return _kinds(
        is_strategy=not names.isdisjoint({"StrategyConfig", "Strategy"}),
        is_engine=not names.isdisjoint({"EngineConfig", "Engine"}),
    )


def _kinds(*, is_strategy: bool, is_engine: bool) -> set[SubjectKind]:
    strategies: set[SubjectKind] = {"strategy"} if is_strategy else set()
    engines: set[SubjectKind] = {"engine"} if is_engine else set()
    return strategies | engines


def _last_name(annotation: object) -> str:
    """Return the name at the end of an annotation, which may be a text that nothing here can evaluate."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return text.strip("'\"").rpartition(".")[2]
