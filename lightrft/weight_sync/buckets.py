"""Tensors in groups of bounded size, so that a transfer's extra memory does not grow with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BUCKET_BYTES", "in_buckets"]

BUCKET_BYTES = 64 * 2**20
"""Large enough that the cost of a call vanishes beside that of its bytes, small beside any model that needs buckets."""


def in_buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the tensors in order, in lists of at most `bucket_bytes`; a larger tensor has a list of its own.

    Args:
        tensors: (name, tensor) pairs.
        bucket_bytes: bound on the bytes of a list.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
