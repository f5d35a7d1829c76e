"""Several ranks in this process, as laws see them."""

from __future__ import annotations

import pytest
import torch

from lightrft.errors import CollectiveError
from lightrft.testing.ranks.simulated import run_simulated_ranks
from lightrft.testing.replicated import build_simulated
from lightrft.testing.subject import Rank, subject_of

SUBJECT = subject_of(build_simulated, "strategy")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_runs_the_program(world_size: int) -> None:
    """Ranks have numbers of their own and a directory together, and meet in collectives."""
    before = torch.get_rng_state()

    def program(rank: Rank, case: int) -> tuple[int, int, str, int]:
        strategy = rank.build(rank.config)
        strategy.setup_distributed()
        (rank.directory / str(rank.rank)).touch()
        strategy.barrier()
        assert len(list(rank.directory.iterdir())) == rank.world_size
        return rank.rank, rank.world_size, str(rank.directory), strategy.all_reduce(case * rank.rank, "sum")

    seen = run_simulated_ranks(SUBJECT, world_size)(program, 10)
    total = 10 * sum(range(world_size))
    assert [(rank, size, value) for rank, size, _, value in seen] == [
        (rank, world_size, total) for rank in range(world_size)
    ]
    assert len({directory for _, _, directory, _ in seen}) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_strategies_of_a_failed_rank_are_torn_down() -> None:
    """What a rank raises is raised with a note of the rank, and the streams of its strategy are free to be seeded."""

    def program(rank: Rank, case: int) -> float:
        strategy = rank.build(rank.config)
        strategy.setup_distributed()
        return strategy.all_reduce({"a": 1.0} if rank.rank else {"b": 1.0})["a"] * case

    with pytest.raises(CollectiveError, match="rank 1") as caught:
        run_simulated_ranks(SUBJECT, 2)(program, 1)
    assert caught.value.__notes__ == ["on rank 0"]
