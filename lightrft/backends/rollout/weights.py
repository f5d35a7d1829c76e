"""A copy of the trainer's model inside an engine, and the coverage of an update."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import attrs
import torch
from torch import nn

from lightrft.errors import UnsupportedError, WeightSyncError, nearest

__all__ = ["ModelCopy", "check_coverage", "copy_model", "write_tensors"]


@attrs.define(kw_only=True, eq=False)
class ModelCopy:
    """The engine's own model.

    Attributes:
        model: the copy, frozen and in evaluation mode.
        tensors: its parameters and persistent buffers by name; tied ones under each name.
        written: names that the update under way has written.
    """

    model: nn.Module
    tensors: dict[str, torch.Tensor]
    written: set[str]


def copy_model(model: nn.Module) -> ModelCopy:
    """Return a copy whose weights share no memory with the original's.

    Args:
        model: a plain model; its gradients are not copied.

    Raises:
        UnsupportedError: the model holds something that cannot be copied.
    """
    # deepcopy copies `.grad` too; empty entries in its memo leave gradients behind without touching the original
    gradients = {id(p.grad): None for p in model.parameters() if p.grad is not None}
    try:
        duplicate = copy.deepcopy(model, memo=dict(gradients))
    except RuntimeError as error:
        message = f"model={type(model).__name__} cannot be copied ({error}); detach the tensors that it keeps."
        raise UnsupportedError(message) from error
    duplicate.requires_grad_(requires_grad=False).eval()
    return ModelCopy(model=duplicate, tensors=dict(duplicate.state_dict(keep_vars=True)), written=set())


def write_tensors(weights: ModelCopy, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the engine's model, in its dtypes.

    Args:
        weights: the engine's model.
        tensors: (name, tensor) of any dtype and device.

    Raises:
        WeightSyncError: a name is unknown or came before in this update, or a shape differs.
    """
    with torch.no_grad():
        for name, tensor in tensors:
            target = weights.tensors.get(name)
            if target is None:
                raise WeightSyncError(f"tensor={name!r} is not in the engine; {nearest(name, weights.tensors)}.")
            if name in weights.written:
                raise WeightSyncError(f"tensor={name!r} came twice in one update; send every name once.")
            if target.shape != tensor.shape:
                raise WeightSyncError(
                    f"tensor={name!r} has shape {tuple(tensor.shape)} and the engine's {tuple(target.shape)}; "
                    "start the engine from this model."
                )
            target.copy_(tensor)
            weights.written.add(name)


def check_coverage(weights: ModelCopy) -> None:
    """Raise unless the update has written every tensor.

    Raises:
        WeightSyncError: tensors are missing; the first ones are named.
    """
    missing = sorted(set(weights.tensors) - weights.written)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise WeightSyncError(f"{len(missing)} of {len(weights.tensors)} tensors were not written ({shown}); send all.")
