"""Which reduction has a meaning for which dtype, the same for every backend and number of ranks."""

from __future__ import annotations

from typing import cast, get_args

import torch

from lightrft.backends.collectives.trees import Leaf
from lightrft.errors import ConfigError, nearest
from lightrft.strategy.protocols.collectives import ReduceOp

__all__ = ["check_gatherable", "check_op", "check_reducible"]


def check_op(op: str) -> ReduceOp:
    """Return the reduction if there is one of this name.

    Raises:
        ConfigError: there is none.
    """
    known: tuple[str, ...] = get_args(ReduceOp)
    if op not in known:
        raise ConfigError(f"op={op!r} is not known; {nearest(op, known)}.")
    return cast("ReduceOp", op)


def check_reducible(leaf: Leaf, path: str, op: ReduceOp) -> None:
    """Refuse a reduction that could not keep the dtype, or has no meaning for it.

    Args:
        leaf: tensor or number.
        path: where it stands.
        op: the reduction.

    Raises:
        ConfigError: the op has no meaning for the leaf's dtype.
    """
    dtype = _dtype(leaf)
    if op == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(
            f"op='mean' has no meaning for {path}, which is {dtype}; convert it to a "
            "floating-point dtype, or use 'sum'."
        )
    if op == "sum" and dtype == torch.bool:
        raise ConfigError(f"op='sum' has no meaning for {path}, which is {dtype}; use 'max' (any) or 'min' (all).")
    if op in {"max", "min"} and dtype.is_complex:
        raise ConfigError(f"op={op!r} has no meaning for {path}, which is {dtype}; use 'sum' or 'mean'.")


def check_gatherable(leaf: Leaf, path: str) -> torch.Tensor:
    """Return the leaf if it is a tensor.

    Args:
        leaf: tensor or number.
        path: where it stands.

    Raises:
        ConfigError: it is a number.
    """
    if not isinstance(leaf, torch.Tensor):
        raise ConfigError(
            f"{path}={leaf!r} is a number, and numbers cannot be concatenated; pass torch.tensor({leaf!r})."
        )
    return leaf


def _dtype(leaf: Leaf) -> torch.dtype:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype
    if isinstance(leaf, bool):
        return torch.bool
    return torch.int64 if isinstance(leaf, int) else torch.float64
