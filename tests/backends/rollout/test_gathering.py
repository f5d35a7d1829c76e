"""Generating on all ranks: each makes its own prompts' completions alone, and what one refuses all refuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.backends.rollout.gathering import build_gather_and_generate
from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineStateError, LightRFTError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.rollout import Completion, Engine, EngineHandle, Prompt, SamplingParams
from lightrft.strategy.registry import find_engine

COLLECTIVES = build_collectives(StrategyConfig())


def handle_of() -> EngineHandle:
    engine: Engine = find_engine("scripted")(EngineConfig(type="scripted"))
    return EngineHandle(engine=engine, status="awake", weight_version=0, state=None)


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(token_ids=(1,))] * count


@pytest.mark.parametrize("counts", [[3], [2, 0, 1], [0, 0]])
def test_a_rank_asks_its_engine_for_its_own_prompts_by_their_numbers_among_all(counts: list[int]) -> None:
    """No rank generates for another one; the number of its first prompt is how many come before, and the caller's."""

    def program(rank: int) -> tuple[int, int]:
        asked: list[tuple[int, int]] = []

        def generate(engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
            del engine
            asked.append((len(prompts), sampling.first_prompt))
            return []

        gather_and_generate = build_gather_and_generate(COLLECTIVES, generate)
        assert gather_and_generate(handle_of(), prompts_of(counts[rank]), SamplingParams(first_prompt=5)) == []
        (call,) = asked
        return call

    expected = [(count, 5 + sum(counts[:rank])) for rank, count in enumerate(counts)]
    assert run_simulated(len(counts), program) == expected


class OwnError(LightRFTError):
    """An error of somebody's engine."""


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (EngineStateError("it is torn."), EngineStateError, "rank 1: it is torn."),
        (OwnError("it is torn."), LightRFTError, "rank 1: OwnError: it is torn."),
        (ZeroDivisionError("by zero"), ZeroDivisionError, "rank 1: by zero"),
    ],
)
def test_what_one_rank_refuses_all_refuse_with_its_number(raised: Exception, kind: type[Exception], words: str) -> None:
    """Nobody waits for completions that never come: the same error on all ranks, and its cause where it was raised."""

    def program(rank: int) -> tuple[str, bool]:
        def generate(engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
            del engine, prompts, sampling
            if rank == 1:
                raise raised
            return []

        with pytest.raises(kind) as refused:
            build_gather_and_generate(COLLECTIVES, generate)(handle_of(), prompts_of(1), SamplingParams())
        return str(refused.value), refused.value.__cause__ is raised

    assert run_simulated(3, program) == [(words, rank == 1) for rank in range(3)]
