"""What a trainer and the process of its engine write to one another: JSON by type, and descriptors of shared memory."""

from __future__ import annotations

import functools
import json
import operator
import os
import socket
import struct
from typing import Literal, TypeAlias, TypeVar

import attrs
from cattrs.preconf.json import JsonConverter, make_converter

from lightrft.backends.rollout.apart.buckets import Bucket
from lightrft.backends.rollout.apart.recipe import Recipe
from lightrft.failures import Failure
from lightrft.strategy.protocols.rollout import FinishReason, Prompt, SamplingParams

__all__ = [
    "Answer",
    "Call",
    "Made",
    "Request",
    "Saved",
    "Start",
    "decode",
    "encode",
    "receive",
    "send",
    "write",
]

_Message = TypeVar("_Message")

Call: TypeAlias = Literal[
    "prepare", "fill", "start", "generate", "begin_update", "put", "commit", "abort", "sleep", "wake", "flush_cache"
]
"""What an engine's process is asked for. Its engine starts in three calls: the model, its tensors, the engine."""

_LENGTH = struct.Struct("!Q")

_CHUNK = 2**20
"""Bytes that are read at once: what a socket holds, and more."""


@attrs.frozen(kw_only=True)
class Saved:
    """A tokenizer or processor of transformers.

    Attributes:
        kind: its class, as `module:name`.
        files: what it saves, by name.
    """

    kind: str
    files: dict[str, bytes]


@attrs.frozen(kw_only=True)
class Start:
    """From what the engine is started.

    Attributes:
        builder: `module:name` of the function that builds the engine.
        engine: JSON of its settings.
        model: the model without its tensors.
        tokenizer: the tokenizer; None where there is none.
        processor: the processor of images; None where there is none.
        num_threads: threads of torch.
        parent: number of the trainer's process; 0 where the thread that starts this one may end before it.
    """

    builder: str
    engine: str
    model: Recipe
    tokenizer: Saved | None
    processor: Saved | None
    num_threads: int
    parent: int


@attrs.frozen(kw_only=True)
class Request:
    """A call, with what it needs."""

    call: Call
    start: Start | None = None
    bucket: Bucket | None = None
    prompts: tuple[Prompt, ...] = ()
    sampling: SamplingParams | None = None


@attrs.frozen(kw_only=True)
class Made:
    """A completion, but for its prompt, and for the version of the weights, which the trainer knows."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    sample_index: int


@attrs.frozen(kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        made: completions.
        prompts: token ids of each prompt as the model read them.
        failure: what was raised instead.
    """

    made: tuple[Made, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    failure: Failure | None = None


def send(channel: socket.socket, message: Request | Answer, *files: int) -> None:
    """Write a message.

    Args:
        channel: a stream socket of this machine.
        message: what to write.
        files: descriptors that go along.
    """
    write(channel, encode(message), *files)


def encode(message: attrs.AttrsInstance) -> bytes:
    """Return a message as `write` takes it.

    Args:
        message: what to write; its whole numbers may be NumPy's.
    """
    return json.dumps(_converter().unstructure(message), default=operator.index).encode()


def decode(text: bytes, kind: type[_Message]) -> _Message:
    """Return a message that was encoded.

    Args:
        text: what `encode` returned.
        kind: type of the message.
    """
    return _converter().structure(json.loads(text), kind)


def write(channel: socket.socket, text: bytes, *files: int) -> None:
    """Write a message that is encoded.

    Args:
        channel: a stream socket of this machine.
        text: the message.
        files: descriptors that go along.
    """
    head = _LENGTH.pack(len(text))
    if files:
        socket.send_fds(channel, [head], files)
    else:
        channel.sendall(head)
    channel.sendall(text)


def receive(channel: socket.socket, kind: type[_Message]) -> tuple[_Message, list[int]]:
    """Return the next message and the descriptors that came with it.

    Args:
        channel: where `send` writes to.
        kind: type of the message.

    Raises:
        EOFError: nobody writes there any more.
    """
    head, files = _read(channel, _LENGTH.size)
    text, _ = _read(channel, _LENGTH.unpack(head)[0])
    return decode(text, kind), files


def _read(channel: socket.socket, size: int) -> tuple[bytes, list[int]]:
    data, files = bytearray(), list[int]()
    while len(data) < size:
        part, found, _, _ = socket.recv_fds(channel, min(size - len(data), _CHUNK), 1)
        for file in found:
            os.set_inheritable(file, False)  # Python leaves out the flag that would do so at once
        if not part:
            raise EOFError("the other process has closed its end.")
        data += part
        files += found
    return bytes(data), files


@functools.cache  # a converter compiles one function a type
def _converter() -> JsonConverter:
    return make_converter(forbid_extra_keys=True)
