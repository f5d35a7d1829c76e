"""Walks over the values that collectives take: tensors, numbers, and nested dicts of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias, TypeVar, cast

import torch

from lightrft.errors import ConfigError
from lightrft.strategy.protocols.collectives import TensorTree

__all__ = ["Leaf", "MapLeaf", "map_leaves"]

_Tree = TypeVar("_Tree", bound=TensorTree)

Leaf: TypeAlias = torch.Tensor | float | int | bool
"""What stands at the end of every branch."""


class MapLeaf(Protocol):
    """Makes the new leaf for an old one."""

    def __call__(self, leaf: Leaf, path: str, /) -> Leaf:
        """Return the new leaf.

        Args:
            leaf: tensor or number.
            path: where it stands, such as "data['loss']", for messages.
        """
        ...


def map_leaves(function: MapLeaf, data: _Tree, path: str = "data") -> _Tree:
    """Return a tree of the same structure, in new dicts, with `function` applied to every leaf.

    Args:
        function: applied to (leaf, path).
        data: the tree.
        path: what the root is called in messages.

    Raises:
        ConfigError: a leaf is neither a tensor nor a number.
    """
    # the structure stays, and with it the type; the checker cannot see that of a recursive type
    return cast("_Tree", _map(function, data, path))


def _map(function: MapLeaf, data: object, path: str) -> TensorTree:
    if isinstance(data, Mapping):
        branches = cast("Mapping[str, object]", data)
        return {key: _map(function, branch, f"{path}[{key!r}]") for key, branch in branches.items()}
    if isinstance(data, (torch.Tensor, bool, int, float)):
        return function(data, path)
    raise ConfigError(f"{path} is a {type(data).__name__}; pass tensors, numbers, or dicts of them.")
