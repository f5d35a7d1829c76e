"""`lightrft doctor`: whether this machine can do what a run asks of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import attrs

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_FAILED, EXIT_OK
from lightrft.cli.terminal import one_line, say, table
from lightrft.cli.voice import quieten_torch
from lightrft.config import EngineConfig, load_config
from lightrft.errors import ConfigError, EngineStateError, MissingPackageError, nearest
from lightrft.strategy.registry import registered_engines

if TYPE_CHECKING:
    from lightrft.cli.checks import Check

__all__ = ["COMMAND", "examine", "examine_engine"]

_CACHE_GB = 0.01
"""Room for a few short completions: an engine that sets its cache aside need not fill the machine."""


def examine(checks: Sequence[Check]) -> tuple[list[tuple[str, str, str]], int]:
    """Return (check, result, what was found) of each check, and how many failed.

    Args:
        checks: what to try out; one that raises does not keep the others from being tried.
    """
    rows = [(check.name, *_outcome(check)) for check in checks]
    return rows, sum(result == "failed" for _, result, _ in rows)


def _outcome(check: Check) -> tuple[str, str]:
    try:
        return "ok", check.look()
    except MissingPackageError as error:
        return "absent", one_line(str(error))
    except Exception as error:  # noqa: BLE001 (that anything may be broken is the point of looking)
        return "failed", one_line(f"{type(error).__name__}: {error}")


def examine_engine(steps: Sequence[str], life: Generator[str]) -> tuple[list[tuple[str, str, str]], Exception | None]:
    """Return (step, what was seen, seconds) of each step that was begun, and what the last one failed with, or None.

    Args:
        steps: their names, in order.
        life: does a step each time that it is asked, and says what was seen.

    Raises:
        ConfigError: the engine cannot be chosen.
        MissingPackageError: what it needs is not installed.
    """
    rows: list[tuple[str, str, str]] = []
    with closing(life):
        for step in steps:
            started = time.perf_counter()
            try:
                seen = next(life)
            except Exception as error:
                if not rows and isinstance(error, (ConfigError, MissingPackageError)):
                    raise
                return [*rows, (step, "failed", _seconds(started))], error
            rows.append((step, seen, _seconds(started)))
    return rows, None


def _seconds(started: float) -> str:
    return f"{time.perf_counter() - started:.2f}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", metavar="KEY", help="go through the life of this engine instead, with settings such as cache_gb=0.1"
    )


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    if args.engine is not None:
        return _run_engine(_engine_config(args.engine, words), is_debug=args.debug)
    if words:
        raise ConfigError(f"argument={words[0]!r} is a setting of no engine; name one: lightrft doctor --engine KEY.")
    from lightrft.cli.checks import CHECKS

    rows, num_failed = examine(CHECKS)
    say(*table(("check", "result", "what was found"), rows))
    if num_failed:
        say("", f"{num_failed} of {len(rows)} checks failed.")
    return EXIT_FAILED if num_failed else EXIT_OK


def _engine_config(key: str, settings: Sequence[str]) -> EngineConfig:
    for setting in settings:
        name, equals, _ = setting.partition("=")
        if not equals or name == "type":
            raise ConfigError(f"argument={setting!r} is no setting of the engine {key!r}; write name=value.")
    if key not in registered_engines():
        raise ConfigError(f"--engine={key!r} is not registered; {nearest(key, registered_engines())}.")
    given = load_config(None, [f"engine.{setting}" for setting in (f"cache_gb={_CACHE_GB}", *settings)])
    return attrs.evolve(given.engine, type=key)


def _run_engine(config: EngineConfig, *, is_debug: bool) -> int:
    quieten_torch(is_debug=is_debug)
    from lightrft.cli.engine_life import STEPS, live

    rows, error = examine_engine(STEPS, live(config))
    say(*table(("step", "what was seen", "seconds"), rows))
    if error is not None:
        raise EngineStateError(
            f"engine={config.type!r} fails at {rows[-1][0]!r}: {type(error).__name__}: {one_line(str(error))}"
        ) from error
    return EXIT_OK


COMMAND = Command(
    name="doctor",
    words="[--engine KEY] [setting=value ...]",
    summary="check this machine: packages, devices, a collective, a training step, a checkpoint, an engine",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft doctor`."""
