"""The manifest: what a checkpoint consists of, and the proof that it still does."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import attrs
import safetensors

from lightrft import __version__
from lightrft.backends.checkpointing.digesting import BLOCK_SIZE
from lightrft.backends.checkpointing.durable import FileRecord
from lightrft.backends.checkpointing.layout import MANIFEST
from lightrft.backends.checkpointing.lossless import as_dict, dumps, loads
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = [
    "FORMAT_VERSION",
    "Manifest",
    "find_damage",
    "num_blocks",
    "read_manifest",
    "render_manifest",
    "require_size",
    "verify_block",
    "verify_file",
]

FORMAT_VERSION = 1
"""Version of the layout that this module reads and writes."""
_FORMAT = "lightrft-checkpoint"
_BUFFER_SIZE = 4 << 20  # bytes that are digested at once; other threads run meanwhile
# no path, no hidden file and no name that a shell takes for an option
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


class OnRead(Protocol):
    """Is told how far reading has come."""

    def __call__(self, num_bytes: int, /) -> None:
        """Take note.

        Args:
            num_bytes: how many more were read.
        """
        ...


@attrs.frozen(kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: its step.
        world_size: ranks of the run that wrote it.
        metric: how good it is, larger is better; None where its saver did not say.
        files: size and digest of every file but the manifest, by name.
        strategy: key of the strategy that wrote it; None where it has none.
        libraries: versions of what wrote it, by name; `render_manifest` writes those of this process.
    """

    step: int
    world_size: int
    metric: float | None = None
    files: Mapping[str, FileRecord]
    strategy: str | None = None
    libraries: Mapping[str, str] = attrs.field(factory=dict[str, str])


def render_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`, which hold their own digest; equal manifests give equal bytes.

    Args:
        manifest: the record.
    """
    import torch

    return _seal(
        {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "step": manifest.step,
            "strategy": manifest.strategy,
            "world_size": manifest.world_size,
            "metric": manifest.metric,
            "libraries": {
                "lightrft": __version__,
                "python": platform.python_version(),
                "safetensors": safetensors.__version__,
                "torch": torch.__version__,
            },
            "files": {name: attrs.asdict(record) for name, record in sorted(manifest.files.items())},
        }
    )


def read_manifest(directory: Path, *, step: int) -> Manifest:
    """Return the manifest of a checkpoint.

    Args:
        directory: the checkpoint.
        step: the step that it should hold.

    Raises:
        CheckpointError: it is missing, damaged, of another step or of a newer format.
    """
    path = directory / MANIFEST
    content = as_dict(_unseal(path), source=str(path))
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is of the format {content.get('format')!r}, not {_FORMAT!r}; pass a checkpoint.")
    version = content.get("version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format version {version!r}, and this lightrft reads {FORMAT_VERSION}; "
            "install the lightrft that wrote it."
        )
    if content.get("step") != step:
        raise CheckpointError(f"{path} is of step {content.get('step')!r}, not {step}; load another checkpoint.")
    strategy = content.get("strategy")
    libraries = as_dict(content.get("libraries", {}), source=str(path))
    return Manifest(
        step=step,
        world_size=_whole(content.get("world_size"), path),
        metric=_metric(content.get("metric"), path),
        files=_files(content, path),
        strategy=None if strategy is None else str(strategy),
        libraries={name: str(version) for name, version in libraries.items()},
    )


def find_damage(directory: Path, *, step: int, on_read: OnRead | None = None) -> dict[str, str]:
    """Return what is wrong with each damaged file of a checkpoint, by its name; nothing where it verifies.

    Args:
        directory: the checkpoint.
        step: the step that it should hold.
        on_read: told of the bytes as they are read.
    """
    try:
        manifest = read_manifest(directory, step=step)
    except CheckpointError as error:  # it alone says what the others should be
        return {MANIFEST: str(error)}
    damage: dict[str, str] = {}
    for name, record in manifest.files.items():
        try:
            verify_file(directory / name, record, on_read=on_read)
        except CheckpointError as error:
            damage[name] = str(error)
    return damage


def verify_file(path: Path, record: FileRecord, *, on_read: OnRead | None = None) -> None:
    """Check the size and the digests of one file.

    Args:
        path: the file.
        record: what it should be.
        on_read: told of the bytes as they are read.

    Raises:
        CheckpointError: it is missing, is no plain file, or its content is not what was written.
    """
    require_size(path, record)
    for number in range(num_blocks(record)):
        verify_block(path, record, number, on_read=on_read)


def num_blocks(record: FileRecord) -> int:
    """Return how many digests a file has.

    Args:
        record: what the file should be.
    """
    return max(1, -(-record.size // BLOCK_SIZE))


def verify_block(path: Path, record: FileRecord, number: int, *, on_read: OnRead | None = None) -> None:
    """Check the digest of one block of a file.

    Args:
        path: the file.
        record: what it should be.
        number: of the block, from 0 to `num_blocks` less 1.
        on_read: told of the bytes as they are read.

    Raises:
        CheckpointError: the file cannot be read, or the block is not what was written.
    """
    try:
        digest = _digest(path, number * BLOCK_SIZE, on_read)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; load another checkpoint.") from error
    start = number * len(digest)
    is_whole = len(record.sha256) == num_blocks(record) * len(digest)
    if not is_whole or digest != record.sha256[start : start + len(digest)]:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one that was written; load another checkpoint."
        )


def require_size(path: Path, record: FileRecord) -> os.stat_result:
    """Check all of a file but its content, and return what the file system says of it.

    Args:
        path: the file.
        record: what it should be.

    Raises:
        CheckpointError: it is missing, is no plain file, or has another size than what was written.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; load another checkpoint.") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a plain file; load another checkpoint.")
    if status.st_size != record.size:
        raise CheckpointError(
            f"{path} has {status.st_size} bytes, and {record.size} were written; load another checkpoint."
        )
    return status


def _digest(path: Path, start: int, on_read: OnRead | None) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_SIZE))
    left = BLOCK_SIZE
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (num_bytes := file.readinto(buffer[:left])):
            digest.update(buffer[:num_bytes])
            left -= num_bytes
            if on_read is not None:
                on_read(num_bytes)
    return digest.hexdigest()


def _seal(content: dict[str, Json]) -> bytes:
    return dumps({"content": content, "sha256": hashlib.sha256(dumps(content)).hexdigest()}, indent=2)


def _unseal(path: Path) -> Json:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path} is not a plain file; load another checkpoint.")
        written = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; load another checkpoint.") from error
    content = as_dict(loads(written, source=str(path)), source=str(path)).get("content")
    # compared as bytes, so that no change is too small to notice
    if not isinstance(content, dict) or _seal(content) != written:
        raise CheckpointError(f"{path} is damaged: it is not what was written; load another checkpoint.")
    return content


def _files(content: dict[str, Json], path: Path) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for name, value in as_dict(content.get("files"), source=str(path)).items():
        if _PLAIN_NAME.fullmatch(name) is None or name == MANIFEST:
            raise CheckpointError(
                f"{path} names the file {name!r}, which no checkpoint holds; do not trust its source."
            )
        fields = as_dict(value, source=str(path))
        records[name] = FileRecord(size=_whole(fields.get("size"), path), sha256=str(fields.get("sha256")))
    return records


def _whole(value: Json, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{path} holds {value!r} where a whole number belongs; load another checkpoint.")
    return value


def _metric(value: Json, path: Path) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise CheckpointError(f"{path} holds {value!r} where a number belongs; load another checkpoint.")
    return value
