"""What a command is: a record, one for each module of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Protocol

import attrs

__all__ = ["AddArguments", "Command", "RunCommand"]


class AddArguments(Protocol):
    """Declares a command's options."""

    def __call__(self, parser: argparse.ArgumentParser) -> None:
        """Add options to a parser; positional arguments come to `RunCommand` as words.

        Args:
            parser: the command's own.
        """
        ...


class RunCommand(Protocol):
    """Does what a command is for."""

    def __call__(self, args: argparse.Namespace, words: Sequence[str]) -> int:
        """Return the exit code.

        Args:
            args: options.
            words: positional arguments, wherever they stood between the options.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Command:
    """One command.

    Attributes:
        name: how it is called.
        words: its positional arguments, for `--help`.
        summary: what it does, in a line.
        add_arguments: declares its options.
        run: does it.
    """

    name: str
    words: str
    summary: str
    add_arguments: AddArguments
    run: RunCommand
