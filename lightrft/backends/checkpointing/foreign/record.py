"""What is read of another program's checkpoint, in the terms of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch

from lightrft.backends.checkpointing.access import OptimizerState, ParameterGroup, ParameterState, WholeTensor
from lightrft.backends.checkpointing.tensor_files import whole_tensor
from lightrft.errors import CheckpointError, UnsupportedError

__all__ = ["ForeignModel", "foreign_optimizer", "joined", "parameter_state"]

# what options say of how an optimizer computes, or what a program notes beside them; a live optimizer has its own
_BESIDES = frozenset(
    {"params", "param_names", "name", "step", "initial_lr", "bias_correction", "set_grad_none"}
    | {"foreach", "fused", "capturable", "differentiable"}
)


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
    tensors: Mapping[str, WholeTensor]
    aliases: Mapping[str, str] = attrs.field(factory=dict[str, str])
    optimizer: OptimizerState | None = None
    step: int | None = None
    notes: Sequence[str] = ()


def foreign_optimizer(
    groups: Sequence[tuple[Mapping[str, object], Sequence[str]]], parameters: Mapping[str, ParameterState]
) -> OptimizerState:
    """Return what an optimizer kept, in the terms in which a checkpoint is written.

    Args:
        groups: options and names of the parameters of each group.
        parameters: state by the names of the parameters.
    """
    counting = [
        ParameterGroup(options={key: options[key] for key in options if key not in _BESIDES}, parameters=names)
        for options, names in groups
    ]
    return OptimizerState(
        defaults={key for group in counting for key in group.options},
        groups=counting,
        parameters=parameters,
        plan_parameter=_refuse,
    )


def parameter_state(state: Mapping[str, WholeTensor | object], options: Mapping[str, object]) -> ParameterState:
    """Return what was kept of one parameter; a count of steps becomes the tensor that torch's optimizers have.

    Args:
        state: tensors to be read, tensors of one element, and values, by the optimizer's keys.
        options: of its group, where some optimizers count their steps.
    """
    count = state.get("step", options.get("step"))
    tensors = {key: value for key, value in state.items() if isinstance(value, WholeTensor)}
    if isinstance(count, int | float):
        count = torch.tensor(float(count))
    if isinstance(count, torch.Tensor):
        tensors["step"] = whole_tensor(count.detach().clone())
    values = {key: value for key, value in state.items() if key not in tensors}
    return ParameterState(tensors=tensors, values=values)


def joined(pieces: Sequence[torch.Tensor], shape: Sequence[int], *, source: str) -> WholeTensor:
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

    return WholeTensor(shape=size, dtype=dtypes.pop(), read=read)


def _refuse(
    name: str, saved: Mapping[str, object] | None, *, options: Mapping[str, object], source: str
) -> Callable[[], None]:
    del saved, options, source
    raise UnsupportedError(f"{name} is in a checkpoint of another program, which is only read; load into a live model.")
