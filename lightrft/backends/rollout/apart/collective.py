"""A process group of two, a trainer's rank and the process of its engine: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, cast

import attrs
import torch
from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore, Work

from lightrft.backends.rollout.apart.buckets import (
    Bucket,
    Placed,
    extent_of,
    read_bucket,
    room_for,
    size_of,
    write_bucket,
)
from lightrft.backends.rollout.apart.transport import Line, Receiver, Sender, Transport
from lightrft.errors import WeightSyncError

__all__ = ["TRANSPORT"]

_HOST = "127.0.0.1"
"""Both processes are on one machine, and nobody else is to reach them."""

_TRAINER, _ENGINE = 0, 1
"""Ranks in the group."""

_JOINS = "engine"
"""Key in the store by which the engine's process says that it is about to join."""


class _Group(Protocol):
    """What a backend of torch's does, which is no default group's and known to nobody else."""

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int, /) -> Work: ...

    def abort(self) -> None: ...


@attrs.define(kw_only=True, eq=False)
class _End:
    """One end.

    Attributes:
        rank: its place in the group.
        device: where its buffers are, which says what the group is made of.
        timeout: how long it waits for the other one.
        group: the two, once they have met.
        buffers: bytes by slot.
        works: what the trainer has sent last, by slot; it needs its buffer.
    """

    rank: int
    device: torch.device
    timeout: timedelta
    group: _Group | None = None
    buffers: dict[int, torch.Tensor] = attrs.field(factory=dict[int, torch.Tensor])
    works: dict[int, Work] = attrs.field(factory=dict[int, Work])


def _open_sender(*, device: torch.device, timeout: float) -> Sender:
    # NCCL ends a process in which an operation takes longer, which may be the engine's, and not the trainer's
    end = _End(rank=_TRAINER, device=device, timeout=timedelta(seconds=timeout * (3 if device.type == "cuda" else 1)))

    def send(slot: int, tensors: Sequence[tuple[str, torch.Tensor]], line: Line, *, finite: bool) -> tuple[Placed, ...]:
        if slot in end.works:
            end.works.pop(slot).wait()  # it has arrived, as was answered
        buffer = end.buffers.pop(slot, None)
        is_new = buffer is None or len(buffer) < size_of(tensors)
        if buffer is None or is_new:
            buffer = torch.empty(room_for(tensors), dtype=torch.uint8, device=device)
        placed = write_bucket(buffer, tensors, finite=finite)
        store = _host_store(end.timeout) if end.group is None else None
        size, port = len(buffer) if is_new else 0, 0 if store is None else store.port
        line.tell(Bucket(slot=slot, size=size, port=port, tensors=placed))
        end.buffers[slot] = buffer  # from now on the other end has one, too
        if store is None or _is_joined(store, line):
            with suppress(RuntimeError):  # the engine's process answers that nothing came, or is gone
                group = end.group = end.group or _group_of(end, cast("TCPStore", store))
                end.works[slot] = _depart(group, buffer[: extent_of(placed)])
        return placed

    def free() -> None:
        _free(end)

    return Sender(send=send, free=free)


def _open_receiver(*, device: torch.device, timeout: float) -> Receiver:
    end = _End(rank=_ENGINE, device=device, timeout=timedelta(seconds=timeout))

    def receive(bucket: Bucket, files: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        del files
        try:
            return read_bucket(_arrived(end, bucket), bucket.tensors)
        except BaseException:
            _leave(end)  # what the trainer sends meanwhile has no place to go
            raise

    def free() -> None:
        _free(end)

    return Receiver(receive=receive, free=free)


def _arrived(end: _End, bucket: Bucket) -> torch.Tensor:
    """Return the buffer of a bucket once its bytes are there."""
    if bucket.size:
        end.buffers[bucket.slot] = torch.empty(bucket.size, dtype=torch.uint8, device=end.device)
    buffer = end.buffers[bucket.slot]
    try:
        group = _join(end, bucket.port) if bucket.port else end.group
        if group is not None:
            group.recv([buffer[: extent_of(bucket.tensors)]], _TRAINER, 0).wait()
            return buffer
    except RuntimeError as error:  # torch raises no narrower type
        said = str(error).splitlines()[0].rpartition("] ")[2]
        raise WeightSyncError(
            f"weights did not arrive by engine.transport='collective' ({said}); sync again, or use "
            "engine.transport='memory'."
        ) from error
    raise WeightSyncError("the engine has left the group in which weights are sent; sync again.")


def _join(end: _End, port: int) -> _Group:
    """Return the group with the trainer, which waits for that."""
    _leave(end)
    store = TCPStore(_HOST, port, is_master=False, timeout=end.timeout, wait_for_workers=False)
    store.set(_JOINS, "")
    end.group = _group_of(end, store)
    return end.group


def _is_joined(store: TCPStore, line: Line) -> bool:
    """Return whether the engine's process joins, when it does; not if it answers instead."""

    def joins() -> bool:
        return store.check([_JOINS])

    return line.await_until(joins)


def _host_store(timeout: timedelta) -> TCPStore:
    """Return a new store that this machine alone reaches, at a port that the system chooses."""
    with socket.socket() as listening:
        try:
            listening.bind((_HOST, 0))
            listening.listen()
        except OSError as error:
            raise WeightSyncError(
                f"engine.transport='collective' has no port on {_HOST} ({error.strerror}); use "
                "engine.transport='memory'."
            ) from error
        port = listening.getsockname()[1]
        return TCPStore(
            _HOST,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),  # the store closes it
        )


def _group_of(end: _End, store: TCPStore) -> _Group:
    """Return the group, which is made by hand so that the default one neither needs to be nor changes."""
    if end.device.type == "cuda":
        from torch._C._distributed_c10d import ProcessGroupNCCL  # torch for CPUs has none

        make = cast("Any", ProcessGroupNCCL)
        options = make.Options()
    else:
        make = cast("Any", ProcessGroupGloo)  # the stubs have other names
        options = make._Options()  # noqa: SLF001 (no public way chooses a device)
        options._devices = [ProcessGroupGloo.create_device(hostname=_HOST)]  # noqa: SLF001
    options._timeout = end.timeout  # noqa: SLF001
    return cast("_Group", make(store, end.rank, 2, options))


def _depart(group: _Group, part: torch.Tensor) -> Work:
    """Begin to send bytes.

    Not by a broadcast: gloo's would be waited for when the group is left, also if the other process was killed amidst.
    """
    return group.send([part], _ENGINE, 0)


def _leave(end: _End) -> None:
    """Leave the group, whose ports are closed; nobody waits for what is on its way."""
    end.works.clear()
    group, end.group = end.group, None
    if group is not None and end.device.type == "cuda":
        group.abort()  # what is on the GPU would wait for the other process


def _free(end: _End) -> None:
    _leave(end)
    end.buffers.clear()


TRANSPORT = Transport(open_sender=_open_sender, open_receiver=_open_receiver)
"""By messages in a process group."""
