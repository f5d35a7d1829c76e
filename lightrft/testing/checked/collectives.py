"""Collectives, held to their laws at every call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import attrs
import torch

from lightrft.strategy.protocols import ReduceOp, TensorTree
from lightrft.strategy.protocols.collectives import AllGather, AllReduce, Broadcast
from lightrft.strategy.record import Strategy
from lightrft.testing.checked.verdict import require, same_on_all
from lightrft.testing.reference.digests import changed_names, digests

__all__ = ["with_checked_collectives"]

_Tree = TypeVar("_Tree", bound=TensorTree)


def with_checked_collectives(strategy: Strategy) -> Strategy:
    """Return the strategy with `all_reduce`, `all_gather` and `broadcast` held to their laws.

    Args:
        strategy: any strategy.
    """
    return attrs.evolve(
        strategy,
        all_reduce=_checked_all_reduce(strategy),
        all_gather=_checked_all_gather(strategy),
        broadcast=_checked_broadcast(strategy),
    )


def _checked_all_reduce(strategy: Strategy) -> AllReduce:
    inner = strategy.all_reduce

    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        before = digests(_tensors(data))
        result = inner(data, op)
        _require_untouched("all_reduce", data, before, result)
        _require_likeness("all_reduce", data, result)
        _require_same(strategy, "all_reduce", result)
        return result

    return all_reduce


def _checked_all_gather(strategy: Strategy) -> AllGather:
    inner = strategy.all_gather

    def all_gather(data: _Tree) -> _Tree:
        before = digests(_tensors(data))
        result = inner(data)
        _require_untouched("all_gather", data, before, result)
        gathered = dict(_tensors(result))
        for path, tensor in _tensors(data):
            require(
                path in gathered and _holds_slice(gathered[path], tensor),
                "all_gather",
                f"{path} of this rank does not stand in the result",
            )
        _require_same(strategy, "all_gather", result)
        return result

    return all_gather


def _checked_broadcast(strategy: Strategy) -> Broadcast:
    inner = strategy.broadcast

    def broadcast(data: _Tree, src: int = 0) -> _Tree:
        before = digests(_tensors(data))
        result = inner(data, src)
        _require_untouched("broadcast", data, before, result)
        _require_likeness("broadcast", data, result)
        if strategy.get_rank() == src:
            changed = changed_names(before, digests(_tensors(result)))
            require(not changed, "broadcast", f"{changed} is not what rank {src}, this one, sent")
        _require_same(strategy, "broadcast", result)
        return result

    return broadcast


def _tensors(data: object, path: str = "data") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(data, torch.Tensor):
        yield path, data
    elif isinstance(data, Mapping):
        for key, branch in cast("Mapping[str, object]", data).items():
            yield from _tensors(branch, f"{path}[{key!r}]")


def _require_untouched(function: str, data: object, before: dict[str, str], result: object) -> None:
    changed = changed_names(before, digests(_tensors(data)))
    require(not changed, function, f"{changed} was changed in place")
    given = {tensor.untyped_storage().data_ptr() for _, tensor in _tensors(data) if tensor.numel()}
    shared = [path for path, tensor in _tensors(result) if tensor.untyped_storage().data_ptr() in given]
    require(not shared, function, f"{shared} of the result shares memory with the input")


def _require_likeness(function: str, data: object, result: object) -> None:
    wanted = {path: (tensor.dtype, tensor.shape, tensor.device) for path, tensor in _tensors(data)}
    found = {path: (tensor.dtype, tensor.shape, tensor.device) for path, tensor in _tensors(result)}
    require(found == wanted, function, f"dtypes, shapes and devices are {found} and must be {wanted}")


def _require_same(strategy: Strategy, function: str, result: object) -> None:
    found = dict(_tensors(result))
    whole = hashlib.blake2b(str(sorted(digests(found.items()).items())).encode()).hexdigest()
    device = next((tensor.device for tensor in found.values()), None)
    if device is not None:  # numbers alone say nothing of where ranks exchange tensors
        odd = same_on_all(strategy, whole, device)
        require(odd is None, function, f"rank {odd} got other bits than rank 0")


def _holds_slice(whole: torch.Tensor, part: torch.Tensor) -> bool:
    wanted = part.reshape(1) if part.dim() == 0 else part
    if whole.dtype != wanted.dtype or whole.shape[1:] != wanted.shape[1:]:
        return False
    if not wanted.numel():
        return True
    bits, own = _bits(whole), _bits(wanted)
    return any(torch.equal(bits[i : i + len(own)], own) for i in range(len(bits) - len(own) + 1))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # bytes, so that NaN equals itself; of a row each, so that a slice begins at a row
    return tensor.detach().contiguous().reshape(len(tensor), -1).view(torch.uint8)
