"""A copy of the trainer's model inside an engine, and the coverage of an update."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import attrs
import torch
from torch import nn

from lightrft.errors import UnsupportedError, WeightSyncError, nearest

__all__ = ["ModelCopy", "check_coverage", "copy_model", "tensors_of", "write_tensors"]


@attrs.define(kw_only=True, eq=False)
class ModelCopy:
    """The engine's own model.

    Attributes:
        model: the copy, frozen and in evaluation mode.
        written: names that the update under way has written.
    """

    model: nn.Module
    written: set[str]


def copy_model(model: nn.Module) -> ModelCopy:
    """Return a copy whose weights share no memory with the original's.

    Args:
        model: a plain model; its gradients are not copied, as `deepcopy` of a parameter leaves them behind.

    Raises:
        UnsupportedError: the model holds something that cannot be copied.
    """
    try:
        duplicate = copy.deepcopy(model)
    except RuntimeError as error:
        message = f"model={type(model).__name__} cannot be copied ({error}); detach the tensors that it keeps."
        raise UnsupportedError(message) from error
    duplicate.requires_grad_(requires_grad=False).eval()
    return ModelCopy(model=duplicate, written=set())


def tensors_of(weights: ModelCopy) -> dict[str, torch.Tensor]:
    """Return the live parameters and persistent buffers by name; tied ones under each name.

    Asked for anew each time, because a move to another device replaces buffers.

    Args:
        weights: the engine's model.
    """
    return dict(weights.model.state_dict(keep_vars=True))


def write_tensors(weights: ModelCopy, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the engine's model, in its dtypes.

    Args:
        weights: the engine's model.
        tensors: (name, tensor) of any dtype and device.

    Raises:
        WeightSyncError: a name is unknown or came before in this update, or a shape differs.
    """
    targets = tensors_of(weights)
    with torch.no_grad():
        for name, tensor in tensors:
            target = targets.get(name)
            if target is None:
                raise WeightSyncError(f"tensor={name!r} is not in the engine; {nearest(name, targets)}.")
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
    every = tensors_of(weights).keys()
    missing = sorted(every - weights.written)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise WeightSyncError(f"{len(missing)} of {len(every)} tensors were not written ({shown}); send all.")
