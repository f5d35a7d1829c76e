"""Laws: a save in the background is the save of that moment, and leaves nothing behind.

What is late in a program of these laws is late because it waits for a gate, never because of a time: the background is
held before it copies, or before it writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn

from lightrft.backends.collectives.simulated import apart_of_simulated
from lightrft.errors import LawError
from lightrft.strategy.background import background_saves
from lightrft.strategy.protocols import BackgroundSaves
from lightrft.strategy.protocols.collectives import Collectives, TensorTree
from lightrft.strategy.record import Strategy
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import (
    Loaded,
    loaded,
    on_first_rank,
    require_loaded,
    started,
    tiny,
)
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.laws.checkpoint.runs import (
    RunCase,
    Trace,
    begin,
    continue_data,
    data_state,
    load,
    require_equal_traces,
    run_cases,
    save,
    trace,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_Tree = TypeVar("_Tree", bound=TensorTree)

_SOON = 0.1
"""Seconds after which the background may copy.

What changes the state meanwhile must wait, however long; only what does not wait, and is wrong, is found by the time.
"""


def _held_copying(background: BackgroundSaves, gate: threading.Event) -> BackgroundSaves:
    """Return the handle, its saves held before they copy anything."""

    def start(save: Callable[[], None], /) -> None:
        def wait_and_save() -> None:
            gate.wait()
            save()

        background.start(wait_and_save)

    return attrs.evolve(background, start=start)


def _held_writing(background: BackgroundSaves, gate: threading.Event) -> BackgroundSaves:
    """Return the handle, its saves held after they have copied, where ranks meet."""
    inner = background.collectives

    def all_gather(data: _Tree) -> _Tree:
        gate.wait()
        return inner.all_gather(data)

    held: Collectives = attrs.evolve(inner, all_gather=all_gather)  # type: ignore[misc]  # of ours, a record
    return attrs.evolve(background, collectives=held)


@attrs.frozen(kw_only=True)
class SnapshotCase:
    """A run that is saved in the background and goes on before anything is written.

    Attributes:
        run: the run.
        before: micro-batches before it is saved, at any position of a window.
        after: micro-batches after it.
    """

    run: RunCase
    before: int
    after: int


@attrs.frozen(kw_only=True)
class Stretches:
    """What is seen of the same stretch: of a run that is never saved, of the saved one, and of the resumed one."""

    without: Trace
    saved: Trace
    resumed: Trace


@st.composite
def _snapshot_case(draw: DrawFn) -> SnapshotCase:
    run = draw(run_cases())
    return SnapshotCase(
        run=run,
        before=draw(st.integers(0, 2 * run.accumulation_steps + 1)),
        after=draw(st.integers(run.accumulation_steps, 2 * run.accumulation_steps + 1)),
    )


def _snapshot_cases(world_size: int, /) -> SearchStrategy[SnapshotCase]:
    del world_size
    return _snapshot_case()


def _snapshot(rank: Rank, case: SnapshotCase) -> Stretches:
    straight = begin(rank, case.run)
    trace(straight, case.before)
    without = trace(straight, case.after)
    live, gate = begin(rank, case.run), threading.Event()
    trace(live, case.before)
    state = data_state(live)
    with background_saves(live.strategy, apart=apart_of_simulated()) as background:
        try:
            held = _held_writing(background, gate)
            save(live, rank.directory / "run", step=1, client_state={"data": state}, background=held)
            saved = trace(live, case.after)
        finally:
            gate.set()
        live.strategy.barrier()
    fresh = begin(rank, case.run, seed=case.run.seed + 1)
    client_state = load(fresh, rank.directory / "run").client_state
    resumed = trace(continue_data(fresh, client_state["data"]), case.after)
    return Stretches(without=without, saved=saved, resumed=resumed)


def _snapshot_holds(harness: Harness, case: SnapshotCase) -> None:
    for rank, seen in enumerate(harness.run(_snapshot, case)):
        what = f"rank {rank}, saved in the background after {case.before} micro-batches"
        require_equal_traces(seen.saved, seen.without, f"{what}, going on")
        require_equal_traces(seen.resumed, seen.saved, f"{what}, resumed")


Change: TypeAlias = Literal["step", "average", "load_ckpt", "load_model", "offload"]
"""What changes a state that is saved."""


@attrs.frozen(kw_only=True)
class ChangeCase:
    """A state that is changed as soon as its save in the background has begun.

    Attributes:
        run: how it came about.
        change: what changes it.
    """

    run: RunCase
    change: Change


@attrs.frozen(kw_only=True)
class Twice:
    """What follows from the same state, saved at once and in the background."""

    at_once: Trace
    in_background: Trace


def _change_cases(world_size: int, /) -> SearchStrategy[ChangeCase]:
    del world_size
    several = run_cases().map(_of_several)
    return st.builds(ChangeCase, run=several, change=st.sampled_from(get_args(Change)))


def _of_several(case: RunCase) -> RunCase:
    return attrs.evolve(case, form="several")


def _changed(rank: Rank, case: ChangeCase) -> Twice:
    live, gate = begin(rank, case.run), threading.Event()
    strategy, directory = live.strategy, rank.directory
    # another state, which is loaded later
    save(live, directory / "other", step=1)
    strategy.save_model(live.trained["actor"].model, directory / "weights")
    trace(live, 2 * case.run.accumulation_steps)
    save(live, directory / "at once", step=1)
    changes: Mapping[Change, Callable[[], object]] = {
        "step": lambda: trace(live, case.run.accumulation_steps),
        "average": lambda: _average(live.strategy, live.trained["actor"].model, live.reference),
        "load_ckpt": lambda: load(live, directory / "other"),
        "load_model": lambda: strategy.load_model(live.trained["actor"].model, directory / "weights"),
        "offload": lambda: _move(strategy, live.trained["actor"].model),
    }
    with background_saves(strategy, apart=apart_of_simulated()) as background:
        save(live, directory / "in background", step=1, background=_held_copying(background, gate))
        soon = threading.Timer(_SOON, gate.set)
        soon.start()
        try:
            changes[case.change]()
        finally:
            soon.join()
        strategy.barrier()
    traces: list[Trace] = []
    for name in ("at once", "in background"):
        fresh = begin(rank, case.run, seed=case.run.seed + 1)
        load(fresh, directory / name)
        traces.append(trace(fresh, case.run.accumulation_steps))
    return Twice(at_once=traces[0], in_background=traces[1])


def _average(strategy: Strategy, model: nn.Module, average: nn.Module | None) -> None:
    if average is not None:
        strategy.moving_average(model, average, 0.5)


def _move(strategy: Strategy, model: nn.Module) -> None:
    strategy.offload(model)
    strategy.reload(model)


def _changed_holds(harness: Harness, case: ChangeCase) -> None:
    for rank, seen in enumerate(harness.run(_changed, case)):
        what = f"rank {rank}, saved in the background before {case.change}"
        require_equal_traces(seen.in_background, seen.at_once, what)


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
                path = strategy.save_ckpt(model, directory, step=lost, background=_held_writing(background, gate))
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
        id="checkpoint.background_snapshot",
        statement="A run that is saved in the background goes on as one that is not, and what is loaded is the run at "
        "the call, bit for bit, whatever was trained before it was written.",
        check=for_all(_snapshot_cases, _snapshot_holds),
    ),
    Law(
        id="checkpoint.background_waits",
        statement="A step, an average, a load and a move that come right after a save in the background has begun do "
        "not change what it saves.",
        check=for_all(_change_cases, _changed_holds),
    ),
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
