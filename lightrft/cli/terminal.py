"""What is written to the terminal: lines, tables, and warnings of one line."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

__all__ = ["command_line", "complain", "mute", "one_line", "one_line_warnings", "say", "table", "tolerant_output"]


def say(*lines: str) -> None:
    """Write lines to stdout at once; once its reader has gone, as `head` goes, nowhere.

    Args:
        lines: without their ends.

    Raises:
        OSError: they cannot be written, such as on a full disk.
    """
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
    except OSError as error:  # writing names no file by itself
        mute()
        raise OSError(error.errno, error.strerror, "standard output") from error


def mute() -> None:
    """Send all that is still written to stdout nowhere: no later write fails, Python's own last one included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def complain(text: str) -> None:
    """Write one line to stderr, with the name of the program.

    Args:
        text: what is wrong.
    """
    with suppress(OSError):  # where stderr cannot be written there is nobody to tell
        sys.stderr.write(f"lightrft: {text}\n")
        sys.stderr.flush()


def command_line(*words: str) -> str:
    """Return a command of ours as it can be typed here, quoted for the shell.

    Args:
        words: what follows the name of the program, which is the one that runs now.
    """
    return f"{_program()} {shlex.join(words)}"


def _program() -> str:
    own = Path(sys.argv[0])
    if own.parts[-2:] == ("lightrft", "__main__.py"):
        return shlex.join([sys.executable, "-m", "lightrft"])
    found = shutil.which("lightrft")
    if own.name != "lightrft" or (found is not None and Path(found).samefile(own)):
        return "lightrft"
    # started by its path, as from an environment that is not active
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


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
def one_line_warnings(is_to_be_said: Callable[[str], bool]) -> Generator[None]:
    """Show warnings as `lightrft: warning: ...`, one line each, instead of with their place in the source.

    Args:
        is_to_be_said: asked for each; where several ranks warn of the same, one is enough.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        text = f"warning: {one_line(str(message))}"
        if is_to_be_said(text):
            complain(text)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def tolerant_output() -> None:
    """Let output end no run: what the encoding lacks is written as `?`, and what is for a closed stream nowhere."""
    _open_missing()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and (getattr(stream, "encoding", None) or "").lower() not in {"utf-8", "utf8"}:
            reconfigure(errors="replace")


def _open_missing() -> None:
    """Open streams that the process was started without, or else the run's first files would take their descriptors."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest descriptor that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
