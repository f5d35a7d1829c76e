"""Tensors that lie in safetensors files, read by parts straight into the memory where they belong.

A file is read and never mapped: what is read is counted once, as the live tensor that it becomes, and a disk that is
gone is an error and no signal.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Protocol, cast

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch.autograd.graph import increment_version

from lightrft.backends.checkpointing.access import CopyInto, StoredTensor
from lightrft.backends.checkpointing.lossless import as_dict, loads
from lightrft.backends.checkpointing.tensor_files import DTYPES, RAW
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["open_tensors", "read_stored", "saying_incomplete", "stored_range", "stored_tensors"]

_BUCKET_SIZE = 32 << 20  # bytes on their way to a device or another dtype; large enough for its link to be kept busy
_BLOCK_SIZE = 1 << 30  # below the 2 GiB that one read may take
_SHARED_SIZE = 2 << 20  # bytes from which on a second thread is worth its while
_LENGTH_SIZE = 8  # bytes that say how long the header is
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _OpenFile(Protocol):
    def metadata(self) -> dict[str, str] | None: ...
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str, /) -> _Slice: ...
    def get_tensor(self, name: str, /) -> torch.Tensor: ...


@attrs.frozen(kw_only=True, eq=False)
class _Source:
    """An open file.

    Attributes:
        path: what it is called.
        file: open for reading.
        helper: one thread.
    """

    path: Path
    file: FileIO
    helper: ThreadPoolExecutor


@contextmanager
def open_tensors(path: Path) -> Generator[Mapping[str, StoredTensor], None, None]:
    """Yield what a safetensors file holds; the file stays open, and each tensor is read when it is asked for.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """
    try:
        # safetensors checks the header against the size of the file; where the bytes stand it does not tell
        checked = safe_open(path, framework="pt")
        file = path.open("rb", buffering=0)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); load another checkpoint.") from error
    with file, ThreadPoolExecutor(max_workers=1) as helper:  # its thread starts with the first large tensor
        with checked as described:
            tensors = _described(_Source(path=path, file=file, helper=helper), cast("_OpenFile", described))
        yield tensors


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, in its order; each is read when it is asked for, and not kept.

    Args:
        path: the file; it is opened again for each tensor.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """
    with open_tensors(path) as tensors:
        return {name: _opened_again(path, name, tensor) for name, tensor in tensors.items()}


def read_stored(stored: StoredTensor) -> torch.Tensor:
    """Return a whole tensor in memory of its own, on the CPU.

    Args:
        stored: the tensor in its file.
    """
    whole = torch.empty(torch.Size(stored.shape), dtype=stored.dtype)
    stored.copy_into(whole)
    return whole


@contextmanager
def saying_incomplete(path: Path) -> Generator[None, None, None]:
    """Turn any error of the body, which writes to the live state, into one line that says what state that is now.

    Args:
        path: what is loaded.

    Raises:
        CheckpointError: in place of any other error.
    """
    try:
        yield
    except Exception as error:
        place = f" of {error.filename}" if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        raise CheckpointError(
            f"{path} was loaded in part, because reading{place} failed ({reason}), and the live state is incomplete; "
            "load again, or restart the run."
        ) from error


def stored_range(stored: StoredTensor, start: int, shape: Sequence[int]) -> StoredTensor:
    """Return a run of elements of a stored tensor, as if it were stored alone.

    Args:
        stored: the tensor in its file.
        start: number of the first element.
        shape: of the part.
    """

    def copy_into(target: torch.Tensor, *, start: int = 0) -> None:
        stored.copy_into(target, start=first + start)

    first = start
    return StoredTensor(shape=shape, dtype=stored.dtype, copy_into=copy_into)


def _opened_again(path: Path, name: str, tensor: StoredTensor) -> StoredTensor:
    def copy_into(target: torch.Tensor, *, start: int = 0) -> None:
        with open_tensors(path) as tensors:
            tensors[name].copy_into(target, start=start)

    return StoredTensor(shape=tensor.shape, dtype=tensor.dtype, copy_into=copy_into)


