"""What is written to the terminal: lines, tables, and warnings of one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TextIO

__all__ = ["complain", "one_line", "one_line_warnings", "say", "table", "tolerant_output"]


def say(*lines: str) -> None:
    """Write lines to stdout at once.

    Args:
        lines: without their ends.
    """
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def complain(text: str) -> None:
    """Write one line to stderr, with the name of the program.

    Args:
        text: what is wrong.
    """
    sys.stderr.write(f"lightrft: {text}\n")
    sys.stderr.flush()


def one_line(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(text.split())


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are as wide as they must be; the last one is not padded.

    Args:
        headers: names of the columns.
        rows: as many texts each.

    Example:
        >>> table(["name", "is"], [["single", "one process"]])
        ['name    is', 'single  one process']
    """
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


@contextmanager
def one_line_warnings() -> Generator[None]:
    """Show warnings as `lightrft: warning: ...`, one line each, instead of with their place in the source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        complain(f"warning: {one_line(str(message))}")

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def tolerant_output() -> None:
    """Let a character that the terminal's encoding lacks be written as `?` instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and (getattr(stream, "encoding", None) or "").lower() not in {"utf-8", "utf8"}:
            reconfigure(errors="replace")
