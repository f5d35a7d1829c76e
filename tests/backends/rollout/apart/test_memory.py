"""Shared memory without a name."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from lightrft.backends.rollout.apart.buckets import read_bucket, size_of, write_bucket
from lightrft.backends.rollout.apart.memory import Segment, bytes_of, free_segment, map_segment, new_segment
from lightrft.errors import UnsupportedError, WeightSyncError


@contextmanager
def shared(size: int) -> Iterator[tuple[Segment, Segment]]:
    """Yield one piece of memory, mapped twice, as by two processes."""
    mine = new_segment(size)
    theirs = map_segment(os.dup(mine.file), size)
    try:
        yield mine, theirs
    finally:
        free_segment(mine)
        free_segment(theirs)


def mapped() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:lightrft" in line]


def test_what_is_read_is_the_memory_itself_and_no_copy() -> None:
    """What one process writes there, the other one sees."""
    tensors = [("zeros", torch.zeros(3, 5)), ("one", torch.tensor(7))]
    with shared(size_of(tensors)) as (mine, theirs):
        read = dict(read_bucket(bytes_of(theirs), write_bucket(bytes_of(mine), tensors)))
        write_bucket(bytes_of(mine), [("ones", torch.ones(3, 5))])
        assert read["zeros"].eq(1).all()
        assert read["one"].item() == 7
        del read
    assert mapped() == []


@pytest.mark.parametrize("size", [2**61, 2**20])
def test_memory_that_cannot_be_had_is_an_error_and_leaves_nothing(size: int) -> None:
    """Where it is missing is said at once; writing to memory that is not there would end the process."""
    files = psutil.Process().num_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        with pytest.raises(WeightSyncError, match=rf"{size} bytes of shared memory for weights cannot be had \("):
            new_segment(size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert psutil.Process().num_fds() <= files  # a pipe of a test before may be closed only now
    assert mapped() == []


def test_another_system_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Linux has memory without a name that goes through a socket."""
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UnsupportedError, match=r"engine.transport='memory' needs memory that Linux alone has"):
        new_segment(64)
