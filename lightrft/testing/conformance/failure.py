"""From the exception of a broken law to what a reader is told."""

from __future__ import annotations

import attrs

from lightrft.errors import LightRFTError

__all__ = ["Failure", "describe_failure"]

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
    parts = [_said(error), *others]
    if isinstance(error, BaseExceptionGroup):  # hypothesis' when a case fails once and passes the next time
        inner = [describe_failure(each) for each in error.exceptions]
        parts += [each.message for each in inner]
        examples += [each.example for each in inner if each.example is not None]
    return Failure(message="\n".join(dict.fromkeys(parts)), example=examples[-1] if examples else None)


def _said(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, AssertionError) and text:
        return text
    if isinstance(error, LightRFTError) or text:
        return f"{type(error).__name__}: {text}"
    return type(error).__name__
