"""Transforms of a strategy: they add what they say, and change nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import LawError, StepError
from lightrft.strategy.calls import Call
from lightrft.strategy.compose import (
    FaultPlan,
    Timing,
    Transform,
    compose,
    identity,
    with_ema,
    with_faults,
    with_finite_check,
    with_logging,
    with_recording,
    with_timing,
)
from lightrft.strategy.record import FUNCTIONS, Strategy
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.cases.small_run import (
    SmallRunCase,
    SmallRunEvidence,
    run_difference,
    small_run,
    small_run_cases,
    small_run_config,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.signatures import signature_differences_of_record
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

TransformName: TypeAlias = Literal["ema", "faults", "finite_check", "identity", "logging", "recording", "timing"]
"""A transform of `lightrft.strategy.compose`."""

_NAMES: tuple[TransformName, ...] = ("ema", "faults", "finite_check", "identity", "logging", "recording", "timing")
# what each of these touches, one function, and no two the same
_NARROW: tuple[TransformName, ...] = ("ema", "faults", "finite_check")


@attrs.frozen(kw_only=True)
class ComposeCase:
    """A run under transforms.

    Attributes:
        run: the run.
        names: the transforms, the first one innermost.
        cut: how many of them stand in the inner one of two composed transforms.
    """

    run: SmallRunCase
    names: tuple[TransformName, ...]
    cut: int


@attrs.frozen(kw_only=True)
class Counts:
    """What transforms wrote into their handles.

    Attributes:
        calls: names of the calls that were recorded.
        lines: names in the lines that were logged.
        timed: number of calls that were timed, by name.
        tried: calls of the function that never fails.
        average: first value of an average that no step moves.
    """

    calls: list[str]
    lines: list[str]
    timed: dict[str, int]
    tried: int
    average: float


@attrs.frozen(kw_only=True, eq=False)
class TwoRuns:
    """Runs of one strategy under transforms that are composed in two ways.

    Attributes:
        first: one run.
        second: the other.
        first_counts: what the transforms of the first wrote down.
        second_counts: those of the second.
        differences: of the second record from its contracts.
        changed: fields of the strategy itself that a transform changed.
    """

    first: SmallRunEvidence
    second: SmallRunEvidence
    first_counts: Counts
    second_counts: Counts
    differences: list[str]
    changed: list[str]


@attrs.frozen(kw_only=True, eq=False)
class _Handles:
    """What transforms write into, made anew for each run."""

    calls: list[Call] = attrs.field(factory=list[Call])
    lines: list[str] = attrs.field(factory=list[str])
    timings: dict[str, Timing] = attrs.field(factory=dict[str, Timing])
    plan: FaultPlan = attrs.field(factory=lambda: FaultPlan(at=-1, error=StepError("step=-1 never comes; go on.")))
    model: torch.nn.Module = attrs.field(factory=lambda: build_model(ModelCase()))
    average: torch.nn.Module = attrs.field(factory=lambda: build_model(ModelCase(seed=1)))


def _transform(name: TransformName, handles: _Handles) -> Transform:
    def transform(strategy: Strategy, /) -> Strategy:
        made: Mapping[TransformName, Callable[[], Strategy]] = MappingProxyType(
            {
                "ema": lambda: with_ema(strategy, handles.model, handles.average),
                "faults": lambda: with_faults(strategy, {"save_ckpt": handles.plan}),
                "finite_check": lambda: with_finite_check(strategy),
                "identity": lambda: identity(strategy),
                "logging": lambda: with_logging(strategy, handles.lines.append),
                "recording": lambda: with_recording(strategy, handles.calls),
                "timing": lambda: with_timing(strategy, handles.timings),
            }
        )
        return made[name]()

    return transform


def _counts(handles: _Handles) -> Counts:
    return Counts(
        calls=[call.name for call in handles.calls],
        lines=[line.partition("(")[0] for line in handles.lines],
        timed={name: timing.num_calls for name, timing in handles.timings.items()},
        tried=handles.plan.num_calls,
        average=next(handles.average.parameters()).flatten()[0].item(),
    )


_Order: TypeAlias = Callable[[list[Transform]], Transform]


def _two_runs(rank: Rank, case: ComposeCase, first: _Order, second: _Order) -> TwoRuns:
    strategy = rank.build(small_run_config(rank.config, case.run, rank.world_size))
    before = {name: getattr(strategy, name) for name in FUNCTIONS}
    records, runs, counts = list[Strategy](), list[SmallRunEvidence](), list[Counts]()
    for number, order in enumerate((first, second)):
        handles = _Handles()
        records.append(order([_transform(name, handles) for name in case.names])(strategy))
        runs.append(_run(records[-1], rank, case, rank.directory / str(number)))
        counts.append(_counts(handles))
    return TwoRuns(
        first=runs[0],
        second=runs[1],
        first_counts=counts[0],
        second_counts=counts[1],
        differences=signature_differences_of_record(records[1], Strategy),
        changed=[name for name, function in before.items() if getattr(strategy, name) is not function],
    )


def _run(strategy: Strategy, rank: Rank, case: ComposeCase, directory: Path) -> SmallRunEvidence:
    def pick() -> Strategy:
        return strategy

    seen = small_run(pick, rank, case.run, directory)
    strategy.teardown()  # so that the next run begins with the same streams
    return seen


def _all_in_one(transforms: list[Transform]) -> Transform:
    return compose(*transforms)


def _none(transforms: list[Transform]) -> Transform:
    del transforms
    return compose()


def _reversed(transforms: list[Transform]) -> Transform:
    return compose(*reversed(transforms))


def _with_none(rank: Rank, case: ComposeCase) -> TwoRuns:
    return _two_runs(rank, case, _none, _all_in_one)


def _in_groups(rank: Rank, case: ComposeCase) -> TwoRuns:
    def grouped(transforms: list[Transform]) -> Transform:
        return compose(compose(*transforms[: case.cut]), compose(*transforms[case.cut :]))

    return _two_runs(rank, case, _all_in_one, grouped)


def _in_reverse(rank: Rank, case: ComposeCase) -> TwoRuns:
    return _two_runs(rank, case, _all_in_one, _reversed)


def _seen_identity(rank: Rank, case: SmallRunCase) -> bool:
    strategy = rank.build(small_run_config(rank.config, case, rank.world_size))
    return identity(strategy) is strategy and compose()(strategy) is strategy


@st.composite
def _cases(draw: DrawFn, world_size: int) -> ComposeCase:
    del world_size
    names = tuple(draw(st.lists(st.sampled_from(_NAMES), max_size=4)))
    return ComposeCase(run=draw(small_run_cases()), names=names, cut=draw(st.integers(0, len(names))))


def _narrow_cases(world_size: int) -> SearchStrategy[ComposeCase]:
    del world_size
    names = st.permutations(_NARROW).map(tuple)
    return st.builds(ComposeCase, run=small_run_cases(), names=names, cut=st.just(0))


def _run_cases(world_size: int) -> SearchStrategy[SmallRunCase]:
    del world_size
    return small_run_cases()


def _is_identity(harness: Harness, case: SmallRunCase) -> None:
    for rank, is_same in enumerate(harness.run(_seen_identity, case)):
        if not is_same:
            raise LawError(f"identity and a compose of nothing gave another strategy on rank {rank}.")


def _change_nothing(harness: Harness, case: ComposeCase) -> None:
    for rank, runs in enumerate(harness.run(_with_none, case)):
        where = f"under {case.names} on rank {rank}"
        if runs.changed:
            raise LawError(f"{where} the strategy itself was changed in {runs.changed}.")
        if runs.differences:
            raise LawError(f"{where} the record is not what its contracts say: {'; '.join(runs.differences)}.")
        difference = run_difference(runs.second, runs.first)
        if difference is not None:
            raise LawError(f"{where} the run differs from that of the strategy alone: {difference}.")


def _associate(harness: Harness, case: ComposeCase) -> None:
    for rank, runs in enumerate(harness.run(_in_groups, case)):
        _require_same(runs, f"compose(compose(*{case.names[: case.cut]}), compose(*{case.names[case.cut :]}))", rank)


def _commute(harness: Harness, case: ComposeCase) -> None:
    for rank, runs in enumerate(harness.run(_in_reverse, case)):
        _require_same(runs, f"{case.names} in the reverse order", rank)


def _require_same(runs: TwoRuns, what: str, rank: int) -> None:
    difference = run_difference(runs.second, runs.first)
    if difference is not None:
        raise LawError(f"{what} differs on rank {rank} from one compose: {difference}.")
    if runs.second_counts != runs.first_counts:
        raise LawError(f"{what} counted {runs.second_counts} on rank {rank}, and one compose {runs.first_counts}.")


LAWS: tuple[Law, ...] = (
    Law(
        id="composition.identity",
        statement="The identity, and composing nothing, give the strategy itself.",
        check=for_all(_run_cases, _is_identity),
        worlds="one",
    ),
    Law(
        id="composition.transparent",
        statement="Transforms that only look on leave every bit of a run, every signature, and the strategy itself as "
        "they are.",
        check=for_all(_cases, _change_nothing),
    ),
    Law(
        id="composition.associative",
        statement="Composing transforms in groups is the same as composing them all.",
        check=for_all(_cases, _associate),
        worlds="one",
    ),
    Law(
        id="composition.commutes",
        statement="Transforms that touch different functions give the same in any order.",
        check=for_all(_narrow_cases, _commute),
        worlds="one",
    ),
)
"""Laws about transforms of a strategy."""
