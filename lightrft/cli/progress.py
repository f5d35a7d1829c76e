"""Progress on the terminal, for which no run ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from lightrft.cli.terminal import complain, mute
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.tracking.tracker import Channel, Tracker

__all__ = ["build_dispensable", "reading_bar"]


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

    def resume(step: int, *, is_evaluated: bool = True) -> None:
        with unless_unwritable():
            shown.resume(step, is_evaluated=is_evaluated)

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        with unless_unwritable():
            shown.log(channel, row)

    def close() -> None:
        with unless_unwritable():
            shown.close()

    return Tracker(resume=resume, log=log, close=close)


@contextmanager
def reading_bar(text: str, num_bytes: int) -> Generator[Callable[[int], None]]:
    """Show how far reading has come on stderr, if that is a terminal, and yield what is told of bytes as they are read.

    Args:
        text: what is done.
        num_bytes: how many there are.
    """
    if not sys.stderr.isatty():
        yield _say_nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=num_bytes)

        def on_read(more: int, /) -> None:
            progress.update(task, advance=more)

        yield on_read


def _say_nothing(num_bytes: int, /) -> None:
    del num_bytes
