"""What a model ties, put into what was read of it: other programs write a tied tensor once, or under each name."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import nn

from lightrft.backends.checkpointing.foreign.record import ForeignGroup, ForeignModel, ForeignOptimizer, ForeignTensor
from lightrft.backends.checkpointing.named import difference
from lightrft.errors import CheckpointError

__all__ = ["tied_like"]


def tied_like(found: ForeignModel, model: nn.Module) -> ForeignModel:
    """Return what was found with the tied tensors of a model once, under their first names.

    Args:
        found: what was read.
        model: on any device, the meta device too; its values are not looked at.

    Raises:
        CheckpointError: names or shapes are not those of the model, or tensors differ that it ties.
    """
    live: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    firsts: dict[int, str] = {}
    first_of = {name: firsts.setdefault(id(tensor), name) for name, tensor in live.items()}
    tensors: dict[str, ForeignTensor] = {}
    for name, tensor in found.tensors.items():
        first = first_of.get(name, name)
        if first in tensors and not torch.equal(tensors[first].read(), tensor.read()):
            raise CheckpointError(f"{name} and {first} differ, and the model ties them; name an untied model.")
        tensors.setdefault(first, tensor)
    words = difference(saved=_shapes(tensors), live=_shapes({first: live[first] for first in firsts.values()}))
    if words is not None:
        raise CheckpointError(f"the checkpoint {words}; name the model that was saved.")
    return attrs.evolve(
        found,
        tensors=tensors,
        aliases={name: first for name, first in first_of.items() if name != first},
        optimizer=None if found.optimizer is None else _renamed(found.optimizer, first_of),
    )


def _shapes(tensors: Mapping[str, ForeignTensor] | Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: str(list(tensor.shape)) for name, tensor in tensors.items()}


def _renamed(optimizer: ForeignOptimizer, first_of: Mapping[str, str]) -> ForeignOptimizer:
    groups = [
        ForeignGroup(
            options=group.options, parameters=[*dict.fromkeys(first_of.get(name, name) for name in group.parameters)]
        )
        for group in optimizer.groups
    ]
    parameters = {first_of.get(name, name): state for name, state in optimizer.parameters.items()}
    return attrs.evolve(optimizer, groups=groups, parameters=parameters)
