"""What a rank of `test_lost_engine` does: sync an engine whose process one of them loses on the way."""

from __future__ import annotations

import os
import signal

import attrs
import torch
from torch import nn

from lightrft.backends.rollout.apart.engine import ApartState
from lightrft.strategy import EngineHandle, Prompt, SamplingParams
from lightrft.testing.cases.policies import PolicyCase, build_policy
from lightrft.testing.subject import Rank

SAMPLING = SamplingParams(temperature=0.8, max_new_tokens=4, seed=3)


def prompts_of(rank: int) -> list[Prompt]:
    return [Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4 + rank,))]


def policy() -> nn.Module:
    return build_policy(PolicyCase(num_layers=2, seed=1))


def change(model: nn.Module) -> None:
    """Give a model the weights that are synced."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


@attrs.frozen(kw_only=True)
class Case:
    """On which rank the process of the engine is killed, between put and commit."""

    victim: int


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw."""

    crashes: int  # of its own engine
    version: int
    difference: float
    moved: float  # the first logprob, from one sync to the next
    tokens: list[tuple[int, ...]]
    pids: list[int]


def run(rank: Rank, case: Case) -> Seen:
    """Sync, lose an engine in the next sync, and generate."""
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model, prompts = strategy.prepare(policy()), prompts_of(rank.rank)
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        pids = [_state(engine).process.popen.pid]
        right, before = engine.engine, strategy.gather_and_generate(engine, prompts, SAMPLING)
        change(model)

        def commit(handle: EngineHandle) -> int:
            state = _state(handle)
            if rank.rank == case.victim and not state.num_crashes:
                os.kill(state.process.popen.pid, signal.SIGKILL)
            return right.commit(handle)

        engine.engine = attrs.evolve(right, commit=commit)
        report = strategy.update_engine_weights(engine, model)
        engine.engine = right
        made = strategy.gather_and_generate(engine, prompts, SAMPLING)
        pids.append(_state(engine).process.popen.pid)
        crashes = _state(engine).num_crashes
    strategy.barrier()
    return Seen(
        crashes=crashes,
        version=report.weight_version,
        difference=report.max_logprob_difference,
        moved=abs(made[0].logprobs[0] - before[0].logprobs[0]),
        tokens=[completion.token_ids for completion in made],
        pids=pids,
    )


def _state(handle: EngineHandle) -> ApartState:
    assert isinstance(handle.state, ApartState)
    return handle.state
