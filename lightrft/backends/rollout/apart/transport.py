"""What moves buckets of weights into the process of an engine: a record, of which each transport is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import attrs
import torch

from lightrft.backends.rollout.apart.buckets import Bucket, Placed

__all__ = [
    "AwaitUntil",
    "Free",
    "Line",
    "OpenReceiver",
    "OpenSender",
    "Receive",
    "Receiver",
    "Send",
    "Sender",
    "Tell",
    "Transport",
]


class Tell(Protocol):
    """Say that a bucket is on its way."""

    def __call__(self, bucket: Bucket, *files: int) -> None:
        """Write to the process of the engine, which will answer once it has read the bucket.

        Args:
            bucket: where its tensors are.
            files: descriptors that go along.

        Raises:
            EngineCrashError: the process has ended.
        """
        ...


class AwaitUntil(Protocol):
    """Wait for something that the process does beside answering."""

    def __call__(self, is_done: Callable[[], bool]) -> bool:
        """Return whether it was done; not if the process has answered instead.

        Args:
            is_done: asked again and again.

        Raises:
            EngineCrashError: the process has ended, or neither came in time and it was ended.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Line:
    """How a trainer speaks with the process of its engine while a bucket is sent."""

    tell: Tell
    await_until: AwaitUntil


class Send(Protocol):
    """Let a bucket go from the trainer."""

    def __call__(
        self, slot: int, tensors: Sequence[tuple[str, torch.Tensor]], line: Line, *, finite: bool
    ) -> tuple[Placed, ...]:
        """Return where the tensors lie in their buffer, after they were copied and the process was told of them.

        The tensors may change from then on. Whether they arrived is what the process answers.

        Args:
            slot: a buffer whose bucket before this one was answered.
            tensors: the bucket.
            line: to the process.
            finite: refuse a tensor with values that are not.

        Raises:
            WeightSyncError: there is no memory or no way for them, or values are not finite.
            EngineCrashError: the process has ended.
        """
        ...


class Receive(Protocol):
    """Take a bucket in the process of the engine."""

    def __call__(self, bucket: Bucket, files: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the tensors of a bucket that has arrived, each of which is held against its digest before it comes.

        They are good until the bucket is answered.

        Args:
            bucket: what the trainer told.
            files: descriptors that came along; those of the bucket are taken out.

        Raises:
            WeightSyncError: it did not arrive, or not as it was sent.
        """
        ...


class Free(Protocol):
    """Give back what an end holds."""

    def __call__(self) -> None:
        """Free memory and ports; the next bucket takes them again. Nothing is on its way."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Sender:
    """The trainer's end."""

    send: Send
    free: Free


@attrs.frozen(kw_only=True, eq=False)
class Receiver:
    """The engine's end."""

    receive: Receive
    free: Free


class OpenSender(Protocol):
    """Make a trainer's end."""

    def __call__(self, *, device: torch.device, timeout: float) -> Sender:
        """Return an end that holds nothing yet.

        Args:
            device: where the weights are on their way.
            timeout: seconds that a bucket may take.
        """
        ...


class OpenReceiver(Protocol):
    """Make an engine's end."""

    def __call__(self, *, device: torch.device, timeout: float) -> Receiver:
        """Return an end that holds nothing yet.

        Args:
            device: where the weights are to be.
            timeout: seconds that a bucket may take.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Transport:
    """How buckets get from a trainer into the process of its engine.

    Laws: tensors arrive bit by bit, or `receive` raises, or the iterator that it returns. A sender that is new or was
    freed begins anew with any receiver.
    """

    open_sender: OpenSender
    open_receiver: OpenReceiver
