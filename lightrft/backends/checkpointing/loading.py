"""`load_ckpt` and `latest_ckpt`: found by looking, verified, checked on all ranks, and only then applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, cast

import attrs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.access import StateAccess
from lightrft.backends.checkpointing.agreement import together
from lightrft.backends.checkpointing.durable import disk_errors
from lightrft.backends.checkpointing.entries import Entry, entries_of, handles_of
from lightrft.backends.checkpointing.layout import (
    CLIENT_STATE,
    checkpoint_path,
    committed_steps,
    gradients_file,
    model_file,
    newest_step,
    optimizer_file,
    random_file,
    state_file,
)
from lightrft.backends.checkpointing.lossless import as_dict, decode, loads
from lightrft.backends.checkpointing.manifest import Manifest, read_manifest
from lightrft.backends.checkpointing.named import difference
from lightrft.backends.checkpointing.randomness import plan_streams
from lightrft.backends.checkpointing.restore import (
    RestorePlan,
    load_schedules,
    plan_entry,
    undo_schedules,
    write_tensors,
)
from lightrft.backends.checkpointing.stored import saying_incomplete
from lightrft.backends.checkpointing.verification import identity_of, share_of, verifying
from lightrft.backends.copying import await_copy
from lightrft.backends.world import world_of
from lightrft.errors import CheckpointError, LightRFTError
from lightrft.strategy.protocols.checkpointing import Checkpointable, Json, LatestCkpt, LoadCkpt, LoadedCheckpoint
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["build_latest_ckpt", "build_load_ckpt"]


@attrs.frozen(kw_only=True, eq=False)
class _Plan:
    """What one call restores on this rank, checked."""

    entries: Sequence[RestorePlan]
    restore_streams: Callable[[], None]
    client_state: dict[str, Json]


def build_latest_ckpt() -> LatestCkpt:
    """Return `latest_ckpt`, which looks at names alone; `load_ckpt` takes the same one and verifies it."""

    def latest_ckpt(load_dir: str | os.PathLike[str]) -> int | None:
        return newest_step(Path(load_dir))

    return latest_ckpt


def build_load_ckpt(collectives: Collectives, access: StateAccess) -> LoadCkpt:
    """Return `load_ckpt` over the given ranks.

    Args:
        collectives: what the ranks do together.
        access: what a backend knows of live tensors.
    """

    def load_ckpt(
        model: Checkpointable,
        load_dir: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int | None = None,
    ) -> LoadedCheckpoint:
        entries = entries_of(model, optimizer, scheduler)
        await_copy(*handles_of(entries, access.unwrap_model))
        world = world_of(collectives)
        directory = Path(load_dir)

        def choose() -> dict[str, Json]:
            return {"step": _choose(directory, step)} if world.rank == 0 else {}

        chosen = int(str(together(collectives, choose)[0]["step"]))
        return _load(directory, chosen, entries, world, collectives, access)

    return load_ckpt


def _choose(directory: Path, step: int | None) -> int:
    chosen = newest_step(directory) if step is None else step
    if chosen is None:
        raise CheckpointError(
            f"load_dir={str(directory)!r} holds no checkpoint; save one first, or pass the directory of a run."
        )
    if not checkpoint_path(directory, chosen).is_dir():
        known = ", ".join(str(known) for known in committed_steps(directory)) or "none"
        raise CheckpointError(f"step={chosen!r} is not in load_dir={str(directory)!r}; use one of these: {known}.")
    return chosen


def _load(
    directory: Path,
    step: int,
    entries: Sequence[Entry],
    world: World,
    collectives: Collectives,
    access: StateAccess,
) -> LoadedCheckpoint:
    path = checkpoint_path(directory, step)
    manifests: list[Manifest] = []
    plans: list[_Plan] = []
    refusals: list[Exception] = []

    def look() -> dict[str, Json]:
        with _naming_older(directory, step):
            manifests.append(read_manifest(path, step=step))
            return {"identity": identity_of(path, manifests[0].files, rank=world.rank)}

    identities = [str(told["identity"]) for told in together(collectives, look)]
    share = share_of(manifests[0].files, identities, rank=world.rank)
    with ExitStack() as opened:

        def verify() -> dict[str, Json]:
            # what is planned meanwhile counts for nothing where a file is damaged, its refusal included
            with _naming_older(directory, step), verifying(path, share):
                try:
                    with disk_errors("load_dir", directory, advice="load again, or another checkpoint"):
                        plans.append(_plan(path, manifests[0], entries, world, access, opened))
                except Exception as error:  # noqa: BLE001 (told when all files are known to be whole)
                    refusals.append(error)
            return {}

        def refuse() -> dict[str, Json]:
            for error in refusals:
                _raise_refusal(error, path)
            return {}

        together(collectives, verify)
        together(collectives, refuse)
        _apply(plans[0], path, collectives)
    return LoadedCheckpoint(path=path, step=step, client_state=plans[0].client_state)


@contextmanager
def _naming_older(directory: Path, step: int) -> Generator[None, None, None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_older(directory, step)}") from error


def _raise_refusal(error: Exception, path: Path) -> NoReturn:
    malformed = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    if isinstance(error, malformed) and not isinstance(error, LightRFTError):
        raise CheckpointError(f"{path} has not the form of a checkpoint ({error!r}); load another one.") from error
    raise error


def _apply(plan: _Plan, path: Path, collectives: Collectives) -> None:
    def apply_schedules() -> dict[str, Json]:
        load_schedules(plan.entries, source=path)
        return {}

    def apply_rest() -> dict[str, Json]:
        with saying_incomplete(path):
            write_tensors(plan.entries)
            plan.restore_streams()
        return {}

    try:
        together(collectives, apply_schedules)
    except LightRFTError:  # of any rank
        undo_schedules(plan.entries)
        raise
    together(collectives, apply_rest)


def _plan(
    path: Path, manifest: Manifest, entries: Sequence[Entry], world: World, access: StateAccess, opened: ExitStack
) -> _Plan:
    _require_files(path, manifest, entries)
    _require_whole_window(path, manifest, entries, world)
    return _Plan(
        entries=[plan_entry(entry, access, path, manifest.files, rank=world.rank, opened=opened) for entry in entries],
        restore_streams=plan_streams(path, rank=world.rank, world_size=manifest.world_size),
        client_state=_client_state(path),
    )


def _require_files(path: Path, manifest: Manifest, entries: Sequence[Entry]) -> None:
    names = [entry.name for entry in entries]
    expected = {CLIENT_STATE, *(random_file(rank) for rank in range(manifest.world_size))}
    expected |= {file(name) for name in names for file in (model_file, state_file)}
    optional = {optimizer_file(name) for name in names} | _gradients_files(manifest, entries)
    files: Mapping[str, object] = dict.fromkeys(expected | optional & set(manifest.files), "file")
    words = difference(saved=dict.fromkeys(manifest.files, "file"), live=files)
    if words is not None:
        raise CheckpointError(
            f"{path} {words} (the call has the models {', '.join(names)}); pass what was saved, under its names."
        )


def _gradients_files(manifest: Manifest, entries: Sequence[Entry]) -> set[str]:
    return {gradients_file(entry.name, rank) for entry in entries for rank in range(manifest.world_size)}


def _require_whole_window(path: Path, manifest: Manifest, entries: Sequence[Entry], world: World) -> None:
    # what a rank has accumulated is its own share of the window, and the position counts micro-batches of a rank
    if world.world_size != manifest.world_size and _gradients_files(manifest, entries) & set(manifest.files):
        raise CheckpointError(
            f"{path} was saved by {manifest.world_size} ranks inside an accumulation window, and world_size is "
            f"{world.world_size}; load it with {manifest.world_size} ranks, or one that was saved between two windows."
        )


def _client_state(path: Path) -> dict[str, Json]:
    file = path / CLIENT_STATE
    state = as_dict(loads(file.read_bytes(), source=str(file)), source=str(file))
    return as_dict(cast("Json", decode(state)), source=str(file))


def _older(directory: Path, step: int) -> str:
    older = [known for known in committed_steps(directory) if known < step]
    return f" The newest older checkpoint is step={older[-1]}; pass that to load it." if older else ""
