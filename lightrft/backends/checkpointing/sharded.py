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

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = [
    "drop_deferred_gradients",
    "has_deferred_gradients",
    "is_sharded",
    "local_part",
    "part_for",
    "read_whole",
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


@torch.no_grad()
def read_whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor; all ranks call it together if the tensor is sharded.

    Args:
        tensor: any tensor.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    local, mesh = local_part(tensor), tensor.device_mesh
    if local.device.type != mesh.device_type:  # offloaded: ranks talk where their mesh is
        tensor = cast("DTensor", wrap_part(local.to(mesh.device_type), tensor))
    return tensor.full_tensor()


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
