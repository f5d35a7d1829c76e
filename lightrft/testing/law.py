"""Laws as plain data, and how one is held against examples."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar, cast, get_type_hints

import attrs
import hypothesis
from hypothesis.strategies import SearchStrategy

from lightrft.errors import LawError
from lightrft.strategy.protocols import Capabilities
from lightrft.testing.plain import from_json, to_json
from lightrft.testing.ranks.watchdog import StuckError
from lightrft.testing.subject import Program, RunOnRanks, Subject

__all__ = ["Cases", "Check", "Harness", "Holds", "Law", "Worlds", "for_all", "on_each_rank"]

Worlds: TypeAlias = Literal["one", "every", "several"]
"""World sizes at which a law says something: 1 alone, every one, or from 2 on."""

_Case = TypeVar("_Case")
_Evidence = TypeVar("_Evidence")
_Case_co = TypeVar("_Case_co", covariant=True)
_Case_contra = TypeVar("_Case_contra", contravariant=True)


@attrs.frozen(kw_only=True, eq=False)
class Harness:
    """What a law is held against, and how hard.

    Attributes:
        subject: the strategy and the engine.
        run: runs a program on every rank.
        world_size: how many ranks there are.
        settings: how many examples are drawn, and how.
        seed: of the drawing; equal seeds draw equal examples.
        example: JSON of the one example to look at; None draws.
    """

    subject: Subject
    run: RunOnRanks
    world_size: int
    settings: hypothesis.settings
    seed: int
    example: str | None


class Check(Protocol):
    """Holds a law against a subject."""

    def __call__(self, harness: Harness, /) -> None:
        """Return if the law holds.

        Args:
            harness: what to hold it against.

        Raises:
            AssertionError: it does not; the message says what was seen and what must be.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Law:
    """One sentence that every strategy, or every engine, obeys.

    Attributes:
        id: section and name, such as "step.accumulation".
        statement: the law in words.
        requires: capabilities without which it says nothing.
        check: holds it against a subject.
        worlds: world sizes at which it says something.
    """

    id: str
    statement: str
    requires: Capabilities = frozenset()
    check: Check
    worlds: Worlds = "every"


class Cases(Protocol[_Case_co]):
    """Makes the hypothesis strategy that draws a law's cases."""

    def __call__(self, world_size: int, /) -> SearchStrategy[_Case_co]:
        """Return the strategy.

        Args:
            world_size: number of ranks that the case is for.
        """
        ...


class Holds(Protocol[_Case_contra]):
    """Holds a law against one case."""

    def __call__(self, harness: Harness, case: _Case_contra, /) -> None:
        """Return if the law holds for the case.

        Args:
            harness: what runs programs on the ranks.
            case: plain data.

        Raises:
            AssertionError: it does not.
        """
        ...


def for_all(cases: Cases[_Case], holds: Holds[_Case]) -> Check:
    """Return the check that draws cases in this process and looks for one for which the law does not hold.

    What is found is made as small as it gets, and carries a note with the case as JSON, which `Harness.example` takes.

    Args:
        cases: what is drawn; frozen records of plain data.
        holds: the law for one case; its second parameter is annotated with the type of the case.
    """

    def check(harness: Harness) -> None:
        kind = _type_of_case(holds)
        if harness.example is not None:
            holds(harness, from_json(harness.example, kind))
            return

        @hypothesis.seed(harness.seed)
        @hypothesis.settings(harness.settings)
        @hypothesis.given(cases(harness.world_size))
        def holds_for(case: _Case) -> None:
            with _noted(case, kind):
                holds(harness, case)

        holds_for()

    return check


def on_each_rank(holds: Holds[_Case]) -> Holds[_Case]:
    """Return a law about one rank, held against each of several that run its programs at once.

    Args:
        holds: the law for one rank; what runs its programs gives it the evidence of that rank alone.
    """

    @functools.wraps(holds)
    def holds_for_each(harness: Harness, case: _Case, /) -> None:
        seen: list[tuple[object, object, Sequence[object]]] = []
        for rank in range(harness.world_size):
            try:
                holds(attrs.evolve(harness, run=_run_of_rank(harness.run, rank, seen)), case)
            except LawError as error:
                error.add_note(f"on rank {rank}")
                raise

    return holds_for_each


def _run_of_rank(run: RunOnRanks, rank: int, seen: list[tuple[object, object, Sequence[object]]]) -> RunOnRanks:
    """Return what gives the evidence of one rank; a program that all have run with a case is not run again."""

    def run_once(program: Program[_Case, _Evidence], case: _Case) -> list[_Evidence]:
        for known, of, evidence in seen:
            if known is program and of == case:
                return [cast("_Evidence", evidence[rank])]
        every = run(program, case)
        seen.append((program, case, every))
        return [every[rank]]

    return run_once


def _type_of_case(holds: Holds[_Case]) -> type[_Case]:
    hints = get_type_hints(holds)
    hints.pop("return", None)
    found: type[_Case] = list(hints.values())[1]
    return found


@contextlib.contextmanager
def _noted(case: _Case, kind: type[_Case]) -> Generator[None]:
    try:
        yield
    except (Exception, StuckError) as error:
        error.add_note(f"example: {to_json(case, kind)}")
        raise
