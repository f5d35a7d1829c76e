"""Which rank verifies which file, and what is said of those that are damaged."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.backends.checkpointing import verification
from lightrft.backends.checkpointing.digesting import BLOCK_SIZE
from lightrft.backends.checkpointing.durable import FileRecord, write_file
from lightrft.backends.checkpointing.manifest import verify_file
from lightrft.backends.checkpointing.verification import identity_of, share_of, verifying
from lightrft.errors import CheckpointError


def record_of(content: bytes) -> FileRecord:
    return FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_every_block_of_a_large_file_has_its_digest(tmp_path: Path) -> None:
    """A bit that flips in any block, blocks that change places and a digest too few are damage; the file is not."""
    path, content = tmp_path / "large", bytearray(2 * BLOCK_SIZE + 1)
    content[BLOCK_SIZE] = 1
    record = write_file(path, [bytes(content)])
    assert len(record.sha256) == 3 * 64
    verify_file(path, record)
    for wrong in (0, BLOCK_SIZE, 2 * BLOCK_SIZE):
        with path.open("r+b") as file:
            file.seek(wrong)
            file.write(bytes([content[wrong] ^ 4]))
        with pytest.raises(CheckpointError, match="large is damaged"), verifying(tmp_path, {"large": record}):
            pass
        path.write_bytes(content)
    path.write_bytes(content[BLOCK_SIZE:-1] + content[:BLOCK_SIZE] + content[-1:])
    with pytest.raises(CheckpointError, match="large is damaged"):
        verify_file(path, record)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="large is damaged"):
        verify_file(path, FileRecord(size=record.size, sha256=record.sha256[:-64]))


def write(directory: Path, **contents: bytes) -> dict[str, FileRecord]:
    directory.mkdir(exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return {name: record_of(content) for name, content in contents.items()}


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(0, 9), max_size=9),
    st.lists(st.sampled_from("xyz"), min_size=1, max_size=6),
)
def test_ranks_that_see_the_same_files_verify_each_once(sizes: dict[str, int], identities: list[str]) -> None:
    """Within every group of ranks of one identity each file is verified by exactly one of them."""
    files = {name: FileRecord(size=size, sha256="") for name, size in sizes.items()}
    for identity in set(identities):
        shares = [share_of(files, identities, rank=n) for n, other in enumerate(identities) if other == identity]
        assert sorted(name for share in shares for name in share) == sorted(files)
        largest = max(sizes.values(), default=0)
        loads = [sum(record.size for record in share.values()) for share in shares]
        assert max(loads) <= sum(loads) / len(shares) + largest


def test_ranks_are_alike_where_they_read_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the files, a file that was replaced and another machine make another identity; a rank does not."""
    files = write(tmp_path / "a", one=b"1", two=b"22")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = identity_of(tmp_path / "a", files, rank=0)
    assert identity_of(tmp_path / "a", files, rank=1) == first
    assert identity_of(tmp_path / "b", files, rank=0) != first
    shutil.copy(tmp_path / "a" / "one", tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "a" / "one")
    assert identity_of(tmp_path / "a", files, rank=0) != first
    monkeypatch.setattr(verification, "_BOOT_ID", tmp_path / "none")  # a system that does not say which machine it is
    assert identity_of(tmp_path / "a", files, rank=0) != identity_of(tmp_path / "a", files, rank=1)


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_damage_is_named_at_the_end(tmp_path: Path, size: int) -> None:
    """The body runs to its end; then the first damaged file by name is named, of whatever size."""
    files = write(tmp_path / "run", a=b"whole", b=b"-" * size + b"1", c=b"2")
    (tmp_path / "run" / "c").write_bytes(b"3")
    (tmp_path / "run" / "b").write_bytes(b"-" * size + b"0")
    ran: list[bool] = []
    with pytest.raises(CheckpointError, match=r"run/b is damaged: its SHA-256"), verifying(tmp_path / "run", files):
        ran.append(True)
    assert ran
    with verifying(tmp_path / "run", {"a": files["a"]}):
        ran.append(True)
    assert len(ran) == 2
