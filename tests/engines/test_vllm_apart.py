"""Engines in processes of their own, with the real vLLM and transformers: `make test-vllm`."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import attrs
import psutil
import pytest
import torch
from guests import installed, policy, settings

from lightrft.backends.rollout.apart.engine import ApartState
from lightrft.config import EngineConfig
from lightrft.errors import ConfigError
from lightrft.strategy import Completion, EngineHandle, Prompt, SamplingParams, get_strategy

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = attrs.evolve(settings(installed("vllm")), process="own")
PROMPTS = [Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4,))]
HOT = SamplingParams(temperature=1.3, max_new_tokens=6, n=3, seed=5)


def require_same(made: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    """Compare tokens, and logprobs but for their last bits, which a package may sum in another order each time."""
    assert [completion.token_ids for completion in made] == [completion.token_ids for completion in wanted]
    assert [completion.weight_version for completion in made] == [completion.weight_version for completion in wanted]
    for one, other in zip(made, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def pid_of(handle: EngineHandle) -> int:
    assert isinstance(handle.state, ApartState)
    return handle.state.process.popen.pid


def test_it_is_mended_after_it_was_killed_and_leaves_nothing() -> None:
    """New weights arrive, sleep gives the cache back, and a killed one draws what it would have drawn."""
    model = policy(tied=True, seed=1)
    strategy, children = get_strategy({"strategy": "single"}), set(psutil.Process().children())
    with strategy.setup_inference_engine(ENGINE, actor=policy(tied=True)) as handle:
        assert strategy.update_engine_weights(handle, model).max_logprob_difference < 1e-4
        made = strategy.gather_and_generate(handle, PROMPTS, HOT)
        handle.engine.sleep(handle)
        handle.engine.wake(handle)
        pid = pid_of(handle)
        os.kill(pid, signal.SIGKILL)
        require_same(strategy.gather_and_generate(handle, PROMPTS, HOT), made)
        with torch.no_grad():
            model.get_parameter("model.norm.weight").mul_(1.5)
        assert strategy.update_engine_weights(handle, model).weight_version == 2
        pids = [pid, pid_of(handle)]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert set(psutil.Process().children()) <= children


def test_hf_draws_the_same_tokens_after_its_process_was_killed() -> None:
    """In a process of its own it draws what it draws in the trainer's; killed, what it would have drawn."""
    first, second = policy(tied=True), policy(tied=True, seed=1)
    strategy = get_strategy({"strategy": "single"})
    with (
        strategy.setup_inference_engine(EngineConfig(type="hf", process="own"), actor=first) as apart,
        strategy.setup_inference_engine(EngineConfig(type="hf"), actor=first) as here,
    ):
        assert apart.engine.capabilities == here.engine.capabilities
        for handle in (apart, here):
            report = strategy.update_engine_weights(handle, second)
            assert (report.weight_version, report.num_tensors) == (1, len(second.state_dict()))
        made = strategy.gather_and_generate(apart, PROMPTS, HOT)
        require_same(made, strategy.gather_and_generate(here, PROMPTS, HOT))
        os.kill(pid_of(apart), signal.SIGKILL)
        require_same(strategy.gather_and_generate(apart, PROMPTS, HOT), made)
        assert (apart.status, apart.weight_version) == ("awake", 1)


def test_what_it_refuses_it_refuses_from_afar() -> None:
    """A cache that does not hold one sequence is a setting of the user's, wherever the engine runs."""
    strategy, children = get_strategy({"strategy": "single"}), set(psutil.Process().children())
    config = attrs.evolve(ENGINE, cache_gb=1e-6)
    with pytest.raises(ConfigError, match="cache_gb=1e-06 does not suffice"):
        strategy.setup_inference_engine(config, actor=policy(tied=True))
    assert set(psutil.Process().children()) <= children
