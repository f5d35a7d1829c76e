"""What the trainer waits for beside answers: it is told at once where it will not come."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lightrft.backends.rollout.apart.messages import Answer, send
from lightrft.backends.rollout.apart.process import EngineProcess, await_until, end_process
from lightrft.errors import EngineCrashError

PATIENCE = 120.0


@pytest.fixture
def process() -> Iterator[tuple[EngineProcess, socket.socket]]:
    """Yield a process that does nothing, and its end of the channel."""
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(theirs)
        popen = subprocess.Popen(["/bin/sleep", "600"], stdout=subprocess.PIPE, start_new_session=True)
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        process = EngineProcess(popen=popen, channel=ours, timeout=PATIENCE)
        stack.callback(end_process, process)
        yield process, theirs


def never() -> bool:
    return False


def test_what_is_done_ends_the_wait(process: tuple[EngineProcess, socket.socket]) -> None:
    """It is asked for again and again."""
    seen: list[bool] = []

    def is_done() -> bool:
        seen.append(len(seen) == 2)
        return seen[-1]

    assert await_until(process[0], is_done)
    assert seen == [False, False, True]


def test_an_answer_ends_the_wait(process: tuple[EngineProcess, socket.socket]) -> None:
    """What it says is read by whoever awaits it."""
    send(process[1], Answer())
    assert not await_until(process[0], never)


def test_a_process_that_ends_is_a_crash(process: tuple[EngineProcess, socket.socket]) -> None:
    """Where something that it started holds its end of the channel open, too."""
    process[0].popen.kill()
    with pytest.raises(EngineCrashError, match=r"ended with exit code -9 \(SIGKILL\)"):
        await_until(process[0], never)
    assert not process[0].is_running


def test_a_process_that_does_not_come_is_ended(process: tuple[EngineProcess, socket.socket]) -> None:
    """After the time that a call may take."""
    process[0].timeout = 0.01
    with pytest.raises(EngineCrashError, match=r"did not come for engine.timeout_seconds=0.01; raise it if"):
        await_until(process[0], never)
    assert process[0].popen.returncode == -9


def test_whoever_is_interrupted_ends_it(process: tuple[EngineProcess, socket.socket]) -> None:
    """An answer that comes later would be taken for another one's."""

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await_until(process[0], interrupt)
    assert not process[0].is_running
