"""The engine "hf": completions of a transformers model in this process, by its own copy of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import attrs
import torch

from lightrft.backends.rollout.hf.generation import TokenGenerator, build_token_generator
from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.request_checks import check_processor, placeholders
from lightrft.backends.rollout.weights import ModelCopy, begin_write, check_coverage, copy_model, write_tensors
from lightrft.errors import UnsupportedError
from lightrft.models.images import read_prompts
from lightrft.strategy.protocols.rollout import Completion, Engine, EngineHandle, EngineSource, Prompt, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightrft.config.sections import EngineConfig

__all__ = ["build_hf"]


@attrs.define(kw_only=True, eq=False)
class _State:
    weights: ModelCopy
    generator: TokenGenerator
    device: torch.device
    is_stale: bool = False  # whether the generator must read the weights again before it is used


def build_hf(config: EngineConfig) -> Engine:
    """Return the engine "hf".

    It takes any causal language model of transformers; Llama, Qwen2 and Qwen3 are decoded by functions of ours that
    read the model's weights, all others by the model's own forward. With a processor it takes images and videos, in
    any mixture with text. Asleep, its weights lie in main memory.

    Args:
        config: `batch_size` bounds the sequences that are decoded at once.
    """

    def start(source: EngineSource) -> EngineHandle:
        if not hasattr(source.model, "get_decoder"):
            raise UnsupportedError(
                f"model={type(source.model).__name__} is no causal language model of transformers, which the engine "
                "'hf' needs; use the engine 'scripted' or one of your own."
            )
        check_processor(source)
        weights = copy_model(source.model)
        generator = build_token_generator(
            cast("PreTrainedModel", weights.model),
            max_batch_size=config.batch_size,
            never=placeholders(source.processor),
        )
        device = next(weights.model.parameters()).device
        state = _State(weights=weights, generator=generator, device=device)
        return EngineHandle(engine=engine, status="awake", weight_version=0, state=state, processor=source.processor)

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        read = read_prompts(prompts, handle.processor)
        sequences = _fresh_generator(_state(handle)).generate(read, sampling)
        return [
            Completion(
                prompt_ids=read[sequence.prompt_index - sampling.first_prompt].token_ids,
                token_ids=sequence.token_ids,
                logprobs=sequence.logprobs,
                finish_reason=sequence.finish_reason,
                weight_version=handle.weight_version,
                sample_index=sequence.sample_index,
            )
            for sequence in sequences
        ]

    def begin_update(handle: EngineHandle) -> None:
        begin_write(_state(handle).weights)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        write_tensors(_state(handle).weights, tensors)

    def commit(handle: EngineHandle) -> int:
        check_coverage(_state(handle).weights)
        _state(handle).is_stale = True
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        del handle  # what was written stays; the status keeps it from being used

    def sleep(handle: EngineHandle) -> None:
        state = _state(handle)
        state.is_stale = True  # whatever comes of the rest
        state.generator.release()
        state.weights.model.to("cpu")

    def wake(handle: EngineHandle) -> None:
        state = _state(handle)
        state.weights.model.to(state.device)
        state.is_stale = True

    def flush_cache(handle: EngineHandle) -> None:
        del handle  # a key-value cache lives as long as one call of generate

    def close(handle: EngineHandle) -> None:
        handle.state = None

    engine = Engine(
        capabilities=frozenset({"images", "sampling", "seeds", "videos"}),
        start=start,
        generate=generate,
        begin_update=begin_update,
        put=put,
        commit=commit,
        abort=abort,
        sleep=sleep,
        wake=wake,
        flush_cache=flush_cache,
        close=close,
    )
    return guarded(engine)


def _fresh_generator(state: _State) -> TokenGenerator:
    if state.is_stale:
        state.generator.refresh()
        state.is_stale = False
    return state.generator


def _state(handle: EngineHandle) -> _State:
    assert isinstance(handle.state, _State)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
