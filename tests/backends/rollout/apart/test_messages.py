"""Messages between a trainer and the process of its engine."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from lightrft.backends.rollout.apart.messages import (
    Answer,
    Made,
    Request,
    receive,
    send,
)
from lightrft.strategy.protocols.images import Image
from lightrft.strategy.protocols.rollout import Prompt, SamplingParams


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_messages_arrive_whole_with_their_descriptors(ends: tuple[socket.socket, socket.socket]) -> None:
    """One after the other, one of them larger than the socket holds; a descriptor is the same file there."""
    image = Image(width=2, height=1, pixels=bytes([0, 255, 128, 1, 2, 3]))
    prompts = (Prompt(token_ids=(1, 2), images=(image,)), Prompt(token_ids=(3,)))
    small = Request(call="generate", prompts=prompts, sampling=SamplingParams(temperature=0.7, n=3, seed=2**63 - 1))
    large = Request(call="generate", prompts=(Prompt(token_ids=tuple(range(300_000))),))
    reader, writer = os.pipe()

    def write() -> None:
        send(ends[0], small, writer)
        send(ends[0], large)

    thread = threading.Thread(target=write)
    thread.start()
    message, (copy,) = receive(ends[1], Request)
    assert message == small
    assert receive(ends[1], Request) == (large, [])
    thread.join()
    os.write(copy, b"seen")
    assert os.read(reader, 10) == b"seen"
    assert not os.get_inheritable(copy)
    for file in (reader, writer, copy):
        os.close(file)


def test_every_bit_of_a_logprob_arrives(ends: tuple[socket.socket, socket.socket]) -> None:
    """Also what is no number."""
    logprobs = (-0.1, -1e-300, -2 / 3, float("-inf"))
    made = Made(token_ids=(1, 2, 3, 4), logprobs=logprobs, finish_reason="stop", sample_index=1)
    answer = Answer(made=(made,), prompts=((1, 2),))
    send(ends[0], answer)
    assert receive(ends[1], Answer) == (answer, [])


def test_a_closed_end_is_said(ends: tuple[socket.socket, socket.socket]) -> None:
    """In the middle of a message, too."""
    ends[0].sendall(b"\x00\x00")
    ends[0].close()
    with pytest.raises(EOFError, match="the other process has closed its end"):
        receive(ends[1], Answer)
