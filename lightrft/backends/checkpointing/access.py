"""What checkpointing asks a backend about live tensors: a table of where their parts are, and plans that write them.

The tensors of a model may lie whole on every rank, or in parts on all of them. What is on disk are whole tensors under
the names of the plain model; a backend says what there is and what this rank has of it, without communication, and
turns a whole tensor into an action that writes this rank's part of it.
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
    "ReadTensor",
    "StateAccess",
    "WholeTensor",
]


class ReadTensor(Protocol):
    """Reads one whole tensor."""

    def __call__(self) -> torch.Tensor:
        """Return the whole tensor, with its values; nobody writes to it, and it is not kept."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class WholeTensor:
    """A tensor that is read as a whole when it is asked for, from a file say.

    Attributes:
        shape: of the tensor.
        dtype: of its elements.
        read: reads its values.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    read: ReadTensor


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
    """

    shape: Sequence[int]
    dtype: torch.dtype
    part: ReadPart
    is_whole: bool
    is_buffer: bool = False


class PlanTensor(Protocol):
    """Prepares the writing of one tensor of a model."""

    def __call__(self, name: str, saved: torch.Tensor, *, source: str) -> Callable[[], None]:
        """Return an action that writes this rank's part of the saved tensor; nothing is changed yet.

        The action keeps no more than this rank's part, checks nothing and cannot fail. It runs on all ranks in one
        order, after every rank has said that it has nothing to refuse.

        Args:
            name: one of `ModelState.tensors`.
            saved: the whole tensor, of the shape and dtype that stand there.
            source: what the tensor is called in errors.

        Raises:
            CheckpointError: the live tensor cannot hold the values.
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

    def __call__(self, saved: Mapping[str, torch.Tensor], *, source: str) -> Callable[[], None]:
        """Return an action that makes these the gradients of the open window; all others are dropped.

        For the action, see `PlanTensor`.

        Args:
            saved: what `ReadGradients` returned; empty where the checkpoint was saved between two windows.
            source: what the tensors are called in errors.

        Raises:
            CheckpointError: names, shapes or dtypes are not those of this rank's gradients.
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

        The optimizer may have no state yet, or state under other keys, which goes.

        Args:
            name: one of the `ParameterGroup.parameters`.
            saved: whole tensors, and values that are none, by the optimizer's keys; None where the parameter has none.
            options: of its group, as they will be.
            source: what the state is called in errors.

        Raises:
            CheckpointError: the live optimizer cannot hold the state.
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
