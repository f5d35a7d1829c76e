"""What was refused, and whether the error says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

import attrs

from lightrft.errors import LawError

__all__ = ["Refusal", "refusal_of", "require_refused"]

_P = ParamSpec("_P")


@attrs.frozen(kw_only=True)
class Refusal:
    """An error.

    Attributes:
        kinds: names of its type and of those that the type refines.
        message: its text.
    """

    kinds: tuple[str, ...]
    message: str


def refusal_of(action: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> Refusal | None:
    """Return the error that something ends in, or None.

    Args:
        action: what to do.
        args: its arguments.
        kwargs: and those by name.
    """
    try:
        action(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 (the law says which one it must be)
        return Refusal(kinds=tuple(kind.__name__ for kind in type(error).__mro__), message=str(error))
    return None


def require_refused(
    refusal: Refusal | None, what: str, *, kind: str = "CheckpointError", named: tuple[str, ...]
) -> None:
    """Check that something was refused with an error that says what is wrong.

    Args:
        refusal: the error, or None.
        what: what was tried, in words.
        kind: name of the type that the error must have.
        named: texts of which the message must hold one.

    Raises:
        LawError: it was done, or the error is another one.
    """
    if refusal is None:
        raise LawError(f"{what} was done without an error; it must be a {kind}.")
    if kind not in refusal.kinds:
        raise LawError(f"{what} ended in {refusal.kinds[0]} ({refusal.message}); it must be a {kind}.")
    if not any(name in refusal.message for name in named):
        raise LawError(f"{what} was refused with {refusal.message!r}; the message must name one of {named}.")
