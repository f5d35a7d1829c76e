"""Ranks as forks of one process that imported everything once: a start of milliseconds where imports take seconds.

That process has one thread, no process group, and runs nothing but its loop, so a fork of it is whole. What differs
from a process of its own: ranks agree on the hashes of strings. What holds every law, what starts the command, and the
tests of pools have real ones. The side of the tests is `forks`; run as a program this file is the other side.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

import attrs

from lightrft.testing.ranks.spawn import SpawnRank

MESSAGE_BYTES = 2**20
PRELOADED = (
    "lightrft.testing.ranks.worker",
    "torch._dynamo",  # the first optimizer imports it
    "lightrft.backends.training.fsdp2",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
)
"""What most ranks import; DeepSpeed is not among them, as ranks that have it and ranks that lack it differ."""


@attrs.define(eq=False)
class Fork:
    """A rank, looked at as at a `subprocess.Popen`.

    Attributes:
        control: where the process is asked whose child it is.
        pid: its number, which is nobody else's until `wait` returned.
        stdin: what it reads.
        stdout: what it writes.
        returncode: as it ended, once `wait` returned.
    """

    control: socket.socket
    pid: int
    stdin: IO[str]
    stdout: IO[str]
    returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = ask(self.control, {"wait": self.pid})
        return self.returncode


@contextmanager
def forks(preloaded: Sequence[str] = PRELOADED) -> Iterator[SpawnRank]:
    """Yield what starts ranks as forks of a process that starts with the first of them, and ends here."""
    with tempfile.TemporaryFile("w+") as printed:
        servers: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []

        def spawn(environment: Mapping[str, str], to: Path) -> Fork:
            if not servers:
                servers.append(started(preloaded, printed))
            return forked(servers[0][0], environment, to)

        try:
            yield spawn
        finally:
            for control, server in servers:
                control.close()
                server.wait()


def started(preloaded: Sequence[str], printed: IO[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(  # noqa: S603 (our own program)
            [sys.executable, "-P", __file__, str(theirs.fileno()), *preloaded],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for who started it
        )
    try:
        ask(ours, {})  # answered when it is ready
    except EOFError:
        ours.close()
        server.wait()
        printed.seek(0)
        raise RuntimeError(printed.read()) from None
    return ours, server


def forked(control: socket.socket, environment: Mapping[str, str], printed: Path) -> Fork:
    out, into = os.pipe(), os.pipe()
    with printed.open("a") as stderr:
        theirs = (into[0], out[1], stderr.fileno())
        request = {"fork": dict(environment), "directory": str(Path.cwd())}
        try:
            pid = ask(control, request, theirs)
        finally:
            os.close(into[0])
            os.close(out[1])
    return Fork(control=control, pid=pid, stdin=os.fdopen(into[1], "w"), stdout=os.fdopen(out[0]))


def ask(control: socket.socket, request: Mapping[str, object], descriptors: tuple[int, ...] = ()) -> int:
    reply = b""
    with suppress(ConnectionError):  # it has ended, as it has where nothing comes
        socket.send_fds(control, [json.dumps(request).encode()], descriptors)
        reply = control.recv(MESSAGE_BYTES)
    if not reply:
        raise EOFError("the process that forks ranks has ended")
    return int(reply)


def main(control: socket.socket, preloaded: Sequence[str]) -> None:
    """Serve requests until the other side is gone."""
    gc.disable()  # a worker enables it
    for name in preloaded:
        importlib.import_module(name)
    gc.freeze()  # or the collections of a rank would copy the memory of all modules
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("a fork has one thread, so what is imported must not have started others")
    while True:
        line, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 3)
        if not line:
            return
        request = json.loads(line)
        control.send(str(served(request, descriptors, control)).encode())


def served(request: dict[str, object], descriptors: list[int], control: socket.socket) -> int:
    if isinstance(pid := request.get("wait"), int):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not isinstance(environment := request.get("fork"), dict):
        return 0
    pid = os.fork()
    if pid == 0:
        run_worker(environment, str(request["directory"]), descriptors, control)
    with suppress(PermissionError, ProcessLookupError):  # it has done it itself, and more since
        os.setpgid(pid, pid)  # before anybody ends its group
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def run_worker(environment: dict[str, str], directory: str, descriptors: list[int], control: socket.socket) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        control.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.path[:] = environment["PYTHONPATH"].split(os.pathsep)
        importlib.invalidate_caches()
        importlib.import_module("lightrft.testing.ranks.worker").main()
        code = 0
    except BaseException:  # noqa: BLE001 (told as an interpreter that ends tells it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
