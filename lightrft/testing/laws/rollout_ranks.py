"""What ranks do when one of them alone cannot go on: all of them hear of it, and none waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NoReturn

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from lightrft.errors import ConfigError, EngineStateError, LawError, WeightSyncError
from lightrft.strategy.protocols import Completion, Engine, EngineHandle, Prompt, SamplingParams
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.policies import PolicyCase, build_policy, generate, policy_cases, policy_for
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_logprobs,
    require_refusal,
    require_requests,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_PROMPTS = ((1, 2, 3), (4,))

_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=2)

_UNKNOWN = "no-engine"

_Fault = Literal["begin_update", "put", "commit", "generate", "answer"]

_FAULTS: tuple[_Fault, ...] = ("begin_update", "put", "commit", "generate", "answer")

# a law of ranks is about errors of every kind, so each call fails with another one
_ERRORS = MappingProxyType[_Fault, type[Exception]](
    {
        "begin_update": EngineStateError,
        "put": InterruptedError,
        "commit": WeightSyncError,
        "generate": ZeroDivisionError,
        "answer": WeightSyncError,
    }
)


@attrs.frozen(kw_only=True)
class _Failing:
    policy: PolicyCase
    victim: int  # the rank whose engine fails
    faults: tuple[_Fault, ...]  # sync by sync


@attrs.frozen(kw_only=True)
class _Failed:
    refused: Refusal | None
    status: str
    generate: Refusal | None


@attrs.frozen(kw_only=True)
class _Failures:
    started: Refusal | None
    failed: list[_Failed]
    version: int  # after the sync that mended the engine
    weights: dict[str, Tensor]
    gathered: Refusal | None
    made: list[Completion]


def _cases(world_size: int) -> SearchStrategy[_Failing]:
    return st.builds(
        _Failing,
        policy=policy_cases(max_layers=1),
        victim=st.integers(0, world_size - 1),
        faults=st.permutations(_FAULTS).map(tuple),
    )


def _fail(rank: Rank, case: _Failing) -> _Failures:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    actor = strategy.prepare(build_policy(policy_for(rank.engine, case.policy)))
    prompts = [Prompt(token_ids=prompt) for prompt in _PROMPTS]
    started = _start_unknown(rank, strategy, actor, is_victim=rank.rank == case.victim)
    failed: list[_Failed] = []
    with strategy.setup_inference_engine(rank.engine, actor=actor) as engine:
        right = engine.engine
        for fault in case.faults:
            _plant(engine, fault, is_victim=rank.rank == case.victim)
            refused = refusal(strategy.update_engine_weights, engine, actor)
            engine.engine = right
            failed.append(
                _Failed(refused=refused, status=engine.status, generate=refusal(generate, engine, _PROMPTS, _SAMPLING))
            )
        strategy.update_engine_weights(engine, actor)
        _plant(engine, "generate", is_victim=rank.rank == case.victim)
        gathered = refusal(strategy.gather_and_generate, engine, prompts, _SAMPLING)
        engine.engine = right
        return _Failures(
            started=started,
            failed=failed,
            version=engine.weight_version,
            weights={name: tensor.detach().clone() for name, tensor in strategy.named_tensors(actor)},
            gathered=gathered,
            made=strategy.gather_and_generate(engine, prompts, _SAMPLING),
        )


def _start_unknown(rank: Rank, strategy: Strategy, actor: nn.Module, *, is_victim: bool) -> Refusal | None:
    """Return with what words engines are refused of which this rank's may be one that nobody knows."""
    config = attrs.evolve(rank.engine, type=_UNKNOWN) if is_victim else rank.engine

    def start() -> None:
        with strategy.setup_inference_engine(config, actor=actor):
            pass

    return refusal(start)


def _plant(engine: EngineHandle, fault: _Fault, *, is_victim: bool) -> None:
    """Make one call of this rank's engine fail, or its answer be one of other weights."""
    if not is_victim:
        return
    right = engine.engine

    def fails(*arguments: object, **named: object) -> NoReturn:
        del arguments, named
        raise _ERRORS[fault]("it cannot go on.")

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, Tensor]]) -> None:
        right.put(handle, list(tensors)[:1])
        fails()

    def answers(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        made = right.generate(handle, prompts, sampling)
        return [attrs.evolve(one, logprobs=tuple(logprob - 1 for logprob in one.logprobs)) for one in made]

    planted: Mapping[_Fault, Engine] = {
        "begin_update": attrs.evolve(right, begin_update=fails),
        "put": attrs.evolve(right, put=put),
        "commit": attrs.evolve(right, commit=fails),
        "generate": attrs.evolve(right, generate=fails),
        "answer": attrs.evolve(right, generate=answers),
    }
    engine.engine = planted[fault]


def _failing(harness: Harness, case: _Failing) -> None:
    every = harness.run(_fail, case)
    model = build_policy(policy_for(harness.subject.engine, case.policy))
    named = f"rank {case.victim}"
    versions = {seen.version for seen in every}
    if len(versions) > 1:
        raise LawError(f"after a sync of all ranks their engines have the versions {sorted(versions)}.")
    for number, seen in enumerate(every):
        of = f"setup_inference_engine on rank {number}, with an unknown engine on rank {case.victim},"
        require_refusal(seen.started, ConfigError, of=of, naming=(named, _UNKNOWN))
        for fault, failed in zip(case.faults, seen.failed, strict=True):
            of = f"update_engine_weights on rank {number}, with an engine of rank {case.victim} whose {fault} is wrong,"
            require_refusal(failed.refused, _ERRORS[fault], of=of, naming=(named,))
            if failed.status != "torn":
                raise LawError(f"after {of} the engine is {failed.status!r} and must be 'torn'.")
            require_refusal(failed.generate, EngineStateError, of=f"generate after {of}", naming=("torn",))
        of = f"gather_and_generate on rank {number}, with an engine of rank {case.victim} whose generate fails,"
        require_refusal(seen.gathered, _ERRORS["generate"], of=of, naming=(named,))
        model.load_state_dict(seen.weights)
        require_requests(seen.made, _PROMPTS, _SAMPLING, version=seen.version)
        require_logprobs(seen.made, model, temperature=0.0)


LAWS: tuple[Law, ...] = (
    Law(
        id="rollout.one_rank_fails",
        statement="What the engine of one rank cannot do, at its start, in a sync or while all generate, every rank "
        "raises and names the rank; after a sync that failed no rank generates, until one succeeds on all of them.",
        check=for_all(_cases, _failing),
        worlds="several",
    ),
)
"""What strategies do where one rank's engine fails."""
