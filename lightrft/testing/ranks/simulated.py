"""Several ranks in this process, one at a time and always in the same order."""

from __future__ import annotations

from typing import TypeVar

from lightrft.backends.collectives.simulated import run_simulated
from lightrft.testing.ranks.here import scratch_directory, strategies_torn_down
from lightrft.testing.ranks.watchdog import watched
from lightrft.testing.subject import Program, RunOnRanks, Subject

__all__ = ["run_simulated_ranks"]

_Case = TypeVar("_Case")
_Evidence = TypeVar("_Evidence")


def run_simulated_ranks(subject: Subject, world_size: int) -> RunOnRanks:
    """Return what runs programs on simulated ranks; random streams are afterwards what they were.

    Args:
        subject: what is held to the laws; its collectives are those of `lightrft.backends.collectives.simulated`.
        world_size: number of ranks.
    """

    def run(program: Program[_Case, _Evidence], case: _Case) -> list[_Evidence]:
        with scratch_directory() as directory, watched():

            def run_rank(number: int) -> _Evidence:
                with strategies_torn_down(subject, rank=number, world_size=world_size, directory=directory) as rank:
                    return program(rank, case)

            return run_simulated(world_size, run_rank)

    return run
