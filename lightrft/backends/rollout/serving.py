"""The rollout part of a strategy, over any engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError, UnsupportedError
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

    from lightrft.backends.adapters import Adapted
    from lightrft.strategy.config import StrategyConfig
    from lightrft.strategy.protocols.collectives import Collectives
    from lightrft.strategy.protocols.training import NamedTensors, UnwrapModel

__all__ = ["FindEngine", "RolloutFunctions", "build_rollout", "build_setup_inference_engine"]


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
    config: StrategyConfig,
    collectives: Collectives,
    *,
    find_engine: FindEngine,
    named_tensors: NamedTensors,
    unwrap_model: UnwrapModel,
) -> SetupInferenceEngine:
    """Return the function that starts engines from a registry: one on every rank, or none.

    Args:
        config: the strategy's settings; `engine_type` is the default engine.
        collectives: what the ranks do together; one rank is a world of one.
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
        from lightrft.backends.plain_model import build_plain_model
        from lightrft.failures import together

        chosen = config or default
        started: list[EngineHandle] = []

        def find() -> Engine:
            return _placed(find_engine(chosen.type), chosen)

        def start() -> EngineHandle:
            is_sent = chosen.adapters == "sent"
            started.append(engine.start(_source(plain, tokenizer, processor, is_sent=is_sent)))
            if is_sent and not started[0].takes_adapter:
                raise _takes_no_adapter(chosen)
            return started[0]

        engine = together(collectives, find)
        plain = build_plain_model(unwrap_model=unwrap_model, named_tensors=named_tensors)(actor)
        try:
            handle = together(collectives, start)
        except BaseException:
            for each in started:  # another rank has none
                each.engine.close(each)
            raise
        handle.weights = _weights_of(handle, actor, named_tensors=named_tensors, unwrap_model=unwrap_model)
        return handle

    return setup_inference_engine


def _placed(build: BuildEngine, config: EngineConfig) -> Engine:
    """Return the engine in the process where its settings want it."""
    if config.process == "trainer":
        engine = build(config)
        if config.tensor_parallel_size > 1 and "tensor_parallel" not in engine.capabilities:
            raise UnsupportedError(
                f"tensor_parallel_size={config.tensor_parallel_size!r} is not for engine.type={config.type!r}, which "
                "runs whole on every rank; use the engine 'vllm', or tensor_parallel_size=1."
            )
        return engine
    if config.adapters == "sent":
        raise _takes_no_adapter(config)  # before a process starts for nothing
    from lightrft.backends.rollout.apart.engine import build_apart  # imports torch: see below

    return build_apart(build, config)


def _takes_no_adapter(config: EngineConfig) -> UnsupportedError:
    return UnsupportedError(
        f"engine.adapters='sent' is not for the engine {config.type!r} with engine.process={config.process!r}; use "
        "engine.adapters='merged', or the engine 'vllm' in the trainer's process."
    )


def _source(
    plain: nn.Module, tokenizer: Tokenizer | None, processor: Processor | None, *, is_sent: bool
) -> EngineSource:
    """Return what an engine is started from: the model, with its adapter merged into it or beside it."""
    from lightrft.backends.adapters import base_model, has_adapters, merged_model  # imports torch

    if is_sent:
        base = base_model(_sendable(plain))
        return EngineSource(model=base, tokenizer=tokenizer, processor=processor, adapted=plain)
    model = merged_model(plain) if has_adapters(plain) else plain
    return EngineSource(model=model, tokenizer=tokenizer, processor=processor)


def _sendable(plain: nn.Module) -> Adapted:
    """Return a model whose training is all in its adapter."""
    from lightrft.backends.adapters import base_name, has_adapters, only_adapter, owners_of  # imports torch

    if not has_adapters(plain):
        raise ConfigError(
            "engine.adapters='sent' has nothing to send, as the model has no adapter of peft; use "
            "engine.adapters='merged', or wrap the model with peft.get_peft_model."
        )
    found = only_adapter(plain)
    owners = owners_of(found)
    trained = [name for name, parameter in found.model.named_parameters() if parameter.requires_grad]
    outside = [base for name in trained if (base := base_name(name, owners, found.adapter)) is not None]
    if outside:
        shown = f"{outside[0]} is" if len(outside) == 1 else f"{outside[0]} and {len(outside) - 1} more are"
        raise UnsupportedError(
            f"engine.adapters='sent': {shown} trained outside of the adapter (requires_grad) and would never reach "
            "the engine; use engine.adapters='merged', or freeze what is not of the adapter."
        )
    return found


def _weights_of(
    engine: EngineHandle, actor: nn.Module, *, named_tensors: NamedTensors, unwrap_model: UnwrapModel
) -> StreamWeights:
    """Return what streams the tensors that an engine takes, for as long as there is the actor."""

    def weights() -> Iterable[tuple[str, torch.Tensor]]:
        from lightrft.backends.adapters import has_adapters, merged_stream, parted_stream  # imports torch: see below

        inner, tensors = unwrap_model(actor), named_tensors(actor)
        if engine.takes_adapter:
            return parted_stream(inner, tensors, with_base=engine.status == "torn")
        return merged_stream(inner, tensors) if has_adapters(inner) else tensors

    return weights


def build_rollout(
    config: StrategyConfig,
    collectives: Collectives,
    *,
    find_engine: FindEngine,
    named_tensors: NamedTensors,
    unwrap_model: UnwrapModel,
) -> RolloutFunctions:
    """Return the rollout functions of a strategy in which every rank has an engine of its own.

    Args:
        config: the strategy's settings.
        collectives: what the ranks do together; one rank is a world of one.
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
        from lightrft.backends.rollout.gathering import build_gather_and_generate  # imports torch: see below

        return build_gather_and_generate(collectives, engine_generate_local)(engine, prompts, sampling)

    def update_engine_weights(engine: EngineHandle, actor: nn.Module) -> SyncReport:
        # imports torch, which building a strategy does not need
        from lightrft.backends.rollout.syncing import sync_engines

        return sync_engines(
            collectives,
            engine,
            actor,
            weights=_weights_of(engine, actor, named_tensors=named_tensors, unwrap_model=unwrap_model),
            bf16=config.bf16,
        )

    def maybe_sleep_inference_engine(engine: EngineHandle) -> None:
        if config.enable_engine_sleep:
            engine.engine.sleep(engine)

    def wakeup_inference_engine(engine: EngineHandle) -> None:
        engine.engine.wake(engine)

    return RolloutFunctions(
        setup_inference_engine=build_setup_inference_engine(
            config, collectives, find_engine=find_engine, named_tensors=named_tensors, unwrap_model=unwrap_model
        ),
        engine_generate_local=engine_generate_local,
        gather_and_generate=gather_and_generate,
        update_engine_weights=update_engine_weights,
        maybe_sleep_inference_engine=maybe_sleep_inference_engine,
        wakeup_inference_engine=wakeup_inference_engine,
    )
