"""Shared memory without a name: tensors go through it bit by bit, and what is wrong with them is refused."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from lightrft.backends.rollout.apart.memory import (
    Placed,
    Segment,
    free_segment,
    map_segment,
    new_segment,
    read_bucket,
    size_of,
    write_bucket,
)
from lightrft.errors import UnsupportedError, WeightSyncError

TENSORS = [
    ("floats", torch.randn(3, 5)),
    ("empty", torch.empty(0, 4)),
    ("one", torch.tensor(7)),
    ("halves", torch.randn(7).bfloat16()),
    ("turned", torch.randn(4, 6).T),
    ("stepped", torch.arange(10)[::3]),
    ("flags", torch.tensor([True, False, True])),
    ("special", torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64)),
]


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


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8)


def mapped() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:lightrft" in line]


def test_tensors_of_every_kind_go_through_bit_by_bit() -> None:
    """Layouts, dtypes, empty ones and single numbers; what is read is the memory itself and no copy."""
    with shared(size_of(TENSORS)) as (mine, theirs):
        bucket = write_bucket(mine, TENSORS)
        for (name, tensor), (read_name, read) in zip(TENSORS, read_bucket(theirs, bucket), strict=True):
            assert (read_name, read.dtype, read.shape) == (name, tensor.dtype, tensor.shape)
            assert torch.equal(bits(read), bits(tensor))
        with torch.no_grad():
            write_bucket(mine, [("floats", torch.zeros(3, 5))])
        floats = dict(read_bucket(theirs, bucket[1:]))
        assert not floats["one"].sub(7).any()
    del read, floats
    assert mapped() == []


def test_one_changed_byte_is_refused_by_the_name_of_its_tensor() -> None:
    """Tensors before it are read, and it is not."""
    tensors = [("first", torch.randn(9)), ("second", torch.randn(9))]
    with shared(size_of(tensors)) as (mine, theirs):
        bucket = write_bucket(mine, tensors)
        mine.map[bucket[1].offset + 35] ^= 1
        stream = read_bucket(theirs, bucket)
        assert next(stream)[0] == "first"
        with pytest.raises(WeightSyncError, match=r"tensor='second' arrived with other bytes than were sent"):
            next(stream)


def test_a_dtype_that_torch_has_not_is_refused() -> None:
    """A message cannot make anything else of torch out of a name."""
    placed = Placed(name="w", dtype="Tensor", shape=(1,), offset=0, digest=0)
    with shared(64) as (mine, _), pytest.raises(WeightSyncError, match="dtype='Tensor' is none of torch's"):
        next(read_bucket(mine, [placed]))


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
    with pytest.raises(UnsupportedError, match=r"engine.process='own' needs memory that Linux alone has"):
        new_segment(64)
