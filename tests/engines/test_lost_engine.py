"""A real engine in a process of its own on each of two ranks, of which one is lost in the middle of a sync."""

from __future__ import annotations

import attrs
import lost_program
import psutil
import pytest
from guests import installed, settings

from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import subject_of

HERE = settings(installed("vllm", "sglang"))
APART = attrs.evolve(HERE, process="own", transport="collective")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other people's packages warn while they are imported
    pytest.mark.timeout(900),  # four processes import the engine, on cores that others may have
]


def drawn_in_one_process() -> list[tuple[int, ...]]:
    """Return what an engine that starts with the new weights makes of the prompts of both ranks."""
    strategy, model = get_strategy(StrategyConfig(strategy="single")), lost_program.policy()
    lost_program.change(model)
    prompts = [prompt for rank in range(2) for prompt in lost_program.prompts_of(rank)]
    with strategy.setup_inference_engine(HERE, actor=model) as engine:
        made = strategy.gather_and_generate(engine, prompts, lost_program.SAMPLING)
    return [completion.token_ids for completion in made]


def test_a_sync_that_lost_an_engine_on_one_rank_is_made_again_by_both() -> None:
    """Under fsdp2 the engine that was killed is started again, in a new group; both have the new weights."""
    config = StrategyConfig(strategy="fsdp2", micro_train_batch_size=1, train_batch_size=2)
    with run_on(subject_of("fsdp2", "strategy", config=config, engine=APART), "processes", 2) as run:
        seen = run(lost_program.run, lost_program.Case(victim=1))
    assert [one.crashes for one in seen] == [0, 1]
    assert [one.version for one in seen] == [1, 1]
    assert [tokens for one in seen for tokens in one.tokens] == drawn_in_one_process()
    for one in seen:
        assert one.difference < 1e-5
        assert one.moved > 1e-2
        assert not any(psutil.pid_exists(pid) for pid in one.pids)
