"""Restoring one entry: all is read, checked and built first, and applied when nothing can be refused any more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.entries import Entry
from lightrft.backends.checkpointing.layout import gradients_file, model_file, optimizer_file, state_file
from lightrft.backends.checkpointing.lossless import as_dict, decode, loads
from lightrft.backends.checkpointing.named import NamedState, describe, difference, named_state
from lightrft.backends.checkpointing.state import groups_by_name, options_of
from lightrft.backends.checkpointing.tensor_files import read_tensors
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["RestorePlan", "apply_plans", "copy_plan", "plan_entry"]


@attrs.frozen(kw_only=True, eq=False)
class RestorePlan:
    """What will be applied to one entry, checked and in memory.

    Attributes:
        schedule: restores the schedule, which alone may still fail.
        undo_schedule: puts the schedule back as it was.
        tensors: restores parameters, buffers, gradients and the optimizer; no step of it allocates or checks.
    """

    schedule: Callable[[], None]
    undo_schedule: Callable[[], None]
    tensors: Sequence[Callable[[], None]]


def plan_entry(entry: Entry, directory: Path, files: Mapping[str, object], *, rank: int) -> RestorePlan:
    """Return what restoring the entry will do; the live state is only read.

    Args:
        entry: the live model with what trains it.
        directory: a verified checkpoint.
        files: its files by name.
        rank: number of this process, whose share of the gradients is restored.

    Raises:
        CheckpointError: names, shapes, dtypes or ties differ; the message names them and the file.
    """
    record_path = directory / state_file(entry.name)
    record = as_dict(loads(record_path.read_bytes(), source=str(record_path)), source=str(record_path))
    model = named_state(entry.model, owner=entry.name)
    _require_equal(
        record_path, "tied names", saved=as_dict(record.get("aliases"), source=str(record_path)), live=model.aliases
    )
    model_path = directory / model_file(entry.name)
    saved = read_tensors(model_path)
    _require_equal(model_path, "parameters and buffers", saved=describe(saved), live=describe(model.tensors))
    restore = [copy_plan(live, saved[name], f"{model_path}: {name}") for name, live in model.tensors.items()]
    restore += _plan_gradients(model, directory / gradients_file(entry.name, rank), files)
    restore += _plan_optimizer(entry, model, record, directory)
    return _plan_schedule(entry, record.get("scheduler"), record_path, restore)


def apply_plans(plans: Sequence[RestorePlan], *, source: Path) -> None:
    """Apply all plans, or none.

    Args:
        plans: one for each entry.
        source: the checkpoint, for the error.

    Raises:
        CheckpointError: a schedule refuses its state; everything is as it was.
    """
    done: list[RestorePlan] = []
    for plan in plans:
        done.append(plan)
        try:
            plan.schedule()
        except Exception as error:
            for earlier in done:
                with suppress(Exception):  # a schedule that refuses its own state has nothing better to be put back to
                    earlier.undo_schedule()
            raise CheckpointError(
                f"{source} holds a state that the schedule refuses ({error!r}); use the same schedule."
            ) from error
    with torch.no_grad():
        for plan in plans:
            for action in plan.tensors:
                action()


def copy_plan(live: torch.Tensor, saved: torch.Tensor, what: str) -> Callable[[], None]:
    """Return a function that copies a saved tensor into a live one of its shape and dtype, which keeps its identity.

    Args:
        live: where to.
        saved: where from.
        what: what is copied, for the error.

    Raises:
        CheckpointError: the live tensor's elements share memory, and the saved ones differ.
    """
    target, source = live.detach(), saved
    for dim, stride in enumerate(live.stride()):
        if stride == 0 and live.shape[dim] > 1:  # an expanded tensor can't be written as a whole
            source = source.narrow(dim, 0, 1)
            target = target.narrow(dim, 0, 1)
    if source.shape != saved.shape and not torch.equal(_bits(source.expand_as(saved)), _bits(saved)):
        raise CheckpointError(f"{what} is an expanded tensor here and was none there; clone it before loading.")

    def copy_into() -> None:
        target.copy_(source)

    return copy_into


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _plan_gradients(model: NamedState, path: Path, files: Mapping[str, object]) -> list[Callable[[], None]]:
    saved = read_tensors(path) if path.name in files else {}
    live = {name: model.tensors[name] for name in saved if name in model.tensors}
    _require_equal(path, "gradients", saved=describe(saved), live=describe(live))
    return [
        _set_gradient(tensor, _like(saved[name], tensor) if name in saved else None)
        for name, tensor in model.tensors.items()
        if tensor.is_leaf
    ]


def _set_gradient(tensor: torch.Tensor, gradient: torch.Tensor | None) -> Callable[[], None]:
    def set_gradient() -> None:
        tensor.grad = gradient

    return set_gradient


def _plan_optimizer(
    entry: Entry, model: NamedState, record: Mapping[str, Json], directory: Path
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
    fields = as_dict(saved, source=str(record_path))
    _require_defaults(cast("list[str]", fields["defaults"]), entry.optimizer, record_path)
    live_groups = groups_by_name(entry.optimizer, model, owner=entry.name)
    saved_groups = cast("list[dict[str, Json]]", fields["groups"])
    _require_groups(saved_groups, live_groups, record_path)
    states = cast("dict[str, dict[str, Json]]", fields["state"])
    tensors = read_tensors(path)
    expected = {
        f"{key}.{name}": "tensor" for name, state in states.items() for key in cast("list[str]", state["tensors"])
    }
    _require_equal(path, "optimizer state", saved=dict.fromkeys(tensors, "tensor"), live=expected)
    actions: list[Callable[[], None]] = []
    for (group, parameters), saved_group in zip(live_groups, saved_groups, strict=True):
        options = cast("dict[str, object]", decode(saved_group["options"]))
        actions.append(_set_options(group, options, entry.optimizer))
        for name, parameter in parameters.items():
            state = _parameter_state(name, parameter, states.get(name), tensors, options)
            actions.append(_set_state(entry.optimizer, parameter, state))
    return actions


def _parameter_state(
    name: str,
    parameter: torch.Tensor,
    saved: Mapping[str, Json] | None,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, object],
) -> dict[str, object] | None:
    if saved is None:
        return None
    state: dict[str, object] = {}
    for key in cast("list[str]", saved["tensors"]):
        tensor = tensors[f"{key}.{name}"]
        # torch keeps step counters on the host, unless its kernels read them (as its own `load_state_dict` has it)
        on_host = key == "step" and not options.get("fused") and not options.get("capturable")
        state[key] = tensor.clone() if on_host else _like(tensor, parameter)
    values = as_dict(saved["values"], source=name)
    return {**state, **{key: decode(value) for key, value in values.items()}}


def _like(saved: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy on the parameter's device, in the parameter's memory order where the shapes agree."""
    if saved.shape != parameter.shape:
        return saved.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False).copy_(saved)


