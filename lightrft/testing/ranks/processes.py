"""Ranks as processes that stay: starting one takes seconds, asking it for another example takes milliseconds.

Whatever happens in a worker, the caller is told within the timeout, and the next program finds a whole pool again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

import attrs
from torch._C._distributed_c10d import TCPStore

from lightrft.errors import ConfigError, LawError
from lightrft.failures import raised_by
from lightrft.testing.plain import from_json, to_json
from lightrft.testing.ranks.here import scratch_directory
from lightrft.testing.ranks.last_call import read_last_call
from lightrft.testing.ranks.messages import (
    CLOSE,
    Job,
    Reply,
    Start,
    name_of_program,
    start_of_subject,
    types_of_program,
)
from lightrft.testing.ranks.spawn import SpawnRank, Worker, end_workers, exit_words, say, spawn_rank, start_workers
from lightrft.testing.ranks.watchdog import StuckError
from lightrft.testing.subject import Program, RunOnRanks, Subject

__all__ = ["processes"]

_Case = TypeVar("_Case")
_Evidence = TypeVar("_Evidence")

_START_SECONDS = 120.0
"""How long workers may take to import torch and the subject, which is slow where many do at once."""

_PATIENCE_SECONDS = 1.0
"""How long a rank that has ended stays in its process group, so that the last bytes of others can arrive."""

_CLOSING_SECONDS = 3.0
"""How long its connections may take to close then; its process is ended if something in it keeps them open."""

_GRACE_SECONDS = 5.0
"""How long ranks may go on after one has failed; its sockets are closed, so whoever waits for it is told at once."""


@attrs.define(kw_only=True, eq=False)
class _Pool:
    """What the functions of this module share.

    Attributes:
        start: what each worker is told first, but for the file of its last call.
        world_size: number of ranks.
        timeout: seconds that a program may take.
        spawn: starts a worker.
        directory: for the files of workers.
        store: where workers find one another; its port is the system's choice.
        group: number of the process group; what breaks one makes the next program use a new one.
        workers: those that run; none before the first program, and after a failure that needs new ones.
        lines: what they say.
    """

    start: Start
    world_size: int
    timeout: float
    spawn: SpawnRank
    directory: Path
    store: TCPStore
    group: int = 0
    workers: list[Worker] = attrs.field(factory=list[Worker])
    lines: SimpleQueue[tuple[int, str | None]] = attrs.field(factory=SimpleQueue[tuple[int, str | None]])


@contextmanager
def processes(
    subject: Subject, world_size: int, *, timeout: float = 90.0, spawn: SpawnRank = spawn_rank
) -> Generator[RunOnRanks]:
    """Yield what runs programs on ranks in processes of their own, over gloo; afterwards all of them are gone.

    The workers start with the first program. Programs and subject are found there by their names, with the module
    search path of this process. A program that takes longer than the timeout is a `StuckError` that names the last call
    of every rank.

    Args:
        subject: what is held to the laws.
        world_size: number of ranks.
        timeout: seconds that a program may take.
        spawn: starts the process of a rank, by default as a new interpreter.

    Raises:
        ConfigError: the subject is not found by its name, or a number makes no sense.
    """
    if world_size < 1 or not timeout > 0:
        raise ConfigError(f"world_size={world_size!r} and timeout={timeout!r} must be positive; use 2 and 90.")
    with scratch_directory() as directory:
        pool = _Pool(
            # a program is given up before a collective of it would be, because the pool knows of all ranks
            start=start_of_subject(subject, timeout=2 * timeout),
            world_size=world_size,
            timeout=timeout,
            spawn=spawn,
            directory=directory,
            store=TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
        )

        def run(program: Program[_Case, _Evidence], case: _Case) -> list[_Evidence]:
            return _run(pool, program, case)

        try:
            yield run
        finally:
            _end(pool)


def _run(pool: _Pool, program: Program[_Case, _Evidence], case: _Case) -> list[_Evidence]:
    name = name_of_program(program)
    case_type, evidence_type = types_of_program(program)
    written = to_json(case, case_type)
    with scratch_directory() as directory:
        try:
            if not pool.workers:
                _start(pool)
            job = Job(program=name, case=written, directory=str(directory), group=pool.group)
            for worker in pool.workers:
                say(worker, to_json(job, Job))
            replies = _collect(pool, pool.timeout, free=(_close_group, _end_ended))
        except BaseException:  # workers that still run, or will never answer, are of no use to the next program
            _end(pool)
            raise
    _raise_first(pool, replies)
    evidence = (cast("str", replies[rank].evidence) for rank in range(pool.world_size))
    return [from_json(each, evidence_type) for each in evidence]


def _start(pool: _Pool) -> None:
    pool.group += 1
    pool.lines = SimpleQueue()
    pool.workers = start_workers(
        pool.start,
        pool.world_size,
        spawn=pool.spawn,
        port=pool.store.port,
        directory=pool.directory,
        lines=pool.lines,
    )
    _raise_first(pool, _collect(pool, _START_SECONDS))


def _end(pool: _Pool) -> None:
    end_workers(pool.workers)
    pool.workers = []


def _raise_first(pool: _Pool, replies: dict[int, Reply]) -> None:
    for rank, reply in replies.items():
        if reply.failure is not None:
            pool.group += 1
            error = raised_by(reply.failure, otherwise=LawError)
            for note in (f"on rank {rank}", reply.failure.traceback):
                error.add_note(note)
            raise error


def _collect(
    pool: _Pool, timeout: float, *, free: Sequence[Callable[[_Pool, dict[int, Reply]], None]] = ()
) -> dict[int, Reply]:
    """Return the replies of workers in the order of their arrival: all, unless a failed one stopped the rest.

    Where some have replied and the rest may wait for them, the ways in `free` are tried, one after the other.
    """
    replies: dict[int, Reply] = {}
    deadline, patience = time.monotonic() + timeout, float("inf")
    ways = list(free)
    while len(replies) < pool.world_size:
        try:
            rank, line = pool.lines.get(timeout=max(0.0, min(deadline, patience) - time.monotonic()))
        except Empty:
            if patience < deadline:
                ways.pop(0)(pool, replies)
                patience = time.monotonic() + _CLOSING_SECONDS if ways else float("inf")
                continue
            if any(reply.failure for reply in replies.values()):
                _end(pool)
                return replies
            raise StuckError(_stuck_words(pool, replies, timeout)) from None
        if line is None and rank in replies:  # it was ended here
            continue
        if line is None:
            worker, calls = pool.workers[rank], _last_calls(pool, replies)
            end_workers(pool.workers)  # before anybody asks for its exit code: then its number may be another process's
            raise LawError(f"{exit_words(worker)}\n{calls}")
        replies[rank] = from_json(line, Reply)
        ways, patience = list(free), time.monotonic() + _PATIENCE_SECONDS if free else float("inf")
        if replies[rank].failure:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if any(worker.process.returncode is not None for worker in pool.workers):
        _end(pool)
    return replies


def _close_group(pool: _Pool, replies: dict[int, Reply]) -> None:
    """Let ranks that have ended leave their process group, so that collectives which wait for them fail at once."""
    pool.group += 1
    for worker in (pool.workers[rank] for rank in replies):
        if worker.process.returncode is None:
            say(worker, CLOSE)


def _end_ended(pool: _Pool, replies: dict[int, Reply]) -> None:
    end_workers([pool.workers[rank] for rank in replies])


def _stuck_words(pool: _Pool, replies: dict[int, Reply], timeout: float) -> str:
    return (
        f"timeout={timeout:g} seconds were not enough for the program: {_last_calls(pool, replies)}; let every rank "
        "make the same calls in the same order."
    )


def _last_calls(pool: _Pool, replies: dict[int, Reply]) -> str:
    return "; ".join(
        f"rank {worker.rank} {'has ended the program' if worker.rank in replies else read_last_call(worker.progress)}"
        for worker in pool.workers
    )
