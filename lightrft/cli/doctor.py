"""`lightrft doctor`: whether this machine can do what a run asks of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_FAILED, EXIT_OK
from lightrft.cli.terminal import one_line, say, table
from lightrft.errors import MissingPackageError

if TYPE_CHECKING:
    from lightrft.cli.checks import Check

__all__ = ["COMMAND", "examine"]


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


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    del args, words
    from lightrft.cli.checks import CHECKS

    rows, num_failed = examine(CHECKS)
    say(*table(("check", "result", "what was found"), rows))
    if num_failed:
        say("", f"{num_failed} of {len(rows)} checks failed.")
    return EXIT_FAILED if num_failed else EXIT_OK


COMMAND = Command(
    name="doctor",
    words="",
    summary="check this machine: packages, devices, a collective, a training step, a checkpoint, an engine",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft doctor`."""
