"""Fingerprints of tensors, to see whether a bit of them has changed without keeping a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

__all__ = ["changed_names", "digest", "digests"]


def digest(tensor: torch.Tensor) -> str:
    """Return a fingerprint of dtype, shape and every bit of a tensor.

    Args:
        tensor: any dtype, on any device.

    Example:
        >>> digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0]))
        False
    """
    # a copy, because a tensor of one element may keep a stride that no view of its bytes can have
    whole = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    hashed = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    hashed.update(whole.view(torch.uint8).numpy().data)  # bytes, because numpy knows no bfloat16
    return hashed.hexdigest()


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return the fingerprint of each tensor by its name.

    Args:
        tensors: (name, tensor), as `named_tensors` gives them.
    """
    return {name: digest(tensor) for name, tensor in tensors}


def changed_names(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the names whose fingerprints differ, or which only one of the two has, sorted.

    Args:
        before: fingerprints by name.
        after: the same, later.
    """
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
