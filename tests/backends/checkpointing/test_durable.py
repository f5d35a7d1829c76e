"""Files that are written, digested and synced, and digests that are taken beside."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightrft.backends.checkpointing.digesting import digesting
from lightrft.backends.checkpointing.durable import write_file, write_undigested
from lightrft.backends.checkpointing.tensor_files import safetensors_chunks

MIB = 1 << 20

Write = Callable[[Path, Iterator[memoryview | bytes]], object]


def content(*sizes: int) -> list[bytes]:
    """Chunks in which every byte depends on its place, so that a block which is lost or doubled shows."""
    return [bytes(range(number, number + 128)) * (size // 128) + bytes(size % 128) for number, size in enumerate(sizes)]


def digests_of(whole: bytes) -> str:
    """The digest of every 32 MiB, joined."""
    blocks = [whole[start : start + 32 * MIB] for start in range(0, len(whole) or 1, 32 * MIB)]
    return "".join(hashlib.sha256(block).hexdigest() for block in blocks)


@pytest.mark.parametrize("write", [write_file, write_undigested])
@pytest.mark.parametrize(
    "sizes", [(), (0,), (1, 2), (1 << 16, (1 << 16) - 1), (5, 21 * MIB + 3, 0, 9 * MIB, 7 * MIB, 40)]
)
def test_a_file_holds_its_chunks_in_order(tmp_path: Path, write: Write, sizes: tuple[int, ...]) -> None:
    """Small chunks and large ones, digested here or in another thread, stand in the file as they came."""
    chunks = content(*sizes)
    record = write(tmp_path / "file", iter(chunks))
    whole = b"".join(chunks)
    assert (tmp_path / "file").read_bytes() == whole
    if write is write_file:
        assert (record.size, record.sha256) == (len(whole), digests_of(whole))  # type: ignore[attr-defined]


@pytest.mark.parametrize("write", [write_file, write_undigested])
def test_one_that_is_there_is_not_written(tmp_path: Path, write: Write) -> None:
    """A file that exists is refused, and stays as it is."""
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", iter([b"other"]))
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("write", [write_file, write_undigested])
def test_the_disk_begins_before_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """While a large file is written, the disk is told of one run of bytes after the other, and the sync comes last.

    A file system that takes no advice gets the same bytes.
    """
    events: list[tuple[str, int, int]] = []
    fsync = os.fsync

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert os.fstat(descriptor).st_size == start + length  # written, and no more than that yet
        events.append(("advise", start, length))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", 0, os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    chunks = content(3, 37 * MIB, *[3 * MIB] * 6)
    write(tmp_path / "file", iter(chunks))
    size = sum(map(len, chunks))
    assert events[-1] == ("fsync", 0, size)
    told = events[:-1]
    ends = [0, *(start + length for _, start, length in told)]
    assert [start for _, start, _ in told] == ends[:-1]
    assert len(told) == 3
    assert size - ends[-1] < 16 * MIB + 4 * MIB
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)


@pytest.mark.parametrize("write", [write_file, write_undigested])
def test_the_first_failing_write_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """Nothing is asked for or written after an error of the disk; no thread and no open file are left."""
    asked: list[int] = []
    written: list[int] = []
    os_write = os.write

    def chunks() -> Iterator[bytes]:
        for number in range(4):
            asked.append(number)
            yield bytes(6 * MIB)

    def failing_write(descriptor: int, block: memoryview) -> int:
        if sum(written) >= 7 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(os_write(descriptor, block))
        return written[-1]

    def open_files() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    threads, descriptors = threading.active_count(), open_files()
    monkeypatch.setattr(os, "write", failing_write)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", chunks())
    assert asked == [0, 1]
    assert sum(written) == 10 * MIB
    assert threading.active_count() == threads
    assert open_files() == descriptors


def test_a_digest_stays_close_behind(tmp_path: Path) -> None:
    """While a chunk is made, at most the one before it and 8 MiB are in memory; at the end all are free."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def pieces() -> Iterator[torch.Tensor]:
        for number in range(40):
            alive.append(sum(4 for one in held if one() is not None))
            piece = torch.full((4 * MIB,), number, dtype=torch.uint8)
            held.append(weakref.ref(piece))
            yield piece
            del piece

    tensors = {"whole": torch.empty(160 * MIB, dtype=torch.uint8, device="meta")}
    record = write_file(tmp_path / "file", safetensors_chunks(tensors, pieces()))
    assert max(alive) <= 4 + 8
    assert not any(one() is not None for one in held)
    assert record.sha256 == digests_of((tmp_path / "file").read_bytes())


def test_a_digest_that_cannot_be_taken_is_an_error() -> None:
    """What the thread cannot digest is raised where the chunks come from, and no thread is left."""
    taken: list[int] = []

    def update(chunk: memoryview) -> None:
        taken.append(len(chunk))
        raise MemoryError

    def digest_all() -> None:
        with digesting(update) as digest:
            for _ in range(5):
                digest(memoryview(bytes(9 * MIB)))

    threads = threading.active_count()
    with pytest.raises(MemoryError):
        digest_all()
    assert taken == [9 * MIB] * 5
    assert threading.active_count() == threads
