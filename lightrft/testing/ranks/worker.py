"""One rank in a process of its own, which runs the programs that a pool asks for: `lightrft.testing.ranks.processes`.

It reads jobs from its standard input and ends with it, so that it never outlives its parent. What programs print goes
to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import attrs
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lightrft.backends.streams import new_streams, restore_streams
from lightrft.config import EngineConfig, StrategyConfig
from lightrft.failures import failure_of
from lightrft.testing.plain import from_json, to_json
from lightrft.testing.ranks.here import strategies_torn_down
from lightrft.testing.ranks.last_call import with_last_call
from lightrft.testing.ranks.messages import CLOSE, Job, Reply, Start, find_program, types_of_program
from lightrft.testing.subject import Subject, subject_of

__all__ = ["main"]


@attrs.frozen(kw_only=True, eq=False)
class _Place:
    """Which rank this is, of how many, and how long a collective waits for the others."""

    rank: int
    world_size: int
    timeout: float


def main() -> None:
    """Serve jobs until standard input ends."""
    replies = _take_stdout()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    start = from_json(lines.get(), Start)
    try:
        subject = _subject(start)
        # torch imports seconds' worth of modules with its first optimizer, which no program should be charged with
        torch.optim.SGD([torch.zeros(1)])
        gc.freeze()  # nor with walks over these modules, which a backend that collects garbage itself would make often
        gc.enable()  # what starts a worker may have turned it off until here
        store: Store = next(rendezvous("env://"))[0]
    except BaseException as error:  # noqa: BLE001 (the parent raises it)
        _say(replies, Reply(failure=failure_of(error)))
        return
    _say(replies, Reply())
    _serve(lines, replies, start, subject, store)


def _serve(lines: queue.SimpleQueue[str], replies: TextIO, start: Start, subject: Subject, store: Store) -> None:
    place = _Place(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), timeout=start.timeout)
    num_jobs, group = 0, None
    while True:
        line = lines.get()
        if line == CLOSE:
            _leave_group()
            continue
        job = from_json(line, Job)
        num_jobs += 1
        _forget(start)
        try:
            if job.group != group or not dist.is_initialized():  # a program may have destroyed it
                _leave_group()
                _join_group(PrefixStore(f"{job.group}/{num_jobs}", store), place)
                group = job.group
            _say(replies, Reply(evidence=_run(job, subject, place)))
        except BaseException as error:  # noqa: BLE001 (as above)
            _say(replies, Reply(failure=failure_of(error)))
            # as if the process had ended: ranks that wait for this one are told so at once
            _leave_group()


def _forget(start: Start) -> None:
    """Let the files of this worker speak of the new job alone."""
    Path(start.progress).write_text("")
    sys.stderr.flush()
    os.ftruncate(sys.stderr.fileno(), 0)


def _take_stdout() -> TextIO:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line.rstrip("\n"))
    # the parent has ended, and this process with it, wherever it is, and whatever it started
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _say(replies: TextIO, reply: Reply) -> None:
    replies.write(to_json(reply, Reply) + "\n")
    replies.flush()


def _subject(start: Start) -> Subject:
    subject = subject_of(
        start.target,
        start.kind,
        config=StrategyConfig.from_mapping(json.loads(start.config)),
        engine=EngineConfig(**json.loads(start.engine)),
    )
    return attrs.evolve(subject, build=with_last_call(subject.build, start.progress))


def _join_group(store: Store, place: _Place) -> None:
    timeout = timedelta(seconds=place.timeout)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    dist.barrier()  # a rank that is through, and leaves, would break the connections that others still make


def _leave_group() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # what is broken need not be taken apart in good order
            dist.destroy_process_group()


def _run(job: Job, subject: Subject, place: _Place) -> str:
    program = find_program(job.program)
    case, evidence = types_of_program(program)
    directory = Path(job.directory)
    restore_streams(new_streams(seed=place.rank))  # every program begins as in a new process
    with strategies_torn_down(subject, rank=place.rank, world_size=place.world_size, directory=directory) as rank:
        return to_json(program(rank, from_json(job.case, case)), evidence)
