"""The engine "sglang": completions of SGLang, in this process and on its CPU."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import attrs
import torch

from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.random_streams import stream_keys
from lightrft.backends.rollout.request_checks import RequestLimits, check_within, limits_of
from lightrft.backends.rollout.sglang_inside import (
    Inside,
    forget,
    free_cache,
    restore_cache,
    start_inside,
    stop_inside,
)
from lightrft.backends.rollout.sglang_load import begin_load, end_load, load
from lightrft.backends.rollout.sglang_package import Sglang, import_sglang
from lightrft.backends.rollout.sglang_requests import Made, run_requests
from lightrft.backends.rollout.weights import checked, require_all
from lightrft.errors import EngineStateError, UnsupportedError, WeightSyncError
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    FinishReason,
    Prompt,
    SamplingParams,
)
from lightrft.weight_sync import PROBE_BOUNDS, probe_engine

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from lightrft.config.sections import EngineConfig

__all__ = ["build_sglang"]


@attrs.define(kw_only=True, eq=False)
class _State:
    inside: Inside
    limits: RequestLimits
    shapes: dict[str, torch.Size]
    written: set[str]


def build_sglang(config: EngineConfig) -> Engine:
    """Return the engine "sglang".

    It takes the causal language models of transformers that SGLang has an architecture for. Asleep, it holds weights
    and no key-value cache: on a CPU there is no other memory to which weights could go.

    Args:
        config: `batch_size` bounds the sequences that are decoded at once, `cache_gb` is the size of the key-value
            cache.

    Raises:
        MissingPackageError: SGLang is not installed, or in a version that is not known.
        UnsupportedError: the machine has a GPU, or SGLang was imported for another device.
    """
    package = import_sglang()

    def start(source: EngineSource) -> EngineHandle:
        state = _start(package, source.model, config)
        handle = EngineHandle(engine=engine, status="awake", weight_version=0, state=state)
        try:
            _require_same(handle, source.model)
        except BaseException:
            close(handle)
            raise
        return handle

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        state = _state(handle)
        for index, prompt in enumerate(prompts):
            if prompt.images:
                raise UnsupportedError(
                    f"prompts[{index}] has images and the engine 'sglang' takes text; leave them out."
                )
        check_within(state.limits, [prompt.token_ids for prompt in prompts], sampling)
        outputs = _run(state.inside, prompts, sampling)
        return [
            _completion(handle, prompts[place // sampling.n], output, place % sampling.n)
            for place, output in enumerate(outputs)
        ]

    def begin_update(handle: EngineHandle) -> None:
        _state(handle).written.clear()
        begin_load(_state(handle).inside)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        state = _state(handle)
        load(state.inside, checked(tensors, shapes=state.shapes, written=state.written))

    def commit(handle: EngineHandle) -> int:
        state = _state(handle)
        require_all(state.shapes, state.written)
        _require_reached(end_load(state.inside))
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        if _state(handle).inside.reached is not None:
            end_load(_state(handle).inside)

    def sleep(handle: EngineHandle) -> None:
        flush_cache(handle)
        free_cache(_state(handle).inside)

    def wake(handle: EngineHandle) -> None:
        restore_cache(_state(handle).inside)

    def flush_cache(handle: EngineHandle) -> None:
        forget(_state(handle).inside)

    def close(handle: EngineHandle) -> None:
        try:
            stop_inside(_state(handle).inside)
        finally:
            handle.state = None
            gc.collect()  # SGLang's objects refer to one another: without it, the weights would stay for a while

    engine = Engine(
        capabilities=frozenset({"sampling"}),
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


def _start(package: Sglang, model: nn.Module, config: EngineConfig) -> _State:
    if not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"model={type(model).__name__} is no causal language model of transformers, which the engine 'sglang' "
            "needs; use the engine 'scripted' or one of your own."
        )
    limits, weights = limits_of(model), model.state_dict()
    inside = start_inside(
        package,
        cast("PreTrainedModel", model),
        context=limits.context_size,
        batch_size=config.batch_size,
        cache_bytes=int(config.cache_gb * 1e9),
    )
    try:
        begin_load(inside)
        load(inside, weights.items())
        _require_reached(end_load(inside))
    except BaseException:
        stop_inside(inside)
        raise
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    return _State(inside=inside, limits=limits, shapes=shapes, written=set())


def _require_same(handle: EngineHandle, model: nn.Module) -> None:
    """Refuse a model that SGLang computes or loads otherwise, before anything is made of it."""
    found = probe_engine(handle, model)
    if found.difference > PROBE_BOUNDS[next(model.parameters()).dtype] * found.scale:
        raise UnsupportedError(
            f"model={type(model).__name__} is another one in SGLang: a logprob is {found.difference:.3g} nats from "
            "that of its own forward; use the engine 'hf'."
        )


def _run(inside: Inside, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Made]:
    """Return what came of each sample, prompt by prompt; each is a request with a random stream of its own."""
    numbers = [sampling.first_prompt + index for index in range(len(prompts)) for _ in range(sampling.n)]
    keys_B = stream_keys(sampling.seed, numbers, list(range(sampling.n)) * len(prompts))
    requests = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
    return run_requests(inside, requests, sampling, keys_B=keys_B)


def _completion(handle: EngineHandle, prompt: Prompt, made: Made, sample_index: int) -> Completion:
    if not all(map(math.isfinite, made.logprobs)):
        raise EngineStateError(f"generate: a logprob is {made.logprobs}; the weights are not finite, sync them again.")
    return Completion(
        prompt_ids=prompt.token_ids,
        token_ids=made.token_ids,
        logprobs=made.logprobs,
        finish_reason=cast("FinishReason", made.finish_reason),
        weight_version=handle.weight_version,
        sample_index=sample_index,
    )


def _require_reached(missed: Sequence[str]) -> None:
    if missed:
        shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
        raise WeightSyncError(
            f"{len(missed)} parameters of SGLang's model were not written ({shown}); its names differ."
        )


def _state(handle: EngineHandle) -> _State:
    assert isinstance(handle.state, _State)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
