"""`save_ckpt`: what is saved is checked and described, then written."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.access import LiveTensor, StateAccess
from lightrft.backends.checkpointing.entries import Entry, entries_of, handles_of
from lightrft.backends.checkpointing.gathering import agreed_tables
from lightrft.backends.checkpointing.layout import CLIENT_STATE, checkpoint_path, random_file
from lightrft.backends.checkpointing.lossless import dumps, encode_client_state
from lightrft.backends.checkpointing.randomness import capture_streams
from lightrft.backends.checkpointing.retention import Retention
from lightrft.backends.checkpointing.snapshot import Snapshot, snapshot_of
from lightrft.backends.checkpointing.state import EntryState, entry_state
from lightrft.backends.checkpointing.writing import (
    CheckpointContent,
    Destination,
    Place,
    remove_surplus,
    reserve,
    write_checkpoint,
)
from lightrft.backends.copying import mark_copied
from lightrft.backends.world import world_of
from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.protocols.checkpointing import BackgroundSaves, Checkpointable, Json, SaveCkpt
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["build_save_ckpt"]


def build_save_ckpt(collectives: Collectives, access: StateAccess, *, strategy: str | None = None) -> SaveCkpt:
    """Return `save_ckpt` over the given ranks.

    Args:
        collectives: what the ranks do together.
        access: what a backend knows of live tensors.
        strategy: its key, for the manifest.
    """

    def save_ckpt(
        model: Checkpointable,
        save_dir: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int | None = None,
        client_state: Mapping[str, Json] | None = None,
        max_num: int | None = None,
        max_mem: float | None = None,
        keep_every: int = 0,
        keep_best: int = 0,
        metric: float | None = None,
        background: BackgroundSaves | None = None,
    ) -> Path:
        _require_whole("step", step, at_least=0)
        _require_whole("max_num", max_num, at_least=1)
        _require_whole("keep_every", keep_every, at_least=0)
        _require_whole("keep_best", keep_best, at_least=0)
        _require_real("max_mem", max_mem, at_least=0)
        _require_real("metric", metric)
        destination = Destination(
            directory=Path(save_dir),
            step=step,
            metric=None if metric is None else float(metric),
            retention=Retention(max_num=max_num, max_mem=max_mem, keep_every=keep_every, keep_best=keep_best),
            strategy=strategy,
        )
        entries = entries_of(model, optimizer, scheduler)
        encoded = dumps(encode_client_state({} if client_state is None else client_state))
        if background is not None:
            background.wait()
        world = world_of(collectives)
        content = _content(entries, encoded, collectives, access, world)
        if background is None:
            return _save(content, destination, collectives, world)
        handles = handles_of(entries, access.unwrap_model)
        step = _save_in_background(background, content, destination, collectives, world, handles)
        return checkpoint_path(destination.directory, step)

    return save_ckpt


def _save(content: CheckpointContent, destination: Destination, collectives: Collectives, world: World) -> Path:
    with ExitStack() as stack:
        place = reserve(destination, collectives, world, stack)
        write_checkpoint(content, destination, place, collectives, world)
    remove_surplus(destination, place, collectives, world)
    return place.target


def _save_in_background(
    background: BackgroundSaves,
    content: CheckpointContent,
    destination: Destination,
    collectives: Collectives,
    world: World,
    handles: Iterable[nn.Module | Optimizer],
) -> int:
    """Return the step of what is copied, and then written, in the background; what changes the handles waits."""
    snapshots: list[Snapshot] = []
    # a process may go elsewhere meanwhile
    there = attrs.evolve(destination, directory=destination.directory.absolute())

    def describe() -> None:
        snapshots.append(snapshot_of(content, world))

    with ExitStack() as stack:
        place = reserve(there, collectives, world, stack, prepare=describe)
        _begin(background, snapshots[0], there, place, world, handles, stack)
        return place.step


def _begin(
    background: BackgroundSaves,
    snapshot: Snapshot,
    destination: Destination,
    place: Place,
    world: World,
    handles: Iterable[nn.Module | Optimizer],
    stack: ExitStack,
) -> None:
    """Begin to copy, and then to write; the thread closes the stack when that is done."""
    copied, held = threading.Event(), stack.pop_all()

    def copy() -> None:
        try:
            snapshot.copy()
        finally:
            copied.set()

    def save() -> None:
        try:
            with held:
                write_checkpoint(snapshot.content, destination, place, background.collectives, world, prepare=copy)
        except Exception as error:
            raise CheckpointError(f"saving step={place.step} in the background: {error}") from error
        remove_surplus(destination, place, background.collectives, world)

    try:
        mark_copied(handles, copied)
        background.start(save)
    except BaseException:
        copied.set()
        held.close()
        raise


def _content(
    entries: Sequence[Entry], client_state: bytes, collectives: Collectives, access: StateAccess, world: World
) -> CheckpointContent:
    """Return what a checkpoint holds, its tensors live ones that are not read yet."""
    states: list[EntryState] = []
    encoded: dict[str, bytes] = {}

    def describe_live() -> dict[str, Mapping[str, LiveTensor]]:
        states.extend(entry_state(entry, access, rank=world.rank) for entry in entries)
        encoded.update({state.record_file: dumps(state.record) for state in states})
        streams: dict[str, Json] = {"rank": world.rank, "world_size": world.world_size, **capture_streams()}
        encoded[random_file(world.rank)] = dumps(streams)
        return {file: table for state in states for file, table in state.tables.items()}

    agreed = agreed_tables(collectives, world, describe_live)
    own = random_file(world.rank)
    return CheckpointContent(
        agreed=agreed,
        shared={CLIENT_STATE: client_state, **{file: written for file, written in encoded.items() if file != own}},
        own={own: encoded[own]},
        gradients={file: gradients for state in states for file, gradients in state.gradients.items()},
    )


def _require_whole(setting: str, value: int | None, *, at_least: int) -> None:
    if value is not None and (type(value) is not int or value < at_least):
        raise ConfigError(f"{setting}={value!r} is not a whole number of at least {at_least}; use one, or None.")


def _require_real(setting: str, value: float | None, *, at_least: float = -math.inf) -> None:
    largest = sys.float_info.max
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_real and -largest <= value <= largest and value >= at_least):
        wanted = "a finite number" if at_least == -math.inf else f"a finite number of at least {at_least}"
        raise ConfigError(f"{setting}={value!r} is not {wanted}; use one, or None.")
