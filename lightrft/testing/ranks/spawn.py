"""Worker processes: started, written to, ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Protocol, cast

import attrs

from lightrft.testing.plain import to_json
from lightrft.testing.ranks.messages import Start

__all__ = ["RankProcess", "SpawnRank", "Worker", "end_workers", "exit_words", "say", "spawn_rank", "start_workers"]

_TAIL = 5
"""Lines of what a worker printed that are shown when it has ended."""


class RankProcess(Protocol):
    """What is asked of the process of a rank, as `subprocess.Popen` answers it."""

    @property
    def pid(self) -> int:
        """Its number, and that of its process group; nobody else's until `wait` returned."""
        ...

    @property
    def stdin(self) -> IO[str] | None:
        """What it reads."""
        ...

    @property
    def stdout(self) -> IO[str] | None:
        """What it writes."""
        ...

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it, once `wait` returned."""
        ...

    def wait(self) -> int:
        """Wait until it has ended; return its exit code."""
        ...


class SpawnRank(Protocol):
    """Starts the process of a rank: `lightrft.testing.ranks.worker`, at the head of a process group of its own."""

    def __call__(self, environment: Mapping[str, str], printed: Path, /) -> RankProcess:
        """Return the process, with pipes for what it reads and writes.

        Args:
            environment: all its variables.
            printed: file to which its standard error is appended.
        """
        ...


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
    process: RankProcess
    progress: Path
    printed: Path


def start_workers(
    start: Start,
    world_size: int,
    *,
    spawn: SpawnRank,
    port: int,
    directory: Path,
    lines: SimpleQueue[tuple[int, str | None]],
) -> list[Worker]:
    """Return the workers of all ranks, at once: they become ready later.

    Args:
        start: what each is told first, but for `progress`.
        world_size: number of ranks.
        spawn: starts each of them.
        port: of the store where they find one another, on this machine.
        directory: for their files.
        lines: gets (rank, line) for all that they say, and (rank, None) when one has ended.
    """
    workers: list[Worker] = []
    for rank in range(world_size):
        progress, printed = directory / f"progress-{rank}", directory / f"printed-{rank}"
        worker = Worker(
            rank=rank,
            process=spawn(_environment(rank, world_size, port), printed),
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


def spawn_rank(environment: Mapping[str, str], printed: Path, /) -> RankProcess:
    """Return a new interpreter that runs a rank.

    Args:
        environment: all its variables.
        printed: file to which its standard error is appended.
    """
    with printed.open("a") as stderr:  # to append, because the worker empties it
        # to look for garbage among what it imports would take a fifth of its start
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                "import gc; gc.disable(); from lightrft.testing.ranks.worker import main; main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
            start_new_session=True,  # so that all that it starts can be ended with it
        )


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


def _listen(worker: Worker, lines: SimpleQueue[tuple[int, str | None]]) -> None:
    with cast("IO[str]", worker.process.stdout) as stdout:
        for line in stdout:
            lines.put((worker.rank, line))
    lines.put((worker.rank, None))
