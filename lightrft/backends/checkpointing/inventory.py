"""What stands in a directory of checkpoints, and what one of them holds; found without a model, ranks or torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import attrs

from lightrft.backends.checkpointing.durable import find_leftovers
from lightrft.backends.checkpointing.layout import (
    CLIENT_STATE,
    MANIFEST,
    STEP_PATTERN,
    checkpoint_path,
    committed_steps,
    step_directories,
    step_of,
    was_committed,
)
from lightrft.backends.checkpointing.lossless import as_dict, loads
from lightrft.backends.checkpointing.manifest import Manifest, read_manifest, verify_file
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["FoundCheckpoint", "find_checkpoint", "find_checkpoints", "read_client_state", "size_of"]


@attrs.frozen(kw_only=True)
class FoundCheckpoint:
    """One directory that is a checkpoint, or looks like one.

    Attributes:
        step: its step, by its name.
        path: where it stands.
        num_bytes: size of all its files.
        modified: when its manifest was written, or else the directory changed, in seconds since 1970.
        is_committed: whether it has a manifest.
        manifest: its manifest; None where it has none that can be read.
        problem: what keeps it from being loaded, as far as is seen without reading the files; None for nothing.
    """

    step: int
    path: Path
    num_bytes: int
    modified: float
    is_committed: bool
    manifest: Manifest | None
    problem: str | None


def find_checkpoints(directory: Path) -> list[FoundCheckpoint]:
    """Return what stands in a directory of checkpoints, by step: whole ones, broken ones, unfinished ones.

    Args:
        directory: directory of all checkpoints of the run; it need not exist.

    Raises:
        CheckpointError: it cannot be read.
    """
    found: list[FoundCheckpoint] = []
    committed = set(committed_steps(directory))
    for step, path in step_directories(directory):
        with suppress(FileNotFoundError):  # a run goes on in there, and removes what is old
            found.append(_found(step, path, is_committed=step in committed))
    unfinished = find_leftovers(directory, STEP_PATTERN) if directory.exists() else {}
    for path, name in unfinished.items():
        with suppress(FileNotFoundError):  # or commits what is new
            found.append(_unfinished(step_of(name), path))
    return sorted(found, key=_by_step)


def find_checkpoint(directory: Path, step: int) -> FoundCheckpoint:
    """Return what stands in the directory of one step.

    Args:
        directory: directory of all checkpoints of the run.
        step: its number.

    Raises:
        CheckpointError: there is no directory of this step.
    """
    path = checkpoint_path(directory, step)
    try:
        return _found(step, path, is_committed=step in committed_steps(directory))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there; use a step of {directory}.") from error


def read_client_state(directory: Path, manifest: Manifest) -> dict[str, Json]:
    """Return what the user saved beside the models, in the JSON form of the file.

    Args:
        directory: the checkpoint.
        manifest: its manifest, against which the file is verified.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = directory / CLIENT_STATE
    if CLIENT_STATE not in manifest.files:
        raise CheckpointError(f"{directory / MANIFEST} names no {CLIENT_STATE}; load another checkpoint.")
    verify_file(path, manifest.files[CLIENT_STATE])
    return as_dict(loads(path.read_bytes(), source=str(path)), source=str(path))


def size_of(path: Path) -> int:
    """Return the bytes of all files below a directory; symbolic links count as themselves.

    Args:
        path: the directory.
    """
    num_bytes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):  # a writer or a remover is at work
                num_bytes += (Path(folder) / name).lstat().st_size
    return num_bytes


def _found(step: int, path: Path, *, is_committed: bool) -> FoundCheckpoint:
    manifest, problem = None, None
    try:
        manifest = read_manifest(path, step=step)
    except CheckpointError as error:
        problem = str(error) if was_committed(path) else f"{path} is no checkpoint: it holds no {MANIFEST}."
    return FoundCheckpoint(
        step=step,
        path=path,
        num_bytes=size_of(path),
        modified=(path / MANIFEST if is_committed else path).stat().st_mtime,
        is_committed=is_committed,
        manifest=manifest,
        problem=problem,
    )


def _unfinished(step: int, path: Path) -> FoundCheckpoint:
    return FoundCheckpoint(
        step=step,
        path=path,
        num_bytes=size_of(path),
        modified=path.stat().st_mtime,
        is_committed=False,
        manifest=None,
        problem=f"{path} is unfinished: its writer is at work or was killed; the next save removes what was left.",
    )


def _by_step(found: FoundCheckpoint) -> tuple[int, str]:
    return found.step, found.path.name
