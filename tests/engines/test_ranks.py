"""An engine on each of two ranks that train together, "vllm" or "sglang"."""

from __future__ import annotations

import pytest
import ranks_program
from guests import installed, settings

from lightrft.strategy import Prompt, StrategyConfig, get_strategy
from lightrft.testing.cases.policies import build_policy
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import subject_of

ENGINE = installed("vllm", "sglang")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other people's packages warn while they are imported
    pytest.mark.timeout(900),  # three processes import the engine, on cores that others may have
]


def test_each_rank_of_sharded_training_has_its_engine() -> None:
    """Under fsdp2 on two ranks completions are those of one process, and logprobs the trainer's after every sync."""
    config = StrategyConfig(strategy="fsdp2")
    with run_on(subject_of("fsdp2", "strategy", config=config, engine=settings(ENGINE)), "processes", 2) as run:
        seen = run(ranks_program.run, 5)
    strategy = get_strategy(StrategyConfig(strategy="single"))
    prompts = [Prompt(token_ids=ids) for ids in ranks_program.PROMPTS]
    with strategy.setup_inference_engine(settings(ENGINE), actor=build_policy(ranks_program.CASE)) as handle:
        whole = strategy.gather_and_generate(handle, prompts, ranks_program.SAMPLING)
    assert [ids for rank in seen for ids in rank.made] == [completion.token_ids for completion in whole]
    assert max(difference for rank in seen for difference in rank.differences) < 1e-5
    assert seen[0].differences == seen[1].differences
    assert [rank.later for rank in seen] != [rank.made for rank in seen]
