"""What is saved and restored under one name: a model with what trains it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import attrs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.layout import require_entry_names
from lightrft.errors import ConfigError
from lightrft.strategy.protocols.checkpointing import Checkpointable
from lightrft.strategy.protocols.training import Trainable, UnwrapModel

__all__ = ["Entry", "entries_of", "handles_of"]

_ONLY = "model"  # the name of what was passed without one


@attrs.frozen(kw_only=True, eq=False)
class Entry:
    """A model with what trains it.

    Attributes:
        name: what the files are called.
        model: the model as the user has it, plain or prepared.
        optimizer: its optimizer, or None.
        scheduler: its schedule, or None.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer | None
    scheduler: LRScheduler | None


def entries_of(model: Checkpointable, optimizer: Optimizer | None, scheduler: LRScheduler | None) -> list[Entry]:
    """Return what is to be saved or restored, by name.

    Args:
        model: one model, one `Trainable`, or several by name.
        optimizer: optimizer of a plain model.
        scheduler: schedule of a plain model.

    Raises:
        ConfigError: an optimizer or schedule beside what brings its own, no model at all, or a name that is none.
    """
    if isinstance(model, nn.Module):
        model = {_ONLY: model if optimizer is None else Trainable(model, optimizer, scheduler)}
        if optimizer is None and scheduler is not None:
            raise ConfigError("scheduler is given without its optimizer; pass optimizer= too.")
    elif optimizer is not None or scheduler is not None:
        raise ConfigError(
            "optimizer and scheduler belong to a plain model; a Trainable brings its own, leave them out."
        )
    named = {_ONLY: model} if isinstance(model, Trainable) else model
    if not isinstance(cast("object", named), Mapping) or not named:
        raise ConfigError(f"model={model!r} is no model; pass a Module, a Trainable, or a mapping of names to these.")
    require_entry_names(named)
    return [_entry(name, value) for name, value in named.items()]


def handles_of(entries: Iterable[Entry], unwrap_model: UnwrapModel) -> Iterator[nn.Module | Optimizer]:
    """Yield the handles whose state is saved or restored, a model as the user has it and the plain one inside.

    Args:
        entries: models with what trains them.
        unwrap_model: undoes `prepare`.
    """
    for entry in entries:
        yield entry.model
        yield unwrap_model(entry.model)
        if entry.optimizer is not None:
            yield entry.optimizer


def _entry(name: str, value: nn.Module | Trainable) -> Entry:
    if isinstance(value, Trainable):
        return Entry(name=name, model=value.model, optimizer=value.optimizer, scheduler=value.scheduler)
    if not isinstance(cast("object", value), nn.Module):
        raise ConfigError(f"model[{name!r}] is a {type(value).__name__}; pass a Module or a Trainable.")
    return Entry(name=name, model=value, optimizer=None, scheduler=None)
