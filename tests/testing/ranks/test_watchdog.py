"""A program that waits for ever is ended, wherever it runs, and the failure says where it was."""

from __future__ import annotations

import signal
import time

import attrs
import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.backends.collectives.simulated import run_simulated
from lightrft.testing.conformance.hold import hold_law
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.ranks.here import run_here
from lightrft.testing.ranks.watchdog import StuckError, watched
from lightrft.testing.subject import Rank, subject_of

LONG = 1000.0


def wait_for_ever() -> None:
    time.sleep(LONG)


def test_a_wait_is_ended_and_its_place_named() -> None:
    """What takes longer than it may ends with the function, file and line that it was in."""
    with (
        pytest.raises(StuckError, match=r"after 0.2 seconds: rank 0 is in wait_for_ever \(.*test_watchdog.py:\d+\)"),
        watched(0.2),
    ):
        wait_for_ever()


def test_simulated_ranks_are_named_one_by_one() -> None:
    """Of several ranks in this process each one's place is named, and the caller goes on."""

    def program(rank: int) -> None:
        if rank == 1:
            time.sleep(6.0)  # longer than the watchdog and the patience with interrupted ranks

    with pytest.raises(StuckError) as caught, watched(0.3):
        run_simulated(2, program)
    assert "rank 1 is in program" in str(caught.value)


def test_what_ends_in_time_is_left_alone() -> None:
    """No alarm is left, and one that somebody else had set still comes."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with watched(LONG):
            time.sleep(0.01)
        assert rung == []
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        time.sleep(0.3)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@attrs.frozen(kw_only=True)
class Case:
    """A number."""

    number: int


def cases(world_size: int) -> SearchStrategy[Case]:
    del world_size
    return st.builds(Case, number=st.integers(0, 100))


def wait_if_large(rank: Rank, case: Case) -> int:
    del rank
    with watched(0.2):
        if case.number > 10:
            wait_for_ever()
    return case.number


def runs(harness: Harness, case: Case) -> None:
    harness.run(wait_if_large, case)


def test_a_law_that_waits_is_broken_at_once() -> None:
    """The first case that waits is the one that is shown: nobody waits again to make it smaller."""
    subject = subject_of("single", "strategy")
    settings = hypothesis.settings(max_examples=50, database=None, deadline=None)
    harness = Harness(subject=subject, run=run_here(subject), world_size=1, settings=settings, seed=0, example=None)
    law = Law(id="life.waits", statement="It ends.", check=for_all(cases, runs))
    start = time.monotonic()
    finding = hold_law(law, harness, claims=frozenset())
    assert finding.outcome == "broken"
    assert "is in wait_for_ever" in finding.message
    assert finding.example is not None
    assert '"number": ' in finding.example
    assert time.monotonic() - start < 10
