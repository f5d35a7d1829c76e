"""Laws: a save in the background is the save of that moment, whatever is done before it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, get_args

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn

from lightrft.backends.collectives.simulated import apart_of_simulated
from lightrft.strategy.background import background_saves
from lightrft.strategy.record import Strategy
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.held import held_copying, held_writing
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

_SOON = 0.1
"""Seconds after which the background may copy.

What changes the state meanwhile must wait, however long; only what does not wait, and is wrong, is found by the time.
"""


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
            held = held_writing(background, gate)
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
        save(live, directory / "in background", step=1, background=held_copying(background, gate))
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
)
"""The laws of this module."""
