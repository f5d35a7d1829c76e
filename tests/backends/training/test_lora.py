"""Adapters of peft learn the same under every strategy, and they alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightrft.strategy.config import StrategyConfig
from lightrft.testing.ranks.here import run_here
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import subject_of

CLOSE = 1e-5
SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {"strategy": "single"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "stage 2": (2, {"strategy": "deepspeed", "zero_stage": 2}),
    "stage 3": (2, {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0}),
}


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield import_module("lora_programs")
    sys.path.remove(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_only_adapters_learn_and_they_learn_the_same(programs: ModuleType, spawn: SpawnRank, name: str) -> None:
    """Losses, norms and tensors are those of raw torch; the optimizer holds adapters alone; a checkpoint has all."""
    world_size, settings = SETTINGS[name]
    config = StrategyConfig.from_mapping(settings)
    subject = subject_of(str(config.strategy), "strategy", config=config)
    case = programs.Case()
    alone = nullcontext(run_here(subject))
    with alone if world_size == 1 else processes(subject, world_size, timeout=90, spawn=spawn) as run:
        seen = run(programs.train, case)
    must = programs.raw(case, world_size)
    losses = [seen[index % world_size].losses[index // world_size] for index in range(len(must.losses))]
    assert losses == pytest.approx(must.losses, rel=CLOSE)
    before = dict(programs.build(0).named_parameters())
    assert all("lora_" in learning for learning in must.learning)
    for rank in seen:
        assert rank.norms == pytest.approx(must.norms, rel=CLOSE)
        assert rank.learning == must.learning
        assert rank.tensors.keys() >= must.tensors.keys()
        for tensor_name, tensor in must.tensors.items():
            found = rank.tensors[tensor_name]
            if tensor_name in must.learning:
                torch.testing.assert_close(found, tensor, rtol=CLOSE, atol=1e-6, msg=tensor_name)
            else:
                assert torch.equal(found, before[tensor_name]), tensor_name
            assert torch.equal(rank.restored[tensor_name], found), tensor_name
    assert sum(rank.state_elements for rank in seen) == must.state_elements
