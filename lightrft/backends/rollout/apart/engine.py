"""Any engine in a process of its own, by composition: the same contract, and a trainer that outlives its engine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import attrs
import torch

from lightrft.backends.rollout.apart.buckets import BUFFER_BYTES, Bucket
from lightrft.backends.rollout.apart.messages import Answer, Call, Request, Saved, Start
from lightrft.backends.rollout.apart.process import (
    EngineProcess,
    ask,
    await_answer,
    await_until,
    end_process,
    raise_failure,
    start_process,
    tell,
)
from lightrft.backends.rollout.apart.recipe import recipe_of, tensors_for
from lightrft.backends.rollout.apart.transport import Line, Sender
from lightrft.backends.rollout.apart.transports import TRANSPORTS
from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.weights import checked
from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineCrashError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import SavesTokenizer
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import (
    BuildEngine,
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    Prompt,
    SamplingParams,
    Tokenizer,
)
from lightrft.weight_sync import in_buckets

__all__ = ["ApartState", "build_apart"]

_SLOTS = (0, 1)
"""Buffers of a bucket: one is written while the other is read."""


@attrs.define(kw_only=True, eq=False)
class ApartState:
    """What the trainer keeps of an engine that is somewhere else.

    Attributes:
        start: from what its process is started, but for the parent.
        buffers: tensors of the model that no update brings.
        shapes: of the tensors that an update brings, by name.
        timeout: seconds that a call may take.
        sender: the end from which weights go there.
        process: where it runs; one that has ended stays here until another one takes its place.
        crash: what ended it, if that has not been mended.
        num_crashes: how often it ended or hung.
        owed: slots of the buckets that the process was told of and has not answered, the oldest first.
        refused: its first answer to a bucket that is a failure.
        digests: of the weights of its version, by name.
        sent: of those that the update under way has brought.
        written: names that it has brought.
        wanted: what `sent` must be at the commit; None takes any.
        lost_by: what ended the process whose weights are wanted.
    """

    start: Start
    buffers: dict[str, torch.Tensor]
    shapes: dict[str, torch.Size]
    timeout: float
    sender: Sender
    process: EngineProcess
    crash: EngineCrashError | None = None
    num_crashes: int = 0
    owed: deque[int] = attrs.field(factory=deque[int])
    refused: Answer | None = None
    digests: dict[str, int] = attrs.field(factory=dict[str, int])
    sent: dict[str, int] = attrs.field(factory=dict[str, int])
    written: set[str] = attrs.field(factory=set[str])
    wanted: dict[str, int] | None = None
    lost_by: EngineCrashError | None = None


def build_apart(build: BuildEngine, config: EngineConfig) -> Engine:
    """Return an engine whose functions run in a process of its own.

    The process begins with the engine and ends with it, or with the trainer. One that ends by itself or hangs is an
    `EngineCrashError`; the next update starts another one, once.

    Args:
        build: builds the engine there; a function of a module, so that it is found by its name.
        config: its settings.

    Raises:
        UnsupportedError: the builder has no name by which another process finds it.
    """
    builder = _name_of(build)
    inner = build(config)

    def start(source: EngineSource) -> EngineHandle:
        tensors, start = tensors_for(source.model), _start_of(source, builder, config)
        updated = source.model.state_dict()
        state = ApartState(
            start=start,
            buffers={name: tensors[name].clone() for name in tensors.keys() - updated.keys()},
            shapes={name: tensor.shape for name, tensor in updated.items()},
            timeout=config.timeout_seconds,
            sender=TRANSPORTS[config.transport].open_sender(
                device=torch.device(start.model.device), timeout=config.timeout_seconds
            ),
            process=start_process(timeout=config.timeout_seconds),
        )
        try:
            state.digests = _start(state, tensors)
        except BaseException:
            _end(state)
            raise
        return EngineHandle(engine=engine, status="awake", weight_version=0, state=state, processor=source.processor)

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        answer = _call(handle, Request(call="generate", prompts=tuple(prompts), sampling=sampling))
        return [
            Completion(
                prompt_ids=answer.prompts[place // sampling.n],
                token_ids=made.token_ids,
                logprobs=made.logprobs,
                finish_reason=made.finish_reason,
                weight_version=handle.weight_version,
                sample_index=made.sample_index,
            )
            for place, made in enumerate(answer.made)
        ]

    def begin_update(handle: EngineHandle) -> None:
        state = _state(handle)
        state.sent = {}
        state.written.clear()
        _refusal(state)  # of an update that broke off
        if state.crash is not None:
            _start_again(state)
        _call(handle, Request(call="begin_update"))

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        # checked here, as the process reads the last buckets while the trainer gathers the next ones: what else it says
        # of them is raised by a later call
        state = _state(handle)
        state.sent |= _send(state, "put", checked(tensors, shapes=state.shapes, written=state.written))

    def commit(handle: EngineHandle) -> int:
        state = _state(handle)
        _settle(state)
        if state.wanted is not None and state.sent != state.wanted:
            raise EngineCrashError(
                f"weight_version={handle.weight_version} is lost with the process of the engine, and the trainer has "
                f"other weights by now; sync the engine. {state.lost_by}"
            )
        _call(handle, Request(call="commit"))
        state.digests = state.sent
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        _call_if_running(handle, "abort")

    def sleep(handle: EngineHandle) -> None:
        _call_if_running(handle, "sleep")
        _free(_state(handle))

    def wake(handle: EngineHandle) -> None:
        _call_if_running(handle, "wake")

    def flush_cache(handle: EngineHandle) -> None:
        _call_if_running(handle, "flush_cache")

    def close(handle: EngineHandle) -> None:
        try:
            end_process(_state(handle).process, gently=True)
        finally:
            _free(_state(handle))
            handle.state = None

    engine = guarded(
        Engine(
            capabilities=inner.capabilities,
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
    return engine


def _name_of(build: BuildEngine) -> str:
    module, name = str(getattr(build, "__module__", None)), str(getattr(build, "__qualname__", repr(build)))
    if module == "__main__" or "<" in name:
        raise UnsupportedError(
            f"engine={name!r} of {module!r} is not found by its name in another process; build it by a function of a "
            "module that can be imported, or use engine.process='trainer'."
        )
    return f"{module}:{name}"


def _start_of(source: EngineSource, builder: str, config: EngineConfig) -> Start:
    return Start(
        builder=builder,
        engine=json.dumps(attrs.asdict(config)),
        model=recipe_of(source.model),
        tokenizer=None if source.tokenizer is None else _saved(source.tokenizer, "tokenizer"),
        processor=None if source.processor is None else _saved(source.processor, "processor"),
        num_threads=torch.get_num_threads(),
        parent=0,
    )


def _saved(what: Tokenizer | Processor, name: str) -> Saved:
    kind = type(what)
    is_found = hasattr(sys.modules.get(kind.__module__), kind.__qualname__)
    if not is_found or not hasattr(what, "save_pretrained"):
        problem = "cannot be saved" if is_found else f"is not found in {kind.__module__!r} by its name"
        raise UnsupportedError(
            f"{name}={kind.__name__} {problem}, so it does not travel to an engine in a process of its own; "
            "use engine.process='trainer'."
        )
    with tempfile.TemporaryDirectory() as directory:
        cast("SavesTokenizer", what).save_pretrained(directory)
        files = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}
    return Saved(kind=f"{kind.__module__}:{kind.__qualname__}", files=files)


def _start(state: ApartState, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Start the engine in its new process, with these tensors; return their digests."""
    # the system takes the end of a thread for that of its process
    is_main = threading.current_thread() is threading.main_thread()
    start = attrs.evolve(state.start, parent=os.getpid() if is_main else 0)
    ask(state.process, Request(call="prepare", start=start))
    digests = _send(state, "fill", tensors.items())
    _settle(state)
    ask(state.process, Request(call="start"))
    return {name: digest for name, digest in digests.items() if name not in state.buffers}


