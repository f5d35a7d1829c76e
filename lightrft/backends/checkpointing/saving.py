"""`save_ckpt`: ranks gather and rank 0 writes, all agree that files are durable, one rename makes the checkpoint."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.access import StateAccess, WholeTensor
from lightrft.backends.checkpointing.agreement import together
from lightrft.backends.checkpointing.durable import (
    FileRecord,
    commit,
    disk_errors,
    make_directory,
    remove_leftovers,
    staging,
    write_file,
)
from lightrft.backends.checkpointing.entries import Entry, entries_of
from lightrft.backends.checkpointing.gathering import agreed_tables, taking_turns
from lightrft.backends.checkpointing.layout import (
    CLIENT_STATE,
    MANIFEST,
    STEP_PATTERN,
    checkpoint_path,
    newest_step,
    random_file,
)
from lightrft.backends.checkpointing.lossless import as_dict, dumps, encode_client_state
from lightrft.backends.checkpointing.manifest import Manifest, render_manifest
from lightrft.backends.checkpointing.randomness import capture_streams
from lightrft.backends.checkpointing.retention import Retention, retain
from lightrft.backends.checkpointing.state import EntryState, entry_state
from lightrft.backends.checkpointing.tensor_files import safetensors_chunks
from lightrft.backends.world import world_of
from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.protocols.checkpointing import Checkpointable, Json, SaveCkpt
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["build_save_ckpt"]

_ADVICE = "free space or choose another directory; earlier checkpoints are as they were"


@attrs.frozen(kw_only=True, eq=False)
class _Request:
    """What one call saves, checked."""

    directory: Path
    entries: Sequence[Entry]
    client_state: dict[str, Json]
    step: int | None
    metric: float | None
    retention: Retention
    strategy: str | None


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
    ) -> Path:
        _require_whole("step", step, at_least=0)
        _require_whole("max_num", max_num, at_least=1)
        _require_whole("keep_every", keep_every, at_least=0)
        _require_whole("keep_best", keep_best, at_least=0)
        _require_real("max_mem", max_mem, at_least=0)
        _require_real("metric", metric)
        request = _Request(
            directory=Path(save_dir),
            entries=entries_of(model, optimizer, scheduler),
            client_state=encode_client_state({} if client_state is None else client_state),
            step=step,
            metric=None if metric is None else float(metric),
            retention=Retention(max_num=max_num, max_mem=max_mem, keep_every=keep_every, keep_best=keep_best),
            strategy=strategy,
        )
        return _save(request, world_of(collectives), collectives, access)

    return save_ckpt


def _save(request: _Request, world: World, collectives: Collectives, access: StateAccess) -> Path:
    is_first = world.rank == 0
    states: list[EntryState] = []

    def describe_live() -> dict[str, Mapping[str, WholeTensor]]:
        states.extend(entry_state(entry, access, rank=world.rank) for entry in request.entries)
        return {file: table for state in states for file, table in state.tables.items()}

    tables = agreed_tables(collectives, describe_live)
    with ExitStack() as stack:

        def begin() -> dict[str, Json]:
            return _begin(request, stack) if is_first else {}

        place = together(collectives, begin)[0]
        content, target, step = Path(str(place["content"])), Path(str(place["target"])), int(str(place["step"]))

        def write() -> dict[str, Json]:
            with (
                disk_errors("save_dir", request.directory, advice=_ADVICE),
                taking_turns(tables) as in_turn,
            ):
                records = _write_own(content, states, world)
                if is_first:
                    records |= _write_shared(request, content, states)
                    for file, table in tables.items():
                        records[file] = write_file(content / file, safetensors_chunks(table, in_turn=in_turn))
            return {file: attrs.asdict(record) for file, record in records.items()}

        written = together(collectives, write)

        def finish() -> dict[str, Json]:
            if is_first:
                manifest = Manifest(
                    step=step,
                    world_size=world.world_size,
                    metric=request.metric,
                    files=_merge(written),
                    strategy=request.strategy,
                )
                _finish(request, content, target, manifest)
            return {}

        together(collectives, finish)

    def remove_old() -> dict[str, Json]:
        if is_first:
            with disk_errors(
                "save_dir", request.directory, advice=f"{target} is committed, but older ones cannot be removed"
            ):
                retain(request.directory, request.retention, just_saved=step)
        return {}

    together(collectives, remove_old)
    return target


def _begin(request: _Request, stack: ExitStack) -> dict[str, Json]:
    directory = request.directory
    with disk_errors("save_dir", directory, advice=_ADVICE):
        make_directory(directory)
        remove_leftovers(directory, STEP_PATTERN)
        newest = newest_step(directory)
        step = request.step if request.step is not None else (0 if newest is None else newest) + 1
        target = checkpoint_path(directory, step)
        if os.path.lexists(target):
            raise CheckpointError(
                f"step={step!r} exists already ({target}); nothing is ever overwritten, use another step."
            )
        content = stack.enter_context(staging(target))
    return {"content": str(content), "target": str(target), "step": step}


def _write_own(content: Path, states: Sequence[EntryState], world: World) -> dict[str, FileRecord]:
    streams: dict[str, Json] = {"rank": world.rank, "world_size": world.world_size, **capture_streams()}
    file = random_file(world.rank)
    records = {file: write_file(content / file, [dumps(streams)])}
    for state in states:
        for name, gradients in state.gradients.items():
            records[name] = write_file(content / name, safetensors_chunks(gradients))
    return records


def _write_shared(request: _Request, content: Path, states: Sequence[EntryState]) -> dict[str, FileRecord]:
    values = {CLIENT_STATE: request.client_state, **{state.record_file: state.record for state in states}}
    return {file: write_file(content / file, [dumps(value)]) for file, value in values.items()}


def _merge(written: Sequence[Mapping[str, Json]]) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for files in written:
        for name, value in files.items():
            fields = as_dict(value, source=name)
            records[name] = FileRecord(size=int(str(fields["size"])), sha256=str(fields["sha256"]))
    return records


def _finish(request: _Request, content: Path, target: Path, manifest: Manifest) -> None:
    with disk_errors("save_dir", request.directory, advice=_ADVICE):
        write_file(content / MANIFEST, [render_manifest(manifest)])
        commit(content, target)


def _require_whole(setting: str, value: int | None, *, at_least: int) -> None:
    if value is not None and (type(value) is not int or value < at_least):
        raise ConfigError(f"{setting}={value!r} is not a whole number of at least {at_least}; use one, or None.")


def _require_real(setting: str, value: float | None, *, at_least: float = -math.inf) -> None:
    largest = sys.float_info.max
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_real and -largest <= value <= largest and value >= at_least):
        wanted = "a finite number" if at_least == -math.inf else f"a finite number of at least {at_least}"
        raise ConfigError(f"{setting}={value!r} is not {wanted}; use one, or None.")
