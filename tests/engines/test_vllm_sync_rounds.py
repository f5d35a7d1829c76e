"""Weights arrive in vLLM, under every strategy and for every kind of model: `make test-vllm`."""

from __future__ import annotations

import pytest
import sync_rounds

from lightrft.backends.rollout.vllm_package import require_vllm
from lightrft.config import EngineConfig
from lightrft.errors import MissingPackageError
from lightrft.strategy import StrategyConfig
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import subject_of

try:
    require_vllm()
except MissingPackageError as missing:
    pytest.skip(str(missing), allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = EngineConfig(type="vllm", cache_gb=0.01, batch_size=8)
SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {"strategy": "single"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "stage 3": (2, {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_after_rounds_of_training_the_engine_is_the_trainer(name: str) -> None:
    """After each of 20 rounds logprobs are the trainer's within 1e-5, and the trainer is as it was to the bit."""
    world_size, settings = SETTINGS[name]
    config = StrategyConfig.from_mapping(settings)
    subject = subject_of(str(config.strategy), "strategy", config=config, engine=ENGINE)
    with run_on(subject, "here" if world_size == 1 else "processes", world_size) as run:
        for kind in sync_rounds.KINDS:
            for seen in run(sync_rounds.run, sync_rounds.Case(kind=kind, num_rounds=20)):
                assert max(seen.probed) < 1e-5, kind
                assert max(seen.differences) < 1e-5, kind
                assert seen.moved > 1e-2, kind
                assert seen.kept, kind