def _start_again(state: ApartState) -> None:
    """Put a new process in the place of the one that crashed; its weights have no meaning yet."""
    crash = cast("EngineCrashError", state.crash)
    if state.num_crashes > 1:
        raise EngineCrashError(f"{crash}\nIt is the second time, and the engine is not started again.") from crash
    _end(state)
    state.process = start_process(timeout=state.timeout)
    state.crash = None
    try:
        _start(state, state.buffers)
    except EngineCrashError as error:
        _note(state, error)
        raise
    except BaseException:
        _end(state)
        state.crash = crash
        raise


def _call(handle: EngineHandle, request: Request) -> Answer:
    state = _state(handle)
    if state.crash is not None:
        raise EngineCrashError(str(state.crash)) from state.crash
    _await_all(state)
    try:
        return ask(state.process, request)
    except EngineCrashError as error:
        _note(state, error)
        raise


def _call_if_running(handle: EngineHandle, call: Call) -> None:
    """Ask for what needs no weights; where the process is gone nothing is left to do, and whoever generates is told."""
    try:
        _call(handle, Request(call=call))
    except EngineCrashError:
        return


def _note(state: ApartState, error: EngineCrashError) -> None:
    if state.crash is error:  # noted further in
        return
    state.crash = error
    state.num_crashes += 1
    _free(state)


