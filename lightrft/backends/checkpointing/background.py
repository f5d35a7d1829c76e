"""The thread in which checkpoints are written while training goes on; one save at a time."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import attrs

from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import BackgroundSaves
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["saving_thread"]


@attrs.define(kw_only=True, eq=False)
class _Last:
    """The last save: its thread, and its error, until somebody is told."""

    thread: threading.Thread | None = None
    failure: Exception | None = None
    is_left: bool = False


@contextmanager
def saving_thread(collectives: Collectives) -> Generator[BackgroundSaves]:
    """Yield what runs saves in a thread; at the end the last one is waited for.

    The thread is no daemon: a process that ends without leaving the context completes the save, and prints its error.

    Args:
        collectives: what the ranks do together in their threads, while others go on.

    Raises:
        CheckpointError: the last save failed, and nobody was told yet; a note, where another error is on its way.
    """
    last = _Last()

    def wait() -> None:
        if last.thread is not None:
            last.thread.join()
        last.thread = None
        failure, last.failure = last.failure, None
        if failure is not None:
            raise failure

    def start(save: Callable[[], None], /) -> None:
        if last.is_left:
            raise CheckpointError("background=... is of a context that was left; save inside of background_saves.")
        wait()
        last.thread = threading.Thread(target=_run, args=(save, last), name="lightrft-save")
        last.thread.start()

    def say() -> None:
        if last.failure is not None:
            print(f"lightrft: {last.failure}", file=sys.stderr)  # noqa: T201 (nobody is left to raise it to)

    atexit.register(say)
    try:
        yield BackgroundSaves(collectives=collectives, start=start, wait=wait)
    except Exception as error:
        _note_failure(error, wait)
        raise
    except BaseException:
        wait()
        raise
    else:
        wait()
    finally:
        last.is_left = True
        atexit.unregister(say)


def _run(save: Callable[[], None], last: _Last) -> None:
    try:
        save()
    except Exception as error:  # noqa: BLE001 (whoever waits raises it)
        last.failure = error
    except BaseException as error:  # noqa: BLE001 (of a thread, which nobody else would see)
        last.failure = CheckpointError(f"a save in the background ended in {error!r}; save again.")


def _note_failure(error: Exception, wait: Callable[[], None]) -> None:
    try:
        wait()
    except CheckpointError as failure:
        error.add_note(str(failure))
