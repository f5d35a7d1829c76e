"""What a pool and its workers write to one another, one line of JSON a message."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TypeVar, cast, get_type_hints

import attrs

from lightrft.config import EngineConfig, StrategyConfig
from lightrft.errors import ConfigError
from lightrft.failures import Failure
from lightrft.testing.subject import Program, Subject, SubjectKind, find_builder

__all__ = [
    "CLOSE",
    "Job",
    "Reply",
    "Start",
    "find_program",
    "name_of_program",
    "start_of_subject",
    "types_of_program",
]

_Case = TypeVar("_Case")
_Evidence = TypeVar("_Evidence")

CLOSE = "close"
"""The line that tells a worker to leave its process group, so that nobody waits for it there."""


@attrs.frozen(kw_only=True)
class Start:
    """The first line to a worker.

    Attributes:
        target: name of the subject.
        kind: which of the two it is.
        config: JSON of the settings of the strategy.
        engine: JSON of the settings of the engine.
        timeout: seconds that a collective waits for a missing rank.
        progress: file for the last call.
    """

    target: str
    kind: SubjectKind
    config: str
    engine: str
    timeout: float
    progress: str


@attrs.frozen(kw_only=True)
class Job:
    """A program to run.

    Attributes:
        program: `module:name`.
        case: JSON of its case.
        directory: the same on every rank.
        group: number of the process group to run it in; a new number asks for a new group.
    """

    program: str
    case: str
    directory: str
    group: int


@attrs.frozen(kw_only=True)
class Reply:
    """What came of a line; without evidence and failure, the worker is ready.

    Attributes:
        evidence: JSON of what the program returned.
        failure: what it raised instead.
    """

    evidence: str | None = None
    failure: Failure | None = None


def start_of_subject(subject: Subject, *, timeout: float) -> Start:
    """Return the first line to workers that hold a subject to laws, but for the file of the last call.

    Args:
        subject: what is held to the laws.
        timeout: seconds that a collective waits for a missing rank.

    Raises:
        ConfigError: the subject is not found by its name in another process, or its settings are no plain data.
    """
    if "<" in subject.name or subject.name.startswith("__main__:"):
        raise ConfigError(
            f"subject={subject.name!r} is not found by its name in another process; write the builder as a function of "
            "a module and name it as package.module:build."
        )
    find_builder(subject.name, subject.kind)
    return Start(
        target=subject.name,
        kind=subject.kind,
        config=_settings(subject.config),
        engine=_settings(subject.engine),
        timeout=timeout,
        progress="",
    )


def _settings(config: StrategyConfig | EngineConfig) -> str:
    plain = attrs.asdict(config, filter=_is_setting, recurse=False)
    try:
        return json.dumps({name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()})
    except TypeError as error:
        raise ConfigError(f"config={config!r} cannot travel to another process ({error}); use plain data.") from error


def _is_setting(field: attrs.Attribute[object], value: object) -> bool:
    del value
    return field.name != "args"  # where a StrategyConfig came from


def name_of_program(program: Program[_Case, _Evidence]) -> str:
    """Return the name by which another process finds a program.

    Args:
        program: a function of a module.

    Raises:
        ConfigError: it is none.
    """
    module, name = str(getattr(program, "__module__", None)), str(getattr(program, "__qualname__", repr(program)))
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not program:
        raise ConfigError(
            f"program={name!r} of {module!r} is not found by its name in another process; make it a function of a "
            "module that can be imported."
        )
    return f"{module}:{name}"


def find_program(name: str) -> Program[object, object]:
    """Return the program of a name.

    Args:
        name: `module:name`.
    """
    module, _, attribute = name.partition(":")
    return cast("Program[object, object]", getattr(import_module(module), attribute))


def types_of_program(program: Program[_Case, _Evidence]) -> tuple[type[_Case], type[_Evidence]]:
    """Return the types of case and evidence.

    Args:
        program: annotated with them.

    Raises:
        ConfigError: it is not annotated.
    """
    hints = get_type_hints(program)
    evidence = hints.pop("return", None)
    if len(hints) != 2 or evidence is None:
        raise ConfigError(
            f"program={getattr(program, '__qualname__', program)!r} is not annotated, so its case and evidence cannot "
            "travel; annotate both parameters and what it returns."
        )
    case: type[_Case] = list(hints.values())[1]
    return case, cast("type[_Evidence]", evidence)
