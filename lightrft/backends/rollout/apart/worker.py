"""The process of an engine: it does what the trainer asks for, one call after the other, and ends with it."""

from __future__ import annotations

import ctypes
import json
import math
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

import attrs
import torch

from lightrft.backends.rollout.apart.memory import Segment, free_segment, map_segment, read_bucket
from lightrft.backends.rollout.apart.messages import (
    Answer,
    Bucket,
    Made,
    Request,
    Saved,
    Start,
    failure_of,
    receive,
    send,
)
from lightrft.backends.rollout.apart.recipe import build_from
from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError, EngineStateError, WeightSyncError
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import BuildEngine, EngineHandle, EngineSource, Tokenizer

__all__ = ["main", "serve"]

_PR_SET_PDEATHSIG = 1
"""Of the system's prctl."""


@attrs.define(kw_only=True, eq=False)
class _State:
    """What the calls share.

    Attributes:
        start: from what the engine is started.
        tensors: those of the model that it starts with.
        handle: the engine, once it has started.
        segments: shared memory by slot.
        files: descriptors that came with the present request.
    """

    start: Start | None = None
    tensors: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    handle: EngineHandle | None = None
    segments: dict[int, Segment] = attrs.field(factory=dict[int, Segment])
    files: list[int] = attrs.field(factory=list[int])


def main() -> None:
    """Serve the trainer at the other end of the socket whose descriptor is the first argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the trainer decides when it is over
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    threading.Thread(target=_end_with_parent, args=(channel.fileno(),), daemon=True).start()
    serve(channel)
    channel.detach()  # it stays open until the very end, so that the trainer knows when that is


def serve(channel: socket.socket) -> None:
    """Answer requests until there are no more, and close the engine.

    Args:
        channel: to the trainer.
    """
    state = _State()
    try:
        while True:
            try:
                request, state.files = receive(channel, Request)
            except EOFError:
                return
            send(channel, _answer(state, request))
    finally:
        if state.handle is not None:
            state.handle.engine.close(state.handle)
        _free(state)


def _answer(state: _State, request: Request) -> Answer:
    try:
        return _generated(state, request) if request.call == "generate" else _done(state, request)
    except Exception as error:  # noqa: BLE001 (the trainer raises it)
        return Answer(failure=failure_of(error))


def _done(state: _State, request: Request) -> Answer:
    calls: Mapping[str, Callable[[_State, Request], None]] = {
        "prepare": _prepare,
        "fill": _fill,
        "start": _start,
        "begin_update": _begin_update,
        "put": _put,
    }
    if request.call in calls:
        calls[request.call](state, request)
    else:
        handle = _handle(state)
        cast("Callable[[EngineHandle], object]", getattr(handle.engine, request.call))(handle)
    if request.call == "sleep":
        _free(state)
    return Answer()


def _prepare(state: _State, request: Request) -> None:
    state.start = cast("Start", request.start)
    torch.set_num_threads(state.start.num_threads)
    if state.start.parent:
        _die_with(state.start.parent)


def _fill(state: _State, request: Request) -> None:
    bucket = cast("Bucket", request.bucket)
    for name, tensor in read_bucket(_segment(state, bucket), bucket.tensors):
        state.tensors[name] = tensor.clone()


def _start(state: _State, request: Request) -> None:
    del request
    start = cast("Start", state.start)
    config = EngineConfig(**json.loads(start.engine))
    model = build_from(start.model, state.tensors)
    state.tensors = {}
    tokenizer, processor = (None if saved is None else _loaded(saved) for saved in (start.tokenizer, start.processor))
    engine = _builder(start.builder)(config)
    state.handle = engine.start(
        EngineSource(
            model=model, tokenizer=cast("Tokenizer | None", tokenizer), processor=cast("Processor | None", processor)
        )
    )


def _begin_update(state: _State, request: Request) -> None:
    del request
    handle = _handle(state)
    if handle.status == "updating":  # the trainer's stream broke off
        handle.engine.abort(handle)
    handle.engine.begin_update(handle)


def _put(state: _State, request: Request) -> None:
    bucket, handle = cast("Bucket", request.bucket), _handle(state)
    handle.engine.put(handle, _finite(read_bucket(_segment(state, bucket), bucket.tensors)))


def _generated(state: _State, request: Request) -> Answer:
    handle = _handle(state)
    if request.sampling is None:
        raise EngineStateError("generate: the request has no sampling; send it.")
    completions = handle.engine.generate(handle, request.prompts, request.sampling)
    made = tuple(
        Made(
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            sample_index=completion.sample_index,
        )
        for completion in completions
    )
    return Answer(made=made, prompts=tuple(one.prompt_ids for one in completions[:: request.sampling.n]))


def _finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        # a sum tells much faster than a look at each; it may also be too large for its dtype
        if not (math.isfinite(tensor.sum()) or tensor.isfinite().all()):
            raise WeightSyncError(f"tensor={name!r} holds values that are not finite; look at the trainer's last step.")
        yield name, tensor


def _segment(state: _State, bucket: Bucket) -> Segment:
    if bucket.size:
        if bucket.slot in state.segments:
            free_segment(state.segments.pop(bucket.slot))
        state.segments[bucket.slot] = map_segment(state.files.pop(), bucket.size)
    return state.segments[bucket.slot]


def _free(state: _State) -> None:
    for segment in state.segments.values():
        free_segment(segment)
    state.segments.clear()


def _handle(state: _State) -> EngineHandle:
    if state.handle is None:
        raise EngineStateError("the engine has not started in its process; start it.")
    return state.handle


def _builder(name: str) -> BuildEngine:
    module, _, own = name.partition(":")
    try:
        return cast("BuildEngine", getattr(import_module(module), own))
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"engine={name!r} is not found in another process ({error}); build it by a function of a module."
        ) from error


def _loaded(saved: Saved) -> object:
    module, _, own = saved.kind.partition(":")
    from_pretrained: Callable[..., object] = getattr(import_module(module), own).from_pretrained
    with tempfile.TemporaryDirectory() as directory:
        for name, content in saved.files.items():
            (Path(directory) / name).write_bytes(content)
        return from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _end_with_parent(file: int) -> None:
    """End this process and all that it started as soon as the trainer's end of the channel is closed."""
    poll = select.poll()
    poll.register(file, 0)  # a hang-up alone
    poll.poll()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _die_with(parent: int) -> None:
    """Let the system end this process when its parent ends, even where no thread of Python's can run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
