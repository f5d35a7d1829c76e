"""Completions and weight syncs, held to their laws at every call."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import nn

from lightrft.config.sections import EngineConfig
from lightrft.models.images import read_prompts
from lightrft.strategy.protocols import (
    Completion,
    EngineHandle,
    Processor,
    Prompt,
    SamplingParams,
    SyncReport,
    Tokenizer,
)
from lightrft.strategy.protocols.rollout import (
    EngineGenerateLocal,
    MaybeSleepInferenceEngine,
    SetupInferenceEngine,
    UpdateEngineWeights,
    WakeupInferenceEngine,
)
from lightrft.strategy.record import Strategy
from lightrft.testing.checked.verdict import require
from lightrft.testing.reference.digests import changed_names, digests
from lightrft.testing.reference.requests import completions_problem

__all__ = ["with_checked_rollout"]


def with_checked_rollout(strategy: Strategy) -> Strategy:
    """Return the strategy with its functions about engines held to their laws.

    Args:
        strategy: any strategy.
    """
    return attrs.evolve(
        strategy,
        setup_inference_engine=_checked_setup(strategy),
        engine_generate_local=_checked_generate("engine_generate_local", strategy.engine_generate_local),
        gather_and_generate=_checked_generate("gather_and_generate", strategy.gather_and_generate),
        update_engine_weights=_checked_update(strategy),
        maybe_sleep_inference_engine=_checked_sleep(strategy),
        wakeup_inference_engine=_checked_wakeup(strategy),
    )


def _checked_setup(strategy: Strategy) -> SetupInferenceEngine:
    inner = strategy.setup_inference_engine

    def setup_inference_engine(
        config: EngineConfig | None = None,
        *,
        actor: nn.Module,
        tokenizer: Tokenizer | None = None,
        processor: Processor | None = None,
    ) -> EngineHandle:
        before = digests(strategy.named_tensors(actor))
        engine = inner(config, actor=actor, tokenizer=tokenizer, processor=processor)
        changed = changed_names(before, digests(strategy.named_tensors(actor)))
        require(not changed, "setup_inference_engine", f"{changed} of the actor changed")
        life = (engine.status, engine.weight_version)
        require(life == ("awake", 0), "setup_inference_engine", f"the engine is {life} and must be ('awake', 0)")
        return engine

    return setup_inference_engine


def _checked_generate(name: str, inner: EngineGenerateLocal) -> EngineGenerateLocal:
    def generate(engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        status = engine.status
        completions = inner(engine, prompts, sampling)
        require(status == "awake", name, f"made completions with an engine that is {status!r} and must refuse")
        read = [Prompt(token_ids=prompt.token_ids) for prompt in read_prompts(prompts, engine.processor)]
        problem = completions_problem(completions, read, sampling, weight_version=engine.weight_version)
        require(problem is None, name, str(problem))
        return completions

    return generate


def _checked_update(strategy: Strategy) -> UpdateEngineWeights:
    inner = strategy.update_engine_weights

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        version, status, before = engine.weight_version, engine.status, digests(strategy.named_tensors(actor))
        try:
            report = inner(engine, actor)
        except Exception as error:
            legal = status in {"awake", "torn"}
            wanted = "torn" if legal else status
            sentence = f"raised {error!r} and left the engine {engine.status!r}, which must be {wanted!r}"
            require(engine.status == wanted, "update_engine_weights", sentence)
            raise
        changed = changed_names(before, digests(strategy.named_tensors(actor)))
        require(not changed, "update_engine_weights", f"{changed} of the actor changed")
        life = (engine.status, engine.weight_version, report.weight_version)
        wanted_life = ("awake", version + 1, version + 1)
        sentence = f"status, version and reported version are {life} and must be {wanted_life}"
        require(life == wanted_life, "update_engine_weights", sentence)
        counted = (report.num_tensors, len(before))
        require(counted[0] == counted[1], "update_engine_weights", f"wrote {counted[0]} of {counted[1]} tensors")
        return report

    return update_engine_weights


def _checked_sleep(strategy: Strategy) -> MaybeSleepInferenceEngine:
    inner = strategy.maybe_sleep_inference_engine

    def maybe_sleep_inference_engine(engine: EngineHandle) -> None:
        status, version = engine.status, engine.weight_version
        inner(engine)
        legal = engine.status in {status, "asleep"} and engine.weight_version == version
        require(legal, "maybe_sleep_inference_engine", f"the engine went from {status!r} to {engine.status!r}")

    return maybe_sleep_inference_engine


def _checked_wakeup(strategy: Strategy) -> WakeupInferenceEngine:
    inner = strategy.wakeup_inference_engine

    def wakeup_inference_engine(engine: EngineHandle) -> None:
        status, version = engine.status, engine.weight_version
        inner(engine)
        legal = engine.status == "awake" and engine.weight_version == version
        require(legal, "wakeup_inference_engine", f"the engine went from {status!r} to {engine.status!r}")

    return wakeup_inference_engine
