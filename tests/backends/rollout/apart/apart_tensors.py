"""Tensors of every kind, and whether they are the same bit by bit, for what carries them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

TENSORS = [
    ("floats", torch.randn(3, 5)),
    ("empty", torch.empty(0, 4)),
    ("one", torch.tensor(7)),
    ("halves", torch.randn(7).bfloat16()),
    ("turned", torch.randn(4, 6).T),
    ("stepped", torch.arange(10)[::3]),
    ("flags", torch.tensor([True, False, True])),
    ("of several pieces", torch.randn(3, 2**17 + 5)),
    ("special", torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64)),
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8)


def require_same(read: Iterable[tuple[str, torch.Tensor]], sent: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise unless tensors are what was sent: names, dtypes, shapes and bits, in its order."""
    for (name, tensor), (read_name, got) in zip(sent, read, strict=True):
        assert (read_name, got.dtype, got.shape) == (name, tensor.dtype, tensor.shape)
        assert torch.equal(bits(got), bits(tensor))
