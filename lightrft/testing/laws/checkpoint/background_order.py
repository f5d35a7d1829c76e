"""Laws: saves in the background come one after the other, their errors are told, and they leave nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.backends.collectives.simulated import apart_of_simulated
from lightrft.errors import LawError
from lightrft.strategy.background import background_saves
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import (
    Loaded,
    loaded,
    on_first_rank,
    require_loaded,
    started,
    tiny,
)
from lightrft.testing.laws.checkpoint.held import held_writing
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

Told: TypeAlias = Literal["wait", "save", "leave"]
"""What an error of the background is raised by."""


@attrs.frozen(kw_only=True)
class FailureCase:
    """A save in the background whose place is taken before it is committed.

    Attributes:
        committed: checkpoints before it.
        told: what is done next.
    """

    committed: int
    told: Told


@attrs.frozen(kw_only=True)
class Failed:
    """What came of it.

    Attributes:
        refusal: the error.
        again: the error that leaving ended in after somebody was told, or None.
        newest: what is loaded then.
        then: what is loaded after one more save in the background.
    """

    refusal: Refusal | None
    again: Refusal | None
    newest: Loaded
    then: Loaded


def _failure_cases(world_size: int, /) -> SearchStrategy[FailureCase]:
    del world_size
    return st.builds(FailureCase, committed=st.integers(1, 2), told=st.sampled_from(get_args(Told)))


def _failed(rank: Rank, case: FailureCase) -> Failed:
    strategy, directory = started(rank), rank.directory / "run"
    for step in range(1, case.committed + 1):
        strategy.save_ckpt(tiny(strategy, step), directory, step=step)
    lost, refusals = case.committed + 1, list[Refusal | None]()

    def fail() -> None:
        with background_saves(strategy, apart=apart_of_simulated()) as background:
            gate = threading.Event()
            try:
                model = tiny(strategy, lost)
                path = strategy.save_ckpt(model, directory, step=lost, background=held_writing(background, gate))
                on_first_rank(rank, strategy, _take_place, path)
            finally:
                gate.set()
            strategy.barrier()
            if case.told == "wait":
                refusals.append(refusal_of(background.wait))
            elif case.told == "save":
                other = tiny(strategy, lost + 1)
                refusals.append(
                    refusal_of(lambda: strategy.save_ckpt(other, directory, step=lost + 1, background=background))
                )

    again = refusal_of(fail)
    if case.told == "leave":
        refusals, again = [again], None
    on_first_rank(rank, strategy, _free_place, directory)
    newest = loaded(strategy, directory)
    with background_saves(strategy, apart=apart_of_simulated()) as background:
        strategy.save_ckpt(tiny(strategy, lost), directory, step=lost, background=background)
        strategy.barrier()
    return Failed(refusal=refusals[0], again=again, newest=newest, then=loaded(strategy, directory))


def _take_place(path: Path) -> None:
    (path / "notes").mkdir(parents=True)


def _free_place(directory: Path) -> None:
    for notes in directory.glob("*/notes"):
        notes.rmdir()
        notes.parent.rmdir()


def _failed_holds(harness: Harness, case: FailureCase) -> None:
    lost = case.committed + 1
    for rank, seen in enumerate(harness.run(_failed, case)):
        what = f"rank {rank}: a save of step {lost} that failed in the background, and {case.told} after it"
        require_refused(seen.refusal, what, named=(f"step={lost}",))
        if seen.again is not None:
            raise LawError(f"{what}: told again on leaving ({seen.again.message}); once is enough.")
        require_loaded(seen.newest, case.committed, f"{what}: loading the newest")
        require_loaded(seen.then, lost, f"{what}: saving once more")


@attrs.frozen(kw_only=True)
class OrderCase:
    """Saves in the background, one after the other.

    Attributes:
        saves: how many.
        max_num: what each is told.
    """

    saves: int
    max_num: int | None


@attrs.frozen(kw_only=True)
class InOrder:
    """What was seen.

    Attributes:
        newest: the newest step after each call.
        each: what is loaded at the end, of every step.
        names: what stands in the directory then.
        threads: names of threads that are left.
    """

    newest: tuple[int | None, ...]
    each: tuple[Loaded, ...]
    names: tuple[str, ...]
    threads: tuple[str, ...]


def _order_cases(world_size: int, /) -> SearchStrategy[OrderCase]:
    del world_size
    return st.builds(OrderCase, saves=st.integers(2, 3), max_num=st.sampled_from([None, 1, 2]))


def _in_order(rank: Rank, case: OrderCase) -> InOrder:
    strategy, directory = started(rank), rank.directory / "run"
    before, newest = set(threading.enumerate()), list[int | None]()
    with background_saves(strategy, apart=apart_of_simulated()) as background:
        for step in range(1, case.saves + 1):
            strategy.barrier()
            strategy.save_ckpt(tiny(strategy, step), directory, step=step, max_num=case.max_num, background=background)
            newest.append(strategy.latest_ckpt(directory))
        strategy.barrier()
    strategy.barrier()  # simulated ranks are threads of one process, and all of them must have left
    left = [thread for thread in threading.enumerate() if thread not in before]
    strategy.barrier()
    each = tuple(loaded(strategy, directory, step=step) for step in range(1, case.saves + 1))
    names = tuple(sorted(path.name for path in directory.iterdir()))
    return InOrder(
        newest=tuple(newest),
        each=each,
        names=names,
        threads=tuple(thread.name for thread in left if "simulated" not in thread.name),
    )


def _in_order_holds(harness: Harness, case: OrderCase) -> None:
    kept = range(1 if case.max_num is None else case.saves + 1 - case.max_num, case.saves + 1)
    for rank, seen in enumerate(harness.run(_in_order, case)):
        for step, newest in enumerate(seen.newest[1:], start=1):
            if newest is None or newest < step:
                raise LawError(
                    f"rank {rank}: step {step + 1} was begun and the newest is {newest}; {step} comes first."
                )
        for step in kept:
            require_loaded(seen.each[step - 1], step, f"rank {rank}: {case.saves} saves in the background")
        if seen.threads or len(seen.names) != len(kept):
            raise LawError(f"rank {rank}: {[*seen.names, *seen.threads]} are left; {len(kept)} checkpoints must be.")


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.background_errors",
        statement="An error of a save in the background names the step and is raised once, on all ranks: by the next "
        "save, by waiting, or on leaving; earlier checkpoints load, and the next save succeeds.",
        check=for_all(_failure_cases, _failed_holds),
    ),
    Law(
        id="checkpoint.background_order",
        statement="Saves in the background are committed one after the other, each before the next one is begun, and "
        "leave nothing but checkpoints.",
        check=for_all(_order_cases, _in_order_holds),
    ),
)
"""The laws of this module."""
