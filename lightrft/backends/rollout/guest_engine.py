"""The builder of engines that are guests of the process that trains: what "vllm" and "sglang" have in common."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import attrs
import torch

from lightrft.backends.adapters import Adapted, adapter_tensors, only_adapter
from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.random_streams import stream_keys
from lightrft.backends.rollout.request_checks import (
    RequestLimits,
    check_processor,
    check_taken,
    check_within,
    limits_of,
)
from lightrft.backends.rollout.weights import checked, require_all
from lightrft.errors import EngineStateError, UnsupportedError, WeightSyncError
from lightrft.models.images import ModelPrompt, read_prompts
from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    FinishReason,
    Prompt,
    SamplingParams,
)
from lightrft.weight_sync import probe_engine

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Guest", "Made", "build_guest_engine"]

InsideT = TypeVar("InsideT")


@attrs.frozen(kw_only=True)
class Made:
    """What came of one sample.

    Attributes:
        prompt_ids: the prompt as the guest read it.
        token_ids: the completion.
        logprobs: of each of its tokens, at the temperature of the call.
        finish_reason: "stop" or "length".
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@attrs.frozen(kw_only=True, eq=False)
class Guest(Generic[InsideT]):
    """What differs between packages: functions over a handle of their own, which is called the inside of the engine.

    Attributes:
        name: registry key of the engine.
        title: the package's name as it writes it.
        capabilities: what it can do.
        start: takes a model, its processor if it shall read images or videos, the tokens of the longest sequence (None
            for what the package reads off the architecture), and the model with its adapter if that comes apart;
            returns the inside of an engine with the model's architecture and weights of no meaning.
        generate: takes prompts, one for each of B samples, how tokens are drawn (`n` was seen to), and the B keys of
            the samples' random streams, int64; returns what came of each. Whatever ends it before, no request stays.
        begin_load: makes the model ready to be loaded anew.
        load: loads (name, tensor) with the trainer's names, of which it keeps nothing.
        end_load: ends a load, and returns the parameters that it did not reach.
        forget: drops what was computed with earlier weights.
        free_cache: gives back the memory of the key-value cache, which was forgotten.
        restore_cache: allots it again.
        stop: frees everything.
    """

    name: str
    title: str
    capabilities: Capabilities
    start: Callable[[PreTrainedModel, Processor | None, int | None, Adapted | None], InsideT]
    generate: Callable[[InsideT, Sequence[Prompt], SamplingParams, torch.Tensor], list[Made]]
    begin_load: Callable[[InsideT], None]
    load: Callable[[InsideT, Iterable[tuple[str, torch.Tensor]]], None]
    end_load: Callable[[InsideT], Sequence[str]]
    forget: Callable[[InsideT], None]
    free_cache: Callable[[InsideT], None]
    restore_cache: Callable[[InsideT], None]
    stop: Callable[[InsideT], None]


@attrs.define(kw_only=True, eq=False)
class _State(Generic[InsideT]):
    inside: InsideT
    limits: RequestLimits
    shapes: dict[str, torch.Size]
    adapter: frozenset[str]
    has_base: bool = False
    written: set[str]
    is_loading: bool = False


def build_guest_engine(guest: Guest[InsideT]) -> Engine:
    """Return the engine of a package that is made to own its process, and is a guest of this one.

    Args:
        guest: the package's own functions.
    """

    def start(source: EngineSource) -> EngineHandle:
        state, processor = _start(guest, source)
        handle = EngineHandle(
            engine=engine,
            status="awake",
            weight_version=0,
            state=state,
            processor=processor,
            takes_adapter=source.adapted is not None,
        )
        try:
            begin_update(handle)
            put(handle, _tensors_of(source).items())
            commit(handle)
            _require_same(handle, source.adapted or source.model, guest.title)
        except BaseException:
            close(handle)
            raise
        return handle

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        return _generate(guest, _state(handle), handle, prompts, sampling)

    def begin_update(handle: EngineHandle) -> None:
        state = _state(handle)
        state.written.clear()
        end_load(state)
        guest.begin_load(state.inside)
        state.is_loading = True

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        state = _state(handle)
        has_base, state.has_base = state.has_base, False
        guest.load(state.inside, checked(tensors, shapes=state.shapes, written=state.written))
        state.has_base = has_base and state.written <= state.adapter

    def commit(handle: EngineHandle) -> int:
        state = _state(handle)
        require_all(_required(state), state.written)
        _require_none_missed(end_load(state), guest.title)
        state.has_base = True
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        end_load(_state(handle))

    def end_load(state: _State[InsideT]) -> Sequence[str]:
        is_loading, state.is_loading = state.is_loading, False
        return guest.end_load(state.inside) if is_loading else ()

    def sleep(handle: EngineHandle) -> None:
        flush_cache(handle)
        guest.free_cache(_state(handle).inside)

    def wake(handle: EngineHandle) -> None:
        guest.restore_cache(_state(handle).inside)

    def flush_cache(handle: EngineHandle) -> None:
        guest.forget(_state(handle).inside)

    def close(handle: EngineHandle) -> None:
        try:
            guest.stop(_state(handle).inside)
        finally:
            handle.state = None
            gc.collect()  # a guest's objects refer to one another: without it, the weights would stay for a while

    def _state(handle: EngineHandle) -> _State[InsideT]:
        assert isinstance(handle.state, _State)  # noqa: S101 (the handle was made by `start` above)
        return cast("_State[InsideT]", handle.state)

    engine = Engine(
        capabilities=guest.capabilities,
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


def _start(guest: Guest[InsideT], source: EngineSource) -> tuple[_State[InsideT], Processor | None]:
    """Return a running engine whose weights have no meaning yet, and the processor that it reads images with."""
    model = source.model
    if not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"model={type(model).__name__} is no causal language model of transformers, which the engine "
            f"{guest.name!r} needs; use the engine 'scripted' or one of your own."
        )
    check_processor(source)
    processor, limits = source.processor if "images" in guest.capabilities else None, limits_of(model)
    adapted = None if source.adapted is None else only_adapter(source.adapted)
    inside = guest.start(cast("PreTrainedModel", model), processor, limits.context_size, adapted)
    shapes = {name: tensor.shape for name, tensor in _tensors_of(source).items()}
    adapter = frozenset(shapes.keys() - model.state_dict().keys())
    return _State(inside=inside, limits=limits, shapes=shapes, adapter=adapter, written=set()), processor


