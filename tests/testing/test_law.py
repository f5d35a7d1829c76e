"""How a law is held against cases."""

from __future__ import annotations

# ruff: noqa: ARG001 (a law is handed the harness, wanted or not)
import attrs
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.errors import LawError
from lightrft.testing.law import Check, Harness, for_all, on_each_rank
from lightrft.testing.ranks.here import run_here
from lightrft.testing.subject import Program, Rank, subject_of


@attrs.frozen(kw_only=True)
class Numbers:
    """Two numbers."""

    low: int
    high: int


def numbers(world_size: int) -> SearchStrategy[Numbers]:
    return st.builds(Numbers, low=st.integers(0, 9), high=st.integers(10, 100 * world_size))


def harness(*, seed: int = 0, world_size: int = 1, example: str | None = None) -> Harness:
    subject = subject_of("single", "strategy")
    settings = hypothesis.settings(max_examples=50, database=None, deadline=None)
    return Harness(
        subject=subject, run=run_here(subject), world_size=world_size, settings=settings, seed=seed, example=example
    )


def collecting(seen: list[Numbers]) -> Check:
    def holds(harness: Harness, case: Numbers) -> None:
        seen.append(case)

    return for_all(numbers, holds)


def below_fifty(harness: Harness, case: Numbers) -> None:
    if case.high >= 50:
        raise LawError(f"high={case.high} is not below 50.")


def test_equal_seeds_draw_equal_cases_and_others_do_not() -> None:
    """What is drawn is a function of the seed."""
    draws: list[list[Numbers]] = [[], [], []]
    for seen, seed in zip(draws, (1, 1, 2), strict=True):
        collecting(seen)(harness(seed=seed))
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 50


def test_cases_know_the_number_of_ranks() -> None:
    """The drawing is told how many ranks the case is for."""
    seen: list[Numbers] = []
    collecting(seen)(harness(world_size=4))
    assert max(case.high for case in seen) > 100


def test_the_smallest_case_is_found_and_can_be_looked_at_again() -> None:
    """A broken law carries its smallest case as JSON, which breaks it again, alone."""
    with pytest.raises(LawError, match="high=50 is not below 50") as caught:
        for_all(numbers, below_fifty)(harness())
    (example,) = [note.removeprefix("example: ") for note in caught.value.__notes__ if note.startswith("example: ")]
    assert example == '{"low": 0, "high": 50}'
    with pytest.raises(LawError, match="high=50"):
        for_all(numbers, below_fifty)(harness(example=example))
    for_all(numbers, below_fifty)(harness(example='{"low": 0, "high": 49}'))


def draw_three(rank: Rank, case: Numbers) -> list[float]:
    strategy = rank.build(attrs.evolve(rank.config, strategy="single", seed=case.low))
    strategy.setup_distributed()
    (rank.directory / "file").write_text("here")
    return torch.rand(3).tolist()


def test_a_program_begins_with_streams_that_follow_from_its_strategy() -> None:
    """Two runs of a program draw the same numbers, other seeds others, and the caller's stream stays where it was."""
    run = harness().run
    stream = torch.get_rng_state()
    first, again, other = (run(draw_three, Numbers(low=low, high=0)) for low in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_law_of_one_rank_is_held_against_each() -> None:
    """A program runs once for a case, on all ranks; the law sees what one of them saw, and its number is told."""
    ran: list[Numbers] = []

    def run(program: Program[Numbers, int], case: Numbers) -> list[int]:
        ran.append(case)
        return [case.low, case.high]

    def holds(harness: Harness, case: Numbers) -> None:
        (first,) = harness.run(draw_three, case)
        (again,) = harness.run(draw_three, attrs.evolve(case))
        (other,) = harness.run(draw_three, attrs.evolve(case, low=case.low + 1, high=case.high + 1))
        assert first == again == other - 1
        if first >= 50:
            raise LawError(f"{first} is not below 50.")

    on_ranks = attrs.evolve(harness(world_size=2), run=run)
    on_each_rank(holds)(on_ranks, Numbers(low=1, high=49))
    assert ran == [Numbers(low=1, high=49), Numbers(low=2, high=50)]
    with pytest.raises(LawError, match="high=50 is not") as caught:
        for_all(numbers, on_each_rank(below_fifty))(on_ranks)
    assert "on rank 0" in caught.value.__notes__
    with pytest.raises(LawError, match="50 is not") as later:
        on_each_rank(holds)(on_ranks, Numbers(low=1, high=50))
    assert later.value.__notes__ == ["on rank 1"]
