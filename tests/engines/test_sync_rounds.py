"""Weights arrive in vLLM and SGLang, under every strategy and for every kind of model."""

from __future__ import annotations

import pytest
import sync_rounds
from guests import installed, settings

from lightrft.strategy import StrategyConfig
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import subject_of

ENGINE = installed("vllm", "sglang")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other people's packages warn while they are imported
    pytest.mark.timeout(900),  # every rank imports the engine, on cores that others may have
]

SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {"strategy": "single"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "stage 3": (2, {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_after_rounds_of_training_the_engine_is_the_trainer(name: str) -> None:
    """After each of 20 rounds logprobs are the trainer's within 1e-5, and the trainer is as it was to the bit."""
    world_size, training = SETTINGS[name]
    config = StrategyConfig.from_mapping(training)
    subject = subject_of(str(config.strategy), "strategy", config=config, engine=settings(ENGINE))
    with run_on(subject, "here" if world_size == 1 else "processes", world_size) as run:
        for kind in sync_rounds.KINDS:
            for seen in run(sync_rounds.run, sync_rounds.Case(kind=kind, num_rounds=20)):
                assert max(seen.probed) < 1e-5, kind
                assert max(seen.differences) < 1e-5, kind
                assert seen.moved > 1e-2, kind
                assert seen.kept, kind
