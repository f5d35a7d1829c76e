"""How much memory saving and loading take, as the kernel counts it for each process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from lightrft.backends.checkpointing.turns import BUCKET_SIZE
from lightrft.strategy.build import get_strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.subject import subject_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux tells it")

SLACK = 2 << 20  # what Python itself allocates on the way


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp2", 2), ("deepspeed", 2)])
def test_nothing_holds_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, world_size: int
) -> None:
    """A rank holds its shard and, at the peak of saving or loading, two buckets beside it at most.

    The whole is 192 MiB, of which a rank of two has 96 MiB at least, and a tensor 4 MiB. Two buckets of saving are 128
    MiB, less than the whole; for loading two tensors are enough. Moments that were not there yet are allocated once.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # workers get this path
    programs = importlib.import_module("memory_programs")
    with processes(subject_of(get_strategy, "strategy"), world_size, timeout=90) as run:
        for seen in run(programs.measure, programs.Job(directory=str(tmp_path), strategy=strategy)):
            assert seen.shard >= 192 * 2**20 // world_size
            assert seen.largest * 10 < seen.shard
            assert seen.raised["save"] <= 2 * BUCKET_SIZE
            assert seen.raised["load"] <= 2 * seen.largest + SLACK
            assert seen.moments <= seen.raised["load into no state"] + seen.largest
            assert seen.raised["load into no state"] <= seen.moments + 2 * seen.largest + SLACK