def _send(state: ApartState, call: Call, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return the digests of the tensors, which may change from now on; the process may not have read all of them.

    Raises:
        WeightSyncError: as the engine said of an earlier bucket.
        EngineCrashError: its process has ended.
    """
    digests: dict[str, int] = {}
    for bucket in in_buckets(tensors, bucket_bytes=BUFFER_BYTES):
        slot = _free_slot(state)
        if state.refused is not None:
            _settle(state)
        try:
            digests |= _send_bucket(state, call, slot, bucket)
        except EngineCrashError as error:
            _note(state, error)
            raise
    return digests


def _free_slot(state: ApartState) -> int:
    """Return a slot for a bucket, after the process has read what was there."""
    while len(state.owed) == len(_SLOTS):
        _await_answer(state)
    return next(slot for slot in _SLOTS if slot not in state.owed)


def _send_bucket(
    state: ApartState, call: Call, slot: int, tensors: Sequence[tuple[str, torch.Tensor]]
) -> dict[str, int]:
    def tell_of(bucket: Bucket, *files: int) -> None:
        state.owed.append(slot)  # before, or an interrupt between the two would leave an answer that belongs to nothing
        tell(state.process, Request(call=call, bucket=bucket), *files)

    def await_beside(is_done: Callable[[], bool]) -> bool:
        if await_until(state.process, is_done):
            return True
        _await_answer(state)
        return False

    line = Line(tell=tell_of, await_until=await_beside)
    return {one.name: one.digest for one in state.sender.send(slot, tensors, line, finite=call == "put")}


def _await_answer(state: ApartState) -> None:
    """Wait until the process has read the oldest of the buckets that it was told of."""
    try:
        answer = await_answer(state.process)
    except EngineCrashError as error:
        _note(state, error)
        raise
    state.owed.popleft()
    if answer.failure is not None and state.refused is None:
        state.refused = answer


def _await_all(state: ApartState) -> None:
    while state.owed and state.process.is_running:
        _await_answer(state)


def _settle(state: ApartState) -> None:
    """Wait until the process has read all buckets, and raise what it said of the first that it refused."""
    answer = _refusal(state)
    if answer is not None:
        raise_failure(answer)


def _refusal(state: ApartState) -> Answer | None:
    """Return what the process said of the first bucket that it refused, once it has read all, and forget that."""
    _await_all(state)
    answer, state.refused = state.refused, None
    if answer is not None:  # its end may have broken off
        state.sender.free()
    return answer


def _end(state: ApartState) -> None:
    end_process(state.process)
    _free(state)


def _free(state: ApartState) -> None:
    state.sender.free()
    state.owed.clear()


def _state(handle: EngineHandle) -> ApartState:
    assert isinstance(handle.state, ApartState)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
