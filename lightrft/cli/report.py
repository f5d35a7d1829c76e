"""`lightrft report`: one HTML page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_OK
from lightrft.cli.terminal import say
from lightrft.errors import ConfigError

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="where to write it (default: RUN_DIR/report.html)")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    if len(words) != 1:
        raise ConfigError(f"{len(words)} directories are given; name one: lightrft report RUN_DIR.")
    run_dir = Path(words[0])
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={words[0]!r} is not a directory; name the directory of a run.")
    output = run_dir / "report.html" if args.output is None else Path(args.output)
    if not output.parent.is_dir() or (output.exists() and not output.is_file()):
        raise ConfigError(f"output={str(output)!r} cannot be written; name a file, in a directory that exists.")
    from lightrft.tracking.report import write_report

    say(str(write_report(run_dir, output)))
    return EXIT_OK


COMMAND = Command(
    name="report",
    words="RUN_DIR",
    summary="write one HTML page with the curves, the configuration and completions of a run",
    add_arguments=_add_arguments,
    run=_run,
)
"""`lightrft report`."""
