"""Ranks that do not agree on a collective get an error that names the odd one and the difference."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, TypeAlias, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from lightrft.errors import CollectiveError, ConfigError, LawError
from lightrft.strategy.protocols.collectives import ReduceOp, TensorTree
from lightrft.strategy.record import Strategy
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

Function: TypeAlias = Literal["all_reduce", "all_gather", "broadcast"]
Difference: TypeAlias = Literal[
    "skipped",
    "swapped",
    "extra",
    "ended",
    "other function",
    "key",
    "dtype",
    "shape",
    "number",
    "op",
    "src",
    "unknown op",
    "unknown src",
    "bad leaf",
]

_OTHER: dict[Function, Function] = {"all_reduce": "all_gather", "all_gather": "broadcast", "broadcast": "all_reduce"}


@attrs.frozen(kw_only=True)
class DisagreementCase:
    """What all ranks but one do, and how that one differs.

    Attributes:
        function: the first collective; an `all_reduce`, `all_gather` or `broadcast`.
        difference: what the odd rank does otherwise.
        odd: its number.
        key: where the value stands that differs.
        size: elements of that value.
        calls_before: collectives before, on which all agree.
    """

    function: Function
    difference: Difference
    odd: int
    key: str
    size: int
    calls_before: int


@attrs.frozen(kw_only=True)
class Outcome:
    """How the calls of a rank ended.

    Attributes:
        num_results: collectives that returned, after those on which all agree.
        message: of the error; empty if there was none.
    """

    num_results: int
    message: str


_Step: TypeAlias = Callable[[], object]


def _outcome(rank: Rank, case: DisagreementCase) -> Outcome:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    for _ in range(case.calls_before):
        strategy.all_reduce(1.0)
    steps = _steps(strategy, case, is_odd=rank.rank == case.odd)
    num_results = 0
    try:
        for step in steps:
            step()
            num_results += 1
    except (CollectiveError, ConfigError) as error:  # whoever passes nonsense alone may be told that
        return Outcome(num_results=num_results, message=str(error))
    return Outcome(num_results=num_results, message="")


def _steps(strategy: Strategy, case: DisagreementCase, *, is_odd: bool) -> list[_Step]:
    """Return the calls of a rank: the function of the case, then one that no case takes for another."""

    def first() -> object:
        return _call(strategy, case.function, case, is_odd=is_odd)

    def other() -> object:
        return _call(strategy, _OTHER[case.function], case, is_odd=is_odd)

    usual: list[_Step] = [first, strategy.barrier]
    if not is_odd:
        return usual
    odd: dict[str, list[_Step]] = {
        "skipped": [strategy.barrier],
        "swapped": [strategy.barrier, first],
        "extra": [strategy.barrier, first, strategy.barrier],
        "ended": [],
        "other function": [other, strategy.barrier],
    }
    return odd.get(case.difference, usual)


def _call(strategy: Strategy, function: Function, case: DisagreementCase, *, is_odd: bool) -> TensorTree:
    difference = case.difference if is_odd else None
    data = _data(case, difference)
    if function == "all_gather":
        return strategy.all_gather(data)
    if function == "broadcast":
        return strategy.broadcast(data, src={"src": 1, "unknown src": 9}.get(difference or "", 0))
    op = {"op": "max", "unknown op": "summ"}.get(difference or "", "sum")
    return strategy.all_reduce(data, cast("ReduceOp", op))


def _data(case: DisagreementCase, difference: Difference | None) -> dict[str, TensorTree]:
    dtype = torch.float64 if difference == "dtype" else torch.float32
    # two columns, because dim 0 is free in all_gather
    value = torch.ones((case.size, 3 if difference == "shape" else 2), dtype=dtype)
    key = f"{case.key}_other" if difference == "key" else case.key
    others: dict[str, TensorTree] = {"number": 1.0, "bad leaf": cast("TensorTree", "text")}
    return {"before": torch.ones(2), key: others.get(difference or "", value)}


_NONSENSE: tuple[Difference, ...] = ("unknown op", "unknown src", "bad leaf")


@st.composite
def _cases(draw: DrawFn, world_size: int) -> DisagreementCase:
    function: Function = draw(st.sampled_from(tuple(_OTHER)))
    differences: list[Difference] = [
        "skipped", "swapped", "extra", "ended", "other function", "key", "dtype", "shape", "number", "bad leaf",
    ]  # fmt: skip
    own: dict[Function, list[Difference]] = {
        "all_reduce": ["op", "unknown op"],
        "all_gather": [],
        "broadcast": ["src", "unknown src"],
    }
    return DisagreementCase(
        function=function,
        difference=draw(st.sampled_from([*own[function], *differences])),
        odd=draw(st.integers(0, world_size - 1)),
        key=draw(st.sampled_from(["loss", "num_tokens", "grad.norm"])),
        size=draw(st.integers(1, 3)),
        calls_before=draw(st.integers(0, 2)),
    )


def _is_told(harness: Harness, case: DisagreementCase) -> None:
    where = f"rank {case.odd} of {harness.world_size} differs ({case.difference}) in {case.function}"
    clues_of: dict[str, list[str]] = {
        "key": [case.key],
        "dtype": ["float64"],
        "shape": [case.key],
        "number": [case.key],
        "op": ["max"],
        "src": ["src"],
        "unknown op": ["summ"],
        "unknown src": ["src"],
        "bad leaf": [case.key],
        "other function": [_OTHER[case.function]],
        "ended": [case.function],
    }
    clues = clues_of.get(case.difference, ["barrier"])
    # of two ranks, nobody can say which one is odd
    named = rf"rank {case.odd}\b" if harness.world_size > 2 else r"rank [01]\b"
    for rank, outcome in enumerate(harness.run(_outcome, case)):
        if case.difference == "ended" and rank == case.odd:
            continue
        if outcome.num_results or not outcome.message:
            raise LawError(
                f"{where}: rank {rank} got {outcome.num_results} results and the error {outcome.message!r}; every rank "
                "must get a CollectiveError, and none a value."
            )
        is_told = rank == case.odd and case.difference in _NONSENSE  # may be told before it meets the others
        if not (is_told or re.search(named, outcome.message)) or not any(clue in outcome.message for clue in clues):
            raise LawError(
                f"{where}: on rank {rank} the error is {outcome.message!r}, which must name the odd rank and {clues}."
            )


LAWS: tuple[Law, ...] = (
    Law(
        id="collectives.disagreement",
        statement="Ranks in different calls, or with different keys, shapes, dtypes or options, all get an error that "
        "names the odd rank and the difference: no value, and no waiting for ever.",
        check=for_all(_cases, _is_told),
        worlds="several",
    ),
)
"""Laws of the section "collectives" about ranks that do not agree."""
