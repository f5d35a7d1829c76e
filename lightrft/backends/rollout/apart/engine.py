"""Any engine in a process of its own, by composition: the same contract, and a trainer that outlives its engine."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import attrs
import torch

from lightrft.backends.rollout.apart.memory import Segment, free_segment, new_segment, size_of, write_bucket
from lightrft.backends.rollout.apart.messages import Answer, Bucket, Call, Request, Saved, Start, raised_by
from lightrft.backends.rollout.apart.process import EngineProcess, ask, await_answer, end_process, start_process, tell
from lightrft.backends.rollout.apart.recipe import recipe_of, tensors_for
from lightrft.backends.rollout.lifecycle import guarded
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

_SEGMENT_BYTES = 16 * 2**20
"""Size of each of the two segments: their memory is fetched once, and a copy of it stays in the caches of a processor
while the other process reads it. A larger tensor has a segment of its size."""

_NUM_SEGMENTS = 2
"""One is written while the other is read."""


@attrs.define(kw_only=True, eq=False)
class ApartState:
    """What the trainer keeps of an engine that is somewhere else.

    Attributes:
        start: from what its process is started, but for the parent.
        buffers: tensors of the model that no update brings.
        timeout: seconds that a call may take.
        process: where it runs; one that has ended stays here until another one takes its place.
        crash: what ended it, if that has not been mended.
        num_crashes: how often it ended or hung.
        segments: shared memory by slot.
        digests: of the weights of its version, by name.
        sent: of those that the update under way has brought.
        wanted: what `sent` must be at the commit; None takes any.
        lost_by: what ended the process whose weights are wanted.
    """

    start: Start
    buffers: dict[str, torch.Tensor]
    timeout: float
    process: EngineProcess
    crash: EngineCrashError | None = None
    num_crashes: int = 0
    segments: dict[int, Segment] = attrs.field(factory=dict[int, Segment])
    digests: dict[str, int] = attrs.field(factory=dict[str, int])
    sent: dict[str, int] = attrs.field(factory=dict[str, int])
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
        tensors = tensors_for(source.model)
        state = ApartState(
            start=_start_of(source, builder, config),
            buffers={name: tensors[name].clone() for name in tensors.keys() - source.model.state_dict().keys()},
            timeout=config.timeout_seconds,
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
        if state.crash is not None:
            _start_again(state)
        _call(handle, Request(call="begin_update"))

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        state = _state(handle)
        state.sent |= _send(state, "put", tensors)

    def commit(handle: EngineHandle) -> int:
        state = _state(handle)
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
    if not hasattr(what, "save_pretrained"):
        raise UnsupportedError(
            f"{name}={type(what).__name__} cannot be saved, so it does not travel to an engine in a process of "
            "its own; use engine.process='trainer'."
        )
    with tempfile.TemporaryDirectory() as directory:
        cast("SavesTokenizer", what).save_pretrained(directory)
        files = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}
    return Saved(kind=f"{type(what).__module__}:{type(what).__qualname__}", files=files)


def _start(state: ApartState, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Start the engine in its new process, with these tensors; return their digests."""
    # the system takes the end of a thread for that of its process
    is_main = threading.current_thread() is threading.main_thread()
    start = attrs.evolve(state.start, parent=os.getpid() if is_main else 0)
    ask(state.process, Request(call="prepare", start=start))
    digests = _send(state, "fill", tensors.items())
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
    state.crash = error
    state.num_crashes += 1
    _free(state)


def _send(state: ApartState, call: Call, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return the digests of the tensors, after the process has read all of them."""
    digests: dict[str, int] = {}
    answers: list[Answer] = []
    num_sent = 0
    try:
        for bucket in in_buckets(tensors, bucket_bytes=_SEGMENT_BYTES):
            if num_sent >= _NUM_SEGMENTS:  # the one that is written now was read
                answers.append(await_answer(state.process))
                _raise_first(answers)
            digests |= _send_bucket(state, call, num_sent % _NUM_SEGMENTS, bucket)
            num_sent += 1
    except EngineCrashError as error:
        _note(state, error)
        raise
    finally:
        _await_rest(state, answers, num_sent)
    _raise_first(answers)
    return digests


def _send_bucket(
    state: ApartState, call: Call, slot: int, bucket: Sequence[tuple[str, torch.Tensor]]
) -> dict[str, int]:
    size, segment = size_of(bucket), state.segments.get(slot)
    is_new = segment is None or segment.size < size
    if segment is None or segment.size < size:
        if slot in state.segments:
            free_segment(state.segments.pop(slot))
        # a small model takes little, and a large one need not be measured bucket by bucket
        segment = new_segment(max(size, min(_SEGMENT_BYTES, 1 << size.bit_length())))
        state.segments[slot] = segment
    placed = write_bucket(segment, bucket)
    request = Request(call=call, bucket=Bucket(slot=slot, size=segment.size if is_new else 0, tensors=placed))
    tell(state.process, request, *([segment.file] if is_new else []))
    return {one.name: one.digest for one in placed}


def _await_rest(state: ApartState, answers: list[Answer], num_sent: int) -> None:
    try:
        while len(answers) < num_sent and state.process.is_running:
            answers.append(await_answer(state.process))
    except EngineCrashError as error:
        _note(state, error)
        raise


def _raise_first(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.failure is not None:
            raise raised_by(answer.failure)


def _end(state: ApartState) -> None:
    end_process(state.process)
    _free(state)


def _free(state: ApartState) -> None:
    for segment in state.segments.values():
        free_segment(segment)
    state.segments.clear()


def _state(handle: EngineHandle) -> ApartState:
    assert isinstance(handle.state, ApartState)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
