"""From the exception of a broken law to what a reader is told."""

from __future__ import annotations

import attrs

from lightrft.errors import LightRFTError

__all__ = ["Failure", "describe_error", "describe_failure"]

_EXAMPLE = "example: "
"""How the note begins with which a law marks the case that it is broken for."""

_DRAWN = " holds_for("
"""Stands in the first line of the note with which hypothesis says the same in its own words."""


@attrs.frozen(kw_only=True)
class Failure:
    """What is told of a broken law.

    Attributes:
        message: what was seen and what must be, with whatever was noted on the way.
        example: the smallest case that was found, as JSON; None for a law whose cases are no plain data.
    """

    message: str
    example: str | None


def describe_failure(error: BaseException) -> Failure:
    """Return what is told of the exception with which a law ended.

    Args:
        error: the exception; its notes are read.

    Example:
        >>> error = ZeroDivisionError("by nothing")
        >>> error.add_note('example: {"size": 0}')
        >>> describe_failure(error)
        Failure(message='ZeroDivisionError: by nothing', example='{"size": 0}')
    """
    notes: list[str] = list(getattr(error, "__notes__", []))
    examples = [note.removeprefix(_EXAMPLE) for note in notes if note.startswith(_EXAMPLE)]
    others = [note for note in notes if not note.startswith(_EXAMPLE) and _DRAWN not in note.partition("\n")[0]]
    parts = [_said(error), *filter(None, map(_calls, others))]
    if isinstance(error, BaseExceptionGroup):  # hypothesis' when a case fails once and passes the next time
        inner = [describe_failure(each) for each in error.exceptions]
        parts += dict.fromkeys(each.message for each in inner)
        examples += [each.example for each in inner if each.example is not None]
    return Failure(message=_printable("\n".join(parts)), example=examples[-1] if examples else None)


def describe_error(error: BaseException) -> str:
    r"""Return type and message of an exception as a part of a sentence: one line that a terminal can show.

    Args:
        error: the exception.

    Example:
        >>> describe_error(ValueError("no such\nthing."))
        'ValueError: no such thing'
    """
    return " ".join(_printable(f"{type(error).__name__}: {error}").split()).rstrip(".:")


def _printable(text: str) -> str:
    """Return a text whose control characters are escaped; they could clear a screen."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def _calls(note: str) -> str:
    """Return a note; of those with which hypothesis tells of a state machine, the calls alone."""
    if note.endswith("<state machine>"):
        return "calls:"
    if note.startswith("state = ") or note == "state.teardown()":
        return ""
    return f"  {note.removeprefix('state.')}" if note.startswith("state.") else note


def _said(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, AssertionError) and text:
        return text
    if isinstance(error, LightRFTError) or text:
        return f"{type(error).__name__}: {text}"
    return type(error).__name__
