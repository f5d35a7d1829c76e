"""What the engine "sglang" of a server refuses before it asks one, and what it says where no answer comes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from lightrft.backends.rollout.sglang.server_calls import Server, ask
from lightrft.config import EngineConfig
from lightrft.errors import EngineCrashError, UnsupportedError
from lightrft.strategy import ENGINES
from lightrft.strategy.protocols.rollout import EngineSource
from lightrft.testing.cases.policies import PolicyCase, build_policy
from lightrft.testing.cases.vision import build_processor


@pytest.fixture
def bound() -> Iterator[tuple[socket.socket, str]]:
    """Yield a socket to which nobody listens yet, and its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one, f"http://127.0.0.1:{one.getsockname()[1]}"


def test_a_processor_is_refused() -> None:
    """A server is given no images, so what would read them is not passed over in silence."""
    engine = ENGINES["sglang"](EngineConfig(type="sglang", url="http://127.0.0.1:1"))
    source = EngineSource(model=build_policy(PolicyCase()), tokenizer=None, processor=build_processor())
    with pytest.raises(
        UnsupportedError, match=r"processor=\w+ reads images and url='http://127.0.0.1:1' is given none;"
    ):
        engine.start(source)


def test_a_call_that_takes_too_long_names_the_setting(bound: tuple[socket.socket, str]) -> None:
    """One who accepts a call and never answers is told from one who is away."""
    listening, url = bound
    listening.listen()
    said = (
        rf"engine\.timeout_seconds=0.1 passed before url='{url}' gave an answer to /health; raise it if calls take so"
    )
    with pytest.raises(EngineCrashError, match=said):
        ask(Server(url=url, timeout_seconds=0.1), "/health")


def test_nobody_at_the_address_is_no_matter_of_time(bound: tuple[socket.socket, str]) -> None:
    """Where no server runs, the line says so and names no time."""
    _, url = bound
    with pytest.raises(EngineCrashError, match=rf"^url='{url}' gives no answer to /health \(.*refused\); look at"):
        ask(Server(url=url, timeout_seconds=60.0), "/health")
