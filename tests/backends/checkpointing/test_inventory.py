"""What stands in a directory of checkpoints, while others write to it and remove from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.checkpointing.durable import staging
from lightrft.backends.checkpointing.inventory import find_checkpoint, find_checkpoints, size_of
from lightrft.errors import CheckpointError


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    """A directory that is not there, an empty one and one of others' files hold no checkpoint."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "step-1").mkdir()
    (tmp_path / "others" / "step-00000001").write_text("a file")
    assert find_checkpoints(tmp_path / "none") == find_checkpoints(tmp_path / "others") == []
    with pytest.raises(CheckpointError, match="step-00000001 is not there"):
        find_checkpoint(tmp_path / "none", 1)


def test_a_writer_at_work_is_seen(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A checkpoint that is being written is found as unfinished, by its step, and is none when it is given up."""
    path = checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=2)
    with staging(tmp_path / "step-00000001") as content:
        (content / "file").write_bytes(bytes(50))
        first, second = find_checkpoints(tmp_path)
        assert (first.step, first.path, first.is_committed) == (1, content.parent, False)
        assert first.num_bytes == size_of(content.parent) > 50
    assert (second.step, second.path, second.is_committed, second.problem) == (2, path, True, None)
    assert find_checkpoints(tmp_path) == [second] == [find_checkpoint(tmp_path, 2)]


@pytest.mark.parametrize("pattern", ["step-*", ".step-*"])
def test_what_goes_meanwhile_is_passed_over(
    tmp_path: Path, checkpointing: CheckpointFunctions, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """A checkpoint that a run removes, or finishes, while it is looked at does not keep the others from being found."""
    for step in (1, 2):
        checkpointing.save_ckpt(nn.Linear(1, 1), tmp_path, step=step)
    (tmp_path / ".step-00000001.tmp-0123456789abcdef").mkdir()

    def size_and_remove(path: Path) -> int:
        shutil.rmtree(next(iter(tmp_path.glob(pattern.replace("*", "00000001*"))), path / "none"), ignore_errors=True)
        return size_of(path)

    monkeypatch.setattr("lightrft.backends.checkpointing.inventory.size_of", size_and_remove)
    whole = [found.path.name for found in find_checkpoints(tmp_path) if found.is_committed]
    assert whole == (["step-00000002"] if pattern == "step-*" else ["step-00000001", "step-00000002"])
