"""Worker processes: started, written to, ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, cast

import attrs

from lightrft.testing.plain import to_json
from lightrft.testing.ranks.messages import Start

__all__ = ["Worker", "end_workers", "exit_words", "say", "start_workers"]

_TAIL = 5
"""Lines of what a worker printed that are shown when it has ended."""


@attrs.frozen(kw_only=True, eq=False)
class Worker:
    """A process that runs one rank.

    Attributes:
        rank: its number.
        process: the head of its process group.
        progress: file with its last call.
        printed: file with what it printed.
    """

    rank: int
    process: subprocess.Popen[str]
    progress: Path
    printed: Path


def start_workers(
    start: Start, world_size: int, *, port: int, directory: Path, lines: SimpleQueue[tuple[int, str | None]]
) -> list[Worker]:
    """Return the workers of all ranks, at once: they become ready later.

    Args:
        start: what each is told first, but for `progress`.
        world_size: number of ranks.
        port: of the store where they find one another, on this machine.
        directory: for their files.
        lines: gets (rank, line) for all that they say, and (rank, None) when one has ended.
    """
    workers: list[Worker] = []
    for rank in range(world_size):
        progress, printed = directory / f"progress-{rank}", directory / f"printed-{rank}"
        worker = Worker(
            rank=rank,
            process=_spawn(_environment(rank, world_size, port), printed),
            progress=progress,
            printed=printed,
        )
        workers.append(worker)
        threading.Thread(target=_listen, args=(worker, lines), daemon=True).start()
        say(worker, to_json(attrs.evolve(start, progress=str(progress)), Start))
    return workers


def say(worker: Worker, line: str) -> None:
    """Write a line to a worker; one that has ended hears nothing, and says so by its end.

    Args:
        worker: the worker.
        line: one line.
    """
    pipe = cast("IO[str]", worker.process.stdin)
    with suppress(BrokenPipeError):
        pipe.write(line + "\n")
        pipe.flush()


def end_workers(workers: list[Worker]) -> None:
    """Kill workers and all that they started, and wait until they are gone.

    Args:
        workers: running or not.
    """
    for worker in workers:
        if worker.process.returncode is None:  # else its number may be another process's
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
    for worker in workers:
        worker.process.wait()
        with suppress(BrokenPipeError):  # a line that nobody has read
            cast("IO[str]", worker.process.stdin).close()


def exit_words(worker: Worker) -> str:
    """Return in words how a worker ended, with the last lines that it printed.

    Args:
        worker: one that has ended.
    """
    code = worker.process.wait()
    name = f" ({signal.Signals(-code).name})" if code < 0 else ""
    printed = worker.printed.read_text("utf-8", errors="replace").splitlines()[-_TAIL:]
    return "\n".join([f"rank {worker.rank} ended with exit code {code}{name}", *printed])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    # as a launcher does, whose store is there already; the module search path is this process's
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }


def _spawn(environment: dict[str, str], printed: Path) -> subprocess.Popen[str]:
    with printed.open("a") as stderr:  # to append, because the worker empties it
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lightrft.testing.ranks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
            start_new_session=True,  # so that all that it starts can be ended with it
        )


def _listen(worker: Worker, lines: SimpleQueue[tuple[int, str | None]]) -> None:
    with cast("IO[str]", worker.process.stdout) as stdout:
        for line in stdout:
            lines.put((worker.rank, line))
    lines.put((worker.rank, None))
