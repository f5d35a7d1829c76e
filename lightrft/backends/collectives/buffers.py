"""Reductions over ranks that are exact where they can be, in one buffer for all tensors of a kind.

Narrow floating-point values are reduced in float32 and rounded once, integers and bools in int64, complex values as
pairs, because not every backend can add the narrow ones, and those that can round at every addition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from lightrft.backends.collectives.exchange import Meeting, reduce_in_place
from lightrft.backends.collectives.process_group import data_device
from lightrft.backends.collectives.trees import Leaf
from lightrft.errors import ConfigError
from lightrft.strategy.protocols.collectives import ReduceOp

__all__ = ["reduce_numbers", "reduce_tensors"]


def reduce_tensors(meeting: Meeting, tensors: Mapping[str, torch.Tensor], op: ReduceOp) -> dict[str, Leaf]:
    """Return the reduction of every tensor over ranks, in memory of its own.

    Args:
        meeting: where ranks agreed on the tensors and the op.
        tensors: by path, in sorted order; left as they are.
        op: the reduction.

    Raises:
        CollectiveError: a rank was lost.
        ConfigError: a dtype cannot be reduced.
    """
    device = data_device(meeting.group)
    wide = {path: _widened(tensor, path, op).to(device) for path, tensor in tensors.items()}
    reduced: dict[str, Leaf] = {}
    for dtype in (torch.int64, torch.float32, torch.float64):
        paths = [path for path, tensor in wide.items() if tensor.dtype == dtype]
        if paths:
            buffer = _reduced(meeting, torch.cat([wide[path].reshape(-1) for path in paths]), op)
            parts = torch.split(buffer, [wide[path].numel() for path in paths])
            for path, part in zip(paths, parts, strict=True):
                reduced[path] = _narrowed(part.reshape(wide[path].shape), tensors[path])
    return reduced


def reduce_numbers(numbers: Sequence[Sequence[float]], op: ReduceOp) -> list[float]:
    """Return the reduction of Python's numbers over ranks: integers of any size, floats as float64.

    Args:
        numbers: those of every rank, in rank order.
        op: the reduction.
    """
    return [_reduced_number(values, op) for values in zip(*numbers, strict=True)]


def _reduced_number(values: Sequence[float], op: ReduceOp) -> float:
    if isinstance(values[0], bool):
        return any(values) if op == "max" else all(values)
    if isinstance(values[0], int):
        return sum(values) if op == "sum" else max(values) if op == "max" else min(values)
    column = torch.tensor(values, dtype=torch.float64)  # Python's max and min lose a nan
    if op in {"max", "min"}:
        return float((column.amax() if op == "max" else column.amin()).item())
    total = sum(values[1:], start=values[0])
    return total / len(values) if op == "mean" else total


def _widened(tensor: torch.Tensor, path: str, op: ReduceOp) -> torch.Tensor:
    whole = tensor.detach()
    if whole.dtype == torch.uint64 and op != "sum":  # a sum of any 64 bits wraps around alike
        raise ConfigError(f"op={op!r} has no meaning for {path}, which is {whole.dtype}; convert it to torch.int64.")
    if whole.is_complex():
        whole = torch.view_as_real(whole.resolve_conj())
    if not whole.is_floating_point():
        return whole.to(torch.int64)
    return whole.float() if whole.dtype.itemsize < 4 else whole


def _narrowed(wide: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if like.is_complex():
        wide = torch.view_as_complex(wide.to(like.real.dtype).contiguous())
    # copied, so that the tensors of one result share no buffer
    return wide.to(device=like.device, dtype=like.dtype, copy=True)


def _reduced(meeting: Meeting, buffer: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    if op in {"max", "min"} and buffer.is_floating_point():
        return _extreme(meeting, buffer, op)
    reduce_in_place(meeting, buffer, "sum" if op == "mean" else op)
    return buffer / len(meeting.sizes) if op == "mean" else buffer


def _extreme(meeting: Meeting, buffer: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    # backends disagree about nan, which wins over every number: it travels beside the numbers
    is_nan = buffer.isnan()
    flags = is_nan.to(buffer.dtype) * (1 if op == "max" else -1)
    both = torch.cat([buffer.masked_fill(is_nan, 0.0), flags])
    reduce_in_place(meeting, both, op)
    values, flags = cast("tuple[torch.Tensor, torch.Tensor]", both.chunk(2))
    return values.masked_fill(flags != 0, float("nan"))
