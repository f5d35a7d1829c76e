"""A checkpoint on its way to the disk: ranks gather and rank 0 writes, all agree that files are durable, one rename."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import torch

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
from lightrft.backends.checkpointing.gathering import Agreed, taking_turns
from lightrft.backends.checkpointing.layout import MANIFEST, STEP_PATTERN, checkpoint_path, newest_step
from lightrft.backends.checkpointing.lossless import as_dict
from lightrft.backends.checkpointing.manifest import Manifest, render_manifest
from lightrft.backends.checkpointing.retention import Retention, retain
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks, writing_order
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["CheckpointContent", "Destination", "choose_step", "write_checkpoint"]

_ADVICE = "free space or choose another directory; earlier checkpoints are as they were"


@attrs.frozen(kw_only=True, eq=False)
class Destination:
    """Where a checkpoint goes.

    Attributes:
        directory: of all checkpoints of the run.
        step: number of the checkpoint; None takes one more than the newest.
        metric: how good it is; None is unknown.
        retention: which checkpoints stay.
        strategy: key of what wrote it, or None.
    """

    directory: Path
    step: int | None
    metric: float | None
    retention: Retention
    strategy: str | None


@attrs.frozen(kw_only=True, eq=False)
class CheckpointContent:
    """What a checkpoint holds.

    Attributes:
        agreed: tensors of the files that rank 0 writes.
        shared: the other files that rank 0 writes, encoded.
        own: files that this rank writes, encoded.
        gradients: this rank's own, by file and name.
    """

    agreed: Agreed
    shared: Mapping[str, bytes]
    own: Mapping[str, bytes]
    gradients: Mapping[str, Mapping[str, torch.Tensor]]


def choose_step(destination: Destination) -> int:
    """Return the step of a new checkpoint; nothing is made.

    Args:
        destination: where it goes.

    Raises:
        CheckpointError: it exists, or the directory cannot be read.
    """
    newest = newest_step(destination.directory)
    step = destination.step if destination.step is not None else (0 if newest is None else newest) + 1
    target = checkpoint_path(destination.directory, step)
    if os.path.lexists(target):
        raise CheckpointError(
            f"step={step!r} exists already ({target}); nothing is ever overwritten, use another step."
        )
    return step


def write_checkpoint(
    content: CheckpointContent,
    destination: Destination,
    collectives: Collectives,
    world: World,
    *,
    prepare: Callable[[], None] | None = None,
) -> Path:
    """Write and commit a checkpoint, then remove those that need not stay, and return its directory.

    All ranks call it. Tensors are let go of as they are written.

    Args:
        content: what it holds, the same on all ranks but for what is a rank's own.
        destination: where it goes.
        collectives: what the ranks do together.
        world: this process's place.
        prepare: called first on every rank; its error is one of all.

    Raises:
        CheckpointError: on all ranks, where any of them failed; earlier checkpoints are as they were.
    """
    is_first = world.rank == 0
    with ExitStack() as stack:

        def begin() -> dict[str, Json]:
            if prepare is not None:
                prepare()
            return _begin(destination, stack) if is_first else {}

        place = together(collectives, begin)[0]
        folder, target, step = Path(str(place["folder"])), Path(str(place["target"])), int(str(place["step"]))

        def write() -> dict[str, Json]:
            with (
                disk_errors("save_dir", destination.directory, advice=_ADVICE),
                taking_turns(content.agreed.turns, collectives, world) as pieces,
            ):
                records = _write_own(folder, content)
                if is_first:
                    records |= _write_shared(folder, content, pieces)
            return {file: attrs.asdict(record) for file, record in records.items()}

        written = together(collectives, write)

        def finish() -> dict[str, Json]:
            if is_first:
                manifest = Manifest(
                    step=step,
                    world_size=world.world_size,
                    metric=destination.metric,
                    files=_merge(written),
                    strategy=destination.strategy,
                )
                with disk_errors("save_dir", destination.directory, advice=_ADVICE):
                    write_file(folder / MANIFEST, [render_manifest(manifest)])
                    commit(folder, target)
            return {}

        together(collectives, finish)

    def remove_old() -> dict[str, Json]:
        if is_first:
            with disk_errors(
                "save_dir", destination.directory, advice=f"{target} is committed, but older ones cannot be removed"
            ):
                retain(destination.directory, destination.retention, just_saved=step)
        return {}

    together(collectives, remove_old)
    return target


def _begin(destination: Destination, stack: ExitStack) -> dict[str, Json]:
    directory = destination.directory
    with disk_errors("save_dir", directory, advice=_ADVICE):
        make_directory(directory)
        remove_leftovers(directory, STEP_PATTERN)
        step = choose_step(destination)
        target = checkpoint_path(directory, step)
        folder = stack.enter_context(staging(target))
    return {"folder": str(folder), "target": str(target), "step": step}


def _write_own(folder: Path, content: CheckpointContent) -> dict[str, FileRecord]:
    records = {file: write_file(folder / file, [written]) for file, written in content.own.items()}
    for file, gradients in content.gradients.items():
        records[file] = write_file(folder / file, safetensors_chunks(gradients, _pieces(gradients)))
    return records


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for name in writing_order(tensors):
        yield bytes_of(tensors[name]).cpu()


def _write_shared(folder: Path, content: CheckpointContent, pieces: Iterator[torch.Tensor]) -> dict[str, FileRecord]:
    records = {file: write_file(folder / file, [written]) for file, written in content.shared.items()}
    for file, table in content.agreed.tables.items():
        records[file] = write_file(folder / file, safetensors_chunks(table, pieces))
    return records


def _merge(written: Sequence[Mapping[str, Json]]) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for files in written:
        for name, value in files.items():
            fields = as_dict(value, source=name)
            records[name] = FileRecord(size=int(str(fields["size"])), sha256=str(fields["sha256"]))
    return records
