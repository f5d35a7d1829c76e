"""Strategies that go wrong on purpose around their engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import attrs
import torch
from torch import nn

from lightrft.backends.collectives.single import build_collectives
from lightrft.backends.rollout.serving import build_setup_inference_engine
from lightrft.backends.rollout.syncing import sync_engines
from lightrft.config import EngineConfig
from lightrft.errors import ConfigError, WeightSyncError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols import (
    Completion,
    EngineHandle,
    Processor,
    Prompt,
    SamplingParams,
    SyncReport,
    Tokenizer,
)
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import find_engine
from lightrft.testing.mutants.mutant import BreakStrategy, Mutant, strategy_mutant
from lightrft.testing.replicated import build_simulated
from lightrft.weight_sync import transfer_weights

__all__ = ["MUTANTS"]


class _WrongGather(Protocol):
    """Generates on all ranks wrongly."""

    def __call__(
        self, strategy: Strategy, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams, /
    ) -> list[Completion]: ...


def _gathering(wrong: _WrongGather) -> BreakStrategy:
    def breaks(strategy: Strategy, config: StrategyConfig) -> Strategy:
        del config

        def gather_and_generate(
            engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
        ) -> list[Completion]:
            return wrong(strategy, engine, prompts, sampling)

        return attrs.evolve(strategy, gather_and_generate=gather_and_generate)

    return breaks


def _of_rank_0(
    strategy: Strategy, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    every = strategy.all_gather(
        {
            "num_prompts": torch.tensor(len(prompts)),
            "lengths": torch.tensor([len(prompt.token_ids) for prompt in prompts], dtype=torch.int64),
            "token_ids": torch.tensor([token for prompt in prompts for token in prompt.token_ids], dtype=torch.int64),
        }
    )
    token_ids = iter(every["token_ids"].tolist())
    gathered = [Prompt(token_ids=tuple(islice(token_ids, length))) for length in every["lengths"].tolist()]
    return strategy.engine_generate_local(engine, gathered[: int(every["num_prompts"][0])], sampling)


def _apart(
    strategy: Strategy, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    return strategy.engine_generate_local(engine, prompts, sampling)


def _one_each(
    strategy: Strategy, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    return strategy.gather_and_generate(engine, prompts, attrs.evolve(sampling, n=1))


def _by_length(
    strategy: Strategy, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    ordered = sorted(prompts, key=_length, reverse=True)
    return strategy.gather_and_generate(engine, ordered, sampling)


def _length(prompt: Prompt) -> int:
    return len(prompt.token_ids)


def _unverified(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        num_tensors, num_bytes = transfer_weights(strategy.named_tensors(actor), engine)
        return SyncReport(
            weight_version=engine.weight_version,
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            max_logprob_difference=0.0,
        )

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _of_first_weights(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config
    first: list[nn.Module] = []

    def setup_inference_engine(
        config: EngineConfig | None = None,
        *,
        actor: nn.Module,
        tokenizer: Tokenizer | None = None,
        processor: Processor | None = None,
    ) -> EngineHandle:
        first[:] = [copy.deepcopy(actor)]
        return strategy.setup_inference_engine(config, actor=actor, tokenizer=tokenizer, processor=processor)

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        del actor
        return strategy.update_engine_weights(engine, first[0])

    return attrs.evolve(
        strategy, setup_inference_engine=setup_inference_engine, update_engine_weights=update_engine_weights
    )


def _uncounted(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        report = strategy.update_engine_weights(engine, actor)
        return attrs.evolve(report, num_tensors=len(list(actor.parameters())))

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _all_trained(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        report = strategy.update_engine_weights(engine, actor)
        actor.train()
        return report

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _drawing(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        torch.rand(())
        return strategy.update_engine_weights(engine, actor)

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _nan_agrees(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        try:
            return strategy.update_engine_weights(engine, actor)
        except WeightSyncError as error:
            if "inf nats" not in str(error):
                raise
            num_tensors, num_bytes = transfer_weights(strategy.named_tensors(actor), engine)
            return SyncReport(
                weight_version=engine.weight_version,
                num_tensors=num_tensors,
                num_bytes=num_bytes,
                max_logprob_difference=0.0,
            )

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _forgiven(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        try:
            return strategy.update_engine_weights(engine, actor)
        except WeightSyncError:
            engine.status = "awake"
            raise

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _untorn(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        try:
            return strategy.update_engine_weights(engine, actor)
        except InterruptedError:
            engine.status = "updating"
            raise

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _unheard(strategy: Strategy, config: StrategyConfig) -> Strategy:
    of_one_rank = build_collectives(config)

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        def weights() -> Iterable[tuple[str, torch.Tensor]]:
            return strategy.named_tensors(actor)

        return sync_engines(of_one_rank, engine, actor, weights=weights, bf16=False)

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _started_alone(strategy: Strategy, config: StrategyConfig) -> Strategy:
    return attrs.evolve(
        strategy,
        setup_inference_engine=build_setup_inference_engine(
            config,
            build_collectives(config),
            find_engine=find_engine,
            named_tensors=strategy.named_tensors,
            unwrap_model=strategy.unwrap_model,
        ),
    )


def _torn_alone(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        try:
            return strategy.update_engine_weights(engine, actor)
        except Exception as error:
            if f"rank {strategy.get_rank()}" not in str(error):
                engine.status = "awake"
            raise

    return attrs.evolve(strategy, update_engine_weights=update_engine_weights)


def _always_asleep(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def maybe_sleep_inference_engine(engine: EngineHandle) -> None:
        engine.engine.sleep(engine)

    return attrs.evolve(strategy, maybe_sleep_inference_engine=maybe_sleep_inference_engine)


def _never_asleep(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def maybe_sleep_inference_engine(engine: EngineHandle) -> None:
        del engine

    return attrs.evolve(strategy, maybe_sleep_inference_engine=maybe_sleep_inference_engine)


def _never_woken(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def wakeup_inference_engine(engine: EngineHandle) -> None:
        del engine

    return attrs.evolve(strategy, wakeup_inference_engine=wakeup_inference_engine)


def _fallen_back(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def setup_inference_engine(
        config: EngineConfig | None = None,
        *,
        actor: nn.Module,
        tokenizer: Tokenizer | None = None,
        processor: Processor | None = None,
    ) -> EngineHandle:
        try:
            return strategy.setup_inference_engine(config, actor=actor, tokenizer=tokenizer, processor=processor)
        except ConfigError:
            other = EngineConfig(type="scripted")
            return strategy.setup_inference_engine(other, actor=actor, tokenizer=tokenizer, processor=processor)

    return attrs.evolve(strategy, setup_inference_engine=setup_inference_engine)


def _with_drawing_engine(mutant: Mutant) -> Mutant:
    """Return the mutant with an engine that draws tokens; the scripted one gives out what it is given."""
    return attrs.evolve(mutant, subject=attrs.evolve(mutant.subject, engine=EngineConfig(type="hf")))


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "rollout.generate.of_rank_0",
        "Every rank is given the completions of rank 0.",
        _gathering(_of_rank_0),
        of=build_simulated,
        world_size=2,
    ),
    _with_drawing_engine(
        strategy_mutant(
            "rollout.generate.apart",
            "The random streams of every rank are those of rank 0.",
            _gathering(_apart),
            of=build_simulated,
            world_size=2,
        )
    ),
    strategy_mutant(
        "rollout.generate.one_each", "One completion of each prompt comes back instead of n.", _gathering(_one_each)
    ),
    strategy_mutant(
        "rollout.generate.by_length", "Completions come in the order of the prompts' lengths.", _gathering(_by_length)
    ),
    strategy_mutant("rollout.failed_update.unverified", "Nobody looks whether the weights arrived.", _unverified),
    strategy_mutant("rollout.update.first_weights", "A sync sends the weights of the start.", _of_first_weights),
    strategy_mutant(
        "rollout.update.uncounted", "The report counts parameters and leaves out buffers and ties.", _uncounted
    ),
    strategy_mutant("rollout.update.all_trained", "A sync leaves every module in training mode.", _all_trained),
    strategy_mutant("rollout.update.drawing", "A sync moves the random stream.", _drawing),
    strategy_mutant(
        "rollout.failed_update.nan_agrees", "A probe that is not a number counts as agreement.", _nan_agrees
    ),
    strategy_mutant("rollout.failed_update.forgiven", "After a failed sync the engine is awake.", _forgiven),
    strategy_mutant("rollout.failed_update.untorn", "After a sync that broke off the update stays open.", _untorn),
    strategy_mutant(
        "rollout.one_rank_fails.unheard",
        "A sync that fails on one rank goes through on the others.",
        _unheard,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "rollout.one_rank_fails.started_alone",
        "Ranks start their engines although one has none.",
        _started_alone,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "rollout.one_rank_fails.torn_alone",
        "The engines of other ranks go on with the weights that one could not take.",
        _torn_alone,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "rollout.one_rank_fails.apart",
        "Ranks generate without a word to one another.",
        _gathering(_apart),
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant("rollout.sleep.always_asleep", "The engine sleeps whatever the config says.", _always_asleep),
    strategy_mutant("rollout.sleep.never_asleep", "The engine never sleeps.", _never_asleep),
    strategy_mutant("rollout.sleep.never_woken", "The engine is never woken.", _never_woken),
    strategy_mutant(
        "rollout.unknown_engine.fallen_back", "An unknown engine is replaced without a word.", _fallen_back
    ),
)
"""What a strategy can do wrongly around its engine."""
