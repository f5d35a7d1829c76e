"""Laws of when things move: inside an accumulation window nothing, at its end everything once."""

from __future__ import annotations

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from lightrft.errors import LawError, StepError
from lightrft.strategy.protocols import StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.batches import Window, equal_windows, is_power_of_two
from lightrft.testing.cases.runs import (
    RunCase,
    RunEvidence,
    WindowEvidence,
    constant_gradient_models,
    create_optimizer_of,
    forward_backward,
    settings_of,
    start,
    tensors_of,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close_run, require_exact_run, require_same
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class _WatchedCase:
    """A training, and how its windows are passed through.

    Attributes:
        run: the training.
        is_early: whether each micro-batch begins with a call of `optimizer_step` that has no gradient.
        ends_by_count: whether windows that are said to go on, as long as a counted one or longer, end by the count.
    """

    run: RunCase
    is_early: tuple[bool, ...]
    ends_by_count: bool


@attrs.frozen(kw_only=True, eq=False)
class _Moment:
    """What was just called, and the tensors after it."""

    called: str
    tensors: dict[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class _WatchedWindow:
    """A window, with the moments before its last `optimizer_step`, and what early calls did."""

    seen: WindowEvidence
    moments: list[_Moment]
    early: list[str]


@attrs.frozen(kw_only=True, eq=False)
class _WatchedRun:
    before: dict[str, Tensor]
    windows: list[_WatchedWindow]


@st.composite
def _watched_cases(draw: DrawFn, world_size: int) -> _WatchedCase:
    model, counted = draw(constant_gradient_models()), draw(st.sampled_from([1, 2, 1, 4]))
    lengths = draw(st.lists(st.sampled_from([None, 4, 2, 1]), min_size=2, max_size=3))
    windows = tuple(
        draw(
            equal_windows(
                vocabulary=model.vocabulary,
                world_size=world_size,
                micro_batches=length or counted,
                size=1,
                is_weighted=length is not None,
            )
        )
        for length in lengths
    )
    return _WatchedCase(
        run=RunCase(
            model=model,
            weight_decay=draw(st.sampled_from([0.0, 0.25])),
            is_halved=draw(st.booleans()),
            micro_batches=counted,
            windows=windows,
        ),
        is_early=tuple(draw(st.lists(st.booleans(), min_size=4, max_size=4))),
        ends_by_count=draw(st.sampled_from([True, True, False])),
    )


def _watch(rank: Rank, case: _WatchedCase) -> _WatchedRun:
    strategy = rank.build(settings_of(rank.config, case.run, rank.world_size))
    trainable = start(strategy, case.run)
    return _WatchedRun(
        before=tensors_of(strategy, trainable.model),
        windows=[
            _watched(strategy, trainable, case, number=number, rank=rank.rank)
            for number in range(len(case.run.windows))
        ],
    )


def _watched(strategy: Strategy, trainable: Trainable, case: _WatchedCase, *, number: int, rank: int) -> _WatchedWindow:
    window = case.run.windows[number]
    batches = window.ranks[rank]
    losses: list[float] = []
    results: list[StepResult] = []
    moments: list[_Moment] = []
    early: list[str] = []

    def note(called: str) -> None:
        moments.append(_Moment(called=called, tensors=tensors_of(strategy, trainable.model)))

    for place, batch in enumerate(batches, start=1):
        if case.is_early[place - 1]:
            early.append(_called_early(strategy, trainable))
            note("an optimizer_step without backward")
        losses.append(forward_backward(strategy, trainable, batch, case.run.loss))
        note(f"backward {place} of {len(batches)}")
        is_boundary = _is_boundary(case, window, place, len(batches))
        results.append(
            strategy.optimizer_step(trainable.optimizer, trainable.model, trainable.scheduler, is_boundary=is_boundary)
        )
        note(f"optimizer_step {place} of {len(batches)}")
    *inside, last = moments
    return _WatchedWindow(
        seen=WindowEvidence(losses=losses, results=results, tensors=last.tensors), moments=inside, early=early
    )


def _is_boundary(case: _WatchedCase, window: Window, place: int, number: int) -> bool | None:
    is_last = place == number
    if window.is_counted or (is_last and case.ends_by_count and number >= case.run.micro_batches):
        return None
    return is_last


def _called_early(strategy: Strategy, trainable: Trainable) -> str:
    try:
        result = strategy.optimizer_step(trainable.optimizer, trainable.model, trainable.scheduler)
    except StepError:
        return "StepError"
    return repr(result)


def _window_holds(harness: Harness, case: _WatchedCase) -> None:
    seen = harness.run(_watch, case)
    for rank, run in enumerate(seen):
        before = run.before
        for number, window in enumerate(run.windows, start=1):
            where = f"rank {rank}, window {number}"
            for moment in window.moments:
                require_same(moment.tensors, before, f"{where}, after {moment.called}")
            for called in window.early:
                if called != "StepError":
                    raise LawError(f"{where}: optimizer_step without backward is {called} and must be StepError.")
            before = window.seen.tensors
    compare = require_exact_run if is_power_of_two(harness.world_size) else require_close_run
    runs = [RunEvidence(before=run.before, windows=[window.seen for window in run.windows]) for run in seen]
    compare(runs, case.run, create_optimizer_of(harness, case.run))


LAWS: tuple[Law, ...] = (
    Law(
        id="step.window",
        statement="Before a window is complete, by count or by is_boundary, no parameter, buffer or learning rate "
        "changes by a bit; then all step exactly once, and the next window begins with nothing. A step without "
        "backward is an error that changes nothing.",
        check=for_all(_watched_cases, _window_holds),
    ),
)
"""The laws."""
