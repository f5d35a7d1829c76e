"""Tensors that may lie in parts on many ranks: those of torch's `DTensor` and `fully_shard`, and plain ones.

Every function takes both kinds, so that whoever calls it need not ask which one it has. Nothing here is imported for a
process that has no such tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn

from lightrft.backends.checkpointing.access import LiveTensor, Part, StoredTensor
from lightrft.backends.checkpointing.stored import stored_range
from lightrft.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = [
    "drop_deferred_gradients",
    "has_deferred_gradients",
    "is_sharded",
    "live_tensor",
    "local_part",
    "reshard",
    "stored_part",
    "wrap_part",
]


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor's parts lie on a mesh of ranks.

    Args:
        tensor: any tensor.
    """
    if "torch.distributed.tensor" not in sys.modules:  # importing it takes a second, and whoever made one has done so
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part, which shares memory with the tensor; a plain tensor is its own part.

    Args:
        tensor: any tensor.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def live_tensor(tensor: torch.Tensor, name: str, *, is_buffer: bool = False) -> LiveTensor:
    """Return the description of a tensor of a model or an optimizer.

    Args:
        tensor: any tensor.
        name: what it is called in the error.
        is_buffer: whether a forward pass may change it.

    Raises:
        UnsupportedError: its parts are no runs of its elements in row-major order.
    """
    start = _rows(tensor, name).start * _row_size(tensor) if is_sharded(tensor) else 0

    def part() -> Part:
        local = local_part(tensor).detach()
        return (
            Part(values=local.new_empty(0), start=0)
            if is_sharded(tensor) and _is_copy(tensor)
            else Part(values=local, start=start)
        )

    return LiveTensor(
        shape=tensor.shape,
        dtype=tensor.dtype,
        part=part,
        is_whole=not is_sharded(tensor),
        is_buffer=is_buffer,
        counted=tensor.detach() if is_sharded(tensor) else None,
    )


def stored_part(stored: StoredTensor, live: torch.Tensor) -> StoredTensor:
    """Return this rank's part of a tensor of a file, as if it were stored alone; of a plain tensor that is the whole.

    Args:
        stored: of the live tensor's shape.
        live: says how parts lie, as `live_tensor` takes it.
    """
    if not is_sharded(live):
        return stored
    return stored_range(stored, _rows(live, "a tensor").start * _row_size(live), local_part(live).shape)


def wrap_part(part: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the live one's kind and layout whose part on this rank is the given one.

    Args:
        part: as `local_part(live)` is shaped.
        live: says how parts lie.
    """
    if not is_sharded(live):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward pass has gathered, so that the model's parameters are its own again.

    Args:
        model: any model.
    """
    for module in _fsdp_modules(model):
        module.reshard()


def has_deferred_gradients(model: nn.Module) -> bool:
    """Return whether the model has gradients that its ranks have not yet reduced.

    Args:
        model: any model.
    """
    return any(getattr(holder, name, None) is not None for holder, name in _deferred(model))


def drop_deferred_gradients(model: nn.Module) -> None:
    """Forget the gradients that the ranks have not yet reduced.

    Args:
        model: any model.
    """
    for holder, name in _deferred(model):
        setattr(holder, name, None)


def _rows(live: DTensor, name: str) -> range:
    """Return the numbers of the rows that this rank has; a 0-d tensor has one."""
    from torch.distributed.tensor import Replicate, Shard

    rows = range(live.shape[0] if live.dim() else 1)
    # by type, because torch has a kind of Shard that deals rows out in another order
    for dim, placement in enumerate(live.placements):
        if type(placement) is Shard and placement.dim == 0:
            size = -(-len(rows) // live.device_mesh.size(dim))  # as torch cuts: ranks at the end have fewer, or none
            rows = rows[size * live.device_mesh.get_local_rank(dim) :][:size]
        elif type(placement) is not Replicate:
            raise UnsupportedError(f"{name} is placed as {placement} and cannot be kept so; shard it along dim 0.")
    return rows


def _row_size(live: torch.Tensor) -> int:
    return math.prod(live.shape[1:])


def _is_copy(live: DTensor) -> bool:
    """Return whether another rank has the same elements and speaks for this one."""
    return any(
        placement.is_replicate() and live.device_mesh.get_local_rank(dim)
        for dim, placement in enumerate(live.placements)
    )


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def _deferred(model: nn.Module) -> Iterator[tuple[object, str]]:
    """Yield the attributes where `fully_shard` keeps gradients that are not reduced; torch has no public way to ask."""
    for module in _fsdp_modules(model):
        state: object = module._get_fsdp_state()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        # torch 2.13 has several groups where earlier ones have one
        groups = cast("Sequence[object]", getattr(state, "_fsdp_param_groups", None) or _listed(state))
        for group in groups:
            yield group, "_partial_reduce_output"
            for parameter in cast("Sequence[object]", getattr(group, "fsdp_params", ())):
                yield parameter, "unsharded_accumulated_grad"
                if hasattr(parameter, "_unsharded_param"):
                    yield getattr(parameter, "_unsharded_param"), "grad"  # noqa: B009 (no type knows it)


def _listed(state: object) -> list[object]:
    group: object = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]
