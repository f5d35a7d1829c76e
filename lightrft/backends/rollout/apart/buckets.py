"""A bucket of weights: how tensors lie in a flat buffer, and what is said of them, whatever the buffer travels by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs
import torch
import xxhash

from lightrft.errors import WeightSyncError

__all__ = ["BUFFER_BYTES", "Bucket", "Placed", "extent_of", "read_bucket", "room_for", "size_of", "write_bucket"]

BUFFER_BYTES = 8 * 2**20
"""Size of a buffer: its memory is fetched once, and two of them stay in the caches of a processor, so that what one
process writes the other one reads from there. For a larger tensor a buffer grows to its size."""

_ALIGNMENT = 64
"""Bytes; that of torch's own memory, and a multiple of the size of every dtype."""

_PIECE_BYTES = 2**20
"""What is copied and looked at in one go: it is still in the caches of a processor when it is read once more."""


@attrs.frozen(kw_only=True)
class Placed:
    """A tensor in a buffer.

    Attributes:
        name: what it is called.
        dtype: name of its dtype.
        shape: its shape.
        offset: where its bytes begin.
        digest: XXH3 of its bytes, 64 bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: int


@attrs.frozen(kw_only=True)
class Bucket:
    """What the engine's process is told of a bucket.

    Attributes:
        slot: which of the buffers it is in.
        size: bytes of the buffer where it is new, else 0.
        port: where the engine's process joins the trainer's, if it has to first, else 0.
        tensors: where they are.
    """

    slot: int
    size: int
    port: int = 0
    tensors: tuple[Placed, ...]


def room_for(tensors: Sequence[tuple[str, torch.Tensor]]) -> int:
    """Return the bytes of a new buffer for a bucket and for those that follow, at least one.

    A small model takes little, and a large one need not be measured bucket by bucket.

    Args:
        tensors: the bucket.
    """
    size = size_of(tensors)
    return max(size, min(BUFFER_BYTES, 1 << size.bit_length()))


def size_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> int:
    """Return the bytes that a bucket takes in a buffer.

    Args:
        tensors: the bucket.
    """
    return sum(_aligned(tensor.nbytes) for _, tensor in tensors)


def extent_of(bucket: Sequence[Placed]) -> int:
    """Return the bytes from the beginning of a buffer to the end of its last tensor.

    Args:
        bucket: what `write_bucket` returned.
    """
    return max((one.offset + _num_bytes(one) for one in bucket), default=0)


def write_bucket(
    buffer: torch.Tensor, tensors: Sequence[tuple[str, torch.Tensor]], *, finite: bool = False
) -> tuple[Placed, ...]:
    """Return where the tensors are, after they were copied into a buffer.

    Args:
        buffer: bytes, at least as many as `size_of` the tensors.
        tensors: of any device and layout.
        finite: refuse a tensor with values that are not.

    Raises:
        WeightSyncError: values are not finite.
    """
    placed: list[Placed] = []
    offset = 0
    for name, tensor in tensors:
        digest, is_finite = _write(buffer[offset : offset + tensor.nbytes], tensor)
        # a sum may be too large for its dtype
        if finite and not (is_finite or tensor.isfinite().all()):
            raise WeightSyncError(f"tensor={name!r} holds values that are not finite; look at the trainer's last step.")
        placed.append(
            Placed(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=offset,
                digest=digest,
            )
        )
        offset += _aligned(tensor.nbytes)
    return tuple(placed)


def read_bucket(buffer: torch.Tensor, bucket: Sequence[Placed]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a bucket, which are the buffer itself, after each was held against its digest.

    Args:
        buffer: where they are.
        bucket: what `write_bucket` returned.

    Raises:
        WeightSyncError: the bytes are not those that were written.
    """
    for one in bucket:
        part = buffer[one.offset : one.offset + _num_bytes(one)]
        if _digest(part) != one.digest:
            raise WeightSyncError(f"tensor={one.name!r} arrived with other bytes than were sent; sync again.")
        yield one.name, part.view(_dtype_of(one.dtype)).view(one.shape)


def _write(part: torch.Tensor, tensor: torch.Tensor) -> tuple[int, bool]:
    """Copy a tensor; return its digest, and whether the sums of its pieces are finite, which tells fast."""
    hashed, is_finite = xxhash.xxh3_64(), True
    source, target = tensor.detach().reshape(-1), part.view(tensor.dtype)
    step = _PIECE_BYTES // tensor.itemsize
    for begin in range(0, len(source), step):
        piece = target[begin : begin + step].copy_(source[begin : begin + step])
        hashed.update(_data(piece.view(torch.uint8)))
        is_finite = is_finite and math.isfinite(piece.sum())
    return hashed.intdigest(), is_finite


def _digest(part: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(_data(part))


def _data(part: torch.Tensor) -> memoryview:
    return part.cpu().numpy().data


def _num_bytes(one: Placed) -> int:
    return torch.Size(one.shape).numel() * _dtype_of(one.dtype).itemsize


def _dtype_of(name: str) -> torch.dtype:
    dtype: object = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"dtype={name!r} is none of torch's; send tensors.")
    return dtype


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
