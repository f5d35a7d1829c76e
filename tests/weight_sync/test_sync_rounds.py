"""Weights arrive: after training, syncing and generating in turn, the engine's logprobs are the trainer's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from lightrft.config import EngineConfig
from lightrft.strategy.config import StrategyConfig
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import subject_of

SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {"strategy": "single"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "stage 3": (2, {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0}),
}


@pytest.fixture(scope="module")
def sync_rounds() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield import_module("sync_rounds")
    sys.path.remove(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_after_rounds_of_training_the_engine_is_the_trainer(sync_rounds: ModuleType, name: str) -> None:
    """Under every strategy, models with adapters and with experts arrive whole, and the trainer is only read.

    A forward pass of a sharded model that breaks off on one rank is raised there as it is: the others are in it.
    """
    world_size, settings = SETTINGS[name]
    config = StrategyConfig.from_mapping(settings)
    subject = subject_of(str(config.strategy), "strategy", config=config, engine=EngineConfig(type="hf"))
    with run_on(subject, "here" if world_size == 1 else "processes", world_size) as run:
        for kind in sync_rounds.KINDS if world_size == 1 else ("adapter", "experts"):
            for seen in run(sync_rounds.run, sync_rounds.Case(kind=kind, num_rounds=20 if world_size == 1 else 3)):
                assert max(seen.probed) < 1e-5, kind
                assert max(seen.differences) < 1e-5, kind
                assert seen.moved > 1e-2, kind
                assert seen.kept, kind
                assert seen.spread is (world_size > 1), kind
                assert seen.asked == (0, 2, 4, 5, 7, 8, 10, 12), kind  # spread over all 13 tokens
        if name == "fsdp2":  # it is the last that these processes do
            with pytest.raises(OSError, match="no room for a layer"):
                run(sync_rounds.break_off, "no room for a layer")
