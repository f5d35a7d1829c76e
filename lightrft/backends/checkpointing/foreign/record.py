"""What is read of another program's checkpoint, in the terms of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs
import torch

from lightrft.errors import CheckpointError

__all__ = [
    "ForeignGroup",
    "ForeignModel",
    "ForeignOptimizer",
    "ForeignParameter",
    "ForeignTensor",
    "ReadForeign",
    "foreign_optimizer",
    "foreign_parameter",
    "in_memory",
    "joined",
]

# what options say of how an optimizer computes, or what a program notes beside them; a live optimizer has its own
_BESIDES = frozenset(
    {"params", "param_names", "name", "step", "initial_lr", "bias_correction", "set_grad_none"}
    | {"foreach", "fused", "capturable", "differentiable"}
)


class ReadForeign(Protocol):
    """Reads a tensor."""

    def __call__(self) -> torch.Tensor:
        """Return the whole tensor, on the CPU; nobody writes to it, and it is not kept.

        Raises:
            CheckpointError: the file is damaged or holds more than data.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class ForeignTensor:
    """A tensor as it lies in the files of another program.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        read: puts it together.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    read: ReadForeign


@attrs.frozen(kw_only=True, eq=False)
class ForeignGroup:
    """One parameter group of an optimizer.

    Attributes:
        options: its hyperparameters.
        parameters: names of its parameters.
    """

    options: Mapping[str, object]
    parameters: Sequence[str]


@attrs.frozen(kw_only=True, eq=False)
class ForeignParameter:
    """What an optimizer kept of one parameter.

    Attributes:
        tensors: by the optimizer's keys.
        values: what is no tensor, by its key.
    """

    tensors: Mapping[str, ForeignTensor]
    values: Mapping[str, object]


@attrs.frozen(kw_only=True, eq=False)
class ForeignOptimizer:
    """What an optimizer kept.

    Attributes:
        groups: its parameter groups, in its order.
        parameters: state by the names of the parameters; one without state is not there.
    """

    groups: Sequence[ForeignGroup]
    parameters: Mapping[str, ForeignParameter]


@attrs.frozen(kw_only=True, eq=False)
class ForeignModel:
    """One model as it lies in a checkpoint of another program.

    Attributes:
        kind: what wrote it: "huggingface", "torch-dcp" or "deepspeed".
        tensors: parameters and persistent buffers by name; a tied one under its first name, as far as ties are known.
        aliases: every further name of a tied tensor, and its first name.
        optimizer: None where the source has none, or none that can be read by name.
        step: how many steps the source counts; None where it does not.
        notes: what is missing, left out or assumed, a sentence each.
    """

    kind: str
    tensors: Mapping[str, ForeignTensor]
    aliases: Mapping[str, str] = attrs.field(factory=dict[str, str])
    optimizer: ForeignOptimizer | None = None
    step: int | None = None
    notes: Sequence[str] = ()


def foreign_optimizer(
    groups: Sequence[tuple[Mapping[str, object], Sequence[str]]], parameters: Mapping[str, ForeignParameter]
) -> ForeignOptimizer:
    """Return what an optimizer kept, of its options those that count.

    Args:
        groups: options and names of the parameters of each group.
        parameters: state by the names of the parameters.
    """
    return ForeignOptimizer(
        groups=[
            ForeignGroup(options={key: options[key] for key in options if key not in _BESIDES}, parameters=names)
            for options, names in groups
        ],
        parameters=parameters,
    )


def foreign_parameter(state: Mapping[str, object], options: Mapping[str, object]) -> ForeignParameter:
    """Return what was kept of one parameter; a count of steps becomes the tensor that torch's optimizers have.

    Args:
        state: tensors to be read, tensors of one element, and values, by the optimizer's keys.
        options: of its group, where some optimizers count their steps.
    """
    count = state.get("step", options.get("step"))
    tensors = {key: value for key, value in state.items() if isinstance(value, ForeignTensor)}
    if isinstance(count, int | float):
        count = torch.tensor(float(count))
    if isinstance(count, torch.Tensor):
        tensors["step"] = in_memory(count.detach().clone())
    values = {key: value for key, value in state.items() if key not in tensors}
    return ForeignParameter(tensors=tensors, values=values)


def in_memory(tensor: torch.Tensor) -> ForeignTensor:
    """Return a tensor that needs no reading.

    Args:
        tensor: whole.
    """

    def read() -> torch.Tensor:
        return tensor

    return ForeignTensor(shape=tensor.shape, dtype=tensor.dtype, read=read)


def joined(pieces: Sequence[torch.Tensor], shape: Sequence[int], *, source: str) -> ForeignTensor:
    """Return a tensor whose elements lie in one-dimensional pieces, in order; they are put together when it is read.

    Args:
        pieces: without anything between or after them; one at least.
        shape: of the whole.
        source: what the tensor is called in the error.

    Raises:
        CheckpointError: the pieces do not make up the shape.
    """
    size, dtypes = torch.Size(shape), {piece.dtype for piece in pieces}
    found = sum(piece.numel() for piece in pieces)
    if found != size.numel() or len(dtypes) != 1:
        raise CheckpointError(
            f"{source} has {found} elements in the files of all ranks, and its shape is {list(size)}; copy the "
            "directory again."
        )

    def read() -> torch.Tensor:
        return torch.cat(list(pieces)).reshape(size)

    return ForeignTensor(shape=size, dtype=dtypes.pop(), read=read)
