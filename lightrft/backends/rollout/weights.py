"""A copy of the trainer's model inside an engine, and the coverage of an update."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping

import attrs
import torch
from torch import nn

from lightrft.errors import UnsupportedError, WeightSyncError, nearest

__all__ = [
    "ModelCopy",
    "begin_write",
    "check_coverage",
    "checked",
    "copy_model",
    "require_all",
    "tensors_of",
    "write_tensors",
]


@attrs.define(kw_only=True, eq=False)
class ModelCopy:
    """The engine's own model.

    Attributes:
        model: the copy, frozen and in evaluation mode.
        targets: what an update writes into, by name; asked for once in an update.
        written: names that the update under way has written.
    """

    model: nn.Module
    targets: dict[str, torch.Tensor]
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
    return ModelCopy(model=duplicate, targets=dict(duplicate.state_dict(keep_vars=True)), written=set())


def tensors_of(weights: ModelCopy) -> dict[str, torch.Tensor]:
    """Return the live parameters and persistent buffers by name; tied ones under each name.

    Asked for anew each time, because a move to another device replaces buffers.

    Args:
        weights: the engine's model.
    """
    return dict(weights.model.state_dict(keep_vars=True))


def begin_write(weights: ModelCopy) -> None:
    """Make an update begin: nothing is written yet.

    Args:
        weights: the engine's model.
    """
    weights.targets = tensors_of(weights)
    weights.written.clear()


def write_tensors(weights: ModelCopy, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the engine's model, in its dtypes.

    Args:
        weights: the engine's model.
        tensors: (name, tensor) of any dtype and device.

    Raises:
        WeightSyncError: a name is unknown or came before in this update, or a shape differs.
    """
    shapes = {name: target.shape for name, target in weights.targets.items()}
    with torch.no_grad():
        for name, tensor in checked(tensors, shapes=shapes, written=weights.written):
            weights.targets[name].copy_(tensor)


def checked(
    tensors: Iterable[tuple[str, torch.Tensor]], *, shapes: Mapping[str, torch.Size], written: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an update, each after it was checked and before its name counts as written.

    Args:
        tensors: (name, tensor) of any dtype and device.
        shapes: what the engine has, by the names of the plain model.
        written: names that the update under way has written; it grows.

    Raises:
        WeightSyncError: a name is unknown or came before in this update, or a shape differs.
    """
    for name, tensor in tensors:
        if name not in shapes:
            raise WeightSyncError(f"tensor={name!r} is not in the engine; {nearest(name, shapes)}.")
        if name in written:
            raise WeightSyncError(f"tensor={name!r} came twice in one update; send every name once.")
        if shapes[name] != tensor.shape:
            raise WeightSyncError(
                f"tensor={name!r} has shape {tuple(tensor.shape)} and the engine's {tuple(shapes[name])}; "
                "start the engine from this model."
            )
        yield name, tensor
        written.add(name)


def check_coverage(weights: ModelCopy) -> None:
    """Raise unless the update has written every tensor.

    Raises:
        WeightSyncError: tensors are missing; the first ones are named.
    """
    require_all(weights.targets, weights.written)


def require_all(names: Collection[str], written: Collection[str]) -> None:
    """Raise unless every name was written.

    Args:
        names: what the engine has.
        written: what the update has written.

    Raises:
        WeightSyncError: names are missing; the first ones are named.
    """
    missing = sorted(set(names).difference(written))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise WeightSyncError(f"{len(missing)} of {len(names)} tensors were not written ({shown}); send all.")
