"""What the tests of saves in the background run on every rank, and as a process that ends too early."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import attrs
import torch
import torch.distributed as dist
from torch import nn

from lightrft.errors import CheckpointError
from lightrft.strategy import BackgroundSaves, StrategyConfig, background_saves, get_strategy
from lightrft.testing.laws.checkpoint.held import held_copying
from lightrft.testing.subject import Rank

KEPT: list[AbstractContextManager[BackgroundSaves]] = []


@attrs.frozen(kw_only=True)
class Job:
    """A directory, and the rank whose model is changed while it is copied; -1 for none."""

    directory: str
    changed: int = -1


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw: its errors, what else was there before and afterwards, and the newest step."""

    errors: list[str]
    groups: tuple[int, int]
    threads: tuple[int, int]
    timeouts: tuple[float, float]
    newest: int | None


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def timeout_of(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def save_on_ranks(rank: Rank, job: Job) -> Seen:
    """Save twice; the second time one rank may change its model too early."""
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = strategy.prepare(nn.Linear(3, 2))
    before, threads, errors = num_groups(), threading.active_count(), list[str]()
    with background_saves(strategy) as background:
        strategy.save_ckpt(model, job.directory, step=1, background=background)
        # collectives of the training go on meanwhile
        assert [strategy.all_reduce(number, "sum") for number in range(5)] == [2 * number for number in range(5)]
        background.wait()
        gate = threading.Event()
        strategy.save_ckpt(model, job.directory, step=2, background=held_copying(background, gate))
        if rank.rank == job.changed:
            with torch.no_grad():
                model.get_parameter("weight").add_(1)
        gate.set()
        try:
            background.wait()
        except CheckpointError as error:
            errors.append(str(error))
        newest = [group for group in dist.distributed_c10d._world.pg_map if group.group_desc == "lightrft apart"]
        timeouts = timeout_of(dist.group.WORLD), timeout_of(newest[0])
    return Seen(
        errors=errors,
        groups=(before, num_groups()),
        threads=(threads, threading.active_count()),
        timeouts=timeouts,
        newest=strategy.latest_ckpt(job.directory),
    )


def tear_down_inside(rank: Rank, job: Job) -> int | None:
    """Tear down before the handle's context is left, and return the newest step."""
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    with background_saves(strategy) as background:
        strategy.save_ckpt(nn.Linear(3, 2), job.directory, step=1, background=background)
        background.wait()
        strategy.barrier()
        dist.destroy_process_group()  # as `teardown` of a strategy that made it does
    return strategy.latest_ckpt(job.directory)


def main(directory: Path, how: str) -> None:
    """End without leaving the context; with "full", what is saved finds its place taken."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    model = nn.Linear(1500, 1500)  # so large that its digest is taken by a thread
    KEPT.append(background_saves(strategy))  # or it would be left when this function ends
    background = KEPT[0].__enter__()
    gate = threading.Event()
    path = strategy.save_ckpt(model, directory, step=1, background=held_copying(background, gate))
    if how == "full":
        (path / "notes").mkdir(parents=True)
    # the main thread ends before anything is written
    threading.Thread(target=lambda: (threading.main_thread().join(), gate.set())).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
