"""Laws of the gradient's norm: it is global, it is bounded, and where it is not finite nobody steps."""

from __future__ import annotations

import math

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from lightrft.errors import LawError
from lightrft.testing.cases.batches import FAULTS, Fault, Window, is_power_of_two
from lightrft.testing.cases.runs import RunCase, RunEvidence, WindowEvidence, create_optimizer_of, run_cases, train
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close_run, require_exact_run, require_same, require_same_run
from lightrft.testing.reference.training import exact_run

__all__ = ["LAWS"]

_SMALL, _FIRST = 2.0**-5, 2.0**-2  # exact factors


@attrs.frozen(kw_only=True)
class _ClippedCase:
    """A training, and its bound.

    Attributes:
        run: the training.
        bound: beside the norm of the first gradient; 0 means no bound, and None one between the norm of the first
            gradient and the largest one.
    """

    run: RunCase
    bound: float | None


@st.composite
def _clipped_cases(draw: DrawFn, world_size: int) -> _ClippedCase:
    # several windows, because the first step of many optimizers does not depend on the size of a gradient
    cases = run_cases(
        world_size=world_size,
        exact=True,
        min_windows=2,
        max_windows=4,
        micro_batches=(2, 1, 2),
        weight_decays=(0.25, 0.0, 0.25),
    )
    run, bound = draw(cases), draw(st.sampled_from([0.25, 0.0, None, 0.25, 2.0, None, 0.0]))
    return _ClippedCase(run=_growing(run) if bound is None else run, bound=bound)


def _growing(case: RunCase) -> RunCase:
    # optimizers forget the size of gradients of which each is clipped, so the first one is not; all of them are
    # small, so that what is wrongly added to a norm shows
    windows = [_weighted(window, _SMALL * (1 if number else _FIRST)) for number, window in enumerate(case.windows)]
    return attrs.evolve(case, windows=tuple(windows))


def _weighted(window: Window, factor: float) -> Window:
    weight = factor / sum(map(len, window.ranks))
    ranks = tuple(tuple(attrs.evolve(batch, weight=weight) for batch in batches) for batches in window.ranks)
    return Window(ranks=ranks)


def _bound(case: _ClippedCase, norms: list[float]) -> float:
    first, largest = norms[0], max(norms)
    if case.bound is not None:
        return case.bound * first
    return math.sqrt(first * largest) if 0 < first < largest else first


def _clipping_holds(harness: Harness, case: _ClippedCase) -> None:
    create_optimizer = create_optimizer_of(harness, case.run)
    norms = [step.grad_norm for step in exact_run(case.run, create_optimizer)]
    run = attrs.evolve(case.run, max_norm=_bound(case, norms))
    seen = harness.run(train, run)
    require_close_run(seen, run, create_optimizer)
    _require_one_norm(seen)
    is_clipped = any(0 < run.max_norm < norm * (1 + 1e-5) for norm in norms)
    if not is_clipped and is_power_of_two(harness.world_size):  # a gradient inside of the bound is left alone
        require_exact_run(seen, run, create_optimizer)


def _require_one_norm(seen: list[RunEvidence]) -> None:
    for number in range(len(seen[0].windows)):
        norms = [evidence.windows[number].results[-1].grad_norm for evidence in seen]
        if len(set(norms)) != 1:
            raise LawError(f"window {number + 1}: grad_norm by rank is {norms} and must be the same on all ranks.")


@attrs.frozen(kw_only=True)
class _FaultyCase:
    """A training, and what goes wrong in a window that comes between two of it.

    Attributes:
        run: the training without the faulty window.
        at: number of the window before which the faulty one comes.
        fault: what is wrong.
        rank: where it is wrong.
        micro_batch: number of the micro-batch that is wrong there.
    """

    run: RunCase
    at: int
    fault: Fault
    rank: int
    micro_batch: int


@st.composite
def _faulty_cases(draw: DrawFn, world_size: int) -> _FaultyCase:
    run = draw(run_cases(world_size=world_size, exact=False, max_windows=2, micro_batches=(1, 2), max_norms=(0.5, 0.0)))
    return _FaultyCase(
        run=run,
        at=draw(st.integers(0, len(run.windows) - 1)),
        fault=draw(st.sampled_from(FAULTS)),
        rank=draw(st.integers(0, world_size - 1)),
        micro_batch=draw(st.integers(0, run.micro_batches - 1)),
    )


def _with_fault(case: _FaultyCase) -> RunCase:
    windows = case.run.windows
    ranks = [list(batches) for batches in windows[case.at].ranks]
    batch = ranks[case.rank][case.micro_batch]
    ranks[case.rank][case.micro_batch] = attrs.evolve(batch, fault=case.fault)
    faulty = Window(ranks=tuple(tuple(batches) for batches in ranks), is_counted=True)
    return attrs.evolve(case.run, windows=(*windows[: case.at], faulty, *windows[case.at :]))


def _non_finite_holds(harness: Harness, case: _FaultyCase) -> None:
    seen, must = harness.run(train, _with_fault(case)), harness.run(train, case.run)
    for rank, (with_fault, without) in enumerate(zip(seen, must, strict=True)):
        where = f"rank {rank}, with {case.fault} on rank {case.rank}"
        rest = list(with_fault.windows)
        skipped = rest.pop(case.at)
        before = rest[case.at - 1].tensors if case.at else with_fault.before
        _require_skipped(skipped, where)
        require_same(skipped.tensors, before, f"{where}, after the skipped step")
        require_same_run(attrs.evolve(with_fault, windows=rest), without, f"{where}, the windows around it")


def _require_skipped(window: WindowEvidence, where: str) -> None:
    result = window.results[-1]
    is_said = bool(result.skipped_reason) and result.grad_norm is not None and not math.isfinite(result.grad_norm)
    if result.stepped or not is_said:
        raise LawError(f"{where}: the result is {result} and must say that the step was skipped, why, and the norm.")


LAWS: tuple[Law, ...] = (
    Law(
        id="step.clipping",
        statement="grad_norm is the L2 norm of the whole gradient before clipping, the same on all ranks; a gradient "
        "beyond max_norm is scaled down to it, any other one is left alone, and max_norm=0 is no bound.",
        check=for_all(_clipped_cases, _clipping_holds),
    ),
    Law(
        id="step.non_finite",
        statement="A loss or gradient that is not finite on any one rank skips the step on all of them, is reported, "
        "and leaves no trace: parameters, optimizer, schedule and the next window are as if it had not been.",
        check=for_all(_faulty_cases, _non_finite_holds),
    ),
)
"""The laws."""