def _set_options(group: dict[str, object], options: Mapping[str, object], optimizer: Optimizer) -> Callable[[], None]:
    # an option that a newer torch brought keeps its default; what else was not saved belongs to the state that goes
    kept = {key: value for key, value in options_of(group).items() if key in optimizer.defaults and key not in options}

    def set_options() -> None:
        parameters = group["params"]
        group.clear()
        group.update({"params": parameters, **options, **kept})

    return set_options


def _set_state(optimizer: Optimizer, parameter: torch.Tensor, state: dict[str, object] | None) -> Callable[[], None]:
    def set_state() -> None:
        if state is None:
            optimizer.state.pop(parameter, None)
        else:
            optimizer.state[parameter] = state

    return set_state


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


def _require_defaults(saved: Sequence[str], optimizer: Optimizer, path: Path) -> None:
    unknown = [key for key in saved if key not in optimizer.defaults]
    if unknown:
        raise CheckpointError(
            f"{path} is of an optimizer with {', '.join(unknown)}, which {type(optimizer).__name__} lacks; "
            "use the same optimizer."
        )


def _require_groups(
    saved: Sequence[Mapping[str, Json]], live: Sequence[tuple[Mapping[str, object], Mapping[str, object]]], path: Path
) -> None:
    groups = {
        "saved": {
            name: f"group {index}"
            for index, group in enumerate(saved)
            for name in cast("list[str]", group["parameters"])
        },
        "live": {name: f"group {index}" for index, (_, names) in enumerate(live) for name in names},
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
