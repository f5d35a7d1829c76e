"""What is saved of one entry: tables of tensors by file, and the rest as JSON.

Optimizer tensors are called `<key>.<parameter name>` (`exp_avg.layers.0.weight`), so that they do not depend on the
order in which an optimizer was given its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import attrs
import torch

from lightrft.backends.checkpointing.access import LiveTensor, OptimizerState, ParameterState, StateAccess
from lightrft.backends.checkpointing.entries import Entry
from lightrft.backends.checkpointing.layout import gradients_file, model_file, optimizer_file, state_file
from lightrft.backends.checkpointing.lossless import encode_internal
from lightrft.errors import ConfigError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["EntryState", "entry_state", "optimizer_record", "optimizer_tensors", "options_of"]


@attrs.frozen(kw_only=True, eq=False)
class EntryState:
    """What is saved of one entry; tensors are the live ones, and none has been read.

    Attributes:
        tables: tensors of the files that rank 0 writes, by the file's name and theirs.
        gradients: this rank's own, by the file's name and theirs; empty between two windows.
        record_file: the file of `record`.
        record: the rest: tied names, groups and values of the optimizer, and the schedule.
    """

    tables: Mapping[str, Mapping[str, LiveTensor]]
    gradients: Mapping[str, Mapping[str, torch.Tensor]]
    record_file: str
    record: dict[str, Json]


def entry_state(entry: Entry, access: StateAccess, *, rank: int) -> EntryState:
    """Return what is saved of an entry; nothing is communicated or changed.

    Args:
        entry: a model with what trains it.
        access: the backend's.
        rank: number of this process.

    Raises:
        ConfigError: the optimizer steps what is no parameter of the model, or holds what cannot be written.
        UnsupportedError: a tensor's bytes are not its values.
        CheckpointError: the model has gradients that cannot be saved now.
    """
    model = access.model_state(entry.model, owner=entry.name)
    gradients = model.read_gradients()
    tables: dict[str, Mapping[str, LiveTensor]] = {model_file(entry.name): model.tensors}
    optimizer: Json = None
    if entry.optimizer is not None:
        state = access.optimizer_state(entry.model, entry.optimizer, owner=entry.name)
        tables[optimizer_file(entry.name)] = optimizer_tensors(state, entry.name)
        optimizer = optimizer_record(state, entry.name)
    schedule = None if entry.scheduler is None else entry.scheduler.state_dict()
    return EntryState(
        tables=tables,
        gradients={gradients_file(entry.name, rank): gradients} if gradients else {},
        record_file=state_file(entry.name),
        record={
            "aliases": dict(model.aliases),
            "optimizer": optimizer,
            "scheduler": encode_internal(schedule, f"{entry.name}.scheduler"),
        },
    )


def options_of(group: Mapping[str, object]) -> dict[str, object]:
    """Return a parameter group without its parameters: hyperparameters, and the position in the accumulation window.

    Args:
        group: one of `optimizer.param_groups`.
    """
    return {key: value for key, value in group.items() if key != "params"}


def optimizer_tensors(state: OptimizerState, owner: str) -> dict[str, LiveTensor]:
    """Return the tensors that an optimizer keeps, by their names in the file.

    Args:
        state: what it keeps.
        owner: what its model is called.

    Raises:
        ConfigError: a key of its state is no identifier.
    """
    tensors: dict[str, LiveTensor] = {}
    for name, parameter in state.parameters.items():
        for key in (*parameter.tensors, *parameter.values):
            if not isinstance(cast("object", key), str) or "." in key:
                path = f"{owner}.optimizer.state[{name!r}][{key!r}]"
                raise ConfigError(f"{path} has a key that is no identifier; use str keys without dots.")
        tensors |= {f"{key}.{name}": tensor for key, tensor in parameter.tensors.items()}
    return tensors


def optimizer_record(state: OptimizerState, owner: str) -> dict[str, Json]:
    """Return what an optimizer keeps beside tensors: groups, options and values.

    Args:
        state: what it keeps.
        owner: what its model is called.

    Raises:
        ConfigError: it holds what JSON cannot hold.
    """
    groups: list[Json] = []
    for index, group in enumerate(state.groups):
        options = encode_internal(options_of(group.options), f"{owner}.optimizer.param_groups[{index}]")
        groups.append({"parameters": list(group.parameters), "options": options})
    states: dict[str, Json] = {
        name: _parameter_record(parameter, f"{owner}.optimizer.state[{name!r}]")
        for name, parameter in state.parameters.items()
    }
    return {"defaults": [*sorted(str(key) for key in state.defaults)], "groups": groups, "state": states}


def _parameter_record(parameter: ParameterState, path: str) -> dict[str, Json]:
    values: dict[str, Json] = {
        key: encode_internal(value, f"{path}[{key!r}]") for key, value in parameter.values.items()
    }
    return {"tensors": list(parameter.tensors), "values": values}
