"""Engines that go wrong on purpose in an update, a sleep or at their end."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Protocol

import attrs
import torch
from torch import Tensor

from lightrft.backends.rollout.weights import tensors_of
from lightrft.config import EngineConfig
from lightrft.errors import EngineStateError
from lightrft.strategy.protocols import Completion, EngineHandle, EngineSource, Prompt, SamplingParams
from lightrft.strategy.protocols.rollout import Engine, EngineStatus
from lightrft.testing.mutants.engine_inside import refresh_inside, serve, weights_inside
from lightrft.testing.mutants.mutant import BreakEngine, Mutant, engine_mutant

__all__ = ["MUTANTS"]

_Tensors = Iterable[tuple[str, Tensor]]


class _WrongTensors(Protocol):
    """Changes what the right engine is given to write."""

    def __call__(self, handle: EngineHandle, tensors: _Tensors, /) -> _Tensors: ...


def _putting(wrong: _WrongTensors) -> BreakEngine:
    def breaks(engine: Engine, config: EngineConfig) -> Engine:
        del config

        def put(handle: EngineHandle, tensors: _Tensors) -> None:
            # a refusal is the right engine's
            engine.put(handle, wrong(handle, tensors) if handle.status == "updating" else tensors)

        return serve(attrs.evolve(engine, put=put))

    return breaks


def _stale_head(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    kept = tensors_of(weights_inside(handle))
    for name, tensor in tensors:
        yield name, kept[name].clone() if name == "lm_head.weight" else tensor


def _stale(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    kept = tensors_of(weights_inside(handle))
    for name, tensor in tensors:
        yield name, kept[name].clone() if name in kept and kept[name].shape == tensor.shape else tensor


def _known_alone(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    kept = tensors_of(weights_inside(handle))
    for name, tensor in tensors:
        if name in kept:
            yield name, tensor


def _once(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    for name, tensor in tensors:
        if name not in weights_inside(handle).written:
            yield name, tensor


def _broadcast(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    kept = tensors_of(weights_inside(handle))
    for name, tensor in tensors:
        yield name, tensor.expand_as(kept[name]) if name in kept else tensor


def _rounded(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    del handle
    for name, tensor in tensors:
        yield name, tensor.to(torch.bfloat16)


def _consumed(handle: EngineHandle, tensors: _Tensors) -> _Tensors:
    del handle
    for name, tensor in tensors:
        yield name, tensor.clone()
        tensor.zero_()


def _aliased(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def put(handle: EngineHandle, tensors: _Tensors) -> None:
        given = list(tensors)
        engine.put(handle, given)
        for name, tensor in given:
            tensors_of(weights_inside(handle))[name].data = tensor

    return serve(attrs.evolve(engine, put=put))


def _completed(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def commit(handle: EngineHandle) -> int:
        if handle.status == "updating":
            weights = weights_inside(handle)
            missing = set(tensors_of(weights)) - weights.written
            engine.put(handle, [(name, tensors_of(weights)[name].clone()) for name in missing])
        return engine.commit(handle)

    return serve(attrs.evolve(engine, commit=commit))


def _uncounted(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def commit(handle: EngineHandle) -> int:
        version = handle.weight_version
        engine.commit(handle)
        handle.weight_version = version
        return version

    return serve(attrs.evolve(engine, commit=commit))


def _after_error(status: EngineStatus) -> BreakEngine:
    """Return what leaves an engine whose update failed in a status that is not "torn"."""

    @contextmanager
    def forgetting(handle: EngineHandle) -> Generator[None]:
        was_updating = handle.status == "updating"
        try:
            yield
        except Exception:
            handle.status = status if was_updating else handle.status
            raise

    def breaks(engine: Engine, config: EngineConfig) -> Engine:
        del config

        def put(handle: EngineHandle, tensors: _Tensors) -> None:
            with forgetting(handle):
                engine.put(handle, tensors)

        def commit(handle: EngineHandle) -> int:
            with forgetting(handle):
                return engine.commit(handle)

        return serve(attrs.evolve(engine, put=put, commit=commit))

    return breaks


def _aborted_awake(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def abort(handle: EngineHandle) -> None:
        engine.abort(handle)
        handle.status = "awake"

    return serve(attrs.evolve(engine, abort=abort))


def _forgetful_wake(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def wake(handle: EngineHandle) -> None:
        was_asleep = handle.status == "asleep"
        engine.wake(handle)
        if was_asleep:
            tensors_of(weights_inside(handle))["model.embed_tokens.weight"].zero_()
            refresh_inside(handle)

    return serve(attrs.evolve(engine, wake=wake))


def _once_asleep(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def sleep(handle: EngineHandle) -> None:
        if handle.status == "asleep":
            raise EngineStateError("sleep: the engine is 'asleep'; wake it first.")
        engine.sleep(handle)

    return serve(attrs.evolve(engine, sleep=sleep))


def _once_awake(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def wake(handle: EngineHandle) -> None:
        if handle.status == "awake":
            raise EngineStateError("wake: the engine is 'awake'; let it sleep first.")
        engine.wake(handle)

    return serve(attrs.evolve(engine, wake=wake))


def _sleepless(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        if handle.status != "asleep":
            return engine.generate(handle, prompts, sampling)
        engine.wake(handle)
        made = engine.generate(handle, prompts, sampling)
        engine.sleep(handle)
        return made

    return serve(attrs.evolve(engine, generate=generate))


def _updated_asleep(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def begin_update(handle: EngineHandle) -> None:
        if handle.status == "asleep":
            engine.wake(handle)
        engine.begin_update(handle)

    return serve(attrs.evolve(engine, begin_update=begin_update))


def _restarted_update(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def begin_update(handle: EngineHandle) -> None:
        if handle.status == "updating":
            engine.abort(handle)
        engine.begin_update(handle)

    return serve(attrs.evolve(engine, begin_update=begin_update))


def _unclosed(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def close(handle: EngineHandle) -> None:
        del handle

    return serve(attrs.evolve(engine, close=close))


def _closed_once(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def close(handle: EngineHandle) -> None:
        if handle.status == "closed":
            raise EngineStateError("close: the engine is 'closed'; start a new engine.")
        engine.close(handle)

    return serve(attrs.evolve(engine, close=close))


def _flushed_closed(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def flush_cache(handle: EngineHandle) -> None:
        if handle.status != "closed":
            engine.flush_cache(handle)

    return serve(attrs.evolve(engine, flush_cache=flush_cache))


def _leaking(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def start(source: EngineSource) -> EngineHandle:
        # it ends by itself, so that the tests are not left with it
        threading.Thread(target=threading.Event().wait, args=(2.0,), daemon=True).start()
        return engine.start(source)

    return serve(attrs.evolve(engine, start=start))


def _nameless(engine: Engine, config: EngineConfig) -> Engine:
    del config

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        if handle.status != "awake":
            raise EngineStateError("not now")
        return engine.generate(handle, prompts, sampling)

    return serve(attrs.evolve(engine, generate=generate))


MUTANTS: tuple[Mutant, ...] = (
    engine_mutant("engine.update.stale_head", "An update does not reach the head.", _putting(_stale_head)),
    engine_mutant("engine.update.stale", "An update is taken and the old weights stay.", _putting(_stale)),
    engine_mutant("engine.update.unknown_names", "Tensors with unknown names are dropped.", _putting(_known_alone)),
    engine_mutant("engine.update.twice", "A tensor that comes twice in one update is taken.", _putting(_once)),
    engine_mutant("engine.update.broadcast", "A tensor of another shape is broadcast.", _putting(_broadcast)),
    engine_mutant("engine.update.rounded", "Weights are rounded to bfloat16 on their way.", _putting(_rounded)),
    engine_mutant("engine.update.consumed", "put overwrites what it is given.", _putting(_consumed)),
    engine_mutant("engine.update.aliased", "The engine keeps the trainer's tensors and not copies.", _aliased),
    engine_mutant("engine.update.missing_names", "An update with tensors missing is committed.", _completed),
    engine_mutant("engine.update.uncounted", "An update does not raise the weight version.", _uncounted),
    engine_mutant("engine.update.awake_after_error", "A failed update leaves the engine awake.", _after_error("awake")),
    engine_mutant("engine.update.updating_after_error", "A failed update stays open.", _after_error("updating")),
    engine_mutant(
        "engine.update.awake_after_abort", "An update that was given up leaves the engine awake.", _aborted_awake
    ),
    engine_mutant("engine.sleep_wake.forgetful_wake", "Waking loses a tensor.", _forgetful_wake),
    engine_mutant("engine.sleep_wake.sleep_once", "Sleep is refused on an engine asleep.", _once_asleep),
    engine_mutant("engine.sleep_wake.wake_once", "Wake is refused on an engine awake.", _once_awake),
    engine_mutant("engine.sleep_wake.sleepless", "An engine asleep generates.", _sleepless),
    engine_mutant("engine.life.updated_asleep", "An update of an engine asleep wakes it.", _updated_asleep),
    engine_mutant("engine.life.restarted_update", "A second begin starts the update anew.", _restarted_update),
    engine_mutant("engine.close.unclosed", "Close does nothing.", _unclosed),
    engine_mutant("engine.close.close_once", "Close is refused on a closed engine.", _closed_once),
    engine_mutant("engine.close.flushed_closed", "A closed engine flushes its cache.", _flushed_closed),
    engine_mutant("engine.close.leaking", "A thread outlives the engine.", _leaking),
    engine_mutant("engine.close.nameless", "A refusal names neither the call nor the status.", _nameless),
)
"""What an engine can do wrongly with its weights and its status."""
