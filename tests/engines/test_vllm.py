"""The engine "vllm" with the real vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import sync_rounds
from guests import HOT, generate, installed, loading, logprob_difference, policy, settings, start, without

from lightrft.backends.rollout.projection import PACKED_AFTER
from lightrft.errors import UnsupportedError
from lightrft.strategy import SamplingParams, StrategyConfig, get_strategy

# other people's packages warn while they are imported
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = settings(installed("vllm"))


def test_a_tied_head_follows_its_embedding(engines: ExitStack) -> None:
    """Where the embedding comes alone, vLLM's tied head has its new weights, too; by vLLM's own means it has not."""
    strategy, new = get_strategy(StrategyConfig(strategy="single")), policy(tied=True, seed=1)
    handle = start(engines, policy(tied=True), ENGINE)
    with loading(handle, without("lm_head")):
        assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_a_matrix_that_was_packed_is_forgotten(engines: ExitStack) -> None:
    """After long generation with one set of weights, short and long generation with the next have its logprobs."""
    wide, new = policy(length=128, hidden_size=512), policy(length=128, hidden_size=512, seed=1)
    handle = start(engines, wide, ENGINE)
    long = SamplingParams(temperature=1.7, max_new_tokens=2 * PACKED_AFTER, seed=5)
    assert logprob_difference(generate(handle, long), wide, temperature=1.7) < 1e-4
    get_strategy(StrategyConfig(strategy="single")).update_engine_weights(handle, new)
    assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-4
    assert logprob_difference(generate(handle, long), new, temperature=1.7) < 1e-4


@pytest.mark.parametrize("expert_size", [32, 40])
def test_experts_arrive_in_every_sync(engines: ExitStack, expert_size: int) -> None:
    """Experts, which vLLM rearranges at its first load alone and pads to a multiple of 32, arrive in every sync."""
    handle = start(engines, sync_rounds.build("experts", expert_size=expert_size), ENGINE)
    strategy = get_strategy(StrategyConfig(strategy="single"))
    for seed in (1, 2):
        new = sync_rounds.build("experts", seed=seed, expert_size=expert_size)
        assert strategy.update_engine_weights(handle, new).max_logprob_difference < 1e-5
        assert logprob_difference(generate(handle, HOT), new, temperature=1.7) < 1e-5


def test_heads_of_another_size_are_refused_when_it_starts(engines: ExitStack) -> None:
    """VLLM itself would end at the first token."""
    with pytest.raises(UnsupportedError, match="head_dim=8 is not among the sizes"):
        start(engines, policy(hidden_size=16), ENGINE)
