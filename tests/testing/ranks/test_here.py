"""One rank in this process."""

from __future__ import annotations

import pytest
import torch

from lightrft.strategy.compose import with_recording
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import STRATEGIES
from lightrft.testing.ranks.here import run_here
from lightrft.testing.subject import Rank, subject_of


def test_a_program_gets_its_place_and_leaves_no_trace() -> None:
    """A program sees rank 0 of 1, an empty directory that is removed, and streams that the caller's do not feel."""
    before = torch.get_rng_state()

    def program(rank: Rank, case: int) -> tuple[int, int, str, float, int]:
        assert list(rank.directory.iterdir()) == []
        (rank.directory / "file").touch()
        return rank.rank, rank.world_size, str(rank.directory), float(torch.rand(())), case

    run = run_here(subject_of("single", "strategy"))
    first, second = run(program, 4)[0], run(program, 4)[0]
    assert first[:2] == (0, 1)
    assert first[2] != second[2]
    assert first[3:] == second[3:]
    assert torch.equal(torch.get_rng_state(), before)


def test_strategies_are_torn_down_after_the_program() -> None:
    """Every strategy that a program builds is torn down once, also if the program raises."""
    calls: list[object] = []

    def build(config: StrategyConfig) -> Strategy:
        return with_recording(STRATEGIES["single"](config), calls)

    def program(rank: Rank, case: int) -> int:
        for _ in range(case):
            rank.build(rank.config)
        return 4 // case

    def failing(rank: Rank, case: int) -> float:
        rank.build(rank.config)
        return case / 0

    run = run_here(subject_of(build, "strategy"))
    assert run(program, 2) == [2]
    assert [str(call) for call in calls] == ["teardown()"] * 2
    with pytest.raises(ZeroDivisionError):
        run(failing, 1)
    assert len(calls) == 3
