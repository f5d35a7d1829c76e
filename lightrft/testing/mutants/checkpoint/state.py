"""Strategies whose checkpoints lose or mix up a part of the state."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import attrs
import torch

from lightrft.backends.streams import capture_streams, restore_streams
from lightrft.backends.training.window import MICRO_BATCHES
from lightrft.strategy.protocols import Json, LoadedCheckpoint
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.checkpoint.calls import (
    LoadCall,
    SaveCall,
    WrongLoad,
    broken_load,
    broken_save,
    do_load,
    do_save,
    parts_of,
)
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant
from lightrft.testing.replicated import build_simulated

__all__ = ["MUTANTS"]


def _losing(keep: Callable[[LoadCall], Callable[[], object]]) -> WrongLoad:
    """Return a load after which a part of the state is put back to what it was."""

    def wrong(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
        put_back = keep(call)
        loaded = do_load(strategy, call)
        put_back()
        return loaded

    return wrong


def _keep_optimizers(call: LoadCall) -> Callable[[], None]:
    optimizers = [optimizer for _, optimizer, _ in parts_of(call).values() if optimizer is not None]
    states = [dict(optimizer.state) for optimizer in optimizers]

    def put_back() -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)

    return put_back


def _keep_rates(call: LoadCall) -> Callable[[], None]:
    groups = [group for _, optimizer, _ in parts_of(call).values() if optimizer for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]

    def put_back() -> None:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    return put_back


def _keep_schedules(call: LoadCall) -> Callable[[], None]:
    schedules = [scheduler for _, _, scheduler in parts_of(call).values() if scheduler is not None]
    states = [dict(scheduler.state_dict()) for scheduler in schedules]

    def put_back() -> None:
        for scheduler, state in zip(schedules, states, strict=True):
            scheduler.load_state_dict(state)

    return put_back


def _empty_windows(call: LoadCall) -> Callable[[], None]:
    def put_back() -> None:
        for _, optimizer, _ in parts_of(call).values():
            if optimizer is not None:
                optimizer.param_groups[0][MICRO_BATCHES] = 0

    return put_back


def _drop_gradients(call: LoadCall) -> Callable[[], None]:
    def put_back() -> None:
        for model, _, _ in parts_of(call).values():
            model.zero_grad()

    return put_back


def _keep_streams(call: LoadCall) -> Callable[[], None]:
    del call
    streams = capture_streams()

    def put_back() -> None:
        restore_streams(streams)

    return put_back


def _drop_second_normals(call: LoadCall) -> Callable[[], None]:
    del call

    def put_back() -> None:
        streams = capture_streams()
        numpy = streams.numpy if not isinstance(streams.numpy, tuple) else (*streams.numpy[:3], 0, 0.0)
        restore_streams(attrs.evolve(streams, python=(*streams.python[:2], None), numpy=numpy))

    return put_back


def _one_stream_for_all(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    loaded = do_load(strategy, call)
    torch.set_rng_state(strategy.broadcast(torch.get_rng_state()))
    return loaded


def _losing_client_state(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    return attrs.evolve(do_load(strategy, call), client_state={})


def _crossed(strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
    if isinstance(call.model, Mapping) and {"actor", "critic"} <= set(call.model):
        crossed = {**call.model, "actor": call.model["critic"], "critic": call.model["actor"]}
        return do_load(strategy, attrs.evolve(call, model=crossed))
    return do_load(strategy, call)


def _save_draws(strategy: Strategy, call: SaveCall, /) -> Path:
    torch.rand(())
    return do_save(strategy, call)


def _save_ends_window(strategy: Strategy, call: SaveCall, /) -> Path:
    path = do_save(strategy, call)
    for model, _, _ in parts_of(call).values():
        model.zero_grad()
    return path


def _client_state_in_float(strategy: Strategy, call: SaveCall, /) -> Path:
    state = {
        key: float(value) if type(value) is int and abs(value) < 2**60 else value
        for key, value in (call.client_state or {}).items()
    }
    return do_save(strategy, attrs.evolve(call, client_state=state))


def _client_state_without_signs(strategy: Strategy, call: SaveCall, /) -> Path:
    state = {
        key: 0.0 if value == 0 and type(value) is float else value for key, value in (call.client_state or {}).items()
    }
    return do_save(strategy, attrs.evolve(call, client_state=state))


def _client_state_with_lists(strategy: Strategy, call: SaveCall, /) -> Path:
    state = _listed(dict(call.client_state or {}))
    return do_save(strategy, attrs.evolve(call, client_state=cast("dict[str, Json]", state)))


def _listed(value: object) -> object:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in cast("dict[object, object]", value).items()}
    return [_listed(item) for item in cast("list[object]", value)] if isinstance(value, list | tuple) else value


def _client_state_as_text(strategy: Strategy, call: SaveCall, /) -> Path:
    text = json.dumps(dict(call.client_state or {}), default=str)
    return do_save(strategy, attrs.evolve(call, client_state=json.loads(text)))


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "checkpoint.resume.optimizer_lost",
        "The optimizer's running averages are not restored.",
        broken_load(_losing(_keep_optimizers)),
    ),
    strategy_mutant(
        "checkpoint.resume.rate_kept",
        "The optimizer keeps the learning rate that it was made with.",
        broken_load(_losing(_keep_rates)),
    ),
    strategy_mutant(
        "checkpoint.resume.schedule_lost",
        "The learning-rate schedule begins anew.",
        broken_load(_losing(_keep_schedules)),
    ),
    strategy_mutant(
        "checkpoint.resume.position_lost",
        "The position inside the accumulation window is not restored.",
        broken_load(_losing(_empty_windows)),
    ),
    strategy_mutant(
        "checkpoint.resume.gradients_lost",
        "The gradients of an open accumulation window are not restored.",
        broken_load(_losing(_drop_gradients)),
    ),
    strategy_mutant(
        "checkpoint.resume.streams_lost",
        "The random streams are not restored.",
        broken_load(_losing(_keep_streams)),
    ),
    strategy_mutant(
        "checkpoint.resume.second_normals_lost",
        "Of a pair of normal draws of which one was taken, the other is not restored.",
        broken_load(_losing(_drop_second_normals)),
    ),
    strategy_mutant(
        "checkpoint.resume.one_stream_for_all",
        "All ranks get the random stream of the first one.",
        broken_load(_one_stream_for_all),
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "checkpoint.client_state.client_state_lost",
        "client_state comes back empty, and with it the position of the data is lost.",
        broken_load(_losing_client_state),
    ),
    strategy_mutant(
        "checkpoint.resume.models_crossed",
        "Of several models each gets the state of another.",
        broken_load(_crossed),
    ),
    strategy_mutant(
        "checkpoint.saving_changes_nothing.saving_draws",
        "Saving draws from the random stream.",
        broken_save(_save_draws),
    ),
    strategy_mutant(
        "checkpoint.saving_changes_nothing.saving_ends_window",
        "Saving clears the gradients of an open accumulation window.",
        broken_save(_save_ends_window),
    ),
    strategy_mutant(
        "checkpoint.client_state.integers_rounded",
        "Whole numbers of client_state come back as floats.",
        broken_save(_client_state_in_float),
    ),
    strategy_mutant(
        "checkpoint.client_state.zero_without_sign",
        "A negative zero of client_state comes back as a positive one.",
        broken_save(_client_state_without_signs),
    ),
    strategy_mutant(
        "checkpoint.client_state_refused.tuples_as_lists",
        "Tuples of client_state come back as lists, and nothing is said.",
        broken_save(_client_state_with_lists),
    ),
    strategy_mutant(
        "checkpoint.client_state_refused.unwritable_as_text",
        "What JSON cannot hold is saved as the text that Python prints.",
        broken_save(_client_state_as_text),
    ),
)
"""What is not restored, and what saving changes."""
