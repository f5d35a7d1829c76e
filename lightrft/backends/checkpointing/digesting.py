"""Digests of the blocks of a file, taken beside its writing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from queue import SimpleQueue

__all__ = ["BLOCK_SIZE", "block_digests", "digesting"]

BLOCK_SIZE = 32 << 20
"""Bytes of a file that one digest is of, so that all cores can verify one file."""

_BEHIND_SIZE = 8 << 20  # bytes by which the digest may be behind when another chunk is begun; they stay in memory
_INLINE_SIZE = 1 << 16  # bytes below which handing a chunk to another thread costs more than it saves


def block_digests() -> tuple[Callable[[memoryview], None], Callable[[], str]]:
    """Return what takes the next bytes of a file, and what returns the SHA-256 of each block, in hexadecimal, joined.

    A file of one block has one digest, and so has an empty one.
    """
    digests = [hashlib.sha256()]
    size = 0  # of the last block

    def update(content: memoryview) -> None:
        nonlocal size
        while content:
            if size == BLOCK_SIZE:
                digests.append(hashlib.sha256())
                size = 0
            part = content[: BLOCK_SIZE - size]
            digests[-1].update(part)
            size += len(part)
            content = content[len(part) :]

    def joined() -> str:
        return "".join(digest.hexdigest() for digest in digests)

    return update, joined


@contextmanager
def digesting(update: Callable[[memoryview], object]) -> Generator[Callable[[memoryview], None], None, None]:
    """Yield what digests one chunk after the other, large ones in a thread beside the caller; at the end all are.

    The thread may be some bytes behind, so that neither waits for the other at every chunk.

    Args:
        update: takes the next bytes into the digest.

    Raises:
        Exception: at the end, what `update` raised.
    """
    waiting: SimpleQueue[memoryview | None] = SimpleQueue()
    done: SimpleQueue[int] = SimpleQueue()
    failures: list[Exception] = []
    # a plain thread, because a pool takes nothing any more once the main thread has ended, and a save may go on
    thread = threading.Thread(target=_digest_all, args=(update, waiting, done, failures))
    behind = 0

    def digest(chunk: memoryview) -> None:
        nonlocal behind
        while behind > _BEHIND_SIZE:
            behind -= done.get()
        if thread.ident is None and len(chunk) < _INLINE_SIZE:
            update(chunk)
            return
        if thread.ident is None:
            thread.start()
        behind += len(chunk)
        waiting.put(chunk)

    try:
        yield digest
    finally:
        waiting.put(None)
        if thread.ident is not None:
            thread.join()
    if failures:
        raise failures[0]


def _digest_all(
    update: Callable[[memoryview], object],
    waiting: SimpleQueue[memoryview | None],
    done: SimpleQueue[int],
    failures: list[Exception],
) -> None:
    while (chunk := waiting.get()) is not None:
        size = len(chunk)
        try:
            update(chunk)
        except Exception as error:  # noqa: BLE001 (raised where the chunks come from)
            failures.append(error)
        del chunk  # before the caller is told that its memory may be free
        done.put(size)
