"""Checkpoints that no strategy and no number of ranks owns: what any writes, every other reads and trains on from."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from lightrft.strategy.build import get_strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of


class Maker(NamedTuple):
    """A strategy on a number of ranks."""

    strategy: str
    zero_stage: int
    world_size: int


MAKERS = {
    "single": Maker("single", 0, 1),
    **{f"fsdp2-x{world_size}": Maker("fsdp2", 0, world_size) for world_size in (1, 2, 3)},
    **{
        f"deepspeed-{stage}-x{world_size}": Maker("deepspeed", stage, world_size)
        for stage in range(4)
        for world_size in (1, 2)
    },
}


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("strategy_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def ranks(programs: ModuleType, spawn: SpawnRank) -> Iterator[Callable[[int], RunOnRanks]]:
    """Pools of one, two and three processes, each started when it is first asked, for every strategy."""
    del programs
    subject = subject_of(get_strategy, "strategy")
    with ExitStack() as stack:
        yield {n: stack.enter_context(processes(subject, n, timeout=90, spawn=spawn)) for n in (1, 2, 3)}.__getitem__


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> dict[str, tuple[str, Any]]:
    """For each maker the directory that it saved to, other weights each, and what it saw then and ten steps later."""
    found: dict[str, tuple[str, Any]] = {}
    for seed, (name, maker) in enumerate(MAKERS.items()):
        directory = str(tmp_path_factory.mktemp(name))
        job = programs.Job(strategy=maker.strategy, zero_stage=maker.zero_stage, directories=[directory], seed=seed + 1)
        found[name] = directory, ranks(maker.world_size)(programs.write, job)[0]
    return found


def test_the_writers_differ(written: dict[str, tuple[str, Any]]) -> None:
    """Every checkpoint has values of its own, and further steps change all that is trained: no comparison is idle."""
    for name in written["single"][1].at:
        values = [seen.at[name] for _, seen in written.values()]
        assert all(not torch.equal(one, other) for one in values for other in values if one is not other), name
        if name not in {"frozen", "count"}:
            assert all(not torch.equal(seen.at[name], seen.after[name]) for _, seen in written.values())


@pytest.mark.parametrize("reader", MAKERS)
def test_any_reads_what_any_wrote(
    programs: ModuleType, ranks: Callable[[int], RunOnRanks], written: dict[str, tuple[str, Any]], reader: str
) -> None:
    """Parameters, buffers and both moments come back bit for bit, and ten further steps end where the writer's do."""
    maker = MAKERS[reader]
    job = programs.Job(
        strategy=maker.strategy, zero_stage=maker.zero_stage, directories=[path for path, _ in written.values()]
    )
    for rank in ranks(maker.world_size)(programs.read, job):
        for writer, (_, must), seen in zip(written, written.values(), rank, strict=True):
            assert seen.at.keys() == must.at.keys()
            different = [name for name in must.at if not torch.equal(seen.at[name], must.at[name])]
            assert different == [], (writer, reader)
            for name, tensor in must.after.items():
                torch.testing.assert_close(
                    seen.after[name], tensor, rtol=0, atol=1e-5, msg=f"{name} of {writer} read by {reader}"
                )


def test_damage_to_what_ranks_wrote_is_refused(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Any file of two ranks that is cut, removed, of another step or has one bit flipped is named by every rank.

    No rank's shard, moment, rate or stream changes by the attempt. A file that is none of the checkpoint's is let be.
    """
    job = programs.Job(strategy="fsdp2", zero_stage=0, directories=[str(tmp_path)], num_flips=200)
    path = tmp_path / "step-00000002"
    for rank, seen in enumerate(ranks(2)(programs.damage, job)):
        for what, name, error in seen.attempts:
            assert f"{path / name} " in error, (rank, what, name)
            assert "\n" not in error
        assert seen.untouched
        assert seen.loaded == 2
    names = [name for _, name, _ in seen.attempts]
    assert set(names) == {file.name for file in path.iterdir()} - {"notes.txt"}
    assert len([what for what, _, _ in seen.attempts if "flipped" in what]) == 200
    assert {"rank-00001.random.json", "actor.optimizer.safetensors", "manifest.json"} < set(names)
