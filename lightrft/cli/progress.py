"""Progress on the terminal, for which no run ends."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from lightrft.cli.terminal import complain, mute
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.tracking.tracker import Channel, Tracker

__all__ = ["build_dispensable"]


def build_dispensable(shown: Tracker) -> Tracker:
    """Return a tracker that no run ends for: where its output cannot be written any more, it says so and is silent.

    Args:
        shown: writes to stdout.
    """

    @contextmanager
    def unless_unwritable() -> Generator[None]:
        try:
            yield
        except OSError as error:
            mute()
            complain(
                f"warning: standard output cannot be written ({error.strerror}); the run goes on without progress."
            )

    def resume(step: int) -> None:
        with unless_unwritable():
            shown.resume(step)

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        with unless_unwritable():
            shown.log(channel, row)

    def close() -> None:
        with unless_unwritable():
            shown.close()

    return Tracker(resume=resume, log=log, close=close)
