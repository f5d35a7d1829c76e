"""Files and directories that survive a kill: everything is written beside its place, synced, and renamed into it.

    .step-00000042.tmp-<random>/    staging, locked while its writer lives
        lightrft.json               marker: a directory of ours that was never finished
        content/                    becomes step-00000042 by one rename

A killed writer leaves its staging directory, which the next writer of the same directory removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from lightrft.backends.checkpointing.digesting import block_digests, digesting
from lightrft.errors import CheckpointError

__all__ = [
    "FileRecord",
    "commit",
    "disk_errors",
    "find_leftovers",
    "make_directory",
    "remove_leftovers",
    "reserving",
    "retire",
    "stage",
    "staging",
    "sync_directory",
    "sync_tree",
    "write_file",
    "write_undigested",
]

_MARKER = "lightrft.json"
_CONTENT = "content"
_BLOCK_SIZE = 4 << 20  # bytes of one write; below the 2 GiB that one may take
_BACKLOG_SIZE = 16 << 20  # bytes that may wait until the disk is told to begin; large enough for it to be kept busy


@attrs.frozen(kw_only=True)
class FileRecord:
    """What a manifest knows of one file.

    Attributes:
        size: bytes.
        sha256: digest of each block of 32 MiB, the last one shorter, in hexadecimal, joined.
    """

    size: int
    sha256: str


@contextmanager
def disk_errors(setting: str, path: Path, *, advice: str) -> Generator[None, None, None]:
    """Turn an error of the file system into one line.

    Args:
        setting: name of the argument that holds the path.
        path: its value.
        advice: what to do.

    Raises:
        CheckpointError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or str(error)
        raise CheckpointError(f"{setting}={str(path)!r} failed: {reason}{where}; {advice}.") from error


def write_file(path: Path, chunks: Iterable[memoryview | bytes]) -> FileRecord:
    """Write a file that does not exist yet, sync it, and return its size and digests.

    Args:
        path: where.
        chunks: the content, in order, each with memory of its own or in its keeping.

    Raises:
        OSError: it exists, or cannot be written.
    """
    digest, joined = block_digests()
    size = 0
    with _new_file(path) as write, digesting(digest) as update:
        for chunk in chunks:
            update(memoryview(chunk))
            write(memoryview(chunk))
            size += len(chunk)
    return FileRecord(size=size, sha256=joined())


