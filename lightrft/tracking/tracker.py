"""Where a run's rows go: a record of functions, so that files, a progress display and a user's own tracker compose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

import attrs

from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["CHANNELS", "Channel", "CloseTracker", "Log", "Resume", "Tracker", "combine", "no_tracker"]

Channel: TypeAlias = Literal["metrics", "timings", "samples"]
"""metrics: what a run computed, the same bits for the same seed; timings: what it cost; samples: completions."""

CHANNELS: tuple[Channel, ...] = ("metrics", "timings", "samples")
"""All channels."""


class Resume(Protocol):
    """Tells where the run goes on."""

    def __call__(self, step: int, *, is_evaluated: bool = True) -> None:
        """Forget every row after `step`: the run goes on from there and will log them again.

        Args:
            step: steps that are done; 0 for a new run.
            is_evaluated: False forgets the evaluation of `step` itself, too.
        """
        ...


class Log(Protocol):
    """Takes a row."""

    def __call__(self, channel: Channel, row: Mapping[str, Json]) -> None:
        """Keep or show a row.

        Args:
            channel: what kind of row it is.
            row: holds "step", the steps done when it was made, and "kind".
        """
        ...


class CloseTracker(Protocol):
    """Ends the tracking."""

    def __call__(self) -> None:
        """Write out what is held back; a second call does nothing."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Tracker:
    """The functions of a tracker."""

    resume: Resume
    log: Log
    close: CloseTracker


def combine(*trackers: Tracker) -> Tracker:
    """Return a tracker that passes everything on to each of several, in order.

    Args:
        trackers: any number of trackers.
    """

    def resume(step: int, *, is_evaluated: bool = True) -> None:
        for tracker in trackers:
            tracker.resume(step, is_evaluated=is_evaluated)

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        for tracker in trackers:
            tracker.log(channel, row)

    def close() -> None:
        for tracker in trackers:
            tracker.close()

    return Tracker(resume=resume, log=log, close=close)


def no_tracker() -> Tracker:
    """Return a tracker that keeps nothing."""
    return combine()
