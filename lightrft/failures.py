"""Exceptions that travel: as plain data to another process, and to all ranks at once."""

from __future__ import annotations

import builtins
import json
import re
import traceback
from collections.abc import Callable
from itertools import accumulate
from typing import TypeGuard, TypeVar

import attrs
import torch

from lightrft import errors
from lightrft.errors import LightRFTError
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["Failure", "failure_of", "raise_together", "raised_by", "together"]

_Made = TypeVar("_Made")


@attrs.frozen(kw_only=True)
class Failure:
    """An exception as plain data.

    Attributes:
        kind: name of its type.
        message: what it says.
        notes: what was added to it.
        traceback: where it was raised, as Python prints it.
    """

    kind: str
    message: str
    notes: tuple[str, ...]
    traceback: str


def failure_of(error: BaseException) -> Failure:
    """Return an exception as plain data.

    Args:
        error: the exception.
    """
    return Failure(
        kind=type(error).__name__,
        message=str(error),
        notes=tuple(getattr(error, "__notes__", ())),
        traceback="".join(traceback.format_exception(error)),
    )


def raised_by(failure: Failure, *, otherwise: type[LightRFTError] = LightRFTError, where: str = "") -> BaseException:
    """Return an exception again, with its notes: of the same type if that is Python's or ours.

    Args:
        failure: the exception as plain data.
        otherwise: its type if it is another one, which the message then names.
        where: what its message begins with.

    Example:
        >>> raised_by(failure_of(ValueError("no")))
        ValueError('no')
    """
    kind = getattr(errors, failure.kind, None) or getattr(builtins, failure.kind, None)
    try:
        error = kind(where + failure.message) if _is_exception(kind) else None
    except TypeError:  # it takes other arguments
        error = None
    error = error or otherwise(f"{where}{failure.kind}: {failure.message}")
    for note in failure.notes:
        error.add_note(note)
    return error


def together(collectives: Collectives, call: Callable[[], _Made]) -> _Made:
    """Return what a call returns, once it has returned on every rank.

    Args:
        collectives: what the ranks do together; all of them call this.
        call: this rank's part.

    Raises:
        Exception: what it raised on the first rank where it did, on all of them; see `raise_together`.
    """
    try:
        made = call()
    except Exception as error:
        raise_together(collectives, error)
        raise
    raise_together(collectives, None)
    return made


def raise_together(collectives: Collectives, error: Exception | None) -> None:
    """Raise on every rank what the first of those raised that could not go on; return if all could.

    The message begins with the number of that rank, and the cause is this rank's own error, or tells where the other
    rank raised its. One rank alone raises its own error.

    Args:
        collectives: what the ranks do together; all of them call this.
        error: what this rank raised; None if nothing.
    """
    line = b"" if error is None else json.dumps(attrs.asdict(failure_of(error))).encode()
    every = collectives.all_gather(
        {"length": torch.tensor(len(line)), "line": torch.tensor(list(line), dtype=torch.uint8)}
    )
    lengths, text = every["length"].tolist(), bytes(every["line"].tolist())
    if error is not None and len(lengths) == 1:
        raise error
    for rank, (length, end) in enumerate(zip(lengths, accumulate(lengths), strict=True)):
        if length:
            told = Failure(**json.loads(text[end - length : end]))
            # ranks that share an engine have named it already
            where = "" if re.match(r"rank \d+: ", told.message) else f"rank {rank}: "
            raise raised_by(told, where=where) from error or RuntimeError(f"on rank {rank}:\n{told.traceback}")


def _is_exception(kind: object) -> TypeGuard[type[BaseException]]:
    return isinstance(kind, type) and issubclass(kind, BaseException)
