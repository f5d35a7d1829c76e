"""Tensors that ZeRO has spread over ranks: parameters in stage 3, and what an optimizer steps in stages 1 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import cast

import attrs
import torch
import torch.distributed as dist
from torch import nn

from lightrft.backends.zero.package import Engine

__all__ = [
    "Fragment",
    "cut",
    "forget_second_copy",
    "fragments",
    "gathered",
    "is_partitioned",
    "is_whole_too",
    "part_of",
    "shard_of",
    "shard_without_padding",
    "whole_shape",
]


@attrs.frozen(kw_only=True, eq=False)
class Fragment:
    """Where this rank's part of a parameter stands among what the optimizer steps.

    Attributes:
        flat: the float32 tensor that this rank steps for a group of parameters.
        place: number of the part's first element there.
        start: number of its first element in the parameter.
        size: its elements; 0 where other ranks have all of them.
        shape: of the whole parameter.
    """

    flat: torch.Tensor
    place: int
    start: int
    size: int
    shape: Sequence[int]


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is spread over ranks.

    Args:
        parameter: any parameter.
    """
    return hasattr(parameter, "ds_id")


def forget_second_copy(parameter: torch.Tensor) -> None:
    """Let the next pass gather a parameter from its shards, which were written, and not from hpZ's copies of them.

    Args:
        parameter: any parameter.
    """
    if is_partitioned(parameter):
        vars(parameter)["ds_secondary_tensor"] = None


def whole_shape(parameter: torch.Tensor) -> Sequence[int]:
    """Return the shape of the whole parameter.

    Args:
        parameter: any parameter.
    """
    return cast("Sequence[int]", getattr(parameter, "ds_shape", parameter.shape))


def is_whole_too(parameter: torch.Tensor) -> bool:
    """Return whether this rank has the whole of a parameter beside its shard, as it has of a small one.

    Args:
        parameter: any parameter.
    """
    return is_partitioned(parameter) and parameter.shape == whole_shape(parameter) and parameter.numel() > 0


def shard_of(parameter: torch.Tensor) -> torch.Tensor:
    """Return the memory of this rank's shard, flat.

    Args:
        parameter: one that is spread over ranks.
    """
    return cast("torch.Tensor", vars(parameter)["ds_tensor"]).detach()


def shard_without_padding(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the memory of this rank's shard that holds elements of the parameter, and the number of the first one.

    Args:
        parameter: one that is spread over ranks.
    """
    shard, size = shard_of(parameter), torch.Size(whole_shape(parameter)).numel()
    start = min(shard.numel() * dist.get_rank(), size)
    return shard.narrow(0, 0, min(shard.numel(), size - start)), start


def cut(whole: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a whole tensor, with zeros behind its end.

    Args:
        whole: of the shape of the whole parameter.
        live: the parameter, spread over ranks.
    """
    size = shard_of(live).numel()
    shard = whole.flatten()[size * dist.get_rank() :][:size]
    return nn.functional.pad(shard, (0, size - shard.numel()))


def part_of(flat: torch.Tensor, fragment: Fragment) -> torch.Tensor:
    """Return a parameter's part of a tensor that is laid out as `Fragment.flat`, in its memory.

    Args:
        flat: what the optimizer steps, or a state of it.
        fragment: where the part stands.
    """
    return flat.detach().narrow(0, fragment.place, fragment.size)


@torch.no_grad()
def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole parameter, in memory of its own if it is spread over ranks; all ranks call it then.

    Args:
        parameter: any parameter.
    """
    shape = torch.Size(whole_shape(parameter))
    if not is_partitioned(parameter):
        return parameter.detach()
    if not shape.numel():
        return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    with import_module("deepspeed").zero.GatheredParameters([parameter]):
        return parameter.detach().clone().view(shape)


def fragments(engine: Engine) -> Iterator[tuple[nn.Parameter, Fragment]]:
    """Yield (parameter, its fragment) for all that the optimizer steps, in the order of its groups.

    Args:
        engine: of a model that is trained in stage 1, 2 or 3.
    """
    zero = engine.optimizer
    is_third = engine.zero_optimization_stage() == 3
    for number, group in enumerate(zero.fp16_groups if is_third else zero.bit16_groups):
        for parameter in group:
            if is_third:
                flat = zero.fp32_partitioned_groups_flat[number]
                yield parameter, _fragment_of_shard(parameter, flat, zero.grad_position[zero.get_param_id(parameter)])
            else:
                yield parameter, _fragment_of_flat(parameter, zero.single_partition_of_fp32_groups[number])


def _fragment_of_shard(parameter: nn.Parameter, flat: torch.Tensor, position: Sequence[int]) -> Fragment:
    _, place, length = position
    shape = torch.Size(whole_shape(parameter))
    start = min(length * dist.get_rank(), shape.numel())
    return Fragment(flat=flat, place=int(place), start=start, size=min(int(length), shape.numel() - start), shape=shape)


def _fragment_of_flat(parameter: nn.Parameter, flat: torch.Tensor) -> Fragment:
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return Fragment(flat=flat, place=0, start=0, size=0, shape=parameter.shape)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(flat=flat, place=there.start, start=here.start, size=here.numel, shape=parameter.shape)
