"""Restoring one entry: all is checked first, and read to its place when nothing can be refused any more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import attrs
import torch
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.access import (
    ModelState,
    OptimizerState,
    ParameterGroup,
    StateAccess,
    StoredTensor,
)
from lightrft.backends.checkpointing.entries import Entry
from lightrft.backends.checkpointing.layout import gradients_file, model_file, optimizer_file, state_file
from lightrft.backends.checkpointing.lossless import as_dict, decode, loads
from lightrft.backends.checkpointing.named import describe, difference
from lightrft.backends.checkpointing.state import options_of
from lightrft.backends.checkpointing.stored import open_tensors
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["RestorePlan", "load_schedules", "plan_entry", "undo_schedules", "write_tensors"]


@attrs.frozen(kw_only=True, eq=False)
class RestorePlan:
    """What will be applied to one entry, checked.

    Attributes:
        schedule: restores the schedule, which alone may still be refused.
        undo_schedule: puts the schedule back as it was.
        tensors: restores parameters, buffers, gradients and the optimizer. What is live is read from its file tensor by
            tensor, and state that was not there yet has been read; no step refuses, and one fails only where a file
            can no longer be read.
    """

    schedule: Callable[[], None]
    undo_schedule: Callable[[], None]
    tensors: Sequence[Callable[[], None]]


def plan_entry(
    entry: Entry, access: StateAccess, directory: Path, files: Mapping[str, object], *, rank: int, opened: ExitStack
) -> RestorePlan:
    """Return what restoring the entry will do; the live state is only read.

    Args:
        entry: the live model with what trains it.
        access: the backend's.
        directory: the checkpoint.
        files: its files by name.
        rank: number of this process, whose share of the gradients is restored.
        opened: keeps the files open until the plan was applied.

    Raises:
        CheckpointError: names, shapes, dtypes or ties differ; the message names them and the file.
        OSError: a file cannot be read.
    """
    record_path = directory / state_file(entry.name)
    record = as_dict(loads(record_path.read_bytes(), source=str(record_path)), source=str(record_path))
    model = access.model_state(entry.model, owner=entry.name)
    _require_equal(
        record_path, "tied names", saved=as_dict(record.get("aliases"), source=str(record_path)), live=model.aliases
    )
    model_path = directory / model_file(entry.name)
    saved = opened.enter_context(open_tensors(model_path))
    _require_equal(model_path, "parameters and buffers", saved=describe(saved), live=describe(model.tensors))
    restore = [model.plan_tensor(name, saved[name], source=f"{model_path}: {name}") for name in model.tensors]
    restore.append(_plan_gradients(model, directory / gradients_file(entry.name, rank), files, opened))
    restore += _plan_optimizer(entry, access, record, directory, opened)
    return _plan_schedule(entry, record.get("scheduler"), record_path, restore)


def load_schedules(plans: Sequence[RestorePlan], *, source: Path) -> None:
    """Restore all schedules, the only ones that may still refuse.

    Args:
        plans: one for each entry.
        source: the checkpoint, for the error.

    Raises:
        CheckpointError: a schedule refuses its state; call `undo_schedules`.
    """
    for plan in plans:
        try:
            plan.schedule()
        except Exception as error:
            raise CheckpointError(
                f"{source} holds a state that the schedule refuses ({error!r}); use the same schedule."
            ) from error


def undo_schedules(plans: Sequence[RestorePlan]) -> None:
    """Put all schedules back as they were.

    Args:
        plans: one for each entry.
    """
    for plan in plans:
        with suppress(Exception):  # a schedule that refuses its own state has nothing better to be put back to
            plan.undo_schedule()


@torch.no_grad()
def write_tensors(plans: Sequence[RestorePlan]) -> None:
    """Restore parameters, buffers, gradients and optimizers.

    Args:
        plans: one for each entry.

    Raises:
        OSError: a file cannot be read any more; the live state is neither the old one nor the saved one.
    """
    for plan in plans:
        for action in plan.tensors:
            action()


def _plan_gradients(
    model: ModelState, path: Path, files: Mapping[str, object], opened: ExitStack
) -> Callable[[], None]:
    saved = opened.enter_context(open_tensors(path)) if path.name in files else {}
    return model.plan_gradients(saved, source=str(path))


def _plan_optimizer(
    entry: Entry, access: StateAccess, record: Mapping[str, Json], directory: Path, opened: ExitStack
) -> list[Callable[[], None]]:
    record_path, path = directory / state_file(entry.name), directory / optimizer_file(entry.name)
    saved = record.get("optimizer")
    if (saved is None) != (entry.optimizer is None):
        raise CheckpointError(
            f"{record_path} has {'no' if saved is None else 'an'} optimizer and the call has "
            f"{'one' if saved is None else 'none'}; pass what was saved."
        )
    if saved is None or entry.optimizer is None:
        return []
    live = access.optimizer_state(entry.model, entry.optimizer, owner=entry.name)
    fields = as_dict(saved, source=str(record_path))
    _require_defaults(cast("list[str]", fields["defaults"]), live, type(entry.optimizer).__name__, record_path)
    saved_groups = cast("list[dict[str, Json]]", fields["groups"])
    _require_groups(saved_groups, live.groups, record_path)
    states = cast("dict[str, dict[str, Json]]", fields["state"])
    tensors = opened.enter_context(open_tensors(path))
    expected = {
        f"{key}.{name}": "tensor" for name, state in states.items() for key in cast("list[str]", state["tensors"])
    }
    _require_equal(path, "optimizer state", saved=dict.fromkeys(tensors, "tensor"), live=expected)
    actions: list[Callable[[], None]] = []
    for group, saved_group in zip(live.groups, saved_groups, strict=True):
        options = cast("dict[str, object]", decode(saved_group["options"]))
        actions.append(_set_options(group, options, live))
        for name in group.parameters:
            state = _saved_state(name, states.get(name), tensors)
            actions.append(live.plan_parameter(name, state, options=options, source=f"{path}: {name}"))
    return actions


def _saved_state(
    name: str, saved: Mapping[str, Json] | None, tensors: Mapping[str, StoredTensor]
) -> dict[str, object] | None:
    if saved is None:
        return None
    state: dict[str, object] = {key: tensors[f"{key}.{name}"] for key in cast("list[str]", saved["tensors"])}
    values = as_dict(saved["values"], source=name)
    return {**state, **{key: decode(value) for key, value in values.items()}}


def _set_options(group: ParameterGroup, options: Mapping[str, object], live: OptimizerState) -> Callable[[], None]:
    # an option that a newer torch brought keeps its default; what else was not saved belongs to the state that goes
    present = group.options
    kept = {key: value for key, value in options_of(present).items() if key in live.defaults and key not in options}

    def set_options() -> None:
        parameters = present["params"]
        present.clear()
        present.update({"params": parameters, **options, **kept})

    return set_options


def _plan_schedule(entry: Entry, saved: Json, path: Path, tensors: Sequence[Callable[[], None]]) -> RestorePlan:
    if (saved is None) != (entry.scheduler is None):
        raise CheckpointError(
            f"{path} has {'no' if saved is None else 'a'} schedule and the call has "
            f"{'one' if saved is None else 'none'}; pass what was saved."
        )
    if entry.scheduler is None:
        return RestorePlan(schedule=_nothing, undo_schedule=_nothing, tensors=tensors)
    state = cast("dict[str, object]", decode(saved))
    before = copy.deepcopy(cast("dict[str, object]", entry.scheduler.state_dict()))
    names = {name: dict.fromkeys(table, "value") for name, table in (("saved", state), ("live", before))}
    _require_equal(path, "the schedule", saved=names["saved"], live=names["live"])
    return RestorePlan(
        schedule=_load_schedule(entry.scheduler, state),
        undo_schedule=_load_schedule(entry.scheduler, before),
        tensors=tensors,
    )


def _load_schedule(scheduler: LRScheduler, state: dict[str, object]) -> Callable[[], None]:
    def load() -> None:
        scheduler.load_state_dict(state)

    return load


def _nothing() -> None:
    return


def _require_defaults(saved: Sequence[str], live: OptimizerState, kind: str, path: Path) -> None:
    unknown = [key for key in saved if key not in live.defaults]
    if unknown:
        raise CheckpointError(
            f"{path} is of an optimizer with {', '.join(unknown)}, which {kind} lacks; use the same optimizer."
        )


def _require_groups(saved: Sequence[Mapping[str, Json]], live: Sequence[ParameterGroup], path: Path) -> None:
    groups = {
        "saved": {
            name: f"group {index}"
            for index, group in enumerate(saved)
            for name in cast("list[str]", group["parameters"])
        },
        "live": {name: f"group {index}" for index, group in enumerate(live) for name in group.parameters},
    }
    _require_equal(path, "optimizer parameters", saved=groups["saved"], live=groups["live"])
    if len(saved) != len(live):
        raise CheckpointError(
            f"{path} has {len(saved)} parameter groups, and the optimizer has {len(live)}; make them alike."
        )


def _require_equal(path: Path, what: str, *, saved: Mapping[str, object], live: Mapping[str, object]) -> None:
    words = difference(saved=saved, live=live)
    if words is not None:
        raise CheckpointError(f"{path} ({what}) {words}; load into the model, optimizer and schedule that were saved.")
