"""Ranks that are forks: found, ended and told about as processes of their own are, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import fork_programs
import psutil
import pytest
from forked_ranks import forks

import lightrft
from lightrft.errors import LawError
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import subject_of

GLOO = subject_of(build_gloo, "strategy")


def test_ranks_are_forks_of_one_process_with_what_they_are_given(
    spawn: SpawnRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each heads a process group of its own, with the directory and the environment of whoever starts it, and ends."""
    monkeypatch.setenv("LIGHTRFT_TEST_OF_FORKS", "of the second")
    monkeypatch.chdir(tmp_path)
    with processes(GLOO, 1, timeout=60, spawn=spawn) as alone, processes(GLOO, 2, timeout=60, spawn=spawn) as run:
        seen = [
            *alone(fork_programs.look, "LIGHTRFT_TEST_OF_FORKS"),
            *run(fork_programs.look, "LIGHTRFT_TEST_OF_FORKS"),
        ]
        assert len({one.parent for one in seen} - {os.getpid()}) == 1
        assert len({one.pid for one in seen}) == 3
        assert [one.group for one in seen] == [one.pid for one in seen]
        assert {(one.directory, one.variable) for one in seen} == {(str(tmp_path), "of the second")}
        assert [one.ranks for one in seen] == [1, 2, 2]
    assert not any(psutil.pid_exists(one.pid) for one in seen)


def test_a_rank_that_is_killed_is_named_and_the_next_program_has_new_ones(spawn: SpawnRank) -> None:
    """Its exit code and its last words are known."""
    with processes(GLOO, 2, timeout=60, spawn=spawn) as run:
        with pytest.raises(LawError, match=r"rank 1 ended with exit code -9 \(SIGKILL\)\nthe last words\n"):
            run(fork_programs.die, 1)
        assert run(fork_programs.die, 2) == [0, 1]


def test_nothing_is_left_when_the_parent_is_killed() -> None:
    """Neither ranks nor the process that forked them outlive it."""
    path = os.pathsep.join([str(Path(lightrft.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, fork_programs.__file__],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.split()) == 3
    left = [psutil.Process(pid) for pid in map(int, done.stdout.split()) if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=60)[1] == []


def test_a_process_of_two_threads_is_not_forked(tmp_path: Path) -> None:
    """Whoever imports what starts a thread is told, and nothing is left."""
    with forks(("thread_program",)) as spawn, pytest.raises(RuntimeError, match="must not have started others"):
        spawn(os.environ, tmp_path / "printed")
    assert not any(thread_program(child) for child in psutil.Process().children())


def thread_program(process: psutil.Process) -> bool:
    try:
        return "thread_program" in process.cmdline()
    except psutil.NoSuchProcess:  # a child of another test, which ended meanwhile
        return False
