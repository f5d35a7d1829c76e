"""The life of an engine: which call is legal in which status, the same for every engine.

awake <-> asleep        sleep, wake
awake  -> updating      begin_update
awake  -> torn          generate, where the engine's process has ended
updating -> awake       commit
updating -> torn        abort, or an error of put or commit
torn -> updating        begin_update
any -> closed           close
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightrft.errors import EngineCrashError, EngineStateError
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    EngineStatus,
    Prompt,
    SamplingParams,
)

if TYPE_CHECKING:
    import torch

__all__ = ["guarded"]

_WAY_OUT: dict[EngineStatus, str] = {
    "awake": "begin an update first",
    "asleep": "wake it first",
    "updating": "commit or abort the update first",
    "torn": "sync its weights first",
    "closed": "start a new engine",
}


def guarded(engine: Engine) -> Engine:
    """Return the engine with every call held to the status of its handle.

    A call that the status does not allow raises `EngineStateError` and changes nothing. The inner functions do the work
    and need not look at the status; it is set here alone.

    Args:
        engine: the functions that do the work.
    """

    def start(source: EngineSource) -> EngineHandle:
        handle = engine.start(source)
        handle.engine = guarded_engine
        return handle

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        _require(handle, "generate", "awake")
        with _torn_on_error(handle, EngineCrashError):
            return engine.generate(handle, prompts, sampling)

    def begin_update(handle: EngineHandle) -> None:
        _require(handle, "begin_update", "awake", "torn")
        handle.status = "updating"
        with _torn_on_error(handle):
            engine.begin_update(handle)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        _require(handle, "put", "updating")
        with _torn_on_error(handle):
            engine.put(handle, tensors)

    def commit(handle: EngineHandle) -> int:
        _require(handle, "commit", "updating")
        with _torn_on_error(handle):
            engine.commit(handle)
            engine.flush_cache(handle)
        handle.weight_version += 1
        handle.status = "awake"
        return handle.weight_version

    def abort(handle: EngineHandle) -> None:
        _require(handle, "abort", "updating", "awake", "torn")
        with _torn_on_error(handle):
            engine.abort(handle)
        handle.status = "torn"

    def sleep(handle: EngineHandle) -> None:
        _require(handle, "sleep", "awake", "asleep")
        if handle.status == "awake":
            engine.sleep(handle)
            handle.status = "asleep"

    def wake(handle: EngineHandle) -> None:
        _require(handle, "wake", "asleep", "awake")
        if handle.status == "asleep":
            engine.wake(handle)
            handle.status = "awake"

    def flush_cache(handle: EngineHandle) -> None:
        _require(handle, "flush_cache", "awake", "asleep", "updating", "torn")
        engine.flush_cache(handle)

    def close(handle: EngineHandle) -> None:
        if handle.status != "closed":
            handle.status = "closed"
            handle.weights = None
            engine.close(handle)

    guarded_engine = Engine(
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
    return guarded_engine


def _require(handle: EngineHandle, call: str, *legal: EngineStatus) -> None:
    if handle.status not in legal:
        raise EngineStateError(f"{call}: the engine is {handle.status!r}; {_WAY_OUT[handle.status]}.")


@contextmanager
def _torn_on_error(handle: EngineHandle, kind: type[BaseException] = BaseException) -> Generator[None]:
    """Mark the engine torn when an update fails half way, or it is lost: nobody knows which weights it has then."""
    try:
        yield
    except kind:
        handle.status = "torn"
        raise
