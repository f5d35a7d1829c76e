"""The process of an engine as the trainer sees it: started, asked, listened to, and ended with all that it started."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import attrs

from lightrft.backends.rollout.apart.messages import Answer, Request, encode, receive, write
from lightrft.errors import EngineCrashError
from lightrft.failures import raised_by

__all__ = [
    "EngineProcess",
    "ask",
    "await_answer",
    "await_until",
    "end_process",
    "raise_failure",
    "start_process",
    "tell",
]

_LOG_LINES = 20
"""Last lines of what the process printed that are kept."""

_CLOSING_SECONDS = 10.0
"""How long an engine may take to close before its process is ended."""

_ASKED_SECONDS = 0.002
"""How long nobody asks whether something was done."""

_LAST_WORDS = 65536
"""Bytes that a pipe holds."""


@attrs.define(kw_only=True, eq=False)
class EngineProcess:
    """A process with an engine in it.

    Attributes:
        popen: the head of a session of its own, so that no signal to the trainer's group reaches it.
        channel: requests go there, and answers come from there.
        timeout: seconds that a call may take.
        lines: the last ones that it printed.
        unfinished: bytes of a line whose end has not come yet.
        is_running: whether nobody has ended it.
    """

    popen: subprocess.Popen[bytes]
    channel: socket.socket
    timeout: float
    lines: deque[str] = attrs.field(factory=lambda: deque[str](maxlen=_LOG_LINES))
    unfinished: bytes = b""
    is_running: bool = True


def start_process(*, timeout: float) -> EngineProcess:
    """Return a process that waits for requests.

    Args:
        timeout: seconds that a call may take.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            popen = subprocess.Popen(  # noqa: S603 (no shell: this very Python, with a module of ours)
                [sys.executable, "-P", "-u", "-X", "faulthandler", "-m", f"{__package__}.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    os.set_blocking(_log(popen).fileno(), False)
    return EngineProcess(popen=popen, channel=ours, timeout=timeout)


def ask(process: EngineProcess, request: Request, *files: int) -> Answer:
    """Return the answer to a request.

    Args:
        process: one that owes no other answer.
        request: what is asked for.
        files: descriptors that go along.

    Raises:
        EngineCrashError: the process has ended, or did not answer in time and was ended.
        Exception: what the engine raised.
    """
    tell(process, request, *files)
    answer = await_answer(process)
    raise_failure(answer)
    return answer


def raise_failure(answer: Answer) -> None:
    """Raise what the engine raised instead of answering; the cause says where.

    Args:
        answer: of the process.

    Raises:
        Exception: the engine's.
    """
    if answer.failure is not None:
        cause = RuntimeError(f"in the process of the engine:\n{answer.failure.traceback}")
        raise raised_by(answer.failure) from cause


def tell(process: EngineProcess, request: Request, *files: int) -> None:
    """Write a request, whose answer is to be awaited later; answers come in the order of the requests.

    Args:
        process: the process.
        request: what is asked for.
        files: descriptors that go along.

    Raises:
        EngineCrashError: the process has ended, or did not read in time and was ended.
    """
    text = encode(request)  # before anything is written: what cannot be encoded costs nothing
    try:
        process.channel.settimeout(process.timeout)
        write(process.channel, text, *files)
    except TimeoutError:
        raise _crash(process, f"did not read a request for {_timeout_words(process)}") from None
    except OSError:
        raise _crash(process, None) from None
    except BaseException:  # nobody knows what has been written
        end_process(process)
        raise


def await_answer(process: EngineProcess) -> Answer:
    """Return the next answer, which may be a failure.

    Args:
        process: one that owes an answer.

    Raises:
        EngineCrashError: the process has ended, or did not answer in time and was ended.
    """
    deadline = time.monotonic() + process.timeout
    try:
        _hear(process, deadline)
        process.channel.settimeout(process.timeout)
        answer, _ = receive(process.channel, Answer)
    except TimeoutError:
        raise _crash(process, f"did not answer for {_timeout_words(process)}") from None
    except (EOFError, OSError):
        raise _crash(process, None) from None
    except BaseException:  # an answer that comes later would be taken for that to another request
        end_process(process)
        raise
    return answer


def await_until(process: EngineProcess, is_done: Callable[[], bool]) -> bool:
    """Return whether something was done beside answering; not if the process has answered instead.

    Args:
        process: one that owes an answer.
        is_done: asked again and again.

    Raises:
        EngineCrashError: the process has ended, or neither came in time and it was ended.
    """
    deadline = time.monotonic() + process.timeout
    try:
        while not is_done():
            with suppress(TimeoutError):
                _hear(process, time.monotonic() + _ASKED_SECONDS)
                return False
            if time.monotonic() > deadline:
                break
        else:
            return True
    except EOFError:
        raise _crash(process, None) from None
    except BaseException:  # as in `await_answer`
        end_process(process)
        raise
    raise _crash(process, f"did not come for {_timeout_words(process)}")


def end_process(process: EngineProcess, *, gently: bool = False) -> None:
    """End the process and all that it started, and wait until it is gone.

    Args:
        process: running or not.
        gently: let the engine close first.
    """
    if not process.is_running:
        return
    process.is_running = False
    if gently:
        with suppress(OSError, EOFError):
            process.channel.shutdown(socket.SHUT_WR)  # the end of all requests
            deadline, data = time.monotonic() + _CLOSING_SECONDS, b"..."
            while data:  # answers that nobody waits for any more, until the end of its side
                _hear(process, deadline)
                data = process.channel.recv(_LAST_WORDS)
    with suppress(ProcessLookupError):
        os.killpg(process.popen.pid, signal.SIGKILL)
    process.popen.wait()
    _listen(process)
    process.channel.close()
    _log(process.popen).close()


def _hear(process: EngineProcess, deadline: float) -> None:
    """Return when an answer begins, or the channel has ended; what is printed is read meanwhile.

    Raises:
        TimeoutError: neither was in time.
        EOFError: the process has ended, and something that it started holds its end of the channel open.
    """
    poll = select.poll()
    poll.register(process.channel, select.POLLIN)
    poll.register(_log(process.popen), select.POLLIN)
    while True:
        left = max(0.0, deadline - time.monotonic())
        heard = {file for file, _ in poll.poll(min(left, 1.0) * 1000)}
        if _log(process.popen).fileno() in heard and not _listen(process):
            poll.unregister(_log(process.popen))
        if process.channel.fileno() in heard:
            return
        if _has_ended(process.popen):
            raise EOFError
        if not left:
            raise TimeoutError


def _listen(process: EngineProcess) -> bool:
    """Read what was printed so far; return whether more can come."""
    while True:
        try:
            data = os.read(_log(process.popen).fileno(), _LAST_WORDS)
        except BlockingIOError:
            return True
        if not data:
            return False
        *lines, process.unfinished = (process.unfinished + data).split(b"\n")
        process.unfinished = process.unfinished[-_LAST_WORDS:]
        process.lines.extend(line.decode("utf-8", errors="replace") for line in lines)


def _crash(process: EngineProcess, problem: str | None) -> EngineCrashError:
    """End the process and return the error that tells how it ended: by itself, or because of a problem."""
    deadline = time.monotonic() + _CLOSING_SECONDS
    # its end of the channel is closed a moment before it has ended
    while problem is None and not _has_ended(process.popen) and time.monotonic() < deadline:
        time.sleep(0.01)
    end_process(process)
    code = process.popen.returncode
    how = problem or f"ended with exit code {code}{f' ({signal.Signals(-code).name})' if code < 0 else ''}"
    last = [*process.lines, *filter(None, [process.unfinished.decode("utf-8", errors="replace")])]
    said = "it printed nothing" if not last else "\n".join(["its last lines:", *last])
    return EngineCrashError(f"the process of the engine {how}; {said}")


def _has_ended(popen: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has ended, and let its number stay its own until its group has been ended, too."""
    if popen.returncode is not None:
        return True
    return os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _timeout_words(process: EngineProcess) -> str:
    return f"engine.timeout_seconds={process.timeout:g}; raise it if calls take so long"


def _log(popen: subprocess.Popen[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", popen.stdout)


def _environment() -> dict[str, str]:
    """Return this process's environment, but for its place among ranks, with its module search path."""
    ours = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {
        name: value for name, value in os.environ.items() if name not in ours and not name.startswith("TORCHELASTIC_")
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
