"""Memory that two processes share, without a name: it is gone with the last of them, however they end."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import attrs
import torch

from lightrft.backends.rollout.apart.buckets import Bucket, Placed, read_bucket, room_for, size_of, write_bucket
from lightrft.backends.rollout.apart.transport import Line, Receiver, Sender, Transport
from lightrft.errors import UnsupportedError, WeightSyncError

__all__ = ["TRANSPORT", "Segment", "bytes_of", "free_segment", "map_segment", "new_segment"]


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


def new_segment(size: int) -> Segment:
    """Return new memory.

    Args:
        size: in bytes, at least one.

    Raises:
        WeightSyncError: the machine has not so much.
        UnsupportedError: the system has no such memory.
    """
    if not hasattr(os, "memfd_create"):
        raise UnsupportedError(
            "engine.transport='memory' needs memory that Linux alone has; use engine.process='trainer'."
        )
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


def bytes_of(segment: Segment) -> torch.Tensor:
    """Return the memory itself as a tensor of bytes.

    Args:
        segment: it cannot be freed before the tensor is gone.
    """
    return torch.frombuffer(segment.map, dtype=torch.uint8)


def _open_sender(*, device: torch.device, timeout: float) -> Sender:
    del device, timeout  # the memory is the CPU's, and nobody waits for it
    segments: dict[int, Segment] = {}

    def send(slot: int, tensors: Sequence[tuple[str, torch.Tensor]], line: Line, *, finite: bool) -> tuple[Placed, ...]:
        segment = segments.pop(slot, None)
        if segment is not None and segment.size < size_of(tensors):
            free_segment(segment)
            segment = None
        is_new = segment is None
        segment = segment or new_segment(room_for(tensors))
        try:
            placed = write_bucket(bytes_of(segment), tensors, finite=finite)
            bucket = Bucket(slot=slot, size=segment.size if is_new else 0, tensors=placed)
            line.tell(bucket, *([segment.file] if is_new else []))
        except BaseException:  # nobody was told of it
            free_segment(segment)
            raise
        segments[slot] = segment
        return placed

    def free() -> None:
        _free(segments)

    return Sender(send=send, free=free)


def _open_receiver(*, device: torch.device, timeout: float) -> Receiver:
    del device, timeout
    segments: dict[int, Segment] = {}

    def receive(bucket: Bucket, files: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        if bucket.size:
            if bucket.slot in segments:
                free_segment(segments.pop(bucket.slot))
            segments[bucket.slot] = map_segment(files.pop(), bucket.size)
        return read_bucket(bytes_of(segments[bucket.slot]), bucket.tensors)

    def free() -> None:
        _free(segments)

    return Receiver(receive=receive, free=free)


def _free(segments: dict[int, Segment]) -> None:
    for segment in segments.values():
        free_segment(segment)
    segments.clear()


TRANSPORT = Transport(open_sender=_open_sender, open_receiver=_open_receiver)
"""Through memory that both processes have mapped: without a copy where the engine reads it."""
