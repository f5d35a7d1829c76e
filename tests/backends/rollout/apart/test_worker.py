"""What the process of an engine does with requests, here in a thread: the same function serves in a process."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from types import ModuleType

import attrs
import psutil
import pytest
import torch

from lightrft.backends.rollout.apart.buckets import Bucket, size_of, write_bucket
from lightrft.backends.rollout.apart.memory import bytes_of, free_segment, new_segment
from lightrft.backends.rollout.apart.messages import Answer, Request, Start, receive, send
from lightrft.backends.rollout.apart.recipe import recipe_of, tensors_for
from lightrft.backends.rollout.apart.worker import serve
from lightrft.config.sections import EngineConfig
from lightrft.strategy.protocols.rollout import Prompt, SamplingParams


@pytest.fixture
def trainer() -> Iterator[socket.socket]:
    """Yield the trainer's end of the channel to a thread that serves."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs,))
    thread.start()
    with ours, theirs:
        yield ours
        ours.shutdown(socket.SHUT_WR)
        thread.join()


def ask(trainer: socket.socket, request: Request, *files: int) -> Answer:
    send(trainer, request, *files)
    answer, _ = receive(trainer, Answer)
    return answer


def put(trainer: socket.socket, request: Request, tensors: dict[str, torch.Tensor], *, changed: str = "") -> Answer:
    """Send tensors in a new segment, one of them with another byte than its digest is of."""
    bucket = list(tensors.items())
    segment = new_segment(size_of(bucket))
    placed = write_bucket(bytes_of(segment), bucket)
    for one in placed:
        segment.map[one.offset] ^= one.name == changed
    try:
        return ask(
            trainer, attrs.evolve(request, bucket=Bucket(slot=0, size=segment.size, tensors=placed)), segment.file
        )
    finally:
        free_segment(segment)


def start_of(programs: ModuleType, model: torch.nn.Module, builder: str = "build_faulty") -> Start:
    return Start(
        builder=f"{programs.__name__}:{builder}",
        engine=json.dumps(attrs.asdict(EngineConfig(type="scripted"))),
        model=recipe_of(model),
        tokenizer=None,
        processor=None,
        num_threads=torch.get_num_threads(),
        parent=0,
    )


def failed(answer: Answer) -> str:
    assert answer.failure is not None
    return f"{answer.failure.kind}: {answer.failure.message}"


@pytest.mark.usefixtures("faults")
def test_requests_are_answered_in_their_order(trainer: socket.socket, programs: ModuleType) -> None:
    """From the model to completions, through updates that fail and one that does not."""
    model = programs.build_tiny()
    generate = Request(call="generate", prompts=(Prompt(token_ids=(1, 2)),), sampling=SamplingParams(max_new_tokens=2))
    assert failed(ask(trainer, generate)) == "EngineStateError: the engine has not started in its process; start it."
    words = "EngineStateError: put: no weights are on their way; prepare the engine, and send them."
    assert failed(ask(trainer, Request(call="put"))) == words
    assert ask(trainer, Request(call="prepare", start=start_of(programs, model))) == Answer()
    assert failed(ask(trainer, Request(call="put"))) == words
    assert put(trainer, Request(call="fill"), tensors_for(model)) == Answer()
    assert ask(trainer, Request(call="start")) == Answer()
    answer = ask(trainer, generate)
    assert answer.prompts == ((1, 2),)
    (made,) = answer.made
    assert made.token_ids == (1, 2)
    assert failed(ask(trainer, Request(call="generate"))).startswith("EngineStateError: generate: the request has no")

    update = Request(call="put")
    assert ask(trainer, Request(call="begin_update")) == Answer()
    words = "WeightSyncError: tensor='head.weight' arrived with other bytes"
    assert failed(put(trainer, update, model.state_dict(), changed="head.weight")).startswith(words)
    assert ask(trainer, Request(call="begin_update")) == Answer()
    assert ask(trainer, Request(call="begin_update")) == Answer()  # the first one broke off
    assert put(trainer, update, programs.build_tiny(1).state_dict()) == Answer()
    assert ask(trainer, Request(call="commit")) == Answer()
    (other,) = ask(trainer, generate).made
    assert other.logprobs != made.logprobs
    for call in ("sleep", "wake", "flush_cache", "abort"):
        assert ask(trainer, Request(call=call)) == Answer()
    assert "EngineStateError: generate: the engine is 'torn'" in failed(ask(trainer, generate))


def test_an_engine_that_is_not_found_is_a_wrong_setting(trainer: socket.socket, programs: ModuleType) -> None:
    """The trainer raises it, and can try another one."""
    model = programs.build_tiny()
    ask(trainer, Request(call="prepare", start=start_of(programs, model, "build_nothing")))
    put(trainer, Request(call="fill"), tensors_for(model))
    words = "ConfigError: engine='apart_programs:build_nothing' is not found in another process"
    assert failed(ask(trainer, Request(call="start"))).startswith(words)


def test_no_descriptor_of_a_segment_is_left_open(trainer: socket.socket, programs: ModuleType) -> None:
    """One comes with each new segment, and is closed when another takes its place."""
    model = programs.build_tiny()
    ask(trainer, Request(call="prepare", start=start_of(programs, model)))
    put(trainer, Request(call="fill"), tensors_for(model))
    files = psutil.Process().num_fds()
    assert ask(trainer, Request(call="start")) == Answer()
    ask(trainer, Request(call="begin_update"))
    assert put(trainer, Request(call="put"), model.state_dict()) == Answer()
    assert psutil.Process().num_fds() <= files  # one of a test before may be closed only now
