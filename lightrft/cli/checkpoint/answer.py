"""What an action on checkpoints is, and what it answers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

import attrs

from lightrft.cli.failures import EXIT_OK
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["Action", "Answer", "local_time", "written_at"]


@attrs.frozen(kw_only=True, eq=False)
class Answer:
    """What an action found or did, in two forms.

    Attributes:
        facts: for programs.
        lines: for people.
        code: the exit code.
    """

    facts: Mapping[str, Json]
    lines: Sequence[str]
    code: int = EXIT_OK


class Action(Protocol):
    """Does one thing to checkpoints."""

    def __call__(self, args: argparse.Namespace, paths: Sequence[str]) -> Answer:
        """Return what was found or done; nothing is printed but a bar.

        Args:
            args: the options.
            paths: the directories that were named, as many as the action takes.
        """
        ...


def written_at(seconds: float) -> str:
    """Return a moment for programs, in UTC.

    Args:
        seconds: since 1970.

    Example:
        >>> written_at(0.5)
        '1970-01-01T00:00:00+00:00'
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def local_time(seconds: float) -> str:
    """Return a moment for people, in the time of this machine.

    Args:
        seconds: since 1970.
    """
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
