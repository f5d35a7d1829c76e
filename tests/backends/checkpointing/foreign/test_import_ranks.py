"""An imported checkpoint is loaded by every strategy, on other numbers of ranks than wrote the source."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from test_import import imported

from lightrft.strategy.build import get_strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of

SOURCES = ("dcp-nested", "zero2", "zero3")
READERS = {
    "single": ("single", 0, 1),
    "fsdp2": ("fsdp2", 0, 2),
    "stage 2": ("deepspeed", 2, 2),
    "stage 3": ("deepspeed", 3, 2),
}


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[1])
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("import_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def ranks(programs: ModuleType, spawn: SpawnRank) -> Iterator[Callable[[int], RunOnRanks]]:
    del programs
    subject = subject_of(get_strategy, "strategy")
    with ExitStack() as stack:
        yield {n: stack.enter_context(processes(subject, n, timeout=90, spawn=spawn)) for n in (1, 2)}.__getitem__


def test_every_strategy_loads_what_was_imported(
    sources: Callable[[int], Path], programs: ModuleType, ranks: Callable[[int], RunOnRanks], tmp_path: Path
) -> None:
    """Parameters and moments are the source's bits on every rank, and further steps end where those of "single" do."""
    strategy_programs = importlib.import_module("strategy_programs")
    for name in SOURCES:
        imported(sources(2) / name, tmp_path / name)
    directories = [str(tmp_path / name) for name in SOURCES]
    after: dict[str, dict[str, torch.Tensor]] = {}
    for reader, (strategy, zero_stage, world_size) in READERS.items():
        job = strategy_programs.Job(strategy=strategy, zero_stage=zero_stage, directories=directories)
        for of_rank in ranks(world_size)(programs.read, job):
            for name, seen in zip(SOURCES, of_rank, strict=True):
                must = load_file(sources(2) / f"{name.removesuffix('-nested')}.safetensors")
                keys = {f"value.{key}" if " of " not in key else key.replace(" of ", "."): key for key in seen.at}
                different = [key for key in must if key in keys and not torch.equal(must[key], seen.at[keys[key]])]
                assert different == [], (name, reader)
                assert {key for key in must if not key.startswith("step.")} <= keys.keys()
                for key, tensor in after.setdefault(name, seen.after).items():
                    torch.testing.assert_close(
                        seen.after[key], tensor, rtol=0, atol=1e-5, msg=f"{key}, {name}, {reader}"
                    )
                assert not torch.equal(seen.after["embed.weight"], seen.at["embed.weight"])
