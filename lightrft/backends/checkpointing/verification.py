"""Who verifies which file of a checkpoint before any rank applies one.

Every byte is verified by a process that sees the very file that is applied. Ranks of one machine that see the same
files share them out; a rank with a disk, or a machine, of its own verifies all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lightrft.backends.checkpointing.durable import FileRecord
from lightrft.backends.checkpointing.manifest import num_blocks, require_size, verify_block

__all__ = ["identity_of", "share_of", "verifying"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_THREADS = 4  # a core digests 1 to 2 GB/s, and few disks have more to give than so many


def identity_of(directory: Path, files: Mapping[str, FileRecord], *, rank: int) -> str:
    """Return a text that only ranks have in common that read the same files through one kernel.

    Args:
        directory: the checkpoint.
        files: what it should hold.
        rank: number of this process.

    Raises:
        CheckpointError: a file is missing, is no plain file, or has another size than what was written; it is named.
    """
    found = [require_size(directory / name, record) for name, record in sorted(files.items())]
    try:
        machine = _BOOT_ID.read_text()
    except OSError:  # not Linux
        machine = f"rank {rank}"
    places = [(status.st_dev, status.st_ino) for status in found]
    return hashlib.sha256(f"{machine} {places}".encode()).hexdigest()


def share_of(files: Mapping[str, FileRecord], identities: Sequence[str], *, rank: int) -> dict[str, FileRecord]:
    """Return the files that a rank verifies; with those of the ranks of its identity they are all.

    Args:
        files: what the checkpoint should hold.
        identities: `identity_of` on every rank, in rank order.
        rank: number of the process.

    Example:
        >>> files = {name: FileRecord(size=size, sha256="") for name, size in [("a", 1), ("b", 5), ("c", 3)]}
        >>> [sorted(share_of(files, ["one", "other", "one"], rank=rank)) for rank in range(3)]
        [['b'], ['a', 'b', 'c'], ['a', 'c']]
    """
    loads = {other: 0 for other, identity in enumerate(identities) if identity == identities[rank]}
    share: dict[str, FileRecord] = {}
    for name, record in _largest_first(files):
        least = min(loads, key=loads.__getitem__)
        loads[least] += record.size
        if least == rank:
            share[name] = record
    return share


@contextmanager
def verifying(directory: Path, files: Mapping[str, FileRecord]) -> Generator[None, None, None]:
    """Check the digests of files in the background of the body, and wait for that at its end.

    Args:
        directory: the checkpoint.
        files: which ones, and what they should be; their sizes have been checked by `identity_of`.

    Raises:
        CheckpointError: at the end, of the first by name whose content is not what was written.
    """
    # digesting and reading let other threads run
    with ThreadPoolExecutor(max_workers=min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        checks = {
            name: [pool.submit(verify_block, directory / name, record, number) for number in range(num_blocks(record))]
            for name, record in _largest_first(files)
        }
        yield
        for name in sorted(checks):
            for check in checks[name]:
                check.result()


def _largest_first(files: Mapping[str, FileRecord]) -> list[tuple[str, FileRecord]]:
    # so that what is left at the end is small
    return sorted(files.items(), key=_size_and_name)


def _size_and_name(item: tuple[str, FileRecord]) -> tuple[int, str]:
    name, record = item
    return -record.size, name
