"""Which checkpoints stay."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import attrs

from lightrft.backends.checkpointing.durable import retire
from lightrft.backends.checkpointing.layout import MANIFEST, checkpoint_path, committed_steps
from lightrft.backends.checkpointing.manifest import Manifest, read_manifest
from lightrft.errors import CheckpointError

__all__ = ["Retention", "remove", "retain", "surplus"]


@attrs.frozen(kw_only=True)
class Retention:
    """Which checkpoints stay; the fields are the arguments of `SaveCkpt` of the same names.

    Attributes:
        max_num: how many newest ones; None sets no limit.
        max_mem: how many GB (1e9 bytes) in total; None sets no limit.
        keep_every: steps that are multiples of it are spared; 0 spares none.
        keep_best: so many with the largest metric are spared; 0 spares none.
    """

    max_num: int | None = None
    max_mem: float | None = None
    keep_every: int = 0
    keep_best: int = 0


@attrs.frozen(kw_only=True)
class _Standing:
    """A checkpoint that stands in the directory.

    Attributes:
        step: its step.
        path: its directory.
        num_bytes: size of its files, the manifest with them.
        metric: how good it is; None is unknown.
    """

    step: int
    path: Path
    num_bytes: int
    metric: float | None


def retain(directory: Path, retention: Retention, *, just_saved: int) -> dict[Path, OSError]:
    """Remove the checkpoints that need not stay, oldest first, and return those that cannot be removed, and why.

    Call it after a commit alone.

    Args:
        directory: directory of all checkpoints of the run.
        retention: which stay.
        just_saved: a step that stays also where newer ones of an earlier run stand beside it.
    """
    failures: dict[Path, OSError] = {}
    for path in surplus(directory, retention, just_saved=just_saved).values():
        try:
            remove(path)
        except OSError as error:
            failures[path] = error
    return failures


def remove(path: Path) -> None:
    """Remove a checkpoint; one that another process removes at the same time is gone just as well.

    Args:
        path: one that `surplus` returned.

    Raises:
        OSError: it is there and cannot be removed.
    """
    try:
        retire(path)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise


def surplus(directory: Path, retention: Retention, *, just_saved: int | None = None) -> dict[int, Path]:
    """Return the checkpoints that need not stay, by step, oldest first; `remove` removes one.

    Only a real directory that carries a manifest of ours of its own step is ever removed, or counted: symbolic links
    and what others left there stay, whatever their names.

    Args:
        directory: directory of all checkpoints of the run.
        retention: which stay.
        just_saved: a step that stays in any case, as the newest does.
    """
    if retention.max_num is None and retention.max_mem is None:
        return {}
    standing = _standing(directory)
    spared = {just_saved, *(one.step for one in standing[-1:]), *_spared(standing, retention)}
    total = sum(one.num_bytes for one in standing)
    found: dict[int, Path] = {}
    for index, one in enumerate(standing):
        is_too_many = retention.max_num is not None and len(standing) - index > retention.max_num
        is_too_much = retention.max_mem is not None and total > retention.max_mem * 1e9
        if one.step not in spared and (is_too_many or is_too_much):
            found[one.step] = one.path
            total -= one.num_bytes
    return found


def _spared(standing: Sequence[_Standing], retention: Retention) -> Iterator[int]:
    if retention.keep_every:
        yield from (one.step for one in standing if one.step % retention.keep_every == 0)
    ranked = sorted((one.metric, one.step) for one in standing if one.metric is not None)
    yield from (step for _, step in ranked[len(ranked) - min(retention.keep_best, len(ranked)) :])


def _standing(directory: Path) -> list[_Standing]:
    """Return our checkpoints by step."""
    found: list[_Standing] = []
    for step in committed_steps(directory):
        path = checkpoint_path(directory, step)
        manifest = None if path.is_symlink() else _our_manifest(path, step)
        if manifest is not None:
            with suppress(FileNotFoundError):  # another process removes it
                sizes = [file.size for file in manifest.files.values()]
                num_bytes = sum(sizes) + (path / MANIFEST).stat().st_size
                found.append(_Standing(step=step, path=path, num_bytes=num_bytes, metric=manifest.metric))
    return found


def _our_manifest(path: Path, step: int) -> Manifest | None:
    try:
        return read_manifest(path, step=step)
    except CheckpointError:
        return None
