"""Where the elements of each parameter lie in the flat tensors that ZeRO's optimizers step.

Stages 1 and 2 line up the parameters of a group, in the order in which the file names them, and cut that into one part
a rank. Stage 3 cuts each parameter into equal parts, one a rank, and lines up those of a group in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias, cast

import attrs
import torch

from lightrft.backends.checkpointing.foreign.deepspeed_files import RankFiles
from lightrft.errors import CheckpointError, UnsupportedError

__all__ = ["FlatParts", "Place", "flat_parts", "own_size"]

_State: TypeAlias = Mapping[str, object]
_Shapes: TypeAlias = Sequence[Mapping[str, torch.Size]]


@attrs.frozen(kw_only=True)
class Place:
    """Where some elements of a parameter lie.

    Attributes:
        rank: whose part.
        group: number of the flat tensor.
        start: index of the first one in the rank's part of that tensor.
        size: how many.
    """

    rank: int
    group: int
    start: int
    size: int


@attrs.frozen(kw_only=True, eq=False)
class FlatParts:
    """What an optimizer of flat tensors kept on all ranks.

    Attributes:
        shapes: of each parameter that is stepped.
        places: of its elements, in order.
        values: float32 values of each rank's part of each flat tensor.
        states: what the optimizer kept of each rank's part of each flat tensor; none before the first step.
        groups: options and names of the parameters of each of the optimizer's groups.
    """

    shapes: Mapping[str, torch.Size]
    places: Mapping[str, Sequence[Place]]
    values: Sequence[Sequence[torch.Tensor]]
    states: Sequence[Mapping[int, _State]]
    groups: Sequence[tuple[_State, Sequence[str]]]


def flat_parts(files: RankFiles, directory: Path) -> FlatParts:
    """Return what the optimizer files hold.

    Args:
        files: of all ranks.
        directory: what they are called in errors.

    Raises:
        CheckpointError: a part has not the size that the shapes give.
        UnsupportedError: the parts are of another kind.
    """
    kept = [cast("_State", each["optimizer_state_dict"]) for each in files.optimizers]
    shapes = cast("_Shapes", files.models[0]["param_shapes"])
    is_third = "fp32_flat_groups" in kept[0]
    values = [
        cast("Sequence[torch.Tensor]", each["fp32_flat_groups" if is_third else "single_partition_of_fp32_groups"])
        for each in kept
    ]
    base = [each["optimizer_state_dict" if is_third else "base_optimizer_state"] for each in kept]
    if not all(isinstance(each, Mapping) for each in base) or "ds_zero_partition_groups" in kept[0]:
        raise UnsupportedError(
            f"{directory} was written with elastic_checkpoint or with experts split over ranks; save it without."
        )
    first = cast("_State", base[0])
    paddings = cast("Sequence[Sequence[int]] | None", kept[0].get("param_alignment_paddings"))
    return FlatParts(
        shapes={name: shape for group in shapes for name, shape in group.items()},
        places=_cut_parameters(shapes, values, directory) if is_third else _cut_groups(shapes, values, paddings),
        values=values,
        states=[cast("Mapping[int, _State]", cast("_State", each)["state"]) for each in base],
        groups=[
            (options, [name for number in cast("list[int]", options["params"]) for name in shapes[number]])
            for options in cast("list[_State]", first["param_groups"])
        ],
    )


def own_size(size: int, *, rank: int, num_ranks: int) -> int:
    """Return how many elements of a parameter stage 3 keeps on a rank, without padding.

    Args:
        size: elements of the parameter.
        rank: number of the rank.
        num_ranks: of all.

    Example:
        >>> [own_size(5, rank=rank, num_ranks=3) for rank in range(3)]
        [2, 2, 1]
    """
    return min(_padded(size, num_ranks), max(0, size - rank * _padded(size, num_ranks)))


def _padded(size: int, num_ranks: int) -> int:
    return -(-size // num_ranks)


def _cut_groups(
    shapes: _Shapes,
    values: Sequence[Sequence[torch.Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> dict[str, list[Place]]:
    # the files also say where a rank has the elements of a parameter, and are wrong about it where
    # `round_robin_gradients` has lined up the parameters in another order than the module's
    places: dict[str, list[Place]] = defaultdict(list)
    for group, of_group in enumerate(shapes):
        ends = [*accumulate(flats[group].numel() for flats in values)]
        start = 0
        for number, (name, shape) in enumerate(of_group.items()):
            for rank, end_of_rank in enumerate(ends):
                start_of_rank = ends[rank - 1] if rank else 0
                first, end = max(start, start_of_rank), min(start + shape.numel(), end_of_rank)
                if first < end:
                    places[name].append(Place(rank=rank, group=group, start=first - start_of_rank, size=end - first))
            start += shape.numel() + (paddings[group][number] if paddings else 0)
    return places


def _cut_parameters(
    shapes: _Shapes, values: Sequence[Sequence[torch.Tensor]], directory: Path
) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = defaultdict(list)
    for group, of_group in enumerate(shapes):
        start = 0
        for name, shape in of_group.items():
            for rank in range(len(values)):
                size = own_size(shape.numel(), rank=rank, num_ranks=len(values))
                places[name].append(Place(rank=rank, group=group, start=start, size=size))
            start += _padded(shape.numel(), len(values))
        for rank, flats in enumerate(values):
            if flats[group].numel() != start:
                raise CheckpointError(
                    f"{directory}: rank {rank} has {flats[group].numel()} elements of group {group}, and its shapes "
                    f"give {start}; copy the directory again."
                )
    return places
