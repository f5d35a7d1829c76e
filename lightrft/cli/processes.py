"""The ranks of a run as processes of this machine: started, watched, asked to stop, and never left behind.

A pipe leads from the parent to each rank. Word to stop goes through it; when it closes, the parent has ended, however
that happened, and the rank ends itself. Ranks have sessions of their own, so that Ctrl-C reaches the parent alone, and
what a rank has started ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import attrs

from lightrft.cli.failures import EXIT_FAILED, EXIT_OK, EXIT_STOPPED
from lightrft.cli.terminal import complain
from lightrft.cli.voice import code_of_ranks, leave_word
from lightrft.loops.interrupt import ShouldStop, never_stop

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["is_rank_of_parent", "run_ranks", "stop_with_parent"]

_PIPE = "LIGHTRFT_PARENT_PIPE"
"""Variable with the number of the pipe's descriptor in a rank."""

_GRACE_SECONDS = 5.0
"""How long ranks may go on after one has failed: enough to say what they saw, and not to wait for a timeout."""

_POLL_SECONDS = 0.05


@attrs.frozen(kw_only=True, eq=False)
class _Rank:
    """A rank that was started.

    Attributes:
        number: its rank.
        process: the head of its session.
        pipe: descriptor that leads to it.
    """

    number: int
    process: subprocess.Popen[bytes]
    pipe: int


def run_ranks(num_ranks: int, arguments: Sequence[str], should_stop: ShouldStop) -> int:
    """Run a command of ours on ranks of this machine, and return its exit code when none of them is left.

    However this ends, by a signal too, the ranks end with it.

    Args:
        num_ranks: how many.
        arguments: of the command, without the program's name.
        should_stop: what it returns first is what all ranks are asked to stop for, at a step boundary.
    """
    from lightrft.backends.collectives.rendezvous import board_of, host_store

    with ExitStack() as ranks_end:
        store = host_store()
        ranks = [
            ranks_end.enter_context(_started(number, arguments, _environment(number, num_ranks, store.port)))
            for number in range(num_ranks)
        ]
        return _watch(ranks, board_of(store), should_stop)


def is_rank_of_parent() -> bool:
    """Return whether `run_ranks` started this process."""
    return _PIPE in os.environ


@contextmanager
def stop_with_parent() -> Generator[ShouldStop]:
    """Yield a function that tells whether the parent asked to stop; from here on this process ends with its parent.

    Where `run_ranks` did not start this process, nobody asks.
    """
    written = os.environ.get(_PIPE)
    if written is None:
        yield never_stop
        return
    pipe = int(written)
    os.set_inheritable(pipe, False)
    asked: list[str] = []

    def listen() -> None:
        while word := os.read(pipe, 64):
            asked.append(word.decode())
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def should_stop() -> str | None:
        return asked[0] if asked else None

    threading.Thread(target=listen, daemon=True).start()
    yield should_stop


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    # torchrun's variables, for every library that reads them; the store is there already
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@contextmanager
def _started(number: int, arguments: Sequence[str], environment: dict[str, str]) -> Generator[_Rank]:
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: S603 (our own interpreter, and our own command line)
            [sys.executable, "-m", "lightrft", *arguments],
            env={**environment, _PIPE: str(reading)},
            stdin=subprocess.DEVNULL,
            pass_fds=(reading,),
            start_new_session=True,
        )
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    try:
        yield _Rank(number=number, process=process, pipe=writing)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(writing)


def _watch(ranks: Sequence[_Rank], board: Store, should_stop: ShouldStop) -> int:
    """Return the exit code of all when all have ended, or when one has failed and the others had time to say so."""
    deadline, is_told = float("inf"), False
    while time.monotonic() < deadline:
        codes = {rank.number: rank.process.poll() for rank in ranks}
        if all(code is not None for code in codes.values()):
            break
        if deadline == float("inf") and any(code not in {None, EXIT_OK, EXIT_STOPPED} for code in codes.values()):
            _report_loss(ranks, board)
            deadline = time.monotonic() + _GRACE_SECONDS
        word = should_stop()
        if word and not is_told:
            is_told = True
            for rank in ranks:
                with suppress(BrokenPipeError):  # it has ended
                    os.write(rank.pipe, word.encode())
        time.sleep(_POLL_SECONDS)
    _report_loss(ranks, board)
    return _code(ranks, board)


def _report_loss(ranks: Sequence[_Rank], board: Store) -> None:
    """Tell of the first rank that ended and could not tell itself, unless the run has failed already."""
    for rank in ranks:
        code = rank.process.poll()
        if code in {None, EXIT_OK, EXIT_STOPPED} or code_of_ranks(board) is not None:
            continue
        leave_word(board, EXIT_FAILED)
        complain(
            f"error: rank {rank.number} of {len(ranks)} {_how_it_ended(code or 0)} and said nothing; the other ranks "
            "are ended. The same command goes on from the newest checkpoint."
        )


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    why = ", as the system does where memory runs out," if -code == signal.SIGKILL else ""
    return f"was ended by {name}{why}"


def _code(ranks: Sequence[_Rank], board: Store) -> int:
    failed = code_of_ranks(board)
    if failed is not None:
        return failed
    codes = {rank.process.poll() for rank in ranks}
    return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_OK
