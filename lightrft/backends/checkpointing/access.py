"""What checkpointing asks a backend about live tensors: a table of where their parts are, and plans that write them.

The tensors of a model may lie whole on every rank, or in parts on all of them. What is on disk are whole tensors under
the names of the plain model; a backend says what there is and what this rank has of it, without communication, and
turns a tensor of a file into an action that reads this rank's part of it to where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy.protocols.training import UnwrapModel

__all__ = [
    "CopyInto",
    "GetModelState",
    "GetOptimizerState",
    "LiveTensor",
    "ModelState",
    "OptimizerState",
    "ParameterGroup",
    "ParameterState",
    "Part",
    "PlanGradients",
    "PlanParameterState",
    "PlanTensor",
    "ReadGradients",
    "ReadPart",
    "StateAccess",
    "StoredTensor",
]


@attrs.frozen(kw_only=True, eq=False)
class Part:
    """What this rank has of a tensor: a run of its elements in row-major order.

    Attributes:
        values: the elements, of any shape and stride, in the live memory; none where other ranks have all of them.
        start: number of the first of them in the whole tensor.
    """

    values: torch.Tensor
    start: int


class ReadPart(Protocol):
    """Says what this rank has of a tensor."""

    def __call__(self) -> Part:
        """Return this rank's part, without communication; nobody writes to it.

        The parts of all ranks make up the tensor, and no element is in two of them. Where every rank has all of the
        tensor, the part is the whole.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class LiveTensor:
    """A tensor as the plain model or its optimizer has it, wherever its parts are.

    Attributes:
        shape: of the whole tensor.
        dtype: as the plain model has it, for instance float32 where a backend computes with bfloat16 copies.
        part: says what this rank has.
        is_whole: whether every rank has all of it, the same on all of them.
        is_buffer: whether a forward pass may change it; else only a step, an average, a load or a move does.
        counted: where torch counts the writes to the part, if that is another tensor.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    part: ReadPart
    is_whole: bool
    is_buffer: bool = False
    counted: torch.Tensor | None = None


class CopyInto(Protocol):
    """Reads elements of a tensor of a file."""

    def __call__(self, target: torch.Tensor, *, start: int = 0) -> None:
        """Overwrite a tensor with as many elements, in row-major order, as it has; nothing is communicated.

        A dense target in main memory is read to at once; another one takes the memory of a bucket of constant size,
        or its own where its elements do not lie in a row.

        Args:
            target: of any device, stride and dtype; no element of it may be another's.
            start: number of the first element that is read.

        Raises:
            OSError: the file cannot be read; the target may hold some of the elements then.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class StoredTensor:
    """A tensor of an open file, as the plain model or its optimizer has it.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        copy_into: reads some of them, or all.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    copy_into: CopyInto


class PlanTensor(Protocol):
    """Prepares the reading of one tensor of a model."""

    def __call__(self, name: str, saved: StoredTensor, *, source: str) -> Callable[[], None]:
        """Return an action that reads this rank's part of a stored tensor into the live one; nothing is changed yet.

        What depends on values is checked here, by reading them. The action refuses nothing and communicates nothing,
        needs the memory of one tensor at most, and fails only where the file can no longer be read. It runs once,
        after every rank has said that it has nothing to refuse.

        Args:
            name: one of `ModelState.tensors`.
            saved: the whole tensor in its file, of the shape and dtype that stand there.
            source: what the tensor is called in errors.

        Raises:
            CheckpointError: the live tensor cannot hold the values.
            OSError: the file cannot be read.
        """
        ...


class ReadGradients(Protocol):
    """Reads what this rank has accumulated."""

    def __call__(self) -> Mapping[str, torch.Tensor]:
        """Return this rank's own gradients of the open window, by any name and in any shape; none between windows.

        Without communication. `PlanGradients` gets the same back on the same rank of an equally large world.

        Raises:
            CheckpointError: there are gradients that cannot be saved, for instance because their synchronisation was
                put off.
        """
        ...


class PlanGradients(Protocol):
    """Prepares the writing of this rank's gradients."""

    def __call__(self, saved: Mapping[str, StoredTensor], *, source: str) -> Callable[[], None]:
        """Return an action that makes these the gradients of the open window; all others are dropped.

        For the action, see `PlanTensor`. A gradient that is not there yet may be allocated and read here.

        Args:
            saved: what `ReadGradients` returned; empty where the checkpoint was saved between two windows.
            source: what the tensors are called in errors.

        Raises:
            CheckpointError: names, shapes or dtypes are not those of this rank's gradients.
            OSError: the file cannot be read.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class ModelState:
    """Parameters and persistent buffers of a model.

    Attributes:
        tensors: by the names of the plain model, in the order of its modules, the same on all ranks; a tied one under
            its first name.
        aliases: every further name of a tied tensor, and its first name.
        plan_tensor: prepares the writing of one of `tensors`.
        read_gradients: reads what this rank has accumulated.
        plan_gradients: prepares the writing of that.
    """

    tensors: Mapping[str, LiveTensor]
    aliases: Mapping[str, str]
    plan_tensor: PlanTensor
    read_gradients: ReadGradients
    plan_gradients: PlanGradients


@attrs.frozen(kw_only=True, eq=False)
class ParameterGroup:
    """One parameter group of an optimizer.

    Attributes:
        options: the live dict of torch's `param_groups`: hyperparameters and the position in the accumulation window.
            Its "params", whatever they are, are neither saved nor changed; all else is.
        parameters: names of the parameters, as in `ModelState.tensors`.
    """

    options: dict[str, object]
    parameters: Sequence[str]


@attrs.frozen(kw_only=True, eq=False)
class ParameterState:
    """What an optimizer keeps of one parameter.

    Attributes:
        tensors: by the optimizer's keys (`step`, `exp_avg`, `exp_avg_sq`).
        values: what is no tensor, by its key.
    """

    tensors: Mapping[str, LiveTensor]
    values: Mapping[str, object]


class PlanParameterState(Protocol):
    """Prepares the writing of what an optimizer keeps of one parameter."""

    def __call__(
        self, name: str, saved: Mapping[str, object] | None, *, options: Mapping[str, object], source: str
    ) -> Callable[[], None]:
        """Return an action that makes this the state of the parameter; for the action, see `PlanTensor`.

        The optimizer may have no state yet, which is allocated and read here, where it changes nothing and is no second
        copy of anything; the action makes it the optimizer's. State under other keys goes.

        Args:
            name: one of the `ParameterGroup.parameters`.
            saved: `StoredTensor`s, and values that are no tensors, by the optimizer's keys; None where the parameter
                has none.
            options: of its group, as they will be.
            source: what the state is called in errors.

        Raises:
            CheckpointError: the live optimizer cannot hold the state.
            OSError: the file cannot be read.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class OptimizerState:
    """What an optimizer keeps.

    Attributes:
        defaults: names of the options that it knows; `optimizer.defaults` where it is torch's own.
        groups: its parameter groups, in its order.
        parameters: state by the names of the parameters, the same names and keys in the same order on all ranks; one
            without state is not there.
        plan_parameter: prepares the writing of one parameter's state.
    """

    defaults: Collection[str]
    groups: Sequence[ParameterGroup]
    parameters: Mapping[str, ParameterState]
    plan_parameter: PlanParameterState


class GetModelState(Protocol):
    """Describes a model."""

    def __call__(self, model: nn.Module, *, owner: str) -> ModelState:
        """Return what the model consists of, without communication; nothing that a user sees is changed.

        Args:
            model: the prepared model, as the user has it.
            owner: what it is called in errors.

        Raises:
            UnsupportedError: it has state that cannot be saved.
        """
        ...


class GetOptimizerState(Protocol):
    """Describes an optimizer."""

    def __call__(self, model: nn.Module, optimizer: Optimizer, *, owner: str) -> OptimizerState:
        """Return what the optimizer keeps, without communication; nothing is changed.

        Args:
            model: its prepared model, as the user has it.
            optimizer: the prepared optimizer, as the user has it.
            owner: what the model is called in errors.

        Raises:
            ConfigError: it steps what is no parameter of the model, or holds what cannot be written.
            UnsupportedError: it has state that cannot be saved.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class StateAccess:
    """What checkpointing asks a backend.

    Attributes:
        unwrap_model: undoes `prepare`; the module inside brings its configuration and its class.
        model_state: describes a model.
        optimizer_state: describes an optimizer.
    """

    unwrap_model: UnwrapModel
    model_state: GetModelState
    optimizer_state: GetOptimizerState
