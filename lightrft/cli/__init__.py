"""The command `lightrft`; what answers without computing, such as `--help`, loads neither torch nor a backend."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lightrft.cli.arguments import parse
from lightrft.cli.failures import EXIT_OK, exit_code, explain
from lightrft.cli.terminal import complain, one_line_warnings, tolerant_output
from lightrft.cli.voice import is_first_to_say, one_voice, voice_of_rank

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: it failed while running; 2: the input is wrong; 75: it was asked to stop and did, with a checkpoint;
    130: it was interrupted at once. An error is one line on stderr; a traceback comes with `--debug` alone.

    Args:
        argv: the arguments; None takes those of the process.

    Example:
        >>> main(["checkpoint"])
        2
    """
    given = list(sys.argv[1:] if argv is None else argv)
    tolerant_output()
    with one_line_warnings(is_first_to_say):
        try:
            return _run(given)
        except BaseException as error:  # noqa: BLE001 (what nobody foresaw is one line too, a user's sys.exit among it)
            if "--debug" in given:
                traceback.print_exception(error)
            for line in explain(error):
                complain(f"{voice_of_rank(error)}{line}")
            return exit_code(error)


def _run(argv: Sequence[str]) -> int:
    try:
        with one_voice():
            command, args, words = parse(argv)
    except SystemExit as end:  # argparse's, after --help and --version
        return end.code if isinstance(end.code, int) else EXIT_OK
    return command.run(args, words)
