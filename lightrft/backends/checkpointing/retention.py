"""Which checkpoints stay."""

from __future__ import annotations

from pathlib import Path

from lightrft.backends.checkpointing.durable import retire
from lightrft.backends.checkpointing.layout import checkpoint_path, committed_steps
from lightrft.backends.checkpointing.manifest import read_manifest
from lightrft.errors import CheckpointError

__all__ = ["keep_newest", "surplus"]


def keep_newest(directory: Path, *, max_num: int, just_saved: int) -> None:
    """Remove all checkpoints but the newest, oldest first; call it after a commit alone.

    Args:
        directory: directory of all checkpoints of the run.
        max_num: how many stay, at least 1.
        just_saved: a step that stays also where newer ones of an earlier run stand beside it.
    """
    for step, path in surplus(directory, max_num=max_num).items():
        if step != just_saved:
            retire(path)


def surplus(directory: Path, *, max_num: int) -> dict[int, Path]:
    """Return the checkpoints that are not among the newest, oldest first; `retire` removes one.

    Only a real directory that carries a manifest of ours of its own step is ever removed, or counted: symbolic links
    and what others left there stay, whatever their names.

    Args:
        directory: directory of all checkpoints of the run.
        max_num: how many stay, at least 1.
    """
    paths = {step: checkpoint_path(directory, step) for step in committed_steps(directory)}
    ours = [step for step, path in paths.items() if not path.is_symlink() and _carries_our_manifest(path, step)]
    return {step: paths[step] for step in ours[:-max_num]}


def _carries_our_manifest(path: Path, step: int) -> bool:
    try:
        read_manifest(path, step=step)
    except CheckpointError:
        return False
    return True