def write_undigested(path: Path, chunks: Iterable[memoryview | bytes]) -> None:
    """Write a file that does not exist yet, and sync it.

    Args:
        path: where.
        chunks: the content, in order.

    Raises:
        OSError: it exists, or cannot be written.
    """
    with _new_file(path) as write:
        for chunk in chunks:
            write(memoryview(chunk))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Args:
        path: the directory.
    """
    descriptor = _open_directory(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make every file and every name below a directory durable, for files that others wrote.

    Args:
        path: the directory.
    """
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def make_directory(path: Path) -> None:
    """Make a directory with its parents, durably; one that exists is left as it is.

    Args:
        path: the directory.

    Raises:
        OSError: it cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


@contextmanager
def reserving(target: Path) -> Generator[Path, None, None]:
    """Yield a directory beside the target, locked, for `stage`; what is left of it afterwards is removed.

    Args:
        target: where the content will stand; its parent exists.
    """
    root, descriptor = _locked_directory(target)
    try:
        yield root
    finally:
        # after a commit nothing but the marker is left, and the next writer would remove it
        with suppress(OSError):
            _remove_staging(root)
        os.close(descriptor)


def stage(root: Path) -> Path:
    """Return an empty directory to fill, which `commit` moves to its place.

    Args:
        root: what `reserving` yielded.
    """
    write_file(root / _MARKER, [b'{"format": "lightrft-unfinished", "version": 1}\n'])
    sync_directory(root)  # or a power loss may leave the content without the marker, which nobody would remove
    (root / _CONTENT).mkdir()
    return root / _CONTENT


@contextmanager
def staging(target: Path) -> Generator[Path, None, None]:
    """Yield an empty directory to fill, which `commit` moves to `target`; what is left afterwards is removed.

    Args:
        target: where the content will stand; its parent exists.
    """
    with reserving(target) as root:
        yield stage(root)


def commit(content: Path, target: Path) -> None:
    """Move a filled staging directory to its place in one step; its files are synced already.

    Args:
        content: what `staging` yielded.
        target: where it goes; nothing, or an empty directory.

    Raises:
        CheckpointError: something stands there.
    """
    sync_directory(content)
    try:
        content.rename(target)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"{target} exists already; nothing is ever overwritten, choose another.") from error
    except OSError as error:
        if target.exists():  # ENOTEMPTY has no type of its own
            raise CheckpointError(f"{target} exists already; nothing is ever overwritten, choose another.") from error
        raise
    sync_directory(target.parent)


def retire(path: Path) -> None:
    """Remove a directory so that a kill leaves either all of it or a staging directory.

    Args:
        path: the directory.
    """
    with staging(path) as content:
        path.rename(content)
        sync_directory(path.parent)


def remove_leftovers(parent: Path, name: str) -> list[str]:
    """Remove the staging directories of killed writers, and return the targets' names of those whose writers live.

    A directory is removed only if its name has our exact form, it holds our marker (or nothing at all) and nothing that
    a writer does not make, and no living process holds its lock.

    Args:
        parent: where to look.
        name: regular expression of the targets' names.
    """
    living: list[str] = []
    for path, target in find_leftovers(parent, name).items():
        with suppress(FileNotFoundError, NotADirectoryError):  # its writer has finished meanwhile, or it is a file
            if not _remove_if_abandoned(path):
                living.append(target)
    return living


def find_leftovers(parent: Path, name: str) -> dict[Path, str]:
    """Return what has the form of a staging directory, of a killed or a living writer, and the target's name of each.

    Args:
        parent: where to look.
        name: regular expression of the targets' names.
    """
    pattern = re.compile(rf"\.({name})\.tmp-[0-9a-f]{{16}}")
    found = [(path, pattern.fullmatch(path.name)) for path in sorted(parent.iterdir())]
    return {path: match[1] for path, match in found if match is not None and not path.is_symlink()}


def _locked_directory(target: Path) -> tuple[Path, int]:
    """Make a directory beside the target and lock it; file systems without locks hold none."""
    while True:
        root = target.with_name(f".{target.name}.tmp-{os.urandom(8).hex()}")  # `random` is part of what is saved
        root.mkdir()
        try:
            descriptor = _open_directory(root)
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise
            continue
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if root.exists():
            return root, descriptor
        os.close(descriptor)  # another writer took it for a leftover, between its making and its lock


def _remove_if_abandoned(root: Path) -> bool:
    """Remove a directory of ours that no writer has, and return whether no writer has it."""
    descriptor = _open_directory(root)
    try:
        is_abandoned = _try_lock(descriptor)
        if is_abandoned and _is_ours(root):
            _remove_staging(root)
    finally:
        os.close(descriptor)  # ends the lock, as the end of the process does
    return is_abandoned


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_ours(root: Path) -> bool:
    names = {path.name for path in root.iterdir()}
    if not names:
        return True  # killed between the making of the directory and that of its marker
    marker = root / _MARKER
    return names <= {_MARKER, _CONTENT} and os.path.lexists(marker) and stat.S_ISREG(marker.lstat().st_mode)


def _remove_staging(root: Path) -> None:
    if (root / _CONTENT).exists():
        shutil.rmtree(root / _CONTENT)
        sync_directory(root)
    # the marker goes last, so that a kill in between, or a power loss, leaves a directory that is still known as ours
    (root / _MARKER).unlink(missing_ok=True)
    root.rmdir()


@contextmanager
def _new_file(path: Path) -> Generator[Callable[[memoryview], None], None, None]:
    """Make a file and yield what writes the next bytes to it; all of them are synced at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    size = begun = 0

    def write(content: memoryview) -> None:
        nonlocal size, begun
        for start in range(0, len(content), _BLOCK_SIZE):
            block = content[start : start + _BLOCK_SIZE]
            _write_all(descriptor, block)
            size += len(block)
            if size - begun >= _BACKLOG_SIZE:
                _begin_to_store(descriptor, begun, size - begun)
                begun = size

    try:
        yield write
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, block: memoryview) -> None:
    written = 0
    while written < len(block):
        written += os.write(descriptor, block[written:])


def _begin_to_store(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with what was written, so that less is left to the sync; nothing is waited for."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError):  # advice; the sync comes in any case, and says what fails
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
