"""The process of an engine: it does what the trainer asks for, one call after the other, and ends with it."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

import attrs
import torch

from lightrft.backends.rollout.apart.messages import (
    Answer,
    Made,
    Request,
    Saved,
    Start,
    receive,
    send,
)
from lightrft.backends.rollout.apart.recipe import build_from
from lightrft.backends.rollout.apart.transport import Receiver
from lightrft.backends.rollout.apart.transports import TRANSPORTS
from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError, EngineStateError
from lightrft.failures import failure_of
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
        receiver: the end to which weights come, once it is known by what.
        files: descriptors that came with the present request.
    """

    start: Start | None = None
    tensors: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    handle: EngineHandle | None = None
    receiver: Receiver | None = None
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
    state.start = start = cast("Start", request.start)
    torch.set_num_threads(start.num_threads)
    if start.parent:
        _die_with(start.parent)
    config = _config_of(start)
    state.receiver = TRANSPORTS[config.transport].open_receiver(
        device=torch.device(start.model.device), timeout=config.timeout_seconds
    )


def _fill(state: _State, request: Request) -> None:
    for name, tensor in _received(state, request):
        state.tensors[name] = tensor.clone()


def _start(state: _State, request: Request) -> None:
    del request
    start = cast("Start", state.start)
    model = build_from(start.model, state.tensors)
    state.tensors = {}
    tokenizer, processor = (None if saved is None else _loaded(saved) for saved in (start.tokenizer, start.processor))
    engine = _builder(start.builder)(_config_of(start))
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
    tensors, handle = _received(state, request), _handle(state)
    handle.engine.put(handle, tensors)


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


def _received(state: _State, request: Request) -> Iterator[tuple[str, torch.Tensor]]:
    if state.receiver is None or request.bucket is None:
        raise EngineStateError(f"{request.call}: no weights are on their way; prepare the engine, and send them.")
    return state.receiver.receive(request.bucket, state.files)


def _free(state: _State) -> None:
    if state.receiver is not None:
        state.receiver.free()


def _config_of(start: Start) -> EngineConfig:
    return EngineConfig(**json.loads(start.engine))


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
