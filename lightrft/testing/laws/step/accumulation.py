"""Laws of how micro-batches make one step, whatever their number, their sizes and the ranks that they are on."""

from __future__ import annotations

from itertools import chain

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.testing.cases.batches import (
    MicroBatch,
    Window,
    equal_windows,
    is_power_of_two,
    samples_of,
    uneven_windows,
)
from lightrft.testing.cases.models import model_cases
from lightrft.testing.cases.runs import (
    RunCase,
    RunEvidence,
    constant_gradient_models,
    create_optimizer_of,
    run_cases,
    train,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close_run, require_exact_run, require_same
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@st.composite
def _accumulations(draw: DrawFn, world_size: int) -> RunCase:
    case = draw(run_cases(world_size=world_size, exact=True, max_windows=2, micro_batches=(1, 2, 4, 8), sizes=(2, 1)))
    if draw(st.booleans()):
        return case
    windows = equal_windows(
        vocabulary=case.model.vocabulary,
        world_size=world_size,
        micro_batches=case.micro_batches,
        size=case.size,
        is_weighted=True,
    )
    return attrs.evolve(case, windows=tuple(draw(windows) for _ in case.windows))


def _accumulation_holds(harness: Harness, case: RunCase) -> None:
    _equals_one_batch(harness, case, is_exact=is_power_of_two(harness.world_size))


@st.composite
def _partitions(draw: DrawFn, world_size: int) -> RunCase:
    num_windows, is_exact = draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    model = draw(model_cases() if num_windows == 1 else constant_gradient_models())
    windows = uneven_windows(
        vocabulary=model.vocabulary,
        world_size=world_size,
        num_samples=8 if is_exact else draw(st.integers(world_size, 8)),
        exact=is_exact,
    )
    return RunCase(
        model=model,
        weight_decay=draw(st.sampled_from([0.0, 0.25])),
        is_halved=draw(st.booleans()),
        windows=tuple(draw(windows) for _ in range(num_windows)),
    )


def _partition_holds(harness: Harness, case: RunCase) -> None:
    batches = [batch for window in case.windows for batch in chain(*window.ranks)]
    totals = [sum(map(_num_weighted, chain(*window.ranks))) for window in case.windows]
    counts = [harness.world_size, *(len(batch.samples) for batch in batches), *totals]
    _equals_one_batch(harness, case, is_exact=all(map(is_power_of_two, counts)))


def _num_weighted(batch: MicroBatch) -> int:
    return len(batch.samples) if batch.weight else 0


def _equals_one_batch(harness: Harness, case: RunCase, *, is_exact: bool) -> None:
    create_optimizer = create_optimizer_of(harness, case)
    compare = require_exact_run if is_exact else require_close_run
    compare(harness.run(train, case), case, create_optimizer)


@st.composite
def _idle_micro_batches(draw: DrawFn, world_size: int) -> RunCase:
    return attrs.evolve(
        draw(_partitions(world_size)), loss=draw(st.sampled_from(["linear", "cross_entropy"])), max_norm=0.5
    )


def _with_idle_micro_batches(window: Window) -> Window:
    # at the beginning of every other rank and at the end of the rest; their samples are those of another rank
    idle = MicroBatch(samples=samples_of(window), weight=0.0)
    ranks = [(*batches, idle) if rank % 2 else (idle, *batches) for rank, batches in enumerate(window.ranks)]
    return attrs.evolve(window, ranks=tuple(ranks))


def _zero_weight_holds(harness: Harness, case: RunCase) -> None:
    idle = attrs.evolve(case, windows=tuple(_with_idle_micro_batches(window) for window in case.windows))
    seen = harness.run(train, idle)
    # the loop takes all samples of a window at once, those of weight 0 with a share of 0
    require_close_run(seen, idle, create_optimizer_of(harness, idle))
    if harness.world_size > 1:  # which micro-batches meet in a sum over ranks changes, and so does its rounding
        return
    for number, (window, must) in enumerate(zip(seen[0].windows, harness.run(train, case)[0].windows, strict=True)):
        require_same(window.tensors, must.tensors, f"window {number + 1}, with micro-batches of weight 0")


def _replicated(world_size: int) -> SearchStrategy[RunCase]:
    return run_cases(world_size=world_size, exact=False, max_norms=(0.0, 0.5))


def _train_apart(rank: Rank, case: RunCase) -> RunEvidence:
    # every rank comes with other values, which must not survive
    return train(rank, attrs.evolve(case, model=attrs.evolve(case.model, seed=case.model.seed + rank.rank)))


def _replicas_hold(harness: Harness, case: RunCase) -> None:
    first, *others = harness.run(_train_apart, case)
    for rank, evidence in enumerate(others, start=1):
        require_same(evidence.before, first.before, f"rank {rank} beside rank 0, prepared")
        for number, (seen, must) in enumerate(zip(evidence.windows, first.windows, strict=True), start=1):
            require_same(seen.tensors, must.tensors, f"rank {rank} beside rank 0, after window {number}")


LAWS: tuple[Law, ...] = (
    Law(
        id="step.accumulation",
        statement="k micro-batches of equal size, on each of n ranks, make the step of one batch of all their samples.",
        check=for_all(_accumulations, _accumulation_holds),
    ),
    Law(
        id="step.partition",
        statement="With weights that are shares of the window, any partition of its samples over micro-batches and "
        "ranks, in any order, makes the same step.",
        check=for_all(_partitions, _partition_holds),
    ),
    Law(
        id="step.zero_weight",
        statement="A micro-batch of weight 0 adds nothing to the step.",
        check=for_all(_idle_micro_batches, _zero_weight_holds),
    ),
    Law(
        id="step.replicas",
        statement="Once prepared, and after every step, all ranks have the same parameters and buffers, bit for bit.",
        check=for_all(_replicated, _replicas_hold),
        worlds="several",
    ),
)
"""The laws."""
