"""Memory that two processes share, without a name: it is gone with the last of them, however they end."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress

import attrs
import torch

from lightrft.errors import UnsupportedError, WeightSyncError

__all__ = ["Placed", "Segment", "free_segment", "map_segment", "new_segment", "read_bucket", "size_of", "write_bucket"]

_ALIGNMENT = 64
"""Bytes; that of torch's own memory, and a multiple of the size of every dtype."""


@attrs.define(kw_only=True, eq=False)
class Segment:
    """A piece of shared memory, mapped into this process.

    Attributes:
        file: its descriptor.
        map: its bytes.
        size: their number.
    """

    file: int
    map: mmap.mmap
    size: int


@attrs.frozen(kw_only=True)
class Placed:
    """A tensor in a segment.

    Attributes:
        name: what it is called.
        dtype: name of its dtype.
        shape: its shape.
        offset: where its bytes begin.
        digest: CRC-32 of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: int


def size_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> int:
    """Return the bytes that a bucket takes in a segment.

    Args:
        tensors: the bucket.
    """
    return sum(_aligned(tensor.nbytes) for _, tensor in tensors)


def new_segment(size: int) -> Segment:
    """Return new memory.

    Args:
        size: in bytes, at least one.

    Raises:
        WeightSyncError: the machine has not so much.
        UnsupportedError: the system has no such memory.
    """
    if not hasattr(os, "memfd_create"):
        raise UnsupportedError("engine.process='own' needs memory that Linux alone has; use engine.process='trainer'.")
    file = os.memfd_create("lightrft", os.MFD_CLOEXEC)
    try:
        # taken now, because memory that is missing when it is written to ends the process
        os.posix_fallocate(file, 0, size)
        return map_segment(file, size)
    except OSError as error:
        os.close(file)
        raise WeightSyncError(
            f"{size} bytes of shared memory for weights cannot be had ({error.strerror}); free memory, raise the "
            "limits of the process, or use engine.process='trainer'."
        ) from error


def map_segment(file: int, size: int) -> Segment:
    """Return memory that another process made.

    Args:
        file: its descriptor, which belongs to the segment from now on.
        size: in bytes.
    """
    return Segment(file=file, map=mmap.mmap(file, size), size=size)


def free_segment(segment: Segment) -> None:
    """Give memory back; it is gone once the other process has given it back, too.

    Args:
        segment: nothing reads or writes it any more.
    """
    os.close(segment.file)
    with suppress(BufferError):  # an exception on its way still holds a tensor in there, and lets it go in the end
        segment.map.close()


def write_bucket(segment: Segment, tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[Placed, ...]:
    """Return where the tensors are, after they were copied into a segment.

    Args:
        segment: at least as large as `size_of` the tensors.
        tensors: of any device and layout.
    """
    placed: list[Placed] = []
    offset = 0
    for name, tensor in tensors:
        with torch.no_grad():
            _view(segment, offset, tensor.dtype, tensor.shape).copy_(tensor)
        placed.append(
            Placed(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=offset,
                digest=_digest(segment, offset, tensor.nbytes),
            )
        )
        offset += _aligned(tensor.nbytes)
    return tuple(placed)


def read_bucket(segment: Segment, bucket: Sequence[Placed]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a bucket, which are the shared memory itself, after each was held against its digest.

    Args:
        segment: where they are.
        bucket: what `write_bucket` returned.

    Raises:
        WeightSyncError: the bytes are not those that were written.
    """
    for one in bucket:
        tensor = _view(segment, one.offset, _dtype_of(one.dtype), one.shape)
        if _digest(segment, one.offset, tensor.nbytes) != one.digest:
            raise WeightSyncError(f"tensor={one.name!r} arrived with other bytes than were sent; sync again.")
        yield one.name, tensor


def _view(segment: Segment, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if not count:  # frombuffer refuses an empty tensor
        return torch.empty(list(shape), dtype=dtype)
    return torch.frombuffer(segment.map, dtype=dtype, count=count, offset=offset).view(list(shape))


def _digest(segment: Segment, offset: int, num_bytes: int) -> int:
    with memoryview(segment.map) as view, view[offset : offset + num_bytes] as part:
        return zlib.crc32(part)


def _dtype_of(name: str) -> torch.dtype:
    dtype: object = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"dtype={name!r} is none of torch's; send tensors.")
    return dtype


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
