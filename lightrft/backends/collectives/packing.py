"""Values as bytes, so that all of a call travel at once, in one dtype and without pickle.

Leaves go by their paths in sorted order, because the order of the keys of a dict may differ between ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import cast

import torch

from lightrft.backends.collectives.agreement import named_leaves
from lightrft.backends.collectives.trees import Leaf

__all__ = [
    "number_leaves",
    "pack_numbers",
    "pack_tensors",
    "tensor_leaves",
    "unpack_numbers",
    "unpack_rows",
    "unpack_tensors",
]

_SIZE_BYTES = 8  # of an int64


def tensor_leaves(data: object) -> dict[str, torch.Tensor]:
    """Return the tensors of a tree by path, in sorted order.

    Args:
        data: the tree.
    """
    return {path: leaf for path, leaf in _sorted_leaves(data) if isinstance(leaf, torch.Tensor)}


def number_leaves(data: object) -> dict[str, float]:
    """Return the numbers of a tree by path, in sorted order.

    Args:
        data: the tree.
    """
    return {path: leaf for path, leaf in _sorted_leaves(data) if isinstance(leaf, (bool, int, float))}


def _sorted_leaves(data: object) -> Iterator[tuple[str, object]]:
    return iter(sorted(named_leaves(data), key=_path))


def _path(item: tuple[str, object]) -> str:
    return item[0]


def pack_numbers(numbers: Mapping[str, float], device: torch.device) -> torch.Tensor:
    """Return numbers as JSON, which keeps every bit of a float and integers of any size.

    Args:
        numbers: by path, in sorted order.
        device: where the bytes are wanted.

    Returns:
        uint8 (size,); empty without numbers.
    """
    written = json.dumps(list(numbers.values())).encode("ascii") if numbers else b""
    return torch.tensor(list(written), dtype=torch.uint8, device=device)


def unpack_numbers(packed: torch.Tensor) -> list[float]:
    """Return the numbers that `pack_numbers` wrote, in its order.

    Args:
        packed: uint8 (size,).
    """
    return cast("list[float]", json.loads(bytes(packed.tolist()))) if packed.numel() else []


def pack_tensors(tensors: Mapping[str, torch.Tensor], device: torch.device, *, has_sizes: bool = False) -> torch.Tensor:
    """Return the bytes of all tensors, one after the other.

    Args:
        tensors: by path, in sorted order.
        device: where the bytes are wanted.
        has_sizes: whether the sizes of dim 0 (1 for 0-d tensors) come first, as int64.

    Returns:
        uint8 (size,).
    """
    sizes = [tensor.shape[0] if tensor.dim() else 1 for tensor in tensors.values()] if has_sizes else []
    parts = [torch.tensor(sizes, dtype=torch.int64).view(torch.uint8), *(_bytes(tensor) for tensor in tensors.values())]
    return torch.cat([part.to(device) for part in parts])


def unpack_tensors(packed: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, Leaf]:
    """Return the tensors that `pack_tensors` wrote without sizes, in memory of their own.

    Args:
        packed: uint8 (size,).
        like: tensors of the same shapes and dtypes, on the devices where the new ones are wanted.
    """
    found: dict[str, Leaf] = {}
    start = 0
    for path, tensor in like.items():
        stop = start + tensor.numel() * tensor.dtype.itemsize
        found[path] = _tensor(packed[start:stop], tensor, tuple(tensor.shape))
        start = stop
    return found


def unpack_rows(packed: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that `pack_tensors` wrote with sizes; 0-d tensors become 1-d.

    Args:
        packed: uint8 (size,).
        like: tensors of the same dtypes and shapes but for dim 0, on the devices where the new ones are wanted.
    """
    start = _SIZE_BYTES * len(like)
    sizes = cast("list[int]", packed[:start].clone().view(torch.int64).tolist())
    found: dict[str, torch.Tensor] = {}
    for size, (path, tensor) in zip(sizes, like.items(), strict=True):
        shape = (size, *tensor.shape[1:])
        stop = start + math.prod(shape) * tensor.dtype.itemsize
        found[path] = _tensor(packed[start:stop], tensor, shape)
        start = stop
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # cloned, because a tensor of at most one element counts as contiguous whatever its stride, and has no other view
    whole = tensor.detach().resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return whole.view(torch.uint8)


def _tensor(part: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    # cloned, because a view of another dtype must begin at a multiple of its size
    return part.clone().view(like.dtype).reshape(shape).to(like.device)