def _tensors_of(source: EngineSource) -> dict[str, torch.Tensor]:
    """Return all tensors that an engine takes."""
    adapter = {} if source.adapted is None else adapter_tensors(only_adapter(source.adapted))
    return {**source.model.state_dict(), **adapter}


def _required(state: _State[InsideT]) -> Collection[str]:
    """Return what an update has to bring: everything, or the adapter alone where all below it lies there whole."""
    is_adapter_alone = state.has_base and bool(state.adapter) and state.written <= state.adapter
    return state.adapter if is_adapter_alone else state.shapes


def _require_same(handle: EngineHandle, model: nn.Module, title: str) -> None:
    """Refuse a model that the guest computes or loads otherwise, before anything is made of it."""
    found = probe_engine(handle, model)
    if not found.agrees:
        raise UnsupportedError(
            f"model={type(model).__name__} is another one in {title}: a logprob is {found.difference:.3g} nats from "
            "that of its own forward; use the engine 'hf'."
        )


def _require_none_missed(missed: Sequence[str], title: str) -> None:
    if missed:
        shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
        raise WeightSyncError(
            f"{len(missed)} parameters of {title}'s model were not written ({shown}); its names differ."
        )


def _generate(
    guest: Guest[InsideT],
    state: _State[InsideT],
    handle: EngineHandle,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> list[Completion]:
    check_taken(prompts, engine=guest.name, takes=guest.capabilities)
    read = read_prompts(prompts, handle.processor)
    check_within(state.limits, [prompt.token_ids for prompt in read], sampling)
    places = [place for place in range(len(prompts)) for _ in range(sampling.n)]
    samples = list(range(sampling.n)) * len(prompts)
    keys_B = stream_keys(sampling.seed, [sampling.first_prompt + place for place in places], samples)
    made_B = guest.generate(state.inside, [prompts[place] for place in places], sampling, keys_B)
    _require_finite(guest, state.inside, made_B)
    return [
        _completion(made, prompt=read[place], sample=sample, weight_version=handle.weight_version, title=guest.title)
        for made, place, sample in zip(made_B, places, samples, strict=True)
    ]


def _require_finite(guest: Guest[InsideT], inside: InsideT, made_B: Sequence[Made]) -> None:
    for made in made_B:
        if not all(map(math.isfinite, made.logprobs)):
            # attention multiplies what others have left in the cache by 0, which makes no number of one that is none
            guest.forget(inside)
            guest.free_cache(inside)
            guest.restore_cache(inside)
            raise EngineStateError(
                f"generate: a logprob is {made.logprobs}; the weights are not finite, sync them again."
            )


def _completion(made: Made, *, prompt: ModelPrompt, sample: int, weight_version: int, title: str) -> Completion:
    if made.prompt_ids != prompt.token_ids:
        raise EngineStateError(
            f"generate: {title} read {len(made.prompt_ids)} tokens of a prompt, which are not the "
            f"{len(prompt.token_ids)} of the processor; use the engine 'hf' for it."
        )
    return Completion(
        prompt_ids=made.prompt_ids,
        token_ids=made.token_ids,
        logprobs=made.logprobs,
        finish_reason=made.finish_reason,
        weight_version=weight_version,
        sample_index=sample,
    )
