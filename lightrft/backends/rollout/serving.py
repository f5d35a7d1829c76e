"""The rollout part of a strategy, over any engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineCrashError, WeightSyncError
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import (
    BuildEngine,
    Completion,
    Engine,
    EngineGenerateLocal,
    EngineHandle,
    EngineSource,
    GatherAndGenerate,
    MaybeSleepInferenceEngine,
    Prompt,
    SamplingParams,
    SetupInferenceEngine,
    StreamWeights,
    SyncReport,
    Tokenizer,
    UpdateEngineWeights,
    WakeupInferenceEngine,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightrft.strategy.config import StrategyConfig
    from lightrft.strategy.protocols.training import NamedTensors, UnwrapModel

__all__ = ["FindEngine", "RolloutFunctions", "alone", "build_rollout", "build_setup_inference_engine"]


class FindEngine(Protocol):
    """Looks an engine up."""

    def __call__(self, key: str, /) -> BuildEngine:
        """Return the builder of the engine registered as `key`.

        Args:
            key: registry key.

        Raises:
            ConfigError: there is none.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class RolloutFunctions:
    """The functions behind the protocol `Rollout`."""

    setup_inference_engine: SetupInferenceEngine
    engine_generate_local: EngineGenerateLocal
    gather_and_generate: GatherAndGenerate
    update_engine_weights: UpdateEngineWeights
    maybe_sleep_inference_engine: MaybeSleepInferenceEngine
    wakeup_inference_engine: WakeupInferenceEngine


def build_setup_inference_engine(
    config: StrategyConfig, *, find_engine: FindEngine, named_tensors: NamedTensors, unwrap_model: UnwrapModel
) -> SetupInferenceEngine:
    """Return the function that starts engines from a registry.

    Args:
        config: the strategy's settings; `engine_type` is the default engine.
        find_engine: looks an engine up.
        named_tensors: the strategy's stream of full tensors.
        unwrap_model: undoes the strategy's `prepare`.
    """
    default = EngineConfig(type=config.engine_type)

    def setup_inference_engine(
        config: EngineConfig | None = None,
        *,
        actor: nn.Module,
        tokenizer: Tokenizer | None = None,
        processor: Processor | None = None,
    ) -> EngineHandle:
        # both import torch: see below
        from lightrft.backends.adapters import has_adapters, merged_model
        from lightrft.backends.plain_model import build_plain_model

        chosen = config or default
        engine = _placed(find_engine(chosen.type), chosen)
        plain = build_plain_model(unwrap_model=unwrap_model, named_tensors=named_tensors)(actor)
        model = merged_model(plain) if has_adapters(plain) else plain
        handle = engine.start(EngineSource(model=model, tokenizer=tokenizer, processor=processor))
        handle.weights = _weights_of(actor, named_tensors=named_tensors, unwrap_model=unwrap_model)
        return handle

    return setup_inference_engine


def _placed(build: BuildEngine, config: EngineConfig) -> Engine:
    """Return the engine in the process where its settings want it."""
    if config.process == "trainer":
        return build(config)
    from lightrft.backends.rollout.apart.engine import build_apart  # imports torch: see below

    return build_apart(build, config)


def _weights_of(actor: nn.Module, *, named_tensors: NamedTensors, unwrap_model: UnwrapModel) -> StreamWeights:
    """Return what streams the tensors that an engine takes, for as long as there is the actor."""

    def weights() -> Iterable[tuple[str, torch.Tensor]]:
        from lightrft.backends.adapters import has_adapters, merged_stream  # imports torch: see below

        inner, tensors = unwrap_model(actor), named_tensors(actor)
        return merged_stream(inner, tensors) if has_adapters(inner) else tensors

    return weights


def build_rollout(
    config: StrategyConfig, *, find_engine: FindEngine, named_tensors: NamedTensors, unwrap_model: UnwrapModel
) -> RolloutFunctions:
    """Return the rollout functions of a strategy in which every rank has an engine of its own.

    Args:
        config: the strategy's settings.
        find_engine: looks an engine up.
        named_tensors: the strategy's stream of full tensors.
        unwrap_model: undoes the strategy's `prepare`.
    """

    def engine_generate_local(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        return engine.engine.generate(engine, prompts, sampling)

    def gather_and_generate(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        return engine_generate_local(engine, prompts, sampling)

    def maybe_sleep_inference_engine(engine: EngineHandle) -> None:
        if config.enable_engine_sleep:
            engine.engine.sleep(engine)

    def wakeup_inference_engine(engine: EngineHandle) -> None:
        engine.engine.wake(engine)

    return RolloutFunctions(
        setup_inference_engine=build_setup_inference_engine(
            config, find_engine=find_engine, named_tensors=named_tensors, unwrap_model=unwrap_model
        ),
        engine_generate_local=engine_generate_local,
        gather_and_generate=gather_and_generate,
        update_engine_weights=_build_update(config, named_tensors=named_tensors, unwrap_model=unwrap_model),
        maybe_sleep_inference_engine=maybe_sleep_inference_engine,
        wakeup_inference_engine=wakeup_inference_engine,
    )


def alone(rollout: RolloutFunctions) -> RolloutFunctions:
    """Return the rollout functions of a strategy with one engine alone, which is mended where its process ends.

    Args:
        rollout: those of one rank.
    """

    def gather_and_generate(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        from lightrft.backends.rollout.apart.mending import generate_or_mend  # imports torch: see below

        return generate_or_mend(engine, prompts, sampling)

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        version = engine.weight_version
        try:
            return rollout.update_engine_weights(engine, actor)
        except EngineCrashError:
            engine.weight_version = version  # it may have ended after the commit
            return rollout.update_engine_weights(engine, actor)

    return attrs.evolve(rollout, gather_and_generate=gather_and_generate, update_engine_weights=update_engine_weights)


def _build_update(
    config: StrategyConfig, *, named_tensors: NamedTensors, unwrap_model: UnwrapModel
) -> UpdateEngineWeights:
    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        # both import torch, which building a strategy does not need
        import torch

        from lightrft.weight_sync import PROBE_BOUNDS, probe_engine, transfer_weights

        engine.weights = _weights_of(actor, named_tensors=named_tensors, unwrap_model=unwrap_model)
        num_tensors, num_bytes = transfer_weights(engine.weights(), engine)
        try:
            found = probe_engine(engine, actor)
        except BaseException:
            engine.engine.abort(engine)  # what nobody could verify must not generate
            raise
        bound = PROBE_BOUNDS[torch.bfloat16 if config.bf16 else torch.float32] * found.scale
        if found.difference > bound:
            engine.engine.abort(engine)
            raise WeightSyncError(
                f"weight_version={engine.weight_version} does not hold the trainer's weights: a logprob is "
                f"{found.difference:.3g} nats from the trainer's (bound {bound:.3g}); sync again."
            )
        return SyncReport(
            weight_version=engine.weight_version,
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            max_logprob_difference=found.difference,
        )

    return update_engine_weights
