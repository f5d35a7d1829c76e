"""Programs that the tests of ranks run, right ones and ones that fail in every way that a program can."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from lightrft.config import StrategyConfig
from lightrft.errors import DataError
from lightrft.strategy.record import Strategy
from lightrft.testing import replicated
from lightrft.testing.subject import Rank

SEEN = "seen"


@attrs.frozen(kw_only=True)
class Sample:
    rows: tuple[tuple[float, ...], ...]
    name: str


@attrs.frozen(kw_only=True)
class Report:
    rank: int
    world_size: int
    total: Tensor
    name: str
    extra: str
    draw: float
    python_draw: float


class OwnError(Exception):
    """An exception of somebody else."""


class StrangeError(OwnError):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def build_unreadable(config: StrategyConfig) -> Strategy:
    raise DataError(f"seed={config.seed} cannot be used.")


def report(rank: Rank, case: Sample) -> Report:
    print("this is no part of the protocol", flush=True)  # noqa: T201
    subprocess.run([sys.executable, "-c", "print('nor is this')"], check=True)
    draw, python_draw = float(torch.rand(())), random.random()  # noqa: S311
    strategy = rank.build(rank.config)
    world = strategy.setup_distributed()
    (rank.directory / f"{rank.rank}").touch()
    strategy.barrier()
    assert len(list(rank.directory.iterdir())) == rank.world_size
    return Report(
        rank=world.rank,
        world_size=world.world_size,
        total=strategy.all_reduce(torch.tensor(case.rows, dtype=torch.float64) * (world.rank + 1), "sum"),
        name=case.name,
        extra=str(rank.config.extra_args.get("note")),
        draw=draw,
        python_draw=python_draw,
    )


def train(rank: Rank, num_steps: int) -> list[float]:
    strategy = rank.build(attrs.evolve(rank.config, micro_train_batch_size=1, train_batch_size=12, max_norm=0.0))
    strategy.setup_distributed()
    torch.manual_seed(5)
    model = nn.Linear(3, 1)
    trainable = strategy.prepare((model, strategy.create_optimizer(model, lr=0.125), None))
    inputs = torch.arange(36.0).reshape(12, 3) / 8
    losses: list[float] = []
    for _ in range(num_steps):
        for sample in inputs[rank.rank :: rank.world_size]:
            loss = (trainable.model(sample) - 1).square().mean()
            strategy.backward(loss, trainable.model, trainable.optimizer, weight=1 / 12)
            strategy.optimizer_step(trainable.optimizer, trainable.model, None)
        losses.append(float((trainable.model(inputs) - 1).square().mean().detach()))
    return losses


def pids(rank: Rank, with_child: bool) -> list[int]:
    del rank
    child = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid] if with_child else []
    return [os.getpid(), *child]


def joined(rank: Rank) -> Strategy:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    strategy.barrier()
    return strategy


def fails(rank: Rank, kind: str) -> float:
    """Rank 1 raises, and rank 0 waits for it."""
    strategy = joined(rank)
    if rank.rank == rank.world_size - 1:
        error = {
            "ours": DataError("prompts.jsonl:3 is empty."),
            "Python's": ZeroDivisionError("by nothing"),
            "somebody's": OwnError("of mine"),
            "strange": StrangeError(1, 2),
            "exit": SystemExit("enough"),
        }[kind]
        error.add_note("a note of its own")
        raise error
    return strategy.all_reduce(1.0)


def skips(rank: Rank, odd: int) -> float:
    strategy = joined(rank)
    return 0.0 if rank.rank == odd else strategy.all_reduce(1.0)


def keeps_and_skips(rank: Rank, odd: int) -> float:
    """Hold the process group from another module's attribute, which outlives the program."""
    torch.kept = torch.distributed.group.WORLD  # type: ignore[attr-defined]
    return skips(rank, odd)


def is_slow(rank: Rank, seconds: float) -> int:
    """Rank 0 ends long before the others, which need it no more."""
    joined(rank)
    time.sleep(seconds * rank.rank)
    return rank.rank


def disagrees(rank: Rank, case: int) -> float:
    return joined(rank).all_reduce({f"{case + rank.rank}": 1.0})["0"]


def hangs(rank: Rank, odd: int) -> float:
    strategy = joined(rank)
    while rank.rank == odd:
        time.sleep(1)
    return strategy.all_reduce(1.0)


def dies(rank: Rank, odd: int) -> float:
    strategy = joined(rank)
    if rank.rank == odd:
        print("last words", flush=True)  # noqa: T201
        os.kill(os.getpid(), signal.SIGKILL)
    return strategy.all_reduce(1.0)


def destroys(rank: Rank, case: int) -> int:
    """A program that takes the group apart does no harm to the next one."""
    joined(rank)
    torch.distributed.destroy_process_group()
    return case


def unannotated(rank, case):  # noqa: ANN001, ANN201
    del rank
    return case


def own_pids(folder: str) -> None:
    """What a parent does that is killed: start a pool, write down its workers, wait."""
    from lightrft.testing.ranks.processes import processes
    from lightrft.testing.subject import subject_of

    with processes(subject_of(replicated.build_gloo, "strategy"), 1) as run:
        text = " ".join(str(pid) for pid in run(pids, True)[0])
        part = Path(folder) / "part"
        part.write_text(text)
        part.rename(Path(folder) / SEEN)
        time.sleep(1000)
