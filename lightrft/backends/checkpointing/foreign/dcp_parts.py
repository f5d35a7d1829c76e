"""Which of the values of a `torch.distributed.checkpoint` are a model, and which its optimizer.

A program saves any nest of dictionaries: `{"model": ..., "optimizer": ...}`, `{"app": {"model": ..., "optim": ...}}`,
or a model alone. An optimizer is known by its "param_groups"; it may be nested, as `get_optimizer_state_dict` returns
it, or flat, as the same with `flatten_optimizer_state_dict`. What holds other tensors are models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from lightrft.backends.checkpointing.foreign.record import (
    ForeignModel,
    ForeignOptimizer,
    ForeignTensor,
    foreign_optimizer,
    foreign_parameter,
)
from lightrft.backends.checkpointing.foreign.torch_dcp import KeyPath, read_leaves
from lightrft.errors import CheckpointError, ConfigError

__all__ = ["read_dcp"]

_Value: TypeAlias = ForeignTensor | Callable[[], object]
_Values: TypeAlias = Mapping[KeyPath, _Value]

_GROUPS, _STATE = "param_groups", "state"


def read_dcp(directory: Path, *, name: str) -> ForeignModel:
    """Return a model of a directory of `torch.distributed.checkpoint`, with its optimizer if that is there by name.

    Args:
        directory: it has `.metadata`.
        name: which model, where there are several: the last of the keys that lead to it.

    Raises:
        ConfigError: there are several models, and none of this name.
        CheckpointError: there is no model, or the directory is damaged.
    """
    leaves = read_leaves(directory)
    values: dict[KeyPath, _Value] = {**leaves.tensors, **leaves.values}
    optimizers = _optimizers(values)
    taken = {path for optimizer in optimizers.values() for path in optimizer}
    models: dict[KeyPath, dict[str, ForeignTensor]] = defaultdict(dict)
    for path, tensor in leaves.tensors.items():
        if path not in taken:
            models[path[:-1]][str(path[-1])] = tensor
    chosen = _chosen(models, name, directory)
    own = {path: found for path, of in optimizers.items() if (found := _read_optimizer(path, of, models[chosen]))}
    notes = [
        *([] if len(own) == 1 else [_missing_optimizer(len(optimizers), len(own))]),
        *(f"left out: {_shown(path)}, {len(models[path])} tensors." for path in models if path != chosen),
        *(f"left out: {_shown(path)}, no tensor." for path in leaves.values if path not in taken),
    ]
    optimizer = next(iter(own.values())) if len(own) == 1 else None
    return ForeignModel(kind="torch-dcp", tensors=models[chosen], optimizer=optimizer, notes=notes)


def _optimizers(values: _Values) -> dict[KeyPath, dict[KeyPath, _Value]]:
    """Return the values of each optimizer, by what leads to it."""
    owners = {path[:place] for path in values for place, key in enumerate(path) if _is_of(_GROUPS, key)}
    return {
        owner: {
            path: value
            for path, value in values.items()
            if path[: len(owner)] == owner
            and any(_is_of(word, key) for word in (_GROUPS, _STATE) for key in path[len(owner) : len(owner) + 1])
        }
        for owner in sorted(owners, key=str)
    }


def _is_of(word: str, key: str | int) -> bool:
    return str(key).startswith(f"{word}.") or key == word


def _chosen(models: Mapping[KeyPath, object], name: str, directory: Path) -> KeyPath:
    if not models:
        raise CheckpointError(f"{directory} holds no tensors of a model; pass another directory.")
    if len(models) == 1:
        return next(iter(models))
    for wanted in (name, "model"):
        found = [path for path in models if path and path[-1] == wanted]
        if len(found) == 1:
            return found[0]
    known = ", ".join(_shown(path) for path in models)
    raise ConfigError(f"--model={name!r} is not in {directory}, which holds {known}; name one of them by its last key.")


def _shown(path: KeyPath) -> str:
    return ".".join(map(str, path)) or "what stands outermost"


def _missing_optimizer(num_found: int, num_own: int) -> str:
    if not num_found:
        return "missing: the optimizer."
    if not num_own:
        return "missing: the optimizer; its state is not by the names of the parameters (get_optimizer_state_dict)."
    return f"missing: the optimizer; {num_own} fit the model."


def _read_optimizer(owner: KeyPath, values: _Values, names: Collection[str]) -> ForeignOptimizer | None:
    """Return an optimizer, or None where it is not one of parameters of these names."""
    tails = {path[len(owner) :]: value for path, value in values.items()}
    groups = [
        (options, cast("list[str]", options.get("params") or []))
        for options in (_nested_groups(tails) or _flat_groups(tails))
    ]
    states: dict[str, dict[str, object]] = defaultdict(dict)
    for parameter, key, value in _states(tails):
        states[parameter][key] = _in_memory(value) if _is_small(value) else value
    options_of = {parameter: options for options, parameters in groups for parameter in parameters}
    if not options_of or not {*options_of, *states} <= {*names} or not states.keys() <= options_of.keys():
        return None
    return foreign_optimizer(
        groups, {parameter: foreign_parameter(state, options_of[parameter]) for parameter, state in states.items()}
    )


def _states(tails: _Values) -> Iterator[tuple[str, str, _Value]]:
    for tail, value in tails.items():
        if tail[0] == _STATE and len(tail) == 3:
            yield str(tail[1]), str(tail[2]), value
        elif tail[0] != _STATE and _is_of(_STATE, tail[0]):
            name, _, key = str(tail[0]).removeprefix(f"{_STATE}.").rpartition(".")
            yield name, key, value


def _nested_groups(tails: _Values) -> list[dict[str, object]]:
    groups: dict[int, dict[str, object]] = defaultdict(dict)
    for tail, value in tails.items():
        if tail[0] == _GROUPS and len(tail) == 3:
            groups[int(tail[1])][str(tail[2])] = _in_memory(value)
    return [groups[number] for number in sorted(groups)]


def _flat_groups(tails: _Values) -> list[dict[str, object]]:
    """Return the groups of parameters with equal options, which is all that a flat form tells."""
    options: dict[str, dict[str, object]] = defaultdict(dict)
    for tail, value in tails.items():
        if tail[0] != _GROUPS and _is_of(_GROUPS, tail[0]):
            name, _, key = str(tail[0]).removeprefix(f"{_GROUPS}.").rpartition(".")
            options[name][key] = _in_memory(value)
    groups: list[dict[str, object]] = []
    for name, of_name in options.items():
        equal = next((group for group in groups if {**group, "params": None} == {**of_name, "params": None}), None)
        if equal is None:
            groups.append({**of_name, "params": [name]})
        else:
            cast("list[str]", equal["params"]).append(name)
    return groups


def _is_small(value: _Value) -> bool:
    return not isinstance(value, ForeignTensor) or not value.shape


def _in_memory(value: _Value) -> object:
    return value.read() if isinstance(value, ForeignTensor) else value()
