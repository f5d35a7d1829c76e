"""Reading tensors of a file by parts, into memory of any kind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing import stored
from lightrft.backends.checkpointing.durable import write_file
from lightrft.backends.checkpointing.stored import open_tensors, read_stored, stored_range, stored_tensors
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks, writing_order
from lightrft.errors import CheckpointError


def write(path: Path, **tensors: torch.Tensor) -> Path:
    pieces = [bytes_of(tensors[name]) for name in writing_order(tensors)]
    write_file(path, safetensors_chunks(tensors, pieces))
    return path


@pytest.mark.parametrize(
    "target",
    [
        lambda: torch.zeros(3, 4),
        lambda: torch.zeros(4, 3).t(),
        lambda: torch.zeros(6, 8)[::2, ::2],
        lambda: torch.zeros(3, 4, dtype=torch.float64),
        lambda: torch.zeros(3, 4, dtype=torch.complex64).conj(),
        lambda: torch._neg_view(torch.zeros(3, 4)),
        lambda: nn.Parameter(torch.zeros(3, 4)),
    ],
    ids=["dense", "turned", "strided", "other dtype", "conjugate", "negative", "parameter"],
)
@pytest.mark.parametrize("start", [0, 5, 8])
def test_elements_go_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Callable[[], torch.Tensor], start: int
) -> None:
    """A run of elements fills a target of any stride, dtype and bit of conjugation, in row-major order."""
    monkeypatch.setattr(stored, "_BUCKET_SIZE", 20)  # what goes by buckets takes several
    values = torch.randn(20)
    with open_tensors(write(tmp_path / "f", before=torch.randn(2), values=values)) as tensors, torch.no_grad():
        live = target()
        tensors["values"].copy_into(live, start=start)
    assert torch.equal(live, values[start : start + 12].view(3, 4).to(live.dtype))


def test_a_range_is_read_as_if_it_were_stored_alone(tmp_path: Path) -> None:
    """A part of a part has its own elements, none is read beyond it, and one without elements reads nothing."""
    values = torch.arange(20)
    with open_tensors(write(tmp_path / "f", values=values)) as tensors:
        part = stored_range(stored_range(tensors["values"], 4, [4, 4]), 6, [2, 3])
        assert read_stored(part).tolist() == [[10, 11, 12], [13, 14, 15]]
        assert read_stored(stored_range(tensors["values"], 20, [0, 3])).shape == (0, 3)
        for start in (-1, 18):  # there is another tensor, or the header
            with pytest.raises(ValueError, match=r"3 elements from .* are more than there are"):
                tensors["values"].copy_into(torch.zeros(3, dtype=torch.int64), start=start)
    assert read_stored(stored_tensors(tmp_path / "f")["values"]).tolist() == list(range(20))


def test_a_graph_that_needs_the_old_values_notices(tmp_path: Path) -> None:
    """Reading to a tensor counts as writing to it: a backward pass that needs its old values is refused by torch."""
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    with open_tensors(write(tmp_path / "f", values=torch.randn(3))) as tensors:
        tensors["values"].copy_into(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_file_that_shrinks_under_the_reader_is_named(tmp_path: Path) -> None:
    """What can no longer be read is an error with the name of the file, not a crash and not zeros."""
    path = write(tmp_path / "f", values=torch.randn(1000))
    with open_tensors(path) as tensors:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(OSError, match="ends early") as caught:
            read_stored(tensors["values"])
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:0], "not a whole safetensors file"),
        (lambda content: content[:-1], "not a whole safetensors file"),
        (lambda content: content.replace(b'\\"shape\\": [2]', b'\\"shape\\": [3]'), "has not the bytes of its shape"),
    ],
    ids=["empty", "cut", "other shape"],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], reason: str) -> None:
    """The header is held against the size of the file, and shapes that stand in its notes against the bytes."""
    path = write(tmp_path / "f", values=torch.zeros(2, dtype=torch.complex64))
    content = path.read_bytes()
    changed = change(content)
    assert changed != content, json.dumps(content.decode("latin-1"))
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match=reason) as caught, open_tensors(path):
        pass
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is one clear line."""
    with pytest.raises(CheckpointError, match="No such file or directory"), open_tensors(tmp_path / "f"):
        pass
