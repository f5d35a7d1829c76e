"""Laws: a writer that is killed, or whose disk is full, at any operation loses nothing.

The operations are found by looking at every call of a C function of `posix` and `io` from Python while a save runs, so
that a save is stopped between any two of them, whatever files it writes. The writer that is killed is a fork of this
process, which has torch loaded already.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.errors import LawError
from lightrft.strategy.record import Strategy
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import (
    Loaded,
    loaded,
    require_loaded,
    saved_and_loaded,
    started,
    tiny,
)
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_NEEDS_SPACE = frozenset({"open", "write", "writelines", "flush", "fsync", "mkdir", "rename", "replace", "link"})
_CHANGES = _NEEDS_SPACE | {"close", "remove", "unlink", "rmdir", "truncate", "ftruncate", "symlink", "__exit__"}
_SECONDS = 60  # after which a child that waits for a lock of a thread it has not is ended


@attrs.frozen(kw_only=True)
class StopCase:
    """A save that is stopped.

    Attributes:
        committed: checkpoints that were saved before.
        max_num: what each save is told.
        moment: before which operation it is stopped, modulo the number of operations.
    """

    committed: int
    max_num: int | None
    moment: int


@attrs.frozen(kw_only=True)
class Survivors:
    """What is left.

    Attributes:
        status: exit status of the writer; negative is the signal.
        said: what the writer said when it ended otherwise; the stacks of one that took too long.
        refusal: the error that the save ended in, or None.
        latest: the newest step.
        newest: what is loaded without a step.
        each: what is loaded of the steps from 1 to the one whose save was stopped.
        then: what is loaded after one more save.
    """

    status: int
    said: str
    refusal: Refusal | None
    latest: int | None
    newest: Loaded
    each: tuple[Loaded, ...]
    then: Loaded


def _stop_cases(world_size: int, /) -> SearchStrategy[StopCase]:
    del world_size
    return st.builds(
        StopCase,
        committed=st.integers(1, 2),
        max_num=st.sampled_from([1, 2, None]),
        moment=st.integers(0, 2**16),
    )


def _killed(rank: Rank, case: StopCase) -> Survivors:
    strategy, directory = started(rank), rank.directory / "run"
    operations = _commit(strategy, directory, case, _CHANGES)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    step = case.committed + 1
    model = tiny(strategy, step)  # here, since ranks that meet in it need threads, which a child has none of

    def save() -> None:
        with _stopped(_CHANGES, case.moment % operations, die):
            strategy.save_ckpt(model, directory, step=step, max_num=case.max_num, client_state={"step": step})

    status, said = _in_child(save, rank.directory / "writer.log")
    return _survivors(strategy, directory, case, status=status, said=said, refusal=None)


def _full(rank: Rank, case: StopCase) -> Survivors:
    strategy, directory = started(rank), rank.directory / "run"
    operations = _commit(strategy, directory, case, _NEEDS_SPACE)

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save() -> None:
        with _stopped(_NEEDS_SPACE, case.moment % operations, fail):
            _save(strategy, directory, case, case.committed + 1)

    return _survivors(strategy, directory, case, refusal=refusal_of(save))


def _commit(strategy: Strategy, directory: Path, case: StopCase, names: frozenset[str]) -> int:
    """Save the checkpoints that come before, and return how many operations the last one took, and one."""
    for step in range(1, case.committed):
        _save(strategy, directory, case, step)
    with _operations(names) as seen:
        _save(strategy, directory, case, case.committed)
    return len(seen) + 1


def _save(strategy: Strategy, directory: Path, case: StopCase, step: int) -> None:
    strategy.save_ckpt(tiny(strategy, step), directory, step=step, max_num=case.max_num, client_state={"step": step})


def _survivors(
    strategy: Strategy, directory: Path, case: StopCase, *, refusal: Refusal | None, status: int = 0, said: str = ""
) -> Survivors:
    latest, newest = strategy.latest_ckpt(directory), loaded(strategy, directory)
    each = tuple(loaded(strategy, directory, step=step) for step in range(1, case.committed + 2))
    then = saved_and_loaded(strategy, directory, (latest or 0) + 1)
    return Survivors(status=status, said=said, refusal=refusal, latest=latest, newest=newest, each=each, then=then)


def _killed_holds(harness: Harness, case: StopCase) -> None:
    for seen in harness.run(_killed, case):
        if seen.status not in {0, -signal.SIGKILL}:
            ended = f"the writer ended with status {seen.status} before it was killed"
            raise LawError(f"{ended}; saving must succeed. It said: {seen.said}")
        _require_survivors(seen, case, f"a save was killed before operation {case.moment}")


def _full_holds(harness: Harness, case: StopCase) -> None:
    for seen in harness.run(_full, case):
        what = f"the disk was full at operation {case.moment}"
        if seen.refusal is not None and not {"CheckpointError", "OSError"} & set(seen.refusal.kinds):
            raise LawError(f"{what}: {seen.refusal.kinds[0]} ({seen.refusal.message}); it must be a CheckpointError.")
        if seen.refusal is None and seen.latest != case.committed + 1:
            raise LawError(f"{what}: save_ckpt returned and the newest step is {seen.latest}.")
        _require_survivors(seen, case, what)


def _require_survivors(seen: Survivors, case: StopCase, what: str) -> None:
    if seen.latest not in {case.committed, case.committed + 1}:
        raise LawError(f"{what}: the newest step is {seen.latest}; step {case.committed} was committed.")
    require_loaded(seen.newest, seen.latest, f"{what}: loading the newest")
    first = 1 if case.max_num is None else max(1, seen.latest + 1 - case.max_num)
    for step in range(first, seen.latest + 1):
        require_loaded(seen.each[step - 1], step, f"{what}: loading step {step}")
    require_loaded(seen.then, seen.latest + 1, f"{what}: saving once more")


@contextmanager
def _operations(names: frozenset[str]) -> Generator[list[str]]:
    seen: list[str] = []
    with _profiled(names, seen.append):
        yield seen


@contextmanager
def _stopped(names: frozenset[str], moment: int, action: Callable[[], None]) -> Generator[None]:
    seen: list[str] = []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == moment + 1:
            action()

    with _profiled(names, stop):
        yield


@contextmanager
def _profiled(names: frozenset[str], on_operation: Callable[[str], None]) -> Generator[None]:
    def profile(frame: FrameType, event: str, function: object) -> None:
        del frame
        if event == "c_call" and getattr(function, "__name__", "") in names and _touches_files(function):
            on_operation(str(getattr(function, "__name__", "")))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _touches_files(function: object) -> bool:
    module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return module in {"posix", "_io", "io"}


def _in_child(action: Callable[[], object], log: Path) -> tuple[int, str]:
    """Return how a fork of this process ended that did this, and what it said."""
    with warnings.catch_warnings():
        # later Pythons warn where there are threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        gc.disable()  # what is collected here may wait for threads that only the parent has: a group of gloo does
        status = 1
        try:
            with log.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback_later(_SECONDS, exit=True, file=file)
                try:
                    action()
                    status = 0
                except BaseException:  # noqa: BLE001 - it is told by the parent
                    traceback.print_exc(file=file)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), log.read_text(encoding="utf-8")


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.killed",
        statement="A writer that is killed at any operation leaves every committed checkpoint loadable; the newest "
        "committed one is found, and the next save succeeds.",
        check=for_all(_stop_cases, _killed_holds),
        worlds="one",
    ),
    Law(
        id="checkpoint.full_disk",
        statement="A save that an error of the disk stops raises it, leaves every committed checkpoint loadable, and "
        "the next save succeeds.",
        check=for_all(_stop_cases, _full_holds),
        worlds="one",
    ),
)
"""The laws of this module."""
