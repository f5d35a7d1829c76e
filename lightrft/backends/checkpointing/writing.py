"""A checkpoint on its way to the disk: a place, files that all agree are durable, one rename, and what goes then.

Ranks gather, and rank 0 writes. What fails before the rename says that earlier checkpoints are as they were; what fails
after it, that this one is committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
    reserving,
    stage,
    write_file,
)
from lightrft.backends.checkpointing.gathering import Agreed, taking_turns
from lightrft.backends.checkpointing.layout import MANIFEST, STEP_PATTERN, checkpoint_path, newest_step, step_of
from lightrft.backends.checkpointing.lossless import as_dict
from lightrft.backends.checkpointing.manifest import Manifest, render_manifest
from lightrft.backends.checkpointing.retention import Retention, retain
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks, writing_order
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["CheckpointContent", "Destination", "Place", "remove_surplus", "reserve", "write_checkpoint"]


@attrs.frozen(kw_only=True, eq=False)
class Destination:
    """Where a checkpoint goes.

    Attributes:
        directory: of all checkpoints of the run.
        step: number of the checkpoint; None takes one more than the newest, with those that are being written.
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


@attrs.frozen(kw_only=True)
class Place:
    """Where one checkpoint is written, and will stand.

    Attributes:
        step: its number.
        target: its directory, once it is committed.
        root: what `reserving` yielded to rank 0.
    """

    step: int
    target: Path
    root: Path


def reserve(
    destination: Destination,
    collectives: Collectives,
    world: World,
    stack: ExitStack,
    *,
    prepare: Callable[[], None] | None = None,
) -> Place:
    """Return a place for a new checkpoint, which rank 0 holds until the stack is closed; all ranks call it.

    Args:
        destination: where it goes.
        collectives: what the ranks do together.
        world: this process's place.
        stack: closed when the checkpoint is committed, or given up.
        prepare: called first on every rank; its error is one of all.

    Raises:
        CheckpointError: on all ranks, where any of them failed, or the step exists.
    """

    def begin() -> dict[str, Json]:
        if prepare is not None:
            prepare()
        return _reserve(destination, stack) if world.rank == 0 else {}

    with _reassuring():
        found = together(collectives, begin)[0]
    return Place(step=int(str(found["step"])), target=Path(str(found["target"])), root=Path(str(found["root"])))


def write_checkpoint(
    content: CheckpointContent,
    destination: Destination,
    place: Place,
    collectives: Collectives,
    world: World,
    *,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Write and commit a checkpoint; all ranks call it. Tensors are let go of as they are written.

    Args:
        content: what it holds, the same on all ranks but for what is a rank's own.
        destination: where it goes.
        place: where in there.
        collectives: what the ranks do together.
        world: this process's place.
        prepare: called first on every rank; its error is one of all.

    Raises:
        CheckpointError: on all ranks, where any of them failed.
    """
    is_first = world.rank == 0

    def begin() -> dict[str, Json]:
        if prepare is not None:
            prepare()
        with _disk_errors(destination):
            return {"folder": str(stage(place.root))} if is_first else {}

    with _reassuring():
        folder = Path(str(together(collectives, begin)[0]["folder"]))

        def write() -> dict[str, Json]:
            with _disk_errors(destination), taking_turns(content.agreed.turns, collectives, world) as pieces:
                records = _write_own(folder, content)
                if is_first:
                    records |= _write_shared(folder, content, pieces)
            return {file: attrs.asdict(record) for file, record in records.items()}

        files = _merge(together(collectives, write))

        def finish() -> dict[str, Json]:
            if is_first:
                with _disk_errors(destination):
                    _commit(folder, files, destination, place, world)
            return {}

        together(collectives, finish)


def remove_surplus(destination: Destination, place: Place, collectives: Collectives, world: World) -> None:
    """Remove the checkpoints that need not stay beside one that is committed; all ranks call it.

    Args:
        destination: where it went.
        place: where it stands.
        collectives: what the ranks do together.
        world: this process's place.

    Raises:
        CheckpointError: on all ranks, where one cannot be removed.
    """

    def remove_old() -> dict[str, Json]:
        if world.rank == 0:
            with disk_errors("save_dir", destination.directory, advice=f"step={place.step} is committed"):
                failures = retain(destination.directory, destination.retention, just_saved=place.step)
            if failures:
                words = ", ".join(f"{path} ({error.strerror or error})" for path, error in failures.items())
                raise CheckpointError(
                    f"step={place.step} is committed, and older checkpoints cannot be removed: {words}; remove them by "
                    "hand."
                )
        return {}

    together(collectives, remove_old)


@contextmanager
def _reassuring() -> Generator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error} Earlier checkpoints are as they were.") from error


def _disk_errors(destination: Destination) -> AbstractContextManager[None]:
    return disk_errors("save_dir", destination.directory, advice="free space or choose another directory")


def _reserve(destination: Destination, stack: ExitStack) -> dict[str, Json]:
    directory = destination.directory
    with _disk_errors(destination):
        make_directory(directory)
        written = remove_leftovers(directory, STEP_PATTERN)
        step = _choose_step(destination, written)
        target = checkpoint_path(directory, step)
        root = stack.enter_context(reserving(target))
    return {"step": step, "target": str(target), "root": str(root)}


def _choose_step(destination: Destination, written: Iterable[str]) -> int:
    """Return the step of a new checkpoint, with the names of those that are being written."""
    newest = newest_step(destination.directory)
    taken = [0 if newest is None else newest, *map(step_of, written)]
    step = max(taken) + 1 if destination.step is None else destination.step
    target = checkpoint_path(destination.directory, step)
    if os.path.lexists(target):
        raise CheckpointError(
            f"step={step!r} exists already ({target}); nothing is ever overwritten, use another step."
        )
    return step


def _commit(
    folder: Path, files: Mapping[str, FileRecord], destination: Destination, place: Place, world: World
) -> None:
    manifest = Manifest(
        step=place.step,
        world_size=world.world_size,
        metric=destination.metric,
        files=dict(files),
        strategy=destination.strategy,
    )
    write_file(folder / MANIFEST, [render_manifest(manifest)])
    commit(folder, place.target)


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
