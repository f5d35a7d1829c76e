"""From an exception to an exit code and a line."""

from __future__ import annotations

import re

from lightrft.cli.terminal import one_line
from lightrft.errors import (
    CollectiveError,
    ConfigError,
    DataError,
    InterruptedRunError,
    LightRFTError,
    MissingPackageError,
    UnsupportedError,
)

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_STOPPED",
    "UnsaidError",
    "exit_code",
    "explain",
    "is_effect",
]

EXIT_OK = 0
"""It is done."""
EXIT_FAILED = 1
"""It failed while running."""
EXIT_BAD_INPUT = 2
"""The input is wrong; nothing was begun."""
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try the same again later."""
EXIT_INTERRUPTED = 130
"""What shells report for a process that SIGINT ended."""

_BAD_INPUT = (ConfigError, DataError, MissingPackageError, UnsupportedError)

_TRANSPORTS = ("gloo", "NCCL", "c10d")
"""Names that stand in what torch's collectives raise where a rank is gone; most of it has no type of its own."""

_LATE = re.compile(r"(?:Timed out waiting |ran for )(\d+) ?(?:ms|milliseconds)")
"""What gloo and NCCL say of a collective that not all ranks entered in time."""


class UnsaidError(Exception):
    """The end of a rank of which another rank, or the process that started it, tells."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def is_effect(error: BaseException) -> bool:
    """Return whether an error may be no more than the loss of another rank.

    Args:
        error: what a rank raised.
    """
    return isinstance(error, CollectiveError) or _is_of_transport(error)


def exit_code(error: BaseException) -> int:
    """Return the exit code for an exception that ended a command.

    Args:
        error: the exception.
    """
    if isinstance(error, UnsaidError):
        return error.code
    if isinstance(error, InterruptedRunError):
        return EXIT_STOPPED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if isinstance(error, _BAD_INPUT) else EXIT_FAILED


def explain(error: BaseException) -> list[str]:
    """Return the lines that say what happened: one, or one for each wrong setting of a configuration; or none.

    Args:
        error: the exception; its notes are added to the line.

    Example:
        >>> explain(FileNotFoundError(2, "No such file or directory", "runs/a"))
        ['error: runs/a: No such file or directory']
    """
    if isinstance(error, UnsaidError):
        return []
    if isinstance(error, InterruptedRunError):
        return [one_line(str(error))]
    lines = _messages(error)
    notes: list[str] = getattr(error, "__notes__", [])
    if notes and not lines[-1].endswith("."):
        lines[-1] += "."
    lines[-1] = " ".join((lines[-1], *notes))
    return [f"error: {one_line(line)}" for line in lines]


def _is_of_transport(error: BaseException) -> bool:
    is_bare = type(error) is RuntimeError or type(error).__module__.startswith("torch.distributed")
    return is_bare and any(name in str(error) for name in _TRANSPORTS)


def _messages(error: BaseException) -> list[str]:
    if isinstance(error, KeyboardInterrupt):
        return [str(error) or "interrupted at once, in the middle of a step."]
    if isinstance(error, ConfigError) and error.__cause__ is None:
        return str(error).splitlines() or [""]
    if isinstance(error, LightRFTError):
        return [str(error)]
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return [f"{where}{error.strerror}"]
    late = _LATE.search(str(error)) if _is_of_transport(error) else None
    if late is not None:
        return [_too_late(int(late[1]) / 1000)]
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return [f"{said}; run again with --debug for the traceback."]


def _too_late(seconds: float) -> str:
    # our own calls know who is missing; those that sharding makes inside of a model do not
    return (
        f"strategy.timeout={seconds} went by inside of the model, in a collective of its forward pass, backward pass "
        "or step that another rank did not enter; see what other ranks wait for, or set more if they are only slow."
    )
