"""What was read of another program's checkpoint, written as one of ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from lightrft.backends.checkpointing.access import LiveTensor, OptimizerState, ParameterGroup, ParameterState, Part
from lightrft.backends.checkpointing.durable import (
    FileRecord,
    commit,
    disk_errors,
    make_directory,
    remove_leftovers,
    staging,
    write_file,
)
from lightrft.backends.checkpointing.foreign.record import ForeignModel, ForeignOptimizer, ForeignTensor
from lightrft.backends.checkpointing.layout import (
    CLIENT_STATE,
    MANIFEST,
    STEP_PATTERN,
    checkpoint_path,
    model_file,
    optimizer_file,
    require_entry_names,
    state_file,
)
from lightrft.backends.checkpointing.lossless import dumps
from lightrft.backends.checkpointing.manifest import Manifest, OnRead, render_manifest
from lightrft.backends.checkpointing.state import optimizer_record, optimizer_tensors
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks, writing_order
from lightrft.errors import CheckpointError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["require_free", "tables_of", "write_imported"]


def require_free(directory: Path, step: int) -> Path:
    """Return where the checkpoint of a step will stand.

    Args:
        directory: that of all checkpoints; it need not exist.
        step: its number.

    Raises:
        CheckpointError: something stands there.
    """
    target = checkpoint_path(directory, step)
    if os.path.lexists(target):
        raise CheckpointError(f"step={step!r} exists already ({target}); nothing is ever overwritten, use another.")
    return target


def tables_of(found: ForeignModel, *, name: str) -> dict[str, Mapping[str, LiveTensor]]:
    """Return the tensors by the files that they will stand in.

    Args:
        found: what was read.
        name: what the model is called from now on.

    Raises:
        ConfigError: the name is none, or the optimizer holds what cannot be written.
    """
    require_entry_names([name])
    tensors = {key: _as_if_live(tensor) for key, tensor in found.tensors.items()}
    tables: dict[str, Mapping[str, LiveTensor]] = {model_file(name): tensors}
    if found.optimizer is not None:
        tables[optimizer_file(name)] = optimizer_tensors(_state_of(found.optimizer), name)
    return tables


def write_imported(
    found: ForeignModel, directory: Path, *, step: int, name: str, on_write: OnRead | None = None
) -> Path:
    """Write a checkpoint that `load_ckpt` takes, by one rename, and return where.

    It holds no schedule and no random streams.

    Args:
        found: what was read.
        directory: that of all checkpoints; it need not exist.
        step: under which the checkpoint stands there.
        name: what the model is called.
        on_write: told of the bytes as they are written.

    Raises:
        ConfigError: see `tables_of`.
        CheckpointError: the step is there already, a file of the source is damaged, or the disk refuses.
    """
    target = require_free(directory, step)
    record: dict[str, Json] = {
        "aliases": dict(found.aliases),
        "optimizer": None if found.optimizer is None else optimizer_record(_state_of(found.optimizer), name),
        "scheduler": None,
    }
    with disk_errors("TARGET", directory, advice="free space or choose another; what was there is as it was"):
        make_directory(directory)
        remove_leftovers(directory, STEP_PATTERN)
        with staging(target) as content:
            records: dict[str, FileRecord] = {}
            for file, value in {CLIENT_STATE: {}, state_file(name): record}.items():
                records[file] = write_file(content / file, [dumps(value)])
            for file, table in tables_of(found, name=name).items():
                records[file] = write_file(
                    content / file, _counted(safetensors_chunks(table, _pieces(table)), on_write)
                )
            # no rank of ours wrote it: each keeps the random streams that it was set up with
            manifest = Manifest(step=step, world_size=0, files=records)
            write_file(content / MANIFEST, [render_manifest(manifest)])
            commit(content, target)
    return target


def _counted(chunks: Iterator[memoryview | bytes], on_write: OnRead | None) -> Iterator[memoryview | bytes]:
    for chunk in chunks:
        yield chunk
        if on_write is not None:
            on_write(len(chunk))


def _as_if_live(tensor: ForeignTensor) -> LiveTensor:
    def part() -> Part:
        return Part(values=tensor.read(), start=0)

    return LiveTensor(shape=tensor.shape, dtype=tensor.dtype, part=part, is_whole=True)


def _pieces(tensors: Mapping[str, LiveTensor]) -> Iterator[torch.Tensor]:
    for name in writing_order(tensors):
        yield bytes_of(tensors[name].part().values)


def _state_of(optimizer: ForeignOptimizer) -> OptimizerState:
    return OptimizerState(
        defaults={key for group in optimizer.groups for key in group.options},
        groups=[ParameterGroup(options={**group.options}, parameters=group.parameters) for group in optimizer.groups],
        parameters={
            name: ParameterState(
                tensors={key: _as_if_live(tensor) for key, tensor in state.tensors.items()}, values=state.values
            )
            for name, state in optimizer.parameters.items()
        },
        plan_parameter=_refuse,
    )


def _refuse(
    name: str, saved: Mapping[str, object] | None, *, options: Mapping[str, object], source: str
) -> Callable[[], None]:
    del saved, options, source
    raise UnsupportedError(f"{name} is in a checkpoint of another program, which is only read; load into a live model.")
