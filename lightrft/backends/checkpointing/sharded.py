"""Tensors that may lie in parts on many ranks: those of torch's `DTensor` and `fully_shard`, and plain ones.

Every function takes both kinds, so that whoever calls it need not ask which one it has. Nothing here is imported for a
process that has no such tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn

from lightrft.backends.checkpointing.access import LiveTensor, Part
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
    "part_for",
    "reshard",
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
    start = _start_of_part(tensor, name) if is_sharded(tensor) else 0

    def part() -> Part:
        local = local_part(tensor).detach()
        return Part(values=local.new_empty(0), start=0) if start is None else Part(values=local, start=start)

    return LiveTensor(
        shape=tensor.shape,
        dtype=tensor.dtype,
        part=part,
        is_whole=not is_sharded(tensor),
        is_buffer=is_buffer,
    )


@torch.no_grad()
def part_for(whole: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor, without communication; for a plain tensor that is the whole.

    Args:
        whole: of the live tensor's shape.
        live: says how parts lie.
    """
    if not is_sharded(live):
        return whole
    from torch.distributed.tensor import distribute_tensor

    parts = distribute_tensor(whole, live.device_mesh, live.placements, src_data_rank=None)
    return parts.to_local()  # memory of its own, not a view that would keep the whole tensor


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


def _start_of_part(tensor: DTensor, name: str) -> int | None:
    """Return the number of the first element that this rank has; None where another rank has the same ones for it."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    first, rows, is_copy = 0, tensor.shape[0] if tensor.dim() else 1, coordinate is None
    for dim, placement in enumerate(tensor.placements):
        place = 0 if coordinate is None else coordinate[dim]
        if type(placement) is Shard and placement.dim == 0:
            size = -(-rows // mesh.size(dim))  # as torch cuts: ranks at the end may have fewer rows, or none
            begin = min(size * place, rows)
            first, rows = first + begin, min(size, rows - begin)
        elif type(placement) is Replicate:
            is_copy = is_copy or place > 0
        else:
            raise UnsupportedError(f"{name} is placed as {placement} and cannot be saved so; shard it along dim 0.")
    return None if is_copy else first * (tensor.numel() // tensor.shape[0] if tensor.dim() and tensor.shape[0] else 0)


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
