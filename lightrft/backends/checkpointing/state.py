"""The state of one entry, flat: tables of tensors by name, and the rest as JSON.

Optimizer tensors are called `<key>.<parameter name>` (`exp_avg.layers.0.weight`), so that they do not depend on the
order in which an optimizer was given its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import attrs
import torch
from torch.optim import Optimizer

from lightrft.backends.checkpointing.entries import Entry
from lightrft.backends.checkpointing.layout import gradients_file, model_file, optimizer_file, state_file
from lightrft.backends.checkpointing.lossless import dumps, encode_internal
from lightrft.backends.checkpointing.named import NamedState, named_state
from lightrft.backends.checkpointing.tensor_files import require_plain, safetensors_chunks
from lightrft.errors import ConfigError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["EntryState", "entry_files", "entry_state", "gradient_files", "groups_by_name", "options_of"]


@attrs.frozen(kw_only=True, eq=False)
class EntryState:
    """The state of one entry.

    Attributes:
        model: live tensors and tied names.
        optimizer: optimizer tensors as `<key>.<parameter name>`.
        record: the rest: tied names, groups and values of the optimizer, and the schedule.
    """

    model: NamedState
    optimizer: Mapping[str, torch.Tensor]
    record: dict[str, Json]


def entry_state(entry: Entry) -> EntryState:
    """Return the state of an entry; tensors are the live ones, and nothing is changed.

    Args:
        entry: a plain model with what trains it.

    Raises:
        ConfigError: the optimizer steps what is no parameter of the model, or holds what cannot be written.
        UnsupportedError: a tensor's bytes are not its values.
    """
    model = named_state(entry.model, owner=entry.name)
    tensors, optimizer = ({}, None) if entry.optimizer is None else _optimizer_state(entry, entry.optimizer, model)
    schedule = None if entry.scheduler is None else entry.scheduler.state_dict()
    record: dict[str, Json] = {
        "aliases": dict(model.aliases),
        "optimizer": optimizer,
        "scheduler": encode_internal(schedule, f"{entry.name}.scheduler"),
    }
    return EntryState(model=model, optimizer=tensors, record=record)


def entry_files(entry: Entry) -> Iterator[tuple[str, Iterator[memoryview | bytes]]]:
    """Yield the files of an entry, each with its content.

    Args:
        entry: a plain model with what trains it.
    """
    state = entry_state(entry)
    yield state_file(entry.name), iter([dumps(state.record)])
    yield model_file(entry.name), safetensors_chunks(state.model.tensors)
    if entry.optimizer is not None:
        yield optimizer_file(entry.name), safetensors_chunks(state.optimizer)


def gradient_files(entry: Entry, rank: int) -> Iterator[tuple[str, Iterator[memoryview | bytes]]]:
    """Yield the file of the gradients that this rank has accumulated, with its content, if it has any.

    Args:
        entry: a plain model with what trains it.
        rank: number of this process.
    """
    gradients = _gradients(named_state(entry.model, owner=entry.name), owner=entry.name)
    if gradients:
        yield gradients_file(entry.name, rank), safetensors_chunks(gradients)


def _gradients(model: NamedState, *, owner: str) -> dict[str, torch.Tensor]:
    gradients = {
        name: tensor.grad for name, tensor in model.tensors.items() if tensor.is_leaf and tensor.grad is not None
    }
    for name, gradient in gradients.items():
        require_plain(gradient, f"{owner}.{name}.grad")
    return gradients


def groups_by_name(
    optimizer: Optimizer, model: NamedState, *, owner: str
) -> list[tuple[dict[str, object], dict[str, torch.Tensor]]]:
    """Return every parameter group with its parameters by name.

    Args:
        optimizer: the optimizer.
        model: the tensors of its model.
        owner: what the model is called in errors.

    Raises:
        ConfigError: a parameter, or an entry of the optimizer's state, is none of the model's.
    """
    names = {id(tensor): name for name, tensor in model.tensors.items()}
    groups: list[tuple[dict[str, object], dict[str, torch.Tensor]]] = []
    for index, group in enumerate(cast("list[dict[str, object]]", optimizer.param_groups)):
        parameters = cast("list[torch.Tensor]", group["params"])
        if any(id(parameter) not in names for parameter in parameters):
            raise ConfigError(
                f"{owner}.optimizer.param_groups[{index}] holds a tensor that is no parameter of the model; "
                "pass each optimizer with its own model."
            )
        groups.append((group, {names[id(parameter)]: parameter for parameter in parameters}))
    stepped = {id(parameter) for _, parameters in groups for parameter in parameters.values()}
    if any(id(key) not in stepped for key in optimizer.state):
        raise ConfigError(f"{owner}.optimizer.state has an entry that belongs to no parameter; remove it.")
    return groups


def options_of(group: Mapping[str, object]) -> dict[str, object]:
    """Return a parameter group without its parameters: hyperparameters, and the position in the accumulation window.

    Args:
        group: one of `optimizer.param_groups`.
    """
    return {key: value for key, value in group.items() if key != "params"}


def _optimizer_state(
    entry: Entry, optimizer: Optimizer, model: NamedState
) -> tuple[dict[str, torch.Tensor], dict[str, Json]]:
    tensors: dict[str, torch.Tensor] = {}
    groups: list[Json] = []
    states: dict[str, Json] = {}
    for index, (group, parameters) in enumerate(groups_by_name(optimizer, model, owner=entry.name)):
        path = f"{entry.name}.optimizer.param_groups[{index}]"
        groups.append({"parameters": list(parameters), "options": encode_internal(options_of(group), path)})
        for name, parameter in parameters.items():
            if parameter in optimizer.state:  # asked first, since reading would make an entry
                state = cast("dict[object, object]", optimizer.state[parameter])
                found, states[name] = _parameter_state(state, name, owner=entry.name)
                tensors.update(found)
    defaults: list[Json] = [*sorted(str(key) for key in optimizer.defaults)]
    return tensors, {"defaults": defaults, "groups": groups, "state": states}


def _parameter_state(
    state: Mapping[object, object], name: str, *, owner: str
) -> tuple[dict[str, torch.Tensor], dict[str, Json]]:
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Json] = {}
    keys: list[Json] = []
    for key, value in state.items():
        path = f"{owner}.optimizer.state[{name!r}][{key!r}]"
        if not isinstance(key, str) or "." in key:
            raise ConfigError(f"{path} has a key that is no identifier; use str keys without dots.")
        if isinstance(value, torch.Tensor):
            require_plain(value, path)
            tensors[f"{key}.{name}"] = value
            keys.append(key)
        else:
            values[key] = encode_internal(value, path)
    return tensors, {"tensors": keys, "values": values}
