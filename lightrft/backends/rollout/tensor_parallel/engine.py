"""An engine that several ranks run together: every call is made by all of them, and ends alike on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import attrs
import torch

from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.request_checks import check_within, limits_of
from lightrft.backends.rollout.tensor_parallel.agreement import (
    Said,
    State,
    agreed,
    hear,
    raise_first,
    require_whole,
    tried,
)
from lightrft.backends.rollout.tensor_parallel.digests import digests_of
from lightrft.backends.rollout.tensor_parallel.ranks import RankGroup, join_ranks, leave_ranks
from lightrft.backends.rollout.tensor_parallel.requests import Asked, joined
from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError
from lightrft.failures import failure_of
from lightrft.models.images import read_prompts
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    Prompt,
    SamplingParams,
)

__all__ = ["build_tensor_parallel"]


def build_tensor_parallel(engine: Engine, config: EngineConfig) -> Engine:
    """Return an engine that neighbouring ranks run together, each with a shard of the weights.

    All ranks of a group make the same calls in the same order, each `generate` with prompts of its own, and get their
    own completions back. Before a call returns, ranks tell one another how it went: what one refuses is refused on all
    of them, so that no rank waits for another one that has given up. A rank that is gone, or an error in the middle of
    a forward pass, ends the engine on all of them. `close` waits for nobody.

    Args:
        engine: what one rank runs; its `generate` is called on all ranks with the same request, and where it raises an
            `EngineCrashError` it lets go of the other ranks.
        config: `tensor_parallel_size` ranks make a group, and wait for one another for `timeout_seconds`.
    """

    def start(source: EngineSource) -> EngineHandle:
        group = join_ranks(config.tensor_parallel_size, timeout=config.timeout_seconds)
        try:
            shard = _start_shard(engine, source, group)
        except BaseException:
            leave_ranks(group)
            raise
        state = State(shard=shard, group=group, limits=limits_of(source.model))
        return EngineHandle(engine=whole, status="awake", weight_version=0, state=state, processor=shard.processor)

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        return _generate(engine, handle, prompts, sampling)

    def begin_update(handle: EngineHandle) -> None:
        def begin(shard: EngineHandle) -> None:
            if shard.status == "updating":  # the last update failed on another rank
                engine.abort(shard)
            engine.begin_update(shard)

        _state(handle).is_given_up = False
        _together(handle, "begin_update", begin)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        def put_shard(shard: EngineHandle) -> None:
            engine.put(shard, tensors)

        _together(handle, "put", put_shard)

    def commit(handle: EngineHandle) -> int:
        _together(handle, "commit", engine.commit)
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        state = _state(handle)
        if state.is_given_up or state.lost:
            engine.abort(state.shard)
        else:
            _together(handle, "abort", engine.abort)

    def sleep(handle: EngineHandle) -> None:
        _together(handle, "sleep", engine.sleep)

    def wake(handle: EngineHandle) -> None:
        _together(handle, "wake", engine.wake)

    def flush_cache(handle: EngineHandle) -> None:
        _together(handle, "flush_cache", engine.flush_cache)

    def close(handle: EngineHandle) -> None:
        state = _state(handle)
        try:
            engine.close(state.shard)
        finally:
            leave_ranks(state.group)
            handle.state = None

    whole = guarded(
        Engine(
            capabilities=engine.capabilities,
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
    )
    return whole


def _start_shard(engine: Engine, source: EngineSource, group: RankGroup) -> EngineHandle:
    """Return the engine of this rank, started beside those of the others from the same model."""
    _require_same_source(group, hear(group, Said(call="start", digests=digests_of(source))))

    def start() -> EngineHandle:
        return engine.start(source)

    shard, error = tried(start)
    try:
        every = hear(group, Said(call="start", failure=None if error is None else failure_of(error)))
        raise_first(group, every, error)
    except BaseException:
        if shard is not None:
            engine.close(shard)
        raise
    assert shard is not None  # noqa: S101 (nothing was raised)
    return shard


def _require_same_source(group: RankGroup, every: Sequence[Said]) -> None:
    for rank, said in zip(group.ranks, every, strict=True):
        for name, digest in said.digests.items():
            if digest != every[0].digests[name]:
                raise ConfigError(
                    f"{name}={digest.partition('#')[0]} on rank {rank} is not that of rank {group.ranks[0]}, and both "
                    f"run one engine; give every rank the same {name}."
                )


def _generate(
    engine: Engine, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    state = _state(handle)
    require_whole(state)
    shard, group = state.shard, state.group
    shard.weight_version = handle.weight_version  # it counts a commit that failed on another rank
    asked = Asked(first_prompt=sampling.first_prompt, prompts=tuple(prompts))

    def check() -> None:
        check_within(state.limits, [prompt.token_ids for prompt in read_prompts(prompts, handle.processor)], sampling)

    said = Said(call="generate", asked=asked, sampling=attrs.evolve(sampling, first_prompt=0))
    _, every = agreed(handle, state, said, check)
    _require_same_sampling(group, every)
    calls, parts = joined([each.asked for each in every if each.asked is not None])

    def make() -> list[list[Completion]]:
        return [
            engine.generate(shard, call.prompts, attrs.evolve(sampling, first_prompt=call.first_prompt))
            for call in calls
        ]

    made, _ = agreed(handle, state, Said(call="generate"), make)
    if not prompts:
        return []
    part = parts[group.place]
    start = part.start * sampling.n
    return made[part.call][start : start + len(prompts) * sampling.n]


def _require_same_sampling(group: RankGroup, every: Sequence[Said]) -> None:
    for rank, said in zip(group.ranks, every, strict=True):
        if said.sampling != every[0].sampling:
            raise ConfigError(
                f"sampling={said.sampling!r} on rank {rank} is not that of rank {group.ranks[0]}, and both run one "
                "engine; sample alike on all ranks."
            )


def _together(handle: EngineHandle, call: str, act: Callable[[EngineHandle], object]) -> None:
    """Call a function of the shards on all ranks."""
    state = _state(handle)
    require_whole(state)

    def act_here() -> None:
        act(state.shard)

    try:
        agreed(handle, state, Said(call=call), act_here)
    except Exception:
        state.is_given_up = True
        raise


def _state(handle: EngineHandle) -> State:
    assert isinstance(handle.state, State)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
