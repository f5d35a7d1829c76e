"""One rank, in this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.record import Strategy
from lightrft.testing.ranks.watchdog import watched
from lightrft.testing.subject import Program, Rank, RunOnRanks, Subject

__all__ = ["run_here", "scratch_directory", "strategies_torn_down"]

_Case = TypeVar("_Case")
_Evidence = TypeVar("_Evidence")

_FOREIGN_SEED = 0
"""Seed of the streams that a program begins with; no config's seed gives it, so `setup_distributed` seeds anew."""


def run_here(subject: Subject) -> RunOnRanks:
    """Return what runs programs on one rank in this process; random streams are afterwards what they were.

    Args:
        subject: what is held to the laws.
    """

    def run(program: Program[_Case, _Evidence], case: _Case) -> list[_Evidence]:
        with (
            torch.random.fork_rng(),
            scratch_directory() as directory,
            strategies_torn_down(subject, rank=0, world_size=1, directory=directory) as rank,
            watched(),
        ):
            torch.manual_seed(_FOREIGN_SEED)
            return [program(rank, case)]

    return run


@contextmanager
def scratch_directory() -> Generator[Path]:
    """Yield an empty directory, in memory where there is such a file system: laws are about order, not about disks."""
    memory = "/dev/shm"  # noqa: S108 (the directory in it has a random name)
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


@contextmanager
def strategies_torn_down(subject: Subject, *, rank: int, world_size: int, directory: Path) -> Generator[Rank]:
    """Yield what a program is given, and tear down every strategy that it built when it has ended.

    Args:
        subject: what is held to the laws.
        rank: number of this rank.
        world_size: number of ranks.
        directory: the same on every rank.
    """
    built: list[Strategy] = []

    def build(config: StrategyConfig) -> Strategy:
        built.append(subject.build(config))
        return built[-1]

    try:
        yield Rank(
            rank=rank,
            world_size=world_size,
            directory=directory,
            build=build,
            config=subject.config,
            engine=subject.engine,
        )
    finally:
        for strategy in built:
            strategy.teardown()