def _described(source: _Source, known: _OpenFile) -> dict[str, StoredTensor]:
    path, file = source.path, source.file
    length = int.from_bytes(file.read(_LENGTH_SIZE), "little")
    header = as_dict(loads(file.read(length), source=str(path)), source=str(path))
    raw = as_dict(loads((known.metadata() or {}).get(RAW, "{}").encode(), source=str(path)), source=str(path))
    found: dict[str, StoredTensor] = {}
    for name in known.keys():  # noqa: SIM118 (no iterator)
        shape, dtype = _form(known, name) if raw.get(name) is None else _raw_form(raw[name], path)
        begin, end = cast("list[int]", as_dict(header.get(name), source=str(path))["data_offsets"])
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise CheckpointError(f"{path}: {name} has not the bytes of its shape; load another checkpoint.")
        begin, end = begin + _LENGTH_SIZE + length, end + _LENGTH_SIZE + length
        copy_into = _copy_into(source, dtype, begin, end)
        found[name] = StoredTensor(shape=shape, dtype=dtype, copy_into=copy_into)
    return found


def _form(known: _OpenFile, name: str) -> tuple[Sequence[int], torch.dtype]:
    described = known.get_slice(name)
    # others write dtypes that are not written here
    return described.get_shape(), _DTYPES.get(described.get_dtype()) or known.get_tensor(name).dtype


def _raw_form(raw: Json, path: Path) -> tuple[Sequence[int], torch.dtype]:
    fields = as_dict(raw, source=str(path))
    # not `getattr`: torch imports some of its modules when they are asked for by name
    dtype = vars(torch).get(str(fields.get("dtype")))
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"dtype={fields.get('dtype')!r} is unknown to torch {torch.__version__}; install a newer torch."
        )
    return cast("list[int]", fields.get("shape")), dtype


def _copy_into(source: _Source, dtype: torch.dtype, begin: int, end: int) -> CopyInto:
    """Return what copies from the bytes of an open file between two places."""

    def copy_into(target: torch.Tensor, *, start: int = 0) -> None:
        first, live = begin + start * dtype.itemsize, target.detach()
        if start < 0 or first + live.numel() * dtype.itemsize > end:
            raise ValueError(f"{source.path}: {live.numel()} elements from {start} on are more than there are.")
        if not live.is_contiguous() or live.is_conj() or live.is_neg():
            dense = torch.empty(live.shape, dtype=dtype)
            _read(source, dense, first)
            live.copy_(dense)
        elif live.device.type == "cpu" and live.dtype == dtype:
            _read(source, live, first)
            increment_version(live)  # so that a backward pass that needs the old values is refused, as after any write
        else:
            flat = live.view(-1)
            bucket = torch.empty(min(flat.numel(), _BUCKET_SIZE // dtype.itemsize), dtype=dtype)
            for place in range(0, flat.numel(), max(bucket.numel(), 1)):
                part = flat[place:][: bucket.numel()]
                _read(source, bucket[: part.numel()], first + place * dtype.itemsize)
                part.copy_(bucket[: part.numel()])

    return copy_into


def _read(source: _Source, dense: torch.Tensor, offset: int) -> None:
    """Fill a dense tensor from a place on; a large one by two threads, since one takes less than a cache gives."""
    size = dense.numel() * dense.element_size()
    if not size:
        return
    # straight into memory: `Tensor.numpy` would need numpy, which is no dependency
    memory = memoryview((ctypes.c_ubyte * size).from_address(dense.data_ptr())).cast("B")
    if size < _SHARED_SIZE:
        _fill(source, memory, offset)
        return
    other = source.helper.submit(_fill, source, memory[size // 2 :], offset + size // 2)
    try:
        _fill(source, memory[: size // 2], offset)
    finally:
        wait([other])  # it writes to the same tensor
    other.result()


def _fill(source: _Source, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        try:
            num_bytes = os.preadv(source.file.fileno(), [memory[done : done + _BLOCK_SIZE]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(source.path)) from error
        if not num_bytes:
            raise OSError(errno.EIO, "it ends early", str(source.path))
        done += num_bytes
