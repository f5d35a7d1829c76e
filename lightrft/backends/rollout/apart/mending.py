"""What becomes of an engine whose process ended: it is started again, and makes what it owes with the same weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightrft.backends.rollout.apart.engine import ApartState
from lightrft.errors import EngineCrashError
from lightrft.strategy.protocols.rollout import EngineHandle
from lightrft.weight_sync import transfer_weights

__all__ = ["mend", "stream_along"]


def mend(handle: EngineHandle, crash: EngineCrashError) -> None:
    """Start an engine again, with the weights that it had; other ranks call `stream_along`, or this.

    Law: what it generates then is what it would have made; draws are by seed, and the weights by their digests.

    Args:
        handle: an engine whose process has ended.
        crash: what said so.

    Raises:
        EngineCrashError: it ended for the second time, the trainer has other weights by now, or nobody can mend it.
    """
    stream = iter(handle.weights() if handle.weights is not None else ())
    try:
        _send_again(handle, stream, crash)
    finally:
        for _ in stream:  # other ranks are in it, too
            pass


def stream_along(handle: EngineHandle) -> None:
    """Take part in the stream that another rank's engine is mended with.

    Args:
        handle: an engine that lost nothing.
    """
    for _ in handle.weights() if handle.weights is not None else ():
        pass


def _send_again(handle: EngineHandle, stream: Iterable[tuple[str, torch.Tensor]], crash: EngineCrashError) -> None:
    state, version = handle.state, handle.weight_version
    if handle.weights is None or not isinstance(state, ApartState):
        raise crash
    state.wanted, state.lost_by = state.digests, crash
    try:
        transfer_weights(stream, handle)
    finally:
        state.wanted, state.lost_by = None, None
    handle.weight_version = version
