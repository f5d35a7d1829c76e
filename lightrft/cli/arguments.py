"""From the words of a command line to a command and its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import override

from lightrft import __version__
from lightrft.cli import checkpoint, conformance, doctor, evaluate, plan, registered, report, train
from lightrft.cli.command import Command
from lightrft.errors import ConfigError, nearest

__all__ = ["COMMANDS", "build_parser", "parse"]

COMMANDS: tuple[Command, ...] = (
    train.COMMAND,
    plan.COMMAND,
    evaluate.COMMAND,
    report.COMMAND,
    checkpoint.COMMAND,
    registered.STRATEGIES_COMMAND,
    registered.ENGINES_COMMAND,
    doctor.COMMAND,
    conformance.COMMAND,
)
"""All commands, in the order of `--help`."""


class _Parser(argparse.ArgumentParser):
    """argparse's hook for wrong usage is a method; ours makes it an error like every other."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="lightrft",
        description="Reinforcement fine-tuning of language models.",
        epilog="Exit codes: 0 done, 1 failed while running, 2 wrong input, 75 stopped with a checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightrft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        words = f"{command.words} " if command.words else ""
        added = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            usage=f"lightrft {command.name} {words}[options]",
            allow_abbrev=False,
        )
        added.add_argument("words", nargs="*", metavar=command.words or "-", help=argparse.SUPPRESS)
        command.add_arguments(added)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace, list[str]]:
    """Return the command that was named, its options, and its positional arguments.

    Args:
        argv: the words of the command line, without the program's name.

    Raises:
        ConfigError: there is no such command or option.
        SystemExit: `--help` or `--version` was asked for, and has been printed.
    """
    known = {command.name: command for command in COMMANDS}
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        raise ConfigError(f"command={argv[0]!r} is not known; {nearest(argv[0], known)}.")
    # argparse takes positional arguments in one run; those that stand after an option are left over
    args, rest = build_parser().parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-")]
    if wrong:
        named = "" if args.command is None else f"{args.command} "
        raise ConfigError(f"option={wrong[0]!r} is not known; see lightrft {named}--help.")
    if args.command is None:
        raise ConfigError(f"no command is given; use one of {', '.join(known)}, or see lightrft --help.")
    command = known[args.command]
    words = [*args.words, *rest]
    if words and not command.words:
        raise ConfigError(f"argument={words[0]!r} is one too many; lightrft {command.name} takes none.")
    return command, args, words
