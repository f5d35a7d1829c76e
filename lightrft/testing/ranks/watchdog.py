"""What ends a program that waits for ever in this process, and says where it was."""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from lightrft.backends.collectives.simulated import run_simulated

__all__ = ["StuckError", "watched"]

LIMIT_SECONDS = 120.0
"""How long a program of a law may take: a few milliseconds when all is well, seconds where it starts an engine."""

_NUM_FRAMES = 3
"""Innermost calls that are named; the last one of them is the strategy's, or close to it."""


class StuckError(BaseException):  # no Exception, so that nobody makes the example smaller by waiting again
    """A program that waited for ever; the message names where every rank was."""


@contextmanager
def watched(limit_seconds: float = LIMIT_SECONDS) -> Generator[None]:
    """End what runs inside with a `StuckError` after a time; only the main thread can be told, elsewhere nothing is.

    A timer of somebody else's goes on afterwards.

    Args:
        limit_seconds: the time.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        del number
        raise StuckError(
            f"the program was not over after {limit_seconds:g} seconds: {_places(frame)}; "
            "let every rank make the same calls, and nothing wait for what does not come."
        )

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, limit_seconds)
    try:
        yield
    finally:
        # what is due already rings at once
        left = max(1e-6, delay - (time.monotonic() - start)) if delay else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def _places(frame: FrameType | None) -> str:
    if not any(call.name == run_simulated.__name__ for call in traceback.extract_stack(frame)):
        return f"rank 0 is in {_place(frame)}"
    frames = sys._current_frames()  # noqa: SLF001 (the documented way to see other threads)  # pyright: ignore[reportPrivateUsage]
    ranks = {
        thread.name.removeprefix("simulated-rank-"): frames.get(thread.ident or 0)
        for thread in threading.enumerate()  # the newest ones last, after those that an earlier program left behind
        if thread.name.startswith("simulated-rank-")
    }
    return "; ".join(f"rank {rank} is in {_place(place)}" for rank, place in ranks.items())


def _place(frame: FrameType | None) -> str:
    calls = traceback.extract_stack(frame)[-_NUM_FRAMES:]
    return ", ".join(f"{call.name} ({call.filename}:{call.lineno})" for call in reversed(calls))
