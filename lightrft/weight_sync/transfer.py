"""The one way weights take into any engine: begin, put bucket by bucket, commit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightrft.weight_sync.buckets import in_buckets

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.protocols.rollout import EngineHandle

__all__ = ["transfer_weights"]


def transfer_weights(tensors: Iterable[tuple[str, torch.Tensor]], handle: EngineHandle) -> tuple[int, int]:
    """Write the tensors into the engine and commit; return their number and bytes.

    Where the engine cannot go on, the rest of the stream is still taken: other ranks may be in it, too.

    Args:
        tensors: (name, full tensor) of every parameter and persistent buffer.
        handle: an engine that is awake or torn.

    Raises:
        WeightSyncError: the engine refused a tensor or misses some; it is "torn" then, as after any other error.
    """
    stream = iter(tensors)
    try:
        return _transferred(stream, handle)
    except Exception:
        deque(stream, maxlen=0)
        raise


def _transferred(tensors: Iterable[tuple[str, torch.Tensor]], handle: EngineHandle) -> tuple[int, int]:
    engine = handle.engine
    engine.begin_update(handle)
    num_tensors = num_bytes = 0
    try:
        for bucket in in_buckets(tensors):
            engine.put(handle, bucket)
            num_tensors += len(bucket)
            num_bytes += sum(tensor.nbytes for _, tensor in bucket)
            del bucket  # or it would be in memory while the next one is gathered
    except BaseException:
        engine.abort(handle)
        raise
    engine.commit(handle)
    return num_tensors, num_bytes
