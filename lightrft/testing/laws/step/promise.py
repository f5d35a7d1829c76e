"""Laws of what backward is told about the end of its window: it changes no step, and the step is held to it."""

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
    constant_gradient_models,
    create_optimizer_of,
    forward_backward,
    settings_of,
    start,
    tensors_of,
    window_seen,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close_run, require_exact_run, require_same
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_MOST = 4
"""Micro-batches of the longest window."""


@attrs.frozen(kw_only=True)
class _PromisedCase:
    """A training, and what is said in it.

    Attributes:
        run: the training.
        is_promised: by the place of a micro-batch in its window, whether backward is told if more follow.
        is_contradicted: by the same place, whether a step that contradicts what was told comes before the right one.
        is_counted_out: whether the contradiction is left to the count, where the count makes one.
    """

    run: RunCase
    is_promised: tuple[bool, ...]
    is_contradicted: tuple[bool, ...]
    is_counted_out: bool


@attrs.frozen(kw_only=True, eq=False)
class _Contradiction:
    """What was done against a promise, what came of it, and the tensors after it."""

    call: str
    outcome: str
    tensors: dict[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class _PromisedRun:
    run: RunEvidence
    contradictions: list[list[_Contradiction]]


@st.composite
def _promised_cases(draw: DrawFn, world_size: int) -> _PromisedCase:
    model, counted = draw(constant_gradient_models()), draw(st.sampled_from([2, 1, _MOST]))
    lengths = draw(st.lists(st.sampled_from([None, 2, _MOST, None, 1]), min_size=1, max_size=3))
    windows = [
        equal_windows(
            vocabulary=model.vocabulary,
            world_size=world_size,
            micro_batches=length or counted,
            size=1,
            is_weighted=length is not None,
        )
        for length in lengths
    ]
    flags = st.lists(st.sampled_from([True, True, False]), min_size=_MOST, max_size=_MOST).map(tuple)
    return _PromisedCase(
        run=RunCase(
            model=model,
            weight_decay=draw(st.sampled_from([0.0, 0.25])),
            is_halved=draw(st.booleans()),
            micro_batches=counted,
            windows=tuple(draw(window) for window in windows),
        ),
        is_promised=draw(flags),
        is_contradicted=draw(flags),
        is_counted_out=draw(st.sampled_from([True, True, False])),
    )


def _train_promised(rank: Rank, case: _PromisedCase) -> _PromisedRun:
    strategy = rank.build(settings_of(rank.config, case.run, rank.world_size))
    trainable = start(strategy, case.run)
    seen = _PromisedRun(run=RunEvidence(before=tensors_of(strategy, trainable.model), windows=[]), contradictions=[])
    for window in case.run.windows:
        _train_window(strategy, trainable, case, window, rank=rank.rank, seen=seen)
    return seen


def _train_window(
    strategy: Strategy, trainable: Trainable, case: _PromisedCase, window: Window, *, rank: int, seen: _PromisedRun
) -> None:
    model, optimizer, scheduler = trainable
    batches, steps = window.ranks[rank], list[tuple[float, StepResult]]()
    contradictions: list[_Contradiction] = []
    for place, batch in enumerate(batches):
        is_last = place + 1 == len(batches)
        promise = is_last if case.is_promised[place] else None
        loss = forward_backward(strategy, trainable, batch, case.run.loss, is_boundary=promise)
        if promise is not None and case.is_contradicted[place]:
            is_counted_out = case.is_counted_out and (place + 1 >= case.run.micro_batches) != is_last
            contradictions.append(
                _contradicted(strategy, trainable, promise=promise, said=None if is_counted_out else not is_last)
            )
        said = None if window.is_counted else is_last
        steps.append((loss, strategy.optimizer_step(optimizer, model, scheduler, is_boundary=said)))
    seen.run.windows.append(window_seen(strategy, trainable, steps))
    seen.contradictions.append(contradictions)


def _contradicted(strategy: Strategy, trainable: Trainable, *, promise: bool, said: bool | None) -> _Contradiction:
    model, optimizer, scheduler = trainable
    try:
        outcome = repr(strategy.optimizer_step(optimizer, model, scheduler, is_boundary=said))
    except StepError:
        outcome = "StepError"
    return _Contradiction(
        call=f"optimizer_step with is_boundary={said} after backward with is_boundary={promise}",
        outcome=outcome,
        tensors=tensors_of(strategy, model),
    )


def _promise_holds(harness: Harness, case: _PromisedCase) -> None:
    seen = harness.run(_train_promised, case)
    for rank, evidence in enumerate(seen):
        befores = [evidence.run.before, *(window.tensors for window in evidence.run.windows)]
        for number, contradictions in enumerate(evidence.contradictions):
            where = f"rank {rank}, window {number + 1}"
            for one in contradictions:
                if one.outcome != "StepError":
                    raise LawError(f"{where}: {one.call} is {one.outcome} and must be StepError.")
                require_same(one.tensors, befores[number], f"{where}, after {one.call}")
    # the loop of raw torch knows of no promises
    compare = require_exact_run if is_power_of_two(harness.world_size) else require_close_run
    compare([evidence.run for evidence in seen], case.run, create_optimizer_of(harness, case.run))


LAWS: tuple[Law, ...] = (
    Law(
        id="step.promise",
        statement="Whether backward is told that more micro-batches of the window follow, or that none does, changes "
        "no step. A step that contradicts it, by is_boundary or by count, is an error that changes nothing; the right "
        "one may follow.",
        check=for_all(_promised_cases, _promise_holds),
    ),
)
"""The laws."""
