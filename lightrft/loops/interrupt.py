"""Stopping at a step boundary: SIGINT, SIGTERM and SIGHUP become a question that the loop asks."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

__all__ = ["ShouldStop", "never_stop", "stop_on_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ShouldStop(Protocol):
    """Tells whether the run was asked to stop."""

    def __call__(self) -> str | None:
        """Return the name of the signal that asked for it, or None."""
        ...


def never_stop() -> str | None:
    """Return None: a run that nobody interrupts."""
    return None


@contextmanager
def stop_on_signals() -> Generator[ShouldStop]:
    """Yield a function that tells whether SIGINT, SIGTERM or SIGHUP (a terminal that closed) has come.

    A signal that the process ignores, as SIGHUP under nohup, stays ignored.

    The first signal only takes note; a second one ends the process at once, as without this context. To be entered from
    the main thread, where Python delivers signals.
    """
    received: list[str] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def take_note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(signal.Signals(number).name)
        restore()

    def should_stop() -> str | None:
        return received[0] if received else None

    for number in heeded:
        signal.signal(number, take_note)
    try:
        yield should_stop
    finally:
        restore()
